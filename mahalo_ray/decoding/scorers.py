"""A process reward model that follows many conversations over kept caches and scores candidate steps.

Only new tokens ever go through its backbones: the prefix of every conversation is kept, K candidates are
scored as K branches over it in one forward, and the accepted candidate's keys and values become part of the
prefix.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mahalo_ray.data.records import Message
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.aggregation import check_aggregation
from mahalo_ray.decoding.cached_scorer import CachedScorer, as_value_error, cached_backbones, score_each_alone
from mahalo_ray.decoding.cpu_matmul import OneDNNRewardModel
from mahalo_ray.decoding.guidance import (
    Choice,
    ChoiceScores,
    GuidedRequest,
    Prompt,
    PromptTooLong,
    ScoreScale,
    StepCandidate,
    TextOutgrown,
)
from mahalo_ray.decoding.stopping import Boundary, StopReason, TokenTexts, boundary_for, step_starts
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.models.scoring import AnswerScorer, StepEncoder, StepScorer, TokenTrace, TraceReader

logger = logging.getLogger(__name__)


class StepFollower(Protocol):
    """A reward model that follows many answers. Row numbers are its own and valid until `drop`.

    `max_context`: most tokens of the policy that a conversation may have, None where they are not what
    counts.
    """

    max_context: int | None

    @property
    def tokens_forwarded(self) -> int: ...

    @property
    def peak_bytes(self) -> int: ...

    def check(self, messages: Sequence[Message]) -> None:
        """ValueError for a prompt this model cannot read."""
        ...

    def open(self, prompts: Sequence[Prompt]) -> list[int]:
        """Rows that follow the answers to these prompts."""
        ...

    def score(self, choices: Sequence[Choice]) -> list[ChoiceScores]:
        """Score the candidates of every choice. What is wrong with one choice is its own result."""
        ...

    def accept(self, rows: Sequence[int], chosen: Sequence[StepCandidate]) -> None:
        """These candidates are now part of the answers."""
        ...

    def hear(self, rows: Sequence[int], prompts: Sequence[Prompt]) -> None:
        """The answers are over and the conversations went on: `messages` are the whole ones, up to where
        another answer begins, `token_ids` what the policy read since it accepted the last candidate."""
        ...

    def duplicate(self, rows: Sequence[int]) -> list[int]:
        """Rows of copies that go on independently."""
        ...

    def drop(self, rows: Sequence[int]) -> None:
        """Forget rows."""
        ...


@dataclass(frozen=True)
class _FollowedAnswer:
    """An answer as a text scorer knows it: its steps, the last of which may go on."""

    messages: Sequence[Message]
    steps: tuple[str, ...] = ()
    goes_on: bool = False

    def extended(self, pieces: Sequence[str]) -> list[str]:
        """The steps with these after them; the first piece may continue a step that was cut at its limit."""
        if self.goes_on:
            return [*self.steps[:-1], self.steps[-1] + pieces[0], *pieces[1:]]
        return [*self.steps, *pieces]


@dataclass(frozen=True)
class _Reading:
    """What is read of a candidate after the prompt: its steps with words, and whether the last is closed."""

    steps: tuple[str, ...]
    is_closed: bool


class TextScorer:
    """A scorer that reads the text again for every candidate: sequence and token classifiers, and process
    reward models with another tokenizer or chat template than the policy's. Nothing is kept between steps.

    A token classifier's score stands at the separator, and a sequence classifier's template ends the turn:
    these two close every candidate.
    """

    max_context: int | None = None  # its limit is in its own tokens
    peak_bytes = 0

    def __init__(
        self,
        scorer: AnswerScorer | TraceReader,
        boundary: Boundary | None,
        vocabulary: TokenTexts | None,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`boundary` and `vocabulary` find the steps of candidates that are whole answers; None where there
        are none of those. `around` gives a context for every forward (faster products)."""
        self._scorer, self._boundary, self._vocabulary = scorer, boundary, vocabulary
        self._around = around
        self.tokens_forwarded = 0
        self._answers: dict[int, _FollowedAnswer] = {}
        self._next = 0

    def check(self, messages: Sequence[Message]) -> None:
        try:
            length, limit = self._length(messages, _Reading(("x",), True)), self._scorer.max_length
        except TemplateError as error:
            raise as_value_error(error) from error
        if length > limit:
            raise PromptTooLong(
                f"the prompt has {length} tokens for the reward model of "
                f"{', '.join(self._scorer.objectives)}, which reads {limit}"
            )

    def open(self, prompts: Sequence[Prompt]) -> list[int]:
        rows = list(range(self._next, self._next + len(prompts)))
        self._next += len(prompts)
        self.hear(rows, prompts)
        return rows

    def score(self, choices: Sequence[Choice]) -> list[ChoiceScores]:
        results: dict[int, ChoiceScores] = {}
        readings: dict[int, list[_Reading | None]] = {}
        lengths: dict[int, dict[_Reading, int]] = {}
        for number, choice in enumerate(choices):
            answer = self._answers[choice.row]
            read = [self._as_read(answer, choice, k) for k in range(len(choice.candidates))]
            try:
                known = {r: self._length(answer.messages, r) for r in dict.fromkeys(read) if r is not None}
            except (ValueError, TemplateError) as error:
                results[number] = ChoiceScores(as_value_error(error))
                continue
            if max(known.values(), default=0) > self._scorer.max_length:
                results[number] = ChoiceScores(
                    TextOutgrown("the text has become too long for a reward model")
                )
                continue
            readings[number], lengths[number] = read, known

        def score(numbers: Sequence[int]) -> list[Tensor]:
            wanted = [(number, reading) for number in numbers for reading in lengths[number]]
            found = self._score([(self._answers[choices[n].row], reading) for n, reading in wanted])
            return [
                self._table(
                    readings[number], {r: s for (n, r), s in zip(wanted, found, strict=True) if n == number}
                )
                for number in numbers
            ]

        for number, scores in score_each_alone(score, list(readings)).items():
            tokens = sum(lengths[number].values())
            self.tokens_forwarded += tokens
            results[number] = ChoiceScores(scores, tokens)
        return [results[number] for number in range(len(choices))]

    def accept(self, rows: Sequence[int], chosen: Sequence[StepCandidate]) -> None:
        for row, candidate in zip(rows, chosen, strict=True):
            answer = self._answers[row]
            steps = tuple(answer.extended([candidate.text]))
            self._answers[row] = _FollowedAnswer(
                answer.messages, steps, candidate.reason is StopReason.LENGTH
            )

    def hear(self, rows: Sequence[int], prompts: Sequence[Prompt]) -> None:
        for row, prompt in zip(rows, prompts, strict=True):
            self._answers[row] = _FollowedAnswer(list(prompt.messages))

    def duplicate(self, rows: Sequence[int]) -> list[int]:
        copies = list(range(self._next, self._next + len(rows)))
        self._next += len(rows)
        self._answers.update({copy: self._answers[row] for row, copy in zip(rows, copies, strict=True)})
        return copies

    def drop(self, rows: Sequence[int]) -> None:
        for row in rows:
            del self._answers[row]

    def _as_read(self, answer: _FollowedAnswer, choice: Choice, k: int) -> _Reading | None:
        """Steps with words, or the whole answer for a sequence classifier; None if nothing is said."""
        candidate = choice.candidates[k]
        if isinstance(self._scorer, AnswerScorer):
            whole = "".join([*answer.steps, candidate.text])
            return _Reading((whole,), True) if whole.strip() else None
        pieces = [candidate.text]
        if choice.is_whole:
            assert self._boundary is not None and self._vocabulary is not None
            ids = candidate.token_ids
            starts = [*step_starts(ids, self._boundary, self._vocabulary), len(ids)]
            pieces = [self._vocabulary.words(ids[a:b]) for a, b in itertools.pairwise(starts)]
        steps = answer.extended(pieces)
        if not isinstance(self._scorer.encoder, StepEncoder):
            spoken = tuple(step.strip() for step in steps if step.strip())
            return _Reading(spoken, True) if spoken else None
        said = tuple(step for step in steps if step.strip())
        is_closed = choice.is_closed(k) or candidate.reason is StopReason.STEP
        return _Reading(said, is_closed) if said else None

    def _length(self, messages: Sequence[Message], reading: _Reading) -> int:
        if isinstance(self._scorer, AnswerScorer):
            return self._scorer.length(messages, reading.steps[0])
        return len(self._trace(messages, reading).input_ids)

    def _trace(self, messages: Sequence[Message], reading: _Reading) -> TokenTrace:
        assert isinstance(self._scorer, TraceReader)
        encoder = self._scorer.encoder
        if isinstance(encoder, StepEncoder):
            return encoder.encode_answer(messages, reading.steps, reading.is_closed)
        return encoder.encode(messages, reading.steps)

    def _score(self, texts: Sequence[tuple[_FollowedAnswer, _Reading]]) -> list[Tensor]:
        """[O] of the last step each."""
        if isinstance(self._scorer, TraceReader):
            traces = [self._trace(answer.messages, reading) for answer, reading in texts]
            with self._around():
                return [scores[-1] for scores in self._scorer.score_traces(traces)]
        scored = self._scorer.score_batch([(answer.messages, reading.steps) for answer, reading in texts])
        return [torch.tensor([own[name][-1] for name in self._scorer.objectives]) for own in scored]

    def _table(self, readings: Sequence[_Reading | None], found: Mapping[_Reading, Tensor]) -> Tensor:
        """Scores [K, O]; a candidate without words is as bad as its worst rival."""
        spoken = [found[reading] for reading in readings if reading is not None]
        worst = torch.stack(spoken).amin(dim=0) if spoken else torch.zeros(len(self._scorer.objectives))
        return torch.stack([worst if reading is None else found[reading] for reading in readings])


