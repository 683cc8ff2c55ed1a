"""The tutors of many dialogues behind one protocol: local policies, token by token, and endpoints.

A tutor `start`s dialogues, `propose`s candidate turns, and `commit`s to those that are said, with what the
students replied. Nothing else is asked of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from mahalo_ray.config import SamplingConfig
from mahalo_ray.data.records import Dialogue, Message, Turn
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.candidates import Candidates
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.stopping import Boundary, StopReason, StopRule, TextStop, TokenTexts, TurnBoundary
from mahalo_ray.endpoints import ChatCall, Endpoint, EndpointReply, Failure
from mahalo_ray.objectives import Weights
from mahalo_ray.rollouts.students import PersonaStudent, Student, TutorTurn
from mahalo_ray.seeding import derived_seed, endpoint_seed

# `answer`: the model has said all there is to say, and nobody replies; `steps`: it took as many as it may.
Ending = Literal["student", "turns", "stop", "max_tokens", "answer", "steps"]
_CONTEXT_TOKENS = 16  # what the text of new tokens can depend on lies within so many before them
BRANCH = "~"  # in the id of a dialogue: what follows says where it left its origin


@dataclass(eq=False)
class Conversation:
    """One dialogue in play: the student, the chat as the tutor reads it, and its rows at tutor and scorers.

    `turns` begin with the opening, whose token ids (system message and all) are those of its last turn.
    `scorer_row` is -1 where nothing scores; `turns_scored` is how many turns the scorers have read.
    """

    id: str
    seed: int
    student: Any  # a Student of the kind that the batch's `students` speak for
    messages: list[Message]
    turns: list[Turn]
    opening_turns: int
    row: int = -1
    scorer_row: int = -1
    turns_scored: int = 0
    malformed: int = 0
    ended: Ending | None = None
    failure: Failure | None = None
    post_test: str | None = None

    @property
    def over(self) -> bool:
        return self.ended is not None or self.failure is not None

    @property
    def in_turn(self) -> bool:
        """Whether a turn has begun, and its next step is waited for."""
        return self.messages[-1].role == "assistant"

    @property
    def tutor_turns(self) -> int:
        """Turns (or steps of one) played, the opening's not counted."""
        return sum(turn.speaker == "tutor" for turn in self.turns[self.opening_turns :])

    @property
    def root(self) -> str:
        """Id of the dialogue that this one branched from, or its own."""
        return self.id.partition(BRANCH)[0]

    def token_ids(self, first_turn: int = 0) -> list[int]:
        """What the tutor has read of the turns from this one on."""
        return [token for turn in self.turns[first_turn:] for token in turn.token_ids or []]

    def dialogue(self, source: str, objectives: Sequence[str] | None = None) -> Dialogue:
        """The record of what was said so far, with the outcome of these objectives (None: of all)."""
        assert isinstance(self.student, Student)
        outcome: Mapping[str, float] = self.student.outcome()
        persona = self.student.persona.traits() if isinstance(self.student, PersonaStudent) else None
        return Dialogue(
            id=self.id,
            topic=self.student.topic,
            turns=self.turns,
            outcome={name: outcome[name] for name in (outcome if objectives is None else objectives)},
            seed=self.student.seed,
            source=source,
            ended=self.ended,
            persona=persona,
        )


@dataclass
class Proposal:
    """Candidate turns of one conversation. `sampled` and `place`: where a local model finds them again.
    `scores` [K, O], where scorers follow the conversation."""

    conversation: Conversation
    turns: list[TutorTurn]
    sampled: Candidates | None = None
    place: int = 0
    scores: Tensor | None = None


@dataclass(frozen=True)
class Exchange:
    """Candidate `chosen` of a proposal is said, in its conversation or in a copy that leaves it here, and the
    student replies (None: it failed or has nothing to say). `is_last`: the dialogue is over then."""

    proposal: Proposal
    chosen: int
    conversation: Conversation
    reply: str | None
    is_last: bool

    @property
    def turn(self) -> TutorTurn:
        return self.proposal.turns[self.chosen]

    @property
    def branches_off(self) -> bool:
        return self.conversation is not self.proposal.conversation

    @property
    def is_read(self) -> bool:
        """Whether the tutor reads what comes behind the turn, or says more of it."""
        return self.reply is not None or not self.is_last


@dataclass(frozen=True)
class Committed:
    """What the tutor made of an exchange: the token ids of the reply as it reads them, and whether there is
    room for another turn."""

    reply_ids: list[int]
    has_room: bool


class Tutor(Protocol):
    """One side of the dialogues."""

    def start(self, conversations: Sequence[Conversation]) -> list[list[int] | Failure]:
        """Read what was said before the first turn: its token ids (none at an endpoint)."""
        ...

    def propose(self, conversations: Sequence[Conversation], count: int) -> list[Proposal | Failure]:
        """`count` candidate turns of every conversation; nothing is said yet."""
        ...

    def commit(self, exchanges: Sequence[Exchange]) -> list[Committed]:
        """These turns were said and answered. Conversations without an exchange stay as they are; those that
        are over, or have no room for another turn, are forgotten."""
        ...


