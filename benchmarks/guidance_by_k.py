"""What guidance is worth on the tutoring miniature: accuracy and engagement against K, for each strategy.

    python benchmarks/guidance_by_k.py runs/quickstart --output guidance.json --picture guidance.png

A finished run's policy plays dialogues with students whom no stage of the run has met, guided by the run's
reward model; the domain's own program judges, which guides nothing. Every cell has the same students with the
same noise, so differences to K = 1 are paired. Results are written after every cell, and cells that the
results file already holds are not played again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finished_run import read_config
from guidance_picture import draw
from measuring import machine, table, write_results

from mahalo_ray.config import RunConfig
from mahalo_ray.data.records import Message
from mahalo_ray.decoding.guidance import GuidedRequest
from mahalo_ray.decoding.guided import GuidedDecoder
from mahalo_ray.decoding.policy import DeviceConfig, load_policy, load_reward_model
from mahalo_ray.decoding.stopping import Boundary, SentenceBoundary, TurnBoundary
from mahalo_ray.domains.tutoring.student import TutoringEpisode
from mahalo_ray.evaluation.statistics import Estimate, mean_interval
from mahalo_ray.objectives import Weights
from mahalo_ray.pipeline.seed_blocks import BLOCK_SIZE, first_seed
from mahalo_ray.seeding import derived_seed

# Where a step is a whole turn, best_of_n, beam and dvts choose among whole turns too: they are argmax there.
BOUNDARIES: dict[str, Boundary] = {"turn": TurnBoundary(), "sentence": SentenceBoundary(min_tokens=1)}
STRATEGIES = {"turn": ("argmax", "sample"), "sentence": ("argmax", "beam", "dvts")}
WIDTH = 2  # of beam and dvts

OBJECTIVES = ("accuracy", "engagement")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of a finished run")
    parser.add_argument("--students", type=int, default=150)
    parser.add_argument("--candidates", type=_numbers, default=(1, 2, 3, 5, 8, 12), help="values of K")
    parser.add_argument("--steps", type=_names, default=tuple(BOUNDARIES), help="of turn,sentence")
    parser.add_argument("--output", type=Path, required=True, help="results as JSON")
    parser.add_argument("--picture", type=Path, default=None, help="PNG")
    options = parser.parse_args(arguments)
    config = read_config(options.run)
    if config.evaluation.dialogues + options.students > BLOCK_SIZE:
        raise SystemExit(f"at most {BLOCK_SIZE - config.evaluation.dialogues} students are left")
    results = _resumed(options, config)
    for steps in options.steps:
        tutor = Tutor(options.run, config, BOUNDARIES[steps])
        for strategy in STRATEGIES[steps]:
            for candidates in options.candidates:
                if _is_possible(strategy, candidates) and not _found(results, steps, strategy, candidates):
                    cell = tutor.cell(strategy, candidates, results["students"])
                    results["cells"].append({"steps": steps, **cell})
                    write_results(options.output, results)
                    print(
                        f"{steps} {strategy} K={candidates}: {cell['outcome']}", file=sys.stderr, flush=True
                    )
    print(report(results))
    if options.picture is not None:
        options.picture.write_bytes(draw(results))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _is_possible(strategy: str, candidates: int) -> bool:
    if strategy in ("beam", "dvts"):
        return candidates % WIDTH == 0 and candidates > WIDTH
    return strategy == "argmax" or candidates > 1


def _found(results: dict[str, Any], steps: str, strategy: str, candidates: int) -> bool:
    wanted = (steps, strategy, candidates)
    return any((c["steps"], c["strategy"], c["candidates"]) == wanted for c in results["cells"])


def _resumed(options: argparse.Namespace, config: RunConfig) -> dict[str, Any]:
    # The run's own evaluation met the first students of the block.
    first = first_seed(config.seed, "evaluation") + config.evaluation.dialogues
    fresh = {
        "benchmark": "guidance_by_k",
        "machine": machine(),
        "seed": config.seed,
        "weights": dict(config.guided.weights),
        "guidance": dict(config.guided.guidance),
        "students": list(range(first, first + options.students)),
        "cells": [],
    }
    if not options.output.exists():
        return fresh
    found: dict[str, Any] = json.loads(options.output.read_text())
    for key in ("seed", "weights", "guidance", "students"):
        if found[key] != fresh[key]:
            raise SystemExit(f"{options.output} holds results with other '{key}': give another --output")
    return found


class Tutor:
    """The run's policy and reward model, playing whole dialogues under any strategy."""

    def __init__(self, run: Path, config: RunConfig, boundary: Boundary) -> None:
        placement = DeviceConfig.of(config.cluster, config.model.dtype)
        policy, chat = load_policy(str(run / "policy" / "model"), placement)
        reward = load_reward_model(str(run / "reward" / "model"), placement)
        self.decoder = GuidedDecoder(policy, reward, boundary, chat.tokenizer)
        self.config = config

    def cell(self, strategy: str, candidates: int, students: Sequence[int]) -> dict[str, Any]:
        """All students played once."""
        episodes = [TutoringEpisode.from_seed(seed) for seed in students]
        talks = [[Message(role="user", content=episode.opening)] for episode in episodes]
        tokens = turns = 0
        while waiting := [i for i, episode in enumerate(episodes) if not episode.over]:
            requests = [self._request(talks[i], students[i], strategy, candidates) for i in waiting]
            for i, said in zip(waiting, self.decoder.generate_batch(requests), strict=True):
                reply = episodes[i].hear(said.text)
                talks[i] += [
                    Message(role="assistant", content=said.text),
                    Message(role="user", content=reply),
                ]
                prompts = candidates // WIDTH if strategy == "dvts" else 1  # its searches do not share one
                tokens += said.policy_tokens - prompts * said.prompt_tokens
                turns += 1
        outcomes = [episode.outcome() for episode in episodes]
        return {
            "strategy": strategy,
            "candidates": candidates,
            "outcome": {name: sum(o[name] for o in outcomes) / len(outcomes) for name in OBJECTIVES},
            "values": {name: [outcome[name] for outcome in outcomes] for name in OBJECTIVES},
            "sampled_tokens_per_turn": tokens / turns,
        }

    def _request(self, talk: list[Message], student: int, strategy: str, candidates: int) -> GuidedRequest:
        sampling, limit = self.config.evaluation.sampling, self.config.evaluation.sampling.max_new_tokens
        return GuidedRequest(
            talk,
            weights=Weights(self.config.guided.weights),
            guidance=Weights(self.config.guided.guidance),
            num_candidates=candidates,
            seed=derived_seed("guidance_by_k", student, len(talk)),
            sampling=sampling,
            max_new_tokens=limit,
            max_step_tokens=limit,
            strategy=strategy,  # type: ignore[arg-type]
            beam_width=WIDTH,
            standardisation="calibrated",
        )


def paired(results: dict[str, Any], cell: dict[str, Any], name: str) -> Estimate:
    """Difference to one candidate per step, over the same students."""
    alone = next(c for c in results["cells"] if c["candidates"] == 1 and c["steps"] == cell["steps"])
    return mean_interval([a - b for a, b in zip(cell["values"][name], alone["values"][name], strict=True)])


def report(results: dict[str, Any]) -> str:
    """A table: means with their intervals, differences to K = 1 with theirs."""
    header = ["step, strategy", "K", "tokens sampled/turn"]
    header += [column for name in OBJECTIVES for column in (name, "over K = 1")]
    rows = []
    for cell in results["cells"]:
        row = [f"{cell['steps']}, {cell['strategy']}", str(cell["candidates"])]
        row.append(f"{cell['sampled_tokens_per_turn']:.0f}")
        for name in OBJECTIVES:
            mean, gain = mean_interval(cell["values"][name]), paired(results, cell, name)
            row.append(f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]")
            row.append(f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]")
        rows.append(row)
    about = (
        f"{len(results['students'])} students, weights {results['weights']}, guidance {results['guidance']}"
    )
    return f"{about}\n{table(header, rows)}"


if __name__ == "__main__":
    main()
