"""Folders that mahalo did not make are never written or cleared, whatever the verb."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from mahalo_ray.cli import app
from mahalo_ray.pipeline.outputs import SIGN, check_output, sign_output

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def own_pairs(folder: Path, output: str) -> dict[str, Any]:
    (folder / "pairs").mkdir(parents=True)
    (folder / "pairs" / "mine.jsonl").write_text(json.dumps(PAIR))
    return {
        "name": "own",
        "output": output,
        "objectives": [{"name": "accuracy", "supervision": "pairwise"}],
        "data": {"pairs": [{"path": "pairs", "objective": "accuracy"}]},
        "model": {"base": "nowhere"},
    }


def dialogues(folder: Path, output: str) -> dict[str, Any]:
    return {
        "name": "d",
        "output": output,
        "tutor": {"kind": "model", "path": str(folder)},
        "student": {"kind": "miniature"},
    }


def labels(folder: Path, output: str) -> dict[str, Any]:
    (folder / "traces.jsonl").write_text(json.dumps({"question": "?", "steps": ["a"]}))
    return {
        "name": "l",
        "output": output,
        "domain": "math",
        "objectives": [{"name": "kind", "supervision": "judged_prefix"}],
        "judges": {"kind": {"kind": "program", "function": "math:floor"}},
        "input": {"traces": [{"path": str(folder / "traces.jsonl")}]},
    }


DOCUMENTS = {"policy": own_pairs, "dialogues": dialogues, "label": labels, "calibrate": labels}


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize("output", [".", "", "file", "file/below", "http://x/y", "n" * 300])
@pytest.mark.parametrize("verb", list(DOCUMENTS))
def test_a_users_folder_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, output: str
) -> None:
    """The folder they work in, and names that no folder can have."""
    monkeypatch.chdir(tmp_path)
    document = DOCUMENTS[verb](tmp_path, output)
    if verb == "calibrate":
        document |= {"calibration": {"objective": "kind", "ratings": str(tmp_path / "traces.jsonl")}}
    (tmp_path / "file").write_text("mine")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(document))
    before = contents(tmp_path)
    result = CliRunner().invoke(app, [verb, "config.yaml"])
    assert result.exit_code == 2 and "output" in result.output and "Traceback" not in result.output
    assert contents(tmp_path) == before


def test_generate_and_evaluate_and_export_keep_to_it_too(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "?"}))
    (tmp_path / "model").mkdir()
    before = contents(tmp_path)
    for arguments in (
        ["generate", f"{tmp_path}/prompts.jsonl", "-o", str(tmp_path), "--policy", f"{tmp_path}/model"],
        ["evaluate", "reward", f"{tmp_path}/model", f"{tmp_path}/prompts.jsonl", "--output", str(tmp_path)],
        ["export", f"{tmp_path}/model", str(tmp_path), "--weights", "accuracy=1"],
        ["export", f"{tmp_path}/model", "", "--weights", "accuracy=1"],
        ["export", f"{tmp_path}/model", "n" * 300, "--weights", "accuracy=1"],
    ):
        more = ["--strategy", "none"] if arguments[0] == "generate" else []
        result = CliRunner().invoke(app, [*arguments, *more])
        assert result.exit_code == 2 and any(word in result.output for word in ("new", "too long")), (
            result.output
        )
    assert contents(tmp_path) == before


def test_an_output_that_holds_an_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also through a link, and also in a folder that carries the sign."""
    monkeypatch.chdir(tmp_path)
    document = own_pairs(tmp_path / "out", "link")
    document["data"]["pairs"][0]["path"] = "out/pairs"
    (tmp_path / "link").symlink_to("out")
    sign_output("out")
    (tmp_path / "out" / "pairs" / "started.json").write_text('{"fingerprint": "x"}')
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document))
    before = contents(tmp_path)
    result = CliRunner().invoke(app, ["policy", "run.yaml"])
    text = result.output.replace("\n", " ")
    assert result.exit_code == 2 and "'data.pairs.0.path': 'out/pairs' lies in the output folder" in text
    assert contents(tmp_path) == before


def test_what_counts_as_mahalos_own(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    check_output(output)
    sign_output(output)
    check_output(output, ["pairs"])
    assert json.loads((tmp_path / "out" / SIGN).read_text())["made_by"] == "mahalo"
    (tmp_path / "out" / "pairs").mkdir()
    (tmp_path / "out" / "pairs" / "mine.jsonl").touch()  # put there by someone else: would be cleared
    with pytest.raises(ValueError, match=r"out/pairs' holds files that mahalo did not make \(mine.jsonl\)"):
        check_output(output, ["pairs"])
    (tmp_path / "out" / "pairs" / "manifest.json").write_text('{"fingerprint": "x"}')
    check_output(output, ["pairs"])
    (tmp_path / "out" / SIGN).unlink()  # of a run before there was a sign
    check_output(output, ["pairs"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_and_one_that_cannot_be_written(small_disk: Path, tmp_path: Path) -> None:
    document = labels(tmp_path, str(small_disk / "out"))
    (tmp_path / "traces.jsonl").write_text(
        "\n".join(json.dumps({"question": f"{n}?", "steps": ["a" * 999]}) for n in range(99))
    )
    (tmp_path / "label.yaml").write_text(yaml.safe_dump(document))
    result = CliRunner().invoke(app, ["label", str(tmp_path / "label.yaml")])
    assert result.exit_code == 2, result.output
    assert "No space left on device" in result.output and "Make room" in result.output
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    result = CliRunner().invoke(
        app, ["label", str(tmp_path / "label.yaml"), "--set", f"output={small_disk}/x"]
    )
    assert result.exit_code == 2 and "cannot be written" in result.output


@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_a_home_that_is_not_there_stops_nothing(home: str | None) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME")
    }
    command = (
        "import os; from mahalo_ray.cli.common import provide_home; provide_home(); print(os.environ['HOME'])"
    )
    if home is None:  # the user has none on record either
        command = "import os; os.path.expanduser = lambda path: path; " + command
    else:
        environment["HOME"] = home
    done = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True
    )
    made = done.stdout.strip()
    assert "mahalo-home-" in made and "cannot be written" in done.stderr and not Path(made).exists()
