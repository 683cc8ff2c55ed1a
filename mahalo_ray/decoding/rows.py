"""Row numbers that stay valid while the rows behind them move in a packed cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


class RowTable:
    """Gives out row numbers and knows each one's slot: live rows are always slots 0 .. len - 1."""

    def __init__(self) -> None:
        self.moves = 0  # so far: equal numbers, equal slots
        self._next = 0
        self._slot: dict[int, int] = {}
        self._row_at: list[int] = []

    def __len__(self) -> int:
        return len(self._row_at)

    def add(self, count: int) -> list[int]:
        rows = list(range(self._next, self._next + count))
        self._next += count
        for row in rows:
            self._slot[row] = len(self._row_at)
            self._row_at.append(row)
        return rows

    def drop(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Remove rows; the last ones move into the holes. Returns the moves as (from slot, to slot)."""
        gone = {self._slot.pop(row) for row in rows}
        left = len(self._row_at) - len(gone)
        holes = sorted(slot for slot in gone if slot < left)
        movers = [slot for slot in range(left, len(self._row_at)) if slot not in gone]
        moves = list(zip(movers, holes, strict=True))
        for source, target in moves:
            self._row_at[target] = self._row_at[source]
            self._slot[self._row_at[target]] = target
        del self._row_at[left:]
        self.moves += len(moves)
        return moves

    def slots(self, rows: Sequence[int]) -> np.ndarray:
        return np.array([self._slot[row] for row in rows], dtype=np.int64)

    def in_slot_order(self, rows: Sequence[int]) -> np.ndarray:
        """Places in `rows`, sorted by slot: all live rows, however asked for, are then one slice of a
        cache."""
        return np.argsort(self.slots(rows), kind="stable")


def by_size(sizes: Sequence[int], budget: int) -> Iterator[slice]:
    """Consecutive pieces of a padded batch, each with count * largest size within the budget (but at least
    one)."""
    first, widest = 0, 0
    for at, size in enumerate(sizes):
        wider = max(widest, size)
        if at > first and wider * (at + 1 - first) > budget:
            yield slice(first, at)
            first, wider = at, size
        widest = wider
    if first < len(sizes):
        yield slice(first, len(sizes))


def padded(token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, np.ndarray]:
    """Right-padded ids [n, longest] and the counts [n]."""
    counts = np.array([len(ids) for ids in token_ids], dtype=np.int64)
    batch = torch.zeros(len(token_ids), int(counts.max()), dtype=torch.long)
    for at, ids in enumerate(token_ids):
        batch[at, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return batch, counts
