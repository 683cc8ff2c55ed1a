"""Keys and values: one prefix per sequence, stored once, and K branches that share it without a copy.

`RaggedCache` holds the prefixes. `Branches(cache, slots, K)` are K candidate continuations of each of some
sequences: every branch attends to its sequence's prefix and to its own few tokens. `RaggedCache.accept`
copies the own tokens of a chosen branch behind its prefix, and never the prefix itself.

Both views of a forward, `PrefixAppend` and `Branches`, go into a model as `kv_cache=` (see
models/attention.py). The words (sequence, slot, grid) are explained in engine.py.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mahalo_ray.decoding.branch_attention import JoinedKeys, shared_prefix_attention
from mahalo_ray.models.attention import prefix_attention, register_attention

IMPLEMENTATION = "mahalo_cached"  # the name of our attention among transformers' implementations

Slots = np.ndarray  # int64 [n]: where sequences lie in the cache
NO_ROWS = np.zeros(0, dtype=np.int64)

# Prefixes that do not lie side by side are attended to run by run, up to so many runs, if that is done once
# (the candidates of a few requests are scored). A token loop attends to the same prefixes again and again,
# for which one copy, kept while the grid stays, is cheaper than the calls.
_MOST_RUNS = 8
_LEAST_GROWTH = 16  # tokens
_SHRINK_BELOW = 0.25  # buffers are made smaller when no more than this share of them is in use


@dataclass(frozen=True)
class KVBlock:
    """Keys and values of branches, apart from their prefixes: per layer [rows, Hkv, K, T, D]."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))


@dataclass(frozen=True)
class BranchRef:
    """Where the keys and values of one branch lie."""

    block: KVBlock
    row: int
    column: int


