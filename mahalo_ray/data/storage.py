"""Files wherever they lie: every path is a local path or an fsspec URL (`s3://…`, `gs://…`, `memory://…`).

Writers are atomic for readers: data goes under a temporary name and is renamed, manifests are written last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import posixpath
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

_SMALL_FILE = 64 * 2**20


def filesystem(url: str | Path) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem behind a path or URL, and the path within it.

    Raises ValueError for a protocol that nothing installed can read, with what to install.
    """
    try:
        return fsspec.core.url_to_fs(str(url))
    except ImportError as error:
        raise ValueError(f"'{url}' cannot be opened: {error}") from error


def absolute(url: str) -> str:
    """A URL unchanged; a local path made absolute (workers run in other folders)."""
    fs, path = filesystem(url)
    return path if isinstance(fs, LocalFileSystem) else url


def is_local(url: str) -> bool:
    """Whether it lies on this machine's own filesystem."""
    return isinstance(filesystem(url)[0], LocalFileSystem)


def join(url: str, *parts: str) -> str:
    """Append path parts to a path or URL."""
    return posixpath.join(url, *parts)


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = filesystem(url)
    return bool(fs.exists(path))


def remove(url: str) -> None:
    """Delete a file or folder if it is there."""
    fs, path = filesystem(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def list_files(folder: str, suffix: str = "") -> list[str]:
    """Sorted URLs of the files directly in `folder` whose names end with `suffix`; none if it is absent."""
    fs, path = filesystem(folder)
    if not fs.exists(path):
        return []
    found = (item["name"] for item in fs.ls(path, detail=True) if item["type"] == "file")
    return sorted(join(folder, posixpath.basename(name)) for name in found if name.endswith(suffix))


def write_bytes(url: str, data: bytes) -> None:
    """Write a file under a temporary name, then rename it."""
    fs, path = filesystem(url)
    fs.makedirs(posixpath.dirname(path), exist_ok=True)
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        with fs.open(partial, "wb") as file:
            file.write(data)
        fs.mv(partial, path)
    except OSError:
        # On a full disk what was begun would be in the way.
        with contextlib.suppress(OSError):
            fs.rm(partial)
        raise


def read_bytes(url: str) -> bytes:
    """Read a whole file."""
    fs, path = filesystem(url)
    with fs.open(path, "rb") as file:
        return bytes(file.read())


def fingerprint(url: str) -> str:
    """Content of a small file; of a large one what its storage says (size, time of change, tag)."""
    fs, path = filesystem(url)
    if fs.size(path) > _SMALL_FILE:
        return str(fs.checksum(path))
    return hashlib.sha256(read_bytes(url)).hexdigest()


def write_json(url: str, value: Any) -> None:
    """Write readable JSON atomically. NaN and infinities are refused."""
    write_bytes(url, json.dumps(value, indent=2, allow_nan=False).encode())


def read_json(url: str) -> Any:
    """Read a JSON file."""
    return json.loads(read_bytes(url))


def write_table(url: str, table: pa.Table) -> None:
    """Write one Parquet file atomically."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    write_bytes(url, buffer.getvalue().to_pybytes())


def read_file(url: str) -> pa.Table:
    """One Parquet file."""
    return pq.read_table(pa.BufferReader(read_bytes(url)))


def read_table(folder: str) -> pa.Table:
    """All `*.parquet` files directly in `folder`, in name order, as one table.

    Raises FileNotFoundError when there are none.
    """
    files = list_files(folder, ".parquet")
    if not files:
        raise FileNotFoundError(f"no Parquet files in '{folder}'")
    # One thread: arrow 26 now and then aborts the interpreter at exit after a threaded read.
    return pa.concat_tables([_read_parquet(file) for file in files])


def stream_tables(folder: str, rows: int = 1024) -> Iterator[pa.Table]:
    """The same as tables of at most `rows` rows: of a file on a disk no more than that is in memory.

    Raises FileNotFoundError when there are no files.
    """
    files = list_files(folder, ".parquet")
    if not files:
        raise FileNotFoundError(f"no Parquet files in '{folder}'")
    for file in files:
        source = filesystem(file)[1] if is_local(file) else pa.BufferReader(read_bytes(file))
        with pq.ParquetFile(source, memory_map=is_local(file)) as parquet:
            for batch in parquet.iter_batches(rows, use_threads=False):
                yield pa.Table.from_batches([batch])


def upload_folder(local: str | Path, url: str) -> None:
    """Copy a local folder to `url`, replacing what is there."""
    fs, path = filesystem(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)
    fs.makedirs(posixpath.dirname(path), exist_ok=True)
    fs.put(str(local), path, recursive=True)


def local_copy(url: str) -> str:
    """A local folder with the contents of `url`: itself when local, else a fresh download."""
    fs, path = filesystem(url)
    if not fs.exists(path):
        raise FileNotFoundError(f"'{url}' does not exist")
    if isinstance(fs, LocalFileSystem):
        return path
    target = tempfile.mkdtemp(prefix="mahalo-")
    fs.get(path, posixpath.join(target, "copy"), recursive=True)
    return posixpath.join(target, "copy")


def _read_parquet(url: str) -> pa.Table:
    return pq.ParquetFile(pa.BufferReader(read_bytes(url))).read(use_threads=False)