class ScorerGroup:
    """All reward models of a session side by side; their objectives follow each other. May be empty."""

    def __init__(self, followers: Sequence[StepFollower], objectives: Sequence[str]) -> None:
        self._followers, self.objectives = list(followers), tuple(objectives)
        self._rows: dict[int, tuple[int, ...]] = {}
        self._next = 0

    @property
    def max_context(self) -> int | None:
        """Most tokens of the policy that a conversation may have; None: no limit."""
        return min((f.max_context for f in self._followers if f.max_context is not None), default=None)

    @property
    def tokens_forwarded(self) -> int:
        """Tokens encoded by all of them."""
        return sum(follower.tokens_forwarded for follower in self._followers)

    @property
    def peak_bytes(self) -> int:
        """Most bytes of keys and values kept."""
        return sum(follower.peak_bytes for follower in self._followers)

    def check(self, messages: Sequence[Message]) -> None:
        """ValueError for a prompt that one of the models cannot read."""
        for follower in self._followers:
            follower.check(messages)

    def open(self, prompts: Sequence[Prompt]) -> list[int]:
        """Rows that follow the answers to these prompts."""
        return self._number(len(prompts), [follower.open(prompts) for follower in self._followers])

    def score(self, choices: Sequence[Choice]) -> list[ChoiceScores]:
        """As `StepFollower.score`, for all objectives; a score that is no number is that choice's error."""
        each = [
            follower.score([replace(c, row=self._rows[c.row][number]) for c in choices])
            for number, follower in enumerate(self._followers)
        ]
        return [self._join(results) for results in zip(*each, strict=True)]

    def accept(self, rows: Sequence[int], chosen: Sequence[StepCandidate]) -> None:
        """These candidates are now part of the answers."""
        for follower, own in self._each(rows):
            follower.accept(own, chosen)

    def hear(self, rows: Sequence[int], prompts: Sequence[Prompt]) -> None:
        """As `StepFollower.hear`."""
        for follower, own in self._each(rows):
            follower.hear(own, prompts)

    def duplicate(self, rows: Sequence[int]) -> list[int]:
        """Rows of copies that go on independently."""
        return self._number(len(rows), [follower.duplicate(own) for follower, own in self._each(rows)])

    def drop(self, rows: Sequence[int]) -> None:
        """Forget rows."""
        for follower, own in self._each(rows):
            follower.drop(own)
        for row in rows:
            del self._rows[row]

    def _join(self, results: Sequence[ChoiceScores]) -> ChoiceScores:
        tokens = sum(result.tokens for result in results)
        errors = [result.scores for result in results if isinstance(result.scores, ValueError)]
        if errors:
            return ChoiceScores(errors[0], tokens)
        scores = torch.cat([result.scores for result in results if isinstance(result.scores, Tensor)], dim=-1)
        if not torch.isfinite(scores).all():
            bad = [
                name
                for name, column in zip(self.objectives, scores.T, strict=True)
                if not column.isfinite().all()
            ]
            return ChoiceScores(
                ValueError(
                    f"the reward model's score of {', '.join(bad)} is not a finite number for a candidate"
                ),
                tokens,
            )
        return ChoiceScores(scores, tokens)

    def _each(self, rows: Sequence[int]) -> list[tuple[StepFollower, list[int]]]:
        """Every model with the same rows in its own numbers."""
        return [(f, [self._rows[row][number] for row in rows]) for number, f in enumerate(self._followers)]

    def _number(self, count: int, each: Sequence[Sequence[int]]) -> list[int]:
        rows = list(range(self._next, self._next + count))
        self._next += count
        own = zip(*each, strict=True) if each else [()] * count
        self._rows.update(zip(rows, own, strict=True))
        return rows


