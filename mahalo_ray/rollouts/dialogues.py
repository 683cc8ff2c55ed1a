"""Many dialogues played at once by one tutor against simulated students, and what could be said in them.

All conversations that wait for a tutor turn are sampled in one batch; students answer in between. Every draw
is keyed by the dialogue's own seed, so results do not depend on which dialogues share a batch. No Ray here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mahalo_ray.config import BranchingConfig, Supervision
from mahalo_ray.data.records import Candidate, CandidateSet, Message, Turn
from mahalo_ray.decoding.guidance import Choice, Guidance, Prompt, StepCandidate
from mahalo_ray.decoding.scorers import ScorerGroup
from mahalo_ray.decoding.stopping import StopReason
from mahalo_ray.domains.protocol import Episode, outcomes, prefix_judgements
from mahalo_ray.endpoints import Failure
from mahalo_ray.rollouts.students import EpisodeStudents, Student, Students, TutorTurn
from mahalo_ray.rollouts.tutors import BRANCH, Conversation, Ending, Exchange, Proposal, Tutor, with_turn
from mahalo_ray.seeding import derived_seed, unit_draw

# Which candidates of every proposal are said: the first in its conversation, the others in dialogues that
# branch off there.
Choose = Callable[[Sequence[Proposal]], Sequence[Sequence[int]]]

_SPEAKER: dict[str, Literal["tutor", "student"]] = {"assistant": "tutor", "user": "student"}


def first_candidate(proposals: Sequence[Proposal]) -> list[list[int]]:
    """No choice at all: plain sampling."""
    return [[0] for _ in proposals]


@dataclass
class DialogueBatch:
    """Conversations of one tutor with students.

    `turns`: tutor turns per dialogue (None: until the student ends it). A student's reply that holds one of
    `stop` ends the dialogue too. With `post_test`, students of finished dialogues are asked that. `scorers`:
    reward models that score every proposal of the dialogues opened here.
    """

    tutor: Tutor
    students: Students[Any] = field(default_factory=EpisodeStudents)
    turns: int | None = None
    stop: tuple[str, ...] = ()
    post_test: str | None = None
    instruction: str | None = None
    scorers: ScorerGroup | None = None
    conversations: list[Conversation] = field(default_factory=list)

    def open(self, students: Sequence[Student], ids: Sequence[str], purpose: str) -> list[Conversation]:
        """Start dialogues with what was said before. `purpose` separates their random draws from those of
        other uses of the same students."""
        system = [] if self.instruction is None else [Message(role="system", content=self.instruction)]
        opened = []
        for student, name in zip(students, ids, strict=True):
            messages = student.opening_messages
            turns = [Turn(speaker=_SPEAKER[message.role], content=message.content) for message in messages]
            seed = derived_seed(purpose, student.seed)
            opened.append(Conversation(name, seed, student, system + messages, turns, len(turns)))
        for conversation, token_ids in zip(opened, self.tutor.start(opened), strict=True):
            if isinstance(token_ids, Failure):
                conversation.failure = token_ids
                continue
            last = conversation.turns[-1]
            conversation.turns[-1] = last.model_copy(update={"token_ids": token_ids or None})
        if self.scorers is not None:
            rows = self.scorers.open([Prompt(c.messages, c.token_ids()) for c in opened])
            for conversation, row in zip(opened, rows, strict=True):
                conversation.scorer_row, conversation.turns_scored = row, len(conversation.turns)
        self.conversations += opened
        return opened

    @property
    def active(self) -> list[Conversation]:
        """Conversations that wait for a tutor turn."""
        return [conversation for conversation in self.conversations if not conversation.over]

    def play(self, num_candidates: int = 1, choose: Choose = first_candidate) -> None:
        """Play all conversations to their ends; `choose` picks which candidates are said."""
        while waiting := self.active:
            if proposals := self.propose(waiting, num_candidates):
                self.commit(proposals, choose(proposals))

    def propose(self, waiting: Sequence[Conversation], num_candidates: int) -> list[Proposal]:
        """Candidate tutor turns, in one batch, scored where scorers follow; a conversation that gets none
        has failed."""
        answers = self.tutor.propose(waiting, num_candidates)
        proposals = [answer for answer in answers if isinstance(answer, Proposal)]
        for conversation, answer in zip(waiting, answers, strict=True):
            if isinstance(answer, Failure):
                self._fail(conversation, answer)
        followed = [p for p in proposals if p.conversation.scorer_row >= 0]
        if self.scorers is not None and followed:
            for proposal, scores in zip(followed, self._scores(self.scorers, followed), strict=True):
                if isinstance(scores, Tensor):
                    proposal.scores = scores
                else:
                    failure = Failure("scoring", str(scores), 1)
                    self.tutor.commit([Exchange(proposal, 0, proposal.conversation, None, is_last=True)])
                    self._fail(proposal.conversation, failure)
        return [proposal for proposal in proposals if proposal.conversation.failure is None]

    def commit(self, proposals: Sequence[Proposal], chosen: Sequence[Sequence[int]]) -> None:
        """Let the chosen candidates be said: the students reply, finished conversations leave. Further ones
        of a proposal are said in dialogues of their own, which are part of the batch from now on."""
        said = [(p, picks[0], p.conversation) for p, picks in zip(proposals, chosen, strict=True)]
        branches = [
            [(p, k, self._branch(p.conversation, k)) for k in picks[1:]]
            for p, picks in zip(proposals, chosen, strict=True)
        ]
        if self.scorers is not None:
            self._tell_scorers(self.scorers, said, branches)
        apart = [branch for own in branches for branch in own]
        self.conversations += [conversation for _, _, conversation in apart]
        self._say([*said, *apart])

    def continue_copies(
        self, proposals: Sequence[Proposal], chosen: Sequence[Sequence[int]], copies: int
    ) -> list[list[list[Conversation]]]:
        """For proposal i and its candidate chosen[i][n]: `copies` independent dialogues that go on after it.

        The originals stay as they are. Returns [i][n][copy], after the students' first replies; `play_out`
        plays on. A turn's tokens are encoded once for all its copies.
        """
        groups = [
            [self._copies(proposal, k, number, copies) for number, k in enumerate(picks)]
            for proposal, picks in zip(proposals, chosen, strict=True)
        ]
        self._say([copy for own in groups for group in own for copy in group])
        return [[[conversation for _, _, conversation in group] for group in own] for own in groups]

    def _copies(
        self, proposal: Proposal, k: int, number: int, copies: int
    ) -> list[tuple[Proposal, int, Conversation]]:
        """Copies in which candidate k, the `number`-th that is continued, is said. Copies are numbered from
        1: copy 0 is the noise of the dialogue itself."""
        origin = proposal.conversation
        key = ("continue", origin.seed, origin.tutor_turns, number)
        return [
            (proposal, k, self._fork(origin, origin.id, derived_seed(*key, copy), copy + 1))
            for copy in range(copies)
        ]

    def play_out(self, copies: Sequence[Conversation]) -> None:
        """Play dialogues of `continue_copies` to their ends, one sampled turn at a time."""
        apart = DialogueBatch(
            self.tutor, self.students, self.turns, self.stop, self.post_test, conversations=list(copies)
        )
        apart.play()

    def _scores(self, scorers: ScorerGroup, proposals: Sequence[Proposal]) -> list[Tensor | ValueError]:
        """[K, O] of every proposal's candidates. What is no step of a turn ends it, and is closed even if
        it was cut off."""
        behind = [
            p.conversation for p in proposals if p.conversation.turns_scored < len(p.conversation.turns)
        ]
        scorers.hear(
            [conversation.scorer_row for conversation in behind],
            [Prompt(list(c.messages), c.token_ids(c.turns_scored)) for c in behind],
        )
        for conversation in behind:
            conversation.turns_scored = len(conversation.turns)
        choices = [
            Choice(
                p.conversation.scorer_row,
                list(map(_candidate, p.turns)),
                [not turn.goes_on for turn in p.turns],
            )
            for p in proposals
        ]
        return [found.scores for found in scorers.score(choices)]

    def _tell_scorers(
        self,
        scorers: ScorerGroup,
        said: Sequence[tuple[Proposal, int, Conversation]],
        branches: Sequence[Sequence[tuple[Proposal, int, Conversation]]],
    ) -> None:
        """Branches first: they begin where their origins are now."""
        for own in branches:
            followed = [(p, k, c) for p, k, c in own if p.conversation.scorer_row >= 0]
            rows = scorers.duplicate([p.conversation.scorer_row for p, _, _ in followed])
            for (_, _, conversation), row in zip(followed, rows, strict=True):
                conversation.scorer_row = row
        followed = [(p, k, c) for own in [*branches, said] for p, k, c in own if c.scorer_row >= 0]
        scorers.accept(
            [c.scorer_row for _, _, c in followed], [_candidate(p.turns[k]) for p, k, _ in followed]
        )
        for _, _, conversation in followed:
            conversation.turns_scored += 1

    def _branch(self, origin: Conversation, k: int) -> Conversation:
        turn = origin.tutor_turns
        name, seed = f"{origin.id}{BRANCH}{turn}.{k}", derived_seed("branch", origin.seed, turn, k)
        branch = self._fork(origin, name, seed, k + 1)
        branch.turns_scored = origin.turns_scored
        return branch

    def _fork(self, origin: Conversation, name: str, seed: int, copy: int) -> Conversation:
        return Conversation(
            id=name,
            seed=seed,
            student=self.students.fork(origin.student, copy),
            messages=list(origin.messages),
            turns=list(origin.turns),
            opening_turns=origin.opening_turns,
        )

    def _say(self, said: Sequence[tuple[Proposal, int, Conversation]]) -> None:
        """Students reply to what was said in their conversations, and the tutor reads the replies."""
        students = [conversation.student for _, _, conversation in said]
        replies = self.students.reply(students, [proposal.turns[k] for proposal, k, _ in said])
        exchanges = []
        for (proposal, k, conversation), reply in zip(said, replies, strict=True):
            conversation.malformed += proposal.turns[k].is_malformed
            if isinstance(reply, Failure):
                conversation.failure = reply
            else:
                conversation.ended = self._ending(conversation, proposal.turns[k], reply)
            text = None if isinstance(reply, Failure) else reply
            exchanges.append(Exchange(proposal, k, conversation, text, conversation.over))
        for exchange, committed in zip(exchanges, self.tutor.commit(exchanges), strict=True):
            conversation = exchange.conversation
            if conversation.failure is not None:
                continue
            _write_down(conversation, exchange.turn, exchange.reply, committed.reply_ids)
            if not conversation.over and not committed.has_room:
                conversation.ended = "max_tokens"
        over = [exchange.conversation for exchange in exchanges if exchange.conversation.over]
        self._examine([conversation for conversation in over if conversation.failure is None])
        self.students.drop([conversation.student for conversation in over])

    def _ending(self, conversation: Conversation, turn: TutorTurn, reply: str | None) -> Ending | None:
        """Why the dialogue is over once turn and reply are written down; None if it may go on."""
        if turn.goes_on:
            return "steps" if conversation.student.over else None
        if reply is None:
            return "answer"
        if conversation.student.over:
            return "student"
        if self.turns is not None and conversation.tutor_turns + 1 >= self.turns:
            return "turns"
        return "stop" if any(text in reply for text in self.stop) else None

    def _fail(self, conversation: Conversation, failure: Failure) -> None:
        conversation.failure = failure
        self.students.drop([conversation.student])

    def _examine(self, finished: Sequence[Conversation]) -> None:
        if self.post_test is None or not finished:
            return
        asked = [TutorTurn(self.post_test)] * len(finished)
        answers = self.students.reply([c.student for c in finished], asked)
        for conversation, answer in zip(finished, answers, strict=True):
            if isinstance(answer, Failure):
                conversation.failure = answer
            else:
                conversation.post_test = answer


def _write_down(
    conversation: Conversation, turn: TutorTurn, reply: str | None, reply_ids: Sequence[int]
) -> None:
    conversation.messages = with_turn(conversation.messages, turn.text)
    conversation.turns.append(
        Turn(speaker="tutor", content=turn.text, token_ids=list(turn.token_ids) or None)
    )
    if reply is not None:
        conversation.messages.append(Message(role="user", content=reply))
        said = Turn(speaker="student", content=reply, token_ids=list(reply_ids) or None)
        conversation.turns.append(said)


def _candidate(turn: TutorTurn) -> StepCandidate:
    reason = StopReason.STEP if turn.goes_on else StopReason.TOKEN
    return StepCandidate(turn.text, list(turn.token_ids), reason, {}, None)


@dataclass(frozen=True)
class TurnSelection:
    """Which candidate of a turn goes on. `best` and `sampled` choose as guided decoding does, by `guidance`;
    `random` draws uniformly, so that later turns are met as the policy meets them."""

    kind: Literal["best", "sampled", "random"] = "random"
    guidance: Guidance | None = None

    def __call__(self, proposals: Sequence[Proposal]) -> list[list[int]]:
        """The first of every proposal's order alone: no branches."""
        return [self.order(proposal)[:1] for proposal in proposals]

    def order(self, proposal: Proposal) -> list[int]:
        """The candidates, the one that goes on first; the others in the order in which they would follow.
        Draws depend on the dialogue and the turn alone."""
        count, seed = len(proposal.turns), proposal.conversation.seed
        turn = proposal.conversation.tutor_turns
        if self.kind == "random":
            first = derived_seed("goes on", seed, turn) % count
            return [first, *(k for k in range(count) if k != first)]
        assert self.guidance is not None and proposal.scores is not None, "choosing by scores needs scorers"
        totals = self.guidance.totals(proposal.scores)
        has_begun = proposal.conversation.in_turn
        silent = [not has_begun and not candidate.text.strip() for candidate in proposal.turns]
        uniform = torch.tensor(
            [unit_draw("sampled", seed, turn, k) for k in range(count)], dtype=torch.float64
        )
        return self.guidance.order(totals, silent, uniform)


