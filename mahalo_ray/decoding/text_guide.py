"""Reward models of other makers as guides: they have a tokenizer of their own and keep no state.

The text of prompt and response is encoded again for every distinct candidate, all candidates of all requests
in common batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mahalo_ray.data.records import Message
from mahalo_ray.decoding.boundaries import Boundary
from mahalo_ray.decoding.candidates import StopReason
from mahalo_ray.decoding.guide import Prompt
from mahalo_ray.decoding.requests import StepCandidate
from mahalo_ray.decoding.stopping import Vocabulary, step_starts
from mahalo_ray.models.foreign import SequenceClassifierScorer
from mahalo_ray.models.scoring import TraceScorer


@dataclass
class _Text:
    """A response as a text guide knows it: its steps, the last of which may go on."""

    messages: Sequence[Message]
    steps: list[str] = field(default_factory=list)
    goes_on: bool = False

    def extended(self, pieces: Sequence[str]) -> list[str]:
        """The steps with these after them; the first piece may continue a step that was cut at its limit."""
        if self.goes_on:
            return [*self.steps[:-1], self.steps[-1] + pieces[0], *pieces[1:]]
        return [*self.steps, *pieces]


class TextGuide:
    """A scorer with a tokenizer of its own: a sequence or token classifier. Nothing is kept between steps."""

    max_context: int | None = None  # its limit is in its own tokens
    peak_bytes = 0

    def __init__(
        self, scorer: SequenceClassifierScorer | TraceScorer, boundary: Boundary, vocabulary: Vocabulary
    ) -> None:
        self._scorer, self._boundary, self._vocabulary = scorer, boundary, vocabulary
        self.tokens_forwarded = 0
        self._texts: dict[int, _Text] = {}
        self._next = 0

    def check(self, messages: Sequence[Message]) -> None:
        length, limit = self._length(messages, ("x",)), self._scorer.max_length
        if length > limit:
            raise ValueError(
                f"the prompt has {length} tokens for the reward model of "
                f"{', '.join(self._scorer.objectives)}, which reads {limit}"
            )

    def open(self, prompts: Sequence[Prompt]) -> list[int]:
        rows = list(range(self._next, self._next + len(prompts)))
        self._next += len(prompts)
        self._texts.update({r: _Text(prompt.messages) for r, prompt in zip(rows, prompts, strict=True)})
        return rows

    def score(
        self, rows: Sequence[int], offered: Sequence[Sequence[StepCandidate]], whole: Sequence[bool]
    ) -> tuple[Tensor, list[int]]:
        keys = [
            [self._key(self._texts[row], c, w) for c in own]
            for row, own, w in zip(rows, offered, whole, strict=True)
        ]
        lengths = [
            {key: self._length(self._texts[row].messages, key) for key in dict.fromkeys(own) if key}
            for row, own in zip(rows, keys, strict=True)
        ]
        fits = [max(own.values(), default=0) <= self._scorer.max_length for own in lengths]
        wanted = [(at, key) for at, own in enumerate(lengths) if fits[at] for key in own]
        found = dict(zip(wanted, self._scores([(self._texts[rows[a]], k) for a, k in wanted]), strict=True))
        scores = torch.full((len(rows), max(map(len, keys)), len(self._scorer.objectives)), float("nan"))
        for at, own in enumerate(keys):
            if fits[at]:
                # A response without words has no step to score: it is as bad as its worst rival.
                spoken = [found[at, key] for key in own if key]
                worst = torch.stack(spoken).amin(dim=0) if spoken else torch.zeros(scores.shape[-1])
                scores[at, : len(own)] = torch.stack([found[at, key] if key else worst for key in own])
        counts = [sum(own.values()) if fit else 0 for own, fit in zip(lengths, fits, strict=True)]
        self.tokens_forwarded += sum(counts)
        return scores, counts

    def accept(self, rows: Sequence[int], chosen: Sequence[StepCandidate]) -> None:
        for row, candidate in zip(rows, chosen, strict=True):
            text = self._texts[row]
            self._texts[row] = _Text(
                text.messages, text.extended([candidate.text]), candidate.reason is StopReason.LENGTH
            )

    def duplicate(self, rows: Sequence[int]) -> list[int]:
        copies = self.open([Prompt(self._texts[row].messages, []) for row in rows])
        self._texts.update({copy: self._texts[row] for row, copy in zip(rows, copies, strict=True)})
        return copies

    def drop(self, rows: Sequence[int]) -> None:
        for row in rows:
            del self._texts[row]

    def _key(self, text: _Text, candidate: StepCandidate, whole: bool) -> tuple[str, ...]:
        """What is read after the prompt: steps with words, or the whole answer for a sequence classifier."""
        if isinstance(self._scorer, SequenceClassifierScorer):
            answer = "".join([*text.steps, candidate.text])
            return (answer,) if answer.strip() else ()
        pieces = [candidate.text]
        if whole:
            ids = candidate.token_ids
            starts = [*step_starts(ids, self._boundary, self._vocabulary), len(ids)]
            pieces = [self._vocabulary.words(ids[a:b]) for a, b in itertools.pairwise(starts)]
        return tuple(step.strip() for step in text.extended(pieces) if step.strip())

    def _length(self, messages: Sequence[Message], steps: Sequence[str]) -> int:
        if isinstance(self._scorer, SequenceClassifierScorer):
            return len(self._scorer.encode(messages, steps[0])["input_ids"])
        return len(self._scorer.encoder.encode(messages, steps).input_ids)

    def _scores(self, wanted: Sequence[tuple[_Text, tuple[str, ...]]]) -> list[Tensor]:
        """[H] of the last step each."""
        scored = self._scorer.score_batch([(text.messages, steps) for text, steps in wanted])
        return [torch.tensor([own[name][-1] for name in self._scorer.objectives]) for own in scored]
