"""The front of a finished run at several decoding strengths: outcomes, hypervolume, KL to SFT, bad turns.

    python benchmarks/strength.py runs/quickstart --students 600 --output strength.json

Every strength and weight vector is played against the same students, whom no stage of the run has met, with
the same draws, so differences to strength 1 are paired. Results are written after every method, and what the
results file already holds is not played again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from finished_run import read_config
from measuring import machine, table, write_results
from numpy.typing import NDArray

from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.evaluation.methods import Method, MethodPlayer
from mahalo_ray.evaluation.results import MethodResult
from mahalo_ray.evaluation.statistics import hypervolume
from mahalo_ray.objectives import Weights

FIRST_STUDENT = 9_000_000  # far above the seeds of every stage
SHARES = (0.9, 0.7, 0.5, 0.3, 0.1)  # of the first objective, as in the quickstart's sweep
RESAMPLES = 2000
ORIGIN = (0.0, 0.0)  # above it lies the hypervolume


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of a finished run with two objectives")
    parser.add_argument("--students", type=int, default=300)
    parser.add_argument("--strengths", type=_numbers, default=(1.0, 1.5, 2.5, 4.0))
    parser.add_argument("--output", type=Path, required=True, help="results as JSON")
    options = parser.parse_args(arguments)
    if 1.0 not in options.strengths:
        raise SystemExit("--strengths must hold 1, which the others are compared with")
    torch.set_num_threads(1)
    config = read_config(options.run)
    first, second = config.objective_names
    seeds = range(FIRST_STUDENT, FIRST_STUDENT + options.students)
    models = [str(options.run / stage / "model") for stage in ("sft", "policy", "reward")]
    of_domain = (config.domain, config.objective_names)
    player = MethodPlayer(*models, DeviceConfig(), config.evaluation, seeds, *of_domain)
    known = json.loads(options.output.read_text())["results"] if options.output.exists() else []
    results = [MethodResult.model_validate(result) for result in known]
    for strength in options.strengths:
        for share in (1.0, *SHARES, 0.0):
            name = f"strength {strength:g}, {first} {share:g}"
            if all(result.name != name for result in results):
                weights = Weights({first: share, second: 1 - share})
                method = Method(name, "weights", weights=weights, strength=strength)
                results.append(player.run(method).result)
                listed = [result.model_dump(mode="json") for result in results]
                write_results(options.output, {"machine": machine(), "results": listed})
    print(report(results, (first, second)))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def report(results: Sequence[MethodResult], objectives: Sequence[str]) -> str:
    """A row per strength: ends of the front, hypervolume of the inner points, the gain over strength 1."""
    outcomes = {
        strength: [result for result in results if result.strength == strength]
        for strength in dict.fromkeys(result.strength for result in results)
    }
    values = {s: _inner_values(own, objectives) for s, own in outcomes.items()}
    students = next(iter(values.values())).shape[-1]
    draws = np.random.default_rng(0).integers(0, students, (RESAMPLES, students))
    lines = []
    for strength, own in outcomes.items():
        ends = [_means(_at(own, name), objectives)[name] for name in objectives]
        volumes = np.array([hypervolume(values[strength][..., draw].mean(-1), ORIGIN) for draw in draws])
        base = np.array([hypervolume(values[1.0][..., draw].mean(-1), ORIGIN) for draw in draws])
        low, high = np.quantile(volumes - base, [0.025, 0.975])
        gain = hypervolume(values[strength].mean(-1), ORIGIN) - hypervolume(values[1.0].mean(-1), ORIGIN)
        inner = [result for result in own if _is_inner(result)]
        lines.append(
            [
                f"{strength:g}",
                *(f"{end:.3f}" for end in ends),
                f"{hypervolume(values[strength].mean(-1), ORIGIN):.4f}",
                f"{gain:+.4f} [{low:+.4f}, {high:+.4f}]",
                f"{np.mean([result.kl_to_reference for result in inner]):.3f}",
                f"{np.mean([result.malformed_rate for result in inner]):.4f}",
            ]
        )
    return table(["strength", *objectives, "hypervolume", "over strength 1", "KL", "malformed"], lines)


def _is_inner(result: MethodResult) -> bool:
    return 0 < min((result.weights or {}).values()) < 1


def _inner_values(results: Sequence[MethodResult], objectives: Sequence[str]) -> NDArray[np.float64]:
    """[points, objectives, students] of the weight vectors that are not one objective alone."""
    inner = [result for result in results if _is_inner(result)]
    return np.array([[result.values[name] for name in objectives] for result in inner])


def _at(results: Sequence[MethodResult], objective: str) -> MethodResult:
    return next(result for result in results if (result.weights or {})[objective] == 1)


def _means(result: MethodResult, objectives: Sequence[str]) -> Mapping[str, float]:
    return {name: float(np.mean(result.values[name])) for name in objectives}


if __name__ == "__main__":
    main()
