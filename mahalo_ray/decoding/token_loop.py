"""The token loop: all branches in flight, one token per forward, with almost no Python per token.

The words (sequence, branch, slot, grid) are explained in engine.py.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mahalo_ray.decoding.candidates import Candidates, SampleRequest
from mahalo_ray.decoding.kv_cache import (
    NO_ROWS,
    Branches,
    BranchRef,
    KVBlock,
    RaggedCache,
    SlotTable,
    resized,
)
from mahalo_ray.decoding.policy import HeadMix, LogitFunction, Policy, StateFunction
from mahalo_ray.decoding.sampling import (
    SamplingBatch,
    SamplingParams,
    draw,
    draw_keys,
    penalised,
    uniforms,
)
from mahalo_ray.decoding.step_graph import StepGraphs
from mahalo_ray.decoding.stopping import StopReason, StopRule, TextStop, TokenTexts

REASONS = tuple(StopReason)
CODE = {reason: code for code, reason in enumerate(REASONS)}

_COMPACT_BELOW = 0.5  # lay the grid out again when at most this share of it is alive
_WORTHWHILE = 0.75  # and the new grid has at most this share of the old one's places
_SPREAD = 1.25  # a prefix may be copied to stand in several rows, while rows grow by at most this factor


class RequestTable:
    """The settings of the requests in flight as tensors, one row per request."""

    def __init__(self, policy: Policy, texts: TokenTexts | None) -> None:
        self._policy, self._texts = policy, texts
        self._requests: list[SampleRequest] = []
        self._settings: list[tuple[HeadMix, SamplingParams, Hashable]] = []
        self.stop: TextStop | None = None
        self.triggers: Tensor | None = None  # [V], tokens after which the text must be read
        self.params: SamplingBatch
        self.head: LogitFunction
        self.read: StateFunction
        self.max_tokens: Tensor  # per row, as the next two
        self.lengths: Tensor
        self.limit_codes: list[int]  # per row: why a branch ends with its max_tokens-th token
        self.min_tokens: Tensor | None = None  # per row; None: no row has any, as with the next two
        self.penalties: Tensor | None = None
        self.occurred: Tensor | None = None  # [rows, V]

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, row: int) -> SampleRequest:
        return self._requests[row]

    @property
    def columns(self) -> int:
        """Candidates of the request that has most."""
        return max((request.num_candidates for request in self._requests), default=1)

    def slots(self, table: SlotTable) -> np.ndarray:
        """Where the requests' sequences lie now."""
        return table.slots([request.sequence for request in self._requests])

    def rows_of(self, sequences: Collection[int]) -> np.ndarray:
        """The rows of these sequences."""
        row_of = {request.sequence: row for row, request in enumerate(self._requests)}
        return np.array([row_of[sequence] for sequence in sequences], dtype=np.int64)

    def replace(
        self, joining: Mapping[int, SampleRequest], leaving: Collection[int], table: SlotTable
    ) -> np.ndarray:
        """Let requests leave and join, rows in the order of their sequences' slots. A sequence that is there
        already begins its next request. Returns which row each row was, -1 for a new one."""
        staying = [row for row, request in enumerate(self._requests) if request.sequence not in leaving]
        requests = [joining.get(self._requests[row].sequence, self._requests[row]) for row in staying]
        known = {request.sequence for request in requests}
        requests += [request for sequence, request in joining.items() if sequence not in known]
        source = np.array(staying + [-1] * (len(requests) - len(staying)), dtype=np.int64)
        order = np.argsort(table.slots([request.sequence for request in requests]))
        self._requests = [requests[number] for number in order]
        self._tabulate()
        return source[order]

    def _tabulate(self) -> None:
        device, requests = self._policy.device, self._requests
        self.max_tokens = torch.tensor([request.max_tokens for request in requests], device=device)
        self.lengths = torch.tensor([request.length for request in requests], device=device)
        self.limit_codes = [
            CODE[StopReason.CONTEXT if r.fills_context else StopReason.LENGTH] for r in requests
        ]
        self._tabulate_limits()
        rules: Sequence[StopRule | None] = [request.rule for request in requests]
        self.stop = None if self._texts is None else TextStop(self._texts, rules)
        settings: list[tuple[HeadMix, SamplingParams, Hashable]]
        settings = [(r.mix, r.params, None if r.rule is None else r.rule.key) for r in requests]
        if settings == self._settings or not requests:
            return  # the usual case: the next step of the same requests
        self._settings = settings
        mixes = [request.mix for request in requests]
        self.head, self.read = self._policy.head(mixes), self._policy.reader(mixes)
        self.params = SamplingBatch.of([request.params for request in requests], device)
        if self.stop is not None:
            self.triggers = self.stop.trigger_table(self._policy.vocab_size).to(device)

    def _tabulate_limits(self) -> None:
        device, limits = self._policy.device, [request.limits for request in self._requests]
        self.min_tokens = self.penalties = self.occurred = None
        if any(each.min_tokens for each in limits):
            self.min_tokens = torch.tensor([each.min_tokens for each in limits], device=device)
        if any(each.repetition_penalty != 1 for each in limits):
            self.penalties = torch.tensor([each.repetition_penalty for each in limits], device=device)
            self.occurred = torch.zeros(len(limits), self._policy.vocab_size, dtype=torch.bool, device=device)
            for row, request in enumerate(self._requests):
                self.occurred[row, torch.tensor(request.occurred, dtype=torch.long, device=device)] = True


