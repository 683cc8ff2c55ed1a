"""A process reward model that follows many conversations over kept caches and scores candidate steps.

Only new tokens ever go through its backbones: the prefix of every conversation is kept, K candidates are
scored as K branches over it in one forward, and the accepted candidate's keys and values become part of the
prefix.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mahalo_ray.data.records import Message
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.cpu_matmul import OneDNNHead
from mahalo_ray.decoding.guidance import GuidedRequest, ScoreScale, StepCandidate
from mahalo_ray.decoding.kv_cache import Branches, BranchRef, KVBlock, RaggedCache, RowTable, by_size, padded
from mahalo_ray.decoding.policy import CachedBackbone
from mahalo_ray.decoding.stopping import Boundary, StopReason, TokenTexts, step_starts
from mahalo_ray.models import lora
from mahalo_ray.models.classifiers import SequenceClassifierScorer
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.models.scoring import StepEncoder, StepScorer, TraceScorer

Ids = Sequence[int]


@dataclass
class _Scored:
    """The last scored candidates of one row: where their keys and values lie, for `accept`."""

    length: int
    distinct: list[tuple[int, ...]]
    parts: list[KVBlock]  # one per cache
    line: int  # in the parts
    last_states: Tensor | None  # [distinct, D']: the reference's state behind each candidate


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
        self._rows = RowTable()
        self._ids: dict[int, list[int]] = {}
        self._pending: dict[int, list[int]] = {}
        self._scored: dict[int, _Scored] = {}
        self._last_state: dict[
            int, Tensor
        ] = {}  # the reference's state [D'] that predicts a row's next token

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
            self._scored.pop(row, None)
            self._last_state.pop(row, None)

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
        return copies

    def append(self, rows: Sequence[int], token_ids: Sequence[Ids]) -> None:
        """Add text that is not scored: prompts, headers, the other speaker's turns. Encoded at the next
        scoring.
        """
        for row, ids in zip(rows, token_ids, strict=True):
            self._check_room(row, len(ids))
            self._ids[row] += ids
            self._pending[row] += ids

    def length(self, row: int) -> int:
        """Tokens of the conversation so far."""
        return len(self._ids[row])

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
        for piece in by_size(widest, self._budget):
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
        kept: list[tuple[int, _Scored, int]] = []
        for row, ids in zip(rows, token_ids, strict=True):
            scored = self._scored.pop(row, None)
            key = tuple(ids)
            if scored is None or scored.length != len(self._ids[row]) or key not in scored.distinct:
                self.append([row], [ids])
                continue
            which = scored.distinct.index(key)
            kept.append((row, scored, which))
            self._ids[row] += ids
            if scored.last_states is not None:
                self._last_state[row] = scored.last_states[which]
        slots = self._rows.slots([row for row, _, _ in kept])
        counts = np.array([len(scored.distinct[which]) for _, scored, which in kept])
        for number, cache in enumerate(self._caches):
            places = [BranchRef(scored.parts[number], scored.line, which) for _, scored, which in kept]
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
        ids, counts = padded([own for line in grid for own in line])
        width = ids.shape[1]
        ids, slots = ids.to(self.device), self._rows.slots(rows)
        states, parts = [], []
        for backbone, cache in zip(self._backbones, self._caches, strict=True):
            branches = Branches(cache, slots, columns)
            states.append(backbone(ids, branches.positions(width, self.device), branches))
            branches.advance(width)
            self.peak_bytes = max(self.peak_bytes, sum(c.nbytes for c in self._caches) + branches.nbytes)
            parts.append(branches.part())
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
        scores = self.model.activate(self.model.heads(features))[:, 0].float().cpu()
        self._remember(rows, distinct, parts, states[-1], ends, columns)
        return [scores[i * columns : i * columns + len(own)] for i, own in enumerate(distinct)]

    def _remember(
        self,
        rows: Sequence[int],
        distinct: Sequence[Sequence[tuple[int, ...]]],
        parts: list[KVBlock],
        reference_states: Tensor,
        ends: Tensor,
        columns: int,
    ) -> None:
        last = None
        if self.model.reference is not None:
            last = reference_states[torch.arange(len(ends), device=self.device), ends.clamp(min=0)]
        for i, (row, own) in enumerate(zip(rows, distinct, strict=True)):
            behind = None if last is None else last[i * columns : i * columns + len(own)]
            self._scored[row] = _Scored(len(self._ids[row]), list(own), parts, i, behind)

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
        for piece in by_size([len(self._pending[row]) for row in waiting], self._budget):
            now = waiting[piece]
            ids, counts = padded([self._pending[row] for row in now])
            slots, width = self._rows.slots(now), ids.shape[1]
            hidden = None
            for backbone, cache in zip(self._backbones, self._caches, strict=True):
                view = cache.append(slots, counts, width)
                hidden = backbone(ids.to(self.device), view.positions(width, self.device), view)
                view.commit()
            assert hidden is not None
            self.tokens_forwarded += int(counts.sum())
            if self.model.reference is not None:
                last = hidden[torch.arange(len(now)), torch.from_numpy(counts - 1)]
                self._last_state.update(zip(now, last.unbind(0), strict=True))
            self._pending.update({row: [] for row in now})
            self.peak_bytes = max(self.peak_bytes, sum(cache.nbytes for cache in self._caches))

    def _check_room(self, row: int, count: int) -> None:
        if len(self._ids[row]) + count > self.max_context:
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


# Room for the tokens that close a step the policy left open, when it is scored.
CLOSING_ROOM = 16
_OPEN = (StopReason.STEP, StopReason.LENGTH, StopReason.CONTEXT)


@dataclass(frozen=True)
class Prompt:
    """A conversation to be answered, as messages and as the policy's tokens."""

    messages: Sequence[Message]
    token_ids: list[int]


