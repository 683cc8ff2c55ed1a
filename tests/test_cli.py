"""The command: exit codes, messages, and that a stopped run leaves nothing behind and goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from mahalo_ray import __version__
from mahalo_ray.cli import app
from mahalo_ray.cli.commands import VERBS
from mahalo_ray.cli.common import guarded

EXAMPLE = Path(__file__).parent.parent / "examples" / "quickstart.yaml"
PROGRAM = Path(__file__).parent / "programs" / "stoppable_run.py"


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
        process.wait(30)


def ray_processes_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    names = " ".join(" ".join(child.cmdline()) for child in found)
    assert "raylet" in names and "gcs_server" in names
    return found


def still_running(processes: list[psutil.Process]) -> list[str]:
    return [" ".join(p.cmdline()) for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


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
        folders = {Path(a).parents[1] for p in children for a in p.cmdline() if a.endswith("gcs_server.err")}
        (os.killpg if to_all else os.kill)(process.pid, number)
        text, _ = process.communicate(timeout=60)
        assert process.returncode == code, text
        assert "Stopped in stage 'second'" in text and "from its last checkpoint" in text
        assert "Traceback" not in text
        assert still_running(children) == []
        assert not any(folder.exists() for folder in folders)
    if number != signal.SIGTERM:
        return
    (tmp_path / "go").touch()
    process = start(tmp_path)
    with killed_at_the_end(process):
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 0, text
        assert "[1/2] First: done before, skipped" in text
        assert "[2/2] Second: continues an interrupted attempt" in text


@pytest.mark.slow
def test_a_killed_run_takes_its_workers_with_it(tmp_path: Path) -> None:
    process = start(tmp_path)
    with killed_at_the_end(process):
        read_until(process, "WORKER")
        children = ray_processes_of(process)
        process.kill()
        process.wait(10)
        deadline = time.monotonic() + 30
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
            text, _ = same.communicate(timeout=60)
            assert same.returncode == 2 and f"(process {one.pid} on host" in text
        (tmp_path / "one" / "go").touch()
        text, _ = one.communicate(timeout=60)
        assert one.returncode == 0, text
        time.sleep(1)
        (tmp_path / "two" / "go").touch()
        text, _ = two.communicate(timeout=60)
        assert two.returncode == 0, text
        assert text.splitlines()[-1].startswith("[2/2] Second: done in")
