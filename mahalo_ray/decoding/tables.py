"""What has been drawn in a grid of branches, and the random numbers it is drawn by."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mahalo_ray.decoding.candidates import REASONS, StopReason
from mahalo_ray.decoding.parts import resized
from mahalo_ray.decoding.sampling import draw_keys, uniforms


class DrawTables:
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

    def begin(self, lines: np.ndarray, seeds: list[int], positions: np.ndarray, length: int) -> None:
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
