"""Rows that cannot be used: kept with file, line and reason, and an error when they are too many."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from mahalo_ray.data import storage
from mahalo_ray.data.records import Message

QUARANTINE = "quarantine.parquet"
SCHEMA = pa.schema(
    [("file", pa.string()), ("line", pa.int64()), ("reason", pa.string()), ("row", pa.string())]
)
_SHOWN = 5
_KEPT_CHARACTERS = 2000


@dataclass(frozen=True)
class BadRow:
    """`line` counts from 1: lines of JSON Lines, elements of a JSON array, rows of Parquet. `row`: its
    beginning."""

    file: str
    line: int
    reason: str
    row: str

    @classmethod
    def of(cls, file: str, line: int, reason: str, row: object) -> BadRow:
        """With the row cut to what a person needs to recognise it."""
        return cls(file, line, reason, str(row)[:_KEPT_CHARACTERS])


class TooManyBadRows(ValueError):
    """More rows than allowed cannot be used; the message names the first ones."""


def quarantine(
    bad: Sequence[BadRow], rows: int, max_fraction: float, url: str, key: str = "data.max_bad_fraction"
) -> None:
    """Write the bad rows of `rows` to `url` (also when there are none); TooManyBadRows above `max_fraction`
    of them, which the configuration calls `key`."""
    storage.write_table(url, pa.Table.from_pylist([asdict(row) for row in bad], schema=SCHEMA))
    if len(bad) <= max_fraction * rows:
        return
    first = "\n".join(f"  {row.file}, line {row.line}: {row.reason}" for row in bad[:_SHOWN])
    more = f"\n  ... and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    raise TooManyBadRows(
        f"{len(bad)} of {rows} rows cannot be used, more than the allowed share of {max_fraction:g} "
        f"('{key}'):\n{first}{more}\nAll of them are in {url}"
    )


SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
HUB = "hub:"
Row = dict[str, Any]


def data_files(path: str) -> list[str]:
    """The file itself, or the JSON, JSON Lines and Parquet files directly in a folder, by name.

    "hub:NAME", "hub:NAME:SPLIT" or "hub:NAME/CONFIG:SPLIT" is a data set for the library `datasets` (split
    `train` unless named): its rows come as a Parquet file in that library's cache. ValueError when there is
    nothing to read.
    """
    if path.startswith(HUB):
        return [_from_hub(path)]
    if not storage.exists(path):
        raise ValueError(f"there is no file or folder '{path}'")
    fs, inner = storage.filesystem(path)
    if not fs.isdir(inner):
        if not path.endswith(SUFFIXES):
            raise ValueError(f"'{path}' cannot be read: its name must end with {', '.join(SUFFIXES)}")
        return [path]
    files = [file for file in storage.list_files(path) if file.endswith(SUFFIXES)]
    if not files:
        raise ValueError(f"the folder '{path}' holds no files that end with {', '.join(SUFFIXES)}")
    return files


def read_rows(file: str) -> Iterator[tuple[int, Row | BadRow]]:
    """(line from 1, row) of one file; what is not a JSON object comes as a BadRow.

    ValueError when the file as a whole cannot be read.
    """
    data = storage.read_bytes(file)
    if file.endswith(".gz"):
        data = _unzipped(file, data)
    if file.endswith(".parquet"):
        yield from _parquet_rows(file, data)
    elif file.removesuffix(".gz").endswith(".json") and data.lstrip()[:1] == b"[":
        yield from _array_rows(file, data)
    else:
        yield from _lines(file, data)


def use_rows(
    path: str,
    use: Callable[[Row, str, int], None],
    bad: list[BadRow],
    refusal: type[ValueError] = ValueError,
) -> int:
    """Call `use(row, file, line)` for every row of `path` (see `data_files`); returns their number.

    What is no row, and what `use` refuses by raising a `refusal`, is added to `bad`. ValueError when there is
    nothing to read.
    """
    rows = 0
    for file in data_files(path):
        for line, row in read_rows(file):
            rows += 1
            if isinstance(row, BadRow):
                bad.append(row)
                continue
            try:
                use(row, file, line)
            except refusal as error:
                bad.append(BadRow.of(file, line, str(error), row))
    return rows


def _parquet_rows(file: str, data: bytes) -> Iterator[tuple[int, Row]]:
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    except pa.ArrowInvalid as error:
        raise ValueError(f"'{file}' is not a Parquet file: {error}") from error
    yield from enumerate(table.to_pylist(maps_as_pydicts="lossy"), start=1)


def _unzipped(file: str, data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"'{file}' is not a whole gzip file: {error}") from error


def _from_hub(path: str) -> str:
    """The rows of a hub data set (or of a local folder in a hub's layout) as a Parquet file."""
    import datasets  # seconds to import, and only this needs it

    name, _, split = path.removeprefix(HUB).partition(":")
    owner_and_name, config = name, None
    if not Path(name).is_dir() and name.count("/") == 2:
        owner_and_name, _, config = name.rpartition("/")
    try:
        found = datasets.load_dataset(owner_and_name, config, split=split or "train")
    except (
        datasets.exceptions.DatasetNotFoundError,
        FileNotFoundError,
        ConnectionError,
        ValueError,
    ) as error:
        raise ValueError(f"'{path}' cannot be loaded from the hub: {error}") from error
    file = Path(datasets.config.HF_DATASETS_CACHE, "mahalo", f"{found._fingerprint}.parquet")
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        found.to_parquet(file)
    return str(file)


def _array_rows(file: str, data: bytes) -> Iterator[tuple[int, Row | BadRow]]:
    try:
        rows = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"'{file}' is not valid JSON: {error}") from error
    for line, row in enumerate(rows, start=1):
        yield line, row if isinstance(row, dict) else BadRow.of(file, line, "not a JSON object", row)


