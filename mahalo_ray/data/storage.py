"""Files, folders and locks on any filesystem: a path is local or an fsspec URL (`s3://…`, `memory://…`).

A file appears whole or not at all: on a disk it is written under a temporary name and renamed, in an object
store it is one put. Nothing is cached: what another node has just written is seen at once.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import posixpath
import re
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem

from mahalo_ray.data.temporary import began_then

_SMALL_FILE = 64 * 2**20
# A put there is atomic, and there are no folders to make. Elsewhere a rename is needed.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "memory"}

logger = logging.getLogger(__name__)


def filesystem(url: str | Path) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem behind a path or URL, and the path within it.

    Raises ValueError for a protocol that nothing installed can read, with what to install.
    """
    try:
        # With a listing cache, a run would not see the files that its actors write.
        return fsspec.core.url_to_fs(str(url), use_listings_cache=False)
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
    return _exists(fs, path)


def remove(url: str) -> None:
    """Delete a file or folder if it is there."""
    fs, path = filesystem(url)
    if _exists(fs, path):
        fs.rm(path, recursive=True)


def list_files(folder: str, suffix: str = "") -> list[str]:
    """Sorted URLs of the files directly in `folder` whose names end with `suffix`; none if it is absent.

    A link to a file counts as a file.
    """
    fs, path = filesystem(folder)
    if isinstance(fs, LocalFileSystem):
        names = [entry.name for entry in os.scandir(path) if entry.is_file()] if os.path.isdir(path) else []
    else:
        fs.invalidate_cache(path)
        try:
            items = fs.ls(path, detail=True)
        except FileNotFoundError:
            items = []
        names = [posixpath.basename(item["name"]) for item in items if item["type"] == "file"]
    return sorted(join(folder, name) for name in names if name.endswith(suffix))


def write_bytes(url: str, data: bytes) -> None:
    """Write a file. Readers see the old content or the new, never a part."""
    fs, path = filesystem(url)
    if _is_object_store(fs):
        fs.pipe_file(path, data)
        return
    fs.makedirs(posixpath.dirname(path), exist_ok=True)
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        with fs.open(partial, "wb") as file:
            file.write(data)
        fs.mv(partial, path)
    except OSError:
        # On a full disk, what was written so far would only be in the way.
        with contextlib.suppress(OSError):
            fs.rm(partial)
        raise


def read_bytes(url: str) -> bytes:
    """Read a whole file."""
    fs, path = filesystem(url)
    return bytes(fs.cat_file(path))


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
    """One Parquet file as a table."""
    # One thread: arrow 26 now and then aborts the interpreter at exit after a threaded read.
    return pq.ParquetFile(pa.BufferReader(read_bytes(url))).read(use_threads=False)


