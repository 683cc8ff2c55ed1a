"""Files of rows: which files a path stands for, and the rows of each, in the forms that people write them."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import posixpath
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from mahalo_ray.data import storage
from mahalo_ray.data.row_fields import Row, RowError, show

QUARANTINE = "quarantine.parquet"


class FileError(ValueError):
    """Why a file cannot be read as a whole."""


_FORMATS = (".jsonl", ".ndjson", ".json", ".parquet")
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_READABLE = f"{', '.join(_FORMATS)} (and with {', '.join(_COMPRESSIONS)} after it)"
HUB = "hub:"
# What data sets and runs keep beside their rows.
_METADATA = {QUARANTINE, "manifest.json", "dataset_info.json", "dataset_infos.json", "state.json"}


class DataFile(NamedTuple):
    """A file to read, and its path within the source."""

    url: str
    name: str


def data_files(path: str) -> list[str]:
    """The files of a path that `find_files` reads."""
    return [file.url for file in find_files(path)[0]]


def find_files(path: str) -> tuple[list[DataFile], dict[str, str]]:
    """The files to read at `path`, by name; and those left out, each with the reason.

    A file stands for itself. Of a folder, all JSON, JSON Lines and Parquet files in it and its subfolders are
    read, compressed or not, links included; what begins with a dot is not. "hub:NAME", "hub:NAME:SPLIT" or
    "hub:NAME/CONFIG:SPLIT" is a data set for the library `datasets` (split `train` unless named): its rows
    come as a Parquet file in that library's cache. ValueError when there is nothing to read.
    """
    if path.startswith(HUB):
        file = _load_from_hub(path)
        return [DataFile(file, posixpath.basename(file))], {}
    if not storage.exists(path):
        raise ValueError(f"there is no file or folder '{path}'")
    fs, inner = storage.filesystem(path)
    if not fs.isdir(inner):
        if isinstance(fs, LocalFileSystem) and not os.path.isfile(inner):
            raise ValueError(f"'{path}' cannot be read: it is no ordinary file (a pipe, or a device)")
        if _format(path) is None:
            raise ValueError(f"'{path}' cannot be read: its name must end with {_READABLE}")
        return [DataFile(path, posixpath.basename(path))], {}
    others: dict[str, str] = {}
    local = isinstance(fs, LocalFileSystem)
    names = list(_walk(inner, others)) if local else _find(fs, inner)
    files: list[DataFile] = []
    content: dict[str, str] = {}
    for name in sorted(names):
        hidden = next((part for part in name.split("/") if part.startswith(".")), None)
        if hidden is not None:
            others[name] = "its name, or its folder's, begins with a dot"
        elif not _is_utf8(name):
            others[name] = "its name is not valid UTF-8: rename it"
        elif posixpath.basename(name) in _METADATA:
            others[name] = "it describes data, and holds none"
        elif _format(name) is None:
            others[name] = f"no file of rows: its name does not end with {_READABLE}"
        elif local and (same := content.setdefault(os.path.realpath(f"{inner}/{name}"), name)) != name:
            others[name] = f"it is the same file as '{same}' (a link)"
        else:
            files.append(DataFile(storage.join(path, name), name))
    others = {storage.join(path, name): reason for name, reason in sorted(others.items())}
    if not files:
        named = "".join(f"\n  {file}: {reason}" for file, reason in list(others.items())[:5])
        raise ValueError(f"the folder '{path}' holds no files that end with {_READABLE}{named}")
    return files, others


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _format(name: str) -> str | None:
    """The ending that says what a file holds, without regard to case and compression."""
    name = name.lower()
    for ending in _COMPRESSIONS:
        name = name.removesuffix(ending)
    return next((ending for ending in _FORMATS if name.endswith(ending)), None)


def _walk(
    folder: str, others: dict[str, str], inside: str = "", above: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Files of a folder on a disk and its subfolders, through links; what is no file goes to `others`."""
    real = os.path.realpath(folder)
    if real in above:
        others[inside] = "a link to a folder that holds it"
        return
    for entry in os.scandir(folder):
        name = posixpath.join(inside, entry.name)
        if entry.is_dir():
            if entry.name.startswith("."):
                others[name] = "a folder whose name begins with a dot"
            else:
                yield from _walk(entry.path, others, name, above | {real})
        elif entry.is_file():
            yield name
        else:
            others[name] = "a link to a file that is not there" if entry.is_symlink() else "not a file"


