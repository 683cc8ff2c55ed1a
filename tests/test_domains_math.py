"""Answers of maths responses, checked by math-verify; TruthfulQA as pairs."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from test_step_readers import SHARED, needs_shared_data

from mahalo_ray.data.inspection import inspect
from mahalo_ray.data.pair_readers import ReadPairs
from mahalo_ray.domains import math
from mahalo_ray.domains.human_values import read_truthfulqa
from mahalo_ray.domains.math import final_answer, is_correct


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So 48+24=72.\n#### 72", "72"),
        ("First \\boxed{1}, no: \\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}"),
        ("a set \\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("2+2=4\nA: 4\n", "4"),
        ("\\boxed{open\n#### 3", "3"),
        ("The answer is 5.", None),
    ],
)
def test_the_marked_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("response", "reference", "right"),
    [
        ("It is \\boxed{72}.", "48+24=72\n#### 72", True),
        ("It is \\boxed{73}.", "48+24=72\n#### 72", False),
        ("#### 1,000", "1000", True),
        ("\\boxed{\\$101.00}", "101", True),
        ("\\boxed{\\frac{1}{2}}", "0.5", True),
        ("\\boxed{2x+1}", "1+2x", True),
        ("Adding up, the answer is 72.", "#### 72", True),
        ("Adding up, the answer is 27.", "#### 72", False),
        ("I do not know.", "#### 72", False),
        ("", "#### 72", False),
        ("\\boxed{72}\n#### 5", "72", True),
    ],
)
def test_verdicts(response: str, reference: str, right: bool) -> None:
    assert is_correct(response, reference) is right


def test_an_empty_reference_is_said() -> None:
    with pytest.raises(ValueError, match="reference answer is empty"):
        is_correct("#### 3", " ")


def test_a_comparison_that_takes_too_long_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math, "TIMEOUT_S", 1)
    assert is_correct("\\boxed{9^{9^{9^{9}}}}", "3") is False  # without a limit it would not end


def test_verdicts_from_a_thread() -> None:
    """math-verify's timeouts need a main thread: another process lends its own."""
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(is_correct("\\boxed{\\frac{1}{2}}", "0.5")))
    thread.start()
    thread.join()
    assert found == [True]


@needs_shared_data
def test_verdicts_agree_with_those_of_real_solutions() -> None:
    rows = [
        json.loads(line)
        for line in (SHARED / "math" / "gsm8k_model_solutions.jsonl").read_text().splitlines()[:60]
    ]
    solutions = [(row["175b_verification"], row["ground_truth"]) for row in rows]
    agree = [is_correct(s["solution"], truth) == s["is_correct"] for s, truth in solutions]
    assert sum(agree) == len(agree)


def test_truthfulqa_becomes_pairs(tmp_path: Path) -> None:
    row = {
        "Question": "Is the moon cheese?",
        "Best Answer": "No, rock",
        "Correct Answers": "Rock; No, rock; Stone",
        "Best Incorrect Answer": "Yes",
        "Incorrect Answers": "Yes; Blue cheese",
    }
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [row, {**row, "Question": 3}])))
    found = ReadPairs()
    read_truthfulqa(str(tmp_path / "a.jsonl"), "truthful", 4, found)
    assert [(p.chosen, p.rejected) for p in found.pairs] == [("No, rock", "Yes"), ("Rock", "Blue cheese")]
    assert {p.objective for p in found.pairs} == {"truthful"} and len({p.dialogue for p in found.pairs}) == 1
    assert [(bad.line, bad.reason) for bad in found.bad] == [(2, "'Question' is int, not text")]
    one = ReadPairs()
    read_truthfulqa(str(tmp_path / "a.jsonl"), "truthful", 1, one)
    assert len(one.pairs) == 1


def test_truthfulqa_as_the_hub_has_it(tmp_path: Path) -> None:
    correct, incorrect = ["No, rock", "Stone"], ["Yes", "Blue cheese"]
    row = {"question": "Is the moon cheese?", "best_answer": "No, rock", "correct_answers": correct}
    rows = [{**row, "incorrect_answers": incorrect}, {**row, "incorrect_answers": [3]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = ReadPairs()
    read_truthfulqa(str(tmp_path / "a.jsonl"), "truthful", 4, found)
    assert [(p.chosen, p.rejected) for p in found.pairs] == [("No, rock", "Yes"), ("Stone", "Blue cheese")]
    assert [(bad.line, bad.reason) for bad in found.bad] == [(2, "an answer is 3, not text")]
    formats = inspect(str(tmp_path / "a.jsonl")).formats
    assert formats == {("preference pairs", "truthfulqa"): 2}


@needs_shared_data
def test_real_truthfulqa() -> None:
    found = ReadPairs()
    read_truthfulqa(str(SHARED / "human_values" / "truthfulqa.jsonl"), "truthful", 2, found)
    assert found.rows == 600 and len(found.pairs) > 1000 and len(found.bad) <= 6
