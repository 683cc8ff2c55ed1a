"""Time and tokens of guided decoding: the published way, re-encoding, plain generation, and ours.

    python benchmarks/guided_decoding.py --output guided_decoding.json     # all models
    python benchmarks/guided_decoding.py --quick                           # the 1M model only

The variants of a cell (model, prompt length, K) take turns, repeat after repeat. Results are written after
every cell.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decoding_report import agree, ratios, report, summary
from decoding_task import Models, Outcome, Task
from decoding_variants import ours, ours_at_once, plain, published, reencoded
from measuring import machine, synchronise, write_results
from shapes import ABOUT_1_5B, ABOUT_1M, ABOUT_30M, SMOLLM2_135M, TINY, Shape

from mahalo_ray.decoding.step_graph import record_cuda_graph


@dataclass(frozen=True)
class Size:
    """A model's shape, and how often a cell of it is measured by default."""

    shape: Shape
    repeats: int


SIZES = {
    "tiny": Size(TINY, 1),
    "1m": Size(ABOUT_1M, 3),
    "30m": Size(ABOUT_30M, 2),
    "135m": Size(SMOLLM2_135M, 1),
    "1.5b": Size(ABOUT_1_5B, 1),
}
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
WAYS: dict[str, Callable[[Models, Task], Outcome]] = {
    "published": published,
    "reencoded": reencoded,
    "plain": plain,
    "ours": ours,
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    unknown = sorted(set(options.ways) - set(WAYS)) + sorted(set(options.models) - set(SIZES))
    if unknown:
        raise SystemExit(f"unknown '{unknown[0]}'. Models: {', '.join(SIZES)}. Ways: {', '.join(WAYS)}.")
    if options.clock == "cpu" and options.threads != 1:
        raise SystemExit("--clock cpu adds up the time of all threads: use it with --threads 1")
    if options.cuda_graphs and not options.device.startswith("cuda"):
        raise SystemExit("--cuda-graphs needs --device cuda")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    results: dict[str, Any] = {
        "benchmark": "guided_decoding",
        "machine": machine(),
        "sizes": {
            name: getattr(options, name)
            for name in ("steps", "step_tokens", "temperature", "dtype", "device", "cuda_graphs", "clock")
        },
        "cells": [],
    }
    for name in ["1m"] if options.quick else options.models:
        size = SIZES[name]
        recorder = record_cuda_graph if options.cuda_graphs else None
        models = Models.build(size.shape, device, dtype, recorder)
        models.clock = CLOCKS[options.clock]
        about = {
            "model": name,
            "parameters": sum(p.numel() for p in models.policy.parameters()),
            "weight_bytes": sum(p.nbytes for p in models.policy.parameters()),
        }
        _warm_up(models, options)
        for prompt_tokens in options.prompts:
            for candidates in options.candidates:
                task = Task(
                    prompt_tokens, candidates, options.steps, options.step_tokens, options.temperature
                )
                found = cell(models, task, options.ways, options.repeats or size.repeats)
                results["cells"].append({**about, **asdict(task), **found})
                _save(options, results)
            if options.requests > 1 and "ours" in options.ways:
                found = at_once(models, task_of(options, prompt_tokens), options.requests)
                results.setdefault("at_once", []).append({**about, "prompt_tokens": prompt_tokens, **found})
                _save(options, results)
    print(report(results))


def task_of(options: argparse.Namespace, prompt_tokens: int) -> Task:
    """The request that runs many at once."""
    return Task(
        prompt_tokens, options.requests_candidates, options.steps, options.step_tokens, options.temperature
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the 1M model only")
    parser.add_argument(
        "--models", type=_names, default=("1m", "30m", "135m"), help="of tiny,1m,30m,135m,1.5b"
    )
    parser.add_argument("--prompts", type=_numbers, default=(100, 500), help="prompt lengths in tokens")
    parser.add_argument("--candidates", type=_numbers, default=(1, 5, 16), help="values of K")
    parser.add_argument("--ways", type=_names, default=tuple(WAYS), help=f"of {','.join(WAYS)}")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--step-tokens", type=int, default=40)
    parser.add_argument("--temperature", type=float, default=1.0, help="0: greedy, all candidates alike")
    parser.add_argument("--requests", type=int, default=16, help="requests at once, 1: leave that part out")
    parser.add_argument("--requests-candidates", type=int, default=5, help="their K")
    parser.add_argument("--repeats", type=int, default=None, help="default: 3, 2 and 1 for 1m, 30m and 135m")
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: its own choice")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="ours: forwards recorded and repeated, on a card"
    )
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: on a machine in use")
    parser.add_argument("--output", type=Path, default=None, help="results as JSON")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _save(options: argparse.Namespace, results: dict[str, Any]) -> None:
    if options.output is not None:
        write_results(options.output, results)


def _warm_up(models: Models, options: argparse.Namespace) -> None:
    """What happens once per process or model (tables of the vocabulary, the first touch of every weight)."""
    task = Task(prompt_tokens=8, candidates=2, steps=2, step_tokens=2, temperature=options.temperature)
    for name in options.ways:
        WAYS[name](models, task)


# -- measuring -----------------------------------------------------------------------------------------------


def clocked(models: Models, run: Callable[[], Outcome]) -> Outcome:
    synchronise(models.policy.device)
    started = models.clock()
    outcome = run()
    synchronise(models.policy.device)
    outcome.seconds = models.clock() - started
    return outcome


def cell(models: Models, task: Task, ways: Sequence[str], repeats: int) -> dict[str, Any]:
    """Every way on one task; the ways take turns."""
    runs: dict[str, list[Outcome]] = {name: [] for name in ways}
    for number in range(repeats):
        for name in ways:
            runs[name].append(clocked(models, partial(WAYS[name], models, task)))
            print(
                f"prompt {task.prompt_tokens}, K={task.candidates}, repeat {number + 1} of {repeats}: "
                f"{name}: {runs[name][-1].seconds:.2f} s",
                file=sys.stderr,
                flush=True,
            )
    figures = {name: summary(each) for name, each in runs.items()}
    figures_of_ours = runs.get("ours")
    agreement = {}
    if figures_of_ours:
        for name in ("published", "reencoded"):
            if name in runs:
                agreement[name] = agree(runs[name][0], figures_of_ours[0])
    return {
        "ways": figures,
        "ratios": ratios(figures),
        "agreement": agreement,
        "cache_bytes_per_token": models.cache_bytes_per_token(),
    }


def at_once(models: Models, task: Task, requests: int) -> dict[str, Any]:
    """Throughput of many guided requests in one batch against one at a time."""
    one = clocked(models, partial(ours, models, task))
    tasks = [replace(task, seed=number) for number in range(requests)]
    many = clocked(models, partial(ours_at_once, models, tasks))
    output = task.steps * task.step_tokens
    return {
        "requests": requests,
        "candidates": task.candidates,
        "seconds_one": one.seconds,
        "seconds_all": many.seconds,
        "tokens_per_second_one": output / one.seconds,
        "tokens_per_second_all": requests * output / many.seconds,
        "throughput_ratio": requests * one.seconds / many.seconds,
        "same_first_answer": one.token_ids == many.token_ids,
        "policy_cache_bytes": many.policy_cache_bytes,
        "reward_cache_bytes": many.reward_cache_bytes,
    }


if __name__ == "__main__":
    main()
