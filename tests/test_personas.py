"""Cases and personas: where they come from, how they are dealt, who may see what, and the checks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mahalo_ray.config import GridCases, GridProblem, MathDialCases, PersonasConfig, PrefixCases
from mahalo_ray.data.records import Turn
from mahalo_ray.data.rows import TooManyBadRows
from mahalo_ray.domains.tutoring.moves import consistency, final_number, same_number, speaks_as_tutor
from mahalo_ray.domains.tutoring.personas import (
    Persona,
    PersonaSampler,
    as_student_sees,
    load_cases,
    student_prompt,
    tutor_messages,
)

ROW: dict[str, Any] = {
    "qid": 7,
    "question": "Ann has 1,200 coins and spends 30. How many are left?",
    "ground_truth": "1200 - 30 = 1170\n 1,170",
    "student_incorrect_solution": "1200 + 30 = 1230\n 1230",
    "student_profile": "Cody is a 7th grade student.",
    "teacher_described_confusion": "adds instead of taking away",
}
GRID = GridCases(
    problems=[
        GridProblem(topic="sums", problem="What is 2 + 2?", answer="4"),
        GridProblem(topic="sums", problem="What is 3 + 4?", answer="7"),
        GridProblem(topic="loops", problem="What does range(3) give?"),
    ],
    misconceptions=["counts from one", "reads left to right"],
)


def rows(tmp_path: Path, *found: Any) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in found))
    return str(file)


def test_mathdial_rows_fall_into_what_each_side_may_see(tmp_path: Path) -> None:
    ((case,), report) = load_cases(MathDialCases(path=rows(tmp_path, ROW)))
    assert report.bad == []
    assert case.key is not None and case.key.answer == "1170"
    assert case.task.topic == "problem-7"
    persona = Persona("none", "low", "frustrated", "terse", case.misunderstanding, case.profile)
    student = student_prompt(case.task, persona).content
    tutor = " ".join(message.content for message in tutor_messages(case.task, "You tutor."))
    for secret in ("1170", "1,170"):
        assert secret not in student and secret not in tutor
    assert "adds instead of taking away" in student and "Cody" in student
    for of_the_student_alone in ("adds instead", "Cody", "frustrated", "bored"):
        assert of_the_student_alone not in tutor
    assert "1230" in tutor  # its own attempt, which the student shows


def test_a_student_that_has_understood_is_not_told_that_it_has_not(tmp_path: Path) -> None:
    ((case,), _) = load_cases(MathDialCases(path=rows(tmp_path, ROW)))
    solid = Persona("solid", "high", "friendly", "normal", case.misunderstanding, case.profile)
    assert "adds instead" not in student_prompt(case.task, solid).content


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    no_number = {**ROW, "ground_truth": "a lot"}
    file = rows(tmp_path, ROW, "{", no_number, {**ROW, "question": " "})
    cases, report = load_cases(MathDialCases(path=file))
    assert len(cases) == 1
    assert [row.line for row in report.bad] == [2, 3, 4]
    assert "'ground_truth' does not end with a number" in report.bad[1].reason
    assert "'question' is missing" in report.bad[2].reason
    with pytest.raises(TooManyBadRows, match=r"none of the 1 rows.*'ground_truth'"):
        load_cases(MathDialCases(path=rows(tmp_path, no_number)))


def test_beginnings_of_dialogues_end_with_the_student(tmp_path: Path) -> None:
    said = [{"role": "assistant", "content": "Why?"}, {"role": "user", "content": "Because."}]
    path = rows(tmp_path, {"id": "a:1", "messages": said}, {"messages": said[:1]}, {"messages": "hello"})
    (case,), report = load_cases(PrefixCases(path=path))
    assert (case.task.id, case.task.topic, case.task.problem, case.key) == ("a:1", "a:1", None, None)
    assert [message.content for message in case.task.opening] == ["Why?", "Because."]
    assert "the student last" in report.bad[0].reason and "'messages' is missing" in report.bad[1].reason


def test_a_grid_is_every_problem_with_every_misconception() -> None:
    cases, _ = load_cases(GRID)
    assert len(cases) == 6
    assert Counter(case.task.topic for case in cases) == {"sums": 4, "loops": 2}
    assert len({case.task.id for case in cases}) == 6
    assert [case.key is None for case in cases].count(True) == 2


@pytest.mark.parametrize("count", [1, 5, 54, 60, 500])
def test_personas_are_dealt_evenly_and_by_number_alone(count: int) -> None:
    cases, _ = load_cases(GRID)
    traits = PersonasConfig(tone=["neutral", "friendly"])
    sampler = PersonaSampler(cases, traits, seed=3)
    drawn = [sampler.draw(number) for number in range(count)]
    for counts, kinds in (
        (Counter(case.task.id for case, _ in drawn), 6),
        (Counter(tuple(persona.traits().values()) for _, persona in drawn), 54),
    ):
        dealt = [*counts.values(), *[0] * (kinds - len(counts))]
        assert max(dealt) - min(dealt) <= 1
    again = PersonaSampler(cases, traits, seed=3)
    assert [again.draw(number) for number in reversed(range(count))] == drawn[::-1]
    if count == 500:
        other = PersonaSampler(cases, traits, seed=4)
        assert [other.draw(number) for number in range(count)] != drawn


def test_the_student_sees_the_conversation_from_its_side() -> None:
    said = tutor_messages(load_cases(GRID)[0][0].task, "You tutor.")
    assert [message.role for message in said] == ["system", "user"]
    assert [message.role for message in as_student_sees(said)] == ["assistant"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("It is 1,200.50.", "1200.50"), ("so -3", "-3"), ("none", None), ("6 or 7", "7")],
)
def test_the_final_number(text: str, expected: str | None) -> None:
    assert final_number(text) == expected


def test_equal_numbers_are_equal_however_written() -> None:
    assert same_number("Answer: 6.0", "6") and same_number("$1,200", "1200")
    assert not same_number("6 and then 7", "6")


@pytest.mark.parametrize(
    "text",
    [
        "Great job! What is next?",
        "Tutor: try again",
        "How did you get 12?",
        "Let's break it down.",
        "You should add first.",
    ],
)
def test_words_of_a_tutor(text: str) -> None:
    assert speaks_as_tutor(text)


@pytest.mark.parametrize(
    "text", ["I got 12.", "Oh, you are right, I should add first.", "Can you help me?", "I don't get it."]
)
def test_words_of_a_student(text: str) -> None:
    assert not speaks_as_tutor(text)


def turns(*said: str) -> list[Turn]:
    """An opening by the student, then tutor and student in turn."""
    speakers = ["student", *["tutor", "student"] * len(said)]
    return [Turn(speaker=speaker, content=text) for speaker, text in zip(speakers, said, strict=False)]  # type: ignore[arg-type]


def test_consistency_of_a_student_that_keeps_to_its_persona() -> None:
    found = consistency(turns("2 + 2 is 5", "Sure?", "Yes, 5."), 1, "none", "4", "Answer: 5")
    assert found == {
        "student_turns": 1,
        "role_flips": 0,
        "answer_leaked": 0,
        "post_test_solved": 0,
        "post_test_kept": 1,
    }


def test_consistency_of_one_that_does_not() -> None:
    leaking = turns("2 + 2 is 5", "Sure?", "Great job! It is 4.")
    found = consistency(leaking, 1, "none", "4", "Answer: 4")
    assert (found["role_flips"], found["answer_leaked"], found["post_test_kept"]) == (1, 1, 0)
    told = turns("2 + 2 is 5", "It is 4.", "So 4.")
    found = consistency(told, 1, "none", "4", "Answer: 4")
    assert found["answer_leaked"] == 0 and "post_test_kept" not in found  # it was told: nothing is certain
    assert consistency(leaking, 1, "solid", "4", "Answer: 5")["post_test_kept"] == 0
    assert "answer_leaked" not in consistency(leaking, 1, "solid", "4", None)
    assert set(consistency(leaking, 1, "none", None, None)) == {"student_turns", "role_flips"}
