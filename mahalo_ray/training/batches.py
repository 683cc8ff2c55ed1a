"""Which rows make up the global batch of a step, and how workers and micro-batches share it.

Everything here is a pure function of the data's sizes, the seed and the step: every worker computes the same
plan by itself, and a resumed run finds its place by the step number alone. Splitting changes nothing but
rounding, because every row carries its weight within the global batch.

A group of rows is never split between micro-batches: one SFT example, one preference pair (two sequences), or
the candidates of one prompt that are ranked against each other.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowGroups:
    """Sizes of the data's groups, one entry per group: `rows` (sequences), `lengths` (tokens of the longest
    sequence) and `tokens` (of all its sequences together)."""

    rows: Indices
    lengths: Indices
    tokens: Indices

    def __len__(self) -> int:
        return len(self.rows)


def shuffled_stream(count: int, length: int, seed: int, stream: int = 0) -> Indices:
    """`length` group numbers below `count`: one shuffled pass after another, each group once per pass."""
    passes = math.ceil(length / count)
    orders = [np.random.default_rng([seed, stream, number]).permutation(count) for number in range(passes)]
    return np.concatenate(orders)[:length] if orders else np.empty(0, dtype=np.int64)


def plan_batches(
    rows: Indices, batch_size: int, epochs: float, max_steps: int | None, seed: int
) -> list[Indices]:
    """Global batches of at most `batch_size` rows: all groups `epochs` times, or exactly `max_steps` batches.

    A batch takes groups from the shuffled stream while they fit (at least one). With `epochs`, the last batch
    holds what is left.
    """
    if len(rows) == 0:
        raise ValueError("there is nothing to train on: the data holds no rows")
    # A group has at least one row, so this many always suffice for `max_steps` batches.
    length = math.ceil(epochs * len(rows)) if max_steps is None else max_steps * batch_size
    stream = shuffled_stream(len(rows), length, seed)
    ends = np.cumsum(rows[stream])
    batches: list[Indices] = []
    start = 0
    while start < length and (max_steps is None or len(batches) < max_steps):
        taken = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, taken + batch_size, side="right")))
        batches.append(stream[start:stop])
        start = stop
    return batches


def plan_balanced_batches(
    groups: Sequence[Indices], batch_size: int, epochs: float, max_steps: int | None, seed: int
) -> list[Indices]:
    """Global batches of exactly `batch_size` groups, shared as evenly as possible between the groups
    (objectives).

    Each group has a shuffled cursor of its own. The run is as long as the group that needs most batches takes
    for `epochs` passes (or `max_steps`); the others are repeated meanwhile, and nothing of a larger group is
    dropped.
    """
    if any(len(group) == 0 for group in groups):
        raise ValueError("a group has no rows: every objective needs some to be balanced")
    if batch_size < len(groups):
        raise ValueError(
            f"batch_size is {batch_size}, but there are {len(groups)} objectives: a batch holds rows of each"
        )
    shares = [batch_size // len(groups) + (i < batch_size % len(groups)) for i in range(len(groups))]
    steps = max_steps or max(
        math.ceil(epochs * len(group) / share) for group, share in zip(groups, shares, strict=True)
    )
    columns = [
        group[shuffled_stream(len(group), steps * share, seed, stream=number)].reshape(steps, share)
        for number, (group, share) in enumerate(zip(groups, shares, strict=True))
    ]
    return list(np.concatenate(columns, axis=1))


def accumulation_steps(
    batches: Sequence[Indices], row_groups: RowGroups, micro_rows: int, workers: int
) -> int:
    """Micro-batches per worker and step such that the largest batch fits; the same for the whole run."""
    largest = max(int(row_groups.rows[batch].max()) for batch in batches)
    if largest > micro_rows:
        raise ValueError(
            f"rows that must stay together are {largest} in number, more than micro_batch_size_per_device "
            f"({micro_rows}): set it to at least {largest}"
        )
    fullest = max(
        len(_fill(_by_length(batch, row_groups), row_groups, micro_rows, None)) for batch in batches
    )
    return math.ceil(fullest / workers)


def split_batch(
    batch: Indices, row_groups: RowGroups, micro_rows: int, workers: int, accumulation: int
) -> list[list[Indices]]:
    """[accumulation][workers] micro-batches of at most `micro_rows` rows, similar lengths together.

    The cost of a micro-batch is its padded size (rows x longest); the largest cost is made as small as it can
    be, so that workers finish together. Micro-batches may be empty.
    """
    ordered = _by_length(batch, row_groups)
    low, high = 0, int(row_groups.rows[batch].sum() * row_groups.lengths[batch].max())
    while low < high:
        middle = (low + high) // 2
        if len(_fill(ordered, row_groups, micro_rows, middle)) <= workers * accumulation:
            high = middle
        else:
            low = middle + 1
    filled = _fill(ordered, row_groups, micro_rows, low)
    assert len(filled) <= workers * accumulation, "accumulation_steps allows for every batch of the plan"
    filled += [batch[:0]] * (workers * accumulation - len(filled))
    return [filled[step * workers : (step + 1) * workers] for step in range(accumulation)]


def shard(
    selected: Indices, row_groups: RowGroups, micro_rows: int, rank: int, workers: int
) -> list[tuple[Indices, bool]]:
    """One worker's micro-batches of the selected groups, every worker the same number of them.

    The second value is False for a micro-batch that only fills a gap and must not be counted.
    """
    if len(selected) == 0:
        return []
    filled = [(part, True) for part in _fill(_by_length(selected, row_groups), row_groups, micro_rows, None)]
    filled += [(selected[:1], False)] * (-len(filled) % workers)
    return filled[rank::workers]


class HashSplit:
    """A random share of keys that depends on nothing but the key and the seed: `key in split`."""

    def __init__(self, fraction: float, seed: int) -> None:
        self._fraction, self._seed = fraction, seed

    def __contains__(self, key: str) -> bool:
        return random.Random(f"{self._seed}:{key}").random() < self._fraction


def hash_split(keys: Iterable[str], fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which rows belong to a random share: all rows of one key or none, whatever other rows there are."""
    split = HashSplit(fraction, seed)
    keys = list(keys)
    drawn = {key: key in split for key in set(keys)}
    return np.array([drawn[key] for key in keys], dtype=bool)


def _by_length(batch: Indices, row_groups: RowGroups) -> Indices:
    return batch[np.argsort(row_groups.lengths[batch], kind="stable")]


def _fill(ordered: Indices, row_groups: RowGroups, micro_rows: int, cost: int | None) -> list[Indices]:
    """Cut groups in order of length into micro-batches within `micro_rows` and padded `cost`
    (one group always fits)."""
    cuts, rows = [0], 0
    for position, (size, length) in enumerate(
        zip(row_groups.rows[ordered].tolist(), row_groups.lengths[ordered].tolist(), strict=True)
    ):
        rows += size
        too_large = cost is not None and rows * length > cost
        if rows > size and (rows > micro_rows or too_large):
            cuts.append(position)
            rows = size
    return [ordered[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(ordered)], strict=True)]
