"""The command: exit codes, messages, and that a stopped run leaves nothing behind and goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from processes import command_line
from typer.testing import CliRunner

from mahalo_ray import __version__
from mahalo_ray.cli import app
from mahalo_ray.cli.commands import VERBS
from mahalo_ray.cli.common import guarded
from mahalo_ray.config import ActorsConfig, ConfigError
from mahalo_ray.pipeline.cluster import ray_session

EXAMPLE = Path(__file__).parent.parent / "examples" / "quickstart.yaml"
PROGRAM = Path(__file__).parent / "programs" / "stoppable_run.py"
LONG_S = 300  # longer than a slow machine takes: no verdict depends on it


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_validate_names_the_run() -> None:
    code, text = invoke("validate", str(EXAMPLE))
    assert code == 0 and "run 'quickstart', objectives accuracy, engagement" in text


def test_validate_applies_overrides() -> None:
    code, text = invoke("validate", str(EXAMPLE), "--set", "name=other", "--set", "output=s3://bucket/x")
    assert code == 0 and "run 'other'" in text and "s3://bucket/x" in text


@pytest.mark.parametrize("verb", ["validate", "run", "serve", *VERBS])
def test_a_wrong_key_is_one_message_and_exit_code_2(verb: str) -> None:
    code, text = invoke(verb, str(EXAMPLE), "--set", "polcy.beta=1")
    assert code == 2
    assert "Did you mean 'policy'?" in text and str(EXAMPLE) in text
    assert "Traceback" not in text


def test_a_missing_file_is_said() -> None:
    code, text = invoke("run", "nowhere.yaml")
    assert code == 2 and "no config file at 'nowhere.yaml'" in text


def test_debug_shows_the_traceback() -> None:
    code, text = invoke("validate", "nowhere.yaml", "--debug")
    assert code == 2 and "Traceback" in text


def test_errors_name_their_stage(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        error = ValueError("no [data] here")
        error.add_note("in stage 'sft' (SFT)")
        raise error

    with pytest.raises(SystemExit):
        guarded(work, debug=False)
    assert "no [data] here\n(in stage 'sft' (SFT))" in capsys.readouterr().err


def test_an_object_store_without_keys_is_one_message(tmp_path: Path) -> None:
    """In a process of its own: this one keeps the keys of a store that other tests use."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", "from mahalo_ray.cli import main; main()"]
    arguments = ["sft", str(EXAMPLE), "--set", "output=s3://bucket/run"]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=LONG_S, env=environment, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "the object store cannot be used: Unable to locate credentials" in done.stderr


def test_defects_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: print(1 / 0), debug=False)


def test_version() -> None:
    assert invoke("--version") == (0, f"mahalo_ray {__version__}\n")


