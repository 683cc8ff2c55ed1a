"""Rows whose candidates are being sampled, each since its own time: continuous batching of steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from mahalo_ray.decoding.batch import BatchedConversations
from mahalo_ray.decoding.candidates import Candidates
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.decoding.stopping import StopRule, Vocabulary


class InFlight:
    """`BatchedConversations.sample`, token by token: rows begin and end when they will, and every token is
    one forward for all of them.

        in_flight.begin(rows, ...)
        done = in_flight.step()                              # again and again
        engine.accept(in_flight.taken(done), choice)
        in_flight.begin(done, ...)                           # their next steps, beside the others' old ones

    A row must not be appended to while it is in flight, and leaves before it is dropped from the engine.
    """

    def __init__(
        self, engine: BatchedConversations, stop_ids: Collection[int], vocabulary: Vocabulary | None
    ) -> None:
        """`stop_ids` end every candidate, as in `sample`; `vocabulary` reads texts for the rules."""
        self._engine = engine
        self._decoder = engine.decoder(stop_ids, vocabulary)

    @property
    def is_busy(self) -> bool:
        """Whether anything is still to be decoded."""
        return self._decoder.is_busy

    def begin(
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
        self._decoder.begin(self._engine.forks(rows, num_candidates, params, seeds, max_new_tokens, rules))

    def step(self) -> list[int]:
        """One more token of every candidate in flight. Returns the rows whose candidates have now all
        ended."""
        decoder, engine, before = self._decoder, self._engine, self._decoder.tokens_forwarded
        done = decoder.step()
        engine.tokens_forwarded += decoder.tokens_forwarded - before
        engine.note_bytes(decoder.nbytes)
        if decoder.read:
            rows, states = zip(*decoder.read, strict=True)
            engine.have_read(rows, torch.stack(states))
        return done

    def taken(self, rows: Sequence[int]) -> Candidates:
        """The candidates of rows that are done. They can be accepted until the row begins again."""
        return self._decoder.taken(rows)

    def leave(self, rows: Collection[int]) -> None:
        """Stop sampling these rows, finished or not; nobody else notices."""
        self._decoder.leave(rows)
