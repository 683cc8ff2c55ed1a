"""Readers of step traces: every format becomes the same record, and bad rows are kept with a reason."""

from __future__ import annotations

import gzip
import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_reward_models import TOKENIZER

from mahalo_ray.data.prompts import read_prompts
from mahalo_ray.data.records import Message, StepTrace
from mahalo_ray.data.row_files import data_files, read_rows
from mahalo_ray.data.rows import RowLeftOut
from mahalo_ray.data.step_readers import FORMATS, ReadTraces, read_traces
from mahalo_ray.models.scoring import StepEncoder
from mahalo_ray.training.reward_data import check_readable

SHARED = Path(os.environ.get("MAHALO_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_shared_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not there")

USER = {"role": "user", "content": "2+2+1?"}
STEPS = ["2+2=4", "4+1=6", "So 6."]
SIGNED = [
    {"role": "user", "content": "2+2=4"},
    {"role": "assistant", "content": "+"},
    {"role": "user", "content": "4+1=6"},
    {"role": "assistant", "content": "-"},
    {"role": "user", "content": "So 6."},
    {"role": "assistant", "content": "-"},
]
# The same trace in every format: the prompt, three steps, and labels as the format knows them.
ROWS: dict[str, tuple[str, dict[str, Any], list[float | None]]] = {
    "trl": ("trl", {"prompt": "2+2+1?", "completions": STEPS, "labels": [True, False, False]}, [1, 0, 0]),
    "trl chat": ("trl", {"prompt": [USER], "completions": STEPS, "labels": [1, 0, 0.5]}, [1, 0, 0.5]),
    "mahalo": (
        "mahalo",
        {"question": "Student: 2+2+1?\n\nAssistant:", "response_steps": STEPS, "step_value": [0.9, 0.1, 0]},
        [0.9, 0.1, 0],
    ),
    "first wrong": ("processbench", {"problem": "2+2+1?", "steps": STEPS, "label": 1}, [1, 0, None]),
    "none wrong": ("processbench", {"problem": "2+2+1?", "steps": STEPS, "label": -1}, [1, 1, 1]),
    "mistake": (
        "big_bench_mistake",
        {"input": "2+2+1?", "steps": STEPS, "mistake_index": 0},
        [0, None, None],
    ),
    "no mistake": (
        "big_bench_mistake",
        {"input": "2+2+1?", "steps": STEPS, "mistake_index": None},
        [1, 1, 1],
    ),
    "PRM800K": (
        "prm800k",
        {
            "question": {"problem": "2+2+1?"},
            "label": {
                "steps": [
                    {
                        "completions": [{"text": "2", "rating": -1}, {"text": STEPS[0], "rating": 0}],
                        "chosen_completion": 1,
                    },
                    {"completions": [{"text": STEPS[1], "rating": None}], "chosen_completion": 0},
                    {"completions": [{"text": STEPS[2], "rating": -1}], "chosen_completion": None},
                ]
            },
        },
        [1, None, 0],
    ),
    "signs": ("conversation", {"prompt": "2+2+1?", "conversation": SIGNED}, [1, 0, 0]),
    "signs, asked first": ("conversation", {"conversation": [USER, *SIGNED]}, [1, 0, 0]),
    "list of labels": ("steps", {"problem": "2+2+1?", "steps": STEPS, "labels": [1, 0, None]}, [1, 0, None]),
    "labels by name": (
        "steps",
        {"prompt": [USER], "steps": STEPS, "labels": {"accuracy": [1, 0, None]}},
        [1, 0, None],
    ),
}


def test_math_shepherd_marks(tmp_path: Path) -> None:
    """The question ends where "Step 1:" begins; every mark of the input is a sign of the label."""
    row = {
        "input": "2+2+1? Step 1: 2+2=4 ки\nStep 2: The answer is 6 ки",
        "label": "2+2+1? Step 1: 2+2=4 +\nStep 2: The answer is 6 -",
    }
    shifted = {**row, "label": row["label"].replace("2+2=4", "2+2=5")}
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in (row, shifted)))
    found = read(tmp_path / "a.jsonl")
    (trace,) = found.traces
    assert [m.content for m in trace.prompt] == ["2+2+1?"]
    assert list(trace.steps) == ["Step 1: 2+2=4", "Step 2: The answer is 6"]
    assert trace.labels == {"accuracy": [1.0, 0.0]}
    assert "end of step 1" in found.bad[0].reason


