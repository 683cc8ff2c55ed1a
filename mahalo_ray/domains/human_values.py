"""Human values: recognised data sets as preference pairs. (HHH pairs name their objective in each row; the
reader of pairs takes them as they are, with `objective_field: objective`.)"""

from __future__ import annotations

from collections.abc import Sequence

from mahalo_ray.data.pair_readers import ReadPairs
from mahalo_ray.data.records import PreferencePair
from mahalo_ray.data.row_fields import Row, RowError, digest, get_text, parse_prompt, show
from mahalo_ray.data.rows import Place, use_rows


def read_truthfulqa(path: str, objective: str, max_pairs_per_question: int, into: ReadPairs) -> None:
    """Add pairs of TruthfulQA to `into`: the n-th correct answer of a question against its n-th incorrect
    one, the best of both first. Pairs of one question share a dialogue."""

    def use(row: Row, place: Place) -> None:
        for pair in _pairs(row, objective, max_pairs_per_question, f"truthfulqa/{place}", path):
            into.add(pair, place, "truthfulqa")

    use_rows(path, use, into.report)


def _pairs(row: Row, objective: str, most: int, default_id: str, source: str) -> list[PreferencePair]:
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
    listed = [answer.strip() for answer in get_text(row, others).split(";")]
    return list(dict.fromkeys(answer for answer in (get_text(row, best).strip(), *listed) if answer))
