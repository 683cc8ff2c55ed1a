"""Many conversations at once over one policy: the engine under rollouts, evaluation and serving.

Conversations are token-exact: what was appended and what was sampled is kept as token ids and never
re-tokenised.
    rows = engine.add(2, weights)
    engine.append(rows, prompts)                               # ragged prefill
    candidates = engine.sample(rows, num_candidates=6, ...)    # 12 branches over 2 shared prefixes
    engine.accept(candidates, [3, 0])                          # the chosen branch becomes part of its prefix
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mahalo_ray.decoding.kv_cache import RaggedCache, RowTable, by_size, padded
from mahalo_ray.decoding.policy import Policy, as_policy
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.decoding.stopping import Candidates, StopRule, TextStop, TokenTexts
from mahalo_ray.decoding.token_loop import BranchDecoder, CompactingDecoder, SampleRequest
from mahalo_ray.models.multi_head import MultiHeadCausalLM
from mahalo_ray.objectives import Weights


class Engine:
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
        self._rows = RowTable()
        self._ids: dict[int, list[int]] = {}
        self._pending: dict[int, list[int]] = {}  # tokens of the conversation the model has not seen yet
        self._weights: dict[int, Weights | None] = {}
        self._last_hidden: Tensor | None = (
            None  # [slots, D]: what the next token of every row is predicted from
        )

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, count: int, weights: Weights | Sequence[Weights | None] | None = None) -> list[int]:
        """`count` new empty conversations; weights over the policy's heads for all of them, or one each."""
        each = [weights] * count if weights is None or isinstance(weights, Weights) else list(weights)
        if len(each) != count:
            raise ValueError(f"{count} conversations but {len(each)} weight vectors")
        rows = self._rows.add(count)
        self.cache.add(count)
        for row, weight in zip(rows, each, strict=True):
            self._ids[row], self._pending[row], self._weights[row] = [], [], weight
        return rows

    def drop(self, rows: Sequence[int]) -> None:
        """Forget conversations and free their memory for new ones."""
        moves = self._rows.drop(rows)
        self.cache.drop(len(rows), moves)
        for table in (self._ids, self._pending, self._weights):
            for row in rows:
                table.pop(row)
        if self._last_hidden is not None and moves:
            source, target = zip(*moves, strict=True)
            self._last_hidden[list(target)] = self._last_hidden[list(source)]

    def duplicate(self, rows: Sequence[int]) -> list[int]:
        """Copies of conversations that go on independently (the prefix is copied: beam search needs it)."""
        copies = self.add(len(rows), [self._weights[row] for row in rows])
        slots, new = self._rows.slots(rows), self._rows.slots(copies)
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
        num_candidates: int | Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        seeds: Sequence[int],
        max_new_tokens: int | Sequence[int],
        stop_ids: Collection[int],
        stop: TextStop | None = None,
        with_logps: bool = False,
    ) -> Candidates:
        """`num_candidates` (one number, or one per row) continuations of every row, decoded together until
        each one stops.

        A candidate ends with a token of `stop_ids` (kept as its last token), where `stop` says its text ends,
        after max_new_tokens, or where the context is full. Draws depend on the row's seed, its length and the
        candidate's number only. The conversations do not change until `accept`.
        """
        count = len(rows)
        if not rows:
            raise ValueError("no conversations to sample: rows is empty")
        self._prefill(rows)
        forks = self.forks(
            rows,
            [num_candidates] * count if isinstance(num_candidates, int) else num_candidates,
            [params] * count if isinstance(params, SamplingParams) else params,
            seeds,
            [max_new_tokens] * count if isinstance(max_new_tokens, int) else max_new_tokens,
            [None] * count if stop is None else stop.rules,
        )
        vocabulary = None if stop is None else stop.vocabulary
        decoder = CompactingDecoder(self.policy, self.cache, self._rows, stop_ids, vocabulary, with_logps)
        candidates = decoder.run(forks)
        self.tokens_forwarded += decoder.tokens_forwarded
        self.track_peak(decoder.nbytes)
        return candidates

    def decoder(self, stop_ids: Collection[int], vocabulary: TokenTexts | None) -> BranchDecoder:
        """What decodes forks of this engine's rows that begin at different times."""
        return BranchDecoder(self.policy, self.cache, self._rows, stop_ids, vocabulary, with_logps=False)

    def forks(
        self,
        rows: Sequence[int],
        num_candidates: Sequence[int],
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        limits: Sequence[int],
        rules: Sequence[StopRule | None],
    ) -> list[SampleRequest]:
        """What is wanted of these rows, one of each per row. Rows may have one token that the model has not
        read. ValueError for an empty conversation, or counts below 1."""
        found = []
        each = zip(rows, num_candidates, params, seeds, limits, rules, strict=True)
        for row, count, sampling, seed, limit, rule in each:
            length, unread = len(self._ids[row]), self._pending[row]
            for name, value in (("num_candidates", count), ("max_new_tokens", limit)):
                if value < 1:
                    raise ValueError(f"{name} is {value}: it must be at least 1")
            if not length:
                raise ValueError(f"conversation {row} is empty: append a prompt before sampling")
            room = self.max_context - length
            last: Tensor | int
            if unread:
                (last,) = unread
            else:
                assert self._last_hidden is not None
                last = self._last_hidden[int(self._rows.slots([row])[0])]
            weights = self._weights[row]
            found.append(
                SampleRequest(
                    row, count, sampling, seed, min(limit, room), room <= limit, weights, rule, length, last
                )
            )
        return found

    def accept(self, candidates: Candidates, choice: Sequence[int]) -> None:
        """Make candidate choice[i] of the i-th sampled row part of its conversation (-1: none of them).

        Copies only the chosen tokens' keys and values. Rows must not have been appended to or dropped in
        between.
        """
        slots, places, counts = [], [], []
        for at, (row, chosen) in enumerate(zip(candidates.rows, choice, strict=True)):
            if chosen < 0:
                continue
            ids = candidates.token_ids[at][chosen]
            if len(self._ids[row]) != candidates.base_lengths[at]:
                raise ValueError(f"conversation {row} changed since its candidates were sampled")
            self._ids[row] += ids
            # The model has not seen the last token yet: it goes in with whatever comes next.
            self._pending[row] += ids[-1:]
            slots.append(int(self._rows.slots([row])[0]))
            places.append(candidates.places[at][chosen])
            counts.append(max(len(ids) - 1, 0))
        self.cache.accept(np.array(slots, dtype=np.int64), places, np.array(counts))

    def _prefill(self, rows: Sequence[int]) -> None:
        """Run all tokens of these rows that the model has not seen, in forwards of bounded size."""
        waiting = [row for row in rows if self._pending[row]]
        waiting = [waiting[i] for i in self._rows.in_slot_order(waiting)]
        device = self.policy.device
        for piece in by_size([len(self._pending[row]) for row in waiting], self._prefill_tokens):
            now = waiting[piece]
            ids, counts = padded([self._pending[row] for row in now])
            slots = self._rows.slots(now)
            view = self.cache.append(slots, counts, ids.shape[1])
            hidden = self.policy.hidden_states(ids.to(device), view.positions(ids.shape[1], device), view)
            view.commit()
            last = torch.from_numpy(counts - 1).to(device)
            self.set_last_hidden(now, hidden[torch.arange(len(now), device=device), last])
            self.tokens_forwarded += int(counts.sum())
        self.track_peak(0)

    def set_last_hidden(self, rows: Sequence[int], hidden: Tensor) -> None:
        """The model has read these conversations to their ends; hidden [n, D]: its states there."""
        self._grow_hidden(hidden)
        assert self._last_hidden is not None
        self._last_hidden[torch.from_numpy(self._rows.slots(rows))] = hidden
        self._pending.update({row: [] for row in rows})

    def track_peak(self, branches: int) -> None:
        """Remember the peak, with so many bytes of keys and values beside the prefixes."""
        self.peak_bytes = max(self.peak_bytes, self.cache.nbytes + branches)

    def _grow_hidden(self, like: Tensor) -> None:
        known = 0 if self._last_hidden is None else len(self._last_hidden)
        if known < self.cache.num_rows:
            grown = like.new_zeros(max(self.cache.num_rows, 2 * known), like.shape[-1])
            if self._last_hidden is not None:
                grown[:known] = self._last_hidden
            self._last_hidden = grown


