"""Branches of conversations: a few own tokens each, over a trunk they share without a copy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mahalo_ray.decoding.attention import shared_prefix_attention

Slots = np.ndarray  # int64 [n]: places of rows in the cache


def grown(current: int, needed: int) -> int:
    """A new size for a buffer that must hold `needed`: an eighth larger at least, so that copying stays rare
    and little is held for nothing.
    """
    return current if needed <= current else max(needed, current + current // 8)


def resized(old: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`old` in the corner of a larger zero tensor."""
    new = old.new_zeros(shape)
    new[tuple(slice(0, size) for size in old.shape)] = old
    return new


@dataclass
class Part:
    """Own keys and values of some branches, per layer [rows, Hkv, branches, T, D]; cells[i]: which branch of
    the fork lies at flat place i = row * branches + branch (-1: padding)."""

    cells: np.ndarray
    keys: list[Tensor]
    values: list[Tensor]


class Parts:
    """Where the own keys and values of a fork's branches ended up after compactions."""

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def locate(self, cells: np.ndarray) -> list[tuple[Part, np.ndarray]]:
        """For every part: the flat place of each wanted branch in it, -1 where it lies in another part."""
        found = []
        for part in self.parts:
            place = {int(cell): at for at, cell in enumerate(part.cells) if cell >= 0}
            found.append((part, np.array([place.get(int(cell), -1) for cell in cells], dtype=np.int64)))
        return found


class Branches:
    """View of a forward over branch rows: row-major grid [N rows, K branches], all with the same number of
    own tokens (`length`), except that the last forward may be right-padded. `advance` after every forward."""

    def __init__(
        self,
        trunk: list[tuple[Tensor, Tensor]],
        trunk_lengths: np.ndarray,
        branches: int,
        initial_capacity: int = 16,
    ) -> None:
        """trunk: keys and values [N, Hkv, L, D] per layer, trunk_lengths [N] of each row used."""
        self.branches, self.trunk_lengths = branches, trunk_lengths
        self.length = 0
        self.cells = np.arange(len(trunk_lengths) * branches)
        self.archive = Parts()
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._capacity = initial_capacity
        self._trunk = trunk
        self._bias: Tensor | None = None
        self._bias_known = False

    @property
    def context(self) -> int:
        return int(self.trunk_lengths.max()) + self.length + 1

    @property
    def nbytes(self) -> int:
        """Bytes of the branches' own keys and values, those of finished branches included."""
        stored = [t for part in self.archive.parts for t in (*part.keys, *part.values)]
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values, *stored))

    def positions(self, width: int, device: torch.device) -> Tensor:
        """Position ids [N * K, width] of the next `width` tokens of every branch."""
        first = torch.from_numpy(self.trunk_lengths + self.length).repeat_interleave(self.branches)
        return (first[:, None] + torch.arange(width)).to(device)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        width, end = query.shape[2], self.length + query.shape[2]
        self._store(layer, key, value, end)
        trunk = self._trunk[layer]
        own = (self.keys[layer][..., :end, :], self.values[layer][..., :end, :])
        own_bias = None
        if width > 1:
            visible = torch.arange(end, device=query.device) <= torch.arange(
                self.length, end, device=query.device
            ).unsqueeze(1)
            own_bias = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, float("-inf"))
        return shared_prefix_attention(query, trunk, own, self._trunk_bias(query), own_bias, scaling, softcap)

    def advance(self, width: int) -> None:
        self.length += width

    def keep(self, rows: np.ndarray, grid: np.ndarray) -> None:
        """Go on with fewer branches. grid [N', K'] holds the flat places to keep (-1: padding); rows [N'] the
        row each new row belongs to, twice if its branches do not fit in one. What is left out stays available
        to `accept`."""
        flat = np.maximum(grid.reshape(-1), 0)
        left_out = np.setdiff1d(np.nonzero(self.cells >= 0)[0], grid)
        if len(left_out):
            self.archive.parts.append(
                Part(self.cells[left_out], *(self._taken(b, left_out, 1) for b in (self.keys, self.values)))
            )
        self.cells = np.where(grid.reshape(-1) >= 0, self.cells[flat], -1)
        self.keys, self.values = (self._taken(b, flat, grid.shape[1]) for b in (self.keys, self.values))
        self._capacity = self.length
        before, self.trunk_lengths = len(self.trunk_lengths), self.trunk_lengths[rows]
        longest = int(self.trunk_lengths.max())
        if not np.array_equal(rows, np.arange(before)):
            index = torch.from_numpy(rows)
            self._trunk = [(k[index, :, :longest], v[index, :, :longest]) for k, v in self._trunk]
        self.branches = grid.shape[1]
        self._bias_known = False

    def finished(self) -> Parts:
        """All branches' keys and values, for `RaggedCache.accept`; the view is done and lets go of the
        trunk."""
        self._trunk = []
        parts = Parts()
        parts.parts = [*self.archive.parts, Part(self.cells, self.keys, self.values)] if self.keys else []
        return parts

    def _taken(self, buffers: list[Tensor], flat: np.ndarray, branches: int) -> list[Tensor]:
        """The branches at these flat places, used positions only, as a grid with `branches` columns."""
        index = torch.from_numpy(flat)
        taken = []
        for buffer in buffers:
            at = index.to(buffer.device)
            picked = buffer[at // self.branches, :, at % self.branches, : self.length]
            taken.append(picked.unflatten(0, (-1, branches)).transpose(1, 2).contiguous())
        return taken

    def _store(self, layer: int, key: Tensor, value: Tensor, end: int) -> None:
        if end > self._capacity:
            self._capacity = grown(self._capacity, end)
        for buffers, new in ((self.keys, key), (self.values, value)):
            heads, dim = new.shape[1], new.shape[3]
            shape = (len(self.trunk_lengths), heads, self.branches, self._capacity, dim)
            if layer == len(buffers):
                buffers.append(new.new_zeros(shape))
            elif end > buffers[layer].shape[3]:
                buffers[layer] = resized(buffers[layer], shape)
            grid = new.reshape(len(self.trunk_lengths), self.branches, heads, new.shape[2], dim).transpose(
                1, 2
            )
            buffers[layer][..., self.length : end, :] = grid

    def _trunk_bias(self, query: Tensor) -> Tensor | None:
        """[N, 1, 1, L], -inf behind each trunk's end; None when all trunks have the same length."""
        if not self._bias_known:
            lengths = self.trunk_lengths
            self._bias, self._bias_known = None, True
            if (lengths != lengths[0]).any():
                behind = torch.arange(int(lengths.max())) >= torch.from_numpy(lengths)[:, None]
                bias = torch.zeros(behind.shape, dtype=query.dtype).masked_fill(behind, float("-inf"))
                self._bias = bias[:, None, None].to(query.device)
        return self._bias
