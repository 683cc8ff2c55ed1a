"""Many dialogues played at once by one tutor against simulated students. No Ray here.

All conversations that wait for a tutor turn are sampled in one batch; students answer in between. Every draw
is keyed by the dialogue's own seed, so results do not depend on which dialogues share a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mahalo_ray.data.records import Dialogue, Message, Turn
from mahalo_ray.endpoints import Failure
from mahalo_ray.objectives import Weights
from mahalo_ray.rollouts.students import MiniatureStudents, PersonaStudent, Student, Students
from mahalo_ray.rollouts.tutors import Offers, Opened, Tutor, TutorTurn
from mahalo_ray.seeding import derived_seed, unit_draw

Ending = Literal["student", "turns", "stop", "max_tokens"]
BRANCH = "~"  # in the id of a dialogue: what follows says where it left its origin


@dataclass
class Conversation:
    """One dialogue in play: the student, the chat as the tutor reads it, and its row at the tutor.

    `turns` begin with the opening, whose token ids (system message and all) are those of its last turn.
    """

    id: str
    seed: int
    student: Any  # a Student of the kind that the batch's `students` speak for
    messages: list[Message]
    turns: list[Turn]
    opening_turns: int
    row: int = -1
    malformed: int = 0
    ended: Ending | None = None
    failure: Failure | None = None
    post_test: str | None = None

    @property
    def over(self) -> bool:
        return self.ended is not None or self.failure is not None

    @property
    def tutor_turns(self) -> int:
        """Turns played, the opening's not counted."""
        return (len(self.turns) - self.opening_turns) // 2

    @property
    def root(self) -> str:
        """Id of the dialogue that this one branched from, or its own."""
        return self.id.partition(BRANCH)[0]

    def dialogue(self, source: str) -> Dialogue:
        """The record of what was said so far."""
        assert isinstance(self.student, Student)
        persona = self.student.persona.traits() if isinstance(self.student, PersonaStudent) else None
        return Dialogue(
            id=self.id,
            topic=self.student.topic,
            turns=self.turns,
            outcome=self.student.outcome(),
            seed=self.student.seed,
            source=source,
            ended=self.ended,
            persona=persona,
        )


@dataclass(frozen=True)
class Offered:
    """Candidate turns [i][k] of the conversations that got some."""

    conversations: list[Conversation]
    turns: list[list[TutorTurn]]
    offers: Offers


