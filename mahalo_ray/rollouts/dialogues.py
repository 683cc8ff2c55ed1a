"""Many dialogues played at once by one policy against simulated students. No Ray here.

All conversations that wait for a tutor turn are sampled in one batch; students answer in between. Every draw
is keyed by the dialogue's own seed, so results do not depend on which dialogues share a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from mahalo_ray.config import SamplingConfig
from mahalo_ray.data.records import Dialogue, Message, Turn
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.batch import BatchedConversations
from mahalo_ray.decoding.candidates import Candidates
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.domains.tutoring.episode import Episode
from mahalo_ray.domains.tutoring.moves import is_malformed
from mahalo_ray.objectives import Weights


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass
class Conversation:
    """One dialogue in play: the episode, the chat so far, and its row in the engine."""

    id: str
    seed: int
    episode: Episode
    row: int
    messages: list[Message]
    turns: list[Turn]
    malformed: int = 0

    def dialogue(self, source: str) -> Dialogue:
        """The record of what was said so far."""
        return Dialogue(
            id=self.id,
            topic=self.episode.topic,
            turns=self.turns,
            outcome=self.episode.outcome(),
            seed=self.episode.student.seed,
            source=source,
        )

    @property
    def tutor_turns(self) -> int:
        return len(self.turns) // 2


@dataclass
class DialogueBatch:
    """Conversations over one engine. `weights`: decoding weights of a multi-head policy (None: one head)."""

    engine: BatchedConversations
    chat: ChatFormat
    sampling: SamplingConfig
    weights: Weights | None = None
    conversations: list[Conversation] = field(default_factory=list)

    def open(self, episodes: Sequence[Episode], ids: Sequence[str], purpose: str) -> list[Conversation]:
        """Start dialogues with the student's opening message. `purpose` separates their random draws from
        those of other uses of the same students."""
        rows = self.engine.add(len(episodes), self.weights)
        opened = []
        prompts = []
        for episode, name, row in zip(episodes, ids, rows, strict=True):
            opening = Message(role="user", content=episode.opening)
            prompts.append(self.chat.prompt_ids([opening]))
            first = Turn(speaker="student", content=episode.opening, token_ids=prompts[-1])
            seed = derived_seed(purpose, episode.student.seed)
            opened.append(Conversation(name, seed, episode, row, [opening], [first]))
        self.engine.append(rows, prompts)
        self.conversations += opened
        return opened

    @property
    def active(self) -> list[Conversation]:
        """Conversations that wait for a tutor turn."""
        return [conversation for conversation in self.conversations if not conversation.episode.over]

    def sample(self, waiting: Sequence[Conversation], num_candidates: int) -> Candidates:
        """Candidate tutor turns of the given conversations, in one batch."""
        sampling = self.sampling
        return self.engine.sample(
            [conversation.row for conversation in waiting],
            num_candidates,
            SamplingParams(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p),
            [conversation.seed for conversation in waiting],
            sampling.max_new_tokens,
            [self.chat.end_id],
        )

    def accept(self, waiting: Sequence[Conversation], candidates: Candidates, choice: Sequence[int]) -> None:
        """Let the chosen candidates be said: the students reply, finished conversations leave the engine."""
        self.engine.accept(candidates, choice)
        said = [candidates.token_ids[i][k] for i, k in enumerate(choice)]
        self._students_reply(waiting, said)

    def branch(
        self, waiting: Sequence[Conversation], turns: Sequence[Sequence[list[int]]], copies: int
    ) -> list[list[list[Conversation]]]:
        """For conversation i and its candidate turn k: `copies` independent dialogues that go on after it.

        The originals stay as they are. Returns [i][k][copy]; play on with `play_out`. A turn's tokens are
        encoded once for all its copies.
        """
        origins = [conversation for conversation, own in zip(waiting, turns, strict=True) for _ in own]
        said = [ids for own in turns for ids in own]
        rows = self.engine.duplicate([conversation.row for conversation in origins])
        self.engine.append(rows, said)
        extra = self.engine.duplicate([row for row in rows for _ in range(copies - 1)])
        per_turn = copies - 1
        flat: list[list[Conversation]] = []
        for number, (origin, row) in enumerate(zip(origins, rows, strict=True)):
            own_rows = [row, *extra[number * per_turn : (number + 1) * per_turn]]
            flat.append([self._fork(origin, number, copy, own) for copy, own in enumerate(own_rows)])
        continued = [conversation for group in flat for conversation in group]
        self._students_reply(continued, [ids for ids in said for _ in range(copies)])
        groups = iter(flat)
        return [[next(groups) for _ in own] for own in turns]

    def play_out(self, conversations: Sequence[Conversation]) -> None:
        """Play the given conversations to their end, one sampled turn at a time."""
        while waiting := [c for c in conversations if not c.episode.over]:
            candidates = self.sample(waiting, 1)
            self.accept(waiting, candidates, [0] * len(waiting))

    def _fork(self, origin: Conversation, number: int, copy: int, row: int) -> Conversation:
        # Copies are numbered from 1: copy 0 is the noise of the dialogue itself.
        return replace(
            origin,
            seed=derived_seed(origin.seed, number, copy),
            episode=origin.episode.fork(copy + 1),
            row=row,
            messages=list(origin.messages),
            turns=list(origin.turns),
        )

    def _students_reply(self, spoken_to: Sequence[Conversation], said: Sequence[list[int]]) -> None:
        rows, following = [], []
        for conversation, ids in zip(spoken_to, said, strict=True):
            text = self.text_of(ids)
            conversation.malformed += self.malformed(ids)
            reply = conversation.episode.hear(text)
            message = Message(role="assistant", content=text)
            answer = Message(role="user", content=reply)
            # A turn cut off at the token limit has no end token of its own.
            missing_end = [] if ids[-1:] == [self.chat.end_id] else [self.chat.end_id]
            after = missing_end + self.chat.following_ids([*conversation.messages, message], [answer])
            conversation.messages += [message, answer]
            conversation.turns += [
                Turn(speaker="tutor", content=text, token_ids=ids),
                Turn(speaker="student", content=reply, token_ids=after),
            ]
            if not conversation.episode.over:
                rows.append(conversation.row)
                following.append(after)
        self.engine.append(rows, following)
        self.engine.drop([c.row for c in spoken_to if c.episode.over])

    def text_of(self, ids: Sequence[int]) -> str:
        """The words of a sampled turn."""
        return self.chat.decode(ids)

    def malformed(self, ids: Sequence[int]) -> bool:
        """A turn that was cut off, holds special tokens inside, or has a sentence nobody understands."""
        special = set(self.chat.tokenizer.all_special_ids)
        return (
            ids[-1:] != [self.chat.end_id]
            or any(token in special for token in ids[:-1])
            or is_malformed(self.text_of(ids))
        )


Choose = Callable[[Sequence[Conversation], Candidates], Sequence[int]]


def play(batch: DialogueBatch, num_candidates: int, choose: Choose) -> None:
    """Play all conversations of the batch to their end; `choose` picks which candidate of each is said."""
    while waiting := batch.active:
        candidates = batch.sample(waiting, num_candidates)
        batch.accept(waiting, candidates, choose(waiting, candidates))


def first_candidate(waiting: Sequence[Conversation], candidates: Candidates) -> list[int]:
    """No choice at all: plain sampling."""
    return [0] * len(waiting)
