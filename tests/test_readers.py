"""Readers of preference pairs: every format becomes the same record, and bad rows are kept with a reason."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mahalo_ray.data.inspection import inspect
from mahalo_ray.data.pair_readers import ReadPairs, read_pairs
from mahalo_ray.data.records import Message
from mahalo_ray.data.row_fields import split_turns
from mahalo_ray.data.rows import BadRow, TooManyBadRows, quarantine

SHARED = Path(os.environ.get("MAHALO_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_shared_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not there")

ASKED = [{"role": "user", "content": "2+2?"}]
FOUR, FIVE = [{"role": "assistant", "content": "4"}], [{"role": "assistant", "content": "5"}]
ROWS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "conversation": {"prompt": ASKED, "chosen": FOUR, "rejected": FIVE},
    "prompt repeated": {"prompt": ASKED, "chosen": ASKED + FOUR, "rejected": ASKED + FIVE},
    "text prompt repeated": {"prompt": "2+2?", "chosen": ASKED + FOUR, "rejected": ASKED + FIVE},
    "implicit prompt": {"chosen": ASKED + FOUR, "rejected": ASKED + FIVE},
    "question": {"question": "Student: 2+2?\n\nAssistant:", "chosen": "4", "rejected": "5"},
    "ShareGPT's names": {
        "prompt": [{"from": "human", "value": "2+2?"}],
        "chosen": [{"from": "gpt", "value": "4"}],
        "rejected": [{"from": "gpt", "value": "5"}],
    },
    "HH-RLHF": {
        "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4",
        "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5",
    },
    "plain question": {"question": "2+2?", "chosen": "4", "rejected": "5"},
}


def read(path: Path, row_format: str = "auto", field: str | None = None) -> ReadPairs:
    found = ReadPairs()
    objective = "accuracy" if field is None else None
    read_pairs(str(path), row_format, ["accuracy", "honest"], objective, field, "0", found)
    return found


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("name", ROWS)
def test_every_format_becomes_the_same_pair(name: str, tmp_path: Path) -> None:
    found = read(lines(tmp_path / "a.jsonl", ROWS[name]))
    assert found.bad == [] and found.rows == 1
    (pair,) = found.pairs
    assert pair.prompt == [Message(role="user", content="2+2?")]
    assert (pair.chosen, pair.rejected, pair.objective, pair.id) == ("4", "5", "accuracy", "0/a.jsonl:1")


def test_files_and_folders_of_every_kind(tmp_path: Path) -> None:
    rows = [{**ROWS["text"], "id": f"r{n}"} for n in range(4)]
    lines(tmp_path / "a.jsonl", rows[0])
    (tmp_path / "b.json").write_text(json.dumps([rows[1]], indent=2))
    lines(tmp_path / "c.json", rows[2])  # JSON Lines under the name of JSON
    pq.write_table(pa.Table.from_pylist([rows[3]]), tmp_path / "d.parquet")
    (tmp_path / "README.md").write_text("not data")
    assert [pair.id for pair in read(tmp_path).pairs] == ["r0", "r1", "r2", "r3"]


def test_turns_of_a_question() -> None:
    text = "Assistant: \n\nHello.\nTry: x\n\nStudent: a\n\nb\n\n\nAssistant:"
    assert [(m.role, m.content) for m in split_turns(text)] == [
        ("assistant", "Hello.\nTry: x"),
        ("user", "a\n\nb"),
    ]
    assert split_turns("What is\n\nStudent: about?")[0].content == "What is\n\nStudent: about?"


def test_objectives_by_field_and_scores(tmp_path: Path) -> None:
    scored = {"objective": "honest", "metadata": {"chosen_score": 0.9, "rejected_score": 0.1}}
    found = read(
        lines(
            tmp_path / "a.jsonl",
            {**ROWS["text"], **scored},
            {**ROWS["text"], "objective": "other"},
            ROWS["text"],
        ),
        field="objective",
    )
    (pair,) = found.pairs
    assert (pair.objective, pair.chosen_score, pair.rejected_score) == ("honest", 0.9, 0.1)
    assert found.left_out == {"other": 1}
    assert [(row.line, row.reason) for row in found.bad] == [(3, "'objective' is missing")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{not json", "not valid JSON"),
        ([1], "not a JSON object"),
        ({"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "'rejected' is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "the prompt is empty"),
        ({"question": 3, "chosen": "b", "rejected": "c"}, "'question' is int, not text"),
        ({"prompt": ASKED, "chosen": ASKED, "rejected": FIVE}, "exactly one assistant message"),
        ({"prompt": [{"role": "wizard", "content": ""}], "chosen": FOUR, "rejected": FIVE}, "messages: role"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "chosen_score": "x"}, "not a finite number"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "weight": -1}, "'weight' is -1"),
    ],
)
def test_a_bad_row_is_kept_with_its_reason(row: Any, reason: str, tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", ROWS["text"], "", row)
    found = read(file)
    assert len(found.pairs) == 1 and found.rows == 2
    (bad,) = found.bad
    assert bad.file == str(file) and bad.line == 3
    assert reason in bad.reason


def test_loss_weights_and_dialogues(tmp_path: Path) -> None:
    """Cuts of one conversation share a dialogue; another conversation, or the row itself, names its own."""
    later = [*ASKED, *FOUR, {"role": "user", "content": "sure?"}]
    other = [{"role": "user", "content": "3+3?"}]
    prompts = (ASKED, later, other, ASKED)
    rows: list[dict[str, Any]] = [{"prompt": p, "chosen": FOUR, "rejected": FIVE} for p in prompts]
    rows[0] |= {"weight": 2, "margin": -0.5}
    rows[3] |= {"dialogue": 7}
    first, cut, another, named = read(lines(tmp_path / "a.jsonl", *rows)).pairs
    assert (first.weight, first.margin, cut.weight, cut.margin) == (2.0, -0.5, 1.0, 0.0)
    assert first.dialogue == cut.dialogue != another.dialogue
    assert named.dialogue == "7"


def test_an_id_may_occur_once(tmp_path: Path) -> None:
    row = {**ROWS["text"], "id": "x"}
    found = read(lines(tmp_path / "a.jsonl", row, row))
    assert len(found.pairs) == 1 and "id 'x'" in found.bad[0].reason


def test_what_cannot_be_read_at_all_is_said(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "no", "there is no file"), (tmp_path, "holds no files that end with")):
        with pytest.raises(ValueError, match=message):
            read(path)
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match="must end with"):
        read(tmp_path / "a.csv")
    lines(tmp_path / "a.json", "[{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read(tmp_path / "a.json")
    lines(tmp_path / "a.parquet", "no parquet")
    with pytest.raises(ValueError, match="not a Parquet file"):
        read(tmp_path / "a.parquet")


def test_quarantine_holds_all_and_names_the_first(tmp_path: Path) -> None:
    bad = [BadRow.of("a.jsonl", n, f"reason {n}", {"n": n}) for n in range(7)]
    url = str(tmp_path / "quarantine.parquet")
    quarantine(bad, 700, 0.01, url)
    assert pq.read_table(url)["reason"].to_pylist() == [f"reason {n}" for n in range(7)]
    with pytest.raises(TooManyBadRows, match=r"7 of 699 rows(.|\n)*line 4: reason 4\n  \.\.\. and 2 more"):
        quarantine(bad, 699, 0.01, url)
    assert pq.read_table(url).num_rows == 7


@needs_shared_data
def test_real_pairs_are_read() -> None:
    tutoring = read(SHARED / "tutoring" / "socratic_mind_accuracy_pairs.jsonl")
    assert len(tutoring.pairs) == 707 and tutoring.bad == []
    for pair in tutoring.pairs:
        assert pair.prompt[0].role == "assistant" and pair.prompt[-1].role == "user"
        assert pair.chosen_score is not None and pair.rejected_score is not None
    values = read(SHARED / "human_values" / "hhh_pairs.jsonl", field="objective")
    assert (len(values.pairs), values.bad) == (38, [])
    assert values.left_out == {"harmless": 35, "helpful": 31, "other": 26}
    rated = read(SHARED / "human_values" / "ultrafeedback_overall_pairs.jsonl", "trl")
    assert {row.reason.split(" ", 1)[1] for row in rated.bad} <= {"is empty", "and 'rejected' are the same"}
    assert len(rated.pairs) + len(rated.bad) == 1000 and rated.pairs[0].chosen_score == 9.0


def test_answers_rated_by_aspect(tmp_path: Path) -> None:
    """UltraFeedback and HelpSteer: the aspect decides which answer is better, and equal ones are left out."""
    rated = [("4", {"helpfulness": {"Rating": "5"}}), ("5", {"helpfulness": {"Rating": "2"}, "honesty": {}})]
    ultrafeedback = {
        "instruction": "2+2?",
        "completions": [{"response": answer, "annotations": ratings} for answer, ratings in rated],
    }
    helpsteer = [
        {"prompt": "2+2?", "response": answer, "helpfulness": n} for answer, n in (("5", 0), ("4", 3))
    ]
    path = lines(tmp_path / "a.jsonl", ultrafeedback, *helpsteer, {**helpsteer[0], "helpfulness": 3})
    found = ReadPairs()
    read_pairs(str(path), "auto", ["accuracy"], "accuracy", None, "0", found, aspect="helpfulness")
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [("4", "5")] * 2
    assert [(pair.chosen_score, pair.rejected_score) for pair in found.pairs] == [(5.0, 2.0), (3.0, 0.0)]
    (counts,) = found.report.files.values()
    assert (counts.rows, counts.read, sum(counts.left_out.values())) == (4, 2, 2)
    without = read(path)
    assert "say which decides ('aspect')" in without.bad[0].reason


YES = {"from": "gpt", "value": "Yes."}


def test_pairs_as_hhh_sharegpt_and_lists_of_parts_write_them(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "Is the moon a cheese?"}]
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "rock."}]
    targets = {"choices": ["Yes.", "It is rock."], "labels": [0, 1]}
    path = lines(
        tmp_path / "a.jsonl",
        {"input": "Is the moon a cheese?", "targets": targets},
        {"conversations": said, "chosen": {"from": "gpt", "value": "It is rock."}, "rejected": YES},
        {"prompt": said, "chosen": [{"role": "assistant", "content": parts}], "rejected": [YES]},
        {"input": "Is the moon a cheese?", "targets": {"choices": ["Yes.", "No."], "labels": [0, 0]}},
    )
    found = read(path)
    assert [(p.prompt[0].content, p.chosen, p.rejected) for p in found.pairs] == [
        ("Is the moon a cheese?", "It is rock.", "Yes.")
    ] * 3
    (bad,) = found.bad
    assert bad.line == 4 and "one of each of 1, 0" in bad.reason
    assert inspect(str(path)).formats["preference pairs", "hhh"] == 1


def test_what_a_file_holds(tmp_path: Path) -> None:
    question = "A farmer has seven cows and buys five more at the market, how many cows has he now?"
    path = lines(
        tmp_path / "a.jsonl",
        {**ROWS["text"], "objective": "honest"},
        {"prompt": question, "completions": ["7 + 5", "12"], "labels": [True, False]},
        {"question": question, "answer": "#### 12"},
        {"colour": "red"},
    )
    exam = lines(tmp_path / "exam.jsonl", {"problem": f"Read closely. {question.upper()}", "answer": "12"})
    found = inspect(str(path), against=str(exam), samples=1)
    assert dict(found.formats) == {
        ("preference pairs", "trl"): 1,
        ("step traces", "trl"): 1,
        ("prompts", "prompts"): 1,
    }
    assert found.overlaps == ["a.jsonl:2", "a.jsonl:3"]
    assert found.labels["step wrong"] == found.labels["objective honest"] == 1
    assert found.lengths["step"] == [5, 2] and len(found.samples) == 1
    (bad,) = found.report.bad
    assert bad.line == 4 and "colour" in bad.reason
    document = found.as_json()
    assert document["data"]["read"] == 3 and document["contamination"]["rows"] == 2
    assert any("contamination: 2 rows" in line for line in found.describe())