Labels = dict[str, float]


@dataclass
class Collector:
    """Chooses what is said in a batch, and keeps every candidate turn: `batch.play(K, Collector(batch))`.

    `continuations` M > 0 labels each distinct candidate by M independent continuations to the end (of a
    domain's episodes only), for every objective of `supervision` as it says: `rollout_value` is the mean
    outcome, discounted by `gamma` per tutor turn that follows the candidate; `judged_rollouts` whether more
    than half of the outcomes are above 0.5; `judged_prefix` the mean judgement of the dialogue right after
    the candidate; `pairwise` the mean outcome, from which pairs are made. With `branching`, other candidates
    than the selected one go on too, as dialogues of their own.
    """

    batch: DialogueBatch
    selection: TurnSelection = field(default_factory=TurnSelection)
    continuations: int = 0
    gamma: float = 1.0
    branching: BranchingConfig | None = None
    supervision: Mapping[str, Supervision] = field(default_factory=dict)
    sets: list[CandidateSet] = field(default_factory=list)

    def __call__(self, proposals: Sequence[Proposal]) -> list[list[int]]:
        labels = self._labels(proposals) if self.continuations else [None] * len(proposals)
        chosen = []
        for proposal, own_labels in zip(proposals, labels, strict=True):
            order = self.selection.order(proposal)
            self.sets.append(self._candidate_set(proposal, own_labels, order[0]))
            chosen.append([order[0], *self._branches(proposal, order)])
        return chosen

    def _branches(self, proposal: Proposal, order: Sequence[int]) -> list[int]:
        """Which candidates besides the first of `order` go on: other words than those taken already."""
        if self.branching is None or proposal.conversation.tutor_turns >= self.branching.depth:
            return []
        going_on = {proposal.turns[order[0]]: order[0]}
        for k in order[1:]:
            if len(going_on) < self.branching.width:
                going_on.setdefault(proposal.turns[k], k)
        return list(going_on.values())[1:]

    def _labels(self, proposals: Sequence[Proposal]) -> list[list[Labels]]:
        """Of every candidate [i][k]; candidates with the same words share theirs."""
        distinct = [list(dict.fromkeys(proposal.turns)) for proposal in proposals]
        firsts = [[p.turns.index(turn) for turn in own] for p, own in zip(proposals, distinct, strict=True)]
        assert isinstance(self.batch.students, EpisodeStudents), "labels by continuations are of episodes"
        groups = self.batch.continue_copies(proposals, firsts, self.continuations)
        copies = [copy for own in groups for of_candidate in own for copy in of_candidate]
        # One after the other in the order of the copies, who are judged all together.
        judged = iter(self._judgements(copies))
        judged_of = [[self._mean_of(judged, len(of_candidate)) for of_candidate in own] for own in groups]
        self.batch.play_out(copies)
        ended = iter(outcomes([_episode(copy) for copy in copies], self.supervision))
        labels = []
        for proposal, turns, own, own_judged in zip(proposals, distinct, groups, judged_of, strict=True):
            by_turn = {
                turn: self._label(
                    of_candidate, proposal.conversation, judgements, [next(ended) for _ in of_candidate]
                )
                for turn, of_candidate, judgements in zip(turns, own, own_judged, strict=True)
            }
            labels.append([by_turn[turn] for turn in proposal.turns])
        return labels

    def _judgements(self, copies: Sequence[Conversation]) -> list[Mapping[str, float]]:
        """Of copies right after a candidate; nothing where no objective is judged there."""
        names = self._judged_at_once
        return prefix_judgements([_episode(copy) for copy in copies], names) if names else [{}] * len(copies)

    @property
    def _judged_at_once(self) -> list[str]:
        return [name for name, kind in self.supervision.items() if kind == "judged_prefix"]

    def _mean_of(self, judgements: Iterator[Mapping[str, float]], count: int) -> Labels:
        """Of the objectives that are judged right after a candidate: the mean over its copies."""
        own = [next(judgements) for _ in range(count)]
        return {name: _mean([judgement[name] for judgement in own]) for name in self._judged_at_once}

    def _label(
        self,
        copies: Sequence[Conversation],
        origin: Conversation,
        judged: Labels,
        ended: Sequence[Mapping[str, float]],
    ) -> Labels:
        """The labels of a candidate whose copies have been played to their ends, with these outcomes."""
        discounts = [self.gamma ** (copy.tutor_turns - origin.tutor_turns - 1) for copy in copies]
        labels = {}
        for name, kind in self.supervision.items():
            values = [outcome[name] for outcome in ended]
            if kind == "judged_prefix":
                labels[name] = judged[name]
            elif kind == "judged_rollouts":
                labels[name] = float(sum(value > 0.5 for value in values) > len(values) / 2)
            elif kind == "rollout_value":
                labels[name] = _mean([v * discount for v, discount in zip(values, discounts, strict=True)])
            else:
                labels[name] = _mean(values)
        return labels

    def _candidate_set(
        self, proposal: Proposal, labels: Sequence[Labels] | None, chosen: int
    ) -> CandidateSet:
        conversation, scores = proposal.conversation, proposal.scores
        objectives = () if self.batch.scorers is None else self.batch.scorers.objectives
        candidates = [
            Candidate(
                content=turn.text,
                token_ids=list(turn.token_ids),
                labels=None if labels is None else labels[k],
                scores=None if scores is None else dict(zip(objectives, scores[k].tolist(), strict=True)),
            )
            for k, turn in enumerate(proposal.turns)
        ]
        return CandidateSet(
            id=f"{conversation.id}/{conversation.tutor_turns}",
            dialogue=conversation.id,
            topic=conversation.student.topic,
            turn=conversation.tutor_turns,
            prompt=list(conversation.messages),
            prompt_ids=conversation.token_ids(),
            candidates=candidates,
            chosen=chosen,
        )


def _episode(conversation: Conversation) -> Episode:
    """The student of a batch whose students are a domain's episodes."""
    episode: Episode = conversation.student
    return episode


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