def _find(fs: Any, folder: str) -> list[str]:
    fs.invalidate_cache(folder)
    return [posixpath.relpath(name, folder) for name in fs.find(folder)]


def _load_from_hub(path: str) -> str:
    """The rows of a hub data set (or of a local folder in a hub's layout) as a Parquet file."""
    import datasets  # seconds to import, and only this needs it

    name, _, split = path.removeprefix(HUB).partition(":")
    owner_and_name, config = name, None
    if not Path(name).is_dir() and name.count("/") == 2:
        owner_and_name, _, config = name.rpartition("/")
    try:
        loaded = datasets.load_dataset(owner_and_name, config, split=split or "train")
    except (
        datasets.exceptions.DatasetNotFoundError,
        FileNotFoundError,
        ConnectionError,
        ValueError,
    ) as error:
        raise ValueError(f"'{path}' cannot be loaded from the hub: {error}") from error
    file = Path(datasets.config.HF_DATASETS_CACHE, "mahalo", f"{loaded._fingerprint}.parquet")
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        loaded.to_parquet(file)
    return str(file)


class UnreadableRow(RowError):
    """Something in a row's place that is no row, and its text."""

    def __init__(self, reason: str, row: object) -> None:
        super().__init__(reason)
        self.row = row


def read_rows(file: str) -> Iterator[tuple[int, Row | UnreadableRow]]:
    """(line from 1, row) of one file, one after another; what is no JSON object comes as an UnreadableRow.

    JSON Lines, a JSON array, objects one after another however they are printed, or one object whose only
    list holds the rows (under `data`, `rows`, ...), in UTF-8 or UTF-16, with any line ends; or Parquet.
    FileError when the file as a whole cannot be read.
    """
    with _opened(file) as stream:
        if _format(file) == ".parquet":
            yield from _parquet_rows(file, stream)
        else:
            yield from _text_rows(file, stream)


