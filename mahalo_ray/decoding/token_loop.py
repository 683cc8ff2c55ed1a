"""The token loop: all branches in flight, one token per forward, with almost no Python per token."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mahalo_ray.decoding.kv_cache import (
    NO_LINES,
    Branches,
    BranchRef,
    KVBlock,
    RaggedCache,
    RowTable,
    resized,
)
from mahalo_ray.decoding.policy import LogitFunction, Policy
from mahalo_ray.decoding.sampling import SamplingBatch, SamplingParams, draw, draw_keys, uniforms
from mahalo_ray.decoding.stopping import REASONS, Candidates, StopReason, StopRule, TextStop, TokenTexts
from mahalo_ray.objectives import Weights

CODE = {reason: code for code, reason in enumerate(REASONS)}


@dataclass(frozen=True)
class SampleRequest:
    """`num_candidates` continuations of a row's conversation of `length` tokens.

    They may have `cap` tokens, at which the context `is_full` or a limit is reached. `last` is the hidden
    state [D] behind the conversation, or its last token if the model has not read that.
    """

    row: int
    num_candidates: int
    params: SamplingParams
    seed: int
    cap: int
    is_full: bool
    weights: Weights | None
    rule: StopRule | None
    length: int
    last: Tensor | int


class RequestTable:
    """The forks of a grid, line by line."""

    def __init__(self, policy: Policy, vocabulary: TokenTexts | None) -> None:
        self._policy, self._vocabulary = policy, vocabulary
        self._lines: list[SampleRequest] = []
        self._settings: list[tuple[Weights | None, SamplingParams, Hashable]] = []
        self.stop: TextStop | None = None
        self.triggers: Tensor | None = None  # [V], tokens after which the text must be read
        self.params: SamplingBatch
        self.head: LogitFunction
        self.caps: Tensor  # per line, as the next two
        self.lengths: Tensor
        self.cut_codes: Tensor  # why a branch ends at its cap

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, line: int) -> SampleRequest:
        return self._lines[line]

    @property
    def columns(self) -> int:
        """Candidates of the line that wants most."""
        return max((fork.num_candidates for fork in self._lines), default=1)

    def slots(self, table: RowTable) -> np.ndarray:
        """Where the lines' rows lie now."""
        return table.slots([fork.row for fork in self._lines])

    def lines_of(self, rows: Collection[int]) -> np.ndarray:
        """The lines of these rows."""
        line = {fork.row: at for at, fork in enumerate(self._lines)}
        return np.array([line[row] for row in rows], dtype=np.int64)

    def replace(
        self, joining: Mapping[int, SampleRequest], left: Collection[int], table: RowTable
    ) -> np.ndarray:
        """Let rows leave and join, lines in the order of the rows' slots. A row that is there already begins
        again. Returns which line each line was, -1 for a new one."""
        stay = [at for at, fork in enumerate(self._lines) if fork.row not in left]
        forks = [joining.get(self._lines[at].row, self._lines[at]) for at in stay]
        known = {fork.row for fork in forks}
        forks += [fork for row, fork in joining.items() if row not in known]
        source = np.array(stay + [-1] * (len(forks) - len(stay)), dtype=np.int64)
        order = np.argsort(table.slots([fork.row for fork in forks]))
        self._lines = [forks[at] for at in order]
        self._tabulate()
        return source[order]

    def _tabulate(self) -> None:
        device, lines = self._policy.device, self._lines
        self.caps = torch.tensor([fork.cap for fork in lines], device=device)
        self.lengths = torch.tensor([fork.length for fork in lines], device=device)
        cut = [CODE[StopReason.CONTEXT if fork.is_full else StopReason.LENGTH] for fork in lines]
        self.cut_codes = torch.tensor(cut, device=device)
        rules: Sequence[StopRule | None] = [fork.rule for fork in lines]
        self.stop = None if self._vocabulary is None else TextStop(self._vocabulary, rules)
        settings: list[tuple[Weights | None, SamplingParams, Hashable]]
        settings = [(f.weights, f.params, None if f.rule is None else f.rule.key) for f in lines]
        if settings == self._settings or not lines:
            return  # the usual case: the next step of the same requests
        self._settings = settings
        self.head = self._policy.head([fork.weights for fork in lines])
        self.params = SamplingBatch.of([fork.params for fork in lines], device)
        if self.stop is not None:
            self.triggers = self.stop.trigger_table(self._policy.vocab_size).to(device)


