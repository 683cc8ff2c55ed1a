"""Fronts of a finished run by what a user turns: heads, strength, temperature, guidance.

    python benchmarks/which_dial.py runs/quickstart OUT/dials.json
    python benchmarks/which_dial.py runs/quickstart OUT/ten.json --policy OTHER/policy/model --label "10x:"
    python benchmarks/which_dial.py --table OUT/dials.json OUT/ten.json --over "guided SFT, K 5"
    python benchmarks/which_dial.py runs/quickstart OUT/guide.json --optimism

Every front has the same balances (of two objectives `--shares` of the first; of more each alone, every two
and all) and the same students (in other domains: problems), whom no stage of the run has met; the domain's
program judges. The balance is that of the heads, of the guide, or (guided policy) of both. Results are
written after every method, and what the file holds is not played again.
`--table` gives hypervolume over (0, 0), its paired difference to the front `--over`, and the cost: tokens
through the policy per dialogue (prompts, replies, all candidates).

`--optimism` plays the balance 0.5 / 0.5 alone and compares what the guide predicts of the last tutor turn of
a dialogue with what the program then finds: the difference is the guide's error on what was chosen by it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finished_run import fresh_player, read_config
from measuring import balances, machine, table, write_results

from mahalo_ray.config import EvaluationConfig
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.guidance import Guidance
from mahalo_ray.decoding.policy import HeadMix
from mahalo_ray.decoding.stopping import boundary_for
from mahalo_ray.evaluation.methods import Method, MethodPlayer
from mahalo_ray.evaluation.results import ComparisonTable, MethodResult
from mahalo_ray.evaluation.statistics import mean_interval, percentile_interval
from mahalo_ray.objectives import Weights
from mahalo_ray.rollouts.dialogues import DialogueBatch, TurnSelection
from mahalo_ray.rollouts.tutors import PolicyTutor, Proposal

SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)  # of the first objective


@dataclass(frozen=True)
class Front:
    """What is the same at all balances of a front. Without `heads`: SFT, guided where there are candidates,
    else one point."""

    heads: bool
    num_candidates: int = 1
    strength: float = 1.0
    temperature: float = 1.0

    @property
    def name(self) -> str:
        """As it is called in tables and in `--fronts`."""
        guided = self.num_candidates > 1
        parts = [("guided " if guided else "") + ("policy" if self.heads else "SFT")]
        if guided:
            parts.append(f"K {self.num_candidates}")
        if self.strength != 1:
            parts.append(f"strength {self.strength:g}")
        if self.temperature != 1:
            parts.append(f"temperature {self.temperature:g}")
        return ", ".join(parts)

    def method(self, balance: Weights, name: str) -> Method:
        """One point of the front."""
        guidance = balance if self.num_candidates > 1 else None
        if not self.heads and guidance is None:
            return Method(name, "sft")
        if not self.heads:
            return Method(name, "guided_sft", guidance=guidance, num_candidates=self.num_candidates)
        return Method(
            name,
            "weights" if guidance is None else "guided",
            weights=balance,
            guidance=guidance,
            num_candidates=self.num_candidates,
            strength=self.strength,
        )


FRONTS = (
    Front(heads=False),
    Front(heads=False, temperature=0.7),
    Front(heads=False, temperature=0.5),
    Front(heads=False, temperature=0.3),
    Front(heads=True),
    Front(heads=False, num_candidates=5),
    Front(heads=True, num_candidates=5),
    Front(heads=True, strength=2),
    Front(heads=True, strength=3),
    Front(heads=True, temperature=0.7),
    Front(heads=True, temperature=0.5),
    Front(heads=True, temperature=0.3),
    Front(heads=True, strength=2, temperature=0.5),
    Front(heads=False, num_candidates=5, temperature=0.7),
    Front(heads=False, num_candidates=5, temperature=0.5),
    Front(heads=True, num_candidates=5, temperature=0.7),
    Front(heads=True, num_candidates=5, temperature=0.5),
    Front(heads=False, num_candidates=3),
    Front(heads=True, num_candidates=3),
    Front(heads=False, num_candidates=9),
    Front(heads=True, num_candidates=9),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", nargs="?", help="a finished run, which is only read")
    parser.add_argument("output", nargs="?", type=Path, help="JSON file for the results")
    parser.add_argument("--policy", help="play this policy instead of the run's")
    parser.add_argument("--label", default="", help="put before the names of this policy's fronts")
    parser.add_argument("--fronts", nargs="+", help=f"default: all of {', '.join(f.name for f in FRONTS)}")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the first of two")
    parser.add_argument("--students", type=int, default=240)
    parser.add_argument("--optimism", action="store_true", help="what the guide predicts against the outcome")
    parser.add_argument("--table", nargs="+", type=Path, help="result files to compare")
    parser.add_argument("--unite", nargs="+", action="append", default=[], help="fronts that are one, too")
    parser.add_argument("--over", default="policy", help="front that the others are compared with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.table:
        results = [result for file in arguments.table for result in read(file)]
        print(fronts_table(of_all(results), arguments.over, arguments.unite))
        return
    config = read_config(arguments.run)
    player = fresh_player(config, arguments.students, arguments.policy)
    if arguments.optimism:
        rows = optimism(player, config.objective_names)
        write_results(arguments.output, {"machine": machine(), "rows": rows})
        print(optimism_table(rows, config.objective_names))
        return
    known = {front.name: front for front in FRONTS}
    results = read(arguments.output) if arguments.output.exists() else []
    for name in arguments.fronts or known:
        front, names = known[name], config.objective_names
        points = balances(names, arguments.shares)
        if not front.heads and front.num_candidates == 1:  # one point
            points = {"0.5" if len(names) == 2 else "all": Weights.balanced(names)}
        play_front(player, front, points, arguments.label, results, arguments.output)
    print(fronts_table(of_all(results), results[0].name.split(" | ")[0]))


def at_temperature(config: EvaluationConfig, temperature: float) -> EvaluationConfig:
    """The settings with another temperature of sampling."""
    sampling = config.sampling.model_copy(update={"temperature": temperature})
    return config.model_copy(update={"sampling": sampling})


def play_front(
    player: MethodPlayer,
    front: Front,
    points: Mapping[str, Weights],
    label: str,
    results: list[MethodResult],
    output: Path,
) -> None:
    """Add the points of one front that `results` does not hold yet, and write all results."""
    title = f"{label} {front.name}".strip()
    plain = player.config
    player.config = at_temperature(plain, front.temperature)
    for point, balance in points.items():
        name = f"{title} | {point}"
        if all(result.name != name for result in results):
            results.append(player.run(front.method(balance, name)).result)
            listed = [result.model_dump(mode="json") for result in results]
            write_results(output, {"machine": machine(), "results": listed})
    player.config = plain


def read(file: Path) -> list[MethodResult]:
    """The results of a file."""
    return [MethodResult.model_validate(result) for result in json.loads(file.read_text())["results"]]


def of_all(results: Sequence[MethodResult]) -> list[MethodResult]:
    """The results for the students that all of them have: `--students` takes the first so many of one list.

    KL, malformed turns and tokens stay those of all students of a result; tokens in proportion.
    """
    fewest = min(len(result.student_ids) for result in results)
    return [
        result.model_copy(
            update={
                "student_ids": result.student_ids[:fewest],
                "values": {name: values[:fewest] for name, values in result.values.items()},
                "tokens": result.tokens * fewest // len(result.student_ids),
            }
        )
        for result in results
    ]


def fronts_table(results: Sequence[MethodResult], over: str, united: Sequence[Sequence[str]] = ()) -> str:
    """A row per front, and one for each of the united ones; of two objectives' points, those at `SHARES`."""
    objectives = tuple(results[0].values)
    whole = ComparisonTable(results, objectives)
    indices: dict[str, list[int]] = {}
    for index, result in enumerate(results):
        indices.setdefault(result.name.split(" | ")[0], []).append(index)
    if unknown := {over, *(name for names in united for name in names)} - set(indices):
        raise SystemExit(f"no front is called {', '.join(sorted(unknown))}; there are {', '.join(indices)}")
    united_names = [" and ".join(names) for names in united]
    for united_name, names in zip(united_names, united, strict=True):
        indices[united_name] = [index for name in names for index in indices[name]]
    base, base_samples = whole.hypervolumes(indices[over])
    columns = balances(objectives, SHARES)
    rows = []
    for name, own in indices.items():
        volume, samples = whole.hypervolumes(own)
        low, high = percentile_interval(samples, 0.95)
        low_d, high_d = percentile_interval(samples - base_samples, 0.95)
        at = {results[index].name.split(" | ")[1]: whole.points[index] for index in own}
        shown = [at.get(point) if name not in united_names else None for point in columns]
        members = [results[index] for index in own]
        kl = [math.nan if m.kl_to_reference is None else m.kl_to_reference for m in members]
        rows.append(
            [
                name,
                f"{volume:.3f} [{low:.3f}, {high:.3f}]",
                "" if name == over else f"{volume - base:+.3f} [{low_d:+.3f}, {high_d:+.3f}]",
                str(len(own)),
                *("" if point is None else " / ".join(f"{value:.3f}" for value in point) for point in shown),
                f"{min(kl):.2f} to {max(kl):.2f}",
                f"{max(m.malformed_rate for m in members):.1%}",
                f"{np.mean([m.tokens for m in members]) / whole.dialogues:.0f}",
            ]
        )
    header = ["front", "hypervolume", f"minus {over}", "points", *(f"at {point}" for point in columns)]
    header += ["KL", "malformed", "tokens per dialogue"]
    return f"{whole.dialogues} students, {', '.join(objectives)}\n" + table(header, rows)


