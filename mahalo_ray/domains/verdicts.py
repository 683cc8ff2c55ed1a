"""Judges of responses and of their prefixes that need no model here: the domain's checker, a program, and a
language model behind an endpoint, asked by a rubric."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import SandboxedEnvironment

from mahalo_ray.config import EndpointConfig, RubricJudgeConfig
from mahalo_ray.data.records import Message
from mahalo_ray.domains import math as maths
from mahalo_ray.domains.protocol import import_named
from mahalo_ray.endpoints import ChatCall, Endpoint, Failure
from mahalo_ray.objectives import unknown_name
from mahalo_ray.seeding import derived_seed, endpoint_seed

RUBRIC_VARIABLES = ("messages", "conversation", "steps", "step", "response", "answer")


@dataclass(frozen=True)
class Judged:
    """What is judged: a prompt and the steps of a response so far (or all of them)."""

    prompt: tuple[Message, ...]
    steps: tuple[str, ...]
    answer: str | None
    response: str  # the steps as one text


@dataclass(frozen=True)
class Unjudged:
    """There is no verdict, and why."""

    reason: str


Score = float | Unjudged


class Judge(ABC):
    """Higher is better; what counts as positive is the threshold's affair."""

    @abstractmethod
    def score(self, items: Sequence[Judged]) -> list[Score]:
        """One score per item, in their order."""

    def counts(self) -> dict[str, Any]:
        """What an endpoint was asked so far; empty for judges without one."""
        return {}

    def close(self) -> None:  # noqa: B027 (most judges hold nothing open)
        """End what it holds open."""


class CheckerJudge(Judge):
    """Maths: 1 for a response whose final answer equals the reference."""

    def score(self, items: Sequence[Judged]) -> list[Score]:
        return [
            Unjudged("the row has no reference answer to check against")
            if item.answer is None
            else float(maths.is_correct(item.response, item.answer))
            for item in items
        ]


class ProgramJudge(Judge):
    """A user's function; what it raises is a defect of the function and ends the job."""

    def __init__(self, function: str) -> None:
        self._name, self._function = function, load_function(function)

    def score(self, items: Sequence[Judged]) -> list[Score]:
        return [self._checked(item) for item in items]

    def _checked(self, item: Judged) -> Score:
        prompt = [message.model_dump() for message in item.prompt]
        value = self._function(prompt, list(item.steps), item.answer)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return Unjudged(f"{self._name} returned {value!r}, not a number")
        return float(value)


class EndpointJudge(Judge):
    """A language model asked by a rubric. A reply without a readable score is asked for again, with another
    seed; then, and where requests fail for good, there is no verdict."""

    def __init__(self, config: RubricJudgeConfig, rubric: str, endpoint: EndpointConfig, seed: int) -> None:
        """`rubric`: its text; `endpoint`: that of `config`, or one process's share of it."""
        self._config, self._seed = config, seed
        self._endpoint = Endpoint(endpoint)
        self._template = rubric_template(rubric)
        self._pattern = re.compile(config.score_pattern)
        self._unparsed: Counter[str] = Counter()

    def score(self, items: Sequence[Judged]) -> list[Score]:
        scores: dict[int, Score] = {}
        waiting: Sequence[int] = range(len(items))
        for attempt in range(self._config.parse_retries + 1):
            unread = []
            for place, answer in self._endpoint.chat(self._requests(items, waiting, attempt)):
                number = waiting[place]
                if isinstance(answer, Failure):
                    scores[number] = Unjudged(
                        f"{answer.kind} after {answer.attempts} tries: {answer.message}"
                    )
                elif (score := self._read(answer.texts[0])) is not None:
                    scores[number] = score
                else:
                    unread.append(number)
                    scores[number] = Unjudged(f"no score to read in the judge's reply: {answer.texts[0]!r}")
            self._unparsed["retried" if attempt < self._config.parse_retries else "given_up"] += len(unread)
            waiting = sorted(unread)
            if not waiting:
                break
        return [scores[number] for number in range(len(items))]

    def _requests(self, items: Sequence[Judged], numbers: Iterable[int], attempt: int) -> Iterator[ChatCall]:
        for number in numbers:
            item = items[number]
            try:
                question = self._template.render(rubric_values(item))
            except jinja2.TemplateError as error:
                raise ValueError(f"the rubric cannot be filled in: {error}") from error
            yield ChatCall(
                [{"role": "user", "content": question}],
                max_tokens=self._config.max_tokens,
                temperature=self._config.temperature,
                seed=endpoint_seed(derived_seed(self._seed, "judge", question, attempt)),
            )

    def _read(self, reply: str) -> float | None:
        """The last score in the reply, mapped to 0..1; None if there is none in the scale."""
        matches = [match.group(1) for match in self._pattern.finditer(reply)]
        try:
            value = float(matches[-1]) if matches else math.nan
        except (TypeError, ValueError):  # a group of the user's pattern that matched no number
            return None
        low, high = self._config.scale
        return (value - low) / (high - low) if low <= value <= high else None

    def counts(self) -> dict[str, Any]:
        return {**self._endpoint.usage.to_json(), "unparsed": dict(self._unparsed)}

    def close(self) -> None:
        self._endpoint.close()


def rubric_template(rubric: str) -> jinja2.Template:
    """The rubric as a sandboxed template; ValueError for one that cannot be read or asks for a variable that
    there is not."""
    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    try:
        asked = jinja2.meta.find_undeclared_variables(environment.parse(rubric))
        template = environment.from_string(rubric)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the rubric is no template: line {error.lineno}: {error.message}") from error
    for name in sorted(asked):
        if name not in RUBRIC_VARIABLES:
            raise ValueError(f"the rubric: {unknown_name('variable', name, RUBRIC_VARIABLES)}")
    if not asked & {"steps", "step", "response"}:
        raise ValueError("the rubric shows the judge nothing to judge: use 'response', 'steps' or 'step'")
    return template


def rubric_values(item: Judged) -> dict[str, Any]:
    """What a rubric may speak of."""
    return {
        "messages": [message.model_dump() for message in item.prompt],
        "conversation": "\n\n".join(f"{m.role.capitalize()}: {m.content}" for m in item.prompt),
        "steps": list(item.steps),
        "step": item.steps[-1],
        "response": item.response,
        "answer": item.answer,
    }


def load_function(name: str) -> Callable[..., Any]:
    """What "module:function" names, imported; ValueError if it is not there."""
    target = import_named(name, "function")
    if not callable(target):
        raise ValueError(f"'{name}' is not a function")
    return target
