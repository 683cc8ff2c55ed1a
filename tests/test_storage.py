"""Files, copies and locks on a disk and in an object store (a real S3 protocol server on this machine)."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mahalo_ray.data import storage
from mahalo_ray.data.storage import LOCK, RunLocked, run_lock
from mahalo_ray.data.temporary import temporary_folder

SHORT_LEASE_S = 2.0
LONG_S = 600  # longer than a slow machine takes: no verdict depends on it


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "disk" else str(request.getfixturevalue("s3"))


def in_other_process(code: str, *arguments: str) -> str:
    """What other Python code prints: it shares no file system object, and no cache, with this process."""
    command = [sys.executable, "-c", f"import sys\nfrom mahalo_ray.data import storage\n{code}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LONG_S, check=True).stdout


def test_what_another_process_writes_is_seen_at_once(folder: str) -> None:
    """A listing, an absence and a content that were asked for before must not come from a cache."""
    url, other = storage.join(folder, "a", "one.json"), storage.join(folder, "a", "two.json")
    storage.write_json(url, 1)
    assert storage.list_files(storage.join(folder, "a")) == [url] and not storage.exists(other)
    assert (storage.read_json(url), before := storage.fingerprint(url)) == (1, before)
    in_other_process("[storage.write_json(url, [2] * 1000) for url in sys.argv[1:]]", url, other)
    assert storage.list_files(storage.join(folder, "a")) == [url, other] and storage.exists(other)
    assert storage.read_json(url) == [2] * 1000 and storage.fingerprint(url) != before
    in_other_process("storage.remove(sys.argv[1])", other)
    assert not storage.exists(other) and storage.list_files(storage.join(folder, "a")) == [url]
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(other)


def test_a_folder_takes_the_place_of_another(folder: str, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for source, names in ((old, ("a", "sub/b")), (new, ("a", "sub/c"))):
        for name in names:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text(f"{source.name} {name}")
    url = storage.join(folder, "models", "policy")
    storage.upload_folder(old, url)
    storage.upload_folder(new, url)
    fs, path = storage.filesystem(url)
    assert sorted(name.removeprefix(f"{path}/") for name in fs.find(path)) == ["a", "sub/c"]
    assert storage.read_bytes(storage.join(url, "a")) == b"new a"
    assert [name for name in fs.ls(fs._parent(path), detail=False) if name != path] == []


def test_a_folder_that_cannot_be_copied_leaves_the_old_one(folder: str, tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "a").write_text("good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a").write_text("bad")
    (tmp_path / "bad" / "b").symlink_to("b")  # a link to itself: no file can be read there
    url = storage.join(folder, "policy")
    storage.upload_folder(tmp_path / "good", url)
    if storage.is_local(url):
        with pytest.raises(OSError, match="b"):
            storage.upload_folder(tmp_path / "bad", url)
        assert storage.read_bytes(storage.join(url, "a")) == b"good"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good", "policy"]
    if storage.is_local(url):
        with pytest.raises(OSError, match="b") as raised:
            storage.copy_folder(tmp_path / "bad", tmp_path / "copy")
        assert raised.value.errno == errno.ELOOP  # and not a list of texts, as shutil has it
    with pytest.raises(FileNotFoundError):
        storage.local_copy(storage.join(folder, "nowhere"))


def test_one_copy_per_machine_and_content(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes share a copy; new content is another one; nothing stays when the last process has ended."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    url = f"{s3}/model"
    storage.write_bytes(f"{url}/sub/config.json", b"first")
    first = Path(storage.local_copy(url))
    assert storage.local_copy(url) == str(first) and first.is_relative_to(tmp_path)
    ask = "print(storage.local_copy(sys.argv[1]))"
    assert in_other_process(ask, url).strip() == str(first)
    assert (first / "sub" / "config.json").read_bytes() == b"first"  # the other's end did not remove it
    storage.write_bytes(f"{url}/sub/config.json", b"second")
    second = Path(in_other_process(ask, url).strip())
    assert second != first and first.is_dir() and not second.exists()
    killed = "print(storage.local_copy(sys.argv[1]), flush=True); import os, signal; os.kill(os.getpid(), 9)"
    with pytest.raises(subprocess.CalledProcessError):
        in_other_process(killed, url)
    assert second.is_dir()
    storage.write_bytes(f"{url}/sub/config.json", b"third")
    third = Path(storage.local_copy(url))
    assert not second.exists() and (third / "sub" / "config.json").read_bytes() == b"third"


def _hold_and_die(output: str) -> None:
    run_lock(output).__enter__()
    os._exit(1)


def _die_holding(output: str) -> int:
    child = multiprocessing.get_context("spawn").Process(target=_hold_and_die, args=(output,))
    child.start()
    child.join(LONG_S)
    assert child.exitcode == 1 and child.pid is not None
    return child.pid


def test_the_lock_is_one_runs_alone(folder: str) -> None:
    with run_lock(folder):
        with pytest.raises(RunLocked, match=rf"in use by another run \(process {os.getpid()} on host"):
            run_lock(folder).__enter__()
        ask = "with storage.run_lock(sys.argv[1]): pass"
        with pytest.raises(subprocess.CalledProcessError) as failed:
            in_other_process(ask, folder)
        assert "RunLocked" in failed.value.stderr
    with run_lock(folder):
        pass


def test_the_lock_of_a_killed_process_of_this_host_is_taken_over_at_once(folder: str) -> None:
    _die_holding(folder)
    began = time.monotonic()
    with run_lock(folder, lease_s=3600):
        pass
    assert time.monotonic() - began < 3600  # no lease of an hour was waited for


def _claim(url: str, number: int, **changes: Any) -> Callable[[int], None]:
    """Write a lease as a process of another host does; the returned function renews it."""
    state = {**storage._holder(), "host": "elsewhere", "lease_s": SHORT_LEASE_S, "renewals": 0, **changes}

    def write(renewals: int) -> None:
        storage.write_json(f"{url}/{LOCK}.{number:06d}", {**state, "renewals": renewals})

    write(0)
    return write


def test_a_lease_of_a_dead_pod_runs_out_and_another_host_takes_over(s3: str) -> None:
    _claim(s3, 7)
    with run_lock(s3):
        names = [name.rsplit("/", 1)[1] for name in storage.list_files(s3)]
        assert names == [f"{LOCK}.000008"]
        assert storage.read_json(f"{s3}/{LOCK}.000008")["host"] == socket.gethostname()
    assert storage.read_json(f"{s3}/{LOCK}.000008")["released"]
    with run_lock(s3):  # given back: nothing to watch
        assert storage.exists(f"{s3}/{LOCK}.000009")


def test_a_lease_of_an_earlier_release_runs_out_too(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"host": "elsewhere", "pid": 1, "process_started": 1.0, "token": "x"}
    storage.write_json(f"{s3}/{LOCK}", old)
    with run_lock(s3, SHORT_LEASE_S):
        assert not storage.exists(f"{s3}/{LOCK}")


def test_a_lease_that_is_renewed_is_respected(s3: str) -> None:
    renew = _claim(s3, 1, lease_s=20.0)  # longer than this process is kept waiting
    code = "with storage.run_lock(sys.argv[1]): pass"
    command = [sys.executable, "-c", f"import sys\nfrom mahalo_ray.data import storage\n{code}", s3]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as contender:
        renewals = 0
        while contender.poll() is None:
            renewals += 1
            renew(renewals)
            time.sleep(0.05)
        assert contender.stderr is not None
        assert "is in use by another run (process" in contender.stderr.read() and contender.returncode != 0


def test_of_two_that_want_an_abandoned_lock_one_gets_it(s3: str) -> None:
    _claim(s3, 1)
    code = "with storage.run_lock(sys.argv[1]):\n print('mine', flush=True)\n sys.stdin.read()"
    command = [sys.executable, "-c", f"import sys\nfrom mahalo_ray.data import storage\n{code}", s3]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    contenders = [subprocess.Popen(command, text=True, **pipes) for _ in range(3)]
    while sum(contender.poll() is not None for contender in contenders) < 2:
        time.sleep(0.05)
    (winner,) = [contender for contender in contenders if contender.poll() is None]
    assert [winner.communicate()[0], winner.returncode] == ["mine\n", 0]
    for loser in contenders:
        if loser is not winner:
            stdout, stderr = loser.communicate()
            assert (stdout, "RunLocked" in stderr) == ("", True)


def test_a_run_that_was_asleep_too_long_ends(s3: str) -> None:
    """Its lease has been taken over: going on would put two runs into one output."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(RunLocked, match="another run has taken over"), run_lock(s3, SHORT_LEASE_S):
            _claim(s3, 2)
            while True:
                time.sleep(0.1)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert storage.list_files(s3)[-1].endswith(".000002") and not json.loads(
        fsspec.filesystem("s3").cat(f"{s3}/{LOCK}.000002")
    ).get("released")


def test_the_next_process_deletes_what_a_killed_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, signal\nfrom mahalo_ray.data.temporary import temporary_folder\n"
        "with temporary_folder('soup'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    assert len(list(tmp_path.glob("mahalo-soup-*"))) == 1
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder("export") as folder:
        assert os.listdir(folder) == [] and not list(tmp_path.glob("mahalo-soup-*"))
    assert not list(tmp_path.iterdir())