@dataclass
class DialogueBatch:
    """Conversations of one tutor with students.

    `turns`: tutor turns per dialogue (None: until the student ends it). A student's reply that holds one of
    `stop` ends the dialogue too. With `post_test`, students of finished dialogues are asked that.
    """

    tutor: Tutor
    students: Students[Any] = field(default_factory=MiniatureStudents)
    turns: int | None = None
    stop: tuple[str, ...] = ()
    post_test: str | None = None
    instruction: str | None = None
    conversations: list[Conversation] = field(default_factory=list)

    def open(self, students: Sequence[Student], ids: Sequence[str], purpose: str) -> list[Conversation]:
        """Start dialogues with what was said before. `purpose` separates their random draws from those of
        other uses of the same students."""
        system = [] if self.instruction is None else [Message(role="system", content=self.instruction)]
        opened = []
        for student, name in zip(students, ids, strict=True):
            said = student.opening_messages
            turns = [Turn(speaker=_SPEAKER[message.role], content=message.content) for message in said]
            seed = derived_seed(purpose, student.seed)
            opened.append(Conversation(name, seed, student, system + said, turns, len(turns)))
        for conversation, kept in zip(opened, self.tutor.open([c.messages for c in opened]), strict=True):
            if isinstance(kept, Opened):
                conversation.row = kept.row
                last = conversation.turns[-1]
                conversation.turns[-1] = last.model_copy(update={"token_ids": kept.token_ids or None})
            else:
                conversation.failure = kept
        self.conversations += opened
        return opened

    @property
    def active(self) -> list[Conversation]:
        """Conversations that wait for a tutor turn."""
        return [conversation for conversation in self.conversations if not conversation.over]

    def sample(self, waiting: Sequence[Conversation], num_candidates: int) -> Offered:
        """Candidate tutor turns, in one batch; a conversation that gets none has failed."""
        offers = self.tutor.offer(
            [c.row for c in waiting], [c.messages for c in waiting], [c.seed for c in waiting], num_candidates
        )
        for conversation, offer in zip(waiting, offers.each, strict=True):
            conversation.failure = offer.failure
        self._leave([c for c in waiting if c.failure is not None])
        answered = [(c, o) for c, o in zip(waiting, offers.each, strict=True) if o.failure is None]
        return Offered([c for c, _ in answered], [offer.turns for _, offer in answered], offers)

    def accept(self, offered: Offered, choice: Sequence[int]) -> None:
        """Let the chosen candidates be said: the students reply, finished conversations leave."""
        self.tutor.say(offered.offers, choice)
        said = [own[k] for own, k in zip(offered.turns, choice, strict=True)]
        self._students_reply(offered.conversations, said)

    def branch(
        self, waiting: Sequence[Conversation], turns: Sequence[Sequence[TutorTurn]], copies: int
    ) -> list[list[list[Conversation]]]:
        """For conversation i and its candidate turn k: `copies` independent dialogues that go on after it.

        The originals stay as they are. Returns [i][k][copy]; play on with `play_out`. A turn's tokens are
        encoded once for all its copies.
        """
        branched = [
            (conversation, candidate)
            for conversation, own in zip(waiting, turns, strict=True)
            for candidate in range(len(own))
        ]
        origins = [conversation for conversation, _ in branched]
        said = [turn for own in turns for turn in own]
        rows = self.tutor.fork([origin.row for origin in origins], said, copies)
        # Copies are numbered from 1: copy 0 is the noise of the dialogue itself.
        flat = [
            [
                self._fork(
                    origin,
                    origin.id,
                    derived_seed("continue", origin.seed, origin.tutor_turns, candidate, copy),
                    copy + 1,
                    row,
                )
                for copy, row in enumerate(own)
            ]
            for (origin, candidate), own in zip(branched, rows, strict=True)
        ]
        continued = [conversation for group in flat for conversation in group]
        self._students_reply(continued, [turn for turn in said for _ in range(copies)])
        groups = iter(flat)
        return [[next(groups) for _ in own] for own in turns]

    def split_off(self, offered: Offered, chosen: Sequence[Sequence[int]]) -> list[list[Conversation]]:
        """Dialogues of their own in which candidates chosen[i] of conversation i are said instead: [i][j].

        Call it before `accept`, and `go_on` after what follows them has taken note of them.
        """
        made = []
        for conversation, own, picks in zip(offered.conversations, offered.turns, chosen, strict=True):
            rows = self.tutor.fork([conversation.row] * len(picks), [own[k] for k in picks], 1)
            at = conversation.tutor_turns
            made.append(
                [
                    self._fork(
                        conversation,
                        f"{conversation.id}{BRANCH}{at}.{k}",
                        derived_seed("branch", conversation.seed, at, k),
                        k + 1,
                        row,
                    )
                    for k, (row,) in zip(picks, rows, strict=True)
                ]
            )
        return made

    def go_on(self, split: Sequence[Conversation], said: Sequence[TutorTurn]) -> None:
        """Let dialogues made by `split_off` hear their students; from now on they are part of the batch."""
        self.conversations += split
        self._students_reply(split, said)

    def play_out(self, conversations: Sequence[Conversation]) -> None:
        """Play the given conversations to their end, one sampled turn at a time."""
        while waiting := [c for c in conversations if not c.over]:
            offered = self.sample(waiting, 1)
            self.accept(offered, [0] * len(offered.conversations))

    def _fork(self, origin: Conversation, name: str, seed: int, copy: int, row: int) -> Conversation:
        return Conversation(
            id=name,
            seed=seed,
            student=self.students.fork(origin.student, copy),
            messages=list(origin.messages),
            turns=list(origin.turns),
            opening_turns=origin.opening_turns,
            row=row,
        )

    def _students_reply(self, spoken_to: Sequence[Conversation], said: Sequence[TutorTurn]) -> None:
        replies = self.students.reply([c.student for c in spoken_to], [turn.text for turn in said])
        going_on, heard = [], []
        for conversation, turn, reply in zip(spoken_to, said, replies, strict=True):
            conversation.malformed += self.tutor.malformed(turn)
            if isinstance(reply, Failure):
                conversation.failure = reply
                continue
            ids = self._note(conversation, turn, reply)
            conversation.ended = self._ending(conversation, reply, len(ids))
            if not conversation.over:
                going_on.append(conversation.row)
                heard.append(ids)
        self.tutor.hear(going_on, heard)
        over = [conversation for conversation in spoken_to if conversation.over]
        self._examine([conversation for conversation in over if conversation.failure is None])
        self._leave(over)

    def _note(self, conversation: Conversation, turn: TutorTurn, reply: str) -> list[int]:
        """Write down the tutor's turn and the student's reply; returns the latter's token ids."""
        answer = Message(role="user", content=reply)
        conversation.messages.append(Message(role="assistant", content=turn.text))
        ids = self.tutor.following(conversation.messages, turn, answer)
        conversation.messages.append(answer)
        conversation.turns += [
            Turn(speaker="tutor", content=turn.text, token_ids=list(turn.token_ids) or None),
            Turn(speaker="student", content=reply, token_ids=ids or None),
        ]
        return ids

    def _ending(self, conversation: Conversation, reply: str, tokens: int) -> Ending | None:
        if conversation.student.over:
            return "student"
        if self.turns is not None and conversation.tutor_turns >= self.turns:
            return "turns"
        if any(text in reply for text in self.stop):
            return "stop"
        return None if self.tutor.fits(conversation.row, tokens) else "max_tokens"

    def _examine(self, finished: Sequence[Conversation]) -> None:
        if self.post_test is None or not finished:
            return
        answers = self.students.reply([c.student for c in finished], [self.post_test] * len(finished))
        for conversation, answer in zip(finished, answers, strict=True):
            if isinstance(answer, Failure):
                conversation.failure = answer
            else:
                conversation.post_test = answer

    def _leave(self, over: Sequence[Conversation]) -> None:
        self.tutor.leave([conversation.row for conversation in over])
        self.students.leave([conversation.student for conversation in over])


