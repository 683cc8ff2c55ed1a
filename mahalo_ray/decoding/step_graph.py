"""The forward of one token, recorded once and repeated, for cards that wait for the token loop's calls.

A token of a small model is a thousand short kernels, and starting one takes the host longer than the card
needs to run it. A CUDA graph starts them all at once: it repeats the same kernels, on the same addresses,
with the same shapes. So a recorded forward runs over every place of the grid, whether or not a branch there
still decodes, and over keys up to the ends of their buffers, and what changes from token to token stands in
tensors that stay where they are. Drawing tokens, and learning which branches end, stay outside.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mahalo_ray.decoding.branch_attention import JoinedKeys, shared_prefix_attention
from mahalo_ray.decoding.kv_cache import Branches
from mahalo_ray.models.attention import View

Reader = Callable[[Tensor, Tensor, View, Tensor], Tensor]  # a `StateFunction` (policy.py)

# Buffers grow by so many tokens at least, those of prefixes and those of branches, whose steps are hardly
# longer: every new buffer is a new recording.
PREFIX_TOKENS = 256
_OWN_TOKENS = 64


class Recorder(Protocol):
    """How a computation is recorded: a CUDA graph, or whatever repeats operations on the same tensors."""

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A function that does again, each time it is called, what `compute` does to the tensors it reads and
        writes, and gives the same tensor each time, with new values. `compute` may run while it is recorded,
        any number of times."""
        ...


