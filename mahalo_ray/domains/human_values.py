"""Human values: recognised data sets as preference pairs. (HHH pairs name their objective in each row; the
reader of pairs takes them as they are, with `objective_field: objective`.)"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from mahalo_ray.data.pair_readers import ReadPairs
from mahalo_ray.data.records import PreferencePair
from mahalo_ray.data.rows import Row, RowError, digest, prompt_of, text_of, use_rows


def read_truthfulqa(path: str, objective: str, max_pairs_per_question: int, into: ReadPairs) -> None:
    """Add pairs of TruthfulQA to `into`: the n-th correct answer of a question against its n-th incorrect
    one, the best of both first. Pairs of one question share a dialogue."""

    def use(row: Row, file: str, line: int) -> None:
        default_id = f"truthfulqa/{posixpath.basename(file)}:{line}"
        for pair in _pairs(row, objective, max_pairs_per_question, default_id, path):
            into.add(pair)

    into.rows += use_rows(path, use, into.bad, RowError)


def _pairs(row: Row, objective: str, most: int, default_id: str, source: str) -> list[PreferencePair]:
    prompt = prompt_of(text_of(row, "Question"))
    correct = _answers(row, "Best Answer", "Correct Answers")
    incorrect = _answers(row, "Best Incorrect Answer", "Incorrect Answers")
    both = set(correct) & set(incorrect)
    if both:
        raise RowError(f"an answer is correct and incorrect: {sorted(both)[0]!r}")
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
    listed = [answer.strip() for answer in text_of(row, others).split(";")]
    return list(dict.fromkeys(answer for answer in (text_of(row, best).strip(), *listed) if answer))