def start(output: Path, **environment: str) -> subprocess.Popen[str]:
    """The program in a process group of its own, as a terminal would start it."""
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def read_until(process: subprocess.Popen[str], mark: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith(mark):
            return seen
    raise AssertionError(f"ended without '{mark}':\n{seen}")


@contextlib.contextmanager
def killed_at_the_end(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(LONG_S)


def ray_processes_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    names = " ".join(command_line(child) or "" for child in found)
    assert "raylet" in names and "gcs_server" in names
    return found


def still_running(processes: list[psutil.Process]) -> list[str]:
    """The command lines of those that have not ended."""
    return [line for line in map(command_line, processes) if line is not None]


def working(processes: list[psutil.Process]) -> list[str]:
    """Without Ray's two small agents, which end by themselves within two minutes after a kill -9."""
    return [line for line in still_running(processes) if not line.strip().endswith("Agent")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to_all", "number", "code"),
    [(False, signal.SIGINT, 130), (True, signal.SIGINT, 130), (False, signal.SIGTERM, 143)],
    ids=["SIGINT to the command", "Ctrl-C in a terminal", "SIGTERM"],
)
def test_a_stopped_run_leaves_no_process_and_goes_on(
    tmp_path: Path, to_all: bool, number: signal.Signals, code: int
) -> None:
    process = start(tmp_path)
    with killed_at_the_end(process):
        read_until(process, "WORKER")
        children = ray_processes_of(process)
        assert len(children) > 5
        assert 52365 not in ports_of(children)  # a Ray that is started later needs it
        folders = {
            Path(a).parents[1]
            for p in children
            for a in (command_line(p) or "").split()
            if a.endswith("gcs_server.err")
        }
        (os.killpg if to_all else os.kill)(process.pid, number)
        text, _ = process.communicate(timeout=LONG_S)
        assert process.returncode == code, text
        assert "Stopped in stage 'second'" in text and "from its last checkpoint" in text
        assert "Traceback" not in text
        assert still_running(children) == []
        assert not any(folder.exists() for folder in folders)
    if number != signal.SIGTERM:
        return
    (tmp_path / "go").touch()
    stale, kept = left_behind(2**22 + 1), left_behind(os.getpid())
    process = start(tmp_path)
    with killed_at_the_end(process):
        text, _ = process.communicate(timeout=LONG_S)
        assert process.returncode == 0, text
        assert not stale.exists() and kept.exists()
        shutil.rmtree(kept)
        assert "[1/2] First: done before, skipped" in text
        assert "[2/2] Second: continues an interrupted attempt" in text


def left_behind(pid: int) -> Path:
    """A temporary folder of a private Ray of that process."""
    folder = Path(tempfile.mkdtemp(prefix="mahalo-"))
    started = psutil.Process(pid).create_time() if psutil.pid_exists(pid) else 1.0
    (folder / "owner.json").write_text(json.dumps({"pid": pid, "started": started}))
    return folder


def ports_of(processes: list[psutil.Process]) -> set[int]:
    """Those that the processes listen on."""
    ports: set[int] = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            ports |= {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return ports


def test_sigterm_is_obeyed_before_there_is_a_ray(tmp_path: Path) -> None:
    process = start(tmp_path, HOLD_FIRST="1")
    with killed_at_the_end(process):
        read_until(process, "FIRST")
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=LONG_S)
        assert process.returncode == 143 and "Stopped in stage 'first'" in text


def test_a_ray_that_does_not_answer_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that nobody listens at, one that says nothing, and a name that nobody has."""
    monkeypatch.setattr("mahalo_ray.pipeline.cluster.HEALTH_TIMEOUT_S", 3)
    with socket.socket() as silent, socket.socket() as closed:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        closed.bind(("127.0.0.1", 0))
        addresses = {f"127.0.0.1:{silent.getsockname()[1]}": "does not answer as a Ray cluster"}
        addresses |= {
            f"127.0.0.1:{closed.getsockname()[1]}": "unset RAY_ADDRESS",
            "nowhere.invalid:1": "nowhere",
        }
        for address, message in addresses.items():
            monkeypatch.setenv("RAY_ADDRESS", address)
            with pytest.raises(ConfigError, match=message), ray_session(ActorsConfig()):
                pass


@pytest.mark.slow
def test_a_killed_run_takes_its_workers_with_it(tmp_path: Path) -> None:
    process = start(tmp_path)
    with killed_at_the_end(process):
        read_until(process, "WORKER")
        children = ray_processes_of(process)
        process.kill()
        process.wait(LONG_S)
        deadline = time.monotonic() + LONG_S
        while working(children) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert working(children) == []


@pytest.mark.slow
def test_runs_beside_another_ray_and_beside_each_other(tmp_path: Path) -> None:
    one, two, same = start(tmp_path / "one"), start(tmp_path / "two"), None
    with killed_at_the_end(one), killed_at_the_end(two):
        read_until(one, "WORKER")
        read_until(two, "WORKER")
        same = start(tmp_path / "one")
        with killed_at_the_end(same):
            text, _ = same.communicate(timeout=LONG_S)
            assert same.returncode == 2 and f"(process {one.pid} on host" in text
        (tmp_path / "one" / "go").touch()
        text, _ = one.communicate(timeout=LONG_S)
        assert one.returncode == 0, text
        time.sleep(1)
        (tmp_path / "two" / "go").touch()
        text, _ = two.communicate(timeout=LONG_S)
        assert two.returncode == 0, text
        assert text.splitlines()[-1].startswith("[2/2] Second: done in")
