"""Forks that begin together and whose results are wanted together: the grid shrinks as branches end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mahalo_ray.decoding.candidates import Candidates
from mahalo_ray.decoding.decode import BranchDecoder
from mahalo_ray.decoding.forks import Fork
from mahalo_ray.decoding.parts import Part, Place

_COMPACT_BELOW = 0.5  # regrid when at most this share of the grid is alive
_WORTHWHILE = 0.75  # and the new grid has at most this share of the old one's places
_SPREAD = 1.25  # a row may be laid out twice (its trunk copied) while rows grow by at most this factor


class TogetherDecoder(BranchDecoder):
    """Decodes forks to their ends. Nobody joins, so that attention need not work on a grid of which most has
    ended: what is left of it is laid out again now and then, and what has ended is put aside."""

    def run(self, forks: Sequence[Fork]) -> Candidates:
        """The candidates of these forks' rows."""
        self._aside: dict[int, Place] = {}  # by cell
        self._aside_bytes = 0
        # The cell at every place, -1 for none, and the other way round. None: all are where they began.
        self._cell_at: np.ndarray | None = None
        self._place_of: Tensor | None = None
        self.begin(forks)
        while self.is_busy:
            self.step()
        return self.taken([fork.row for fork in forks])

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._aside_bytes

    def _forward(self, begun: np.ndarray) -> Tensor:
        places = len(self.branches.slots) * self.branches.branches
        if 0 < len(self._cell) <= _COMPACT_BELOW * places:
            self._compact(places)
        return super()._forward(begun)

    def _compact(self, places: int) -> None:
        """Lay the live cells out in the smallest grid."""
        alive = np.zeros(places, dtype=bool)
        alive[self._place.cpu().numpy()] = True
        source, grid = smallest_grid(alive, self.branches.branches, len(self._forks))
        if grid.size > _WORTHWHILE * places:
            return
        cell_at = np.arange(places) if self._cell_at is None else self._cell_at
        ended = np.flatnonzero(~alive & (cell_at >= 0))
        part = self.branches.copied(ended)
        self._aside.update({int(cell): Place(part, at, 0) for at, cell in enumerate(cell_at[ended])})
        self._aside_bytes += part.nbytes
        self._cell_at = np.where(grid >= 0, cell_at[np.maximum(grid, 0)], -1).reshape(-1)
        held = np.flatnonzero(self._cell_at >= 0)
        place_of = np.zeros(len(self._forks) * self._tables.columns, dtype=np.int64)
        place_of[self._cell_at[held]] = held
        self._place_of = torch.from_numpy(place_of).to(self.device)
        self.branches.regrid(source, grid, self.branches.slots[source])
        self._live(self._cell)

    def _places(self, cell: Tensor) -> Tensor:
        return cell if self._place_of is None else self._place_of[cell]

    def _kept(self, part: Part, cell: int) -> Place:
        if cell in self._aside:
            return self._aside[cell]
        place = cell if self._place_of is None else int(self._place_of[cell])
        return Place(part, place // self.branches.branches, place % self.branches.branches)


def smallest_grid(alive: np.ndarray, branches: int, most_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The live places of a grid [N, K] laid out again: rows [N'] (the old row each new row belongs to) and
    grid [N', K'] of old flat places, -1 for padding.

    A row with more live branches than K' is laid out several times, at the price of a copy of its trunk; rows
    in all stay within 1.25 times the fork's, so trunk memory is bounded too.
    """
    old = np.nonzero(alive)[0]
    live_per_row = np.bincount(old // branches, minlength=len(alive) // branches)
    best, best_places = 0, 0
    for width in range(1, int(live_per_row.max()) + 1):
        rows = int(np.ceil(live_per_row / width).sum())
        if rows <= _SPREAD * most_rows and (best == 0 or rows * width < best_places):
            best, best_places = width, rows * width
    rows_of = np.repeat(np.arange(len(live_per_row)), np.ceil(live_per_row / best).astype(np.int64))
    grid = np.full((len(rows_of), best), -1, dtype=np.int64)
    # rank of every live place among its row's live places, then its line and column in the new grid
    first_live = np.concatenate([[0], np.cumsum(live_per_row)[:-1]])
    rank = np.arange(len(old)) - first_live[old // branches]
    first_line = np.searchsorted(rows_of, np.arange(len(live_per_row)))
    grid[first_line[old // branches] + rank // best, rank % best] = old
    return rows_of, grid
