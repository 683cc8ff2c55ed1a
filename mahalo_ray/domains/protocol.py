"""What a domain is: its problems, how an answer to one goes, what it is judged by. docs/domains.md has an
example.

`domain.name` of a run names a domain of `DOMAINS`, or any other as `package.module:NAME`.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, Self, runtime_checkable

from mahalo_ray.config import DomainConfig, PromptsConfig, Supervision
from mahalo_ray.data.records import Dialogue, Message, Turn
from mahalo_ray.objectives import unknown_name

DOMAINS = {
    "maths_miniature": "mahalo_ray.domains.maths.word_problems:DOMAIN",
    "tutoring_miniature": "mahalo_ray.domains.tutoring:DOMAIN",
    "human_values_miniature": "mahalo_ray.domains.human_values_miniature.facts:DOMAIN",
}
WHOLE_TURNS = "tutoring"  # the boundary that only ends with the turn
Speaker = Literal["tutor", "student", "user", "assistant"]


class Episode(Protocol):
    """One problem in the making of its answer. Equal seeds give equal episodes."""

    @property
    def seed(self) -> int: ...

    @property
    def topic(self) -> str:
        """The kind of problem: shown in reports, and what `pairs.split_by: topic` splits by."""
        ...

    @property
    def problem_key(self) -> Hashable:
        """Equal for problems that are the same to a learner: no problem of a training dialogue is used to
        evaluate."""
        ...

    @property
    def opening_messages(self) -> list[Message]:
        """What the model reads first; the last message is not its own."""
        ...

    @property
    def over(self) -> bool:
        """Whether nothing more may be said."""
        ...

    def hear(self, text: str) -> str | None:
        """The model's turn ends with this text (all of it, or what follows the steps taken before). Returns
        the other side's reply; None: there is none, and the episode is over."""
        ...

    def take_step(self, text: str) -> None:
        """A step of a turn that goes on. Not called in domains whose boundary is the whole turn."""
        ...

    def fork(self, copy: int) -> Self:
        """An independent episode that goes on from here; further noise, if there is any, is keyed by
        `copy`."""
        ...

    def judge_prefix(self) -> Mapping[str, float]:
        """Judgements in 0..1 of what was said so far, of objectives supervised by `judged_prefix`."""
        ...

    def outcome(self) -> Mapping[str, float]:
        """What it came to, by a program that knows nothing of the reward model: a value of every
        objective."""
        ...


@runtime_checkable
class JudgedTogether(Protocol):
    """An episode of a kind that is judged many at a time: its judges answer from afar, side by side."""

    @staticmethod
    def judge_together(
        episodes: Sequence[Any], objectives: Collection[str], *, prefixes: bool
    ) -> list[Mapping[str, float]]:
        """Of each episode, its outcome for these objectives, or (`prefixes`) what `judge_prefix` gives."""
        ...


def prefix_judgements(episodes: Sequence[Episode], objectives: Collection[str]) -> list[Mapping[str, float]]:
    """`judge_prefix` of each for (at least) these objectives; together where they can be."""
    if episodes and isinstance(episodes[0], JudgedTogether):
        return episodes[0].judge_together(episodes, objectives, prefixes=True)
    return [episode.judge_prefix() for episode in episodes]


def outcomes(episodes: Sequence[Episode], objectives: Collection[str]) -> list[Mapping[str, float]]:
    """`outcome` of each for (at least) these objectives; together where they can be."""
    if episodes and isinstance(episodes[0], JudgedTogether):
        return episodes[0].judge_together(episodes, objectives, prefixes=False)
    return [episode.outcome() for episode in episodes]


@dataclass(frozen=True)
class DomainObjective:
    """What can be traded off in a domain. `supervision`: the kinds that the domain has labels for, the usual
    one first."""

    description: str
    supervision: tuple[Supervision, ...]


@runtime_checkable
class Domain(Protocol):
    """A world that `mahalo run` goes through all stages with. Made once per process: it holds no state."""

    @property
    def boundary(self) -> str:
        """Where a step ends, by a name of `decoding/stopping.py`: `tutoring` at whole turns, `human_values`
        at sentences, `math` at blank lines."""
        ...

    @property
    def speakers(self) -> tuple[Speaker, Speaker]:
        """What reports call the model and the other side."""
        ...

    @property
    def objectives(self) -> Mapping[str, DomainObjective]:
        """By name."""
        ...

    def episode(self, seed: int) -> Episode:
        """The problem of a seed. Stages of a run have blocks of seeds of their own."""
        ...

    def sft_dialogue(self, seed: int) -> Dialogue:
        """An example of the SFT text: the problem of this seed, with an answer as the first policy shall give
        them, of mixed quality, so that there is something to choose from."""
        ...

    def is_malformed(self, text: str) -> bool:
        """Whether a turn, or a step of one, is nothing that anybody should say."""
        ...


