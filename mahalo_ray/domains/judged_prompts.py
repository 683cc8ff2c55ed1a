"""Prompts of one's own, judged by programs: the domain `prompts` (docs/domains.md)."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mahalo_ray.config import PromptsConfig, Supervision
from mahalo_ray.data.prompts import PromptRow, read_prompts
from mahalo_ray.data.records import Dialogue
from mahalo_ray.data.row_fields import digest
from mahalo_ray.data.rows import BadRow
from mahalo_ray.domains.math import is_correct
from mahalo_ray.domains.protocol import AnswerEpisode, DomainObjective, Speaker, import_named
from mahalo_ray.seeding import derived_seed

CHECKER = "checker"
_CALCULATOR = re.compile(r"<<[^<>\n]*=[^<>\n]*>>")  # GSM8K's notes for a calculator, no text for a reader
_WHOLE: tuple[Supervision, ...] = ("rollout_value", "judged_rollouts", "pairwise")


@dataclass(frozen=True)
class Judgement:
    """One objective's judge: 1 or 0 by the checker (math-verify against the row's answer), or what a function
    of (prompt, steps, answer) says, a number or a bool."""

    name: str
    function: Callable[..., Any] | None

    def of(self, prompt: Sequence[dict[str, str]], steps: Sequence[str], answer: str | None) -> float:
        """The verdict on these steps. ValueError where a program returns no number."""
        if self.function is None:
            assert answer is not None  # `PromptsDomain` takes no other rows
            return float(is_correct("".join(steps), answer))
        value = self.function(list(prompt), list(steps), answer)
        if not isinstance(value, int | float) or value != value:
            raise ValueError(f"the judge of '{self.name}' returned {value!r}, not a number")
        return float(value)


@dataclass
class PromptEpisode(AnswerEpisode):
    """One prompt and what was answered to it so far."""

    reference: str | None = None
    key: str = ""
    judges: Mapping[str, Judgement] = field(default_factory=dict)

    @property
    def problem_key(self) -> Hashable:
        return self.key

    def judge_prefix(self) -> Mapping[str, float]:
        """The judges that need no complete answer, on the steps so far."""
        judges = {name: judge for name, judge in self.judges.items() if judge.function is not None}
        return self._verdicts(judges)

    def outcome(self) -> Mapping[str, float]:
        """All judges, on the answer as it stands."""
        return self._verdicts(self.judges)

    def _verdicts(self, judges: Mapping[str, Judgement]) -> dict[str, float]:
        prompt = [message.model_dump() for message in self.opening_messages]
        return {name: judge.of(prompt, self.steps, self.reference) for name, judge in judges.items()}


class PromptsDomain:
    """The prompts of `config.path` as a domain: a seed draws one of them, and answers go step by step.

    Files are read when a prompt is first asked for: a document can be checked where they are not. ValueError
    for a judge that is not there; on reading, when there is nothing to read or no row can be used.
    """

    speakers: tuple[Speaker, Speaker] = ("assistant", "user")

    def __init__(self, config: PromptsConfig) -> None:
        self.boundary: str = config.boundary
        self._config = config
        self._judges = {name: _judgement(name, judge) for name, judge in config.judges.items()}
        self.objectives = {name: _objective(judge) for name, judge in self._judges.items()}
        self._rows = 0
        self._bad: list[BadRow] = []

    @cached_property
    def _prompts(self) -> list[PromptRow]:
        return self._read(self._config.path)

    @cached_property
    def _evaluated(self) -> list[PromptRow] | None:
        return None if self._config.evaluation_path is None else self._read(self._config.evaluation_path)

    def left_out(self) -> tuple[int, list[BadRow]]:
        """How many rows all files have, and those that cannot be used."""
        assert self._prompts and self._evaluated != []  # read by now
        return self._rows, self._bad

    def _read(self, path: str) -> list[PromptRow]:
        read, before = read_prompts(path, with_answers=True), len(self._bad)
        self._rows += len(read.prompts) + len(read.bad)
        self._bad += read.bad
        prompts = [row for row in read.prompts if self._takes(row)]
        if not prompts:
            raise ValueError(f"no row of '{path}' can be used; the first: {self._bad[before].reason}")
        return prompts[: self._config.limit]

    def _takes(self, row: PromptRow) -> bool:
        reason = None
        if len(row.messages) != 1:
            reason = f"the prompt has {len(row.messages)} messages: only single questions can be used"
        elif row.answer is None:
            reason = "there is no reference answer, which SFT and the checker need"
        if reason is not None:
            self._bad.append(row.bad(reason))
        return reason is None

    def episode(self, seed: int) -> PromptEpisode:
        """The prompt that this seed draws; below 0, those of `evaluation_path` in their order."""
        if seed < 0:
            assert self._evaluated is not None
            return self._episode(self._evaluated[-seed - 1], seed)
        return self._episode(self._prompts[derived_seed("prompt", seed) % len(self._prompts)], seed)

    def _episode(self, row: PromptRow, seed: int) -> PromptEpisode:
        (message,) = row.messages
        return PromptEpisode(
            seed,
            _with_instruction(message.content, self._config.instruction),
            topic="prompts",
            max_steps=self._config.max_steps,
            reference=row.answer,
            key=digest(row.messages),
            judges=self._judges,
        )

    def evaluation_seeds(self, block: range, seen: AbstractSet[Hashable]) -> Iterator[int]:
        """Seeds of different prompts that were not trained on: those of `evaluation_path` in their order, or
        of `path` as the block draws them."""
        seeds = block if self._evaluated is None else range(-1, -len(self._evaluated) - 1, -1)
        met = set(seen)
        for seed in seeds:
            key = self.episode(seed).problem_key
            if key not in met:
                met.add(key)
                yield seed

    def sft_dialogue(self, seed: int) -> Dialogue:
        """The prompt of this seed with its reference answer, without GSM8K's notes for a calculator."""
        episode = self.episode(seed)
        assert episode.reference is not None
        return episode.dialogue(_CALCULATOR.sub("", episode.reference), "prompts/reference")

    def is_malformed(self, text: str) -> bool:
        return not text.strip()


def _with_instruction(question: str, instruction: str | None) -> str:
    return question if instruction is None else f"{question}\n\n{instruction}"


def _judgement(name: str, judge: str) -> Judgement:
    function = None if judge == CHECKER else import_named(judge, "function")
    if function is not None and not callable(function):
        raise ValueError(f"the judge of '{name}', '{judge}', is not a function")
    return Judgement(name, function)


def _objective(judge: Judgement) -> DomainObjective:
    if judge.function is None:
        return DomainObjective("is the final answer right", _WHOLE)
    return DomainObjective(f"as {judge.name} is judged", ("judged_prefix", *_WHOLE))