@dataclass(frozen=True)
class DrawnWeights:
    """Decoding weights of every dialogue by itself: from a Dirichlet distribution, by the dialogue's seed."""

    objectives: tuple[str, ...]
    concentration: float

    def of(self, seed: int) -> Weights:
        """The weights of the dialogue with this seed."""
        draw = np.random.default_rng(derived_seed("weights", seed))
        gammas = draw.gamma(self.concentration, size=len(self.objectives))
        # Tiny concentrations can give zeros alone: then it is one objective, as the distribution's limit is.
        if not gammas.any():
            gammas[draw.integers(len(gammas))] = 1.0
        return Weights(dict(zip(self.objectives, gammas.tolist(), strict=True)))


class PolicyTutor:
    """A local model over the batched engine: token-exact. `weights` (for all dialogues or drawn for each)
    and `strength`: of a multi-head policy.

    `is_malformed`: the domain's check of a turn's words. `boundary`: turns are sampled step by step; None:
    whole.
    """

    def __init__(
        self,
        engine: Engine,
        chat: ChatFormat,
        sampling: SamplingConfig,
        weights: Weights | DrawnWeights | None = None,
        is_malformed: Callable[[str], bool] | None = None,
        strength: float = 1.0,
        boundary: Boundary | None = None,
    ) -> None:
        self.engine, self.chat, self.sampling = engine, chat, sampling
        self.weights, self.strength = weights, strength
        self._special = set(chat.tokenizer.all_special_ids)
        self._is_malformed = is_malformed
        self._boundary = None if isinstance(boundary, TurnBoundary) else boundary
        self._texts = TokenTexts(chat.tokenizer)

    def start(self, conversations: Sequence[Conversation]) -> list[list[int] | Failure]:
        results = [self._opening_ids(conversation) for conversation in conversations]
        opened = [(c, ids) for c, ids in zip(conversations, results, strict=True) if isinstance(ids, list)]
        rows = self.engine.add(len(opened), [self._weights_of(c) for c, _ in opened], strength=self.strength)
        for (conversation, _), row in zip(opened, rows, strict=True):
            conversation.row = row
        self.engine.append(rows, [ids for _, ids in opened])
        return results

    def _weights_of(self, conversation: Conversation) -> Weights | None:
        if isinstance(self.weights, DrawnWeights):
            return self.weights.of(conversation.seed)
        return self.weights

    def propose(self, conversations: Sequence[Conversation], count: int) -> list[Proposal | Failure]:
        sampled = self.engine.sample(
            [conversation.row for conversation in conversations],
            count,
            self.sampling,
            [conversation.seed for conversation in conversations],
            self.sampling.max_new_tokens,
            self.chat.end_ids,
            self._step_ends(conversations),
        )
        return [
            Proposal(conversation, self._turns(sampled, place, conversation.in_turn), sampled, place)
            for place, conversation in enumerate(conversations)
        ]

    def _step_ends(self, conversations: Sequence[Conversation]) -> TextStop | None:
        """Where the next steps end; None for whole turns."""
        if self._boundary is None:
            return None
        rows = [self.engine.token_ids(conversation.row) for conversation in conversations]
        rules = [StopRule(self._boundary, context_ids=tuple(ids[-_CONTEXT_TOKENS:])) for ids in rows]
        return TextStop(self._texts, rules)

    def _turns(self, sampled: Candidates, place: int, has_begun: bool) -> list[TutorTurn]:
        pairs = zip(sampled.token_ids[place], sampled.reasons[place], strict=True)
        return [self._turn(ids, reason, has_begun) for ids, reason in pairs]

    def commit(self, exchanges: Sequence[Exchange]) -> list[Committed]:
        # A copy that is over once the turn is said needs no row of its own.
        self._branch_off([exchange for exchange in exchanges if exchange.branches_off and exchange.is_read])
        self._accept([exchange for exchange in exchanges if not exchange.branches_off])
        results = [self._committed(exchange) for exchange in exchanges]
        going_on = [
            (exchange.conversation.row, committed.reply_ids)
            for exchange, committed in zip(exchanges, results, strict=True)
            if committed.has_room and not exchange.is_last
        ]
        self.engine.append([row for row, _ in going_on], [ids for _, ids in going_on])
        stay = {row for row, _ in going_on}
        rows = [exchange.conversation.row for exchange in exchanges]
        self.engine.drop([row for row in rows if row not in stay and row >= 0])
        return results

    def _branch_off(self, exchanges: Sequence[Exchange]) -> None:
        """Rows for copies in which another candidate is said. A turn is encoded once for all its copies."""
        groups: dict[tuple[str, int], list[Exchange]] = {}
        for exchange in exchanges:
            groups.setdefault((exchange.proposal.conversation.id, exchange.chosen), []).append(exchange)
        leaders = [group[0] for group in groups.values()]
        if not leaders:
            return
        first = self.engine.duplicate([leader.proposal.conversation.row for leader in leaders])
        self.engine.append(first, [list(leader.turn.token_ids) for leader in leaders])
        others = [
            (exchange, row)
            for group, row in zip(groups.values(), first, strict=True)
            for exchange in group[1:]
        ]
        copies = self.engine.duplicate([row for _, row in others])
        for leader, row in zip(leaders, first, strict=True):
            leader.conversation.row = row
        for (exchange, _), row in zip(others, copies, strict=True):
            exchange.conversation.row = row

    def _accept(self, exchanges: Sequence[Exchange]) -> None:
        by_sample: dict[int, list[Exchange]] = {}
        for exchange in exchanges:
            by_sample.setdefault(id(exchange.proposal.sampled), []).append(exchange)
        for group in by_sample.values():
            sampled = group[0].proposal.sampled
            assert sampled is not None
            places = [exchange.proposal.place for exchange in group]
            self.engine.accept(sampled.only(places), [exchange.chosen for exchange in group])

    def _committed(self, exchange: Exchange) -> Committed:
        conversation, turn = exchange.conversation, exchange.turn
        if exchange.reply is None:
            is_open = exchange.is_read and self.engine.length(conversation.row) < self.engine.max_context
            return Committed([], is_open)
        # A turn cut off at the token limit has no end token of its own.
        messages = with_turn(conversation.messages, turn.text)
        reply = Message(role="user", content=exchange.reply)
        ids = self.chat.missing_end(turn.token_ids) + self.chat.following_ids(messages, [reply])
        return Committed(ids, self.engine.length(conversation.row) + len(ids) < self.engine.max_context)

    def _turn(self, ids: Sequence[int], reason: StopReason, has_begun: bool) -> TutorTurn:
        text = self.chat.decode(ids)
        is_end_alone = has_begun and not text  # the step before was the last with words
        is_cut = reason in (StopReason.LENGTH, StopReason.CONTEXT)
        has_special = any(token in self._special for token in ids[:-1])
        unknown = not is_end_alone and self._is_malformed is not None and self._is_malformed(text)
        return TutorTurn(text, tuple(ids), is_cut or has_special or unknown, reason is StopReason.STEP)

    def _opening_ids(self, conversation: Conversation) -> list[int] | Failure:
        """An opening that the chat template refuses, or that has no room, fails its own dialogue alone."""
        try:
            ids = self.chat.prompt_ids(conversation.messages)
            roles = [message.role for message in conversation.messages]
            self.chat.check_stable([*roles, "assistant", "user"])  # so that it can go on
        except ValueError as error:
            return Failure("template", str(error), 1)
        limit = self.engine.max_context
        if len(ids) < limit:
            return ids
        return Failure("opening_too_long", f"the opening has {len(ids)} tokens, the limit is {limit}", 1)