def _lines(file: str, data: bytes) -> Iterator[tuple[int, Row | BadRow]]:
    for line, raw in enumerate(data.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            yield line, BadRow.of(file, line, f"not valid JSON: {error}", raw.decode(errors="replace"))
            continue
        yield line, row if isinstance(row, dict) else BadRow.of(file, line, "not a JSON object", row)


_ROLES: dict[str, Literal["user", "assistant"]] = {
    **dict.fromkeys(("student", "user", "human"), "user"),
    **dict.fromkeys(("assistant", "tutor", "teacher"), "assistant"),
}
_TURN = re.compile(rf"(?:\A|\n[ \t]*\n)\s*({'|'.join(_ROLES)}):[ \t]*", re.IGNORECASE)


class RowError(ValueError):
    """Why a row cannot be used."""


def required(row: Row, name: str) -> Any:
    """A field that must be there."""
    if row.get(name) is None:
        raise RowError(f"'{name}' is missing")
    return row[name]


def text_of(row: Row, name: str) -> str:
    """A field that must be text."""
    value = required(row, name)
    if not isinstance(value, str):
        raise RowError(f"'{name}' is {type(value).__name__}, not text")
    return value


def list_of(row: Row, name: str) -> list[Any]:
    """A field that must be a list."""
    value = required(row, name)
    if not isinstance(value, list):
        raise RowError(f"'{name}' is {type(value).__name__}, not a list")
    return value


def finite(value: Any, name: str) -> float:
    """A finite number that is no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(f"'{name}' is {value!r}, not a finite number")
    return float(value)


def messages_of(value: Any) -> list[Message]:
    """A list of chat messages."""
    if not isinstance(value, list):
        raise RowError(f"{str(value)[:40]!r} is neither text nor a list of messages")
    try:
        return [Message.model_validate(message) for message in value]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RowError(f"not a list of messages: {where}: {first['msg']}") from error


def prompt_of(value: Any) -> list[Message]:
    """Text as one user message, or a list of messages; not without words."""
    found = [Message(role="user", content=value)] if isinstance(value, str) else messages_of(value)
    if not any(message.content.strip() for message in found):
        raise RowError("the prompt is empty")
    return found


def turns(question: str) -> list[Message]:
    """The messages of a text of turns, each opened by its speaker (Student, User, Human; Assistant, Tutor,
    Teacher) and a colon; a text that opens without a speaker is one user message. A last speaker without
    words only asks for the answer."""
    if not _TURN.match(question):
        return [Message(role="user", content=question.strip())]
    _, *parts = _TURN.split(question)
    spoken = zip(parts[::2], parts[1::2], strict=True)
    found = [Message(role=_ROLES[who.lower()], content=said.strip()) for who, said in spoken]
    if found[-1].role == "assistant" and not found[-1].content:
        found.pop()
    return found


def opening(conversation: Sequence[Message]) -> str:
    """The same for all rows cut from one conversation: what was said up to the user's first message."""
    first_user = next((n for n, m in enumerate(conversation) if m.role == "user"), len(conversation))
    return digest(conversation[: first_user + 1])


def digest(conversation: Sequence[Message]) -> str:
    """The same for equal conversations, and for no others."""
    said = [(message.role, message.content) for message in conversation]
    return hashlib.blake2b(repr(said).encode(), digest_size=12).hexdigest()
