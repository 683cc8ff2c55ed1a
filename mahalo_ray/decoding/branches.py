"""Branches of conversations: a few own tokens each, over trunks they share without a copy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mahalo_ray.decoding.attention import shared_prefix_attention
from mahalo_ray.decoding.cache import RaggedCache, Slots, TrunkAppend
from mahalo_ray.decoding.parts import Part, grown, resized

# Lines whose trunks do not lie side by side are attended to run by run, up to so many runs, if that is done
# once (the candidates of a few requests are scored). A token loop attends to the same trunks again and again,
# for which one copy, kept while the lines stay, is cheaper than the calls.
_MOST_RUNS = 8
_LEAST_GROWTH = 16  # tokens
NO_LINES = np.zeros(0, dtype=np.int64)


class Branches:
    """View of forwards over a grid of lines [N, K]: line i is K branches of the trunk at slots[i], each with
    lengths[i] own tokens. A flat place is line * K + branch.

    Lines begin at different times, so their lengths differ. A forward takes one token of the branches that
    `take_part`, or several of all of them, right-padded, while all lengths are equal. `advance` after every
    forward.
    """

    def __init__(self, cache: RaggedCache, slots: Slots, branches: int) -> None:
        """Every line sees its trunk as it is now."""
        self.cache, self.branches = cache, branches
        self.trunk_lengths = cache.lengths[slots]
        self.lengths = np.zeros(len(slots), dtype=np.int64)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._capacity = 0
        self._places: Tensor | None = None
        self._opening: TrunkAppend | None = None
        self._from: int | None = None  # where the next tokens of all branches go, if that is one place
        self._end = 0
        self._trunk_bias: Tensor | None = None
        self.move(slots)
        self.take_part(None, np.arange(len(slots)))

    @property
    def context(self) -> int:
        return int((self.trunk_lengths + self.lengths).max()) + 1

    @property
    def nbytes(self) -> int:
        """Bytes of the branches' own keys and values, and of trunks that had to be copied."""
        return Part(self.keys, self.values).nbytes + self._copied_bytes

    def positions(self, width: int, device: torch.device) -> Tensor:
        """Position ids [N * K, width] of the next `width` tokens of every branch."""
        first = torch.from_numpy(self.trunk_lengths + self.lengths).repeat_interleave(self.branches)
        return (first[:, None] + torch.arange(width)).to(device)

    def move(self, slots: Slots) -> None:
        """The trunks lie at these slots now."""
        self.slots = slots
        self._forget_trunks()
        firsts = np.flatnonzero(np.diff(slots, prepend=-2) != 1)
        counts = np.diff(firsts, append=len(slots))
        # Stretches of lines whose trunks lie side by side: first line, its slot, how many.
        self._runs = list(zip(firsts.tolist(), slots[firsts].tolist(), counts.tolist(), strict=True))

    def restart(self, lines: np.ndarray, trunk_lengths: np.ndarray) -> None:
        """These lines forget their own tokens: their trunks have grown to these lengths."""
        self.lengths[lines], self.trunk_lengths[lines] = 0, trunk_lengths
        self._forget_trunks()

    def regrid(self, source: np.ndarray, grid: np.ndarray, slots: Slots) -> None:
        """Other lines: new line i belongs to the trunk of the old line source[i] (-1: a new one, `restart`
        it), now at slots[i], and has the branches that were at the places grid[i] (-1: an empty one)."""
        kept = np.flatnonzero(source >= 0)
        lengths, trunk_lengths = np.zeros((2, len(source)), dtype=np.int64)
        lengths[kept], trunk_lengths[kept] = self.lengths[source[kept]], self.trunk_lengths[source[kept]]
        self.lengths, self.trunk_lengths = lengths, trunk_lengths
        self._capacity = int(lengths.max(initial=0))
        new = np.flatnonzero(grid.reshape(-1) >= 0)
        old, columns = torch.from_numpy(grid.reshape(-1)[new]), grid.shape[1]
        line, column = torch.from_numpy(new // columns), torch.from_numpy(new % columns)
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                shape = (len(source), buffer.shape[1], columns, self._capacity, buffer.shape[4])
                buffers[layer] = buffer.new_zeros(shape)
                buffers[layer][line, :, column] = self._picked(buffer, old, self._capacity)
        self.branches = columns
        self.move(slots)

    def take_part(self, places: Tensor | None, lines: np.ndarray, opening: np.ndarray = NO_LINES) -> None:
        """Who takes part in the forwards to come: the branches at these places (ascending; None: all), which
        are on these lines, and after them, in the next forward only, one token each that the trunks of the
        `opening` lines take in.

        Such a token goes through the attention in the place of its line's first branch.
        """
        lengths = self.lengths[lines]
        self._start = int(lengths.max(initial=0))
        self._even = bool((lengths == self._start).all())
        self._lines, self._places, self._opening, self._settled = lines, places, None, False
        if places is None:
            return
        self._own = (places // self.branches, places % self.branches)
        if len(opening):
            self._opening = self.cache.append(
                self.slots[opening], np.ones(len(opening), dtype=np.int64), width=1
            )
            places = torch.cat([places, torch.from_numpy(opening * self.branches).to(places.device)])
        elif len(places) == len(self.slots) * self.branches:
            self._places = None
            return
        self._places = places
        self._spread = places.new_zeros(len(self.slots) * self.branches)
        self._spread[places] = torch.arange(len(places), device=places.device)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        if not self._settled:
            self._settle(query)
        self._store(layer, key, value)
        if self._places is not None:
            query = query[self._spread]
        if layer == len(self._trunks):
            self._trunks.append(self._trunks_of(layer))
        keys, values, end = self.keys[layer], self.values[layer], self._end
        out = [
            shared_prefix_attention(
                query[places],
                trunk,
                (keys[lines, :, :, :end], values[lines, :, :, :end]),
                trunk_bias,
                own_bias,
                scaling,
                softcap,
            )
            for trunk, (lines, places, trunk_bias, own_bias) in zip(
                self._trunks[layer], self._pieces, strict=True
            )
        ]
        whole = out[0] if len(out) == 1 else torch.cat(out)
        return whole if self._places is None else whole[self._places]

    def advance(self, width: int) -> None:
        self.lengths[self._lines] += width
        self._start += width
        if self._opening is not None:
            self._opening.commit()
            self._opening = None
        if self._from is None or width > 1:
            self._settled = False
        else:  # all branches go on together: only the end moves
            self._end, self._from = self._end + 1, self._from + 1

    def part(self) -> Part:
        """The keys and values where they lie: those of a line stay as they are until it is restarted."""
        return Part(list(self.keys), list(self.values))

    def copied(self, places: np.ndarray) -> Part:
        """The branches at these places, as lines of one branch in a part of their own."""
        index, longest = torch.from_numpy(places), int(self.lengths.max())
        keys, values = (
            [self._picked(buffer, index, longest).unsqueeze(2) for buffer in buffers]
            for buffers in (self.keys, self.values)
        )
        return Part(keys, values)

    def _picked(self, buffer: Tensor, places: Tensor, length: int) -> Tensor:
        """[n, Hkv, length, D] of the branches at these places."""
        at = places.to(buffer.device)
        return buffer[at // self.branches, :, at % self.branches, :length]

    def _forget_trunks(self) -> None:
        # Per layer: keys and values [lines, Hkv, L, D] of the trunks, run by run; views unless there are too
        # many runs. Views outlive the cache's buffers when those grow: these trunks do not change meanwhile.
        self._trunks: list[list[tuple[Tensor, Tensor]]] = []
        self._copied_bytes = 0
        self._settled = False

    def _settle(self, query: Tensor) -> None:
        """What all layers of a forward share."""
        width, start, lines = query.shape[2], self._start, len(self.slots)
        self._end = start + width if len(self._lines) else 0
        self._from = start if self._even and self._places is None else None
        if self._from is None:
            line, column = self._own
            self._at = (line, column, torch.from_numpy(self.lengths).to(query.device)[line])
        own_bias: Tensor | None = None
        if width > 1:
            assert self._from is not None, "several tokens at once need branches of equal lengths"
            behind = torch.arange(self._end) > torch.arange(start, self._end)[:, None]
            own_bias = _hiding(behind, query).expand(lines, 1, 1, 1, width, self._end)
        elif not self._even or self._opening is not None:
            seen = np.zeros(lines, dtype=np.int64)
            seen[self._lines] = self.lengths[self._lines] + 1
            own_bias = _hiding(torch.arange(self._end) >= torch.from_numpy(seen)[:, None], query)
            own_bias = own_bias[:, None, None, None, None]
        if not self._trunks:
            self._most_runs = _MOST_RUNS if width > 1 else 1
            self._longest, self._trunk_bias = int(self.trunk_lengths.max()), None
            if (self.trunk_lengths != self._longest).any():
                behind = torch.arange(self._longest) >= torch.from_numpy(self.trunk_lengths)[:, None]
                self._trunk_bias = _hiding(behind, query)[:, None, None]
        firsts = [first for first, _, _ in self._runs] if len(self._runs) <= self._most_runs else [0]
        ends = [*firsts[1:], lines]
        self._pieces = [
            (
                slice(a, b),
                slice(a * self.branches, b * self.branches),
                None if self._trunk_bias is None else self._trunk_bias[a:b],
                None if own_bias is None else own_bias[a:b],
            )
            for a, b in zip(firsts, ends, strict=True)
        ]
        self._settled = True

    def _store(self, layer: int, key: Tensor, value: Tensor) -> None:
        if self._opening is not None:
            count = len(self._opening.slots)
            self._opening.store(layer, key[-count:], value[-count:])
            key, value = key[:-count], value[:-count]
        if self._end > self._capacity:
            self._capacity = grown(self._capacity, self._end, _LEAST_GROWTH)
        for buffers, new in ((self.keys, key), (self.values, value)):
            shape = (len(self.slots), new.shape[1], self.branches, self._capacity, new.shape[3])
            if layer == len(buffers):
                buffers.append(new.new_zeros(shape))
            elif self._end > buffers[layer].shape[3]:
                buffers[layer] = resized(buffers[layer], shape)
            if self._from is None:
                line, column, position = self._at
                buffers[layer][line, :, column, position] = new[:, :, 0]
            else:
                grid = new.reshape(shape[0], shape[2], shape[1], -1, shape[4]).transpose(1, 2)
                buffers[layer][..., self._from : self._end, :] = grid

    def _trunks_of(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        keys, values, longest = self.cache.keys[layer], self.cache.values[layer], self._longest
        if len(self._runs) > self._most_runs:
            index = torch.from_numpy(self.slots)
            copies = (keys[index, :, :longest], values[index, :, :longest])
            self._copied_bytes += sum(t.numel() * t.element_size() for t in copies)
            return [copies]
        places = [slice(slot, slot + count) for _, slot, count in self._runs]
        return [(keys[at, :, :longest], values[at, :, :longest]) for at in places]


def _hiding(hidden: Tensor, query: Tensor) -> Tensor:
    """A bias of -inf where `hidden`, else 0, in the queries' dtype and on their device."""
    return (
        torch.zeros(hidden.shape, dtype=query.dtype).masked_fill(hidden.cpu(), float("-inf")).to(query.device)
    )
