"""How well a judge agrees with people: a threshold fitted to their ratings, and agreement on ratings that the
threshold was not fitted to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mahalo_ray.evaluation.statistics import Bootstrap, BootstrapEstimate, bootstrap_by_group
from mahalo_ray.metrics import FloatArray, auc

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Agreement:
    """`threshold` is fitted to all `n` ratings, `positive` of them positive; the metrics are of predictions
    by thresholds fitted without the rating's own fold. None: undefined (one class only)."""

    threshold: float
    n: int
    positive: int
    groups: int
    accuracy: BootstrapEstimate | None
    kappa: BootstrapEstimate | None
    auc: BootstrapEstimate | None


def measure_agreement(
    scores: FloatArray, positive: Bools, groups: Sequence[str], folds: int, bootstrap: Bootstrap
) -> Agreement:
    """Fit and cross-validate a threshold on scores [n] against what people called positive [n].

    Rows of one group (a dialogue) share a fold and are resampled together. ValueError for ratings that are
    all alike, or fewer groups than folds.
    """
    if positive.all() or not positive.any():
        sign = "positive" if positive.any() else "negative"
        raise ValueError(f"all {len(positive)} ratings are {sign}: a threshold needs both kinds")
    if len(set(groups)) < folds:
        raise ValueError(f"{len(set(groups))} dialogues cannot be split into {folds} folds")
    fold = fold_of(groups, folds)
    predicted = np.zeros(len(scores), dtype=bool)
    for number in range(folds):
        held = fold == number
        predicted[held] = scores[held] >= fit_threshold(scores[~held], positive[~held])
    columns = (predicted.astype(np.float64), positive.astype(np.float64))
    return Agreement(
        threshold=fit_threshold(scores, positive),
        n=len(scores),
        positive=int(positive.sum()),
        groups=len(set(groups)),
        accuracy=bootstrap_by_group(_accuracy, columns, groups, bootstrap),
        kappa=bootstrap_by_group(cohens_kappa, columns, groups, bootstrap),
        auc=bootstrap_by_group(auc, (scores, columns[1]), groups, bootstrap),
    )


def fit_threshold(scores: FloatArray, positive: Bools) -> float:
    """The threshold with the highest Cohen's kappa: midway between two neighbouring scores; of equally good
    ones, the middle one. Sorts once: n log n for n ratings."""
    order = np.argsort(scores, kind="stable")
    distinct, below = np.unique(scores[order], return_index=True)  # below: how many scores are lower
    thresholds = np.concatenate([distinct[:1], (distinct[1:] + distinct[:-1]) / 2])
    n, positives = len(scores), int(positive.sum())
    positives_below = np.concatenate([[0], np.cumsum(positive[order])])[below]
    observed = (positives - positives_below + below - positives_below) / n
    p, q = (n - below) / n, positives / n
    chance = p * q + (1 - p) * (1 - q)
    kappas = np.divide(observed - chance, 1 - chance, out=np.zeros(len(below)), where=chance < 1)
    best = thresholds[kappas >= kappas.max() - 1e-12]
    return float(best[len(best) // 2])


def cohens_kappa(first: FloatArray, second: FloatArray) -> float:
    """Agreement of two raters' 0/1 verdicts beyond chance (Cohen 1960); NaN if chance alone is certain to
    agree."""
    observed = float(np.mean(first == second))
    p, q = float(np.mean(first)), float(np.mean(second))
    chance = p * q + (1 - p) * (1 - q)
    return float("nan") if chance == 1 else (observed - chance) / (1 - chance)


def fold_of(groups: Sequence[str], folds: int) -> NDArray[np.int64]:
    """The fold of every row: groups in an order of their own names' hashes, dealt out in turn."""
    order = sorted(set(groups), key=lambda name: hashlib.blake2b(name.encode()).digest())
    dealt = {name: number % folds for number, name in enumerate(order)}
    return np.array([dealt[name] for name in groups], dtype=np.int64)


def _accuracy(predicted: FloatArray, actual: FloatArray) -> float:
    return float(np.mean(predicted == actual))
