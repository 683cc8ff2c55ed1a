"""Rows of the files people have: JSON, JSON Lines (also gzipped) and Parquet, one file or a folder of them,
or a data set of the Hugging Face hub."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mahalo_ray.data import storage
from mahalo_ray.data.quarantine import BadRow

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