class RewardModels:
    """The reward models beside a policy's tokenizer: read and checked once, followed by any number of groups.

    `tokenizer`: the policy's; None takes that of the first process reward model. A process reward model reads
    the policy's tokens only if its vocabulary and its chat template are the policy's; otherwise it reads the
    text, which is logged, since its whole history is then encoded again at every step.
    """

    def __init__(
        self,
        models: StepScorer | Sequence[StepScorer] | None,
        boundary: Boundary | str,
        tokenizer: PreTrainedTokenizerBase | None,
        end_ids: Collection[int] = (),
    ) -> None:
        """`end_ids`: tokens at which the policy stops, besides the end of a turn in the chat template."""
        self.models = (models,) if isinstance(models, StepScorer) else tuple(models or ())
        self.scale = ScoreScale.of(self.models)
        self.boundary = boundary_for(boundary) if isinstance(boundary, str) else boundary
        known = (m.tokenizer for m in self.models if isinstance(m, ProcessRewardModel))
        chosen = next((own for own in known if own is not None), None) if tokenizer is None else tokenizer
        if chosen is None:
            raise ValueError("give a tokenizer: the reward model does not carry one")
        self.format = ChatFormat(chosen, end_ids)
        self.vocabulary = TokenTexts(chosen)
        self._openers = [self._opener(model) for model in self.models]

    def follow(self) -> ScorerGroup:
        """Scorers that follow no answer yet."""
        return ScorerGroup([opener() for opener in self._openers], self.scale.objectives)

    def _opener(self, model: StepScorer) -> Callable[[], StepFollower]:
        """How this model follows answers; what can be prepared for all of them is prepared here."""
        if not isinstance(model, AnswerScorer | TraceReader):
            raise ValueError(f"{type(model).__name__} cannot guide decoding")
        if not isinstance(model, ProcessRewardModel):
            return lambda: TextScorer(model, self.boundary, self.vocabulary)
        difference = tokenizer_difference(model, self.format.tokenizer)
        if difference is not None:
            logger.warning(
                "the reward model of %s reads text, all of it again at every step: its %s",
                ", ".join(model.objectives),
                difference,
            )
            faster = OneDNNRewardModel(model)
            return lambda: TextScorer(model, self.boundary, self.vocabulary, faster)
        backbones = cached_backbones(model)
        return lambda: CachedScorer(model, backbones, self.boundary, self.format, self.vocabulary)

    def check(self, request: GuidedRequest, scorers: ScorerGroup, limit: int, whose: str) -> Prompt:
        """The request's prompt, encoded once. ValueError if it cannot be answered as it asks, or has `limit`
        tokens or more, the most that the `whose` reads."""
        messages = [Message.model_validate(message) for message in request.messages]
        self._check_guidance(request)
        if request.is_guided:
            scorers.check(messages)
        prompt = Prompt(messages, self.format.prompt_ids(messages))
        if len(prompt.token_ids) >= limit:
            raise PromptTooLong(
                f"the prompt has {len(prompt.token_ids)} tokens and the {whose} {limit}: there is no room "
                "for an answer"
            )
        return prompt

    def _check_guidance(self, request: GuidedRequest) -> None:
        if not request.is_guided:
            if request.guidance is not None and request.strategy == "none":
                raise ValueError("guidance was given with strategy 'none', which does not use it")
            if request.aggregation.kind != "sum" and request.strategy == "none":
                raise ValueError("an aggregation was given with strategy 'none', which does not use it")
            return
        if not self.models:
            raise ValueError(f"strategy '{request.strategy}' needs a reward model; this decoder has none")
        request.guidance_over(self.scale.objectives).over(self.scale.objectives)
        check_aggregation(request.aggregation, self.scale.objectives)
        if request.aggregation.kind == "thresholds" and not self.scale.is_calibrated:
            raise ValueError(
                "thresholds are in calibrated units, and not all reward models of "
                f"{', '.join(self.scale.objectives)} carry a within-prompt spread: calibrate them with groups"
            )
        if request.standardisation == "calibrated" and not self.scale.is_calibrated:
            raise ValueError(
                "standardisation 'calibrated' needs the within-prompt spread of every objective, which not "
                f"all reward models of {', '.join(self.scale.objectives)} carry: use 'within_candidates'"
            )


def follow_texts(models: Sequence[StepScorer]) -> ScorerGroup:
    """Scorers of answers that come as text alone, each of one step: those of an endpoint, for example."""
    followers = []
    for model in models:
        if not isinstance(model, AnswerScorer | TraceReader):
            raise ValueError(f"{type(model).__name__} cannot score candidates")
        faster = OneDNNRewardModel(model) if isinstance(model, ProcessRewardModel) else nullcontext
        followers.append(TextScorer(model, None, None, faster))
    return ScorerGroup(followers, ScoreScale.of(models).objectives)


def tokenizer_difference(model: ProcessRewardModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why this model cannot read the tokens of a policy with this tokenizer; None if it can."""
    own = model.tokenizer
    if own is None or own is tokenizer:
        return None
    if own.get_vocab() != tokenizer.get_vocab():
        return "vocabulary is not the policy's"
    return "chat template is not the policy's" if own.chat_template != tokenizer.chat_template else None
