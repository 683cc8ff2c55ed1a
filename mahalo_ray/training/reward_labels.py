"""What a reward model's labels add up to: how many there are per unit, and the scale of values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mahalo_ray.config import ObjectiveConfig
from mahalo_ray.training.batches import Indices
from mahalo_ray.training.traces import LabelledTraces, ordered_pairs

Floats = npt.NDArray[np.float64]


def count_labels(data: LabelledTraces, objectives: int, ranking_gap: float | None) -> tuple[Floats, Floats]:
    """Per unit and objective, both [units, objectives]: labels (of a pair, its weight), and pairs of
    candidates to be ranked (none without `ranking_gap`)."""
    labels, ranked = np.zeros((len(data.members), objectives)), np.zeros((len(data.members), objectives))
    for unit, rows in enumerate(data.members):
        objective = data.pair_objective[unit]
        if objective >= 0:
            labels[unit, objective] = data.weights[unit]
            continue
        own = [data.labels[row] for row in rows]
        labels[unit] = sum((~np.isnan(values)).sum(axis=0) for values in own)
        if ranking_gap is not None:
            ranked[unit] = ordered_pairs(own, ranking_gap)
    return labels, ranked


def check_labels(labels: Floats, names: Sequence[str], purpose: str) -> None:
    """ValueError for an objective without any in [units, objectives], which are needed for a purpose."""
    for name, count in zip(names, labels.sum(axis=0), strict=True):
        if count == 0:
            raise ValueError(f"objective '{name}' has no labels (or pairs) {purpose}")


def value_scale(
    data: LabelledTraces, trained: Indices, objectives: Sequence[ObjectiveConfig]
) -> tuple[Floats, Floats]:
    """Per objective: variance of all value labels, and their spread within a prompt; 1 for judgements and
    pairs."""
    variance, spread = np.ones(len(objectives)), np.ones(len(objectives))
    groups = [[data.labels[row] for row in data.members[unit]] for unit in trained]
    for column, objective in enumerate(objectives):
        if objective.supervision != "rollout_value":
            continue
        values = [np.concatenate([labels[:, column] for labels in group]) for group in groups]
        present = [own[~np.isnan(own)] for own in values]
        within = [own - own.mean() for own in present if len(own) > 1]
        variance[column] = np.concatenate(present).var() or 1.0
        spread[column] = (np.concatenate(within).std() if within else 0.0) or 1.0
    return variance, spread
