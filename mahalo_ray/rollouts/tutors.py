"""The tutors of many dialogues behind one protocol: local policies, token by token, and endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mahalo_ray.config import SamplingConfig
from mahalo_ray.data.records import Message
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.token_loop import Candidates
from mahalo_ray.domains.tutoring.moves import is_malformed
from mahalo_ray.endpoints import ChatCall, Endpoint, EndpointReply, Failure
from mahalo_ray.objectives import Weights
from mahalo_ray.seeding import derived_seed, endpoint_seed


@dataclass(frozen=True)
class TutorTurn:
    """What a tutor might say. `token_ids` are the sampled ones, end token included; an endpoint's turn has
    none."""

    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Opened:
    """A conversation as its tutor keeps it: its row, and the token ids of the opening (none at an
    endpoint)."""

    row: int
    token_ids: list[int]


@dataclass(frozen=True)
class Offer:
    """Candidate turns of one conversation, or why there are none."""

    turns: list[TutorTurn]
    failure: Failure | None = None


@dataclass(frozen=True)
class Offers:
    """One offer per conversation asked; `drawn` is how a local model finds the chosen ones again."""

    each: list[Offer]
    drawn: Candidates | None = None


class Tutor(Protocol):
    """One side of the dialogues. Rows name conversations."""

    def open(self, conversations: Sequence[Sequence[Message]]) -> list[Opened | Failure]:
        """Read the messages before the first turn."""
        ...

    def offer(
        self, rows: Sequence[int], messages: Sequence[Sequence[Message]], seeds: Sequence[int], count: int
    ) -> Offers:
        """`count` candidate turns of every conversation; nothing is said yet."""
        ...

    def say(self, offers: Offers, choice: Sequence[int]) -> None:
        """Candidate choice[i] of the i-th conversation that got an offer is said in it."""
        ...

    def fork(self, rows: Sequence[int], turns: Sequence[TutorTurn], copies: int) -> list[list[int]]:
        """`copies` new rows for each given conversation in which this turn was said."""
        ...

    def following(self, messages: Sequence[Message], turn: TutorTurn, reply: Message) -> list[int]:
        """Token ids of the student's reply to `turn` (the last of `messages`), as the tutor reads them."""
        ...

    def hear(self, rows: Sequence[int], token_ids: Sequence[list[int]]) -> None:
        """The students' replies, as `following` encoded them."""
        ...

    def fits(self, row: int, tokens: int) -> bool:
        """Whether `tokens` more leave room for another turn."""
        ...

    def leave(self, rows: Sequence[int]) -> None:
        """These conversations are over."""
        ...

    def malformed(self, turn: TutorTurn) -> bool:
        """A turn that was cut off, or holds what nobody should say."""
        ...


