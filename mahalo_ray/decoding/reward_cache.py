"""A process reward model that follows many conversations over kept caches and scores candidate steps.

Only new tokens ever go through its backbones: the trunk of every conversation is kept, K candidates are
scored as K branches over it in one forward, and the accepted candidate's keys and values become part of the
trunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mahalo_ray.decoding.branches import Branches
from mahalo_ray.decoding.cache import RaggedCache
from mahalo_ray.decoding.parts import Part, Place
from mahalo_ray.decoding.policy import CachedBackbone
from mahalo_ray.decoding.products import FastHead
from mahalo_ray.decoding.rows import RowTable, by_size, padded
from mahalo_ray.models import lora
from mahalo_ray.models.reward import ProcessRewardModel

Ids = Sequence[int]


@dataclass
class _Scored:
    """The last scored candidates of one row: where their keys and values lie, for `accept`."""

    length: int
    distinct: list[tuple[int, ...]]
    parts: list[Part]  # one per cache
    line: int  # in the parts
    last_states: Tensor | None  # [distinct, D']: the reference's state behind each candidate


class RewardConversations:
    """Scores candidates of N conversations. Rows as in `BatchedConversations`: add, append, accept, drop.

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
        self._fast_head = FastHead(text.hidden_size, text.vocab_size)
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
            places = [Place(scored.parts[number], scored.line, which) for _, scored, which in kept]
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
        parts: list[Part],
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
