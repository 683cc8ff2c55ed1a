"""What is wanted of rows that are being decoded, tabled for the token loop."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mahalo_ray.decoding.candidates import REASONS, StopReason
from mahalo_ray.decoding.policy import LogitFunction, Policy
from mahalo_ray.decoding.rows import RowTable
from mahalo_ray.decoding.sampling import SamplingBatch, SamplingParams
from mahalo_ray.decoding.stopping import StopRule, TextStop, Vocabulary
from mahalo_ray.objectives import Weights

CODE = {reason: code for code, reason in enumerate(REASONS)}


@dataclass(frozen=True)
class Fork:
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


class Forks:
    """The forks of a grid, line by line."""

    def __init__(self, policy: Policy, vocabulary: Vocabulary | None) -> None:
        self._policy, self._vocabulary = policy, vocabulary
        self._lines: list[Fork] = []
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

    def __getitem__(self, line: int) -> Fork:
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

    def replace(self, joining: Mapping[int, Fork], left: Collection[int], table: RowTable) -> np.ndarray:
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
