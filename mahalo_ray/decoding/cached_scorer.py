"""A process reward model over kept caches: it follows many conversations in the policy's own tokens.

Only new tokens ever go through its backbones: the prefix of every conversation is kept, K candidates are
scored as K branches over it in one forward, and the accepted candidate's keys and values become part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor

from mahalo_ray.data.records import Message
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.cached_backbone import CachedBackbone, memory_errors_alike
from mahalo_ray.decoding.cpu_matmul import OneDNNHead
from mahalo_ray.decoding.guidance import Choice, ChoiceScores, Prompt, StepCandidate, TextOutgrown
from mahalo_ray.decoding.kv_cache import (
    Branches,
    BranchRef,
    KVBlock,
    RaggedCache,
    SlotTable,
    pad_right,
    split_by_size,
)
from mahalo_ray.decoding.stopping import Boundary, TokenTexts, step_starts
from mahalo_ray.models import lora
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.models.reward_heads import span_features
from mahalo_ray.models.scoring import StepEncoder

Ids = Sequence[int]

# Room for the tokens that close a candidate, when it is scored.
CLOSING_ROOM = 16


@dataclass(frozen=True)
class _Span:
    """What heads need of the tokens of spans, however many forwards read them: sums of the states [n, D],
    numbers of tokens [n], sums and minima of the log-probs [n]."""

    states: Tensor
    counts: Tensor
    logps: Tensor
    least_logps: Tensor

    @classmethod
    def of(cls, hidden: Tensor, logps: Tensor | None, first: Tensor, end: Tensor) -> _Span:
        """Tokens first..end (exclusive, [n]) of hidden [n, T, D] and logps [n, T]."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        inside = (positions >= first[:, None]) & (positions < end[:, None])
        if logps is None:
            logps = torch.zeros(inside.shape, device=hidden.device)
        values = logps.masked_fill(~inside, 0.0)
        states = (hidden.float() * inside[..., None]).sum(dim=1)
        return cls(states, inside.sum(dim=1), values.sum(dim=1), values.amin(dim=1))

    def __getitem__(self, index: Tensor | int) -> _Span:
        return _Span(self.states[index], self.counts[index], self.logps[index], self.least_logps[index])

    def after(self, earlier: _Span) -> _Span:
        """These spans, each with the tokens of an earlier one before it."""
        return _Span(
            earlier.states + self.states,
            earlier.counts + self.counts,
            earlier.logps + self.logps,
            torch.minimum(earlier.least_logps, self.least_logps),
        )

    @classmethod
    def stack(cls, spans: Sequence[_Span]) -> _Span:
        columns = zip(*((s.states, s.counts, s.logps, s.least_logps) for s in spans), strict=True)
        return cls(*(torch.stack(column) for column in columns))


@dataclass
class _Scored:
    """The last scored candidates of one row: where their keys and values lie, for `accept`."""

    length: int
    distinct: list[tuple[int, ...]]
    parts: list[KVBlock]  # one per cache
    line: int  # in the parts
    last_states: Tensor | None  # [distinct, D']: the reference's state behind each candidate
    answers: _Span | None  # the answer up to and with each candidate, where objectives read whole answers