class SampleBuffers:
    """Tables over the flat places of a grid [lines * K]: tokens [.., T], their log-probs, uniform numbers
    [.., T], how many tokens each branch ended with and why."""

    def __init__(self, device: torch.device, with_logps: bool) -> None:
        self.columns, self.length = 0, 0
        self.tokens = torch.zeros(0, 0, dtype=torch.long, device=device)
        self.uniforms = torch.zeros(0, 0, dtype=torch.float64, device=device)
        self.logps = torch.zeros(0, 0, device=device) if with_logps else None
        self.counts = torch.zeros(0, dtype=torch.long, device=device)
        self.reasons = torch.zeros(0, dtype=torch.long, device=device)

    def regrid(self, source: np.ndarray, columns: int) -> None:
        """Lines source[i] of the old grid (-1: a new one), with another number of columns."""
        kept = source >= 0
        common = np.arange(min(columns, self.columns))
        new = (np.flatnonzero(kept)[:, None] * columns + common).reshape(-1)
        old = (source[kept][:, None] * self.columns + common).reshape(-1)
        self.columns = columns
        places = (torch.from_numpy(new), torch.from_numpy(old), len(source) * columns)
        self.tokens, self.uniforms = self._moved(self.tokens, *places), self._moved(self.uniforms, *places)
        self.counts, self.reasons = self._moved(self.counts, *places), self._moved(self.reasons, *places)
        if self.logps is not None:
            self.logps = self._moved(self.logps, *places)

    def start(self, lines: np.ndarray, seeds: list[int], positions: np.ndarray, length: int) -> None:
        """Random numbers of `length` tokens for lines whose conversations have these lengths. All at once:
        hashing is many small operations."""
        if length > self.length:
            self.length, shape = length, (len(self.tokens), length)
            self.tokens, self.uniforms = resized(self.tokens, shape), resized(self.uniforms, shape)
            if self.logps is not None:
                self.logps = resized(self.logps, shape)
        device = self.tokens.device
        keys = draw_keys(seeds, self.columns, device)  # [lines, K]
        first = torch.from_numpy(positions).to(device)
        drawn = uniforms(keys[..., None], first[:, None, None] + torch.arange(length, device=device))
        self.uniforms.view(-1, self.columns, self.length)[torch.from_numpy(lines), :, :length] = drawn

    def write(self, cells: Tensor, times: Tensor, tokens: Tensor, logps: Tensor | None) -> None:
        """The tokens [n] drawn for these cells as their times-th."""
        self.tokens[cells, times] = tokens
        if self.logps is not None and logps is not None:
            self.logps[cells, times] = logps

    def end(self, cells: Tensor, counts: Tensor, reasons: Tensor) -> None:
        """These cells have ended with so many tokens, for these reasons (codes)."""
        self.counts[cells], self.reasons[cells] = counts, reasons

    def lists(
        self, lines: np.ndarray, wanted: list[int]
    ) -> tuple[list[list[list[int]]], list[list[StopReason]], list[list[list[float]]] | None]:
        """Tokens, reasons and log-probs of the first wanted[i] branches of every line."""
        index = torch.from_numpy(lines)
        counts = self.counts.view(-1, self.columns)[index]
        longest = int(counts.max())

        def cut(table: Tensor) -> list[list[list]]:
            grid = table.view(-1, self.columns, self.length)[index, :, :longest].tolist()
            return [
                [values[:n] for values, n in zip(line[:k], line_counts, strict=False)]
                for line, line_counts, k in zip(grid, counts.tolist(), wanted, strict=True)
            ]

        codes = self.reasons.view(-1, self.columns)[index].tolist()
        reasons = [[REASONS[c] for c in line[:k]] for line, k in zip(codes, wanted, strict=True)]
        return cut(self.tokens), reasons, None if self.logps is None else cut(self.logps)

    def _moved(self, table: Tensor, new: Tensor, old: Tensor, places: int) -> Tensor:
        moved = table.new_zeros(places, *table.shape[1:])
        moved[new] = table[old]
        return moved


