"""What a sequence is sampled by, and the candidates that come of it. The words are explained in engine.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mahalo_ray.decoding.kv_cache import BranchRef, KVBlock
from mahalo_ray.decoding.policy import HeadMix
from mahalo_ray.decoding.sampling import UNBOUND, DrawLimits, SamplingParams
from mahalo_ray.decoding.stopping import StopReason, StopRule


@dataclass(frozen=True)
class SampleRequest:
    """`num_candidates` continuations of a sequence of `length` tokens: one step of it.

    `step` counts the choices made in the sequence before: draws are keyed by it. A candidate ends after
    `max_tokens`, because the context is full (`fills_context`) or a limit is reached. `last` is the hidden
    state [D] behind the sequence, or its last token if the model has not read that.
    """

    sequence: int
    num_candidates: int
    params: SamplingParams
    seed: int
    step: int
    max_tokens: int
    fills_context: bool
    mix: HeadMix
    rule: StopRule | None
    length: int
    last: Tensor | int
    limits: DrawLimits = UNBOUND
    occurred: Sequence[int] = ()  # tokens so far, for the repetition penalty


@dataclass
class Candidates:
    """What was sampled: token_ids[i][k], reasons[i][k] and, if asked for, logps[i][k] (one per token) of
    candidate k of the i-th sequence."""

    sequences: list[int]
    token_ids: list[list[list[int]]]
    reasons: list[list[StopReason]]
    logps: list[list[list[float]]] | None
    base_lengths: list[int]  # tokens of every sequence when it was sampled
    branches: list[list[BranchRef]]  # where the keys and values of every candidate lie

    @classmethod
    def empty(cls, request: SampleRequest, with_logps: bool) -> Candidates:
        """Those of a sequence that fills the context: they have no tokens."""
        count = request.num_candidates
        return cls(
            [request.sequence],
            [[[] for _ in range(count)]],
            [[StopReason.CONTEXT] * count],
            [[[] for _ in range(count)]] if with_logps else None,
            [request.length],
            [[BranchRef(KVBlock([], []), 0, 0)] * count],
        )

    @classmethod
    def join(cls, parts: Sequence[Candidates], sequences: Sequence[int]) -> Candidates:
        """Those of several calls together, in the order of `sequences`."""
        index = {sequence: (part, i) for part in parts for i, sequence in enumerate(part.sequences)}
        sources = [index[sequence] for sequence in sequences]
        logps: list[list[list[float]]] | None = None
        if all(part.logps is not None for part in parts):
            logps = [(part.logps or [])[i] for part, i in sources]
        return cls(
            list(sequences),
            [part.token_ids[i] for part, i in sources],
            [part.reasons[i] for part, i in sources],
            logps,
            [part.base_lengths[i] for part, i in sources],
            [part.branches[i] for part, i in sources],
        )

    def only(self, which: Sequence[int], sequences: Sequence[int] | None = None) -> Candidates:
        """The candidates of the which[i]-th sampled sequences. `sequences`: duplicates of those that take
        over."""
        return Candidates(
            [self.sequences[i] for i in which] if sequences is None else list(sequences),
            [self.token_ids[i] for i in which],
            [self.reasons[i] for i in which],
            None if self.logps is None else [self.logps[i] for i in which],
            [self.base_lengths[i] for i in which],
            [self.branches[i] for i in which],
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all candidates together."""
        return sum(len(ids) for candidates in self.token_ids for ids in candidates)