@contextlib.contextmanager
def _opened(file: str) -> Iterator[BinaryIO]:
    """The file's bytes without compression. What is compressed or in a store goes to a temporary file, so
    that a damaged file is noticed before any of its rows is used."""
    fs, path = storage.filesystem(file)
    ending = posixpath.splitext(path)[1].lower()
    try:
        if ending not in _COMPRESSIONS and isinstance(fs, LocalFileSystem):
            with open(path, "rb") as stream:
                yield stream
            return
        with tempfile.TemporaryFile(prefix="mahalo-") as stream, fs.open(path, "rb") as packed:
            try:
                shutil.copyfileobj(_unpack(ending, packed), stream, 2**20)
            except (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
                if ending in _COMPRESSIONS:
                    raise FileError(f"'{file}' is not a whole {ending[1:]} file: {error}") from error
                raise
            stream.seek(0)
            yield cast(BinaryIO, stream)
    except (PermissionError, IsADirectoryError, FileNotFoundError) as error:
        raise FileError(f"'{file}' cannot be read: {error}") from error


def _unpack(ending: str, packed: Any) -> Any:
    match ending:
        case ".gz":
            return gzip.GzipFile(fileobj=packed)
        case ".bz2":
            return bz2.BZ2File(packed)
        case ".xz":
            return lzma.LZMAFile(packed)
        case ".zst":
            return pa.CompressedInputStream(packed, "zstd")
    return packed


def _parquet_rows(file: str, stream: BinaryIO) -> Iterator[tuple[int, Row | UnreadableRow]]:
    line = 0
    try:
        with pq.ParquetFile(stream) as parquet:
            names = Counter(parquet.schema_arrow.names)
            if repeated := [name for name, count in names.items() if count > 1]:
                raise FileError(f"'{file}' has several columns of one name: {', '.join(repeated)}")
            # One thread: arrow 26 now and then aborts the interpreter at exit after a threaded read.
            for batch in parquet.iter_batches(1024, use_threads=False):
                for row in _batch_rows(batch):
                    line += 1
                    yield line, row
    except (pa.ArrowException, OSError) as error:
        raise FileError(f"'{file}' is not a Parquet file, or a damaged one: {error}") from error


def _batch_rows(batch: pa.RecordBatch) -> Iterator[Row | UnreadableRow]:
    try:
        yield from batch.to_pylist(maps_as_pydicts="lossy")
        return
    except (ValueError, OverflowError, pa.ArrowException):
        pass
    for number in range(batch.num_rows):
        try:
            yield batch.slice(number, 1).to_pylist(maps_as_pydicts="lossy")[0]
        except UnicodeDecodeError as error:
            yield UnreadableRow(f"text that is not UTF-8: {error}", "(cannot be shown)")
        except (ValueError, OverflowError, pa.ArrowException) as error:  # dates after the year 9999, ...
            yield UnreadableRow(f"a value that cannot be read: {error}", "(cannot be shown)")


def _text_rows(file: str, stream: BinaryIO) -> Iterator[tuple[int, Row | UnreadableRow]]:
    encoding = _encoding(stream.read(64))
    stream.seek(0)
    # Bytes that are no UTF-8 become halves of characters, which `_parse` refuses: one bad line stays one.
    errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
    text = io.TextIOWrapper(stream, encoding, errors, newline=None)
    try:
        first, second = (_next_line(text) for _ in range(2))
        text.seek(0)
        if first is None:
            return
        if _is_lines(first, second):
            yield from _line_rows(text)
            return
        whole = text.read()
        try:
            rows = _document_rows(whole)
        except FileError as error:
            text.seek(0)
            if not any(isinstance(row, dict) for _, row in _line_rows(text)):
                raise FileError(f"'{file}' {error}{_advice(whole)}") from error
            text.seek(0)
            rows = list(_line_rows(text))
        yield from rows
    except UnicodeDecodeError as error:
        raise FileError(f"'{file}' is not valid {encoding}: {error}. Save it as UTF-8") from error
    finally:
        text.detach()


def _encoding(head: bytes) -> str:
    for mark, encoding in ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32")):
        if head.startswith(mark):
            return encoding
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if head[1:2] == head[3:4] == b"\0":  # JSON begins with two characters of ASCII
        return "utf-16-le"
    if head[:1] == head[2:3] == b"\0":
        return "utf-16-be"
    return "utf-8-sig"


def _next_line(text: io.TextIOWrapper) -> str | None:
    """The next line that is not empty."""
    while line := text.readline():
        if line.strip():
            return line
    return None


# Names under which one object holds all rows of a file.
_CONTAINERS = {"data", "rows", "examples", "records", "items", "instances", "pairs", "traces", "prompts"}


def _container(value: object) -> list[Any] | None:
    """The rows of an object that only holds them: one list under such a name, and no other list or object."""
    if not isinstance(value, dict):
        return None
    nested = [name for name, content in value.items() if isinstance(content, list | dict)]
    if len(nested) != 1 or nested[0].lower() not in _CONTAINERS:
        return None
    rows = value[nested[0]]
    return rows if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows) else None


def _is_lines(first: str, second: str | None) -> bool:
    """Whether the first two lines are those of JSON Lines, and not of one JSON document."""
    value = _parse(first)
    if second is None:
        return isinstance(value, dict) and _container(value) is None
    return isinstance(value, dict) or (
        not isinstance(value, UnreadableRow) and isinstance(_parse(second), dict)
    )


def _line_rows(text: io.TextIOWrapper) -> Iterator[tuple[int, Row | UnreadableRow]]:
    for line, raw in enumerate(text, start=1):
        if raw.strip():
            yield line, _as_row(_parse(raw), raw)


def _as_row(value: Any, raw: object) -> Row | UnreadableRow:
    return value if isinstance(value, dict | UnreadableRow) else UnreadableRow("not a JSON object", raw)


def _parse(raw: str) -> Any:
    """The JSON value of a line, or an UnreadableRow."""
    try:
        return _checked(_loads(raw), raw)
    except json.JSONDecodeError as error:
        return UnreadableRow(f"not valid JSON: {error}", raw)
    except _KeyGivenTwice as error:
        return UnreadableRow(str(error), raw)
    except RecursionError:
        return UnreadableRow("nested too deeply", raw)


