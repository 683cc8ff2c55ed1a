"""The programs of `benchmarks/`, run in this process: in a new one the imports alone take ten seconds."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def program(name: str) -> ModuleType:
    """A benchmark's module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module(name)


def results_of(name: str, output: Path, *options: str) -> dict[str, Any]:
    """What a benchmark writes with these options, on one thread; `printed`: what it prints."""
    main, threads = program(name).main, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            main(["--output", str(output), *options])
    finally:
        torch.set_num_threads(threads)
    results: dict[str, Any] = json.loads(output.read_text())
    return {**results, "printed": printed.getvalue()}
