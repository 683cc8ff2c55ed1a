"""Whatever files people bring, every row is read, quarantined with a reason, or left out by name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings

from mahalo_ray.config import MathDialCases, PrefixCases
from mahalo_ray.data.pair_readers import ReadPairs, read_pairs
from mahalo_ray.data.prompts import ReadPrompts, read_prompts
from mahalo_ray.data.records import PreferencePair, StepTrace
from mahalo_ray.data.rows import BadRow, FileError, ReadReport, quarantine
from mahalo_ray.data.step_readers import ReadTraces, read_traces
from mahalo_ray.domains.human_values import read_truthfulqa
from mahalo_ray.domains.tutoring.personas import load_cases


def row(number: int, **changes: Any) -> dict[str, Any]:
    return {"prompt": f"{number}+1?", "chosen": f"{number + 1}", "rejected": "no", **changes}


def as_lines(*rows: Any, ends: str = "\n") -> str:
    return "".join((one if isinstance(one, str) else json.dumps(one)) + ends for one in rows)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet(columns: list[list[str]], names: list[str]) -> bytes:
    target = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(column) for column in columns], names), target)
    return target.getvalue()


def read(path: Path | str, **changes: Any) -> ReadPairs:
    found = ReadPairs()
    settings = {"row_format": "auto", "objective": "accuracy", "objective_field": None, **changes}
    read_pairs(str(path), objectives=["accuracy"], name="0", into=found, **settings)
    assert_complete(found.report)
    return found


def assert_complete(report: ReadReport) -> None:
    """Read + quarantined + left out is what is there: in all, and in every file."""
    account = report.as_json()
    assert account["rows"] == account["read"] + account["quarantined"] + account["left_out"]
    for counts in account["files"].values():
        assert counts["rows"] == counts["read"] + counts["quarantined"] + sum(counts["left_out"].values())
    json.dumps(account)
    for line in report.describe():
        line.encode()


def test_every_file_of_a_folder_is_read_or_named(tmp_path: Path) -> None:
    """Links as in a hub's cache, compressions, capitals, other names, subfolders; 2 rows in each."""
    folder, blobs = tmp_path / "data", tmp_path / "blobs"
    (folder / "more").mkdir(parents=True)
    blobs.mkdir()
    text = [as_lines(row(2 * n), row(2 * n + 1)).encode() for n in range(9)]
    (folder / "part-0.jsonl").write_bytes(text[0])
    (folder / "part-1.jsonl.zst").write_bytes(zstd(text[1]))
    (folder / "part-2.JSONL").write_bytes(text[2])
    (folder / "more" / "part-3.jsonl").write_bytes(text[3])
    (blobs / "4567").write_bytes(text[4])
    (folder / "part-4.jsonl").symlink_to(blobs / "4567")
    (folder / "part-5.ndjson").write_bytes(text[5])
    (folder / "part-6.jsonl.gz").write_bytes(gzip.compress(text[6], mtime=0))
    (folder / "part-7.json.bz2").write_bytes(bz2.compress(text[7]))
    (folder / "part-8.jsonl.XZ").write_bytes(lzma.compress(text[8]))
    left_out = {
        "table.csv": "its name does not end with",
        "again.jsonl": "the same file as 'part-0.jsonl'",
        "gone.jsonl": "a link to a file that is not there",
        "round": "a link to a folder that holds it",
        "damaged.jsonl.zst": "not a whole zst file",
        "pointer.jsonl": "git lfs pull",
        ".cache": "begins with a dot",
        "dataset_info.json": "it describes data",
    }
    (folder / "table.csv").write_text("prompt,chosen,rejected\n")
    (folder / "again.jsonl").symlink_to("part-0.jsonl")
    (folder / "gone.jsonl").symlink_to("nowhere")
    (folder / "round").symlink_to(folder)
    (folder / "damaged.jsonl.zst").write_bytes(zstd(text[0])[:20])
    (folder / "pointer.jsonl").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    (folder / ".cache").mkdir()
    (folder / "dataset_info.json").write_text("{}")
    found = read(folder)
    assert sorted(pair.prompt[0].content for pair in found.pairs) == sorted(f"{n}+1?" for n in range(18))
    account = found.report.as_json()
    named = {os.path.relpath(f, folder): c["not_read"] for f, c in account["files"].items() if c["not_read"]}
    # Of two names of one file the first is read: "again.jsonl" comes before "part-0.jsonl".
    left_out["part-0.jsonl"] = left_out.pop("again.jsonl").replace("part-0", "again")
    assert named.keys() == left_out.keys()
    assert [name for name, reason in left_out.items() if reason not in named[name]] == []
    lines = found.report.describe()
    assert lines[-1] == "rows: 18 = 18 read + 0 quarantined + 0 left out; files not read: 8 of 17"
    assert f"{folder}/table.csv: not read: no file of rows" in "\n".join(lines)