class BranchDecoder:
    """Decodes forks of rows token by token; forks may begin, and rows leave, between any two tokens.

    A fork is a line of a grid [lines, K], and a `cell` is a flat place line * K + branch of it. Only cells
    that still decode go through the model's layers; its attention alone works on the whole grid. A line whose
    branches have ended keeps them until its row begins again or leaves.
    """

    def __init__(
        self,
        policy: Policy,
        cache: RaggedCache,
        rows: RowTable,
        stop_ids: Collection[int],
        vocabulary: TokenTexts | None,
        with_logps: bool = False,
    ) -> None:
        """`vocabulary` reads the text that forks' rules need; None if they have none."""
        self.policy, self.device, self._rows = policy, policy.device, rows
        self.branches = Branches(cache, np.zeros(0, dtype=np.int64), 1)
        self._tables = SampleBuffers(self.device, with_logps)
        self._forks = RequestTable(policy, vocabulary)
        self._stop_table = torch.zeros(policy.vocab_size, dtype=torch.bool, device=self.device)
        self._stop_table[torch.tensor(sorted(stop_ids), dtype=torch.long, device=self.device)] = True
        self.tokens_forwarded = 0
        self.read: list[tuple[int, Tensor]] = []  # rows whose last token the last step read, states [D]
        self._joining: dict[int, SampleRequest] = {}
        self._left: set[int] = set()
        self._empty: dict[int, SampleRequest] = {}  # no room for a token: their candidates are empty
        self._unreported: list[int] = []
        self._moves = 0
        self._sampled = torch.zeros(0, dtype=torch.long, device=self.device)  # last tokens, not yet read
        self._cell = self._place = self._sampled  # what decodes, in ascending order, and where in the grid
        self._grid_lines, self._is_new = NO_LINES, True

    @property
    def is_busy(self) -> bool:
        """Whether any branch is still to be decoded."""
        return bool(len(self._cell) or self._joining or self._unreported)

    @property
    def nbytes(self) -> int:
        """Bytes of the branches' keys and values, those of finished branches included."""
        return self.branches.nbytes

    def start(self, forks: Sequence[SampleRequest]) -> None:
        """Decode these from the next token on; a row's earlier fork is forgotten."""
        for fork in forks:
            if fork.cap > 0:
                self._joining[fork.row] = fork
            else:
                self._empty[fork.row] = fork
                self._unreported.append(fork.row)

    def abort(self, rows: Collection[int]) -> None:
        """Forget these rows, finished or not."""
        self._left.update(rows)
        self._unreported = [row for row in self._unreported if row not in self._left]
        for row in rows:
            self._joining.pop(row, None)
            self._empty.pop(row, None)

    @torch.no_grad()
    def step(self) -> list[int]:
        """One more token of every branch. Returns the rows whose branches have now all ended."""
        done, self._unreported, self.read = self._unreported, [], []
        begun = self._arranged()
        if len(self._cell) or len(begun):
            done += self._ended(self._drawn(self._forward(begun)))
        return done

    def collect(self, rows: Sequence[int]) -> Candidates:
        """The candidates of finished rows. Their keys and values stay where they are, good until the row
        begins again."""
        empty = [self._empty.pop(row) for row in rows if row in self._empty]
        with_logps = self._tables.logps is not None
        parts = [Candidates.empty(f.row, f.num_candidates, f.length, with_logps) for f in empty]
        known = {fork.row for fork in empty}
        lines = self._forks.lines_of([row for row in rows if row not in known])
        if len(lines):
            part, columns = self.branches.part(), self._tables.columns
            forks = [self._forks[line] for line in lines]
            cells = [
                range(line * columns, line * columns + f.num_candidates)
                for line, f in zip(lines.tolist(), forks, strict=True)
            ]
            parts.append(
                Candidates(
                    [fork.row for fork in forks],
                    *self._tables.lists(lines, [fork.num_candidates for fork in forks]),
                    [fork.length for fork in forks],
                    [[self._kept(part, cell) for cell in own] for own in cells],
                )
            )
        return Candidates.joined(parts, rows)

    def _arranged(self) -> np.ndarray:
        """Lay the lines out for who joins and who left, in the order of the rows' slots: the prefixes of all
        live rows then lie side by side. Returns the lines that begin."""
        if not self._joining and not self._left and self._moves == self._rows.moves:
            return NO_LINES
        self._moves = self._rows.moves
        source = self._forks.replace(self._joining, self._left, self._rows)
        self._regrid(source, self._forks.slots(self._rows))
        begun = self._forks.lines_of(list(self._joining))
        self._joining, self._left = {}, set()
        if len(begun):
            forks = [self._forks[line] for line in begun]
            lengths = np.array([fork.length for fork in forks])
            self.branches.restart(begun, lengths)
            self._tables.start(begun, [f.seed for f in forks], lengths, max(f.cap for f in forks))
        self._live(self._cell)
        return begun

    def _regrid(self, source: np.ndarray, slots: np.ndarray) -> None:
        """A grid whose line i is the old line source[i] (-1: a new one); what decodes moves along."""
        lines, columns, old_columns = len(self.branches.slots), self._forks.columns, self.branches.branches
        if columns == old_columns and np.array_equal(source, np.arange(lines)):
            self.branches.move(slots)
            return
        column = np.arange(columns)
        is_old = (source[:, None] >= 0) & (column < old_columns)
        grid = np.where(is_old, source[:, None] * old_columns + column, -1)
        self.branches.regrid(source, grid, slots)
        self._tables.regrid(source, columns)
        cell_now = np.full(lines * old_columns + 1, -1)  # the last one is for what was nowhere
        cell_now[grid] = np.arange(grid.size).reshape(grid.shape)
        cell = torch.from_numpy(cell_now[:-1]).to(self.device)[self._cell]
        order = cell.argsort()[int((cell < 0).sum()) :]
        self._sampled, self._cell = self._sampled[order], cell[order]

    def _live(self, cell: Tensor) -> None:
        """These cells decode now, in ascending order: what the token loop needs of each."""
        self._cell, self._place = cell, self._places(cell)
        grid_line = self._place // self.branches.branches
        self._grid_lines = np.unique(grid_line.cpu().numpy())
        self._is_new = True
        if len(cell):
            self._line = cell // self._tables.columns
            # As many tokens drawn as the model has read since the fork.
            self._time = torch.from_numpy(self.branches.lengths).to(self.device)[grid_line]
            self._caps, self._starts = self._forks.caps[self._line], self._forks.lengths[self._line]
            self._params = self._forks.params.take(self._line)

    def _places(self, cell: Tensor) -> Tensor:
        """Where cells lie in the grid: at the place of the same number, here."""
        return cell

    def _kept(self, part: KVBlock, cell: int) -> BranchRef:
        """Where a cell's keys and values lie, if the grid's are `part`."""
        return BranchRef(part, cell // self.branches.branches, cell % self.branches.branches)

    def _forward(self, begun: np.ndarray) -> Tensor:
        """What the next token of every cell is drawn from, [cells, D]: one forward over the cells' last
        tokens and over those with which rows begin. Begun lines become cells."""
        if len(begun) == 0:
            return self._read(begun)
        is_unread = np.array([isinstance(self._forks[line].last, int) for line in begun])
        opening, ready = begun[is_unread], begun[~is_unread]
        count = len(self._cell)
        states = [self._read(opening)] if count or len(opening) else []
        fresh = [self._forks[line].last for line in ready]
        states += [torch.stack([last for last in fresh if isinstance(last, Tensor)])] if fresh else []
        lines = [*opening.tolist(), *ready.tolist()]
        wanted = [self._forks[line].num_candidates for line in lines]
        columns = self.branches.branches
        cells = [line * columns + k for line, n in zip(lines, wanted, strict=True) for k in range(n)]
        cell = torch.cat([self._cell, torch.tensor(cells, device=self.device)])
        repeats = torch.tensor([1] * count + wanted, device=self.device)
        order = cell.argsort()
        hidden = torch.cat(states).repeat_interleave(repeats, dim=0)[order]
        self._live(cell[order])
        return hidden

    def _read(self, opening: np.ndarray) -> Tensor:
        """Hidden states [cells + opening lines, D] behind the tokens that the model has not read."""
        count, forks = len(self._cell), [self._forks[line] for line in opening]
        ids, positions = self._sampled, self._starts + self._time if count else self._sampled
        if forks:
            ids = torch.cat([ids, torch.tensor([fork.last for fork in forks], device=self.device)])
            ends = torch.tensor([fork.length - 1 for fork in forks], device=self.device)
            positions = torch.cat([positions, ends])
        if forks or self._is_new:
            self.branches.take_part(self._place, self._grid_lines, opening)
            self._is_new = bool(forks)
        hidden = self.policy.hidden_states(ids[:, None], positions[:, None], self.branches)[:, 0]
        self.branches.advance(1)
        if count:
            self._time = self._time + 1
        self.tokens_forwarded += len(ids)
        if forks:
            self.read = [(fork.row, state) for fork, state in zip(forks, hidden[count:], strict=True)]
        return hidden

    def _drawn(self, hidden: Tensor) -> Tensor:
        """A token [cells] for every cell, written into the tables."""
        uniform = self._tables.uniforms[self._cell, self._time]
        logits = self._forks.head(hidden, self._line)
        tokens, logps = draw(logits, self._params, uniform, self._tables.logps is not None)
        self._tables.write(self._cell, self._time, tokens, logps)
        return tokens

    def _ended(self, sampled: Tensor) -> list[int]:
        """Take out the cells that end with the token just drawn. Returns the rows without any left."""
        stopped = self._stop_table[sampled]
        ended = stopped | (self._caps <= self._time + 1)
        by_text: tuple[Tensor, Tensor] | None = None
        if self._forks.triggers is not None:
            suspects = self._forks.triggers[sampled] & ~stopped
            if suspects.any():
                by_text = self._ended_by_text(suspects.nonzero()[:, 0])
        if by_text is not None:
            ended[by_text[0]] = True
        self._sampled = sampled
        if not ended.any():
            return []
        reason = torch.where(stopped, CODE[StopReason.TOKEN], self._forks.cut_codes[self._line])
        if by_text is not None:
            reason[by_text[0]] = by_text[1]
        self._tables.end(self._cell[ended], self._time[ended] + 1, reason[ended])
        lines, left = self._line[ended], self._line[~ended]
        self._sampled = sampled[~ended]
        self._live(self._cell[~ended])
        return [self._forks[line].row for line in sorted({*lines.tolist()} - {*left.tolist()})]

    def _ended_by_text(self, which: Tensor) -> tuple[Tensor, Tensor] | None:
        """Which of these live cells end with what they say, and why (codes). Only tokens that can end a step
        or a stop string come here: their candidates are read as text."""
        assert self._forks.stop is not None
        counts = (self._time[which] + 1).tolist()
        said = self._tables.tokens[self._cell[which], : max(counts)].tolist()
        verdicts = self._forks.stop.verdicts(
            self._line[which].tolist(), [ids[:n] for ids, n in zip(said, counts, strict=True)]
        )
        hits = [(at, CODE[verdict]) for at, verdict in enumerate(verdicts) if verdict is not None]
        if not hits:
            return None
        where, codes = torch.tensor(hits, device=self.device).unbind(1)
        return which[where], codes


_COMPACT_BELOW = 0.5  # regrid when at most this share of the grid is alive
_WORTHWHILE = 0.75  # and the new grid has at most this share of the old one's places
_SPREAD = 1.25  # a row may be laid out twice (its prefix copied) while rows grow by at most this factor


class CompactingDecoder(BranchDecoder):
    """Decodes forks to their ends. Nobody joins, so that attention need not work on a grid of which most has
    ended: what is left of it is laid out again now and then, and what has ended is put aside."""

    def run(self, forks: Sequence[SampleRequest]) -> Candidates:
        """The candidates of these forks' rows."""
        self._aside: dict[int, BranchRef] = {}  # by cell
        self._aside_bytes = 0
        # The cell at every place, -1 for none, and the other way round. None: all are where they began.
        self._cell_at: np.ndarray | None = None
        self._place_of: Tensor | None = None
        self.start(forks)
        while self.is_busy:
            self.step()
        return self.collect([fork.row for fork in forks])

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
        self._aside.update({int(cell): BranchRef(part, at, 0) for at, cell in enumerate(cell_at[ended])})
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

    def _kept(self, part: KVBlock, cell: int) -> BranchRef:
        if cell in self._aside:
            return self._aside[cell]
        place = cell if self._place_of is None else int(self._place_of[cell])
        return BranchRef(part, place // self.branches.branches, place % self.branches.branches)


def smallest_grid(alive: np.ndarray, branches: int, most_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The live places of a grid [N, K] laid out again: rows [N'] (the old row each new row belongs to) and
    grid [N', K'] of old flat places, -1 for padding.

    A row with more live branches than K' is laid out several times, at the price of a copy of its prefix;
    rows in all stay within 1.25 times the fork's, so prefix memory is bounded too.
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
