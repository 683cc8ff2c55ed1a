"""The token loop: all branches in flight, one token per forward, with almost no Python per token."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from mahalo_ray.decoding.branches import NO_LINES, Branches
from mahalo_ray.decoding.cache import RaggedCache
from mahalo_ray.decoding.candidates import Candidates, StopReason
from mahalo_ray.decoding.forks import CODE, Fork, Forks
from mahalo_ray.decoding.parts import Part, Place
from mahalo_ray.decoding.policy import Policy
from mahalo_ray.decoding.rows import RowTable
from mahalo_ray.decoding.sampling import draw
from mahalo_ray.decoding.stopping import Vocabulary
from mahalo_ray.decoding.tables import DrawTables


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
        vocabulary: Vocabulary | None,
        with_logps: bool = False,
    ) -> None:
        """`vocabulary` reads the text that forks' rules need; None if they have none."""
        self.policy, self.device, self._rows = policy, policy.device, rows
        self.branches = Branches(cache, np.zeros(0, dtype=np.int64), 1)
        self._tables = DrawTables(self.device, with_logps)
        self._forks = Forks(policy, vocabulary)
        self._stop_table = torch.zeros(policy.vocab_size, dtype=torch.bool, device=self.device)
        self._stop_table[torch.tensor(sorted(stop_ids), dtype=torch.long, device=self.device)] = True
        self.tokens_forwarded = 0
        self.read: list[tuple[int, Tensor]] = []  # rows whose last token the last step read, states [D]
        self._joining: dict[int, Fork] = {}
        self._left: set[int] = set()
        self._empty: dict[int, Fork] = {}  # no room for a token: their candidates are empty
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

    def begin(self, forks: Sequence[Fork]) -> None:
        """Decode these from the next token on; a row's earlier fork is forgotten."""
        for fork in forks:
            if fork.cap > 0:
                self._joining[fork.row] = fork
            else:
                self._empty[fork.row] = fork
                self._unreported.append(fork.row)

    def leave(self, rows: Collection[int]) -> None:
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

    def taken(self, rows: Sequence[int]) -> Candidates:
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
        """Lay the lines out for who joins and who left, in the order of the rows' slots: the trunks of all
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
            self._tables.begin(begun, [f.seed for f in forks], lengths, max(f.cap for f in forks))
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

    def _kept(self, part: Part, cell: int) -> Place:
        """Where a cell's keys and values lie, if the grid's are `part`."""
        return Place(part, cell // self.branches.branches, cell % self.branches.branches)

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