def test_a_folder_in_a_store(s3: str) -> None:
    from mahalo_ray.data import storage

    storage.write_bytes(f"{s3}/data/a.jsonl.zst", zstd(as_lines(row(1), "{").encode()))
    storage.write_bytes(f"{s3}/data/more/b.jsonl", as_lines(row(2)).encode())
    storage.write_bytes(f"{s3}/data/c.txt", b"no rows")
    found = read(f"{s3}/data")
    assert [pair.id for pair in found.pairs] == ["0/a.jsonl.zst:1", "0/more/b.jsonl:1"]
    assert [(bad.file, bad.line) for bad in found.bad] == [(f"{s3}/data/a.jsonl.zst", 2)]
    assert "does not end with" in str(found.report.files[f"{s3}/data/c.txt"].not_read)


ROWS = [row(1), row(2), row(3)]
WHOLE_FILES: dict[str, tuple[str, bytes]] = {
    "an array with a byte order mark": ("a.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode()),
    "an array under the name of lines": ("a.jsonl", json.dumps(ROWS).encode()),
    "lines with a byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + as_lines(*ROWS).encode()),
    "UTF-16": ("a.jsonl", as_lines(*ROWS).encode("utf-16")),
    "UTF-16 without a mark": ("a.jsonl", as_lines(*ROWS).encode("utf-16-le")),
    "an array in UTF-16": ("a.json", json.dumps(ROWS).encode("utf-16")),
    "rows under a name": ("a.json", json.dumps({"version": "1.0", "data": ROWS}).encode()),
    "rows under a name, printed": ("a.json", json.dumps({"rows": ROWS}, indent=1).encode()),
    "carriage returns": ("a.jsonl", as_lines(*ROWS, ends="\r").encode()),
    "lines of Windows": ("a.jsonl", as_lines(*ROWS, ends="\r\n").encode()),
    "printed objects": ("a.jsonl", "\n".join(json.dumps(one, indent=2) for one in ROWS).encode()),
    "no line ends at all": ("a.json", "".join(json.dumps(one) for one in ROWS).encode()),
}


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_a_file_is_read_where_its_form_is_clear(name: str, tmp_path: Path) -> None:
    file, data = WHOLE_FILES[name]
    (tmp_path / file).write_bytes(data)
    found = read(tmp_path / file)
    assert [pair.chosen for pair in found.pairs] == ["2", "3", "4"] and found.bad == []


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "a.json",
            b"[{",
            r"a\.json' is not valid JSON: .*\(line 1, column 3\)\. Write one JSON object",
        ),
        ("a.json", b'[{"a": 1} {"b": 2}]', "expecting ',' or ']'"),
        ("a.jsonl", b"prompt,chosen,rejected\n1,2,3\n", "is not valid JSON"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16")[:-1], "not valid utf-16"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:20], "not a whole gz file"),
        ("a.jsonl.xz", b"{}", "not a whole xz file"),
        ("a.jsonl", gzip.compress(b'{"a": 1}', mtime=0), "It is compressed: let its name end with"),
        ("a.parquet", b"PAR1", "not a Parquet file"),
        ("a.parquet", parquet([["p"], ["a"], ["b"]], ["prompt", "chosen", "chosen"]), "columns of one name"),
    ],
)
def test_what_cannot_be_read_as_a_whole_is_one_error(
    name: str, data: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FileError, match=message):
        read(tmp_path / name)