class Predicted:
    """Chooses as `selection` does (None: the first candidate), and keeps what the guide predicted of every
    conversation's last said turn."""

    def __init__(self, selection: TurnSelection | None) -> None:
        self.selection = selection
        self.last: dict[str, list[float]] = {}

    def __call__(self, proposals: Sequence[Proposal]) -> list[list[int]]:
        chosen = [[0] for _ in proposals] if self.selection is None else self.selection(proposals)
        for proposal, picks in zip(proposals, chosen, strict=True):
            assert proposal.scores is not None
            self.last[proposal.conversation.id] = proposal.scores[picks[0]].tolist()
        return chosen


def optimism(player: MethodPlayer, objectives: Sequence[str]) -> list[dict[str, Any]]:
    """Predicted and actual outcome of every dialogue at 0.5 / 0.5, for SFT and the policy at several K."""
    balance = Weights.balanced(objectives)
    rows = []
    for heads in (False, True):
        policy, mix = (player.policy, HeadMix(balance)) if heads else (player.sft, HeadMix(None))
        for candidates in (1, 3, 5, 9):
            scorers = player.reward_models.follow()
            tutor = PolicyTutor(
                Engine(policy),
                player.chat,
                player.config.sampling,
                mix.weights,
                is_malformed=player.domain.is_malformed,
                boundary=boundary_for(player.domain.boundary),
            )
            batch = DialogueBatch(tutor, scorers=scorers)
            episodes = [player.domain.episode(seed) for seed in player.seeds]
            opened = batch.open(episodes, [str(seed) for seed in player.seeds], "evaluation")
            guidance = Guidance(player.reward_models.scale, balance, "calibrated")
            choose = Predicted(TurnSelection("best", guidance) if candidates > 1 else None)
            batch.play(candidates, choose)
            order = player.reward_models.scale.objectives
            outcomes = [conversation.student.outcome() for conversation in opened]
            predicted = {name: [choose.last[c.id][order.index(name)] for c in opened] for name in objectives}
            actual = {name: [outcome[name] for outcome in outcomes] for name in objectives}
            name = Front(heads, candidates).name
            rows.append({"front": name, "predicted": predicted, "actual": actual})
    return rows


def optimism_table(rows: Sequence[dict[str, Any]], objectives: Sequence[str]) -> str:
    """Mean prediction, mean outcome and their paired difference, per objective."""
    lines = []
    for row in rows:
        line = [row["front"]]
        for name in objectives:
            predicted, actual = row["predicted"][name], row["actual"][name]
            error = mean_interval([p - a for p, a in zip(predicted, actual, strict=True)])
            line += [f"{np.mean(predicted):.3f}", f"{np.mean(actual):.3f}"]
            line.append(f"{error.value:+.3f} [{error.low:+.3f}, {error.high:+.3f}]")
        lines.append(line)
    header = [
        column for name in objectives for column in (f"{name}, predicted", "found", "predicted − found")
    ]
    return table(["at 0.5 / 0.5", *header], lines)


if __name__ == "__main__":
    main()
