"""Scoring K candidates for one next step: over a kept cache, and with the whole text encoded again.

    python benchmarks/reward_scoring.py --output reward_scoring.json

A frozen reward model with all three head inputs reads a prefix once. Then, step after step, K candidates are
scored and the best is accepted. Both ways see the same candidates and must give the same scores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from measuring import machine, options_of, table, write_results
from shapes import ABOUT_30M, SMOLLM2_135M, TINY, Shape
from torch import Tensor

from mahalo_ray.decoding.cached_scorer import RewardConversations
from mahalo_ray.decoding.cpu_matmul import OneDNNHead, OneDNNLinears
from mahalo_ray.models import ProcessRewardModel
from mahalo_ray.models.scoring import TokenTrace

PRESETS: dict[str, Shape] = {"tiny": TINY, "30m": ABOUT_30M, "smollm2-135m": SMOLLM2_135M}
Ids = list[int]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    shape = PRESETS[options.preset]
    base = shape.build(1, torch.float32, torch.device("cpu"))
    model = ProcessRewardModel.from_base(base, {"a": "value", "b": "probability"}, tuning="frozen").eval()
    rng = np.random.default_rng(3)
    prefix = rng.integers(0, shape.end_id, options.prefix).tolist()
    steps = [
        [rng.integers(0, shape.end_id, options.step_tokens).tolist() for _ in range(options.candidates)]
        for _ in range(options.steps)
    ]
    kept(model, prefix, steps[:1])  # warm-up
    found = [(kept(model, prefix, steps), encoded_again(model, prefix, steps)) for _ in range(options.rounds)]
    results: dict[str, Any] = {
        "benchmark": "reward_scoring",
        "machine": machine(),
        "preset": options.preset,
        **{
            name: getattr(options, name)
            for name in ("prefix", "candidates", "steps", "step_tokens", "rounds")
        },
    }
    for at, name in enumerate(("kept", "encoded_again")):
        seconds = [value for pair in found for value in pair[at]["seconds"]]
        results[name] = {
            "seconds_per_step": statistics.median(seconds),
            "tokens_per_step": found[0][at]["tokens"],
        }
    ours, theirs = found[0]
    results["times_fewer_tokens"] = theirs["tokens"] / ours["tokens"]
    results["times_as_fast"] = (
        results["encoded_again"]["seconds_per_step"] / results["kept"]["seconds_per_step"]
    )
    results["largest_difference_of_scores"] = float((ours["scores"] - theirs["scores"]).abs().max())
    if options.output is not None:
        write_results(options.output, results)
    print(report(results))


def _parser() -> argparse.ArgumentParser:
    parser = options_of(__doc__, PRESETS, "smollm2-135m")
    parser.add_argument("--prefix", type=int, default=500, help="tokens before the first step")
    parser.add_argument("--candidates", type=int, default=5, help="K")
    parser.add_argument("--steps", type=int, default=3, help="steps scored one after the other")
    parser.add_argument("--step-tokens", type=int, default=40, help="tokens of every candidate")
    return parser


def kept(model: ProcessRewardModel, prefix: Ids, steps: Sequence[Sequence[Ids]]) -> dict[str, Any]:
    """Only the candidates' tokens go through the backbone. Reading the prefix is not timed: in decoding it is
    read once."""
    conversations = RewardConversations(model)
    (row,) = conversations.add(1)
    conversations.append([row], [prefix])
    conversations.score_candidates([row], [[[0]]])  # reads the prefix
    before = conversations.tokens_forwarded

    def score(candidates: Sequence[Ids], text: Ids) -> Tensor:
        scores = conversations.score_candidates([row], [candidates])[0]
        conversations.accept([row], [candidates[_best(scores)]])
        return scores

    found = _timed(score, prefix, steps)
    found["tokens"] = (conversations.tokens_forwarded - before) / len(steps)
    return found


def encoded_again(model: ProcessRewardModel, prefix: Ids, steps: Sequence[Sequence[Ids]]) -> dict[str, Any]:
    """The whole text of every candidate, all K in one batch; with the same kernels as the other way."""
    tokens, fast = 0, OneDNNLinears(model.backbone)
    fast_head = OneDNNHead(model.config.hidden_size, model.config.vocab_size)

    def score(candidates: Sequence[Ids], text: Ids) -> Tensor:
        nonlocal tokens
        traces = [TokenTrace(text + own, [len(text)], [len(text) + len(own) - 1]) for own in candidates]
        tokens += sum(len(trace.input_ids) for trace in traces)
        with fast(), fast_head():
            return torch.stack([scores[0] for scores in model.score_traces(traces, len(traces))])

    found = _timed(score, prefix, steps)
    found["tokens"] = tokens / len(steps)
    return found


def _timed(
    score: Callable[[Sequence[Ids], Ids], Tensor], prefix: Ids, steps: Sequence[Sequence[Ids]]
) -> dict[str, Any]:
    text, seconds, scores = list(prefix), [], []
    for candidates in steps:
        started = time.perf_counter()
        found = score(candidates, text)
        seconds.append(time.perf_counter() - started)
        scores.append(found)
        text += candidates[_best(found)]
    return {"seconds": seconds, "scores": torch.stack(scores)}


def _best(scores: Tensor) -> int:
    return int(scores.sum(dim=-1).argmax())


def report(results: dict[str, Any]) -> str:
    """The table and the comparisons."""
    rows = [
        [name, f"{one['seconds_per_step']:.3f}", f"{one['tokens_per_step']:.0f}"]
        for name, one in (
            ("over the kept cache", results["kept"]),
            ("encoded again", results["encoded_again"]),
        )
    ]
    lines = [table(["way", "s per step", "tokens per step"], rows), ""]
    for name in ("times_fewer_tokens", "times_as_fast", "largest_difference_of_scores"):
        lines.append(f"{name.replace('_', ' ')}: {results[name]:.3g}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