class PolicyTutor:
    """A local model over the batched engine: token-exact. `weights`: those of a multi-head policy.

    `sentences_are_moves`: the miniature's check, that every sentence is one its students understand.
    """

    def __init__(
        self,
        engine: Engine,
        chat: ChatFormat,
        sampling: SamplingConfig,
        weights: Weights | None = None,
        sentences_are_moves: bool = True,
    ) -> None:
        self.engine, self.chat, self.sampling, self.weights = engine, chat, sampling, weights
        self._special = set(chat.tokenizer.all_special_ids)
        self._sentences_are_moves = sentences_are_moves

    def open(self, conversations: Sequence[Sequence[Message]]) -> list[Opened | Failure]:
        prompts = [self.chat.prompt_ids(messages) for messages in conversations]
        rows = iter(self.engine.add(sum(map(self._fits_empty, prompts)), self.weights))
        opened: list[Opened | Failure] = [
            Opened(next(rows), ids) if self._fits_empty(ids) else self._too_long(ids) for ids in prompts
        ]
        ready = [one for one in opened if isinstance(one, Opened)]
        self.engine.append([one.row for one in ready], [one.token_ids for one in ready])
        return opened

    def offer(
        self, rows: Sequence[int], messages: Sequence[Sequence[Message]], seeds: Sequence[int], count: int
    ) -> Offers:
        drawn = self.engine.sample(
            rows, count, self.sampling, seeds, self.sampling.max_new_tokens, self.chat.end_ids
        )
        turns = [[TutorTurn(self.chat.decode(ids), tuple(ids)) for ids in own] for own in drawn.token_ids]
        return Offers([Offer(own) for own in turns], drawn)

    def say(self, offers: Offers, choice: Sequence[int]) -> None:
        assert offers.drawn is not None
        self.engine.accept(offers.drawn, choice)

    def fork(self, rows: Sequence[int], turns: Sequence[TutorTurn], copies: int) -> list[list[int]]:
        first = self.engine.duplicate(rows)
        self.engine.append(first, [list(turn.token_ids) for turn in turns])
        more = iter(self.engine.duplicate([row for row in first for _ in range(copies - 1)]))
        return [[row, *(next(more) for _ in range(copies - 1))] for row in first]

    def following(self, messages: Sequence[Message], turn: TutorTurn, reply: Message) -> list[int]:
        # A turn cut off at the token limit has no end token of its own.
        return self.chat.missing_end(turn.token_ids) + self.chat.following_ids(messages, [reply])

    def hear(self, rows: Sequence[int], token_ids: Sequence[list[int]]) -> None:
        self.engine.append(rows, token_ids)

    def fits(self, row: int, tokens: int) -> bool:
        return self.engine.length(row) + tokens < self.engine.max_context

    def leave(self, rows: Sequence[int]) -> None:
        self.engine.drop(rows)

    def malformed(self, turn: TutorTurn) -> bool:
        """Cut off, special tokens inside, or a sentence that the miniature's students do not understand."""
        ids = turn.token_ids
        return (
            bool(self.chat.missing_end(ids))
            or any(token in self._special for token in ids[:-1])
            or (self._sentences_are_moves and is_malformed(turn.text))
        )

    def _fits_empty(self, ids: Sequence[int]) -> bool:
        return len(ids) < self.engine.max_context

    def _too_long(self, ids: Sequence[int]) -> Failure:
        limit = self.engine.max_context
        return Failure("opening_too_long", f"the opening has {len(ids)} tokens, the limit is {limit}", 1)


class EndpointTutor:
    """An endpoint that is asked for every candidate by itself (not every server knows `n`)."""

    def __init__(self, endpoint: Endpoint, sampling: SamplingConfig) -> None:
        self.endpoint, self.sampling = endpoint, sampling

    def open(self, conversations: Sequence[Sequence[Message]]) -> list[Opened | Failure]:
        return [Opened(row, []) for row in range(len(conversations))]

    def offer(
        self, rows: Sequence[int], messages: Sequence[Sequence[Message]], seeds: Sequence[int], count: int
    ) -> Offers:
        turns: list[list[TutorTurn | None]] = [[None] * count for _ in rows]
        failures: dict[int, Failure] = {}
        requests = (
            self._request(own, derived_seed(seed, len(own), k))
            for own, seed in zip(messages, seeds, strict=True)
            for k in range(count)
        )
        for number, answer in self.endpoint.chat(requests):
            i, k = divmod(number, count)
            if isinstance(answer, EndpointReply):
                turns[i][k] = TutorTurn(answer.texts[0].strip())
                if not answer.texts[0].strip():
                    failures[i] = Failure("empty", "the endpoint gave a turn without words", 1)
            else:
                failures[i] = answer
        return Offers(
            [
                Offer([], failures[i]) if i in failures else Offer([turn for turn in own if turn is not None])
                for i, own in enumerate(turns)
            ]
        )

    def say(self, offers: Offers, choice: Sequence[int]) -> None:
        """The next request brings the whole conversation."""

    def fork(self, rows: Sequence[int], turns: Sequence[TutorTurn], copies: int) -> list[list[int]]:
        return [[row] * copies for row in rows]

    def following(self, messages: Sequence[Message], turn: TutorTurn, reply: Message) -> list[int]:
        return []

    def hear(self, rows: Sequence[int], token_ids: Sequence[list[int]]) -> None:
        """The next request brings the whole conversation."""

    def fits(self, row: int, tokens: int) -> bool:
        return True

    def leave(self, rows: Sequence[int]) -> None:
        """Nothing is kept."""

    def malformed(self, turn: TutorTurn) -> bool:
        return False

    def _request(self, messages: Sequence[Message], seed: int) -> ChatCall:
        return ChatCall(
            [message.model_dump() for message in messages],
            max_tokens=self.sampling.max_new_tokens,
            temperature=self.sampling.temperature,
            seed=endpoint_seed(seed),
            extra={"top_p": self.sampling.top_p} if self.sampling.top_p < 1 else {},
        )