def record_cuda_graph(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A `Recorder` for CUDA. RuntimeError, saying what to do, for a computation that waits for the card."""
    # A first run on a stream of its own lets libraries allocate what they allocate once.
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        compute()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    try:
        # Another thread (another model of a replica) may use the card meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = compute()
    except RuntimeError as error:
        raise RuntimeError(
            f"this model's forward cannot be recorded as a CUDA graph ({error}): set cluster.cuda_graphs to "
            "false"
        ) from error

    def repeat() -> Tensor:
        graph.replay()
        return result

    return repeat


class FixedGrid:
    """View (models/attention.py) of a forward over one token of every place of a grid, for recording.

    A row is an opening one while its first branch reads a token of the prefix (see `Branches.select`). Places
    that do not decode compute as well: a branch that has ended writes behind its own tokens, and the prefix
    of a row that does not open keeps what it has.
    """

    def __init__(self, grid: Branches, device: torch.device) -> None:
        rows, columns = grid.room, grid.columns
        self._grid, self._columns = grid, columns
        self._slots = slice(int(grid.slots[0]), int(grid.slots[0]) + rows)
        self.ids = torch.zeros(rows * columns, dtype=torch.long, device=device)
        self.rows = torch.arange(rows, device=device).repeat_interleave(columns)  # of every place
        self._column = torch.arange(columns, device=device).repeat(rows)
        self._all_rows = torch.arange(rows, device=device)
        # Tokens of every row's branches and of its prefix, and whether it decodes and opens, as numbers.
        self._state = torch.zeros(4, rows, dtype=torch.long, device=device)
        self._own_lengths, self._prefix_lengths, self._lives, self._opens = self._state

    def update(self, live_rows: np.ndarray, opening_rows: np.ndarray) -> None:
        """Other rows decode or open now, or are other ones."""
        state, count = np.zeros(tuple(self._state.shape), dtype=np.int64), len(self._grid.slots)
        state[0, :count], state[1, :count] = self._grid.lengths, self._grid.prefix_lengths
        state[2, live_rows], state[3, opening_rows] = 1, 1
        self._state.copy_(torch.from_numpy(state))

    def advance(self) -> None:
        """The rows that decode have one more token each."""
        self._own_lengths += self._lives

    def begin(self, with_opening: bool) -> Tensor:
        """Prepare what all layers of a forward share; position ids [N * K]. Without `with_opening` no row may
        open."""
        self._with_opening = with_opening
        self._biases: tuple[Tensor, Tensor] | None = None
        self._own_ends = self._own_lengths[self.rows]
        self._prefix_ends = (self._prefix_lengths - 1).clamp(min=0)
        return (self._prefix_lengths + self._own_lengths - self._opens)[self.rows]

    @property
    def context(self) -> int:
        return self._grid.context

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        grid, cache = self._grid, self._grid.cache
        own = grid.keys[layer], grid.values[layer]
        prefix = cache.keys[layer][self._slots], cache.values[layer][self._slots]
        for to_own, to_prefix, new in zip(own, prefix, (key, value), strict=True):
            to_own[self.rows, :, self._column, self._own_ends] = new[:, :, 0]
            if self._with_opening:
                there = to_prefix[self._all_rows, :, self._prefix_ends]
                read = torch.where(self._opens[:, None, None] > 0, new[:: self._columns, :, 0], there)
                to_prefix[self._all_rows, :, self._prefix_ends] = read
        if self._biases is None:  # the first layer
            self._biases = self._hide(query, prefix[0].shape[2], own[0].shape[3])
            self._joined = JoinedKeys.of(query, prefix[0], own[0], self._biases, softcap)
        if self._joined is not None:
            return self._joined.attend(query, prefix, own, scaling)
        return shared_prefix_attention(query, prefix, own, *self._biases, scaling, softcap)

    def _hide(self, query: Tensor, prefix_room: int, own_room: int) -> tuple[Tensor, Tensor]:
        """Biases as `shared_prefix_attention` takes them: -inf behind the ends of prefixes and branches."""
        # The token of an opening row stands in the prefix already, and its branches have none of their own.
        visible = self._own_lengths + 1 - self._opens
        biases = []
        for room, lengths in ((prefix_room, self._prefix_lengths), (own_room, visible)):
            hidden = torch.arange(room, device=query.device) >= lengths[:, None]
            biases.append(torch.zeros_like(hidden, dtype=query.dtype).masked_fill_(hidden, float("-inf")))
        return biases[0][:, None, None], biases[1][:, None, None, None, None]


class StepGraphs:
    """The recorded forwards of a token loop over the grid as it lies now: one for tokens of branches alone,
    one in which requests open as well. When the grid or the cache lies elsewhere they are forgotten, and
    recorded anew once a forward has been run as usual. For policies whose states do not depend on weights."""

    def __init__(self, recorder: Recorder) -> None:
        self._record = recorder
        self._forget()

    def _forget(self) -> None:
        self._fixed: FixedGrid | None = None
        self._repeats: dict[bool, Callable[[], Tensor]] = {}
        # What they were recorded on: where the first prefix lies, and the buffers, weakly: one that was
        # replaced is not kept for the sake of what was recorded on it.
        self._first_slot = -1
        self._buffers: list[weakref.ref[Tensor]] = []

    def read(
        self, read: Reader, ids: Tensor, grid: Branches, rows: tuple[np.ndarray, np.ndarray], is_new: bool
    ) -> Tensor | None:
        """Hidden states [n, D] behind the tokens that `grid` has selected, ids [n]; None where this forward
        must be run as usual. `rows`: those that decode and those that open; `is_new`: they were selected just
        now. `grid.advance` is left to the caller."""
        grid.reserve(_OWN_TOKENS)
        if not self._is_known(grid):
            return None
        if self._fixed is None:
            self._fixed, is_new = FixedGrid(grid, ids.device), True
        fixed, opens = self._fixed, len(rows[1]) > 0
        if is_new:
            fixed.update(*rows)
        fixed.ids[grid.selected] = ids
        if opens not in self._repeats:
            self._repeats[opens] = self._record(lambda: _forward(read, fixed, opens))
        states = self._repeats[opens]()[grid.selected]
        fixed.advance()
        return states

    def _is_known(self, grid: Branches) -> bool:
        """Whether the last forward was over these buffers. If not, the next one will have been."""
        if not (grid.is_side_by_side and grid.keys and grid.cache.keys):
            self._forget()
            return False
        buffers = grid.keys[0], grid.values[0], grid.cache.keys[0], grid.cache.values[0]
        known = zip(self._buffers, buffers, strict=False)
        is_known = self._first_slot == int(grid.slots[0])
        if is_known and all(reference() is buffer for reference, buffer in known):
            return True
        self._forget()
        self._first_slot = int(grid.slots[0])
        self._buffers = [weakref.ref(buffer) for buffer in buffers]
        return False


def _forward(read: Reader, fixed: FixedGrid, opens: bool) -> Tensor:
    positions = fixed.begin(opens)
    return read(fixed.ids[:, None], positions[:, None], fixed, fixed.rows)[:, 0]
