"""What sampling returns: the candidates of every row, and why each one stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from mahalo_ray.decoding.parts import Part, Place


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
class Candidates:
    """token_ids[i][k], reasons[i][k] and, if asked for, logps[i][k] (one per token) of the i-th sampled
    row."""

    rows: list[int]
    token_ids: list[list[list[int]]]
    reasons: list[list[StopReason]]
    logps: list[list[list[float]]] | None
    base_lengths: list[int]  # tokens of every conversation when it was sampled
    places: list[list[Place]]  # where the keys and values of every candidate lie

    @classmethod
    def empty(cls, row: int, num_candidates: int, length: int, with_logps: bool) -> Candidates:
        """Of a row whose conversation fills the context."""
        nothing: list[list] = [[] for _ in range(num_candidates)]
        reasons = [StopReason.CONTEXT] * num_candidates
        logps = [list(nothing)] if with_logps else None
        return cls(
            [row], [nothing], [reasons], logps, [length], [[Place(Part([], []), 0, 0)] * num_candidates]
        )

    @classmethod
    def joined(cls, parts: Sequence[Candidates], rows: Sequence[int]) -> Candidates:
        """Those of several calls together, in the order of `rows`."""
        at = {row: (part, i) for part in parts for i, row in enumerate(part.rows)}
        found = [at[row] for row in rows]
        return cls(
            list(rows),
            [part.token_ids[i] for part, i in found],
            [part.reasons[i] for part, i in found],
            None
            if any(part.logps is None for part in parts)
            else [(part.logps or [])[i] for part, i in found],
            [part.base_lengths[i] for part, i in found],
            [part.places[i] for part, i in found],
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
            [self.places[i] for i in which],
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all candidates together."""
        return sum(len(ids) for row in self.token_ids for ids in row)