class RewardConversations:
    """Scores candidates of N conversations. Rows as in `Engine`: add, append, accept, drop.

    Puts the model into evaluation mode; its parameters must not change while rows are kept.
    `forward_tokens` bounds rows * width of one forward.
    """

    def __init__(
        self,
        model: ProcessRewardModel,
        backbones: Sequence[CachedBackbone] | None = None,
        forward_tokens: int = 16384,
    ) -> None:
        """`backbones`: those of `cached_backbones(model)`, made before (None: made here)."""
        self.model = model.eval()
        self.objectives = model.objectives
        self.device = model.device
        self._backbones = cached_backbones(model) if backbones is None else list(backbones)
        self._caches = [RaggedCache() for _ in self._backbones]
        self.max_context = min(backbone.max_context for backbone in self._backbones)
        self.tokens_forwarded = 0  # new tokens, each counted once however many backbones read it
        self.peak_bytes = 0
        text = model.config.get_text_config()
        self._fast_head = OneDNNHead(text.hidden_size, text.vocab_size)
        self._budget = forward_tokens
        self._rows = SlotTable()
        self._ids: dict[int, list[int]] = {}
        self._pending: dict[int, list[int]] = {}
        self._scored: dict[int, _Scored] = {}
        # The reference's state [D'] that predicts a row's next token.
        self._last_state: dict[int, Tensor] = {}
        # Preferences are scored from the beginning of the answer: what was read of it, and how many of the
        # pending tokens are the answer's. Kept only for models with such an objective.
        self._answers: dict[int, _Span] = {}
        self._pending_answer: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, count: int) -> list[int]:
        """`count` new empty conversations."""
        rows = self._rows.add(count)
        for cache in self._caches:
            cache.add(count)
        for row in rows:
            self._ids[row], self._pending[row] = [], []
        return rows

    def drop(self, rows: Sequence[int]) -> None:
        """Forget conversations and free their memory for new ones."""
        moves = self._rows.drop(rows)
        for cache in self._caches:
            cache.drop(len(rows), moves)
        for row in rows:
            del self._ids[row], self._pending[row]
            for table in (self._scored, self._last_state, self._answers, self._pending_answer):
                table.pop(row, None)

    def duplicate(self, rows: Sequence[int]) -> list[int]:
        """Copies of conversations that go on independently, their scored candidates included."""
        copies = self.add(len(rows))
        for cache in self._caches:
            cache.copy(self._rows.slots(rows), self._rows.slots(copies))
        for row, copy in zip(rows, copies, strict=True):
            self._ids[copy], self._pending[copy] = list(self._ids[row]), list(self._pending[row])
            if row in self._scored:
                self._scored[copy] = self._scored[row]
            if row in self._last_state:
                self._last_state[copy] = self._last_state[row]
            if row in self._answers:
                self._answers[copy] = self._answers[row]
            self._pending_answer[copy] = self._pending_answer.get(row, 0)
        return copies

    def append(self, rows: Sequence[int], token_ids: Sequence[Ids]) -> None:
        """Add text that is not scored: prompts, headers, the other speaker's turns. Encoded at the next
        scoring. A new answer begins behind it.
        """
        for row, ids in zip(rows, token_ids, strict=True):
            self._extend(row, ids)
            self._answers.pop(row, None)
            self._pending_answer[row] = 0

    def fits(self, row: int, count: int) -> bool:
        """Whether the model can read `count` more tokens."""
        return len(self._ids[row]) + count <= self.max_context

    def _extend(self, row: int, ids: Ids) -> None:
        self._check_room(row, len(ids))
        self._ids[row] += ids
        self._pending[row] += ids

    @torch.no_grad()
    def score_candidates(
        self,
        rows: Sequence[int],
        candidates: Sequence[Sequence[Ids]],
        starts: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """Scores [N, K, H] (activated, fp32, on the CPU; NaN where a row has fewer than K candidates) of
        every candidate as the next step of its conversation. Candidates with the same tokens are scored once.

        starts[i][k] > 0: the scored step begins there in the candidate, after earlier steps (best of N).
        """
        self._prefill(rows)
        distinct: list[list[tuple[int, ...]]] = []
        for row, own in zip(rows, candidates, strict=True):
            if any(len(ids) == 0 for ids in own):
                raise ValueError("a candidate without tokens cannot be scored")
            self._check_room(row, max(map(len, own)))
            distinct.append(list(dict.fromkeys(map(tuple, own))))
        first = (
            [_starts_of(own, own_starts) for own, own_starts in zip(candidates, starts, strict=True)]
            if starts
            else None
        )
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        order = self._rows.in_slot_order(rows).tolist()
        widest = [len(distinct[i]) * max(map(len, distinct[i])) for i in order]
        for piece in split_by_size(widest, self._budget):
            places = order[piece]
            scores = self._score(
                [rows[i] for i in places],
                [distinct[i] for i in places],
                None if first is None else [first[i] for i in places],
            )
            for i, own_scores in zip(places, scores, strict=True):
                found[i] = own_scores
        most = max(len(own) for own in candidates)
        result = torch.full((len(rows), most, len(self.objectives)), float("nan"))
        for i, own in enumerate(candidates):
            result[i, : len(own)] = found[i][[distinct[i].index(tuple(ids)) for ids in own]]
        return result

    def accept(self, rows: Sequence[int], token_ids: Sequence[Ids]) -> None:
        """These tokens are now part of the conversations. Those just scored are not encoded again."""
        known: list[tuple[int, _Scored, int]] = []
        for row, ids in zip(rows, token_ids, strict=True):
            scored = self._scored.pop(row, None)
            key = tuple(ids)
            if scored is None or scored.length != len(self._ids[row]) or key not in scored.distinct:
                self._extend(row, ids)
                self._pending_answer[row] = self._pending_answer.get(row, 0) + len(ids)
                continue
            which = scored.distinct.index(key)
            known.append((row, scored, which))
            self._ids[row] += ids
            if scored.last_states is not None:
                self._last_state[row] = scored.last_states[which]
            if scored.answers is not None:
                self._answers[row] = scored.answers[which]
        slots = self._rows.slots([row for row, _, _ in known])
        counts = np.array([len(scored.distinct[which]) for _, scored, which in known])
        for number, cache in enumerate(self._caches):
            places = [BranchRef(scored.parts[number], scored.line, which) for _, scored, which in known]
            cache.accept(slots, places, counts)

    def _score(
        self,
        rows: Sequence[int],
        distinct: Sequence[Sequence[tuple[int, ...]]],
        starts: Sequence[Sequence[int]] | None,
    ) -> list[Tensor]:
        """Scores [distinct candidates, H] per row, one forward. The grid is as wide as the row with most of
        them.
        """
        columns = max(map(len, distinct))
        grid = [list(own) + [()] * (columns - len(own)) for own in distinct]
        ids, counts = pad_right([own for line in grid for own in line])
        width = ids.shape[1]
        ids, slots = ids.to(self.device), self._rows.slots(rows)
        states, parts = [], []
        for backbone, cache in zip(self._backbones, self._caches, strict=True):
            branches = Branches(cache, slots, columns)
            states.append(backbone(ids, branches.positions(width, self.device), branches))
            branches.advance(width)
            self.peak_bytes = max(self.peak_bytes, sum(c.nbytes for c in self._caches) + branches.nbytes)
            parts.append(branches.block())
        self.tokens_forwarded += int(counts.sum())
        ends = torch.from_numpy(counts - 1).to(self.device)
        logps = None
        if self.model.reference is not None:
            before = torch.stack([self._last_state[row] for row in rows]).repeat_interleave(columns, dim=0)
            logps = self._token_logps(torch.cat([before[:, None], states[-1][:, :-1]], dim=1), ids, ends)
        begin = torch.zeros_like(ends)
        if starts is not None:
            flat = [own[k] if k < len(own) else 0 for own in starts for k in range(columns)]
            begin = torch.tensor(flat, device=self.device)
        features = self.model.step_features(states[0], logps, begin[:, None], ends[:, None])
        answers = self._with_earlier(
            rows, _Span.of(states[0], logps, torch.zeros_like(ends), ends + 1), columns
        )
        of_answers = None if answers is None else self._answer_features(states[0], answers, ends)[:, None]
        scores = self.model.activate(self.model.heads(features, of_answers))[:, 0].float().cpu()
        self._remember(rows, distinct, parts, states[-1], ends, columns, answers)
        return [scores[i * columns : i * columns + len(own)] for i, own in enumerate(distinct)]

    def _with_earlier(self, rows: Sequence[int], spans: _Span, columns: int) -> _Span | None:
        """The rows' answers so far, each continued by its candidates' spans [N * columns]; None if no
        objective reads whole answers."""
        if not self.model.heads.reads_answers:
            return None
        nothing = _Span(*(torch.zeros_like(t[0]) for t in vars(spans).values()))
        earlier = _Span.stack([self._answers.get(row, nothing) for row in rows])
        repeated = torch.arange(len(rows), device=self.device).repeat_interleave(columns)
        return spans.after(earlier[repeated])

    def _answer_features(self, hidden: Tensor, answers: _Span, ends: Tensor) -> Tensor:
        """Head inputs [R, F] of the answers that end with the candidates, as one forward would give them."""
        inputs, counts = self.model.inputs, answers.counts.clamp(min=1)
        last = hidden[torch.arange(len(ends), device=self.device), ends.clamp(min=0)]
        statistics = torch.stack([answers.logps / counts, answers.least_logps, answers.logps], dim=-1)
        return span_features(
            last if "last" in inputs else None,
            (answers.states / counts[:, None]).to(hidden.dtype) if "pooled" in inputs else None,
            statistics if "reference_logps" in inputs else None,
        )

    def _remember(
        self,
        rows: Sequence[int],
        distinct: Sequence[Sequence[tuple[int, ...]]],
        parts: list[KVBlock],
        reference_states: Tensor,
        ends: Tensor,
        columns: int,
        answers: _Span | None,
    ) -> None:
        last = None
        if self.model.reference is not None:
            last = reference_states[torch.arange(len(ends), device=self.device), ends.clamp(min=0)]
        for i, (row, own) in enumerate(zip(rows, distinct, strict=True)):
            first = i * columns
            behind = None if last is None else last[first : first + len(own)]
            spans = None if answers is None else answers[torch.arange(first, first + len(own))]
            self._scored[row] = _Scored(len(self._ids[row]), list(own), parts, i, behind, spans)

    def _token_logps(self, predicting: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
        """Reference log-probs [R, S] of ids [R, S] from the states one position before them [R, S, D']."""
        real = torch.arange(ids.shape[1], device=self.device) <= ends[:, None]
        logps = torch.zeros(ids.shape, device=self.device)
        with self._fast_head():
            logps[real] = self.model.reference_logps(predicting[real], ids[real]).float()
        return logps

    @torch.no_grad()
    def _prefill(self, rows: Sequence[int]) -> None:
        waiting = [row for row in dict.fromkeys(rows) if self._pending[row]]
        waiting = [waiting[i] for i in self._rows.in_slot_order(waiting)]
        for piece in split_by_size([len(self._pending[row]) for row in waiting], self._budget):
            now = waiting[piece]
            ids, counts = pad_right([self._pending[row] for row in now])
            slots, width = self._rows.slots(now), ids.shape[1]
            ids = ids.to(self.device)
            views = [cache.append(slots, counts, width) for cache in self._caches]
            states = [
                backbone(ids, view.positions(width, self.device), view)
                for backbone, view in zip(self._backbones, views, strict=True)
            ]
            for view in views:  # all or none: a forward may end for want of memory
                view.commit()
            self.tokens_forwarded += int(counts.sum())
            self._note_answers(now, states, ids, counts)
            if self.model.reference is not None:
                last = states[-1][torch.arange(len(now)), torch.from_numpy(counts - 1)]
                self._last_state.update(zip(now, last.unbind(0), strict=True))
            self._pending.update({row: [] for row in now})
            self.peak_bytes = max(self.peak_bytes, sum(cache.nbytes for cache in self._caches))

    def _note_answers(
        self, rows: Sequence[int], states: Sequence[Tensor], ids: Tensor, counts: np.ndarray
    ) -> None:
        """Add the last pending tokens of rows, as far as they belong to answers, to what was read of those:
        accepted steps that had been scored with other tokens, for example closed by a separator."""
        if not self.model.heads.reads_answers:
            return
        theirs = [at for at, row in enumerate(rows) if self._pending_answer.get(row)]
        if theirs:
            index = torch.tensor(theirs, device=self.device)
            ends = torch.from_numpy(counts[theirs]).to(self.device)
            own = torch.tensor([self._pending_answer[rows[at]] for at in theirs], device=self.device)
            logps = None
            if self.model.reference is not None:
                before = states[-1][index].roll(1, dims=1)
                for line, at in enumerate(theirs):
                    if rows[at] in self._last_state:
                        before[line, 0] = self._last_state[rows[at]]
                logps = self._token_logps(before, ids[index], ends - 1)
            spans = _Span.of(states[0][index], logps, ends - own, ends)
            for line, at in enumerate(theirs):
                earlier = self._answers.get(rows[at])
                self._answers[rows[at]] = spans[line] if earlier is None else spans[line].after(earlier)
        self._pending_answer.update(dict.fromkeys(rows, 0))

    def _check_room(self, row: int, count: int) -> None:
        if not self.fits(row, count):
            raise ValueError(
                f"the text does not fit the reward model: {len(self._ids[row])} tokens and {count} new ones "
                f"exceed its context of {self.max_context}"
            )


def cached_backbones(model: ProcessRewardModel) -> list[CachedBackbone]:
    """The backbone, and, unless its own states serve it, the reference behind it: last is what predicts
    tokens.
    """
    own = CachedBackbone(model.backbone)
    reference = model.reference
    if reference is None or model.reference_is_backbone:
        return [own]
    if reference.backbone is not None:
        return [own, CachedBackbone(reference.backbone)]
    return [own, CachedBackbone(model.backbone, around=lambda: lora.adapter_disabled(model.backbone))]


def _starts_of(candidates: Sequence[Ids], starts: Sequence[int]) -> list[int]:
    """The start of each distinct candidate's last step, in the order of the distinct candidates."""
    found: dict[tuple[int, ...], int] = {}
    for ids, start in zip(candidates, starts, strict=True):
        found.setdefault(tuple(ids), start)
    return list(found.values())


class CachedScorer:
    """A process reward model over its own kept cache; it reads the policy's tokens as they are."""

    def __init__(
        self,
        model: ProcessRewardModel,
        backbones: Sequence[CachedBackbone],
        boundary: Boundary,
        chat: ChatFormat,
        vocabulary: TokenTexts,
    ) -> None:
        self._encoder = StepEncoder(chat.tokenizer, model.step_separator)
        self._boundary, self._vocabulary = boundary, vocabulary
        self._cache = RewardConversations(model, backbones)
        closing = 1 if model.step_separator is None else CLOSING_ROOM  # an end token, or a separator
        self.max_context: int | None = self._cache.max_context - closing
        self._unread: dict[int, int] = {}  # tokens that the next scoring will encode before the candidates

    @property
    def tokens_forwarded(self) -> int:
        return self._cache.tokens_forwarded

    @property
    def peak_bytes(self) -> int:
        return self._cache.peak_bytes

    def check(self, messages: Sequence[Message]) -> None:
        """Whatever the policy can read."""

    def open(self, prompts: Sequence[Prompt]) -> list[int]:
        rows = self._cache.add(len(prompts))
        self.hear(rows, prompts)
        return rows

    def score(self, choices: Sequence[Choice]) -> list[ChoiceScores]:
        views = [[self._as_read(choice, k) for k in range(len(choice.candidates))] for choice in choices]
        fits = [
            self._cache.fits(choice.row, max(len(ids) for ids, _ in view))
            for choice, view in zip(choices, views, strict=True)
        ]

        def score(numbers: Sequence[int]) -> list[Tensor]:
            scores = self._cache.score_candidates(
                [choices[n].row for n in numbers],
                [[ids for ids, _ in views[n]] for n in numbers],
                [[start for _, start in views[n]] for n in numbers],
            )
            return [own[: len(views[n])] for own, n in zip(scores, numbers, strict=True)]

        scored = score_each_alone(score, [n for n, fit in enumerate(fits) if fit])
        results = []
        for number, (choice, view) in enumerate(zip(choices, views, strict=True)):
            if number not in scored:
                results.append(ChoiceScores(TextOutgrown("the text has become too long for a reward model")))
                continue
            distinct = {tuple(ids) for ids, _ in view}
            tokens = self._unread.pop(choice.row, 0) + sum(map(len, distinct))
            results.append(ChoiceScores(scored[number], tokens))
        return results

    def accept(self, rows: Sequence[int], chosen: Sequence[StepCandidate]) -> None:
        self._cache.accept(rows, [candidate.token_ids for candidate in chosen])

    def hear(self, rows: Sequence[int], prompts: Sequence[Prompt]) -> None:
        self._cache.append(rows, [prompt.token_ids for prompt in prompts])
        for row, prompt in zip(rows, prompts, strict=True):
            self._unread[row] = self._unread.get(row, 0) + len(prompt.token_ids)

    def duplicate(self, rows: Sequence[int]) -> list[int]:
        return self._cache.duplicate(rows)

    def drop(self, rows: Sequence[int]) -> None:
        self._cache.drop(rows)
        for row in rows:
            self._unread.pop(row, None)

    def _as_read(self, choice: Choice, k: int) -> tuple[list[int], int]:
        """Token ids as the reward model learned to read them, and where the step to score begins in them."""
        ids = choice.candidates[k].token_ids
        start = step_starts(ids, self._boundary, self._vocabulary)[-1] if choice.is_whole else 0
        if not choice.is_closed(k):
            return ids, start
        if self._encoder.separator is None:
            return [*ids, *self._encoder.format.missing_end(ids)], start
        step = self._encoder.format.decode(ids[start:])
        return ids[:start] + self._encoder.step_ids(step), start


def score_each_alone(
    score: Callable[[Sequence[int]], list[Tensor]], numbers: Sequence[int]
) -> dict[int, Tensor | ValueError]:
    """Scores by number, all in one call; if that fails, each in a call of its own, so that an error stays
    with the choice it belongs to."""
    if not numbers:
        return {}
    try:
        with memory_errors_alike():
            return dict(zip(numbers, score(numbers), strict=True))
    except (ValueError, TemplateError, torch.OutOfMemoryError) as error:
        if len(numbers) == 1:
            return {numbers[0]: as_value_error(error)}
    results: dict[int, Tensor | ValueError] = {}
    for number in numbers:
        results |= score_each_alone(score, [number])
    return results


def as_value_error(error: ValueError | TemplateError | torch.OutOfMemoryError) -> ValueError:
    if isinstance(error, ValueError):
        return error
    if isinstance(error, TemplateError):
        return ValueError(f"the reward model's chat template cannot render this conversation: {error}")
    return ValueError("scoring the candidates needs more memory than there is: ask for fewer or shorter ones")