class InFlight:
    """`Engine.sample`, token by token: rows begin and end when they will, and every token is
    one forward for all of them.

        in_flight.start(rows, ...)
        done = in_flight.step()                              # again and again
        engine.accept(in_flight.collect(done), choice)
        in_flight.start(done, ...)                           # their next steps, beside the others' old ones

    A row must not be appended to while it is in flight, and leaves before it is dropped from the engine.
    """

    def __init__(self, engine: Engine, stop_ids: Collection[int], vocabulary: TokenTexts | None) -> None:
        """`stop_ids` end every candidate, as in `sample`; `vocabulary` reads texts for the rules."""
        self._engine = engine
        self._decoder = engine.decoder(stop_ids, vocabulary)

    @property
    def is_busy(self) -> bool:
        """Whether anything is still to be decoded."""
        return self._decoder.is_busy

    def start(
        self,
        rows: Sequence[int],
        num_candidates: Sequence[int],
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        max_new_tokens: Sequence[int],
        rules: Sequence[StopRule | None],
    ) -> None:
        """Sample candidates of these rows from the next token on; everything as in `sample`.

        The last token of an accepted step goes through the model in the next `step`, with everything else.
        """
        self._decoder.start(self._engine.forks(rows, num_candidates, params, seeds, max_new_tokens, rules))

    def step(self) -> list[int]:
        """One more token of every candidate in flight. Returns the rows whose candidates have now all
        ended."""
        decoder, engine, before = self._decoder, self._engine, self._decoder.tokens_forwarded
        done = decoder.step()
        engine.tokens_forwarded += decoder.tokens_forwarded - before
        engine.track_peak(decoder.nbytes)
        if decoder.read:
            rows, states = zip(*decoder.read, strict=True)
            engine.set_last_hidden(rows, torch.stack(states))
        return done

    def collect(self, rows: Sequence[int]) -> Candidates:
        """The candidates of rows that are done. They can be accepted until the row begins again."""
        return self._decoder.collect(rows)

    def abort(self, rows: Collection[int]) -> None:
        """Stop sampling these rows, finished or not; nobody else notices."""
        self._decoder.abort(rows)