class SampleBuffers:
    """What every branch has drawn: tokens [N * K, T], their log-probs, uniform numbers [N * K, T] to draw
    with, how many tokens each branch ended with and why. A branch is row * K + column of the requests."""

    def __init__(self, device: torch.device, with_logps: bool) -> None:
        self.columns, self.length = 0, 0
        self.tokens = torch.zeros(0, 0, dtype=torch.long, device=device)
        self.uniforms = torch.zeros(0, 0, dtype=torch.float64, device=device)
        self.logps = torch.zeros(0, 0, device=device) if with_logps else None
        self.counts = torch.zeros(0, dtype=torch.long, device=device)
        self.reasons = torch.zeros(0, dtype=torch.long, device=device)

    def regrid(self, source: np.ndarray, columns: int) -> None:
        """Row i was row source[i] (-1: a new one), in a grid with another number of columns."""
        is_old = source >= 0
        common = np.arange(min(columns, self.columns))
        new = (np.flatnonzero(is_old)[:, None] * columns + common).reshape(-1)
        old = (source[is_old][:, None] * self.columns + common).reshape(-1)
        self.columns = columns
        if len(source) == 0:
            self.length = 0  # nobody is left: the next requests may be shorter
        moves = (torch.from_numpy(new), torch.from_numpy(old), len(source) * columns)
        self.tokens, self.uniforms = self._moved(self.tokens, *moves), self._moved(self.uniforms, *moves)
        self.counts, self.reasons = self._moved(self.counts, *moves), self._moved(self.reasons, *moves)
        if self.logps is not None:
            self.logps = self._moved(self.logps, *moves)

    def start(self, rows: np.ndarray, requests: Sequence[SampleRequest]) -> None:
        """Random numbers for all tokens of these rows' requests. All at once: hashing is many small
        operations."""
        length = max(request.max_tokens for request in requests)
        if length > self.length:
            self.length, shape = length, (len(self.tokens), length)
            self.tokens, self.uniforms = resized(self.tokens, shape), resized(self.uniforms, shape)
            if self.logps is not None:
                self.logps = resized(self.logps, shape)
        device = self.tokens.device
        keys = draw_keys(
            [request.seed for request in requests],
            self.columns,
            device,
            [request.step for request in requests],
        )  # [rows, K]
        first = torch.tensor([request.length for request in requests], device=device)
        numbers = uniforms(keys[..., None], first[:, None, None] + torch.arange(length, device=device))
        self.uniforms.view(-1, self.columns, self.length)[torch.from_numpy(rows), :, :length] = numbers

    def write(self, branches: Tensor, positions: Tensor, tokens: Tensor, logps: Tensor | None) -> None:
        """The tokens [n] drawn for these branches at these positions of their own."""
        self.tokens[branches, positions] = tokens
        if self.logps is not None and logps is not None:
            self.logps[branches, positions] = logps

    def end(self, branches: Tensor, counts: Tensor, reasons: Tensor) -> None:
        """These branches have ended with so many tokens, for these reasons (codes)."""
        self.counts[branches], self.reasons[branches] = counts, reasons

    def lists(
        self, rows: np.ndarray, num_candidates: Sequence[int]
    ) -> tuple[list[list[list[int]]], list[list[StopReason]], list[list[list[float]]] | None]:
        """Tokens, reasons and log-probs of the first num_candidates[i] branches of every row."""
        index = torch.from_numpy(rows)
        counts = self.counts.view(-1, self.columns)[index]
        longest = int(counts.max())

        def cut(table: Tensor) -> list[list[list]]:
            grid = table.view(-1, self.columns, self.length)[index, :, :longest].tolist()
            return [
                [values[:n] for values, n in zip(row[:k], row_counts, strict=False)]
                for row, row_counts, k in zip(grid, counts.tolist(), num_candidates, strict=True)
            ]

        codes = self.reasons.view(-1, self.columns)[index].tolist()
        reasons = [[REASONS[c] for c in row[:k]] for row, k in zip(codes, num_candidates, strict=True)]
        return cut(self.tokens), reasons, None if self.logps is None else cut(self.logps)

    def _moved(self, table: Tensor, new: Tensor, old: Tensor, size: int) -> Tensor:
        if size == 0:
            return table.new_zeros((0, self.length) if table.dim() == 2 else 0)
        moved = table.new_zeros(size, *table.shape[1:])
        moved[new] = table[old]
        return moved