def with_turn(messages: Sequence[Message], text: str) -> list[Message]:
    """The conversation with this turn, or with this step of a turn that has begun, behind it."""
    begun = messages[-1] if messages and messages[-1].role == "assistant" else None
    if begun is None:
        return [*messages, Message(role="assistant", content=text)]
    return [*messages[:-1], Message(role="assistant", content=begun.content + text)]


class EndpointTutor:
    """An endpoint that is asked for every candidate by itself (not every server knows `n`). It is sent the
    whole conversation each time, so nothing is kept."""

    def __init__(self, endpoint: Endpoint, sampling: SamplingConfig) -> None:
        self.endpoint, self.sampling = endpoint, sampling

    def start(self, conversations: Sequence[Conversation]) -> list[list[int] | Failure]:
        return [[] for _ in conversations]

    def propose(self, conversations: Sequence[Conversation], count: int) -> list[Proposal | Failure]:
        turns: list[list[TutorTurn | None]] = [[None] * count for _ in conversations]
        failures: dict[int, Failure] = {}
        calls = (
            self._request(c.messages, derived_seed(c.seed, len(c.messages), k))
            for c in conversations
            for k in range(count)
        )
        for number, answer in self.endpoint.chat(calls):
            i, k = divmod(number, count)
            if isinstance(answer, EndpointReply):
                text = answer.texts[0].strip()
                turns[i][k] = TutorTurn(text)
                if not text:
                    failures[i] = Failure("empty", "the endpoint gave a turn without words", 1)
            else:
                failures[i] = answer
        return [
            failures.get(i) or Proposal(conversation, [turn for turn in turns[i] if turn is not None])
            for i, conversation in enumerate(conversations)
        ]

    def commit(self, exchanges: Sequence[Exchange]) -> list[Committed]:
        return [Committed([], True) for _ in exchanges]

    def _request(self, messages: Sequence[Message], seed: int) -> ChatCall:
        return ChatCall(
            [message.model_dump() for message in messages],
            max_tokens=self.sampling.max_new_tokens,
            temperature=self.sampling.temperature,
            seed=endpoint_seed(seed),
            extra={"top_p": self.sampling.top_p} if self.sampling.top_p < 1 else {},
        )
