"""Keys and values of many conversations: one prefix per row, K branches per prefix that share it without a
copy.

`RaggedCache` holds the prefixes: rows of different lengths, left-aligned, in buffers that grow by an
eighth. `Branches(cache, slots, K)` are K branches of rows: every branch sees its row's prefix, which exists
once, and its own few tokens. `RaggedCache.accept` copies the chosen branch's own tokens, never the prefix,
behind the prefix.

Both views, `PrefixAppend` and `Branches`, go into a model's forward as `kv_cache=` (see attention.py).
Positions never attended to may hold stale numbers; buffers start as zeros because 0 * NaN would still be NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mahalo_ray.models.attention import prefix_attention, register_attention, softcapped


@dataclass(frozen=True)
class KVBlock:
    """Own keys and values of some lines of branches, per layer [lines, Hkv, K, T, D]."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


@dataclass(frozen=True)
class BranchRef:
    """One branch of a part."""

    part: KVBlock
    line: int
    branch: int


def grown(current: int, needed: int, least: int = 1) -> int:
    """A new size for a buffer that must hold `needed`: an eighth, and `least`, larger at least, so that
    copying stays rare and little is held for nothing.
    """
    return current if needed <= current else max(needed, current + max(current // 8, least))


def resized(old: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`old` in the corner of a larger zero tensor."""
    new = old.new_zeros(shape)
    new[tuple(slice(0, size) for size in old.shape)] = old
    return new


Slots = np.ndarray  # int64 [n]: places of rows in the cache


class RaggedCache:
    """Prefixs of up to `rows` conversations. Layers allocate at their first write, in the dtype and on the
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

    def append(self, slots: Slots, counts: np.ndarray, width: int) -> PrefixAppend:
        """View for one forward over `width` right-padded new tokens per row, `counts` of them real.

        Call `.commit()` after the forward.
        """
        self._reserve(self._slots, int(self.lengths[slots].max()) + width)
        return PrefixAppend(self, slots, counts, width)

    def select(self, slots: Slots) -> slice | Tensor:
        """An index of these slots: a slice (no copy) when they are consecutive, else a tensor (a copy)."""
        first = int(slots[0])
        if np.array_equal(slots, np.arange(first, first + len(slots))):
            return slice(first, first + len(slots))
        return torch.from_numpy(slots)

    def accept(self, slots: Slots, places: Sequence[BranchRef], counts: np.ndarray) -> None:
        """Copy the first counts[i] own tokens of the branch at places[i] behind the prefix slots[i].

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
            for own, prefix in zip((*part.keys, *part.values), (*self.keys, *self.values), strict=True):
                prefix[slot, :, position] = own[line, :, branch, token]
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


class PrefixAppend:
    """View of a forward that writes new tokens straight into the prefixes (prefill, student turns, pending
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
        """Put new keys and values [n, Hkv, width, D] behind the prefixes."""
        if self._on_device is None:
            self._on_device = torch.from_numpy(self.starts).to(key.device)
        starts = self._on_device if self._uniform is None else self._uniform
        self.cache.write(layer, self.rows, starts, key, value)

    def commit(self) -> None:
        self.cache.lengths[self.slots] += self.counts


IMPLEMENTATION = "mahalo_cached"

register_attention(IMPLEMENTATION, "kv_cache", "the decoding cache")


@contextlib.contextmanager
def cached_attention(config: Any) -> Iterator[None]:
    """Switch the models that share this transformers config to the cached attention, and back afterwards.

    The model stays usable for training in between; do not call the same model from another thread meanwhile.
    """
    before = config._attn_implementation_internal
    config._attn_implementation_internal = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def shared_prefix_attention(
    query: Tensor,
    prefix: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    prefix_bias: Tensor | None,
    own_bias: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Attention of K branches per row over their row's prefix, stored once, and over their own keys: one
    softmax.

    query [N * K, Hq, S, D]; prefix keys, values [N, Hkv, L, D]; own keys, values [N, Hkv, K, T, D] (this
    call's S included); prefix_bias [N, 1, 1, L] and own_bias [.., S, T] hold 0 or -inf (None: everything is
    visible). Returns [N * K, S, Hq, D].
    """
    rows, kv_heads, branches, own_length, dim = own[0].shape
    width, groups = query.shape[2], query.shape[1] // kv_heads
    # The K branches become K*G*S query rows of ONE matmul against the prefix they share.
    query = query.view(rows, branches, kv_heads, groups, width, dim).permute(0, 2, 1, 3, 4, 5) * scaling
    query = query.reshape(rows, kv_heads, branches * groups * width, dim)
    to_prefix = query @ prefix[0].transpose(-1, -2)
    to_own = query.view(rows, kv_heads, branches, groups * width, dim) @ own[0].transpose(-1, -2)
    to_prefix, to_own = softcapped(to_prefix, softcap), softcapped(to_own, softcap)
    if prefix_bias is not None:
        to_prefix = to_prefix + prefix_bias
    if own_bias is not None:
        to_own = to_own.view(rows, kv_heads, branches, groups, width, own_length) + own_bias
    to_own = to_own.reshape(rows, kv_heads, branches * groups * width, own_length)
    scores = torch.cat([to_prefix, to_own], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    length = prefix[0].shape[2]
    out = weights[..., :length] @ prefix[1]
    own_weights = weights[..., length:].view(rows, kv_heads, branches, groups * width, own_length)
    out = out.view(rows, kv_heads, branches, groups * width, dim) + own_weights @ own[1]
    out = out.view(rows, kv_heads, branches, groups, width, dim).permute(0, 2, 4, 1, 3, 5)
    return out.reshape(rows * branches, width, kv_heads * groups, dim)


# Lines whose prefixes do not lie side by side are attended to run by run, up to so many runs, if that is
# done once (the candidates of a few requests are scored). A token loop attends to the same prefixes again and
# again, for which one copy, kept while the lines stay, is cheaper than the calls.
_MOST_RUNS = 8
_LEAST_GROWTH = 16  # tokens
NO_LINES = np.zeros(0, dtype=np.int64)


class Branches:
    """View of forwards over a grid of lines [N, K]: line i is K branches of the prefix at slots[i], each with
    lengths[i] own tokens. A flat place is line * K + branch.

    Lines begin at different times, so their lengths differ. A forward takes one token of the branches that
    `take_part`, or several of all of them, right-padded, while all lengths are equal. `advance` after every
    forward.
    """

    def __init__(self, cache: RaggedCache, slots: Slots, branches: int) -> None:
        """Every line sees its prefix as it is now."""
        self.cache, self.branches = cache, branches
        self.prefix_lengths = cache.lengths[slots]
        self.lengths = np.zeros(len(slots), dtype=np.int64)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._capacity = 0
        self._places: Tensor | None = None
        self._opening: PrefixAppend | None = None
        self._from: int | None = None  # where the next tokens of all branches go, if that is one place
        self._end = 0
        self._prefix_bias: Tensor | None = None
        self.move(slots)
        self.take_part(None, np.arange(len(slots)))

    @property
    def context(self) -> int:
        return int((self.prefix_lengths + self.lengths).max()) + 1

    @property
    def nbytes(self) -> int:
        """Bytes of the branches' own keys and values, and of prefixes that had to be copied."""
        return KVBlock(self.keys, self.values).nbytes + self._copied_bytes

    def positions(self, width: int, device: torch.device) -> Tensor:
        """Position ids [N * K, width] of the next `width` tokens of every branch."""
        first = torch.from_numpy(self.prefix_lengths + self.lengths).repeat_interleave(self.branches)
        return (first[:, None] + torch.arange(width)).to(device)

    def move(self, slots: Slots) -> None:
        """The prefixes lie at these slots now."""
        self.slots = slots
        self._forget_prefixes()
        firsts = np.flatnonzero(np.diff(slots, prepend=-2) != 1)
        counts = np.diff(firsts, append=len(slots))
        # Stretches of lines whose prefixes lie side by side: first line, its slot, how many.
        self._runs = list(zip(firsts.tolist(), slots[firsts].tolist(), counts.tolist(), strict=True))

    def restart(self, lines: np.ndarray, prefix_lengths: np.ndarray) -> None:
        """These lines forget their own tokens: their prefixes have grown to these lengths."""
        self.lengths[lines], self.prefix_lengths[lines] = 0, prefix_lengths
        self._forget_prefixes()

    def regrid(self, source: np.ndarray, grid: np.ndarray, slots: Slots) -> None:
        """Other lines: new line i belongs to the prefix of the old line source[i] (-1: a new one, `restart`
        it), now at slots[i], and has the branches that were at the places grid[i] (-1: an empty one)."""
        kept = np.flatnonzero(source >= 0)
        lengths, prefix_lengths = np.zeros((2, len(source)), dtype=np.int64)
        lengths[kept], prefix_lengths[kept] = self.lengths[source[kept]], self.prefix_lengths[source[kept]]
        self.lengths, self.prefix_lengths = lengths, prefix_lengths
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
        are on these lines, and after them, in the next forward only, one token each that the prefixes of the
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
        if layer == len(self._prefixes):
            self._prefixes.append(self._prefixes_of(layer))
        keys, values, end = self.keys[layer], self.values[layer], self._end
        out = [
            shared_prefix_attention(
                query[places],
                prefix,
                (keys[lines, :, :, :end], values[lines, :, :, :end]),
                prefix_bias,
                own_bias,
                scaling,
                softcap,
            )
            for prefix, (lines, places, prefix_bias, own_bias) in zip(
                self._prefixes[layer], self._pieces, strict=True
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

    def part(self) -> KVBlock:
        """The keys and values where they lie: those of a line stay as they are until it is restarted."""
        return KVBlock(list(self.keys), list(self.values))

    def copied(self, places: np.ndarray) -> KVBlock:
        """The branches at these places, as lines of one branch in a part of their own."""
        index, longest = torch.from_numpy(places), int(self.lengths.max())
        keys, values = (
            [self._picked(buffer, index, longest).unsqueeze(2) for buffer in buffers]
            for buffers in (self.keys, self.values)
        )
        return KVBlock(keys, values)

    def _picked(self, buffer: Tensor, places: Tensor, length: int) -> Tensor:
        """[n, Hkv, length, D] of the branches at these places."""
        at = places.to(buffer.device)
        return buffer[at // self.branches, :, at % self.branches, :length]

    def _forget_prefixes(self) -> None:
        # Per layer: keys and values [lines, Hkv, L, D] of the prefixes, run by run; views unless there are
        # too many runs. Views outlive the cache's buffers when those grow: these prefixes do not change then.
        self._prefixes: list[list[tuple[Tensor, Tensor]]] = []
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
        if not self._prefixes:
            self._most_runs = _MOST_RUNS if width > 1 else 1
            self._longest, self._prefix_bias = int(self.prefix_lengths.max()), None
            if (self.prefix_lengths != self._longest).any():
                behind = torch.arange(self._longest) >= torch.from_numpy(self.prefix_lengths)[:, None]
                self._prefix_bias = _hiding(behind, query)[:, None, None]
        firsts = [first for first, _, _ in self._runs] if len(self._runs) <= self._most_runs else [0]
        ends = [*firsts[1:], lines]
        self._pieces = [
            (
                slice(a, b),
                slice(a * self.branches, b * self.branches),
                None if self._prefix_bias is None else self._prefix_bias[a:b],
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

    def _prefixes_of(self, layer: int) -> list[tuple[Tensor, Tensor]]:
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
