"""What dialogues weigh on disk, and how fast one process makes pairs of them."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import Any

from mahalo_ray.config import PairsConfig
from mahalo_ray.data.records import Candidate, CandidateSet, Message
from mahalo_ray.rollouts.pair_building import CandidateShards, build_pairs

_LETTERS = random.Random(0)
_VOCABULARY = ["".join(_LETTERS.choices("etaoinshrdlu", k=_LETTERS.randint(2, 8))) for _ in range(5000)]


def shards(dialogues: int) -> dict[str, Any]:
    """Bytes of the shards, and what one process needs to make pairs of them: 6 turns, 5 candidates of 96
    tokens, replies of 48."""
    turns, count = 6, 5
    sets = [one for n in range(dialogues) for one in _candidate_sets(n, turns, count)]
    with tempfile.TemporaryDirectory() as folder:
        CandidateSet.save(sets, f"{folder}/part.parquet")
        size = Path(folder, "part.parquet").stat().st_size
        began = time.perf_counter()
        pairs, report = build_pairs(CandidateShards(folder), "accuracy", PairsConfig())
        made = sum(1 for _ in pairs)
        seconds = time.perf_counter() - began
    assert made == report.pairs
    found = {
        "sets": len(sets),
        "bytes_per_dialogue": size / dialogues,
        "pairs": made,
        "sets_per_s": len(sets) / seconds,
    }
    print(f"\n{turns} turns of {count} candidates: {size / dialogues / 1000:.1f} kB of shards per dialogue")
    print(f"pairs of one objective: {found['sets_per_s']:.0f} sets/s in one process")
    return found


def _candidate_sets(dialogue: int, turns: int, count: int) -> list[CandidateSet]:
    """What a dialogue of random words leaves: random tokens compress as badly as tokens can."""
    draw = random.Random(dialogue)

    def ids(length: int) -> list[int]:
        return [draw.randrange(49152) for _ in range(length)]

    prompt, said, sets = ids(200), [Message(role="user", content=_text(draw, 200))], []
    for turn in range(turns):
        candidates = [
            Candidate(content=_text(draw, 96), token_ids=ids(96), scores={"accuracy": draw.random()})
            for _ in range(count)
        ]
        sets.append(
            CandidateSet(
                id=f"d{dialogue}/{turn}",
                dialogue=f"d{dialogue}",
                topic="t",
                turn=turn,
                prompt=list(said),
                prompt_ids=list(prompt),
                candidates=candidates,
                chosen=0,
            )
        )
        prompt += candidates[0].token_ids + ids(48)
        said += [
            Message(role="assistant", content=candidates[0].content),
            Message(role="user", content=_text(draw, 48)),
        ]
    return sets


def _text(draw: random.Random, tokens: int) -> str:
    """About as many characters as English text of this many tokens has, from a vocabulary of 5000 words."""
    return " ".join(_VOCABULARY[min(int(draw.paretovariate(0.6)) - 1, 4999)] for _ in range(tokens * 3 // 4))