def grown(current: int, needed: int, least: int = 1) -> int:
    """A new size for a buffer that must hold `needed`: an eighth, and `least`, larger at least, so that
    copying stays rare and little is held for nothing.
    """
    return current if needed <= current else max(needed, current + max(current // 8, least))


def resized(old: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`old` in the corner of a zero tensor of another shape; what does not fit is left out."""
    new = old.new_zeros(shape)
    corner = tuple(slice(0, min(before, after)) for before, after in zip(old.shape, shape, strict=True))
    new[corner] = old[corner]
    return new


class RaggedCache:
    """The prefixes of many sequences, of different lengths.

    Layers allocate at their first write, in the dtype and on the device of the keys they are given.
    """

    # One padded buffer per layer, [slots, Hkv, capacity, D], and no pages: a forward over neighbouring slots
    # reads them as one view, and the K branches of a sequence meet its prefix in a single matmul. The price
    # is that every slot is as wide as the longest sequence. A sequence's tokens stand at the left of its
    # slot; what lies behind its length is stale and never attended to, but must be a number: 0 * NaN is NaN,
    # which is why buffers start as zeros.

    def __init__(self, initial_capacity: int = 64, least_growth: int = 1) -> None:
        """Places for tokens in every slot at first, and how many more there are at least when they grow."""
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        # Tokens per sequence; those in use are slots 0 .. len(lengths) - 1.
        self.lengths = np.zeros(0, dtype=np.int64)
        self._initial_capacity, self._least_growth = initial_capacity, least_growth
        self._capacity = initial_capacity
        self._slots = 0

    @property
    def num_slots(self) -> int:
        """Slots in use."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return KVBlock(self.keys, self.values).nbytes

    def add(self, count: int) -> Slots:
        """Slots of `count` new empty sequences, behind those in use."""
        first = self.num_slots
        self.lengths = np.concatenate([self.lengths, np.zeros(count, dtype=np.int64)])
        self._reserve(self.num_slots, self._capacity)
        return np.arange(first, first + count)

    def drop(self, count: int, moves: Sequence[tuple[int, int]]) -> None:
        """Free `count` slots: sequences move (from slot, to slot) until the free slots are the last ones.
        Memory that is mostly unused from then on is given back."""
        if moves:
            source, target = (torch.tensor(side) for side in zip(*moves, strict=True))
            longest = int(self.lengths[source.numpy()].max())
            for buffer in (*self.keys, *self.values):
                buffer[target, :, :longest] = buffer[source, :, :longest]
            self.lengths[target.numpy()] = self.lengths[source.numpy()]
        self.lengths = self.lengths[: self.num_slots - count].copy()
        self._shrink()

    def reset(self, slots: Slots) -> None:
        """Forget the tokens of these sequences; the slots stay."""
        self.lengths[slots] = 0

    def copy(self, source: Slots, target: Slots) -> None:
        """Give the target slots the tokens of the source slots (beam search: one prefix goes on in two
        ways)."""
        longest = int(self.lengths[source].max(initial=0))
        for buffer in (*self.keys, *self.values):
            buffer[torch.from_numpy(target), :, :longest] = buffer[torch.from_numpy(source), :, :longest]
        self.lengths[target] = self.lengths[source]

    def append(self, slots: Slots, counts: np.ndarray, width: int) -> PrefixAppend:
        """View for one forward over `width` right-padded new tokens per sequence, `counts` of them real.

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

    def accept(self, slots: Slots, refs: Sequence[BranchRef], counts: np.ndarray) -> None:
        """Copy the first counts[i] own tokens of the branch refs[i] behind the prefix at slots[i].

        One copy per layer and block, whatever the number of sequences.
        """
        if len(slots) == 0 or int(counts.max()) == 0:
            return
        self._reserve(self._slots, int((self.lengths[slots] + counts).max()))
        blocks = {id(ref.block): ref.block for ref in refs}
        block_of_ref = np.array([id(ref.block) for ref in refs])
        rows, columns = np.array([(ref.row, ref.column) for ref in refs]).T
        for block_id, block in blocks.items():
            in_block = np.flatnonzero(block_of_ref == block_id)
            # One entry per token to copy: which sequence, and the token's offset in its branch.
            which, offset = np.nonzero(np.arange(int(counts.max())) < counts[in_block][:, None])
            if len(which) == 0:
                continue
            which = in_block[which]
            position = self.lengths[slots][which] + offset
            index = np.stack((slots[which], position, rows[which], columns[which], offset))
            slot, position, row, column, token = torch.from_numpy(index).to(block.keys[0].device)
            for source, target in zip((*block.keys, *block.values), (*self.keys, *self.values), strict=True):
                target[slot, :, position] = source[row, :, column, token]
        self.lengths[slots] += counts

    def write(
        self, layer: int, slots: slice | Tensor, starts: int | Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Put key, value [n, Hkv, S, D] at positions `starts` .. of these slots (one int, or [n] on the
        device)."""
        if layer == len(self.keys):
            shape = (self._slots, key.shape[1], self._capacity, key.shape[3])
            self.keys.append(key.new_zeros(shape))
            self.values.append(value.new_zeros((*shape[:3], value.shape[3])))
        for buffer, new in ((self.keys[layer], key), (self.values[layer], value)):
            if isinstance(starts, int):
                buffer[slots, :, starts : starts + new.shape[2]] = new
            else:
                if isinstance(slots, slice):
                    slots = torch.arange(slots.start, slots.stop)
                positions = starts[:, None] + torch.arange(new.shape[2], device=starts.device)
                buffer[slots.to(new.device)[:, None], :, positions] = new.transpose(1, 2)

    def reserve(self, slots: int) -> None:
        """Make room for so many sequences."""
        self._reserve(slots, self._capacity)

    def _reserve(self, slots: int, capacity: int) -> None:
        self._resize(grown(self._slots, slots), grown(self._capacity, capacity, self._least_growth))

    def _shrink(self) -> None:
        """Give memory back: all of it with the last sequence, else when most of it is unused."""
        if self.num_slots == 0:
            self.keys.clear()
            self.values.clear()
            self._slots, self._capacity = 0, self._initial_capacity
            return
        capacity = max(int(self.lengths.max()), self._initial_capacity)
        if self.num_slots * capacity <= _SHRINK_BELOW * self._slots * self._capacity:
            self._resize(self.num_slots, capacity)

    def _resize(self, slots: int, capacity: int) -> None:
        if (slots, capacity) == (self._slots, self._capacity):
            return
        self._slots, self._capacity = slots, capacity
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                buffers[layer] = resized(old, (slots, old.shape[1], capacity, old.shape[3]))


class PrefixAppend:
    """View of a forward that writes new tokens straight into the prefixes (prompts, the other speaker's
    turns, accepted tokens that the model has not read)."""

    def __init__(self, cache: RaggedCache, slots: Slots, counts: np.ndarray, width: int) -> None:
        self.cache, self.slots, self.counts = cache, slots, counts
        self.starts = cache.lengths[slots]
        self.context = int(self.starts.max()) + width
        self._index = cache.select(slots)
        self._common_start = int(self.starts[0]) if (self.starts == self.starts[0]).all() else None
        self._starts_on_device: Tensor | None = None

    def positions(self, width: int, device: torch.device) -> Tensor:
        """Position ids [n, width]; padding gets the numbers after a sequence's count, which nothing attends
        to."""
        return (torch.from_numpy(self.starts)[:, None] + torch.arange(width)).to(device)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        self.store(layer, key, value)
        if self._common_start == 0:
            return prefix_attention(query, key, value, None, scaling, softcap)
        keys, values = (
            buffers[layer][self._index, :, : self.context] for buffers in (self.cache.keys, self.cache.values)
        )
        return prefix_attention(query, keys, values, self._starts_on_device, scaling, softcap)

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Put new keys and values [n, Hkv, width, D] behind the prefixes."""
        if self._starts_on_device is None:
            self._starts_on_device = torch.from_numpy(self.starts).to(key.device)
        starts = self._starts_on_device if self._common_start is None else self._common_start
        self.cache.write(layer, self._index, starts, key, value)

    def commit(self) -> None:
        """The new tokens are part of the prefixes."""
        self.cache.lengths[self.slots] += self.counts


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


class Branches:
    """View of forwards over a grid [N, K]: row i is K branches of the prefix at slots[i], each with
    lengths[i] tokens of its own. The grid index of a branch is row * K + column.

    Rows begin at different times, so their lengths differ. A forward takes one token of the branches that
    were selected, or several of all of them, right-padded, while all lengths are equal. Call `advance` after
    every forward.
    """

    def __init__(self, cache: RaggedCache, slots: Slots, columns: int, is_steady: bool = False) -> None:
        """Every row sees its prefix as it is now. `is_steady`: where buffers can stay when rows come and go
        they do; they have places for more rows then, and are never shortened."""
        self.cache, self.columns = cache, columns
        self._is_steady, self.room = is_steady, len(slots)  # rows that the buffers have places for
        self._handed_out: list[weakref.ref[KVBlock]] = []
        self.prefix_lengths = cache.lengths[slots]
        self.lengths = np.zeros(len(slots), dtype=np.int64)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._capacity = 0
        self._selected: Tensor | None = None  # grid indices of a forward's tokens; None: all, in order
        self._opening: PrefixAppend | None = None
        self._common_start: int | None = None  # where the next tokens of all branches go, if at one position
        self._end = 0
        self._prefix_bias: Tensor | None = None
        self._joined: list[JoinedKeys | None] = []  # of every piece, in the forward under way
        self.move(slots)
        self.select(None, np.arange(len(slots)))

    @property
    def context(self) -> int:
        return int((self.prefix_lengths + self.lengths).max()) + 1

    @property
    def size(self) -> int:
        """Branches the grid has places for."""
        return len(self.slots) * self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of the branches' own keys and values, and of prefixes that had to be copied."""
        return KVBlock(self.keys, self.values).nbytes + self._copied_bytes

    def positions(self, width: int, device: torch.device) -> Tensor:
        """Position ids [N * K, width] of the next `width` tokens of every branch."""
        first = torch.from_numpy(self.prefix_lengths + self.lengths).repeat_interleave(self.columns)
        return (first[:, None] + torch.arange(width)).to(device)

    def move(self, slots: Slots) -> None:
        """The prefixes lie at these slots now."""
        self.slots = slots
        self._forget_prefixes()
        first_rows = np.flatnonzero(np.diff(slots, prepend=-2) != 1)
        counts = np.diff(first_rows, append=len(slots))
        # Runs of rows whose prefixes lie side by side: first row, its slot, how many.
        self._runs = list(zip(first_rows.tolist(), slots[first_rows].tolist(), counts.tolist(), strict=True))

    def restart(self, rows: np.ndarray, prefix_lengths: np.ndarray) -> None:
        """These rows forget their own tokens: their prefixes have grown to these lengths."""
        self.lengths[rows], self.prefix_lengths[rows] = 0, prefix_lengths
        self._forget_prefixes()

    def regrid(self, source_rows: np.ndarray, source: np.ndarray, slots: Slots) -> None:
        """Lay the branches out in another grid.

        New row i belongs to the prefix of the old row source_rows[i] (-1: a new one, `restart` it), now at
        slots[i]. source [N', K'] has the old grid index of every new place (-1: an empty one).
        """
        # Every layer's [N, Hkv, K, T, D] is gathered first, not shuffled in place: moves may go both ways, so
        # a place could be overwritten before it was read. What `block` has handed out stays as it is.
        # New places hold zeros or stale numbers, nothing uninitialised: a bias of -inf gives them weight 0,
        # but 0 * NaN is NaN and would reach the sum over values.
        old_rows = np.flatnonzero(source_rows >= 0)
        lengths, prefix_lengths = np.zeros((2, len(source_rows)), dtype=np.int64)
        lengths[old_rows] = self.lengths[source_rows[old_rows]]
        prefix_lengths[old_rows] = self.prefix_lengths[source_rows[old_rows]]
        self.lengths, self.prefix_lengths = lengths, prefix_lengths
        longest, columns = int(lengths.max(initial=0)), source.shape[1]
        self._capacity = max(longest, self._capacity) if self._is_steady else longest
        self.room = self._room_for(len(source_rows))
        in_use = any(reference() is not None for reference in self._handed_out)
        new = np.flatnonzero(source.reshape(-1) >= 0)
        old = torch.from_numpy(source.reshape(-1)[new])
        row, column = torch.from_numpy(new // columns), torch.from_numpy(new % columns)
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                shape = (self.room, buffer.shape[1], columns, self._capacity, buffer.shape[4])
                moved = self._gather(buffer, old, longest)
                if not self._is_steady or in_use or buffer.shape != shape:
                    buffers[layer] = buffer.new_zeros(shape)
                buffers[layer][row, :, column, :longest] = moved
        self.columns = columns
        self.move(slots)

    def select(self, branches: Tensor | None, rows: np.ndarray, opening_rows: np.ndarray = NO_ROWS) -> None:
        """Choose the tokens of the forwards to come: one of each of these branches (grid indices, ascending;
        None: all), which are in these rows; and after them, in the next forward only, one token for the
        prefix of each opening row.

        Such a token goes through the attention in the place of its row's first branch.
        """
        lengths = self.lengths[rows]
        self._start = int(lengths.max(initial=0))
        self._even = bool((lengths == self._start).all())
        self._rows, self._selected, self._opening, self._settled = rows, branches, None, False
        if branches is None:
            return
        self._branch_rows, self._branch_columns = branches // self.columns, branches % self.columns
        if len(opening_rows):
            self._opening = self.cache.append(
                self.slots[opening_rows], np.ones(len(opening_rows), dtype=np.int64), width=1
            )
            opened = torch.from_numpy(opening_rows * self.columns).to(branches.device)
            branches = torch.cat([branches, opened])
        elif len(branches) == self.size:
            self._selected = None
            return
        self._selected = branches
        self._token_of_place = branches.new_zeros(self.size)
        self._token_of_place[branches] = torch.arange(len(branches), device=branches.device)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        if not self._settled:
            self._settle(query)
        self._store(layer, key, value)
        if self._selected is not None:
            query = query[self._token_of_place]
        if layer == len(self._prefixes):
            self._prefixes.append(self._prefixes_of(layer))
        keys, values, end = self.keys[layer], self.values[layer], self._end
        out = []
        for number, (prefix, piece) in enumerate(zip(self._prefixes[layer], self._pieces, strict=True)):
            rows, branches, prefix_bias, own_bias = piece
            of_piece = query[branches]
            own = (keys[rows, :, :, :end], values[rows, :, :, :end])
            if number == len(self._joined):  # the first layer of a forward
                biases = (prefix_bias, own_bias)
                self._joined.append(JoinedKeys.of(of_piece, prefix[0], own[0], biases, softcap))
            if (joined := self._joined[number]) is not None:
                out.append(joined.attend(of_piece, prefix, own, scaling))
            else:
                out.append(
                    shared_prefix_attention(of_piece, prefix, own, prefix_bias, own_bias, scaling, softcap)
                )
        whole = out[0] if len(out) == 1 else torch.cat(out)
        return whole if self._selected is None else whole[self._selected]

    @property
    def selected(self) -> Tensor | slice:
        """Grid indices of the next forward's tokens, those of opening rows last."""
        return slice(self.size) if self._selected is None else self._selected

    @property
    def is_side_by_side(self) -> bool:
        """Whether the prefixes of the rows lie in the cache in the rows' order, one behind the other."""
        return len(self._runs) == 1

    def _room_for(self, rows: int) -> int:
        if not self._is_steady or rows == 0:
            return rows
        too_large = rows <= _SHRINK_BELOW * self.room
        return 1 << (rows - 1).bit_length() if rows > self.room or too_large else self.room

    def reserve(self, multiple: int) -> None:
        """Make sure that the next token of every branch has a place, and a slot of the cache every row that
        the buffers have places for. Buffers of branches that must grow do so to a multiple of this many
        tokens."""
        self.cache.reserve(int(self.slots[0]) + self.room)
        needed = int(self.lengths.max(initial=0)) + 1
        if needed <= self._capacity:
            return
        self._capacity = -(-needed // multiple) * multiple
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                buffers[layer] = resized(buffer, (*buffer.shape[:3], self._capacity, buffer.shape[4]))

    def advance(self, width: int) -> None:
        """The forward over the next `width` tokens is done."""
        self.lengths[self._rows] += width
        self._start += width
        self._joined = []
        if self._opening is not None:
            self._opening.commit()
            self._opening = None
        if self._common_start is None or width > 1:
            self._settled = False
        else:  # all branches go on together: only the end moves
            self._end, self._common_start = self._end + 1, self._common_start + 1

    def block(self) -> KVBlock:
        """The keys and values where they lie: those of a row stay as they are until it is restarted."""
        block = KVBlock(list(self.keys), list(self.values))
        still_held = [reference for reference in self._handed_out if reference() is not None]
        self._handed_out = [*still_held, weakref.ref(block)]
        return block

    def copied(self, branches: np.ndarray) -> KVBlock:
        """A copy of the branches at these grid indices: rows of one branch each."""
        index, longest = torch.from_numpy(branches), int(self.lengths.max())
        keys, values = (
            [self._gather(buffer, index, longest).unsqueeze(2) for buffer in buffers]
            for buffers in (self.keys, self.values)
        )
        return KVBlock(keys, values)

    def _gather(self, buffer: Tensor, branches: Tensor, length: int) -> Tensor:
        """[n, Hkv, length, D] of the branches at these grid indices."""
        branches = branches.to(buffer.device)
        return buffer[branches // self.columns, :, branches % self.columns, :length]

    def _forget_prefixes(self) -> None:
        # Per layer: keys and values [rows, Hkv, L, D] of the prefixes, run by run; views unless there are too
        # many runs. Views outlive the cache's buffers when those are resized: these prefixes do not change
        # meanwhile.
        self._prefixes: list[list[tuple[Tensor, Tensor]]] = []
        self._copied_bytes = 0
        self._settled = False

    def _settle(self, query: Tensor) -> None:
        """Work out once what all layers of a forward, and often of many forwards, share.

        Where the new tokens are written, which of the own keys and of the prefix each row may see, and in
        which pieces the grid is attended to. A model calls `attend` once per layer and the token loop calls
        the model once per token: while all branches go on together, only the end of the own keys moves, and
        `advance` moves it without coming here again.
        """
        width, start, rows = query.shape[2], self._start, len(self.slots)
        self._joined = []
        self._end = start + width if len(self._rows) else 0
        self._common_start = start if self._even and self._selected is None else None
        if self._common_start is None:
            own_lengths = torch.from_numpy(self.lengths).to(query.device)[self._branch_rows]
            self._write_index = (self._branch_rows, self._branch_columns, own_lengths)
        own_bias: Tensor | None = None
        if width > 1:
            assert self._common_start is not None, "several tokens at once need branches of equal lengths"
            hidden = torch.arange(self._end) > torch.arange(start, self._end)[:, None]
            own_bias = _hide(hidden, query).expand(rows, 1, 1, 1, width, self._end)
        elif not self._even or self._opening is not None:
            visible = np.zeros(rows, dtype=np.int64)
            visible[self._rows] = self.lengths[self._rows] + 1
            own_bias = _hide(torch.arange(self._end) >= torch.from_numpy(visible)[:, None], query)
            own_bias = own_bias[:, None, None, None, None]
        if not self._prefixes:
            self._most_runs = _MOST_RUNS if width > 1 else 1
            self._longest, self._prefix_bias = int(self.prefix_lengths.max()), None
            if (self.prefix_lengths != self._longest).any():
                hidden = torch.arange(self._longest) >= torch.from_numpy(self.prefix_lengths)[:, None]
                self._prefix_bias = _hide(hidden, query)[:, None, None]
        first_rows = [row for row, _, _ in self._runs] if len(self._runs) <= self._most_runs else [0]
        self._pieces = [
            (
                slice(first, end),
                slice(first * self.columns, end * self.columns),
                None if self._prefix_bias is None else self._prefix_bias[first:end],
                None if own_bias is None else own_bias[first:end],
            )
            for first, end in zip(first_rows, [*first_rows[1:], rows], strict=True)
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
            shape = (self.room, new.shape[1], self.columns, self._capacity, new.shape[3])
            if layer == len(buffers):
                buffers.append(new.new_zeros(shape))
            elif self._end > buffers[layer].shape[3]:
                buffers[layer] = resized(buffers[layer], shape)
            if self._common_start is None:
                row, column, position = self._write_index
                buffers[layer][row, :, column, position] = new[:, :, 0]
            else:
                rows = len(self.slots)
                grid = new.reshape(rows, shape[2], shape[1], -1, shape[4]).transpose(1, 2)
                buffers[layer][:rows, ..., self._common_start : self._end, :] = grid

    def _prefixes_of(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        keys, values, longest = self.cache.keys[layer], self.cache.values[layer], self._longest
        if len(self._runs) > self._most_runs:
            index = torch.from_numpy(self.slots)
            copies = (keys[index, :, :longest], values[index, :, :longest])
            self._copied_bytes += sum(t.numel() * t.element_size() for t in copies)
            return [copies]
        runs = [slice(slot, slot + count) for _, slot, count in self._runs]
        return [(keys[run, :, :longest], values[run, :, :longest]) for run in runs]


def _hide(hidden: Tensor, query: Tensor) -> Tensor:
    """A bias of -inf where `hidden`, else 0, in the queries' dtype and on their device."""
    return (
        torch.zeros(hidden.shape, dtype=query.dtype).masked_fill(hidden.cpu(), float("-inf")).to(query.device)
    )


class SlotTable:
    """Gives out sequence numbers and knows each one's slot: those in use are always slots 0 .. len - 1."""

    def __init__(self) -> None:
        self._next = 0
        self._slot: dict[int, int] = {}
        self._sequence_at: list[int] = []

    def __len__(self) -> int:
        return len(self._sequence_at)

    def add(self, count: int) -> list[int]:
        """Numbers of `count` new sequences, at the slots behind those in use."""
        sequences = list(range(self._next, self._next + count))
        self._next += count
        for sequence in sequences:
            self._slot[sequence] = len(self._sequence_at)
            self._sequence_at.append(sequence)
        return sequences

    def drop(self, sequences: Sequence[int]) -> list[tuple[int, int]]:
        """Remove sequences; the last ones move into the holes. Returns the moves as (from slot, to slot)."""
        gone = {self._slot.pop(sequence) for sequence in sequences}
        left = len(self._sequence_at) - len(gone)
        holes = sorted(slot for slot in gone if slot < left)
        movers = [slot for slot in range(left, len(self._sequence_at)) if slot not in gone]
        moves = list(zip(movers, holes, strict=True))
        for source, target in moves:
            self._sequence_at[target] = self._sequence_at[source]
            self._slot[self._sequence_at[target]] = target
        del self._sequence_at[left:]
        return moves

    def slots(self, sequences: Sequence[int]) -> Slots:
        """Where these sequences lie."""
        return np.array([self._slot[sequence] for sequence in sequences], dtype=np.int64)

    def in_slot_order(self, sequences: Sequence[int]) -> np.ndarray:
        """The order of `sequences` sorted by slot: all sequences in use, however asked for, are then one
        slice of a cache."""
        return np.argsort(self.slots(sequences), kind="stable")


def split_by_size(sizes: Sequence[int], budget: int) -> Iterator[slice]:
    """Consecutive pieces of a padded batch, each with count * largest size within the budget (but at least
    one)."""
    first, widest = 0, 0
    for number, size in enumerate(sizes):
        wider = max(widest, size)
        if number > first and wider * (number + 1 - first) > budget:
            yield slice(first, number)
            first, wider = number, size
        widest = wider
    if first < len(sizes):
        yield slice(first, len(sizes))


def pad_right(token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, np.ndarray]:
    """Right-padded ids [n, longest] and the counts [n]."""
    counts = np.array([len(ids) for ids in token_ids], dtype=np.int64)
    batch = torch.zeros(len(token_ids), int(counts.max()), dtype=torch.long)
    for number, ids in enumerate(token_ids):
        batch[number, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return batch, counts
