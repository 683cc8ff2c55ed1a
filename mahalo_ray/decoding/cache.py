"""Keys and values of many conversations: one trunk per row, K branches per trunk that share it without a
copy.

`RaggedCache` holds the trunks: rows of different lengths, left-aligned, in buffers that grow by an
eighth. `Branches(cache, slots, K)` are K branches of rows: every branch sees its row's trunk, which exists
once, and its own few tokens. `RaggedCache.accept` copies the chosen branch's own tokens, never the prefix,
behind the trunk.

Both views, `TrunkAppend` and `Branches`, go into a model's forward as `kv_cache=` (see attention.py).
Positions never attended to may hold stale numbers; buffers start as zeros because 0 * NaN would still be NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mahalo_ray.decoding.parts import Place, grown, resized
from mahalo_ray.models.attention import prefix_attention

Slots = np.ndarray  # int64 [n]: places of rows in the cache


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

    def select(self, slots: Slots) -> slice | Tensor:
        """An index of these slots: a slice (no copy) when they are consecutive, else a tensor (a copy)."""
        first = int(slots[0])
        if np.array_equal(slots, np.arange(first, first + len(slots))):
            return slice(first, first + len(slots))
        return torch.from_numpy(slots)

    def accept(self, slots: Slots, places: Sequence[Place], counts: np.ndarray) -> None:
        """Copy the first counts[i] own tokens of the branch at places[i] behind the trunk slots[i].

        One copy per layer and part, whatever the number of rows.
        """
        if len(slots) == 0 or int(counts.max()) == 0:
            return
        self._reserve(self._slots, int((self.lengths[slots] + counts).max()))
        parts = {id(place.part): place.part for place in places}
        of = np.array([id(place.part) for place in places])
        lines, branches = np.array([(place.line, place.branch) for place in places]).T
        for key, part in parts.items():
            which = np.flatnonzero(of == key)
            row, offset = np.nonzero(np.arange(int(counts.max())) < counts[which][:, None])
            if len(row) == 0:
                continue
            row = which[row]
            wanted = (
                slots[row],
                self.lengths[slots][row] + offset,
                lines[row],
                branches[row],
                offset,
            )
            slot, position, line, branch, token = torch.from_numpy(np.stack(wanted)).to(part.keys[0].device)
            for own, trunk in zip((*part.keys, *part.values), (*self.keys, *self.values), strict=True):
                trunk[slot, :, position] = own[line, :, branch, token]
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
        slots = grown(self._slots, slots)
        capacity = grown(self._capacity, capacity)
        if (slots, capacity) == (self._slots, self._capacity):
            return
        self._slots, self._capacity = slots, capacity
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                buffers[layer] = resized(old, (slots, old.shape[1], capacity, old.shape[3]))


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
        self.store(layer, key, value)
        if self._uniform == 0:
            return prefix_attention(query, key, value, None, scaling, softcap)
        keys, values = (
            buffers[layer][self.rows, :, : self.context] for buffers in (self.cache.keys, self.cache.values)
        )
        return prefix_attention(query, keys, values, self._on_device, scaling, softcap)

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Put new keys and values [n, Hkv, width, D] behind the trunks."""
        if self._on_device is None:
            self._on_device = torch.from_numpy(self.starts).to(key.device)
        starts = self._on_device if self._uniform is None else self._uniform
        self.cache.write(layer, self.rows, starts, key, value)

    def commit(self) -> None:
        self.cache.lengths[self.slots] += self.counts
