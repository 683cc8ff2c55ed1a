"""Prompts of one's own, judged by programs: the domain `prompts` (docs/domains.md)."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

from mahalo_ray.config import PromptsConfig, RubricJudgeConfig, Supervision
from mahalo_ray.data import storage
from mahalo_ray.data.prompts import PromptRow, read_prompts
from mahalo_ray.data.records import Dialogue
from mahalo_ray.data.row_fields import digest
from mahalo_ray.data.rows import BadRow
from mahalo_ray.domains.protocol import AnswerEpisode, DomainObjective, Speaker
from mahalo_ray.domains.verdicts import (
    CheckerJudge,
    EndpointJudge,
    Judge,
    Judged,
    ProgramJudge,
    Score,
    Unjudged,
)
from mahalo_ray.seeding import derived_seed

CHECKER = "checker"
_CALCULATOR = re.compile(r"<<[^<>\n]*=[^<>\n]*>>")  # GSM8K's notes for a calculator, no text for a reader
_WHOLE: tuple[Supervision, ...] = ("rollout_value", "judged_rollouts", "pairwise")


@dataclass
class PromptEpisode(AnswerEpisode):
    """One prompt and what was answered to it so far; `known`: the verdicts on it."""

    reference: str | None = None
    key: str = ""
    judges: Mapping[str, Judge] = field(default_factory=dict)
    known: dict[str, float] = field(default_factory=dict)

    @property
    def problem_key(self) -> Hashable:
        return self.key

    def take_step(self, text: str) -> None:
        self.known = {}
        super().take_step(text)

    def hear(self, text: str) -> None:
        self.known = {}
        super().hear(text)

    def fork(self, copy: int) -> Self:
        return replace(self, steps=list(self.steps), known={})

    def judge_prefix(self) -> Mapping[str, float]:
        """The judges that need no complete answer, on the steps so far."""
        return self.judge_together([self], self.judges, prefixes=True)[0]

    def outcome(self) -> Mapping[str, float]:
        """All judges, on the answer as it stands."""
        return self.judge_together([self], self.judges, prefixes=False)[0]

    @staticmethod
    def judge_together(
        episodes: Sequence[PromptEpisode], objectives: Collection[str], *, prefixes: bool
    ) -> list[Mapping[str, float]]:
        """The judges of these objectives on episodes of one domain, each asked about all episodes at once.
        `prefixes`: without the checker, which needs a complete answer. ValueError where a judge has no
        verdict."""
        judges = {name: judge for name, judge in episodes[0].judges.items() if name in objectives}
        if prefixes:
            judges = {name: j for name, j in judges.items() if not isinstance(j, CheckerJudge)}
        for name, judge in judges.items():
            waiting = [episode for episode in episodes if name not in episode.known]
            scores = judge.score([episode.as_judged() for episode in waiting])
            for episode, score in zip(waiting, scores, strict=True):
                if isinstance(score, Unjudged):
                    raise ValueError(f"the judge of '{name}' gave no verdict: {score.reason}")
                episode.known[name] = score
        return [{name: episode.known[name] for name in judges} for episode in episodes]

    def as_judged(self) -> Judged:
        """What a judge reads."""
        return Judged(tuple(self.opening_messages), tuple(self.steps), self.reference, self.answer)


class PromptsDomain:
    """The prompts of `config.path` as a domain: a seed draws one of them, and answers go step by step.

    Files are read when a prompt is first asked for: a document can be checked where they are not. ValueError
    for a judge that is not there; on reading, when there is nothing to read or no row can be used.
    """

    speakers: tuple[Speaker, Speaker] = ("assistant", "user")

    def __init__(self, config: PromptsConfig) -> None:
        self.boundary: str = config.boundary
        self._config = config
        self._judges = {name: _judge(name, judge) for name, judge in config.judges.items()}
        self.objectives = {name: _objective(name, judge) for name, judge in self._judges.items()}
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


def _judge(name: str, judge: str | RubricJudgeConfig) -> Judge:
    """The judge of an objective; ValueError for one that cannot be."""
    if isinstance(judge, RubricJudgeConfig):
        return RubricFileJudge(judge)
    if judge == CHECKER:
        return CheckerJudge()
    try:
        return ProgramJudge(judge)
    except ValueError as error:
        raise ValueError(f"the judge of '{name}': {error}") from error


class RubricFileJudge(Judge):
    """A language model behind an endpoint, opened when it is first asked: a document can be checked where
    its rubric and server are not. Its seeds come from the questions alone."""

    def __init__(self, config: RubricJudgeConfig) -> None:
        self._config = config

    @cached_property
    def _opened(self) -> EndpointJudge:
        file = self._config.rubric
        if not storage.exists(file):
            raise ValueError(f"there is no file '{file}' ('rubric')")
        return EndpointJudge(self._config, storage.read_bytes(file).decode(), self._config.endpoint, seed=0)

    def score(self, items: Sequence[Judged]) -> list[Score]:
        return self._opened.score(items)


def _objective(name: str, judge: Judge) -> DomainObjective:
    if isinstance(judge, CheckerJudge):
        return DomainObjective("is the final answer right", _WHOLE)
    return DomainObjective(f"as {name} is judged", ("judged_prefix", *_WHOLE))
