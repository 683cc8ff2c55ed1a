"""Keys and values of many conversations: one trunk per row, K branches per trunk that share it without a
copy.

`RaggedCache` holds the trunks: rows of different lengths, left-aligned, in preallocated buffers that grow by
doubling. `RaggedCache.fork(slots, K)` gives `Branches`: every branch sees its row's trunk, which exists once,
and its own few tokens. `RaggedCache.accept` copies the chosen branch's own tokens, never the prefix, behind
the trunk.

Both views go into a model's forward as `kv_cache=` (see attention.py). Positions never attended to may hold
stale numbers; buffers start as zeros because 0 * NaN would still be NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mahalo_ray.decoding.attention import prefix_attention, shared_prefix_attention

Slots = np.ndarray  # int64 [n]: places of rows in the cache


def _doubled(current: int, needed: int, least: int) -> int:
    size = max(current, least)
    while size < needed:
        size *= 2
    return size


def _resized(old: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`old` in the corner of a larger zero tensor."""
    new = old.new_zeros(shape)
    new[tuple(slice(0, size) for size in old.shape)] = old
    return new


class RaggedCache:
    """Trunks of up to `rows` conversations. Layers allocate at their first write, in the dtype and on the
    device of the keys they are given: [slots, Hkv, capacity, D] per layer for keys and for values."""

    def __init__(self, initial_capacity: int = 64) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        # Tokens per live row; live rows are slots 0 .. len(lengths) - 1.
        self.lengths = np.zeros(0, dtype=np.int64)
        self._capacity = initial_capacity
        self._slots = 0

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def add(self, count: int) -> Slots:
        """Slots of `count` new empty rows, behind the live ones."""
        first = self.num_rows
        self.lengths = np.concatenate([self.lengths, np.zeros(count, dtype=np.int64)])
        self._reserve(self.num_rows, self._capacity)
        return np.arange(first, first + count)

    def drop(self, count: int, moves: Sequence[tuple[int, int]]) -> None:
        """Free `count` rows: rows move (from slot, to slot) until the freed slots are the last ones."""
        if moves:
            source, target = (torch.tensor(side) for side in zip(*moves, strict=True))
            longest = int(self.lengths[source.numpy()].max())
            for buffer in (*self.keys, *self.values):
                buffer[target, :, :longest] = buffer[source, :, :longest]
            self.lengths[target.numpy()] = self.lengths[source.numpy()]
        self.lengths = self.lengths[: self.num_rows - count].copy()

    def reset(self, slots: Slots) -> None:
        """Forget the rows' tokens; the slots stay."""
        self.lengths[slots] = 0

    def copy(self, source: Slots, target: Slots) -> None:
        """Give the target rows the tokens of the source rows (beam search: one prefix goes on in two
        ways)."""
        longest = int(self.lengths[source].max(initial=0))
        for buffer in (*self.keys, *self.values):
            buffer[torch.from_numpy(target), :, :longest] = buffer[torch.from_numpy(source), :, :longest]
        self.lengths[target] = self.lengths[source]

    def append(self, slots: Slots, counts: np.ndarray, width: int) -> TrunkAppend:
        """View for one forward over `width` right-padded new tokens per row, `counts` of them real.

        Call `.commit()` after the forward.
        """
        self._reserve(self._slots, int(self.lengths[slots].max()) + width)
        return TrunkAppend(self, slots, counts, width)

    def fork(self, slots: Slots, branches: int) -> Branches:
        """`branches` branches of every given row; they see the trunks as they are now."""
        return Branches(self, slots, branches)

    def select(self, slots: Slots) -> slice | Tensor:
        """An index of these slots: a slice (no copy) when they are consecutive, else a tensor (a copy)."""
        first = int(slots[0])
        if np.array_equal(slots, np.arange(first, first + len(slots))):
            return slice(first, first + len(slots))
        return torch.from_numpy(slots)

    def accept(self, slots: Slots, source: Parts, cells: np.ndarray, counts: np.ndarray) -> None:
        """Copy the first counts[i] own tokens of branch cells[i] behind the trunk slots[i]."""
        if len(slots) == 0 or int(counts.max()) == 0:
            return
        self._reserve(self._slots, int((self.lengths[slots] + counts).max()))
        for part, at in source.locate(cells):
            which = np.nonzero(at >= 0)[0]
            row, offset = np.nonzero(np.arange(int(counts.max())) < counts[which][:, None])
            if len(row) == 0:
                continue
            to_slot, to_position = slots[which][row], self.lengths[slots[which]][row] + offset
            index = torch.from_numpy(np.stack([to_slot, to_position, at[which][row], offset]))
            slot, position, cell, token = index.to(part.keys[0].device)
            branches = part.keys[0].shape[2]
            row_of, branch_of = cell // branches, cell % branches
            for own, trunk in zip((*part.keys, *part.values), (*self.keys, *self.values), strict=True):
                trunk[slot, :, position] = own[row_of, :, branch_of, token]
        self.lengths[slots] += counts

    def write(
        self, layer: int, rows: slice | Tensor, starts: int | Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Put key, value [n, Hkv, S, D] at positions `starts` .. of the given rows (one int, or [n] on the
        device)."""
        if layer == len(self.keys):
            shape = (self._slots, key.shape[1], self._capacity, key.shape[3])
            self.keys.append(key.new_zeros(shape))
            self.values.append(value.new_zeros((*shape[:3], value.shape[3])))
        for buffer, new in ((self.keys[layer], key), (self.values[layer], value)):
            if isinstance(starts, int):
                buffer[rows, :, starts : starts + new.shape[2]] = new
            else:
                if isinstance(rows, slice):
                    rows = torch.arange(rows.start, rows.stop)
                positions = starts[:, None] + torch.arange(new.shape[2], device=starts.device)
                buffer[rows.to(new.device)[:, None], :, positions] = new.transpose(1, 2)

    def _reserve(self, slots: int, capacity: int) -> None:
        slots = _doubled(self._slots, slots, 1)
        capacity = _doubled(self._capacity, capacity, 1)
        if (slots, capacity) == (self._slots, self._capacity):
            return
        self._slots, self._capacity = slots, capacity
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                buffers[layer] = _resized(old, (slots, old.shape[1], capacity, old.shape[3]))


class TrunkAppend:
    """View of a forward that writes new tokens straight into the trunks (prefill, student turns, pending
    tokens)."""

    def __init__(self, cache: RaggedCache, slots: Slots, counts: np.ndarray, width: int) -> None:
        self.cache, self.slots, self.counts = cache, slots, counts
        self.rows = cache.select(slots)
        self.starts = cache.lengths[slots]
        self.context = int(self.starts.max()) + width
        self._uniform = int(self.starts[0]) if (self.starts == self.starts[0]).all() else None
        self._on_device: Tensor | None = None

    def positions(self, width: int, device: torch.device) -> Tensor:
        """Position ids [n, width]; padding beyond a row's count gets the next numbers, which nobody looks
        at."""
        return (torch.from_numpy(self.starts)[:, None] + torch.arange(width)).to(device)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        if self._on_device is None:
            self._on_device = torch.from_numpy(self.starts).to(query.device)
        cache = self.cache
        cache.write(layer, self.rows, self._on_device if self._uniform is None else self._uniform, key, value)
        if self._uniform == 0:
            return prefix_attention(query, key, value, None, scaling, softcap)
        keys, values = (
            buffers[layer][self.rows, :, : self.context] for buffers in (cache.keys, cache.values)
        )
        return prefix_attention(query, keys, values, self._on_device, scaling, softcap)

    def commit(self) -> None:
        self.cache.lengths[self.slots] += self.counts


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

    def __init__(self, cache: RaggedCache, slots: Slots, branches: int, initial_capacity: int = 16) -> None:
        self.cache, self.slots, self.branches = cache, slots, branches
        self.length = 0
        self.trunk_lengths = cache.lengths[slots]
        self.cells = np.arange(len(slots) * branches)
        self.archive = Parts()
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._capacity = initial_capacity
        rows = cache.select(slots)
        longest = int(self.trunk_lengths.max())
        self._trunk = [
            (key[rows, :, :longest], value[rows, :, :longest])
            for key, value in zip(cache.keys, cache.values, strict=True)
        ]
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
        self.trunk_lengths = self.trunk_lengths[rows]
        longest = int(self.trunk_lengths.max())
        if not np.array_equal(rows, np.arange(len(self.slots))):
            index = torch.from_numpy(rows)
            self._trunk = [tuple(t[index.to(t.device), :, :longest] for t in pair) for pair in self._trunk]  # type: ignore[misc]
        self.slots, self.branches = self.slots[rows], grid.shape[1]
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
            self._capacity = _doubled(self._capacity, end, 1)
        for buffers, new in ((self.keys, key), (self.values, value)):
            heads, dim = new.shape[1], new.shape[3]
            shape = (len(self.slots), heads, self.branches, self._capacity, dim)
            if layer == len(buffers):
                buffers.append(new.new_zeros(shape))
            elif end > buffers[layer].shape[3]:
                buffers[layer] = _resized(buffers[layer], shape)
            grid = new.reshape(len(self.slots), self.branches, heads, new.shape[2], dim).transpose(1, 2)
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
