"""The token loop: all branches of a fork, one token per forward, with almost no Python per token."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from mahalo_ray.decoding.cache import Branches
from mahalo_ray.decoding.candidates import REASONS, Decoded, StopReason
from mahalo_ray.decoding.policy import Policy, RowWeights
from mahalo_ray.decoding.sampling import SamplingBatch, SamplingParams, draw, draw_keys, uniforms
from mahalo_ray.decoding.stopping import TextStop

_CODE = {reason: code for code, reason in enumerate(REASONS)}
_COMPACT_BELOW = 0.5  # regrid when at most this share of the grid is alive
_WORTHWHILE = 0.75  # and the new grid has at most this share of the old one's places
_SPREAD = 1.25  # a row may be laid out twice (its trunk copied) while rows grow by at most this factor


class BranchDecoder:
    """Decodes a fork to the end. A `cell` is a branch of the fork (row-major [N, K]); the grid of live places
    shrinks as cells finish. Results live in [cells + 1, T] tables: the extra line takes what dead places
    write."""

    def __init__(
        self,
        policy: Policy,
        branches: Branches,
        wanted: np.ndarray,
        last_hidden: Tensor,
        weights: RowWeights,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        limits: np.ndarray,
        max_context: int,
        stop_ids: Collection[int],
        stop: TextStop | None,
        with_logps: bool,
    ) -> None:
        device = policy.device
        count, self.num_candidates = len(params), branches.branches
        self.policy, self.branches, self.stop, self.device = policy, branches, stop, device
        self.base_lengths = branches.trunk_lengths.copy()
        self.last_hidden = last_hidden
        self.head = policy.head(weights)
        self.cells = count * self.num_candidates
        room = max_context - self.base_lengths
        self.context_bound = torch.from_numpy(np.repeat(room <= limits, self.num_candidates)).to(device)
        caps = np.minimum(limits, room)
        # Rows that want fewer candidates than others have branches that never start.
        starts = np.arange(self.num_candidates) < wanted[:, None]
        self.caps = torch.from_numpy(np.where(starts, caps[:, None], 0).reshape(-1)).to(device)
        self.stop_table = torch.zeros(policy.vocab_size, dtype=torch.bool, device=device)
        self.stop_table[torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)] = True
        self.trigger_table = None if stop is None else stop.trigger_table(policy.vocab_size).to(device)
        self.with_logps = with_logps
        self.params = SamplingBatch.of(params, device)
        self.max_tokens = max(int(caps.max()), 0)
        # All draws at once: hashing is many small operations.
        keys = draw_keys(seeds, self.num_candidates, device).view(-1)
        first = torch.from_numpy(self.base_lengths.repeat(self.num_candidates)).to(device)
        positions = first[:, None] + torch.arange(self.max_tokens, device=device)
        self.uniforms = uniforms(keys[:, None], positions)  # [cells, T]
        self.tokens = torch.zeros(self.cells + 1, self.max_tokens, dtype=torch.long, device=device)
        self.logps = torch.zeros(self.cells + 1, self.max_tokens, device=device) if with_logps else None
        self.counts = torch.zeros(self.cells + 1, dtype=torch.long, device=device)
        self.reasons = torch.full((self.cells + 1,), _CODE[StopReason.CONTEXT], device=device)
        self.tokens_forwarded = 0

    @torch.no_grad()
    def run(self) -> Decoded:
        """Until every cell has finished."""
        places = torch.arange(self.cells, device=self.device)
        self._place(places, self.caps > 0)
        logits = self._first_logits()
        time = 0
        while self.num_alive:
            sampled = self._draw(logits, time)
            self._finish(sampled, time)
            if not self.num_alive:
                break
            if self.num_alive <= _COMPACT_BELOW * len(self.cell):
                sampled = self._compact(sampled)
            logits = self._forward(sampled)
            time += 1
        return self._decoded()

    def _place(self, cell: Tensor, alive: Tensor) -> None:
        """A new grid: which cell lies at every flat place, and whether it still decodes."""
        self.cell, self.alive = cell, alive
        self.row = cell // self.num_candidates
        self.target = torch.where(alive, cell, self.cells)
        self.num_alive = int(alive.sum())
        self.cell_params = self.params.take(self.row)
        self.cell_uniforms, self.cell_caps = self.uniforms[cell], self.caps[cell]

    def _first_logits(self) -> Tensor:
        """Every candidate's first token comes from the same hidden state: one head application per row."""
        rows = torch.arange(len(self.last_hidden), device=self.device)
        return self.head(self.last_hidden, rows).repeat_interleave(self.num_candidates, dim=0)

    def _draw(self, logits: Tensor, time: int) -> Tensor:
        tokens, logps = draw(logits, self.cell_params, self.cell_uniforms[:, time], self.with_logps)
        self.tokens[self.target, time] = tokens
        if self.logps is not None and logps is not None:
            self.logps[self.target, time] = logps
        return tokens

    def _finish(self, sampled: Tensor, time: int) -> None:
        """Decide which places end with the token just drawn."""
        stopped = self.stop_table[sampled]
        ended = (stopped | (self.cell_caps <= time + 1)) & self.alive
        by_text: tuple[Tensor, Tensor] | None = None
        if self.trigger_table is not None:
            suspects = self.trigger_table[sampled] & self.alive & ~stopped
            if suspects.any():
                by_text = self._ended_by_text(suspects.nonzero()[:, 0], time)
        if by_text is not None:
            ended[by_text[0]] = True
        if not ended.any():
            return
        reason = torch.where(
            self.context_bound[self.cell], _CODE[StopReason.CONTEXT], _CODE[StopReason.LENGTH]
        )
        reason = torch.where(stopped, _CODE[StopReason.TOKEN], reason)
        if by_text is not None:
            reason[by_text[0]] = by_text[1]
        cells = self.cell[ended]
        self.counts[cells] = time + 1
        self.reasons[cells] = reason[ended]
        self.alive = self.alive & ~ended
        self.target = torch.where(self.alive, self.cell, self.cells)
        self.num_alive = int(self.alive.sum())

    def _ended_by_text(self, places: Tensor, time: int) -> tuple[Tensor, Tensor] | None:
        """Which of these places end with what they say, and why (codes). Only tokens that can end a step or a
        stop string come here: their candidates are read as text."""
        assert self.stop is not None
        cells = self.cell[places]
        rows = (cells // self.num_candidates).tolist()
        verdicts = self.stop.verdicts(rows, self.tokens[cells, : time + 1].tolist())
        hits = [(at, _CODE[verdict]) for at, verdict in enumerate(verdicts) if verdict is not None]
        if not hits:
            return None
        where, codes = torch.tensor(hits, device=self.device).unbind(1)
        return places[where], codes

    def _compact(self, sampled: Tensor) -> Tensor:
        """Lay the live cells out in the smallest grid; returns the sampled tokens in the new order."""
        rows, grid = smallest_grid(self.alive.cpu().numpy(), self.branches.branches, len(self.base_lengths))
        if grid.size > _WORTHWHILE * len(self.cell):
            return sampled
        flat = torch.from_numpy(np.maximum(grid.reshape(-1), 0)).to(self.device)
        real = torch.from_numpy(grid.reshape(-1) >= 0).to(self.device)
        self.branches.keep(rows, grid)
        self._place(self.cell[flat], real)
        return sampled[flat]

    def _forward(self, sampled: Tensor) -> Tensor:
        position_ids = self.branches.positions(1, self.device)
        hidden = self.policy.hidden_states(sampled[:, None], position_ids, self.branches)
        self.branches.advance(1)
        self.tokens_forwarded += self.num_alive
        return self.head(hidden[:, 0], self.row)

    def _decoded(self) -> Decoded:
        counts = self.counts.tolist()
        tokens = [ids[:n] for ids, n in zip(self.tokens[:-1].tolist(), counts, strict=False)]
        logps = None
        if self.logps is not None:
            logps = [values[:n] for values, n in zip(self.logps[:-1].tolist(), counts, strict=False)]
        reasons = [REASONS[code] for code in self.reasons[:-1].tolist()]
        return Decoded(tokens, logps, reasons, self.base_lengths, self.branches.finished())


def smallest_grid(alive: np.ndarray, branches: int, most_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The live places of a grid [N, K] laid out again: rows [N'] (the old row each new row belongs to) and
    grid [N', K'] of old flat places, -1 for padding.

    A row with more live branches than K' is laid out several times, at the price of a copy of its trunk; rows
    in all stay within 1.25 times the fork's, so trunk memory is bounded too.
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