def read(path: Path | str, row_format: str = "auto", **settings: Any) -> ReadTraces:
    found = ReadTraces()
    field = settings.pop("objective_field", None)
    objective = None if field else "accuracy"
    read_traces(str(path), row_format, ["accuracy", "honest"], objective, field, "0", found, **settings)
    return found


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("named", [False, True])
def test_every_format_becomes_the_same_trace(name: str, named: bool, tmp_path: Path) -> None:
    row_format, row, labels = ROWS[name]
    found = read(lines(tmp_path / "a.jsonl", row), row_format if named else "auto")
    assert found.bad == []
    (trace,) = found.traces
    assert trace.prompt == [Message(role="user", content="2+2+1?")]
    assert (trace.steps, trace.labels) == (STEPS, {"accuracy": labels})
    assert trace.id == "0/a.jsonl:1"


def test_a_question_and_its_first_step_in_one_message() -> None:
    """RLHFlow's data; ShareGPT's names for speakers."""
    row = {
        "conversations": [
            {"from": "human", "value": "2+2+1? Step 1: 2+2=4"},
            {"from": "gpt", "value": "+"},
            {"from": "human", "value": "Step 2: 4+1=6"},
            {"from": "gpt", "value": "-"},
        ]
    }
    (parsed,) = FORMATS["conversation"](row)
    assert parsed.prompt == [Message(role="user", content="2+2+1?")]
    assert parsed.steps == ["Step 1: 2+2=4", "Step 2: 4+1=6"]


SOLUTIONS = {
    "question": "2+2+1?",
    "ground_truth": "2+2+1=5\nA: 5",
    "small": {"is_correct": False, "solution": "2+2=4\n\n4+1=6"},
    "large": {"is_correct": True, "solution": "2+2=4\n4+1=5\nA: 5"},
}