class BranchDecoder:
    """Decodes requests token by token; requests may start, and sequences leave, between any two tokens.

    A request is a row of a grid [N, K], its candidates are branches row * K + column. Only branches that
    still decode go through the model's layers; its attention alone works on the whole grid. A row whose
    branches have ended keeps them until its sequence starts its next request or leaves.

    The cache and the slot table are the engine's. It says so (`slots_moved`) when sequences have moved.
    """

    _others_join = True

    def __init__(
        self,
        policy: Policy,
        cache: RaggedCache,
        slot_table: SlotTable,
        stop_ids: Collection[int],
        texts: TokenTexts | None,
        with_logps: bool = False,
    ) -> None:
        """`texts` reads what the requests' rules need; None if they have none."""
        self.policy, self.device, self._slot_table = policy, policy.device, slot_table
        is_steady = policy.recorder is not None and self._others_join
        self.grid = Branches(cache, np.zeros(0, dtype=np.int64), 1, is_steady)
        self._buffers = SampleBuffers(self.device, with_logps)
        self._requests = RequestTable(policy, texts)
        self._stop_table = torch.zeros(policy.vocab_size, dtype=torch.bool, device=self.device)
        self._stop_table[torch.tensor(sorted(stop_ids), dtype=torch.long, device=self.device)] = True
        self._graphs = None if policy.recorder is None else StepGraphs(policy.recorder)
        self.tokens_forwarded = 0
        self.read: list[tuple[int, Tensor]] = []  # sequences whose last token the last step read, states [D]
        self._joining: dict[int, SampleRequest] = {}
        self._leaving: set[int] = set()
        self._without_room: dict[int, SampleRequest] = {}  # their candidates are empty
        self._unreported: list[int] = []
        self._moved = False
        self._sampled = torch.zeros(0, dtype=torch.long, device=self.device)  # last tokens, not yet read
        # Branches that decode, in ascending order, and where they lie in the grid: at the index of the same
        # number, unless the grid was compacted.
        self._live = self._live_index = self._sampled
        self._row = self._sampled  # the request of each of them
        self._live_rows, self._is_new = NO_ROWS, True

    @property
    def is_busy(self) -> bool:
        """Whether any branch is still to be decoded."""
        return bool(len(self._live) or self._joining or self._unreported)

    @property
    def nbytes(self) -> int:
        """Bytes of the branches' keys and values, those of finished branches included."""
        return self.grid.nbytes

    def start(self, requests: Sequence[SampleRequest]) -> None:
        """Decode these from the next token on; a sequence's earlier request is forgotten."""
        for request in requests:
            if request.max_tokens > 0:
                self._joining[request.sequence] = request
            else:
                self._without_room[request.sequence] = request
                self._unreported.append(request.sequence)

    def abort(self, sequences: Collection[int]) -> None:
        """Forget the requests of these sequences, finished or not. The memory of the last ones is freed."""
        self._leaving.update(sequences)
        self._unreported = [sequence for sequence in self._unreported if sequence not in self._leaving]
        for sequence in sequences:
            self._joining.pop(sequence, None)
            self._without_room.pop(sequence, None)
        if not self._joining and all(
            self._requests[row].sequence in self._leaving for row in range(len(self._requests))
        ):
            self._arrange()

    def slots_moved(self) -> None:
        """Sequences lie at other slots now."""
        self._moved = True

    @torch.no_grad()
    def step(self) -> list[int]:
        """One more token of every branch. Returns the sequences whose branches have now all ended."""
        done, self._unreported, self.read = self._unreported, [], []
        started = self._arrange()
        if len(self._live) or len(started):
            done += self._end_branches(self._draw(self._forward(started)))
        return done

    def collect(self, sequences: Sequence[int]) -> Candidates:
        """The candidates of finished sequences. Their keys and values stay where they are, good until the
        sequence starts its next request."""
        empty = [self._without_room.pop(s) for s in sequences if s in self._without_room]
        with_logps = self._buffers.logps is not None
        parts = [Candidates.empty(request, with_logps) for request in empty]
        known = {request.sequence for request in empty}
        rows = self._requests.rows_of([s for s in sequences if s not in known])
        if len(rows):
            block, columns = self.grid.block(), self._buffers.columns
            requests = [self._requests[row] for row in rows]
            branches = [
                range(row * columns, row * columns + request.num_candidates)
                for row, request in zip(rows.tolist(), requests, strict=True)
            ]
            parts.append(
                Candidates(
                    [request.sequence for request in requests],
                    *self._buffers.lists(rows, [request.num_candidates for request in requests]),
                    [request.length for request in requests],
                    [[self._ref(block, branch) for branch in of_request] for of_request in branches],
                )
            )
        return Candidates.join(parts, sequences)

    def last_drawn(self, sequences: Sequence[int]) -> list[int]:
        """The newest token of each of these sequences, which have one branch each that has not ended."""
        number_of = {row: number for number, row in enumerate(self._rows.tolist())}
        numbers = [number_of[row] for row in self._requests.rows_of(sequences).tolist()]
        newest: list[int] = self._sampled[torch.tensor(numbers, device=self.device)].tolist()
        return newest

    def _arrange(self) -> np.ndarray:
        """Lay the rows out for the requests that join and leave, in the order of their sequences' slots: the
        prefixes of all sequences then lie side by side. Returns the rows that start."""
        if not self._joining and not self._leaving and not self._moved:
            return NO_ROWS
        self._moved = False
        source = self._requests.replace(self._joining, self._leaving, self._slot_table)
        self._regrid(source, self._requests.slots(self._slot_table))
        started = self._requests.rows_of(list(self._joining))
        self._joining, self._leaving = {}, set()
        if len(started):
            requests = [self._requests[row] for row in started]
            self.grid.restart(started, np.array([request.length for request in requests]))
            self._buffers.start(started, requests)
        self._set_live(self._live)
        return started

    def _regrid(self, source: np.ndarray, slots: np.ndarray) -> None:
        """Lay the grid out again: its row i is the old row source[i] (-1: a new one).

        A branch is known by row * K + column in three places: the tokens drawn so far, the keys and values in
        the grid, and the list of live branches. When rows come, go or change places, or K changes, all three
        are renumbered alike: the first two by copying, the third by looking the old numbers up in a table of
        the new ones, where -1 says that the branch is gone.
        """
        rows, columns = len(self.grid.slots), self._requests.columns
        old_columns = self.grid.columns
        if columns == old_columns and np.array_equal(source, np.arange(rows)):
            self.grid.move(slots)
            return
        column = np.arange(columns)
        is_old = (source[:, None] >= 0) & (column < old_columns)
        source_branches = np.where(is_old, source[:, None] * old_columns + column, -1)
        self.grid.regrid(source, source_branches, slots)
        self._buffers.regrid(source, columns)
        renumbered = np.full(rows * old_columns + 1, -1)  # the last entry collects the -1 of new branches
        renumbered[source_branches] = np.arange(source_branches.size).reshape(source_branches.shape)
        live = torch.from_numpy(renumbered[:-1]).to(self.device)[self._live]
        order = live.argsort()[int((live < 0).sum()) :]
        self._sampled, self._live = self._sampled[order], live[order]

    def _set_live(self, live: Tensor) -> None:
        """These branches decode now, in ascending order: prepare what the token loop needs of each."""
        self._live, self._live_index = live, self._index_of(live)
        self._live_rows, self._is_new = NO_ROWS, True
        self._row = live // max(self._buffers.columns, 1)
        if len(live):
            grid_row = self._live_index // self.grid.columns
            # Rows of the grid and of the requests, for what the host decides.
            self._grid_rows, self._rows = torch.stack([grid_row, self._row]).cpu().numpy()
            self._live_rows = np.unique(self._grid_rows)
            # As many tokens drawn as the model has read since the request started.
            self._count = torch.from_numpy(self.grid.lengths).to(self.device)[grid_row]
            self._max_tokens = self._requests.max_tokens[self._row]
            self._lengths = self._requests.lengths[self._row]
            self._params = self._requests.params.take(self._row)

    def _index_of(self, branches: Tensor) -> Tensor:
        """The grid indices of branches: their own numbers, here."""
        return branches

    def _ref(self, block: KVBlock, branch: int) -> BranchRef:
        """Where a branch's keys and values lie, if the grid's are `block`."""
        return BranchRef(block, branch // self.grid.columns, branch % self.grid.columns)

    def _forward(self, started: np.ndarray) -> Tensor:
        """Hidden states [branches, D] that the next tokens are drawn from: one forward over the branches'
        last tokens and over those with which requests start. Branches of started rows become live."""
        if len(started) == 0:
            return self._read(started)
        is_unread = np.array([isinstance(self._requests[row].last, int) for row in started])
        opening, ready = started[is_unread], started[~is_unread]
        count = len(self._live)
        states = [self._read(opening)] if count or len(opening) else []
        known = [self._requests[row].last for row in ready]
        states += [torch.stack([last for last in known if isinstance(last, Tensor)])] if known else []
        rows = [*opening.tolist(), *ready.tolist()]
        num_candidates = [self._requests[row].num_candidates for row in rows]
        columns = self.grid.columns
        new = [row * columns + k for row, n in zip(rows, num_candidates, strict=True) for k in range(n)]
        live = torch.cat([self._live, torch.tensor(new, device=self.device)])
        # A started row has one state, from which all its candidates draw their first token; a live branch has
        # its own. Branches are then sorted by number, the order in which the grid expects its tokens.
        repeats = torch.tensor([1] * count + num_candidates, device=self.device)
        order = live.argsort()
        hidden = torch.cat(states).repeat_interleave(repeats, dim=0)[order]
        self._set_live(live[order])
        return hidden

    def _read(self, opening: np.ndarray) -> Tensor:
        """Hidden states [branches + opening rows, D] behind the tokens that the model has not read."""
        count, requests = len(self._live), [self._requests[row] for row in opening]
        ids, positions = self._sampled, self._lengths + self._count if count else self._sampled
        if requests:
            ids = torch.cat([ids, torch.tensor([request.last for request in requests], device=self.device)])
            ends = torch.tensor([request.length - 1 for request in requests], device=self.device)
            positions = torch.cat([positions, ends])
        is_new = bool(requests) or self._is_new
        if is_new:
            self.grid.select(self._live_index, self._live_rows, opening)
            self._is_new = bool(requests)
        rows = torch.cat([self._row, torch.from_numpy(opening).to(self.device)]) if requests else self._row
        hidden = None
        if self._graphs is not None:
            of_grid = self._live_rows, opening
            hidden = self._graphs.read(self._requests.read, ids, self.grid, of_grid, is_new)
        if hidden is None:
            hidden = self._requests.read(ids[:, None], positions[:, None], self.grid, rows)[:, 0]
        self.grid.advance(1)
        if count:
            self._count = self._count + 1
        self.tokens_forwarded += len(ids)
        if requests:
            states = hidden[count:]
            self.read = [(request.sequence, state) for request, state in zip(requests, states, strict=True)]
        return hidden

    def _draw(self, hidden: Tensor) -> Tensor:
        """A token for every branch [branches], written into the buffers."""
        uniform = self._buffers.uniforms[self._live, self._count]
        logits = self._limited(self._requests.head(hidden, self._row))
        tokens, logps = draw(logits, self._params, uniform, self._buffers.logps is not None)
        self._buffers.write(self._live, self._count, tokens, logps)
        return tokens

    def _limited(self, logits: Tensor) -> Tensor:
        """The logits [branches, V] as the requests' `DrawLimits` leave them."""
        table = self._requests
        if table.penalties is not None and table.occurred is not None:
            longest = max(int(self.grid.lengths.max()), 1)  # known to the host: nothing waits for the device
            drawn = self._buffers.tokens[self._live, :longest]
            places = torch.arange(drawn.shape[1], device=self.device)
            # What was not drawn yet is marked in a column of its own, which is cut off.
            marked = drawn.masked_fill(places >= self._count[:, None], logits.shape[1])
            occurred = F.pad(table.occurred[self._row], (0, 1)).scatter_(1, marked, True)[:, :-1]
            logits = penalised(logits.float(), occurred, table.penalties[self._row][:, None])
        if table.min_tokens is not None:
            early = self._count < table.min_tokens[self._row]
            logits = logits.masked_fill(early[:, None] & self._stop_table, float("-inf"))
        return logits

    def _end_branches(self, sampled: Tensor) -> list[int]:
        """Take out the branches that end with the token just drawn. Returns the sequences without any left.

        The host waits for the device once per token, to learn which branches end or must be read, and once
        more for the texts of those.
        """
        stopped = self._stop_table[sampled]
        flags = [stopped, self._max_tokens <= self._count + 1]
        if self._requests.triggers is not None:
            flags.append(self._requests.triggers[sampled] & ~stopped)
        is_stopped, is_full, *is_suspect = torch.stack(flags).tolist()
        self._sampled = sampled
        suspects = [branch for branch, flag in enumerate(is_suspect[0]) if flag] if is_suspect else []
        codes = self._read_texts(suspects) if suspects else {}
        for branch in range(len(is_stopped)):
            if is_stopped[branch]:
                codes[branch] = CODE[StopReason.TOKEN]
            elif is_full[branch]:
                codes.setdefault(branch, self._requests.limit_codes[self._rows[branch]])
        if not codes:
            return []
        gone, left = sorted(codes), [branch for branch in range(len(is_stopped)) if branch not in codes]
        ended, going_on = (
            torch.tensor(which, dtype=torch.long, device=self.device) for which in (gone, left)
        )
        reasons = torch.tensor([codes[branch] for branch in gone], device=self.device)
        self._buffers.end(self._live[ended], self._count[ended] + 1, reasons)
        finished = sorted({*self._rows[gone].tolist()} - {*self._rows[left].tolist()})
        self._sampled = sampled[going_on]
        self._set_live(self._live[going_on])
        return [self._requests[row].sequence for row in finished]

    def _read_texts(self, which: Sequence[int]) -> dict[int, int]:
        """Why (codes) these of the live branches end with their text, those that do. Only branches whose last
        token can end a step or a stop string come here."""
        assert self._requests.stop is not None
        counts = (self.grid.lengths[self._grid_rows[which]] + 1).tolist()
        branches = self._live[torch.tensor(which, device=self.device)]
        tokens = self._buffers.tokens[branches, : max(counts)].tolist()
        verdicts = self._requests.stop.verdicts(
            self._rows[which].tolist(), [ids[:n] for ids, n in zip(tokens, counts, strict=True)]
        )
        return {
            branch: CODE[verdict]
            for branch, verdict in zip(which, verdicts, strict=True)
            if verdict is not None
        }


class CompactingDecoder(BranchDecoder):
    """Decodes requests to their ends. No others join, so the grid can shrink: when most of its branches have
    ended, their keys and values are put aside and the live ones are laid out in a smaller grid."""

    _others_join = False

    def run(self, requests: Sequence[SampleRequest]) -> Candidates:
        """The candidates of these requests' sequences."""
        self._aside: dict[int, BranchRef] = {}  # by branch
        self._aside_bytes = 0
        # The branch at every grid index, -1 for none, and the other way round. None: all are where they
        # began.
        self._branch_at: np.ndarray | None = None
        self._index: Tensor | None = None
        self.start(requests)
        while self.is_busy:
            self.step()
        return self.collect([request.sequence for request in requests])

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._aside_bytes

    def _forward(self, started: np.ndarray) -> Tensor:
        if 0 < len(self._live) <= _COMPACT_BELOW * self.grid.size:
            self._compact(self.grid.size)
        return super()._forward(started)

    def _compact(self, size: int) -> None:
        """Lay the live branches out in the smallest grid."""
        # Attention works on whole grids, so ended branches cost as much as live ones. Their keys and values
        # are copied aside first, since a candidate that has ended may be the one accepted. From then on a
        # branch's number and its grid index differ: buffers keep the number, the grid has the index, and
        # `_index` and `_branch_at` translate. A grid that would shrink by less than a quarter is not worth
        # the copy.
        alive = np.zeros(size, dtype=bool)
        alive[self._live_index.cpu().numpy()] = True
        source_rows, source = smallest_grid(alive, self.grid.columns, len(self._requests))
        if source.size > _WORTHWHILE * size:
            return
        branch_at = np.arange(size) if self._branch_at is None else self._branch_at
        ended = np.flatnonzero(~alive & (branch_at >= 0))
        block = self.grid.copied(ended)
        self._aside.update(
            {int(branch): BranchRef(block, row, 0) for row, branch in enumerate(branch_at[ended])}
        )
        self._aside_bytes += block.nbytes
        self._branch_at = np.where(source >= 0, branch_at[np.maximum(source, 0)], -1).reshape(-1)
        occupied = np.flatnonzero(self._branch_at >= 0)
        index = np.zeros(len(self._requests) * self._buffers.columns, dtype=np.int64)
        index[self._branch_at[occupied]] = occupied
        self._index = torch.from_numpy(index).to(self.device)
        self.grid.regrid(source_rows, source, self.grid.slots[source_rows])
        self._set_live(self._live)

    def _index_of(self, branches: Tensor) -> Tensor:
        return branches if self._index is None else self._index[branches]

    def _ref(self, block: KVBlock, branch: int) -> BranchRef:
        if branch in self._aside:
            return self._aside[branch]
        index = branch if self._index is None else int(self._index[branch])
        return BranchRef(block, index // self.grid.columns, index % self.grid.columns)


def smallest_grid(alive: np.ndarray, columns: int, num_requests: int) -> tuple[np.ndarray, np.ndarray]:
    """The live places of a grid laid out again in as few places as possible.

    alive [N * K]. Returns rows [N'], the old row of each new one, and grid [N', K'] of old grid indices, -1
    for padding. A row with more live branches than K' is laid out several times, at the price of a copy of
    its prefix; rows in all stay within 1.25 times the requests, so that memory for prefixes is bounded too.
    """
    # Attention costs rows * columns, and branches end unevenly: one request may have five left, the others
    # one. A grid as wide as the fullest row is then mostly padding, one of a single column copies a prefix
    # five times. So every width is tried and the one with the fewest places taken; the widths are few, and
    # only counts are needed: a row with c live branches needs ceil(c / width) rows.
    old = np.nonzero(alive)[0]
    live_per_row = np.bincount(old // columns, minlength=len(alive) // columns)
    best, best_size = 0, 0
    for width in range(1, int(live_per_row.max()) + 1):
        num_rows = int(np.ceil(live_per_row / width).sum())
        if num_rows <= _SPREAD * num_requests and (best == 0 or num_rows * width < best_size):
            best, best_size = width, num_rows * width
    rows = np.repeat(np.arange(len(live_per_row)), np.ceil(live_per_row / best).astype(np.int64))
    grid = np.full((len(rows), best), -1, dtype=np.int64)
    # The rank of every live place among its row's live places says its row and column in the new grid.
    first_live = np.concatenate([[0], np.cumsum(live_per_row)[:-1]])
    rank = np.arange(len(old)) - first_live[old // columns]
    first_row = np.searchsorted(rows, np.arange(len(live_per_row)))
    grid[first_row[old // columns] + rank // best, rank % best] = old
    return rows, grid