@runtime_checkable
class GivenProblems(Protocol):
    """A domain of finitely many problems: to evaluate, each is taken once."""

    def evaluation_seeds(self, block: range, seen: AbstractSet[Hashable]) -> Iterator[int]:
        """Seeds of different problems, none of which has a `problem_key` of `seen`; of `block`, or others
        that no training stage has."""
        ...


@dataclass
class AnswerEpisode(ABC):
    """Base of episodes with one question and one answer, which is given whole or step by step."""

    seed: int
    question: str
    topic: str = ""
    max_steps: int = 16
    steps: list[str] = field(default_factory=list)
    complete: bool = False

    @property
    def problem_key(self) -> Hashable:
        return self.question

    @property
    def opening_messages(self) -> list[Message]:
        return [Message(role="user", content=self.question)]

    @property
    def answer(self) -> str:
        """What was said so far."""
        return "".join(self.steps)

    @property
    def over(self) -> bool:
        return self.complete or len(self.steps) >= self.max_steps

    def take_step(self, text: str) -> None:
        self.steps.append(text)

    def hear(self, text: str) -> None:
        self.steps.append(text)
        self.complete = True

    def fork(self, copy: int) -> Self:
        return replace(self, steps=list(self.steps))

    def judge_prefix(self) -> Mapping[str, float]:
        """None, unless a domain has some."""
        return {}

    @abstractmethod
    def outcome(self) -> Mapping[str, float]:
        """Judge `answer`; `complete` says whether it came to its end."""

    def dialogue(self, answer: str, source: str) -> Dialogue:
        """This problem with a given answer, as an example of the SFT text."""
        told = self.fork(0)
        told.hear(answer)
        turns = [
            Turn(speaker="student", content=self.question),
            Turn(speaker="tutor", content=answer),
        ]
        return Dialogue(
            id=f"{source}-{self.seed}",
            topic=self.topic,
            turns=turns,
            outcome=dict(told.outcome()),
            seed=self.seed,
            source=source,
        )


def import_named(name: str, kind: str) -> Any:
    """What `package.module:NAME` names, imported; ValueError if it is not there."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no {kind} '{name}': {error}") from error


def source_digest(name: str, kind: str) -> str:
    """sha256 of the source file of the module that `package.module:NAME` names; "" for one without a file."""
    import_named(name, kind)
    file = sys.modules[name.partition(":")[0]].__file__
    return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def load_domain(domain: DomainConfig | str) -> Domain:
    """The domain of a run, or of this name of `DOMAINS`, or what `package.module:NAME` names; ValueError if
    there is none."""
    if not isinstance(domain, str) and domain.prompts is not None:
        return _prompts_domain(domain.prompts.model_dump_json())
    name = domain if isinstance(domain, str) else domain.name
    if ":" not in name and name not in DOMAINS:
        known = unknown_name("domain", name, [*DOMAINS, "prompts"])
        raise ValueError(f"{known} A domain of your own is named 'package.module:NAME'.")
    loaded = import_named(DOMAINS.get(name, name), "domain")
    if not isinstance(loaded, Domain):
        raise ValueError(
            f"'{name}' is a {type(loaded).__name__} that lacks {', '.join(_lacking(loaded))}: see "
            "`mahalo_ray.domains.protocol.Domain`"
        )
    return loaded


@lru_cache(maxsize=1)
def _prompts_domain(config: str) -> Domain:
    """The domain `prompts` with these settings (JSON), read once per process."""
    made: Domain = import_named("mahalo_ray.domains.judged_prompts:PromptsDomain", "domain")(
        PromptsConfig.model_validate_json(config)
    )
    return made


def _lacking(value: object) -> Iterable[str]:
    wanted = ("boundary", "speakers", "objectives", "episode", "sft_dialogue", "is_malformed")
    return [name for name in wanted if not hasattr(value, name)]