def test_verdicts_on_whole_solutions(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", SOLUTIONS)
    small, large = read(file).traces
    assert small.group == large.group and (small.id, large.id) == ("0/a.jsonl:1/small", "0/a.jsonl:1/large")
    assert (small.steps, small.answer) == (["2+2=4", "4+1=6"], "2+2+1=5\nA: 5")
    assert (small.outcome, large.outcome) == ({"accuracy": 0.0}, {"accuracy": 1.0})
    assert small.labels == {"accuracy": [None, 0]} and large.labels == {"accuracy": [None, None, 1]}
    every = read(file, outcome_labels="all").traces[1]
    assert every.labels == {"accuracy": [1, 1, 1]}
    discounted = read(file, outcome_labels="all", gamma=0.5).traces[1]
    assert discounted.labels == {"accuracy": [0.25, 0.5, 1]}


def test_every_teacher_turn_with_what_came_before(tmp_path: Path) -> None:
    row = {
        "qid": 7,
        "question": "2+2+1?",
        "student_incorrect_solution": "6",
        "self-correctness": "Yes, but I had to reveal the answer",
        "conversation": "Teacher: (generic)Hi! How?|EOM|Ana: I added.|EOM|Teacher: (focus)2+2?|EOM|Ana: 4: 5",
    }
    first, second = read(lines(tmp_path / "a.jsonl", row)).traces
    opening = Message(role="user", content="2+2+1?\n\n6")
    assert (first.prompt, first.steps) == ([opening], ["Hi! How?"])
    greeting, added = Message(role="assistant", content="Hi! How?"), Message(role="user", content="I added.")
    assert (second.prompt, second.steps) == ([opening, greeting, added], ["2+2?"])
    assert first.dialogue == second.dialogue == "7" and first.group != second.group
    assert second.labels == {"accuracy": [0.5]} and second.outcome == {"accuracy": 0.5}


def test_ratings_of_dialogues_are_mapped_from_their_range(tmp_path: Path) -> None:
    said = [USER, {"role": "assistant", "content": "What is 2+2?"}, {"role": "user", "content": "4"}]
    text = "Student: 2+2+1?\n\nAssistant: What is 2+2?\n\nStudent: 4\n\nAssistant:"
    rows = [
        {"messages": said, "rating": 4.5},
        {"question": text, "chosen": "a", "rejected": "b", "metadata": {"rating": 4.5}},
        {"prompt": [USER], "response": "What is 2+2?", "ratings": {"accuracy": 6, "honest": 0}},
    ]
    found = read(lines(tmp_path / "a.jsonl", *rows), label_range=(0.0, 6.0)).traces
    for trace in found:
        assert (trace.prompt, trace.steps) == ([Message(**USER)], ["What is 2+2?"])
    assert [trace.labels["accuracy"] for trace in found] == [[0.75], [0.75], [1.0]]
    assert found[2].labels["honest"] == [0.0]


def test_objectives_by_field(tmp_path: Path) -> None:
    row = {**ROWS["trl"][1], "about": "honest"}
    found = read(lines(tmp_path / "a.jsonl", row, {**row, "about": "charm"}), objective_field="about")
    assert found.traces[0].labels.keys() == {"honest"}
    assert "unknown objective 'charm'" in found.bad[0].reason


TRL = ROWS["trl"][1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{not json", "not valid JSON"),
        ({**TRL, "labels": [True, False]}, "3 steps, but 2 labels"),
        ({**TRL, "completions": ["a", " ", "b"]}, "step 2 is empty"),
        ({**TRL, "completions": [], "labels": []}, "there are no steps"),
        ({**TRL, "completions": ["a", 3, "b"]}, "step 2 is int, not text"),
        ({**TRL, "labels": [True, 2, False]}, "the label of step 2 is 2: it must be a number from 0 to 1"),
        ({**TRL, "labels": [True, "x", False]}, "the label of step 2 is 'x'"),
        ({**TRL, "labels": 3}, "'labels' is int, not a list"),
        ({**TRL, "prompt": " "}, "the prompt is empty"),
        ({**ROWS["first wrong"][1], "label": 3}, "'label' is 3"),
        ({**ROWS["mistake"][1], "mistake_index": -2}, "'mistake_index' is -2"),
        ({"prompt": "a", "steps": STEPS, "labels": {"charm": [1, 1, 1]}}, "unknown objective 'charm'"),
        ({"prompt": "a", "steps": STEPS, "labels": "good"}, "its labels are str, not a list"),
        ({"prompt": "a", "steps": STEPS, "labels": {"accuracy": [1]}}, "3 steps, but 1 labels"),
        ({"prompt": "a", "steps": STEPS, "token_ids": [1]}, "belong together"),
        ({"messages": [USER], "rating": 1}, "no assistant message follows"),
        ({"messages": [USER, {"role": "assistant", "content": "4"}], "rating": 7}, "the outcome is 7"),
        ({"prompt": "a", "conversation": [SIGNED[0], USER]}, "a step and its sign"),
        ({"conversation": SIGNED}, "no 'Step 1' parts them"),
        ({"a": 1, "b": 2}, "its fields (a, b) are those of no known format"),
    ],
)
def test_a_bad_row_is_kept_with_its_reason(row: Any, reason: str, tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", TRL, "", row)
    found = read(file)
    assert len(found.traces) == 1 and found.rows == 2
    (bad,) = found.bad
    assert bad.file == str(file) and bad.line == 3
    assert reason in bad.reason


def test_one_bad_trace_of_a_row_leaves_the_others(tmp_path: Path) -> None:
    row = {**SOLUTIONS, "empty": {"is_correct": True, "solution": " \n"}}
    found = read(lines(tmp_path / "a.jsonl", row))
    assert len(found.traces) == 2 and found.bad[0].reason == "empty: there are no steps"


def test_a_row_counts_as_left_out_when_none_of_its_traces_is_taken(tmp_path: Path) -> None:
    file = lines(
        tmp_path / "a.jsonl", SOLUTIONS, TRL, {**SOLUTIONS, "empty": {"is_correct": True, "solution": ""}}
    )

    def take(trace: StepTrace) -> None:
        if trace.id.endswith(("small", "large")):
            raise RowLeftOut("not now")

    found = ReadTraces(take=take)
    read_traces(str(file), "auto", ["math"], "math", None, "0", found)
    (counts,) = found.report.files.values()
    assert (counts.rows, counts.read, counts.quarantined, counts.left_out) == (3, 1, 0, {"not now": 2})
    assert [bad.line for bad in found.bad] == [3] and found.seen == 1 + 4 + 1


def test_a_step_that_alone_exceeds_the_context(tmp_path: Path) -> None:
    """Nothing can be cut at a step boundary: the row is refused, with file and line."""
    file = lines(tmp_path / "a.jsonl", TRL, {**TRL, "completions": ["x" * 200, "b", "c"]})
    encoder, usable = StepEncoder(TOKENIZER, "\n\n"), list[StepTrace]()

    def take(trace: StepTrace) -> None:
        check_readable(trace, encoder, 100)
        usable.append(trace)

    found = ReadTraces(take=take)
    read_traces(str(file), "auto", ["math"], "math", None, "0", found)
    assert [trace.id for trace in usable] == ["0/a.jsonl:1"]
    (bad,) = found.bad
    assert (bad.file, bad.line) == (str(file), 2)
    assert bad.reason.startswith("prompt and first step have 2") and "is 100" in bad.reason


def test_own_records_come_back_as_they_were(tmp_path: Path) -> None:
    trace = StepTrace(
        id="x",
        group="g",
        prompt=[Message(**USER)],
        steps=STEPS,
        labels={"accuracy": [1.0, None, 0.25], "honest": [None, None, 1.0]},
        outcome={"accuracy": 0.0},
        source="s",
        token_ids=[1, 2, 3, 4],
        step_starts=[1, 2, 3],
        step_ends=[1, 2, 3],
        dialogue="d",
        answer="5",
    )
    StepTrace.save([trace], str(tmp_path / "a.parquet"))
    (found,) = read(tmp_path).traces
    assert found == trace.model_copy(update={"source": str(tmp_path)})
    assert StepTrace.load(str(tmp_path)) == [trace]


def test_an_unknown_format_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown format of steps 'trll'. Did you mean 'trl'"):
        read(lines(tmp_path / "a.jsonl", TRL), "trll")


def test_gzipped_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(TRL).encode()))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps([TRL, TRL]).encode()))
    assert [trace.id for trace in read(tmp_path).traces] == [
        "0/a.jsonl.gz:1",
        "0/b.json.gz:1",
        "0/b.json.gz:2",
    ]
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="not a whole gz file"):
        read(tmp_path / "a.jsonl.gz")


