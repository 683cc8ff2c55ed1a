"""Human values: recognised data sets as preference pairs. (HHH pairs name their objective in each row; the
reader of pairs takes them as they are, with `objective_field: objective`.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mahalo_ray.data.pair_readers import ReadPairs
from mahalo_ray.data.records import PreferencePair
from mahalo_ray.data.row_fields import Row, RowError, digest, get_list, get_text, parse_prompt, show
from mahalo_ray.data.rows import Place, use_rows


def read_truthfulqa(path: str, objective: str, max_pairs_per_question: int, into: ReadPairs) -> None:
    """Add pairs of TruthfulQA to `into`: the n-th correct answer of a question against its n-th incorrect
    one, the best of both first. Pairs of one question share a dialogue."""

    def use(row: Row, place: Place) -> None:
        for pair in _pairs(row, objective, max_pairs_per_question, f"truthfulqa/{place}", path):
            into.add(pair, place, "truthfulqa")

    use_rows(path, use, into.report)


def _pairs(row: Row, objective: str, most: int, default_id: str, source: str) -> list[PreferencePair]:
    if "best_answer" in row:  # as the hub's data set has it: lists, and no best incorrect answer
        prompt = parse_prompt(get_text(row, "question"))
        correct = _listed([row["best_answer"], *get_list(row, "correct_answers")])
        incorrect = _listed(get_list(row, "incorrect_answers"))
    else:
        prompt = parse_prompt(get_text(row, "Question"))
        correct = _answers(row, "Best Answer", "Correct Answers")
        incorrect = _answers(row, "Best Incorrect Answer", "Incorrect Answers")
    both = set(correct) & set(incorrect)
    if both:
        raise RowError(f"an answer is correct and incorrect: {show(min(both))}")
    return [
        PreferencePair(
            id=f"{default_id}/{number}",
            objective=objective,
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            source=source,
            dialogue=digest(prompt),
        )
        for number, (chosen, rejected) in enumerate(zip(correct, incorrect, strict=False), start=1)
        if number <= most
    ]


def _answers(row: Row, best: str, others: str) -> Sequence[str]:
    """The best answer, then the others, each once."""
    return _listed([get_text(row, best), *get_text(row, others).split(";")])


def _listed(answers: Sequence[Any]) -> Sequence[str]:
    """Each once, in order, without the empty ones."""
    if wrong := [answer for answer in answers if not isinstance(answer, str)]:
        raise RowError(f"an answer is {show(wrong[0])}, not text")
    return list(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))
