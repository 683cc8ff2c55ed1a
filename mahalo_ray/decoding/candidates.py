"""What sampling returns: the candidates of every row, and why each one stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from mahalo_ray.decoding.cache import Parts


class StopReason(StrEnum):
    """Why a candidate ended."""

    TOKEN = "stop_token"  # it emitted a stop token, which is its last token
    LENGTH = "length"  # max_new_tokens
    CONTEXT = "context"  # the model's context is full
    STEP = "step"  # the domain's boundary: the step is complete, the response may go on
    ANSWER = "answer"  # the domain's boundary: the response is complete (maths: \boxed{} closed)
    STRING = "stop_string"  # the text contains a stop string
    STEPS = "max_steps"  # guided decoding took as many steps as it may


REASONS = tuple(StopReason)


@dataclass
class Decoded:
    """Raw results in cell order (row-major [N, K], rows in slot order)."""

    tokens: list[list[int]]
    logps: list[list[float]] | None
    reasons: list[StopReason]
    base_lengths: np.ndarray
    parts: Parts


@dataclass
class Candidates:
    """token_ids[i][k], reasons[i][k] and, if asked for, logps[i][k] (one per token) of the i-th sampled
    row."""

    rows: list[int]
    token_ids: list[list[list[int]]]
    reasons: list[list[StopReason]]
    logps: list[list[list[float]]] | None
    base_lengths: list[int]  # tokens of every conversation when it was sampled
    first_cells: list[int]  # where the row's candidates begin among the fork's branches
    parts: Parts  # the branches' keys and values

    @classmethod
    def gathered(cls, decoded: Decoded, rows: list[int], order: np.ndarray, wanted: np.ndarray) -> Candidates:
        """From cell order back to the order the rows were asked for; order[j]: which asked-for row is the
        j-th."""
        branches = int(wanted.max())
        first = np.empty(len(rows), dtype=np.int64)
        first[order] = np.arange(len(rows)) * branches
        starts = first.tolist()

        def grouped(items: Sequence) -> list:
            return [list(items[at : at + n]) for at, n in zip(starts, wanted.tolist(), strict=True)]

        return cls(
            rows,
            grouped(decoded.tokens),
            grouped(decoded.reasons),
            None if decoded.logps is None else grouped(decoded.logps),
            [int(decoded.base_lengths[at // branches]) for at in starts],
            starts,
            decoded.parts,
        )

    def only(self, which: Sequence[int], rows: Sequence[int] | None = None) -> Candidates:
        """The candidates of some of the sampled rows, by place; `rows`: duplicates of those rows that take
        over.
        """
        return Candidates(
            [self.rows[i] for i in which] if rows is None else list(rows),
            [self.token_ids[i] for i in which],
            [self.reasons[i] for i in which],
            None if self.logps is None else [self.logps[i] for i in which],
            [self.base_lengths[i] for i in which],
            [self.first_cells[i] for i in which],
            self.parts,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all candidates together."""
        return sum(len(ids) for row in self.token_ids for ids in row)

    def cell(self, at: int, candidate: int) -> int:
        return self.first_cells[at] + candidate