def test_a_data_set_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder in the hub's layout: the same loader, without a network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    lines(tmp_path / "data" / "train.jsonl", TRL)
    lines(tmp_path / "data" / "test.jsonl", TRL, TRL)
    (file,) = data_files(f"hub:{tmp_path / 'data'}:test")
    rows = [row for _, row in read_rows(file)]
    assert len(rows) == 2 and isinstance(rows[0], dict) and rows[0]["completions"] == STEPS
    assert len(read(f"hub:{tmp_path / 'data'}").traces) == 1
    with pytest.raises(ValueError, match="cannot be loaded from the hub"):
        data_files(f"hub:{tmp_path / 'data'}:validation")


def test_prompts_with_their_reference_answers(tmp_path: Path) -> None:
    rows = [
        {"question": "2+3?", "answer": "2+3=5\n#### 5"},
        {"problem": "2+3?", "solution": "\\boxed{5}", "id": "x"},
        {"question": " "},
        {"id": "x", "prompt": [USER]},
    ]
    found = read_prompts(str(lines(tmp_path / "a.jsonl", *rows)), "p", with_answers=True)
    assert [(prompt.id, prompt.answer) for prompt in found.prompts] == [
        ("p/a.jsonl:1", "2+3=5\n#### 5"),
        ("x", "\\boxed{5}"),
    ]
    assert [(bad.line, bad.reason) for bad in found.bad] == [
        (3, "the prompt is empty"),
        (4, "another row of this file has the id 'x' too"),
    ]


@needs_shared_data
def test_real_traces_are_read() -> None:
    solutions = read(SHARED / "math" / "gsm8k_model_solutions.jsonl")
    assert (solutions.rows, len(solutions.traces), solutions.bad) == (919, 3676, [])
    assert sum(trace.outcome == {"accuracy": 1.0} for trace in solutions.traces) == 1372
    bench = read(SHARED / "math" / "processbench_gsm8k_sample.jsonl")
    assert len(bench.traces) == 100 and bench.bad == []
    assert sum(0.0 in trace.labels["accuracy"] for trace in bench.traces) == 57
    mistakes = read(SHARED / "math" / "arithmetic_mistakes.jsonl")
    assert len(mistakes.traces) == 200 and mistakes.bad == []
    assert sum(0.0 not in trace.labels["accuracy"] for trace in mistakes.traces) == 44


@needs_shared_data
def test_real_dialogues_are_read() -> None:
    dialogues = read(SHARED / "tutoring" / "mathdial_dialogues.jsonl")
    assert dialogues.rows == 400 and {bad.reason for bad in dialogues.bad} == {
        "'self-correctness' is missing"
    }
    assert len(dialogues.bad) == 3 and all(trace.prompt[0].role == "user" for trace in dialogues.traces)
    for trace in dialogues.traces:
        roles = [message.role for message in trace.prompt]
        assert all(a != b for a, b in itertools.pairwise(roles)) and roles[-1] == "user"
    assert Counter(next(iter(t.labels["accuracy"])) for t in dialogues.traces).keys() == {0.0, 0.5, 1.0}
    rated = read(SHARED / "tutoring" / "socratic_mind_prefixes.jsonl", label_range=(0.0, 6.0))
    assert [trace.labels["accuracy"] for trace in rated.traces] == [
        [3 / 6],
        [5 / 6],
        [5 / 6],
        [4 / 6],
        [5 / 6],
    ]
    pairs = read(SHARED / "tutoring" / "socratic_mind_accuracy_pairs.jsonl", label_range=(0.0, 6.0))
    assert len(pairs.traces) + len(pairs.bad) == 707 and len(pairs.traces) > 500