class _KeyGivenTwice(ValueError):
    """An object has two values for one key: JSON readers keep the last and say nothing."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        repeated = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _KeyGivenTwice(f"the key {show(repeated)} is given twice")
    return value


def _loads(raw: str) -> Any:
    try:
        return _DECODER.decode(raw)
    except (json.JSONDecodeError, _KeyGivenTwice):
        raise
    except ValueError:  # a number of more digits than Python converts: kept as its digits
        return json.loads(raw, parse_int=_parse_int, object_pairs_hook=_object)


def _parse_int(digits: str) -> int | str:
    return int(digits) if len(digits) <= 4000 else digits


def _checked(value: Any, raw: str) -> Any:
    """The value of this JSON; an UnreadableRow if it was not UTF-8, or a text in it has half of a character,
    which no model reads."""
    try:
        raw.encode()
    except UnicodeEncodeError:
        return UnreadableRow("not valid UTF-8", raw)
    if "\\u" not in raw:
        return value
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        return UnreadableRow(f"a text holds half of a character ({half}, a lone surrogate)", raw)
    except RecursionError:
        return UnreadableRow("nested too deeply", raw)
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_SPACE = re.compile(r"[ \t\r\n]*")
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


def _document_rows(text: str) -> list[tuple[int, Row | UnreadableRow]]:
    """The rows of one JSON document: the elements of an array by number, or objects one after another by the
    line they begin in (by number where a line holds several). FileError, without the name, if neither."""
    at = _skip_space(text, 0)
    if text[at : at + 1] == "[":
        return list(enumerate(_elements(text, at), start=1))
    rows: list[tuple[int, Row | UnreadableRow]] = []
    line, counted = 1, 0
    while at < len(text):
        line, counted = line + text.count("\n", counted, at), at
        value, at = _value_at(text, at)
        rows.append((line, _as_row(value, text[counted:at])))
        at = _skip_space(text, at)
    contained = _container(rows[0][1]) if len(rows) == 1 else None
    if contained is not None or len({line for line, _ in rows}) < len(rows):
        return list(enumerate(contained or [row for _, row in rows], start=1))
    return rows


def _elements(text: str, at: int) -> Iterator[Row | UnreadableRow]:
    at = _skip_space(text, at + 1)
    while text[at : at + 1] != "]":
        value, end = _value_at(text, at)
        yield _as_row(value, text[at:end])
        at = _skip_space(text, end)
        if text[at : at + 1] == ",":
            at = _skip_space(text, at + 1)
        elif text[at : at + 1] != "]":
            raise _document_error("expecting ',' or ']'", text, at)
    if text[at + 1 :].strip():
        raise _document_error("something follows the array", text, at + 1)


def _value_at(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at a place and where it ends; an UnreadableRow for a bad one in brackets."""
    try:
        value, end = _DECODER.raw_decode(text, at)
        return _checked(value, text[at:end]), end
    except (ValueError, RecursionError) as error:
        end_of_brackets = _end_of_brackets(text, at)
        if end_of_brackets is None:
            position = error.pos if isinstance(error, json.JSONDecodeError) else at
            raise _document_error(getattr(error, "msg", str(error)), text, position) from error
        raw = text[at:end_of_brackets]
        value = _parse(raw)
        return value, end_of_brackets


def _end_of_brackets(text: str, at: int) -> int | None:
    """Where the bracket that opens at a place is closed."""
    depth = 0
    if text[at : at + 1] not in ("{", "["):
        return None
    for match in _BRACKET.finditer(text, at):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return None


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _document_error(message: str, text: str, at: int) -> FileError:
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    return FileError(f"is not valid JSON: {message} (line {line}, column {column})")


# How compressed files begin, as text.
_PACKED = ("\x1f\udc8b", "BZh", "\udcfd7zXZ", "(\udcb5/\udcfd")


def _advice(text: str) -> str:
    if text.startswith("version https://git-lfs"):
        return ". It is a pointer of Git LFS: fetch the file itself with `git lfs pull`"
    if text.startswith(_PACKED):
        return ". It is compressed: let its name end with .gz, .bz2, .xz or .zst"
    return ". Write one JSON object per line (.jsonl), or an array of objects (.json)"
