"""The miniature world: what a tutor says must do what the rules say, and nothing else may decide."""

from __future__ import annotations

import random
import re
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mahalo_ray.domains.sft_text import encode_example, train_tokenizer
from mahalo_ray.domains.tutoring.moves import LECTURES, PRAISES, Move, is_malformed, parse_turn
from mahalo_ray.domains.tutoring.problems import LARGEST_NUMBER, Operation, Problem, make_problem
from mahalo_ray.domains.tutoring.scripted import (
    Style,
    play_scripted,
    scripted_dialogue,
)
from mahalo_ray.domains.tutoring.student import FAREWELL, MiniatureStudent, Personality, TutoringEpisode

PROBLEM = Problem("", (Operation(12, "+", 7), Operation(19, "-", 4)), turn_limit=4)
CALM = Personality({"+": 0.2, "-": 0.2, "x": 0.2}, engagement=0.6, curiosity=1.0, warmth=1.0)


def student() -> MiniatureStudent:
    return MiniatureStudent(PROBLEM, CALM, seed=3)


def after(*turns: str) -> MiniatureStudent:
    listener = student()
    for turn in turns:
        listener.hear(turn)
    return listener


@given(st.integers(0, 10**6))
def test_problems_chain_and_stay_in_range(seed: int) -> None:
    problem = make_problem(random.Random(seed))
    assert 2 <= len(problem.operations) <= 4
    assert 3 <= problem.turn_limit <= 6
    for first, second in zip(problem.operations, problem.operations[1:], strict=False):
        assert second.left == first.result
    assert all(1 <= operation.result <= LARGEST_NUMBER for operation in problem.operations)
    for operation in problem.operations:
        assert re.search(rf" {operation.right}[ .]", problem.text)


def test_a_turn_is_understood_sentence_by_sentence() -> None:
    turn = f"{PRAISES[0]} First, 12 + 7 = 18. Second, what is 19 - 4? {LECTURES['-'][0]} The answer is 15."
    moves = [sentence.move for sentence in parse_turn(turn)]
    assert moves == [Move.PRAISE, Move.STEP, Move.QUESTION, Move.LECTURE, Move.TELL]
    step = parse_turn(turn)[1]
    assert (step.operation, step.stated) == (Operation(12, "+", 7), 18)


@pytest.mark.parametrize(
    "text", ["", "First, 12 + = 19.", "Great work so far", "Nonsense here.", "12 + 7 = 19."]
)
def test_anything_else_is_malformed(text: str) -> None:
    assert is_malformed(text)


def test_a_right_step_teaches_its_skill_by_attention() -> None:
    listener = after("First, 12 + 7 = 19.")
    # engagement falls by the step's cost first: attention = .5 + .5 * (.6 - .05)
    assert listener.mastery["+"] == pytest.approx(0.2 + 0.38 * 0.8 * (0.5 + 0.5 * 0.55))
    assert listener.mastery["-"] == 0.2
    assert listener.position == 1


def test_a_step_out_of_turn_teaches_nothing_and_a_wrong_one_hurts() -> None:
    assert after("Second, 19 - 4 = 15.").mastery == CALM.mastery
    wrong = after("First, 12 + 7 = 20.")
    assert wrong.mastery["+"] == pytest.approx(0.2 * 0.65)
    assert wrong.position == 0


def test_telling_the_answer_ends_the_dialogue_and_teaches_little() -> None:
    episode = TutoringEpisode(PROBLEM, student())
    episode.hear("The answer is 15.")
    assert episode.over and episode.ended_early
    assert episode.student.mastery["+"] - 0.2 < 0.03
    assert episode.judge_prefix()["engagement"] == 0.0
    # One rated turn of four: the missing ones count 0.
    assert episode.outcome()["engagement"] == pytest.approx(episode.ratings[0] / 4)


def test_repetition_earns_no_credit() -> None:
    praised = after(PRAISES[0]).engagement
    assert after(PRAISES[0], PRAISES[0]).engagement < praised < after(PRAISES[0], PRAISES[1]).engagement


def test_a_question_must_be_about_what_comes_next() -> None:
    assert after("First, what is 12 + 7?").engagement > after("First, what is 3 + 3?").engagement


def test_accuracy_is_the_exact_chance_of_solving_a_problem_of_the_same_kind() -> None:
    assert student().solve_probability() == pytest.approx((0.3 + 0.7 * 0.2) ** 2)


def test_bored_students_leave_at_about_the_stated_rate() -> None:
    bored = Personality(CALM.mastery, engagement=0.1, curiosity=1.0, warmth=1.0)
    left = [MiniatureStudent(PROBLEM, bored, seed).hear(LECTURES["+"][0]) == FAREWELL for seed in range(400)]
    assert statistics.mean(left) == pytest.approx(0.2, abs=0.06)


def test_copies_share_state_but_not_noise() -> None:
    original = after("First, 12 + 7 = 19.")
    copies = [original.fork(copy) for copy in range(1, 9)]
    replies = {copy.hear("Second, what is 19 - 4?") for copy in copies}
    assert len(replies) > 1
    assert len({copy.mastery["+"] for copy in copies}) == 1
    assert original.turn == 1
    assert original.fork(0).hear("What do you notice?") == original.hear("What do you notice?")


def test_scripted_tutors_show_the_conflict() -> None:
    """Steps teach and bore, praise and questions engage and teach nothing: neither wins on both."""

    def outcomes(plan: tuple[Move, ...]) -> tuple[float, float]:
        style = Style("test", {plan: 1.0}, slip_rate=0.0)
        played = [play_scripted(seed, style)[0].outcome() for seed in range(150)]
        return (
            statistics.mean(outcome["accuracy"] for outcome in played),
            statistics.mean(outcome["engagement"] for outcome in played),
        )

    steps, warm = outcomes((Move.STEP, Move.STEP)), outcomes((Move.PRAISE, Move.QUESTION))
    assert steps[0] > warm[0] + 0.3
    assert warm[1] > steps[1] + 0.5


def test_examples_mark_exactly_the_tutors_tokens() -> None:
    from mahalo_ray.data.templating import ChatFormat

    dialogues = [scripted_dialogue(seed) for seed in range(40)]
    tokenizer = train_tokenizer((turn.content for d in dialogues for turn in d.turns), 600)
    chat = ChatFormat(tokenizer)
    for dialogue in dialogues:
        example = encode_example(dialogue, chat, "tutor")
        ids, mask = example["input_ids"], example["loss_mask"]
        assert isinstance(ids, list) and isinstance(mask, list)
        said = tokenizer.decode([token for token, counted in zip(ids, mask, strict=True) if counted])
        assert said == "".join(f"{t.content}<|end|>" for t in dialogue.turns if t.speaker == "tutor")


def test_numbers_are_single_tokens_also_for_autotokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Qwen2Config

    texts = [turn.content for d in map(scripted_dialogue, range(40)) for turn in d.turns]
    tokenizer = train_tokenizer(texts, 600)
    tokenizer.save_pretrained(tmp_path)
    Qwen2Config(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(tokenizer)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids
        assert loaded.decode(ids) == text
    assert len(loaded(" 15 + 20 = 35", add_special_tokens=False)["input_ids"]) == 5
