"""One actor's side of rollouts: dialogues in flight, and kept caches against encoding again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from measuring import table
from shapes import Shape

from mahalo_ray.config import GridCases, GridProblem, PersonasConfig, SamplingConfig
from mahalo_ray.data.records import Message
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.policy import CausalPolicy
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.domains.tutoring.personas import PersonaSampler, load_cases
from mahalo_ray.endpoints import Failure
from mahalo_ray.rollouts.dialogues import DialogueBatch
from mahalo_ray.rollouts.students import PersonaStudent, TutorTurn
from mahalo_ray.rollouts.tutors import PolicyTutor

WORDS = " ".join(f"t{i}" for i in range(40))
REPLY = " ".join(f"t{i}" for i in range(100, 120))
GRID = GridCases(problems=[GridProblem(topic="t", problem=WORDS)], misconceptions=[REPLY])
TURN_TOKENS, REPLY_TOKENS = 40, 20
_PARAMS = SamplingParams()


class ListedStudents:
    """Students that always say the same: what they cost is left out of a measurement of tutors."""

    def reply(
        self, students: Sequence[PersonaStudent], said: Sequence[TutorTurn]
    ) -> list[str | Failure | None]:
        return [REPLY] * len(students)

    def fork(self, student: PersonaStudent, copy: int) -> PersonaStudent:
        return student.forked(copy)

    def drop(self, students: Sequence[PersonaStudent]) -> None:
        """Nothing is kept."""


def policy_of(shape: Shape, device: torch.device) -> tuple[CausalPolicy, ChatFormat]:
    """Random weights; the end token is as unlikely as any other, so nearly all turns have full length."""
    return CausalPolicy(shape.build(0, torch.float32, device)), ChatFormat(shape.tokenizer())


def persona_students(count: int) -> list[PersonaStudent]:
    sampler = PersonaSampler(load_cases(GRID)[0], PersonasConfig(), 0)
    return [PersonaStudent(sampler.draw(n)[0].task, sampler.draw(n)[1], n) for n in range(count)]


def in_flight(shape: Shape, quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """One actor's work, in this process: tokens/s with n dialogues in flight."""
    policy, chat = policy_of(shape, device)
    dialogues, turns = (8, 2) if quick else (32, 4)
    students = persona_students(dialogues)
    found: dict[int, list[float]] = {}
    for repeat in range(1 if quick else 4):
        for n in (1, 8) if quick else (1, 8, 32):
            # One at a time takes its time: a part of the dialogues shows its pace.
            own = students[: max(n, dialogues // 4)]
            began, tokens = time.perf_counter(), 0
            for at in range(0, len(own), n):
                batch = _batch(policy, chat, turns)
                batch.open(own[at : at + n], [f"d{i}" for i in range(at, at + n)], "benchmark")
                batch.play()
                assert isinstance(batch.tutor, PolicyTutor)
                tokens += batch.tutor.engine.tokens_forwarded
            if repeat or quick:  # the first round warms up
                found.setdefault(n, []).append(tokens / (time.perf_counter() - began))
    rows = [
        {"in_flight": n, "tokens_per_s": sorted(rates)[len(rates) // 2], "rates": rates}
        for n, rates in found.items()
    ]
    one = rows[0]["tokens_per_s"]
    print(f"\none actor, {turns} turns of {TURN_TOKENS} tokens, replies of {REPLY_TOKENS}")
    print(
        table(
            ["dialogues in flight", "tokens/s", "times one"],
            [
                [str(r["in_flight"]), f"{r['tokens_per_s']:.0f}", f"{r['tokens_per_s'] / one:.1f}"]
                for r in rows
            ],
        )
    )
    return rows


def _batch(policy: CausalPolicy, chat: ChatFormat, turns: int) -> DialogueBatch:
    sampling = SamplingConfig(max_new_tokens=TURN_TOKENS)
    tutor = PolicyTutor(Engine(policy), chat, sampling)
    return DialogueBatch(tutor, ListedStudents(), turns)


def kept_cache(shape: Shape, quick: bool, device: torch.device) -> dict[str, Any]:
    """8 turns over the kept cache, and with the whole history encoded again at every turn."""
    policy, chat = policy_of(shape, device)
    count, turns = (2, 3) if quick else (16, 8)
    seeds = list(range(count))
    prompt, reply = chat.prompt_ids([Message(role="user", content=WORDS)]), chat.encode_reply(REPLY)

    def kept() -> tuple[list[list[int]], int]:
        engine = Engine(policy)
        rows = engine.add(count)
        engine.append(rows, [prompt] * count)
        for _ in range(turns):
            drawn = engine.sample(rows, 1, _PARAMS, seeds, TURN_TOKENS, [chat.end_id])
            engine.accept(drawn, [0] * count)
            engine.append(rows, [reply] * count)
        return [engine.token_ids(row) for row in rows], engine.tokens_forwarded

    def again() -> tuple[list[list[int]], int]:
        said = [list(prompt) for _ in range(count)]
        forwarded = 0
        for turn in range(turns + 1):
            engine = Engine(policy)
            rows = engine.add(count)
            engine.append(rows, said)
            if turn < turns:
                drawn = engine.sample(rows, 1, _PARAMS, seeds, TURN_TOKENS, [chat.end_id])
                said = [old + own[0] + reply for old, own in zip(said, drawn.token_ids, strict=True)]
            forwarded += engine.tokens_forwarded
        return said, forwarded

    found: dict[str, Any] = {"turns": turns, "dialogues": count}
    conversations = {}
    for name, way in (("kept", kept), ("encoded_again", again)):
        times = []
        for _ in range(1 if quick else 3):
            began = time.perf_counter()
            conversations[name], tokens = way()
            times.append(time.perf_counter() - began)
        found[name] = {"tokens_encoded": tokens, "seconds": sorted(times)[len(times) // 2], "times": times}
    found["same_words"] = conversations["kept"] == conversations["encoded_again"]
    print(f"\n{turns} turns, {count} dialogues at once; the same words: {found['same_words']}")
    rows = [[n, str(found[n]["tokens_encoded"]), f"{found[n]['seconds']:.2f}"] for n in conversations]
    print(table(["history", "tokens through the model", "s"], rows))
    return found