class Guide(Protocol):
    """One reward model that follows many responses. Row numbers are its own and valid until `drop`.

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

    def open(self, prompts: Sequence[Prompt]) -> list[int]: ...

    def score(
        self, rows: Sequence[int], offered: Sequence[Sequence[StepCandidate]], whole: Sequence[bool]
    ) -> tuple[Tensor, list[int]]:
        """Scores [N, K, H] of every candidate (NaN beyond a row's own, and for a row whose text has become
        too long) and the tokens encoded for every row. whole[i]: candidates of row i are whole responses, of
        which the last step counts."""
        ...

    def accept(self, rows: Sequence[int], chosen: Sequence[StepCandidate]) -> None: ...

    def duplicate(self, rows: Sequence[int]) -> list[int]: ...

    def drop(self, rows: Sequence[int]) -> None: ...


class CachedGuide:
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
        self._followed = RewardConversations(model, backbones)
        self.max_context: int | None = self._followed.max_context - CLOSING_ROOM
        self._unread: dict[int, int] = {}  # tokens of prompts that the first scoring will encode

    @property
    def tokens_forwarded(self) -> int:
        return self._followed.tokens_forwarded

    @property
    def peak_bytes(self) -> int:
        return self._followed.peak_bytes

    def check(self, messages: Sequence[Message]) -> None:
        """Whatever the policy can read."""

    def open(self, prompts: Sequence[Prompt]) -> list[int]:
        rows = self._followed.add(len(prompts))
        self._followed.append(rows, [prompt.token_ids for prompt in prompts])
        self._unread.update({row: len(p.token_ids) for row, p in zip(rows, prompts, strict=True)})
        return rows

    def score(
        self, rows: Sequence[int], offered: Sequence[Sequence[StepCandidate]], whole: Sequence[bool]
    ) -> tuple[Tensor, list[int]]:
        views = [[self._as_scored(c, w) for c in own] for own, w in zip(offered, whole, strict=True)]
        ids = [[own_ids for own_ids, _ in own] for own in views]
        starts = [[start for _, start in own] for own in views]
        scores = self._followed.score_candidates(rows, ids, starts)
        distinct = [sum(map(len, set(map(tuple, own)))) for own in ids]
        return scores, [self._unread.pop(row, 0) + count for row, count in zip(rows, distinct, strict=True)]

    def accept(self, rows: Sequence[int], chosen: Sequence[StepCandidate]) -> None:
        self._followed.accept(rows, [candidate.token_ids for candidate in chosen])

    def duplicate(self, rows: Sequence[int]) -> list[int]:
        return self._followed.duplicate(rows)

    def drop(self, rows: Sequence[int]) -> None:
        self._followed.drop(rows)
        for row in rows:
            self._unread.pop(row, None)

    def _as_scored(self, candidate: StepCandidate, whole: bool) -> tuple[list[int], int]:
        """Token ids as the reward model learned to read them, and where the step to score begins in them.

        Where steps end with a separator, a response that ended without one is given it, as in training.
        """
        ids = candidate.token_ids
        start = step_starts(ids, self._boundary, self._vocabulary)[-1] if whole else 0
        if self._encoder.separator is None or candidate.reason in _OPEN:
            return ids, start
        return ids[:start] + self._encoder.step_ids(self._encoder.format.decode(ids[start:])), start


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
        self, scorer: SequenceClassifierScorer | TraceScorer, boundary: Boundary, vocabulary: TokenTexts
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


class Guides:
    """All reward models of a session side by side; their objectives follow each other."""

    def __init__(
        self,
        scorers: Sequence[StepScorer],
        backbones: Sequence[Sequence[CachedBackbone]],
        boundary: Boundary,
        chat: ChatFormat,
        vocabulary: TokenTexts,
    ) -> None:
        self.scale = ScoreScale.of(scorers)
        self._guides: list[Guide] = []
        for scorer, own in zip(scorers, backbones, strict=True):
            if isinstance(scorer, ProcessRewardModel):
                self._guides.append(CachedGuide(scorer, own, boundary, chat, vocabulary))
            elif isinstance(scorer, SequenceClassifierScorer | TraceScorer):
                self._guides.append(TextGuide(scorer, boundary, vocabulary))
            else:
                raise ValueError(f"{type(scorer).__name__} cannot guide decoding")
        self._rows: dict[int, tuple[int, ...]] = {}
        self._next = 0

    @property
    def max_context(self) -> int | None:
        """Most tokens of the policy that a conversation may have; None: no limit."""
        return min((g.max_context for g in self._guides if g.max_context is not None), default=None)

    @property
    def tokens_forwarded(self) -> int:
        """Tokens encoded by all of them."""
        return sum(guide.tokens_forwarded for guide in self._guides)

    @property
    def peak_bytes(self) -> int:
        """Most bytes of keys and values kept."""
        return sum(guide.peak_bytes for guide in self._guides)

    def check(self, messages: Sequence[Message]) -> None:
        """ValueError for a prompt that one of the models cannot read."""
        for guide in self._guides:
            guide.check(messages)

    def open(self, prompts: Sequence[Prompt]) -> list[int]:
        """Rows that follow the responses to these prompts."""
        return self._numbered([guide.open(prompts) for guide in self._guides])

    def score(
        self, rows: Sequence[int], offered: Sequence[Sequence[StepCandidate]], whole: Sequence[bool]
    ) -> tuple[Tensor, list[int]]:
        """As `Guide.score`, for all objectives."""
        each = [
            guide.score(own, offered, whole) for guide, own in zip(self._guides, self._own(rows), strict=True)
        ]
        return torch.cat([scores for scores, _ in each], dim=-1), [
            sum(counts) for counts in zip(*(counts for _, counts in each), strict=True)
        ]

    def accept(self, rows: Sequence[int], chosen: Sequence[StepCandidate]) -> None:
        """These candidates are now part of the responses."""
        for guide, own in zip(self._guides, self._own(rows), strict=True):
            guide.accept(own, chosen)

    def duplicate(self, rows: Sequence[int]) -> list[int]:
        """Rows of copies that go on independently."""
        return self._numbered(
            [guide.duplicate(own) for guide, own in zip(self._guides, self._own(rows), strict=True)]
        )

    def drop(self, rows: Sequence[int]) -> None:
        """Forget rows."""
        for guide, own in zip(self._guides, self._own(rows), strict=True):
            guide.drop(own)
        for row in rows:
            del self._rows[row]

    def _own(self, rows: Sequence[int]) -> list[list[int]]:
        """The same rows in each guide's numbers."""
        return [[self._rows[row][at] for row in rows] for at in range(len(self._guides))]

    def _numbered(self, each: Sequence[Sequence[int]]) -> list[int]:
        given = list(zip(*each, strict=True))
        rows = list(range(self._next, self._next + len(given)))
        self._next += len(given)
        self._rows.update(zip(rows, given, strict=True))
        return rows


def check_guidance(request: GuidedRequest, guides: Guides | None, messages: Sequence[Message]) -> None:
    """ValueError if this request cannot be guided as it asks."""
    if not request.is_guided:
        if request.guidance is not None and request.strategy == "none":
            raise ValueError("guidance was given with strategy 'none', which does not use it")
        return
    if guides is None:
        raise ValueError(f"strategy '{request.strategy}' needs a reward model; this decoder has none")
    scale = guides.scale
    request.guidance_over(scale.objectives).over(scale.objectives)
    if request.standardisation == "calibrated" and not scale.is_calibrated:
        raise ValueError(
            "standardisation 'calibrated' needs the within-prompt spread of every objective, which not all "
            f"reward models of {', '.join(scale.objectives)} carry: use 'within_candidates'"
        )
    guides.check(messages)


def backbones_of(scorers: Sequence[StepScorer]) -> list[list[CachedBackbone]]:
    """The checked backbones of those that keep a cache; made once, used by every session."""
    return [cached_backbones(s) if isinstance(s, ProcessRewardModel) else [] for s in scorers]
