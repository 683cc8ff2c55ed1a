"""Guided requests whose steps differ in length: each goes on by itself, against steps that end together.

    python benchmarks/ragged_steps.py --model 1m --requests 32 --at-once 16 --output ragged_steps.json

A step ends where a candidate says one of a few words, so step lengths are geometric with the mean asked for:
many are short, some are long. `together` takes all requests one step on at once, through the public parts of
a session: a request whose candidates are done waits for the longest candidate of all, and waiting requests
join between steps. Both ways give the same answers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from decoding_task import EndlessPolicy, Models, Task
from measuring import machine, mib, table, write_results
from shapes import ABOUT_1M, ABOUT_30M, TINY, Shape

from mahalo_ray.decoding.guidance import GuidedResult
from mahalo_ray.decoding.guided import GuidedDecoder
from mahalo_ray.decoding.session import GuidedSession, RequestState, decide_steps
from mahalo_ray.decoding.stopping import StopReason

SHAPES: dict[str, Shape] = {"tiny": TINY, "1m": ABOUT_1M, "30m": ABOUT_30M}


@dataclass(frozen=True)
class LastWords:
    """A step ends with a word whose number is below `words`."""

    words: int
    stop_strings: ClassVar[tuple[str, ...]] = ()

    def is_trigger(self, piece: str) -> bool:
        return piece[:1] == "t" and piece[1:].isdigit() and int(piece[1:]) < self.words

    def verdict(self, text: str, num_tokens: int) -> StopReason | None:
        return StopReason.STEP if self.is_trigger(text.split()[-1]) else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="1m")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--at-once", type=int, default=16, help="requests that run at once; others wait")
    parser.add_argument("--candidates", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=100, help="tokens")
    parser.add_argument("--answer", type=int, default=160, help="tokens of every answer")
    parser.add_argument("--step-tokens", type=int, default=20, help="mean length of a candidate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=None, help="results as JSON")
    options = parser.parse_args(arguments)
    shape = SHAPES[options.model]
    models = Models.build(shape, torch.device("cpu"), torch.float32)
    boundary = LastWords(max(1, round(shape.vocab_size / options.step_tokens)))
    policy, most = EndlessPolicy(models.policy, shape.end_id), options.at_once * options.candidates
    decoder = GuidedDecoder(policy, models.reward, boundary, max_branches=most)
    tasks = [
        Task(options.prompt, options.candidates, 1, options.answer, 1.0, seed=i)
        for i in range(options.requests)
    ]
    results: dict[str, Any] = {
        "benchmark": "ragged_steps",
        "machine": machine(),
        **vars(options),
        "output": None,
    }
    ways = {"together": together, "in flight": in_flight}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[GuidedResult]] = {}
    for number in range(options.rounds + 1):  # the first warms up
        for name, way in ways.items():
            session = decoder.session()
            started = time.perf_counter()
            answers[name] = way(session, [session.submit(task.request(shape, 256)) for task in tasks])
            seconds[name] += [time.perf_counter() - started] if number else []
            results[name] = {"seconds": seconds[name], **cost(session, answers[name])}
    results["same_answers"] = same(answers["together"], answers["in flight"])
    print(report(results))
    if options.output is not None:
        write_results(options.output, results)


def in_flight(session: GuidedSession, running: list[RequestState]) -> list[GuidedResult]:
    """As every door of the package does it."""
    while session.is_busy:
        session.advance()
    return [one.result() for one in running]


def together(session: GuidedSession, running: list[RequestState]) -> list[GuidedResult]:
    """All requests take a step, then all requests take a step."""
    active = session.admit()
    while active:
        sampled, candidates = session.sample(active, [state.request.num_candidates for state in active])
        steps = decide_steps(active, candidates, session.scorers, session.models.scale)
        session.engine.accept(sampled, [step.chosen for step in steps if step is not None])
        for state, step in zip(active, steps, strict=True):
            assert step is not None
            session.extend(state, step)
            if state.is_over:
                session.cancel(state)
            else:
                session.scorers.accept([state.scorer_row], [step.accepted])
        active = [state for state in active if not state.is_over] + session.admit()
    return [one.result() for one in running]


def cost(session: GuidedSession, answers: Sequence[GuidedResult]) -> dict[str, Any]:
    """Tokens answered, and what went through the models."""
    return {
        "answer_tokens": sum(len(answer.token_ids) for answer in answers),
        "steps": sum(len(answer.steps) for answer in answers),
        "policy_tokens": session.engine.tokens_forwarded,
        "reward_tokens": session.scorers.tokens_forwarded,
        "policy_cache_bytes": session.engine.peak_bytes,
    }


def same(some: Sequence[GuidedResult], others: Sequence[GuidedResult]) -> int:
    """How many answers are the same token for token; rounding decides a draw now and then."""
    return sum(a.token_ids == b.token_ids for a, b in zip(some, others, strict=True))


def report(results: dict[str, Any]) -> str:
    rows, rates = [], {}
    for name in ("together", "in flight"):
        one = results[name]
        rates[name] = one["answer_tokens"] / median(one["seconds"])
        rows.append(
            [
                name,
                f"{median(one['seconds']):.2f}",
                f"{rates[name]:.0f}",
                str(one["steps"]),
                str(one["policy_tokens"]),
                str(one["reward_tokens"]),
                mib(one["policy_cache_bytes"]),
            ]
        )
    header = ["way", "s", "answer tokens/s", "steps", "policy tokens", "PRM tokens", "policy cache"]
    ratio = rates["in flight"] / rates["together"]
    return (
        f"{table(header, rows)}\n{ratio:.2f} times the answer tokens per second; "
        f"{results['same_answers']} of {results['requests']} answers the same"
    )


if __name__ == "__main__":
    main()
