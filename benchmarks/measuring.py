"""What every benchmark here needs: the machine in words, peak memory, tables, results."""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from mahalo_ray.decoding import cpu_matmul
from mahalo_ray.objectives import Weights

_PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "numpy")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, load and versions: what a figure depends on besides the code."""
    described = {
        "processor": _processor(),
        "instructions": _instructions(),
        "memory_gb_per_second": round(memory_bandwidth() / 1e9, 1),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := installed(name)) is not None},
    }
    if torch.cuda.is_available():
        described["accelerator"] = torch.cuda.get_device_name()
    return described


def installed(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def memory_bandwidth(size: int = 1 << 28, repeats: int = 5) -> float:
    """Bytes per second that torch's threads read from memory at best, now: products of few rows, as in
    decoding, can go no faster than their weights arrive."""
    buffer = torch.ones(size // 4)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - started)
    return size / min(seconds)


_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
_HELD_TO = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")  # a processor that is held to fewer instructions


def _instructions() -> dict[str, bool | str | list[str] | dict[str, str]]:
    """What the products of matrices are made with (`mahalo_ray.decoding.cpu_matmul` chooses by it)."""
    flags = set(_cpu_info("flags").split())
    return {
        "processor": [feature for feature in _FEATURES if feature in flags],
        "held_to": {name: os.environ[name] for name in _HELD_TO if name in os.environ},
        "torch": torch.backends.cpu.get_cpu_capability(),
        "packed_fp32": cpu_matmul.packing_is_faster(),
        "onednn_unpacked_fp32": cpu_matmul.onednn_is_faster(),
        "packed_bf16": cpu_matmul.multiplies_bfloat16(),
    }


def _processor() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(name: str) -> str:
    """What Linux says of the first processor; nothing elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def balances(objectives: Sequence[str], shares: Sequence[float]) -> dict[str, Weights]:
    """The points of a front by their names. Two objectives: at these shares of the first. More: each alone,
    every two of them half and half, and all alike."""
    if len(objectives) == 2:
        first, second = objectives
        return {f"{share:g}": Weights({first: share, second: 1 - share}) for share in shares}
    pairs = itertools.combinations(objectives, 2)
    return {
        **{name: Weights.one(name) for name in objectives},
        **{" + ".join(pair): Weights.balanced(pair) for pair in pairs},
        "all": Weights.balanced(objectives),
    }


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock read next is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Highest memory since `reset`: resident memory of this process, or allocated memory of a CUDA device.

    On Linux the kernel keeps the peak itself, exactly. Elsewhere it cannot be reset: `peak` is then the
    highest since the process began.
    """

    _CLEAR = Path("/proc/self/clear_refs")
    _STATUS = Path("/proc/self/status")

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> int:
        """Bytes in use, garbage and memory freed but not given back left out."""
        gc.collect()
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        return psutil.Process().memory_info().rss

    def reset(self) -> None:
        """Begin a new stretch."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._CLEAR.exists():
            self._CLEAR.write_text("5")

    def peak(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if self._STATUS.exists():
            for line in self._STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def options_of(description: str | None, presets: Iterable[str], preset: str) -> argparse.ArgumentParser:
    """Options of a benchmark over presets: which one, how often, on how many threads, and where to."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=list(presets), default=preset)
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured")
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: its own choice")
    parser.add_argument("--output", type=Path, default=None, help="results as JSON")
    return parser


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text: the first column to the left, the others to the right."""
    widths = [max(len(row[at]) for row in [header, *rows]) for at in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [
            cell.ljust(w) if at == 0 else cell.rjust(w)
            for at, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def mib(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**20:.0f} MiB"


def write_results(path: Path, results: dict[str, Any]) -> None:
    """As JSON; the file is whole or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)
