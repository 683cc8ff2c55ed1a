"""The maths miniature: its judge of explanations on hand-worked texts, its problems, its scripted solvers."""

from __future__ import annotations

import random

import pytest

from mahalo_ray.decoding.stopping import StopReason, boundary_for
from mahalo_ray.domains.math import is_correct
from mahalo_ray.domains.maths.explanations import engagement, judge_engagement, rate_step
from mahalo_ray.domains.maths.word_problems import (
    CHATTY,
    TERSE,
    MathsMiniature,
    Voice,
    make_word_problem,
    write_solution,
)
from mahalo_ray.domains.protocol import load_domain

CALCULATION = "So 12 + 5 = 17."


@pytest.mark.parametrize(
    ("step", "earlier", "value"),
    [
        (CALCULATION, [], 0.0),
        (f"We add because Mia finds 5 more. {CALCULATION}", [], 0.4 + 0.1),
        (f"We add because Mia is happy. {CALCULATION}", [], 0.0),  # gives no reason for the 12 and the 5
        ("12 + 5 = 17 since 5 came on top.", [], 0.4 + 0.1),
        (f"{CALCULATION} What comes next?", [], 0.35 + 0.1),
        (f"Let us look. {CALCULATION}", [], 0.15 + 0.1),
        (f"{CALCULATION} Can you go on?", [], 0.15 + 0.35 + 0.1),
        ("Then 17 - 3 = 14.", [CALCULATION], 0.1),  # another opening
        ("So 17 - 3 = 14.", [CALCULATION], 0.0),
        ("Then 17 - 3 = 14. Can you go on?", [f"{CALCULATION} Can you go on?"], 0.1),  # asked already
        (
            "Then 17 - 3 = 14. What is 14 - 2?",
            [f"{CALCULATION} What is 17 - 3?"],
            0.1,
        ),  # the same, but numbers
        ("We add because Mia finds 5 more. So 17 + 5 = 22.", ["We add because Mia finds 5 more."], 0.0),
        ("", [CALCULATION], 0.0),
        ("1.5 * 2 = 3 because a box weighs 1.5 kg.", [], 0.4 + 0.1),  # a decimal point ends no sentence
    ],
)
def test_a_step_is_rated_as_worked_by_hand(step: str, earlier: list[str], value: float) -> None:
    assert rate_step(step, earlier).value == pytest.approx(value)


def test_missing_steps_and_steps_beyond_those_needed_count() -> None:
    asking = f"{CALCULATION} What comes next?"
    assert engagement([asking]) == pytest.approx(0.45)
    assert engagement([asking], needed=3) == pytest.approx(0.15)
    assert engagement([asking, CALCULATION, CALCULATION], needed=2) == pytest.approx(0.15)
    assert engagement([], needed=2) == 0.0
    assert judge_engagement([], [asking, "\n"], None) == pytest.approx(0.45)


def test_problems_are_worked_to_the_end_by_a_solver_that_never_slips() -> None:
    careful = Voice("careful", reason=0.5, question=0.5, address=0.5, slip=0.0)
    for seed in range(200):
        problem = make_word_problem(random.Random(seed))
        assert 2 <= len(problem.changes) <= 5
        assert all(1 <= change.operation.result <= 24 for change in problem.changes)
        for change in problem.changes:
            assert f"{change.event}." in problem.question
        lines = write_solution(problem, random.Random(seed), careful)
        assert len(lines) == len(problem.changes) + 1
        assert is_correct("\n".join(lines), str(problem.answer))
    assert make_word_problem(random.Random(3)) == make_word_problem(random.Random(3))


def test_engaging_solvers_need_more_words_than_there_are_and_slip_more() -> None:
    """The conflict is in the world: what makes an explanation engaging takes words."""
    right, engaging, fitting = {}, {}, {}
    for voice in (TERSE, CHATTY):
        solved = []
        for seed in range(300):
            problem = make_word_problem(random.Random(seed))
            lines = write_solution(problem, random.Random(f"{seed}"), voice)
            words = sum(len(line.split()) for line in lines)
            solved.append((lines[-1] == f"#### {problem.answer}", words <= problem.word_limit, lines))
        right[voice.name] = sum(row[0] for row in solved) / len(solved)
        fitting[voice.name] = sum(row[1] for row in solved) / len(solved)
        engaging[voice.name] = sum(engagement(row[2][:-1]) for row in solved) / len(solved)
    assert right["terse"] > 0.8 and right["chatty"] < 0.65
    assert fitting["terse"] > 0.95 and fitting["chatty"] < 0.3
    assert engaging["terse"] < 0.2 and engaging["chatty"] > 0.5


def test_an_episode_is_judged_as_worked_by_hand() -> None:
    domain = load_domain("maths_miniature")
    assert isinstance(domain, MathsMiniature)
    episode = next(e for e in map(domain.episode, range(50)) if len(e.posed.changes) == 3)
    problem = episode.posed
    lines = write_solution(problem, random.Random(1), Voice("bare", 0.0, 0.0, 0.0, slip=0.0))
    assert problem.word_limit == 39
    asked = episode.fork(1)
    asked.take_step(f"{lines[0]} What comes next?\n")
    assert asked.judge_prefix() == {"engagement": pytest.approx(0.45)}
    assert asked.outcome() == {"accuracy": 0.0, "engagement": pytest.approx(0.15)}  # not complete
    for line in lines[1:-1]:
        asked.take_step(f"{line}\n")
    last, before = asked.judge_prefix()["engagement"], asked.outcome()["engagement"]
    assert last in (0.0, 0.1)  # opens as the line before, or with another word
    asked.hear(lines[-1])
    assert asked.over and asked.outcome() == {"accuracy": 1.0, "engagement": before}
    assert asked.judge_prefix()["engagement"] == before
    wordy = episode.fork(2)
    wordy.hear(
        "\n".join(
            [*(f"Let us look. You can do this. {line} Can you go on?" for line in lines[:-1]), lines[-1]]
        )
    )
    assert wordy.outcome()["accuracy"] == 0.0  # right, but in more words than are allowed
    wrong = episode.fork(3)
    wrong.hear("\n".join([*lines[:-1], f"#### {problem.answer + 1}"]))
    assert wrong.outcome()["accuracy"] == 0.0 and not episode.steps
    unmarked = episode.fork(4)
    unmarked.hear("\n".join(lines[:-1]))
    assert unmarked.outcome()["accuracy"] == 0.0  # says no answer, though its last number is right


def test_scripted_solutions_are_well_formed_and_half_right() -> None:
    domain = load_domain("maths_miniature")
    dialogues = [domain.sft_dialogue(seed) for seed in range(300)]
    assert not any(domain.is_malformed(dialogue.turns[1].content) for dialogue in dialogues)
    right = sum((dialogue.outcome or {})["accuracy"] for dialogue in dialogues) / len(dialogues)
    assert 0.4 < right < 0.6
    for text in ("", "So 1 + 2 = 3", "So 1 + 2 = 3. Buy now!", "1 + 2 = 3.", "#### three"):
        assert domain.is_malformed(text)
    assert not domain.is_malformed("Let us look. So 1 + 2 = 3. What comes next?\n")


def test_a_step_ends_with_a_line_that_has_words() -> None:
    boundary = boundary_for("lines")
    assert boundary.verdict("So 1 + 2 = 3.\n", 8) is StopReason.STEP
    assert boundary.verdict("\n\n", 2) is None and boundary.verdict("So 1", 2) is None
    assert boundary.is_trigger(".\n") and not boundary.is_trigger(".")