DEEP = '{"prompt": "p", "chosen": "a", "rejected": "b", "meta": ' + "[" * 100_000 + "]" * 100_000 + "}"
HUGE = '{"prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": ' + "9" * 5000 + "}"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"prompt": "p \\ud83d", "chosen": "a", "rejected": "b"}', "half of a character"),
        (DEEP, "nested too deeply"),
        (HUGE, "'chosen_score' is '999"),
        (row(1, chosen_score=int("9" * 400)), "not a finite number"),
        (row(1, weight=int("9" * 400)), "'weight' is 9999"),
        (row(1, chosen_score=float("nan")), "not a finite number"),
        (row(1, weight=True), "'weight' is True, not a finite number"),
        (row(1, margin="1"), "'margin' is '1', not a finite number"),
        (row(1, id=[1]), "'id' is list, neither text nor a number"),
        (row(1, dialogue={"a": 1}), "'dialogue' is dict"),
        (
            row(1, id="x", source="s", prompt=[], chosen_ids=[2**40]),
            "'chosen_ids.0' is 1099511627776",
        ),
        (row(1, chosen=None), "'chosen' is missing"),
        (row(1, prompt=[["user", "p"]]), "message 1 is list"),
        (row(1, prompt=[{"role": ["user"], "content": "p"}]), "role"),
        (
            row(1, prompt=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
            "a part of type 'image_url': only text can be used",
        ),
        (
            {
                "prompt": [{"role": "user", "content": "p", "tool_calls": [{"id": 1}]}],
                "chosen": [],
                "rejected": [],
            },
            "message 1 has 'tool_calls'",
        ),
    ],
)
@pytest.mark.parametrize("form", ["lines", "array"])
def test_one_bad_row_ends_no_job(bad: Any, reason: str, form: str, tmp_path: Path) -> None:
    rows = [one if isinstance(one, str) else json.dumps(one) for one in (row(1), bad, row(2))]
    text = "\n".join(rows) if form == "lines" else f"[{', '.join(rows)}]"
    file = tmp_path / ("a.jsonl" if form == "lines" else "a.json")
    file.write_text(text)
    found = read(file)
    assert [pair.chosen for pair in found.pairs] == ["2", "3"]
    assert (found.bad[0].file, found.bad[0].line) == (str(file), 2) and reason in found.bad[0].reason
    PreferencePair.save(found.pairs, str(tmp_path / "pairs" / "a.parquet"))
    quarantine(found.bad, 3, 1.0, str(tmp_path / "quarantine.parquet"))
    assert pq.read_table(tmp_path / "quarantine.parquet").num_rows == 1


