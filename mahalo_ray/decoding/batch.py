"""Many conversations at once over one policy: the engine under rollouts, evaluation and serving.

Conversations are token-exact: what was appended and what was sampled is kept as token ids and never
re-tokenised.
    rows = engine.add(2, weights)
    engine.append(rows, prompts)                               # ragged prefill
    candidates = engine.sample(rows, num_candidates=6, ...)    # 12 branches over 2 shared trunks
    engine.accept(candidates, [3, 0])                          # the chosen branch becomes part of its trunk
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mahalo_ray.decoding.cache import RaggedCache
from mahalo_ray.decoding.candidates import Candidates
from mahalo_ray.decoding.decode import BranchDecoder
from mahalo_ray.decoding.policy import Policy, as_policy
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.decoding.stopping import TextStop
from mahalo_ray.models.multi_head import MultiHeadCausalLM
from mahalo_ray.objectives import Weights


class BatchedConversations:
    """N conversations over one policy. Row numbers are given out by `add` and stay valid until `drop`.

    `prefill_tokens` bounds rows * width of one prefill forward, so that long prompts do not explode
    activations.
    """

    def __init__(
        self,
        policy: Policy | MultiHeadCausalLM | PreTrainedModel,
        max_context: int | None = None,
        prefill_tokens: int = 16384,
    ) -> None:
        policy = as_policy(policy)
        self.policy = policy
        self.max_context = policy.max_context if max_context is None else max_context
        if self.max_context > policy.max_context:
            raise ValueError(
                f"max_context is {max_context}, but the model was built for {policy.max_context} tokens"
            )
        self.cache = RaggedCache()
        self.tokens_forwarded = 0  # through the model, padding not counted: what decoding costs
        self.peak_bytes = 0
        self._prefill_tokens = prefill_tokens
        self._next_row = 0
        self._slot: dict[int, int] = {}
        self._row_at: list[int] = []
        self._ids: dict[int, list[int]] = {}
        self._pending: dict[int, list[int]] = {}  # tokens of the conversation the model has not seen yet
        self._weights: dict[int, Weights | None] = {}
        self._last_hidden: Tensor | None = (
            None  # [slots, D]: what the next token of every row is predicted from
        )

    def __len__(self) -> int:
        return len(self._slot)

    def add(self, count: int, weights: Weights | Sequence[Weights | None] | None = None) -> list[int]:
        """`count` new empty conversations; weights over the policy's heads for all of them, or one each."""
        each = [weights] * count if weights is None or isinstance(weights, Weights) else list(weights)
        if len(each) != count:
            raise ValueError(f"{count} conversations but {len(each)} weight vectors")
        rows = list(range(self._next_row, self._next_row + count))
        self._next_row += count
        for row, slot, weight in zip(rows, self.cache.add(count), each, strict=True):
            self._slot[row] = int(slot)
            self._row_at.append(row)
            self._ids[row], self._pending[row], self._weights[row] = [], [], weight
        return rows

    def drop(self, rows: Sequence[int]) -> None:
        """Forget conversations and free their memory for new ones."""
        moved = self.cache.drop(self._slots(rows))
        for row in rows:
            for table in (self._slot, self._ids, self._pending, self._weights):
                table.pop(row)
        for old, new in moved.items():
            self._row_at[new] = self._row_at[old]
            self._slot[self._row_at[new]] = new
            if self._last_hidden is not None:
                self._last_hidden[new] = self._last_hidden[old]
        del self._row_at[self.cache.num_rows :]

    def duplicate(self, rows: Sequence[int]) -> list[int]:
        """Copies of conversations that go on independently (the trunk is copied: beam search needs it)."""
        copies = self.add(len(rows), [self._weights[row] for row in rows])
        slots, new = self._slots(rows), self._slots(copies)
        self.cache.copy(slots, new)
        for row, copy in zip(rows, copies, strict=True):
            self._ids[copy], self._pending[copy] = list(self._ids[row]), list(self._pending[row])
        if self._last_hidden is not None:
            self._grow_hidden(self._last_hidden)
            self._last_hidden[torch.from_numpy(new)] = self._last_hidden[torch.from_numpy(slots)]
        return copies

    def token_ids(self, row: int) -> list[int]:
        """The whole conversation so far, exactly as appended and sampled."""
        return list(self._ids[row])

    def length(self, row: int) -> int:
        return len(self._ids[row])

    def set_weights(self, rows: Sequence[int], weights: Weights | None) -> None:
        """Other weights from here on. The cache stays: heads act on hidden states only."""
        for row in rows:
            self._weights[row] = weights

    def append(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]]) -> None:
        """Add given tokens to conversations: prompts, headers, the other speaker's turns. Several calls add
        up.

        ValueError if a conversation would not fit the model's context.
        """
        for row, ids in zip(rows, token_ids, strict=True):
            if len(self._ids[row]) + len(ids) > self.max_context:
                raise ValueError(
                    f"the text does not fit: {len(self._ids[row])} tokens and {len(ids)} new ones exceed the "
                    f"context of {self.max_context}"
                )
        for row, ids in zip(rows, token_ids, strict=True):
            self._ids[row] += ids
            self._pending[row] += ids
        self._prefill(rows)

    def sample(
        self,
        rows: Sequence[int],
        num_candidates: int,
        params: SamplingParams | Sequence[SamplingParams],
        seeds: Sequence[int],
        max_new_tokens: int | Sequence[int],
        stop_ids: Collection[int],
        stop: TextStop | None = None,
        with_logps: bool = False,
    ) -> Candidates:
        """`num_candidates` continuations of every row, decoded together until each one stops.

        A candidate ends with a token of `stop_ids` (kept as its last token), where `stop` says its text ends,
        after max_new_tokens, or where the context is full. Draws depend on the row's seed, its length and the
        candidate's number only. The conversations do not change until `accept`.
        """
        if num_candidates < 1:
            raise ValueError(f"num_candidates is {num_candidates}: it must be at least 1")
        count = len(rows)
        limits = np.array(
            [max_new_tokens] * count if isinstance(max_new_tokens, int) else list(max_new_tokens)
        )
        if (limits < 1).any():
            raise ValueError(f"max_new_tokens is {int(limits.min())}: it must be at least 1")
        if not rows:
            raise ValueError("no conversations to sample: rows is empty")
        self._prefill(rows)
        empty = [row for row in rows if not self._ids[row]]
        if empty:
            raise ValueError(f"conversation {empty[0]} is empty: append a prompt before sampling")
        # Slot order: all live rows, in whatever order they are asked for, are then one slice of the cache.
        slots = self._slots(rows)
        order = np.argsort(slots, kind="stable")
        each = [params] * count if isinstance(params, SamplingParams) else list(params)
        assert self._last_hidden is not None
        decoder = BranchDecoder(
            self.policy,
            self.cache.fork(slots[order], num_candidates),
            self._last_hidden[torch.from_numpy(slots[order]).to(self.policy.device)],
            [self._weights[rows[i]] for i in order],
            [each[i] for i in order],
            [seeds[i] for i in order],
            limits[order],
            self.max_context,
            stop_ids,
            None if stop is None else stop.reordered(order),
            with_logps,
        )
        decoded = decoder.run()
        self.tokens_forwarded += decoder.tokens_forwarded
        self.peak_bytes = max(self.peak_bytes, self.cache.nbytes + decoder.branches.nbytes)
        return Candidates.gathered(decoded, list(rows), order, num_candidates)

    def accept(self, candidates: Candidates, choice: Sequence[int]) -> None:
        """Make candidate choice[i] of the i-th sampled row part of its conversation (-1: none of them).

        Copies only the chosen tokens' keys and values. Rows must not have been appended to or dropped in
        between.
        """
        slots, cells, counts = [], [], []
        for at, (row, chosen) in enumerate(zip(candidates.rows, choice, strict=True)):
            if chosen < 0:
                continue
            ids = candidates.token_ids[at][chosen]
            if len(self._ids[row]) != candidates.base_lengths[at]:
                raise ValueError(f"conversation {row} changed since its candidates were sampled")
            self._ids[row] += ids
            # The model has not seen the last token yet: it goes in with whatever comes next.
            self._pending[row] += ids[-1:]
            slots.append(self._slot[row])
            cells.append(candidates.cell(at, chosen))
            counts.append(max(len(ids) - 1, 0))
        self.cache.accept(
            np.array(slots, dtype=np.int64), candidates.parts, np.array(cells), np.array(counts)
        )

    def _prefill(self, rows: Sequence[int]) -> None:
        """Run all tokens of these rows that the model has not seen, in forwards of bounded size."""
        waiting = sorted((row for row in rows if self._pending[row]), key=self._slot.__getitem__)
        while waiting:
            width, take = 0, 0
            for row in waiting:
                wider = max(width, len(self._pending[row]))
                if take and wider * (take + 1) > self._prefill_tokens:
                    break
                width, take = wider, take + 1
            now, waiting = waiting[:take], waiting[take:]
            counts = np.array([len(self._pending[row]) for row in now])
            ids = torch.zeros(len(now), width, dtype=torch.long)
            for at, row in enumerate(now):
                ids[at, : counts[at]] = torch.tensor(self._pending[row])
                self._pending[row] = []
            device, slots = self.policy.device, self._slots(now)
            view = self.cache.append(slots, counts, width)
            hidden = self.policy.hidden_states(ids.to(device), view.positions(width, device), view)
            view.commit()
            last = torch.from_numpy(counts - 1).to(device)
            self._keep_hidden(slots, hidden[torch.arange(len(now), device=device), last])
            self.tokens_forwarded += int(counts.sum())
        self.peak_bytes = max(self.peak_bytes, self.cache.nbytes)

    def _keep_hidden(self, slots: np.ndarray, hidden: Tensor) -> None:
        """hidden [n, D]: the last position of these rows."""
        self._grow_hidden(hidden)
        assert self._last_hidden is not None
        self._last_hidden[torch.from_numpy(slots)] = hidden

    def _grow_hidden(self, like: Tensor) -> None:
        known = 0 if self._last_hidden is None else len(self._last_hidden)
        if known < self.cache.num_rows:
            grown = like.new_zeros(max(self.cache.num_rows, 2 * known), like.shape[-1])
            if self._last_hidden is not None:
                grown[:known] = self._last_hidden
            self._last_hidden = grown

    def _slots(self, rows: Sequence[int]) -> np.ndarray:
        return np.array([self._slot[row] for row in rows], dtype=np.int64)
