"""What a file or folder holds, before anything is trained on it: formats, counts, lengths, samples, bad rows,
and how much of it an evaluation set contains too (`mahalo data inspect`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mahalo_ray.data.pair_readers import PairParser, pair_format_of
from mahalo_ray.data.prompts import parse_prompt_row
from mahalo_ray.data.records import Message
from mahalo_ray.data.row_fields import Row, RowError, get_id, show
from mahalo_ray.data.rows import Place, ReadReport, RowLeftOut, UniqueIds, use_rows
from mahalo_ray.data.step_readers import FORMATS, check_count, format_of

NGRAM = 13  # words; the usual length in reports on contamination
_WORDS = re.compile(r"\w+")
_SHOWN, _SHOWN_TEXTS = 160, 3  # characters of a text in a sample, and texts of a part
_ASPECTS = ("helpfulness", "honesty", "truthfulness", "instruction_following", "correctness")
# TruthfulQA as its authors' table has it, and as its data set on the hub does.
_TRUTHFULQA = (
    ("Question", "Best Answer", "Incorrect Answers"),
    ("question", "best_answer", "incorrect_answers"),
)
PAIRS, TRACES, PROMPTS = "preference pairs", "step traces", "prompts"


class Recognised(NamedTuple):
    """One row as what it is. `texts`: part -> its texts; `labels`: what its labels say, in words."""

    kind: str
    row_format: str
    texts: Mapping[str, Sequence[str]]
    labels: Sequence[str] = ()

    @property
    def whole_text(self) -> str:
        """All its texts as one."""
        return "\n".join(text for texts in self.texts.values() for text in texts)


@dataclass
class Inspection:
    """What was found. `formats`: (kind, format) -> rows; `lengths`: part -> characters of every text;
    `overlaps`: places of rows that share a run of words with the evaluation set."""

    path: str
    report: ReadReport = field(default_factory=ReadReport)
    formats: Counter[tuple[str, str]] = field(default_factory=Counter)
    columns: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    against: str | None = None
    overlaps: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """All of it as one document; lengths as quantiles, in characters."""
        return {
            "path": self.path,
            "data": self.report.as_json(),
            "formats": [
                {"kind": kind, "format": row_format, "rows": rows}
                for (kind, row_format), rows in self.formats.most_common()
            ],
            "columns": dict(self.columns.most_common()),
            "labels": dict(self.labels.most_common()),
            "characters": {part: _quantiles(lengths) for part, lengths in self.lengths.items()},
            "samples": self.samples,
            "bad": [{"file": b.file, "line": b.line, "reason": b.reason} for b in self.report.bad],
            "contamination": None
            if self.against is None
            else {
                "against": self.against,
                "ngram": NGRAM,
                "rows": len(self.overlaps),
                "places": self.overlaps,
            },
        }

    def describe(self) -> list[str]:
        """The same as lines for people."""
        lines = list(self.report.describe())
        for (kind, row_format), rows in self.formats.most_common():
            lines.append(f"{kind}, format '{row_format}': {rows} rows")
        if self.columns:
            lines.append("fields: " + ", ".join(f"{name} ({n})" for name, n in self.columns.most_common(30)))
        if self.labels:
            lines.append("labels: " + ", ".join(f"{name} {n}" for name, n in self.labels.most_common(20)))
        for part, lengths in self.lengths.items():
            quantiles = ", ".join(f"{name} {value}" for name, value in _quantiles(lengths).items())
            lines.append(f"characters of {part}: {quantiles}")
        for number, sample in enumerate(self.samples, start=1):
            lines.append(f"sample {number} ({sample['place']}):")
            for part, texts in sample["texts"].items():
                lines += [f"  {part}: {text}" for text in texts[:_SHOWN_TEXTS]]
                if len(texts) > _SHOWN_TEXTS:
                    lines.append(f"  ... and {len(texts) - _SHOWN_TEXTS} more of {part}")
        for row in self.report.bad[:5]:
            lines.append(f"bad row: {row.file}, line {row.line}: {row.reason}")
        if len(self.report.bad) > 5:
            lines.append(f"... and {len(self.report.bad) - 5} more bad rows")
        if self.against is not None:
            lines.append(
                f"contamination: {len(self.overlaps)} rows share {NGRAM} words in a row (or a whole shorter "
                f"text) with '{self.against}'"
                + (f": {', '.join(self.overlaps[:10])}" if self.overlaps else "")
            )
        return lines


def inspect(path: str, against: str | None = None, samples: int = 3) -> Inspection:
    """Read every row of `path` as what its fields say it is.

    Rows that can be used as nothing are in the report with the reason. `against`: a file or folder of an
    evaluation set; rows of `path` that share NGRAM words in a row with any of its prompts are named.
    ValueError when there is nothing to read.

    Example:
        >>> inspect("pairs.jsonl").formats  # doctest: +SKIP
        Counter({('preference pairs', 'trl'): 1000})
    """
    known = _evaluated_ngrams(against) if against is not None else set()
    found = Inspection(path, against=against)
    parser, ids = PairParser(), UniqueIds()

    def use(row: Row, place: Place) -> None:
        found.columns.update(row.keys())
        recognised = recognise(row, parser)
        if row.get("id") is not None:
            ids.claim(get_id(row, ""), place)
        found.formats[recognised.kind, recognised.row_format] += 1
        found.labels.update(recognised.labels)
        for part, texts in recognised.texts.items():
            found.lengths.setdefault(part, []).extend(len(text) for text in texts)
        if known and not known.isdisjoint(ngrams(recognised.whole_text)):
            found.overlaps.append(str(place))
        if len(found.samples) < samples:
            found.samples.append(
                {
                    "place": str(place),
                    "texts": {
                        part: [show(text, _SHOWN) for text in texts]
                        for part, texts in recognised.texts.items()
                    },
                }
            )

    use_rows(path, use, found.report)
    return found


def recognise(row: Row, parser: PairParser) -> Recognised:
    """A row as a preference pair, step traces or a prompt, by its fields; RowError if it is none of them."""
    if {"chosen", "rejected"} <= set(row) or pair_format_of(row) in ("ultrafeedback", "records", "hhh"):
        return _recognise_pair(row, parser)
    for names in _TRUTHFULQA:
        if set(row) >= set(names):
            return Recognised(PAIRS, "truthfulqa", {name: [str(row[name])] for name in names})
    if pair_format_of(row) == "helpsteer" and any(aspect in row for aspect in _ASPECTS):
        rated = {aspect: row[aspect] for aspect in _ASPECTS if row.get(aspect) is not None}
        texts = {"prompt": [str(row["prompt"])], "response": [str(row["response"])]}
        return Recognised(PAIRS, "helpsteer", texts, [f"{aspect} {value}" for aspect, value in rated.items()])
    try:
        row_format = format_of(row)
    except RowError as error:
        return _recognise_prompt(row, str(error))
    return _recognise_traces(row, row_format)


def _recognise_pair(row: Row, parser: PairParser) -> Recognised:
    row_format = pair_format_of(row)
    named = row.get("objective")
    labels = [f"objective {named}"] if isinstance(named, str) else []
    if row_format == "ultrafeedback":
        return _recognise_ultrafeedback(row)
    pair = parser.parse(row, named if isinstance(named, str) and named else "unnamed", "row", "inspected")
    longer = "chosen longer" if len(pair.chosen) > len(pair.rejected) else "chosen not longer"
    texts = {"prompt": _contents(pair.prompt), "chosen": [pair.chosen], "rejected": [pair.rejected]}
    return Recognised(PAIRS, row_format, texts, [*labels, longer])


def _recognise_ultrafeedback(row: Row) -> Recognised:
    """Every aspect that orders the answers is a label."""
    ordered = []
    for aspect in _ASPECTS:
        try:
            PairParser("ultrafeedback", aspect).parse(row, aspect, "row", "inspected")
        except (RowError, RowLeftOut):
            continue
        ordered.append(f"differs in {aspect}")
    answers = [str(c["response"]) for c in row["completions"] if isinstance(c, Mapping) and "response" in c]
    if not answers:
        raise RowError("'completions' holds no 'response'")
    return Recognised(
        PAIRS, "ultrafeedback", {"prompt": [str(row["instruction"])], "answer": answers}, ordered
    )


def _recognise_traces(row: Row, row_format: str) -> Recognised:
    prompts, steps, labels = list[str](), list[str](), list[str]()
    for parsed in FORMATS[row_format](row):
        prompts += _contents(parsed.prompt)
        if not parsed.steps or not all(isinstance(step, str) and step.strip() for step in parsed.steps):
            raise RowError("it has no steps, or one that is no text")
        steps += parsed.steps
        for values in parsed.labels.values():
            if isinstance(values, list):
                check_count(values, len(parsed.steps))
                labels += [_label_word(value) for value in values]
        labels += [f"outcome {show(value, 20)}" for value in parsed.outcome.values()]
    if not steps:
        raise RowError("it holds no step")
    return Recognised(TRACES, row_format, {"prompt": prompts, "step": steps}, labels)


def _label_word(value: object) -> str:
    if value is None:
        return "step unknown"
    if isinstance(value, bool):
        return "step right" if value else "step wrong"
    return "step rated"


def _recognise_prompt(row: Row, why_no_trace: str) -> Recognised:
    try:
        prompt = parse_prompt_row(row, "row", Place("", "", 1), with_answers=True)
    except RowError as error:
        raise RowError(f"{why_no_trace}; nor is it a prompt: {error}") from error
    texts = {"prompt": _contents(prompt.messages)}
    if prompt.answer is not None:
        texts["answer"] = [prompt.answer]
    return Recognised(PROMPTS, "prompts", texts)


def _contents(messages: Sequence[Message]) -> list[str]:
    return [message.content for message in messages]


def _quantiles(lengths: Sequence[int]) -> dict[str, int]:
    if not lengths:
        return {"n": 0}
    least, median, high, most = np.quantile(lengths, [0.0, 0.5, 0.95, 1.0])
    return {
        "n": len(lengths),
        "least": int(least),
        "median": int(median),
        "95 %": int(high),
        "most": int(most),
    }


def ngrams(text: str) -> Iterator[int]:
    """Hashes of every run of NGRAM words, in lower case and without punctuation; of the whole text where it
    is shorter."""
    words = _WORDS.findall(text.lower())
    for start in range(max(len(words) - NGRAM, 0) + 1):
        yield hash(tuple(words[start : start + NGRAM]))


def _evaluated_ngrams(path: str) -> set[int]:
    """Those of all prompts of an evaluation set, whatever its format."""
    known: set[int] = set()
    parser = PairParser()

    def use(row: Row, place: Place) -> None:
        recognised = recognise(row, parser)
        texts = recognised.texts.get("prompt") or [recognised.whole_text]
        for text in texts:
            known.update(ngrams(text))

    report = ReadReport()
    use_rows(path, use, report)
    if not known:
        first = f" (the first row: {report.bad[0].reason})" if report.bad else ""
        raise ValueError(f"'{path}' holds nothing to compare with{first}")
    return known
