"""From one score per objective to what is compared: weighted sum, soft minimum, thresholds.

The same three for the candidates of a step (`guidance.Guidance`) and the points of a front (`best_point`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mahalo_ray.config import Aggregation
from mahalo_ray.objectives import Weights, unknown_name


def check_aggregation(aggregation: Aggregation, objectives: Sequence[str]) -> None:
    """ValueError for a threshold on an objective that does not exist."""
    for threshold in aggregation.thresholds:
        if threshold.objective not in objectives:
            raise ValueError(unknown_name("objective", threshold.objective, objectives))


def aggregated(
    scores: Tensor, weights: Weights, objectives: Sequence[str], aggregation: Aggregation, limited: Tensor
) -> Tensor:
    """Totals [K] in double precision of scores [K, O] in the order of `objectives`; larger is better.

    `limited` [K, O]: the scores in the units of the thresholds. The totals of `thresholds` are ranks: 0 for
    the worst, equal for candidates that are alike.

    >>> soft = Aggregation(kind="soft_min", temperature=0.001)
    >>> scores, half = torch.tensor([[1.0, -1.0], [0.0, -0.5]]), Weights.balanced(["a", "b"])
    >>> aggregated(scores, half, ["a", "b"], soft, scores).argmax().item()
    1
    """
    check_aggregation(aggregation, objectives)
    scores = scores.double()
    shares = torch.tensor(weights.over(objectives), dtype=torch.float64, device=scores.device)
    if aggregation.kind == "soft_min":
        t = aggregation.temperature
        return -t * torch.logsumexp(torch.log(shares) - scores / t, dim=-1)
    totals = scores @ shares
    if aggregation.kind == "sum":
        return totals
    # min(s, threshold) makes all alike that reach the threshold, and leaves an order among those that do not:
    # with none that does, the nearest comes first. Tuples are compared from left to right.
    columns = [
        limited[:, list(objectives).index(threshold.objective)].double().clamp(max=threshold.at_least)
        for threshold in aggregation.thresholds
    ]
    keys = list(map(tuple, torch.stack([*columns, totals], dim=1).tolist()))
    ranks = {key: rank for rank, key in enumerate(sorted(set(keys)))}
    return torch.tensor([float(ranks[key]) for key in keys], dtype=torch.float64)


def best_point(
    values: np.ndarray | Sequence[Sequence[float]],
    objectives: Sequence[str],
    weights: Weights | None = None,
    aggregation: Aggregation | None = None,
) -> int:
    """Which of these points, values [N, O] in the order of `objectives`, is best. Thresholds are in the units
    of the values; `weights` None: all alike; `aggregation` None: the weighted sum. The first of equal ones.

    ValueError for no points, values that are not finite, and objectives that do not exist.

    >>> values = [[0.25, 0.3], [0.21, 0.6], [0.15, 0.8]]
    >>> limit = {"kind": "thresholds", "thresholds": [{"objective": "accuracy", "at_least": 0.2}]}
    >>> engaged = Weights.one("engagement")
    >>> best_point(values, ["accuracy", "engagement"], engaged, Aggregation.model_validate(limit))
    1
    """
    points = torch.as_tensor(np.asarray(values, dtype=np.float64))
    if points.dim() != 2 or len(points) == 0 or points.shape[1] != len(objectives):
        raise ValueError(
            f"values have the shape {list(points.shape)}: give points x objectives ({len(objectives)})"
        )
    if not bool(points.isfinite().all()):
        raise ValueError("a value is not a finite number: leave that point out")
    chosen = Weights.balanced(objectives) if weights is None else weights
    totals = aggregated(points, chosen, objectives, aggregation or Aggregation(), points)
    return int(totals.argmax())
