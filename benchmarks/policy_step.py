"""Time and memory of one DPO step: the textbook's, TRL's and ours, on the same shapes, pairs and dtype.

    python benchmarks/policy_step.py --preset smollm2-135m --output policy_step.json

Every measurement runs in a process of its own, so that its peak memory is its own; the variants take turns,
round after round, so that a slow minute of the machine does not fall on one of them alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from measuring import PeakMemory, installed, machine, mib, options_of, synchronise, write_results
from step_report import checks, ratios, report, summary
from step_variants import PRESETS, Pairs, Setting, Step, make_pairs, ours, reference_logps, textbook, trl

_WARM_UP_TOKENS = 4
KINDS = (
    "textbook",
    "trl",
    "trl_precomputed",
    "full",
    "low_rank",
    "recomputed",
)  # unless others are asked for
LORA = ("lora", "lora_recomputed")


@dataclass(frozen=True)
class Variant:
    """What is measured: a kind of step and its number of heads."""

    kind: Literal[
        "textbook", "trl", "trl_precomputed", "full", "low_rank", "recomputed", "lora", "lora_recomputed"
    ]
    heads: int

    @property
    def name(self) -> str:
        return {
            "textbook": f"textbook, H={self.heads}",
            "trl": "TRL",
            "trl_precomputed": "TRL, reference precomputed",
            "full": f"ours, full, H={self.heads}",
            "low_rank": f"ours, low_rank, H={self.heads}",
            "recomputed": f"ours, recomputed, H={self.heads}",
            "lora": f"ours, lora, H={self.heads}",
            "lora_recomputed": f"ours, lora_recomputed, H={self.heads}",
        }[self.kind]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.measure is not None:
        print(json.dumps(measure(options)))
        return
    if options.steps < 1 or options.rounds < 1 or options.pairs < 1:
        raise SystemExit("--steps, --rounds and --pairs must be at least 1")
    variants = _variants(options)
    results: dict[str, Any] = {
        "benchmark": "policy_step",
        "machine": machine(),
        "sizes": _sizes(options),
        "rounds": options.rounds,
        "steps_per_round": options.steps,
    }
    runs: dict[Variant, list[dict[str, Any]]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.json"
        results["reference_seconds"] = _run(options, Variant("textbook", 0), reference)["seconds"]
        for number in range(options.rounds):
            for variant in variants:
                runs[variant].append(_run(options, variant, reference))
                one = runs[variant][-1]
                print(
                    f"round {number + 1} of {options.rounds}: {variant.name}: "
                    f"{statistics.median(one['seconds']):.3f} s, {mib(one['peak'] - one['base'])}",
                    file=sys.stderr,
                    flush=True,
                )
            results["variants"] = {v.name: summary(each) for v, each in runs.items() if each}
            results["ratios"], results["checks"] = ratios(results["variants"]), checks(results["variants"])
            if options.output is not None:
                write_results(options.output, results)
    print(report(results))


def _parser() -> argparse.ArgumentParser:
    parser = options_of(__doc__, PRESETS, "smollm2-135m")
    parser.add_argument("--pairs", type=int, default=2, help="pairs per step")
    parser.add_argument("--heads", type=_numbers, default=(1, 2, 3, 4, 8), help="H of ours: 1,2,3,4,8")
    parser.add_argument(
        "--textbook-heads",
        type=_numbers,
        default=(3,),
        help="H of the textbook step and of ours recomputed: 3",
    )
    parser.add_argument(
        "--variants",
        type=lambda text: tuple(text.split(",")),
        default=KINDS,
        help=f"a selection, separated by commas; besides the default's also {', '.join(LORA)}",
    )
    parser.add_argument("--steps", type=int, default=1, help="timed steps per process")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--measure", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--reference", type=Path, default=None, help=argparse.SUPPRESS)
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _variants(options: argparse.Namespace) -> list[Variant]:
    unknown = [name for name in options.variants if name not in KINDS + LORA]
    if unknown:
        raise SystemExit(f"unknown variant '{unknown[0]}'. Known: {', '.join(KINDS + LORA)}.")
    with_trl = installed("trl") is not None
    if not with_trl and any(name.startswith("trl") for name in options.variants):
        print("TRL is not installed (pip install mahalo_ray[benchmarks]): left out", file=sys.stderr)
    found = []
    for name in options.variants:
        if name.startswith("trl"):
            found += [Variant(name, 1)] if with_trl else []
        else:
            few = name in ("textbook", "recomputed")
            found += [Variant(name, number) for number in (options.textbook_heads if few else options.heads)]
    return found


def _sizes(options: argparse.Namespace) -> dict[str, Any]:
    preset = PRESETS[options.preset]
    pairs = make_pairs(preset, options.pairs, 1)
    return {
        "preset": options.preset,
        "pairs": options.pairs,
        "prompt_tokens": preset.prompt_tokens,
        "lengths_chosen": [len(p) + len(c) for p, c in zip(pairs.prompts, pairs.chosen, strict=True)],
        "lengths_rejected": [len(p) + len(r) for p, r in zip(pairs.prompts, pairs.rejected, strict=True)],
        "vocabulary": preset.shape.vocab_size,
        "logit_chunk": preset.chunk_size,
        "dtype": options.dtype,
        "device": options.device,
    }


def _run(options: argparse.Namespace, variant: Variant, reference: Path) -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--measure", f"{variant.kind}:{variant.heads}"]
    command += ["--reference", str(reference)]
    for name in ("preset", "pairs", "steps", "dtype", "device", "threads"):
        value = getattr(options, name)
        command += [] if value is None else [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{variant.name} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# -- in the measured process ---------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one variant; `textbook:0` writes the reference's log-probs instead."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    kind, heads = options.measure.split(":")
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    setting = Setting(PRESETS[options.preset], options.pairs, device, dtype)
    pairs = make_pairs(setting.preset, setting.pairs, max(int(heads), 1))
    if heads == "0":
        started = time.perf_counter()
        logps = reference_logps(setting, pairs)
        options.reference.write_text(json.dumps(logps.tolist()))
        return {"seconds": time.perf_counter() - started}
    stored = torch.tensor(json.loads(options.reference.read_text()))
    if kind == "textbook":
        step = textbook(setting, int(heads))
    elif kind in ("full", "low_rank"):
        step = ours(setting, int(heads), kind)
    elif kind == "recomputed":
        step = ours(setting, int(heads), "low_rank", recomputed=True)
    elif kind in LORA:
        step = ours(setting, int(heads), "low_rank", kind == "lora_recomputed", lora=True)
    else:
        step = trl(setting, kind == "trl_precomputed", pairs)
    return _timed(step, pairs, stored, setting, options.steps)


def _timed(step: Step, pairs: Pairs, stored: torch.Tensor, setting: Setting, steps: int) -> dict[str, Any]:
    trained = [parameter for parameter in step.trained.parameters() if parameter.requires_grad]
    # Learning rate 0: a real update at its real price that leaves the weights, so every step is the same.
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    memory = PeakMemory(setting.device)
    base = memory.now()
    short = pairs.cut_short(_WARM_UP_TOKENS)
    _step(step, optimizer, short, stored, setting)
    seconds, forward_backward, losses = [], [], []
    memory.now()
    memory.reset()
    for _ in range(steps):
        loss, until_update, whole = _step(step, optimizer, pairs, stored, setting)
        losses.append(loss)
        forward_backward.append(until_update)
        seconds.append(whole)
    size = {p: p.numel() * p.element_size() for p in (*step.trained.parameters(), *_frozen(step))}
    return {
        "seconds": seconds,
        "forward_backward": forward_backward,
        "losses": losses,
        "base": base,
        "peak": memory.peak(),
        "weights": sum(size.values()),
        "gradients": sum(size[p] for p in trained),
        "optimizer": sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim()),
    }


def _frozen(step: Step) -> list[torch.nn.Parameter]:
    return [] if step.frozen is None else list(step.frozen.parameters())


def _step(
    step: Step, optimizer: torch.optim.Optimizer, pairs: Pairs, stored: torch.Tensor, setting: Setting
) -> tuple[float, float, float]:
    """(loss, seconds until the update, seconds)."""
    synchronise(setting.device)
    started = time.perf_counter()
    loss = step.loss(pairs, stored)
    loss.backward()
    synchronise(setting.device)
    until_update = time.perf_counter() - started
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    synchronise(setting.device)
    return loss.item(), until_update, time.perf_counter() - started


if __name__ == "__main__":
    main()
