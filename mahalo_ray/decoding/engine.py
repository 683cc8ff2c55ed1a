"""The engine: many conversations at once over one policy, under rollouts, evaluation and serving.

Words used here, in kv_cache.py and in token_loop.py:

    sequence   a conversation in the engine; its number comes from `add` and holds until `drop`
    prefix     keys and values of a sequence's tokens, stored once
    branch     one candidate continuation: a few tokens of its own behind the shared prefix
    step       what is sampled and accepted at once; `accept` makes a chosen branch part of the prefix
    slot       where a prefix lies in the cache; it changes when other sequences are dropped
    grid       the branches that are decoded, [requests, K]; a grid index is row * K + column

Sequences are token-exact: what was appended and what was sampled is kept as token ids and never tokenised
again.

    sequences = engine.add(2, weights)
    engine.append(sequences, prompts)                               # ragged prefill
    candidates = engine.sample(sequences, num_candidates=6, ...)    # 12 branches over 2 shared prefixes
    engine.accept(candidates, [3, 0])                               # the chosen branch joins its prefix
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mahalo_ray.decoding.candidates import Candidates, SampleRequest
from mahalo_ray.decoding.kv_cache import RaggedCache, SlotTable, pad_right, split_by_size
from mahalo_ray.decoding.policy import HeadMix, Policy, as_policy
from mahalo_ray.decoding.sampling import DrawLimits, SamplingParams
from mahalo_ray.decoding.step_graph import PREFIX_TOKENS
from mahalo_ray.decoding.stopping import StopRule, TextStop, TokenTexts
from mahalo_ray.decoding.token_loop import BranchDecoder, CompactingDecoder
from mahalo_ray.models.multi_head import MultiHeadCausalLM
from mahalo_ray.objectives import Weights


class Engine:
    """N sequences over one policy, sampled by `sample`, or token by token while others join and leave:

        engine = Engine(policy, stop_ids=[end_id])
        engine.start(sequences, ...)
        done = engine.step()                                # again and again
        engine.accept(engine.collect(done), choice)
        engine.start(done, ...)                             # their next steps, beside the others' old ones

    `prefill_tokens` bounds sequences * width of one prefill forward, so that long prompts do not explode
    activations. `stop_ids` end every candidate that `start` begins, and `texts` reads what its rules need.
    """

    def __init__(
        self,
        policy: Policy | MultiHeadCausalLM | PreTrainedModel,
        max_context: int | None = None,
        prefill_tokens: int = 16384,
        stop_ids: Collection[int] = (),
        texts: TokenTexts | None = None,
    ) -> None:
        policy = as_policy(policy)
        self.policy = policy
        self.max_context = policy.max_context if max_context is None else max_context
        if self.max_context > policy.max_context:
            raise ValueError(
                f"max_context is {max_context}, but the model was built for {policy.max_context} tokens"
            )
        # A buffer that grows is a new place, and what was recorded on the old one must be recorded again.
        self.cache = RaggedCache(least_growth=1 if policy.recorder is None else PREFIX_TOKENS)
        self.tokens_forwarded = 0  # through the model, padding not counted: what decoding costs
        self.peak_bytes = 0
        self._prefill_tokens = prefill_tokens
        self._slots = SlotTable()
        self._ids: dict[int, list[int]] = {}
        self._pending: dict[int, list[int]] = {}  # tokens of a sequence that the model has not read yet
        self._mixes: dict[int, HeadMix] = {}
        self._choices: dict[int, int] = {}  # steps accepted from several candidates: draws are keyed by them
        # [slots, D]: what the next token of every sequence is predicted from
        self._last_hidden: Tensor | None = None
        self._in_flight = BranchDecoder(policy, self.cache, self._slots, stop_ids, texts)

    def __len__(self) -> int:
        return len(self._slots)

    def add(
        self,
        count: int,
        weights: Weights | Sequence[Weights | None] | None = None,
        choices: Sequence[int] | None = None,
        strength: float | Sequence[float] = 1.0,
    ) -> list[int]:
        """`count` new empty sequences; weights over the policy's heads for all of them, or one each, and so
        the strength.

        `choices`: of sequences that come back from another engine, how many steps were accepted there from
        several candidates, so that they draw as they would have.
        """
        weights_each = [weights] * count if weights is None or isinstance(weights, Weights) else list(weights)
        strengths = list(strength) if isinstance(strength, Sequence) else [strength] * count
        if len(weights_each) != count:
            raise ValueError(f"{count} conversations but {len(weights_each)} weight vectors")
        sequences = self._slots.add(count)
        self.cache.add(count)
        mixes = map(HeadMix, weights_each, strengths)
        for sequence, mix in zip(sequences, mixes, strict=True):
            self._ids[sequence], self._pending[sequence] = [], []
            self._mixes[sequence] = mix
        self._choices.update(zip(sequences, [0] * count if choices is None else choices, strict=True))
        return sequences

    def drop(self, sequences: Sequence[int]) -> None:
        """Forget sequences, in flight or not, and free their memory for new ones."""
        moves = self._slots.drop(sequences)
        self.cache.drop(len(sequences), moves)
        for table in (self._ids, self._pending, self._mixes, self._choices):
            for sequence in sequences:
                table.pop(sequence)
        if not len(self):
            self._last_hidden = None
        elif self._last_hidden is not None and moves:
            source, target = zip(*moves, strict=True)
            self._last_hidden[list(target)] = self._last_hidden[list(source)]
        self._in_flight.abort(sequences)
        if moves:
            self._in_flight.slots_moved()

    def duplicate(self, sequences: Sequence[int]) -> list[int]:
        """Copies of sequences that go on independently (the prefix is copied: beam search needs it)."""
        mixes = [self._mixes[sequence] for sequence in sequences]
        copies = self.add(
            len(sequences), [mix.weights for mix in mixes], strength=[mix.strength for mix in mixes]
        )
        source, target = self._slots.slots(sequences), self._slots.slots(copies)
        self.cache.copy(source, target)
        for sequence, copy in zip(sequences, copies, strict=True):
            self._ids[copy], self._pending[copy] = list(self._ids[sequence]), list(self._pending[sequence])
            self._choices[copy] = self._choices[sequence]
        if self._last_hidden is not None:
            self._grow_hidden(self._last_hidden)
            self._last_hidden[torch.from_numpy(target)] = self._last_hidden[torch.from_numpy(source)]
        return copies

    def token_ids(self, sequence: int) -> list[int]:
        """The whole sequence so far, exactly as appended and sampled."""
        return list(self._ids[sequence])

    def length(self, sequence: int) -> int:
        """Tokens of the sequence so far."""
        return len(self._ids[sequence])

    def append(self, sequences: Sequence[int], token_ids: Sequence[Sequence[int]]) -> None:
        """Add given tokens to sequences: prompts, headers, the other speaker's turns. Several calls add up.

        ValueError if a sequence would not fit the model's context, or for tokens that the model does not
        have.
        """
        for sequence, ids in zip(sequences, token_ids, strict=True):
            if ids and max(ids) >= self.policy.vocab_size:
                raise ValueError(
                    f"token id {max(ids)} is not one of the model's {self.policy.vocab_size}: the text was "
                    "encoded by the tokenizer of another model"
                )
            length = len(self._ids[sequence])
            if length + len(ids) > self.max_context:
                raise ValueError(
                    f"the text does not fit: {length} tokens and {len(ids)} new ones exceed the context of "
                    f"{self.max_context}"
                )
        for sequence, ids in zip(sequences, token_ids, strict=True):
            self._ids[sequence] += ids
            self._pending[sequence] += ids
        self._prefill(sequences)

    def sample(
        self,
        sequences: Sequence[int],
        num_candidates: int | Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        seeds: Sequence[int],
        max_new_tokens: int | Sequence[int],
        stop_ids: Collection[int],
        stop: TextStop | None = None,
        with_logps: bool = False,
    ) -> Candidates:
        """`num_candidates` (one number, or one per sequence) continuations of every sequence, decoded
        together until each one stops.

        A candidate ends with a token of `stop_ids` (kept as its last token), where `stop` says its text ends,
        after max_new_tokens, or where the context is full. Draws depend on the sequence's seed, its length,
        the choices made in it so far and the candidate's number only. The sequences do not change until
        `accept`.
        """
        count = len(sequences)
        if not sequences:
            raise ValueError("no conversations to sample: sequences is empty")
        self._prefill(sequences)
        requests = self._requests(
            sequences,
            [num_candidates] * count if isinstance(num_candidates, int) else num_candidates,
            [params] * count if isinstance(params, SamplingParams) else params,
            seeds,
            [max_new_tokens] * count if isinstance(max_new_tokens, int) else max_new_tokens,
            [None] * count if stop is None else stop.rules,
        )
        texts = None if stop is None else stop.texts
        decoder = CompactingDecoder(self.policy, self.cache, self._slots, stop_ids, texts, with_logps)
        candidates = decoder.run(requests)
        self.tokens_forwarded += decoder.tokens_forwarded
        self._track_peak(decoder.nbytes)
        return candidates

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that are held now."""
        return self.cache.nbytes + self._in_flight.nbytes

    @property
    def is_busy(self) -> bool:
        """Whether anything that was started is still to be decoded."""
        return self._in_flight.is_busy

    def start(
        self,
        sequences: Sequence[int],
        num_candidates: Sequence[int],
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        max_new_tokens: Sequence[int],
        rules: Sequence[StopRule | None],
        draw_limits: Sequence[DrawLimits] | None = None,
    ) -> None:
        """Sample candidates of these sequences from the next token on; everything as in `sample`.

        The last token of an accepted step goes through the model in the next `step`, with everything else. A
        sequence must not be appended to while it is in flight.
        """
        requests = self._requests(sequences, num_candidates, params, seeds, max_new_tokens, rules)
        if draw_limits is not None:
            requests = [
                replace(request, limits=limits, occurred=self._occurred(request.sequence, limits))
                for request, limits in zip(requests, draw_limits, strict=True)
            ]
        self._in_flight.start(requests)

    def _occurred(self, sequence: int, limits: DrawLimits) -> list[int]:
        return list(self._ids[sequence]) if limits.repetition_penalty != 1 else []

    def step(self) -> list[int]:
        """One more token of every candidate in flight, in one forward. Returns the sequences whose candidates
        have now all ended."""
        decoder = self._in_flight
        forwarded_before = decoder.tokens_forwarded
        done = decoder.step()
        self.tokens_forwarded += decoder.tokens_forwarded - forwarded_before
        self._track_peak(decoder.nbytes)
        if decoder.read:
            sequences, states = zip(*decoder.read, strict=True)
            self._set_last_hidden(sequences, torch.stack(states))
        return done

    def last_drawn(self, sequences: Sequence[int]) -> list[int]:
        """The newest token of each of these sequences, which have one candidate each that has not ended."""
        return self._in_flight.last_drawn(sequences)

    def collect(self, sequences: Sequence[int]) -> Candidates:
        """The candidates of sequences that are done. They can be accepted until the sequence starts again."""
        return self._in_flight.collect(sequences)

    def abort(self, sequences: Collection[int]) -> None:
        """Stop sampling these sequences, finished or not; no other notices."""
        self._in_flight.abort(sequences)

    def accept(self, candidates: Candidates, choice: Sequence[int]) -> None:
        """Make candidate choice[i] of the i-th sampled sequence part of it (-1: none of them).

        Copies only the chosen tokens' keys and values. Sequences must not have been appended to or dropped in
        between.
        """
        accepted, branches, counts = [], [], []
        for number, (sequence, chosen) in enumerate(zip(candidates.sequences, choice, strict=True)):
            if chosen < 0:
                continue
            ids = candidates.token_ids[number][chosen]
            if len(self._ids[sequence]) != candidates.base_lengths[number]:
                raise ValueError(f"conversation {sequence} changed since its candidates were sampled")
            self._ids[sequence] += ids
            # The model has not read the last token yet: it goes in with whatever comes next.
            self._pending[sequence] += ids[-1:]
            self._choices[sequence] += len(candidates.token_ids[number]) > 1
            accepted.append(sequence)
            branches.append(candidates.branches[number][chosen])
            counts.append(max(len(ids) - 1, 0))
        self.cache.accept(self._slots.slots(accepted), branches, np.array(counts))

    def _requests(
        self,
        sequences: Sequence[int],
        num_candidates: Sequence[int],
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        limits: Sequence[int],
        rules: Sequence[StopRule | None],
    ) -> list[SampleRequest]:
        """One request per sequence, which may have one token that the model has not read. ValueError for an
        empty sequence, or counts below 1."""
        requests = []
        settings = zip(sequences, num_candidates, params, seeds, limits, rules, strict=True)
        for sequence, count, sampling, seed, limit, rule in settings:
            length, unread = len(self._ids[sequence]), self._pending[sequence]
            for name, value in (("num_candidates", count), ("max_new_tokens", limit)):
                if value < 1:
                    raise ValueError(f"{name} is {value}: it must be at least 1")
            if not length:
                raise ValueError(f"conversation {sequence} is empty: append a prompt before sampling")
            room = self.max_context - length
            last: Tensor | int
            if unread:
                (last,) = unread
            else:
                assert self._last_hidden is not None
                last = self._last_hidden[int(self._slots.slots([sequence])[0])]
            requests.append(
                SampleRequest(
                    sequence=sequence,
                    num_candidates=count,
                    params=sampling,
                    seed=seed,
                    step=self._choices[sequence],
                    max_tokens=min(limit, room),
                    fills_context=room <= limit,
                    mix=self._mixes[sequence],
                    rule=rule,
                    length=length,
                    last=last,
                )
            )
        return requests

    def _prefill(self, sequences: Sequence[int]) -> None:
        """Run all tokens of these sequences that the model has not read, in forwards of bounded size."""
        waiting = [sequence for sequence in sequences if self._pending[sequence]]
        waiting = [waiting[i] for i in self._slots.in_slot_order(waiting)]
        device = self.policy.device
        lengths = [len(self._pending[sequence]) for sequence in waiting]
        for piece in split_by_size(lengths, self._prefill_tokens):
            batch = waiting[piece]
            ids, counts = pad_right([self._pending[sequence] for sequence in batch])
            width = ids.shape[1]
            view = self.cache.append(self._slots.slots(batch), counts, width)
            read = self.policy.reader([self._mixes[sequence] for sequence in batch])
            rows = torch.arange(len(batch), device=device)
            hidden = read(ids.to(device), view.positions(width, device), view, rows)
            view.commit()
            last = torch.from_numpy(counts - 1).to(device)
            self._set_last_hidden(batch, hidden[torch.arange(len(batch), device=device), last])
            self.tokens_forwarded += int(counts.sum())
        self._track_peak(0)

    def _set_last_hidden(self, sequences: Sequence[int], hidden: Tensor) -> None:
        """The model has read these sequences to their ends; hidden [n, D]: its states there."""
        self._grow_hidden(hidden)
        assert self._last_hidden is not None
        self._last_hidden[torch.from_numpy(self._slots.slots(sequences))] = hidden
        self._pending.update({sequence: [] for sequence in sequences})

    def _track_peak(self, branch_bytes: int) -> None:
        """Remember the peak, with so many bytes of keys and values beside the prefixes."""
        self.peak_bytes = max(self.peak_bytes, self.cache.nbytes + branch_bytes)

    def _grow_hidden(self, like: Tensor) -> None:
        known = 0 if self._last_hidden is None else len(self._last_hidden)
        if known < self.cache.num_slots:
            grown = like.new_zeros(max(self.cache.num_slots, 2 * known), like.shape[-1])
            if self._last_hidden is not None:
                grown[:known] = self._last_hidden
            self._last_hidden = grown