def test_a_date_that_python_cannot_hold_spoils_its_row_only(tmp_path: Path) -> None:
    days = pa.array([3_000_000, 1], pa.date32())
    rows = pa.Table.from_pylist([row(1), row(2)]).append_column("day", days)
    pq.write_table(rows, tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert [pair.chosen for pair in found.pairs] == ["3"]
    assert "a value that cannot be read" in found.bad[0].reason
    assert_complete(found.report)


def test_bytes_that_are_no_text_spoil_their_line_only(tmp_path: Path) -> None:
    text = as_lines(row(1), row(2), row(3)).encode().splitlines()
    (tmp_path / "a.jsonl").write_bytes(
        b"\n".join([text[0], text[1][:20] + b"\xff\xfe" + text[1][20:], text[2]])
    )
    found = read(tmp_path / "a.jsonl")
    assert [(bad.line, bad.reason) for bad in found.bad] == [(2, "not valid UTF-8")] and len(found.pairs) == 2


@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_of_another_encoding_is_no_text_at_all(tmp_path: Path, indent: int | None) -> None:
    rows = [{**row(number), "chosen": f"Äpfel {number}"} for number in range(3)]
    text = "\n".join(json.dumps(one, ensure_ascii=False, indent=indent) for one in rows)
    (tmp_path / "a.jsonl").write_bytes(text.encode("latin-1"))
    found = read(tmp_path / "a.jsonl")
    assert not found.pairs and {bad.reason for bad in found.bad} == {"not valid UTF-8"}
    assert found.rows == len(found.bad) == 3


@pytest.mark.parametrize("form", ["{}\n{}\n", "[{}, {}]"])
def test_a_key_given_twice_is_a_bad_row(tmp_path: Path, form: str) -> None:
    good = json.dumps(row(1))
    (tmp_path / "a.json").write_text(form.format(good, good[:-1] + ', "chosen": "7"}'))
    found = read(tmp_path / "a.json")
    assert len(found.pairs) == 1
    assert [bad.reason for bad in found.bad] == ["the key 'chosen' is given twice"]


def test_a_file_whose_name_is_no_text_is_left_out_by_name(tmp_path: Path) -> None:
    for name in (b"a.jsonl", b"b\xff.jsonl"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_text(as_lines(row(1)))
    found = read(tmp_path)
    assert len(found.pairs) == 1
    assert [report["not_read"] for report in found.report.as_json()["files"].values()] == [
        "its name is not valid UTF-8: rename it",
        None,
    ]


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="no ordinary file"):
        read(tmp_path / "a.jsonl")


def test_messages_as_the_api_and_data_sets_write_them(tmp_path: Path) -> None:
    """Null extra keys (from `model_dump()` or a Parquet struct), text parts, `name`, `developer`."""
    extras = {"name": None, "tool_calls": None, "refusal": None, "audio": None, "function_call": None}
    parts = [{"type": "text", "text": "1"}, {"type": "text", "text": "+1?", "image_url": None}]
    prompt = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}], **extras},
        {"role": "user", "content": parts, **extras, "name": "Ann"},
    ]
    rows = [row(1, prompt=prompt)]
    for key, text in (("chosen", "2"), ("rejected", "no")):
        rows[0][key] = [{"role": "assistant", "content": [{"type": "text", "text": text}], **extras}]
    (tmp_path / "a.jsonl").write_text(as_lines(*rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    for pair in read(tmp_path).pairs:
        assert [(m.role, m.content) for m in pair.prompt] == [("system", "Be brief."), ("user", "1+1?")]
        assert (pair.chosen, pair.rejected) == ("2", "no")


def test_files_that_both_count_from_0(tmp_path: Path) -> None:
    """An id has to be unique in its file; over files and sources it is made so."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(as_lines(row(1, id=0), row(2, id=1), row(3, id=0)))
    found = read(tmp_path)
    assert [pair.id for pair in found.pairs] == ["0", "1", "0/b.jsonl:0", "0/b.jsonl:1"]
    assert [bad.reason for bad in found.bad] == ["another row of this file has the id '0' too"] * 2
    read_pairs(str(tmp_path / "a.jsonl"), "auto", ["accuracy"], "accuracy", None, "1", found)
    assert [pair.id for pair in found.pairs[4:]] == ["1/a.jsonl:0", "1/a.jsonl:1"]
    assert_complete(found.report)
    prompts = read_prompts(str(tmp_path)).prompts
    assert [prompt.id for prompt in prompts] == ["0", "1", "b.jsonl:0", "b.jsonl:1"]


def test_rows_of_other_objectives_are_left_out_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(as_lines(row(1, about="accuracy"), row(2, about="charm"), "{"))
    report = read(tmp_path / "a.jsonl", objective=None, objective_field="about").report
    assert report.describe() == [
        f"{tmp_path}/a.jsonl: 1 of 3 rows read, 1 quarantined, 1 left out (objective 'charm')",
        "rows: 3 = 1 read + 1 quarantined + 1 left out; files not read: 0 of 1",
    ]


def test_parts_of_a_row_count_once(tmp_path: Path) -> None:
    """A row with several traces, of which one is bad, is read; the bad part is in the quarantine."""
    solution = {"is_correct": True, "solution": "a\nb"}
    rows = [{"question": "q", "one": solution, "two": {**solution, "solution": " "}}]
    rows += [{"question": "q", "one": {**solution, "solution": " "}}]
    (tmp_path / "a.jsonl").write_text(as_lines(*rows))
    found = ReadTraces()
    read_traces(str(tmp_path), "auto", ["accuracy"], "accuracy", None, "0", found)
    assert_complete(found.report)
    account = found.report.as_json()
    assert (account["read"], account["quarantined"]) == (1, 1)
    assert (len(found.traces), len(found.bad), found.seen) == (1, 2, 3)


# --- Fuzz ---

LIKELY = [
    {"prompt": "p", "chosen": "a", "rejected": "b"},
    {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]},
    {"question": "Student: q", "response_steps": ["a"], "step_value": [0.5]},
    {"problem": "p", "steps": ["a", "b"], "label": 1},
    {"input": "p", "steps": ["a"], "mistake_index": None},
    {"question": "q", "conversation": "Teacher: a|EOM|B: b", "self-correctness": "Yes", "qid": 1},
    {"prompt": "p", "conversation": [{"from": "human", "value": "s"}, {"from": "gpt", "value": "+"}]},
    {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}], "rating": 1},
    {"Question": "q", "Best Answer": "a", "Correct Answers": "a; b", "Best Incorrect Answer": "c",
     "Incorrect Answers": "c; d"},
    {"prompt": "p", "steps": ["a"], "token_ids": [1, 2], "step_starts": [1], "step_ends": [1]},
    {"id": "x", "prompt": "p", "weights": {"accuracy": 1}, "seed": 3},
    {"question": "q", "m": {"is_correct": True, "solution": "s"}},
]  # fmt: skip
FIELDS = sorted({name for known in LIKELY for name in known} | {"dialogue", "group", "weight", "margin"} | {
    "objective", "chosen_score", "ratings", "metadata", "response", "answer", "guidance", "topic", "outcome",
    "chosen_ids", "prompt_ids", "rejected_ids", "student_incorrect_solution", "ground_truth", "is_correct",
    "student_profile", "teacher_described_confusion", "solution", "from", "value", "role", "content",
})  # fmt: skip
WORDS = [
    "user",
    "assistant",
    "system",
    "+",
    "-",
    "Yes",
    "No",
    "accuracy",
    "a",
    " ",
    "",
    "Teacher: hi|EOM|A: 4",
]
TEXTS = st.one_of(st.sampled_from(WORDS), st.text(max_size=8), st.characters(categories=["Cs"]))
NUMBERS = st.one_of(
    st.integers(-2, 3), st.integers(), st.floats(), st.sampled_from([10**400, -(10**320), 2**31, 2**63])
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": TEXTS},
        optional={"name": SCALARS, "tool_calls": st.one_of(st.none(), st.just([]), SCALARS)},
    ),
    max_size=4,
)
VALUES = st.recursive(
    st.one_of(SCALARS, MESSAGES),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from([*FIELDS, "accuracy", "type", "text"]), inner, max_size=3),
    ),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=7)
# A row in a known format with some other values, or an object of any fields, or no object, or no JSON.
FUZZED = st.one_of(
    st.builds(lambda known, other: json.dumps({**known, **other}), st.sampled_from(LIKELY), OBJECTS),
    OBJECTS.map(json.dumps),
    VALUES.map(json.dumps),
    st.text(max_size=20).map(lambda text: text.replace("\n", " ").replace("\r", " ")),
    st.sampled_from([DEEP, HUGE, '{"prompt": "\\udfff"}', '{"prompt": ' * 2000, "[[[", "\x00", "NaN"]),
)
READERS: dict[str, Callable[[str], tuple[ReadReport, list[Any]]]] = {}


def reader(function: Callable[[str], tuple[ReadReport, list[Any]]]) -> None:
    READERS[function.__name__] = function


@reader
def pairs(path: str) -> tuple[ReadReport, list[Any]]:
    found = ReadPairs()
    read_pairs(path, "auto", ["accuracy"], "accuracy", None, "0", found)
    PreferencePair.to_table(found.pairs)
    return found.report, found.pairs


@reader
def pairs_by_field(path: str) -> tuple[ReadReport, list[Any]]:
    found = ReadPairs()
    read_pairs(path, "records", ["accuracy"], None, "objective", "0", found)
    PreferencePair.to_table(found.pairs)
    return found.report, found.pairs


@reader
def traces(path: str) -> tuple[ReadReport, list[Any]]:
    found = ReadTraces()
    read_traces(path, "auto", ["accuracy"], "accuracy", None, "0", found, outcome_labels="all")
    StepTrace.to_table(found.traces)
    return found.report, found.traces


@reader
def prompts(path: str) -> tuple[ReadReport, list[Any]]:
    found = ReadPrompts()
    read_prompts(path, "p", found, with_answers=True)
    return found.report, found.prompts


@reader
def truthful(path: str) -> tuple[ReadReport, list[Any]]:
    found = ReadPairs()
    read_truthfulqa(path, "accuracy", 2, found)
    return found.report, found.pairs


@reader
def mathdial_cases(path: str) -> tuple[ReadReport, list[Any]]:
    cases, report = load_cases(MathDialCases(path=path))
    return report, cases


@reader
def prefix_cases(path: str) -> tuple[ReadReport, list[Any]]:
    cases, report = load_cases(PrefixCases(path=path))
    return report, cases


def check_batch(rows: list[str], array: bool, file: Path) -> None:
    """All readers over one file: what they keep can be stored, what they refuse is in the account."""
    text = f"[{','.join(rows)}]" if array else "\n".join(rows)
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    for name, function in READERS.items():
        try:
            report, _ = function(str(file))
        except ValueError as error:  # nothing at all can be used, said once and by name
            assert str(file) in str(error), (name, error)
            continue
        assert_complete(report)
        if not array:
            assert report.rows == sum(bool(one.strip()) for one in rows), name
        pa.Table.from_pylist([vars(bad) for bad in report.bad])
        assert all(isinstance(bad, BadRow) and bad.line >= 1 and bad.reason for bad in report.bad)


@given(rows=st.lists(FUZZED, min_size=1, max_size=20), array=st.booleans())
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_no_row_stops_a_reader(
    rows: list[str], array: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    check_batch([json.dumps(row(1)), *rows], array, folder / ("a.json" if array else "a.jsonl"))


@pytest.mark.slow
def test_no_row_of_a_hundred_thousand_stops_a_reader(tmp_path: Path) -> None:
    """100,000 rows: 250 batches of 400, every one through all readers."""
    batches = 0

    @given(pool=st.lists(FUZZED, min_size=40, max_size=40), order=st.randoms(use_true_random=False))
    @settings(max_examples=250, suppress_health_check=list(HealthCheck), derandomize=True)
    def check(pool: list[str], order: Any) -> None:
        nonlocal batches
        batches += 1
        # A good row first, so that the batch is used; the others in every mixture that 40 kinds give.
        rows = [json.dumps(row(1)), *order.choices([one for one in pool if len(one) < 10_000], k=399)]
        check_batch(rows, batches % 4 == 0, tmp_path / f"{batches % 7}.json{'' if batches % 4 == 0 else 'l'}")

    check()
    assert batches >= 250
