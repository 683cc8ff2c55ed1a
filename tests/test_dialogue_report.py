"""The summary page of a set of dialogues."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from mahalo_ray.data.records import Candidate, CandidateSet, Dialogue, Message, Turn
from mahalo_ray.evaluation.dialogue_report import write_dialogue_report
from mahalo_ray.rollouts.dialogue_job import CANDIDATES, DIALOGUES

RUN = {
    "failed": {"http_500": 2},
    "failed_attempts": {"http_500": 3},
    "retries": {"http_429": 7},
    "actor_deaths": 1,
    "endpoint_requests": 5,
    "endpoint_tokens": 50,
    "endpoint_cost": 0.0,
    "pairs": {},
}


def dialogue(number: int, knowledge: str, kept: float) -> Dialogue:
    return Dialogue(
        id=f"d{number}",
        topic="t",
        turns=[
            Turn(speaker="student", content="<script>alert(1)</script>"),
            Turn(speaker="tutor", content=f"Say more, {number}."),
            Turn(speaker="student", content="Hm."),
        ],
        outcome={},
        seed=number,
        source="test",
        ended="turns",
        persona={"knowledge": knowledge},
        checks={"student_turns": 2, "role_flips": 1, "post_test_kept": kept},
    )


def candidates(number: int) -> CandidateSet:
    return CandidateSet(
        id=f"d{number}/0",
        dialogue=f"d{number}",
        topic="t",
        turn=0,
        prompt=[Message(role="user", content="?" * 10)],
        prompt_ids=[1],
        candidates=[
            Candidate(content="x", token_ids=[1] * 4, scores={"accuracy": 0.25}),
            Candidate(content="y", token_ids=[1] * 8, scores={"accuracy": 0.75}),
        ],
        chosen=1,
    )


class Visible(HTMLParser):
    """Tags and the text between them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onclick"}

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def test_the_page_shows_what_was_played(tmp_path: Path) -> None:
    for shard, numbers in enumerate(([0, 1], [2])):
        made = [dialogue(n, "none" if n else "solid", float(n == 1)) for n in numbers]
        Dialogue.save(made, str(tmp_path / DIALOGUES / f"part-{shard}.parquet"))
        CandidateSet.save(
            [candidates(n) for n in numbers], str(tmp_path / CANDIDATES / f"part-{shard}.parquet")
        )
    figures = write_dialogue_report(str(tmp_path), "mine", RUN, str(tmp_path / "page.html"))
    assert (figures["dialogues"], figures["candidates"], figures["ended"]) == (3, 6, {"turns": 3})
    (turn,) = figures["turns"]
    assert (turn["moments"], turn["tutor_mean"], turn["student_mean"]) == (3, 8, 10)
    assert turn["scores"]["accuracy"] == {"all": 0.5, "said": 0.75, "spread": 0.25}
    groups = {group["name"]: group for group in figures["groups"]}
    assert set(groups) == {"all", "knowledge: none", "knowledge: solid"}
    assert groups["knowledge: none"]["estimates"]["post_test_kept"]["mean"] == pytest.approx(0.5)
    assert groups["all"]["estimates"]["role_flip_rate"]["mean"] == pytest.approx(0.5)
    page = Visible()
    page.feed((tmp_path / "page.html").read_text())
    assert "script" not in page.tags  # what students say is text
    text = " ".join(page.words)
    for words in ("http_500 2", "http_429 7", "knowledge: none", "Say more, 1.", "<script>alert(1)</script>"):
        assert words in text
