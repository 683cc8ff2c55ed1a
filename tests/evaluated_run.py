"""Results of a run made up for tests, in which every claim holds unless told otherwise."""

from typing import Any

import numpy as np

from mahalo_ray.evaluation.results import ComparisonTable, MethodResult

STUDENTS = 60
OBJECTIVES = ("accuracy", "engagement")


def method(name: str, kind: str, means: tuple[float, ...], seed: int = 0, **more: Any) -> MethodResult:
    """A method whose students scatter around `means`: each has the same luck with every method."""
    luck = np.random.default_rng(99).normal(0, 0.1, STUDENTS)
    noise = np.random.default_rng(seed).normal(0, 0.02, (len(means), STUDENTS))
    names = (*OBJECTIVES, "helpfulness", "safety")
    values = {
        o: (mean + luck + noise[i]).tolist() for i, (o, mean) in enumerate(zip(names, means, strict=False))
    }
    return MethodResult.model_validate(
        {"name": name, "kind": kind, "student_ids": list(range(STUDENTS)), "values": values}
        | {"malformed_rate": 0.01, "tokens": 31400, "kl_to_reference": 0.04}
        | more
    )


def run_of(accuracy_head: float = 0.30, guided: tuple[float, float] = (0.29, 0.71)) -> list[MethodResult]:
    """A whole table in which everything holds unless told otherwise."""
    half = {"accuracy": 0.5, "engagement": 0.5}
    methods = [
        method("SFT", "sft", (0.26, 0.45), 1),
        method("SFT, guided", "guided_sft", (0.29, 0.65), 2, guidance=half, num_candidates=5),
        method("accuracy head", "head", (accuracy_head, 0.42), 3, weights={"accuracy": 1}),
        method("engagement head", "head", (0.19, 0.74), 4, weights={"engagement": 1}),
        method("policy, guided", "guided", guided, 5, weights=half, guidance=half, num_candidates=5),
    ]
    for i, (a, e) in enumerate([(0.30, 0.42), (0.28, 0.52), (0.26, 0.61), (0.23, 0.68), (0.19, 0.74)]):
        weights = {"accuracy": 1 - i / 4, "engagement": i / 4}
        methods.append(
            method(f"weights {1 - i / 4:g} / {i / 4:g}", "weights", (a, e), 10 + i, weights=weights)
        )
    return methods


def table_of(methods: list[MethodResult], objectives: tuple[str, ...] = OBJECTIVES) -> ComparisonTable:
    return ComparisonTable(methods, objectives, resamples=200)