_SPEAKER: dict[str, Literal["tutor", "student"]] = {"assistant": "tutor", "user": "student"}

Choose = Callable[[Offered], Sequence[int]]


def play(batch: DialogueBatch, num_candidates: int, choose: Choose) -> None:
    """Play all conversations of the batch to their end; `choose` picks which candidate of each is said."""
    while waiting := batch.active:
        offered = batch.sample(waiting, num_candidates)
        batch.accept(offered, choose(offered))


def first_candidate(offered: Offered) -> list[int]:
    """No choice at all: plain sampling."""
    return [0] * len(offered.conversations)


@dataclass(frozen=True)
class Continuation:
    """`guidance`: weights over the scores' objectives (None: all alike); `temperature`: of `sampled`."""

    kind: Literal["best", "sampled", "random"] = "random"
    guidance: Weights | None = None
    temperature: float = 1.0


def totals(scores: Sequence[Mapping[str, float]], guidance: Weights | None) -> np.ndarray:
    """Weighted sum [K] of scores, each objective standardised among the K candidates (0 where all agree)."""
    objectives = list(scores[0])
    values = np.array([[own[name] for name in objectives] for own in scores])
    spread = values.std(axis=0)
    standardised = (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    weights = (guidance or Weights.balanced(objectives)).over(objectives)
    total: np.ndarray = standardised @ np.array(weights)
    return total


def continuing(
    continuation: Continuation,
    conversation: Conversation,
    count: int,
    scores: Sequence[Mapping[str, float]] | None,
) -> list[int]:
    """Candidates of one moment, the one that goes on first; the others in the order they would follow.

    Draws depend on the dialogue and the turn alone. `sampled` draws all of them without replacement
    (Gumbel-max), so that the first is distributed as softmax(total / temperature).
    """
    seed, turn = conversation.seed, conversation.tutor_turns
    if continuation.kind == "random":
        first = derived_seed("goes on", seed, turn) % count
        return [first, *(k for k in range(count) if k != first)]
    assert scores is not None, "the configuration asks for a reward model"
    total = totals(scores, continuation.guidance)
    if continuation.kind == "sampled":
        noise = [unit_draw("sampled", seed, turn, k) for k in range(count)]
        total = total / continuation.temperature - np.array([math.log(-math.log(u or 0.5)) for u in noise])
    return [int(k) for k in np.argsort(-total, kind="stable")]