def read_table(folder: str) -> pa.Table:
    """All `*.parquet` files directly in `folder`, in name order, as one table.

    Raises FileNotFoundError when there are none.
    """
    files = list_files(folder, ".parquet")
    if not files:
        raise FileNotFoundError(f"no Parquet files in '{folder}'")
    return pa.concat_tables([read_file(file) for file in files])


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
    """Make `url` a copy of a local folder. What was there before goes only when the new files are written."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        _replace_folder(str(local), path)
        return
    old = set(fs.find(path)) if _exists(fs, path) else set()
    for file in sorted(Path(local).rglob("*")):
        if file.is_file():
            target = posixpath.join(path, file.relative_to(local).as_posix())
            if not _is_object_store(fs):
                fs.makedirs(posixpath.dirname(target), exist_ok=True)
            fs.put_file(str(file), target)
            old.discard(target)
    for stale in sorted(old):
        fs.rm_file(stale)


def _replace_folder(source: str, target: str) -> None:
    new, old = (f"{target}.{uuid.uuid4().hex}.{kind}" for kind in ("partial", "old"))
    os.makedirs(os.path.dirname(target), exist_ok=True)
    try:
        copy_folder(source, new)
        if os.path.lexists(target):
            os.rename(target, old)
        os.rename(new, target)
    except OSError:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if os.path.lexists(old):
        filesystem(old)[0].rm(old, recursive=True)


def copy_folder(source: str | Path, target: str | Path) -> None:
    """Copy a folder on a disk, into `target` if that is there. The error is that of the first file that
    cannot be copied, while `shutil.copytree` goes on and raises a list of texts."""

    def fail(error: OSError) -> None:
        raise error

    for folder, _, files in os.walk(source, onerror=fail, followlinks=True):
        inside = os.path.join(target, os.path.relpath(folder, source))
        os.makedirs(inside, exist_ok=True)
        for name in files:
            shutil.copy2(os.path.join(folder, name), os.path.join(inside, name))


def _exists(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    # `fs.exists` answers False for a refused connection too.
    try:
        fs.info(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _is_object_store(fs: fsspec.AbstractFileSystem) -> bool:
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    return bool(protocols & _OBJECT_STORES)


# --- Local copies of folders in a store ---

# Locks of this process on the copies it uses: name of the copy -> file descriptor.
_used_copies: dict[str, int] = {}
_copies_guard = threading.Lock()


def local_copy(url: str) -> str:
    """A local folder with the contents of `url`: itself when local, else a download.

    All processes of a machine share one download of the same content. It is removed when the last of them
    has ended: at its exit, or, if it was killed, as soon as any process makes or gives up a copy.
    """
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        if not os.path.exists(path):
            raise FileNotFoundError(f"'{url}' does not exist")
        return path
    fs.invalidate_cache(path)
    files = {name: info for name, info in fs.find(path, detail=True).items() if info["type"] == "file"}
    if not files:
        raise FileNotFoundError(f"'{url}' does not exist")
    content = [(name, info["size"], _version(info)) for name, info in sorted(files.items())]
    name = hashlib.sha256(repr((url, content)).encode()).hexdigest()[:24]
    base = _copies_folder()
    folder = base / name
    with _copies_guard:
        if name not in _used_copies:
            with FileLock(base / "copies.lock"):
                _remove_unused_copies(base)
                _used_copies[name] = os.open(
                    base / f"{name}.users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
                )
                fcntl.flock(_used_copies[name], fcntl.LOCK_SH)
        with FileLock(base / f"{name}.download"):
            if not folder.is_dir():
                _download(fs, path, list(files), folder)
    return str(folder)


def _download(fs: fsspec.AbstractFileSystem, path: str, files: list[str], folder: Path) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for file in files:
            target = partial / posixpath.relpath(file, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(file, str(target))
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _version(info: dict[str, Any]) -> str:
    """What tells two contents of one file apart, in the words of the store."""
    tags = ("ETag", "etag", "md5Hash", "content_md5", "generation", "LastModified", "mtime", "created")
    return str(next((info[tag] for tag in tags if info.get(tag) is not None), ""))


def _copies_folder() -> Path:
    base = Path(tempfile.gettempdir(), f"mahalo-copies-{os.getuid()}")
    base.mkdir(mode=0o700, exist_ok=True)
    if base.stat().st_uid != os.getuid():
        raise PermissionError(f"'{base}' belongs to another user: set TMPDIR to a folder of your own")
    return base


def _remove_unused_copies(base: Path) -> None:
    """Remove the copies that no living process uses. Call it with `copies.lock` held."""
    for users in base.glob("*.users"):
        if users.stem in _used_copies:
            continue
        file = os.open(users, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # every user holds a shared lock
        except BlockingIOError:
            continue
        else:
            for path in (base / users.stem, users.with_suffix(".partial")):
                shutil.rmtree(path, ignore_errors=True)
            users.unlink()
            users.with_suffix(".download").unlink(missing_ok=True)
        finally:
            os.close(file)


def _give_up_copies(process: int) -> None:
    if not _used_copies or os.getpid() != process:
        return
    base = _copies_folder()
    with FileLock(base / "copies.lock"):
        for file in _used_copies.values():
            os.close(file)
        _used_copies.clear()
        _remove_unused_copies(base)


atexit.register(_give_up_copies, os.getpid())


# --- Locks ---

LOCK = "run.lock"
LEASE_S = 40.0  # a lock in a store that was not renewed for so long may be taken over
_RENEWALS_PER_LEASE = 5


class RunLocked(ValueError):
    """Another run is working in the same output folder."""


@contextlib.contextmanager
def run_lock(output: str, lease_s: float = LEASE_S) -> Iterator[None]:
    """Hold `<output>/run.lock` while the block runs; RunLocked says who has it when another run does.

    On a disk the operating system keeps the lock, so it ends with its process, however that ends. In an
    object store it is a lease that a thread renews. Another run that finds the lease watches it: if it is
    renewed, that run is refused; if it is not for `lease_s` seconds (the process or its pod is gone), that
    run takes it over, from whichever host. A run whose lease was taken over is interrupted and ends with
    RunLocked.
    """
    fs, path = filesystem(join(output, LOCK))
    with (
        _file_lock(path, output)
        if isinstance(fs, LocalFileSystem)
        else _store_lock(fs, path, output, lease_s)
    ):
        yield


@contextlib.contextmanager
def _file_lock(path: str, output: str) -> Iterator[None]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    lock, file = FileLock(path), Path(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise _locked(output, json.loads(file.read_text() or "null")) from None
    try:
        file.write_text(json.dumps(_holder()))
        yield
    finally:
        file.write_text("")
        lock.release()


@contextlib.contextmanager
def _store_lock(fs: fsspec.AbstractFileSystem, path: str, output: str, lease_s: float) -> Iterator[None]:
    lease = _Lease(fs, path, output, lease_s)
    lease.take()
    try:
        yield
    finally:
        lease.give_back()


class _Lease:
    """A lock in an object store: numbered files (`run.lock.000007`), the highest number holds the lock.

    A claim is the conditional creation of the next number, so exactly one of several contenders gets it, and
    a former holder that wakes up late can only overwrite its own, lower number. Numbers never start again: a
    lock given back stays as the highest file, marked as released.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, output: str, lease_s: float) -> None:
        self.fs, self.path, self.output, self.lease_s = fs, path, output, lease_s
        self.number = 0
        self.state: dict[str, Any] = {**_holder(), "lease_s": lease_s, "renewals": 0, "released": False}
        self.lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="run-lock", daemon=True)

    def take(self) -> None:
        """Claim the lock, after watching a lease that nobody has given back. RunLocked if it is held."""
        number, holder = self._newest()
        if holder is not None and not holder.get("released"):
            alive = _is_alive(holder)
            if alive:
                raise _locked(self.output, holder)
            if alive is None:
                number, holder = self._watch(number, holder)
        self.number = number + 1
        file, data = self._file(self.number), json.dumps(self.state).encode()
        try:
            self.fs.pipe_file(file, data, mode="create")
        except FileExistsError:
            raise _locked(self.output, self._newest()[1]) from None
        newest, holder = self._newest()
        if newest != self.number or holder is None or holder["token"] != self.state["token"]:
            raise _locked(self.output, holder)
        for lower, name in self._files().items():
            if lower < self.number:
                self._remove(name)
        self._thread.start()

    def give_back(self) -> None:
        """End the lease. RunLocked if another run has taken it over meanwhile."""
        self._stop.set()
        self._thread.join()
        if self.lost:
            raise RunLocked(
                f"another run has taken over '{self.output}': this one gave no sign of life for "
                f"{self.lease_s:g} s. Its finished stages are kept"
            )
        self.state["released"] = True
        self._write()

    def _watch(self, number: int, holder: dict[str, Any]) -> tuple[int, dict[str, Any] | None]:
        """Wait until the lease has run out (by this machine's clock alone) or was given back."""
        lease_s = float(holder.get("lease_s", self.lease_s))
        logger.warning(
            "'%s' is locked by process %s on host '%s': watching for up to %g s whether it is alive",
            self.output, holder["pid"], holder["host"], lease_s,
        )  # fmt: skip
        ends = time.monotonic() + lease_s
        while time.monotonic() < ends:
            time.sleep(lease_s / (4 * _RENEWALS_PER_LEASE))
            newest, now = self._newest()
            if now is None or now.get("released"):
                return newest, now
            if (newest, now) != (number, holder):
                raise _locked(self.output, now)
        return number, holder

    def _keep_renewing(self) -> None:
        while not self._stop.wait(self.lease_s / _RENEWALS_PER_LEASE):
            try:
                newest, _ = self._newest()
                if newest > self.number:
                    self.lost = True
                    _thread.interrupt_main()
                    return
                self.state["renewals"] += 1
                self._write()
            except OSError as error:
                logger.warning("the lock of '%s' could not be renewed (%s); trying again", self.output, error)

    def _newest(self) -> tuple[int, dict[str, Any] | None]:
        """The highest number and its content; (0, None) when nobody has ever locked."""
        while files := self._files():
            number = max(files)
            with contextlib.suppress(FileNotFoundError):  # its holder's successor has just removed it
                return number, json.loads(self.fs.cat_file(files[number]))
        return 0, None

    def _files(self) -> dict[int, str]:
        """Number -> file. A lock of an earlier release, without a number, counts as 0."""
        folder, name = posixpath.split(self.path)
        self.fs.invalidate_cache(folder)
        try:
            items = self.fs.ls(folder, detail=False)
        except FileNotFoundError:
            return {}
        pattern = re.compile(re.escape(name) + r"(?:\.(\d+))?")
        matches = ((pattern.fullmatch(posixpath.basename(item)), item) for item in items)
        return {int(match[1] or 0): item for match, item in matches if match}

    def _file(self, number: int) -> str:
        return f"{self.path}.{number:06d}"

    def _write(self) -> None:
        self.fs.pipe_file(self._file(self.number), json.dumps(self.state).encode())

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(name)


def _holder() -> dict[str, Any]:
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "pid": process.pid,
        "pid_space": _pid_space(),
        "process_started": process.create_time(),
        "token": uuid.uuid4().hex,
    }


def _pid_space() -> str:
    """Names the set of process numbers that this process belongs to: containers may share a host name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}" if boot.exists() else ""


def _is_alive(holder: dict[str, Any]) -> bool | None:
    """Whether the holder's process still runs; None for one that cannot be seen from here."""
    if holder["host"] != socket.gethostname() or holder.get("pid_space") != _pid_space():
        return None
    try:
        return began_then(psutil.Process(holder["pid"]), holder["process_started"])
    except psutil.NoSuchProcess:
        return False


def _locked(output: str, holder: dict[str, Any] | None) -> RunLocked:
    if holder is None:
        return RunLocked(f"'{output}' is in use by another run that began this moment")
    who = f"process {holder['pid']} on host '{holder['host']}'"
    return RunLocked(
        f"'{output}' is in use by another run ({who}). Wait for it, or give this run another 'output'."
    )
