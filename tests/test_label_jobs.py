"""Jobs of labelling: what a document may say, and that killed actors and jobs change nothing."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import yaml
from local_endpoint import LocalEndpoint, Received, Scripted, says
from processes import started_here
from pydantic import ValidationError
from rich.console import Console
from tiny_reward_models import TOKENIZER, base

from mahalo_ray.config import ConfigError, LabelConfig, load_document
from mahalo_ray.data.records import StepTrace
from mahalo_ray.pipeline.labelling import make_labels
from mahalo_ray.pipeline.progress import RunProgress, StageProgress
from mahalo_ray.rollouts.pool import RolloutError

PROGRAMS = str(Path(__file__).parent / "programs")
sys.path.insert(0, PROGRAMS)


def document(output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "job",
        "output": str(output),
        "domain": "math",
        "objectives": [{"name": "accuracy", "supervision": "rollout_value"}],
        "judges": {"accuracy": {"kind": "program", "function": "label_judges:coin"}},
        "input": {"traces": [{"path": "traces.jsonl"}]},
        "continuations": {"policy": "somewhere", "samples": 4, "sampling": {"max_new_tokens": 12}},
        "traces_per_chunk": 2,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judges": {}}, "no judge for objective 'accuracy'"),
        ({"continuations": None}, "'continuations' is missing"),
        ({"domain": "tutoring"}, "a student answers every turn"),
        ({"domain": "human_values", "judges": {"accuracy": {"kind": "checker"}}}, "has no checker"),
        ({"objectives": [{"name": "accuracy", "supervision": "pairwise"}]}, "there are no labels to make"),
        (
            {"objectives": [{"name": "accuracy", "supervision": "judged_prefix"}]},
            "'continuations' is not used",
        ),
        (
            {
                "judges": {
                    "accuracy": {
                        "kind": "program",
                        "function": "a:b",
                        "threshold": 0.3,
                        "calibration": "c.json",
                    }
                }
            },
            "leave 'threshold' out",
        ),
        ({"judges": {"accuracy": {"kind": "program", "function": "os.system"}}}, "pattern"),
        (
            {"cluster": {"cpus_per_train_worker": 1}},
            "'cpus_per_train_worker' is not used: nothing is trained",
        ),
        (
            {
                "objectives": [{"name": "accuracy", "supervision": "judged_rollouts"}],
                "continuations": {"policy": "somewhere", "gamma": 0.5},
            },
            "'continuations.gamma' belongs to 'rollout_value'",
        ),
    ],
)
def test_what_does_not_fit_together_is_said(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        LabelConfig.model_validate(document(tmp_path, **changes))


def test_the_example_is_a_labelling_job() -> None:
    found = load_document(Path(__file__).parents[1] / "examples" / "label_math.yaml", LabelConfig)
    assert found.uses_rollouts and found.objective_names == ("accuracy",)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray, and the file that holds its judges (see `label_judges.coin`)."""
    hold = tmp_path_factory.mktemp("judges") / "hold"
    with pytest.MonkeyPatch.context() as patch:
        # The cluster's own workers inherit it, whichever job they work for: the judge is the tests' own.
        patch.setenv("PYTHONPATH", os.pathsep.join([PROGRAMS, os.getcwd()]))
        patch.setenv("LABEL_JUDGE_HOLD", str(hold))
        ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
        yield hold
        ray.shutdown()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Eight traces in four chunks, and a policy to continue them."""
    folder = tmp_path_factory.mktemp("job")
    base().save_pretrained(folder / "policy")
    TOKENIZER.save_pretrained(folder / "policy")
    rows = [{"id": f"t{n}", "question": f"{n}+3?", "steps": ["Two.", "Three.", f"So {n}"]} for n in range(8)]
    (folder / "traces.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"question": "?", "steps": []}])))
    return document(
        folder,
        input={"traces": [{"path": str(folder / "traces.jsonl")}], "max_bad_fraction": 0.2},
        continuations={"policy": str(folder / "policy"), "samples": 4, "sampling": {"max_new_tokens": 12}},
    )


def run(job: dict[str, Any], output: Path, actors: int, **changes: Any) -> dict[str, Any]:
    config = {**job, "output": str(output), "cluster": {"rollout_actors": actors}, **changes}
    loaded = LabelConfig.model_validate(config)
    quiet = RunProgress(Console(file=open(os.devnull, "w")))  # noqa: SIM115
    return make_labels(loaded, contextlib.nullcontext, quiet).metrics


def labels(output: Path) -> list[dict[str, Any]]:
    return [one.model_dump() for one in StepTrace.load(str(output / "labelled"))]


@pytest.mark.slow
def test_killed_actors_and_killed_jobs_change_nothing(
    cluster: Path, job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = run(job, tmp_path / "quiet", 1)
    wanted = labels(tmp_path / "quiet")
    assert quiet["traces"] == 8 and sorted(one["id"] for one in wanted) == [f"t{n}" for n in range(8)]
    assert quiet["labels"] == {"accuracy": 24} and quiet["sampling"]["samples"] == 64
    assert pq.read_table(tmp_path / "quiet" / "quarantine.parquet")["line"].to_pylist() == [9]
    assert [quiet["data"][name] for name in ("rows", "read", "quarantined", "left_out")] == [9, 8, 1, 0]
    assert quiet["judges"]["accuracy"]["calibrated"] is False
    assert "UNCALIBRATED" in wanted[0]["source"]

    # The job is killed outright once a chunk is there (judges are held at the next one); the same command in
    # another process goes on.
    killed = tmp_path / "killed"
    cluster.write_text(str(killed / "labelled"))
    config = tmp_path / "label.yaml"
    address = ray.get_runtime_context().gcs_address
    cluster_section = {"address": address, "rollout_actors": 1}
    config.write_text(yaml.safe_dump({**job, "output": str(killed), "cluster": cluster_section}))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([PROGRAMS, os.getcwd()])}
    command = [sys.executable, "jobs/run.py", "label", str(config)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for(killed / "labelled")
        finally:
            process.kill()
    first = {file.name: file.stat().st_mtime_ns for file in (killed / "labelled").glob("*.parquet")}
    assert len(first) == 1 and not (killed / "manifest.json").exists()
    while started_here("LabelWorker"):  # of the job that was killed
        time.sleep(0.05)
    assert set((killed / "labelled").glob("*.parquet")) == {killed / "labelled" / name for name in first}
    cluster.unlink()

    # It goes on, and loses an actor.
    victims: list[int] = []
    update = StageProgress.update

    def update_and_kill(self: StageProgress, done: float, total: float | None = None, note: str = "") -> None:
        update(self, done, total, note)
        found = started_here("LabelWorker")
        if found and not victims:
            victims.append(found[0].pid)
            found[0].kill()

    monkeypatch.setattr(StageProgress, "update", update_and_kill)
    metrics = run(job, killed, 2)
    assert victims and labels(killed) == wanted
    assert {key: metrics[key] for key in ("traces", "rows", "labels")} == {
        key: quiet[key] for key in ("traces", "rows", "labels")
    }
    for name, written in first.items():
        assert (killed / "labelled" / name).stat().st_mtime_ns == written  # not made again


def wait_for(folder: Path) -> None:
    for _ in range(20_000):  # as many twentieths of a second, longer than a slow machine takes
        if folder.is_dir() and any(folder.glob("*.parquet")):
            return
        time.sleep(0.05)
    raise AssertionError(f"nothing came to {folder}")


@pytest.mark.slow
def test_an_endpoint_that_fails_ends_the_job_and_what_is_there_is_kept(
    cluster: Path, job: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "rubric.txt").write_text("{{ response }}")
    answers = {"broken": True}

    def script(received: Received) -> Scripted:
        return says("?") if answers["broken"] and "Three" in received.content else says("Score: 1")

    with LocalEndpoint(script) as server:
        judge = {
            "kind": "endpoint",
            "endpoint": server.config(max_retries=0, input_price=1.0, output_price=1.0).model_dump(),
            "rubric": str(tmp_path / "rubric.txt"),
            "parse_retries": 0,
        }
        changes = {
            "objectives": [{"name": "kind", "supervision": "judged_prefix"}],
            "judges": {"kind": judge},
            "continuations": None,
        }
        with pytest.raises(RolloutError, match=r"16 of 24 labels have no verdict(.|\n)*no score to read"):
            run(job, tmp_path / "out", 1, **changes)
        answers["broken"] = False
        metrics = run(job, tmp_path / "out", 1, **changes)
    assert metrics["labels"] == {"kind": 24} and metrics["unjudged"] == {}
    asked = metrics["endpoints"]["kind"]
    assert (asked["requests"], asked["prompt_tokens"]) == (24, 240)
    assert asked["cost"] == pytest.approx(24 * 15e-6)
    with pytest.raises(ValueError, match="holds labels of other settings"):
        run(job, tmp_path / "out", 1)
    with pytest.raises(ConfigError, match="there is no file 'nowhere'"):
        run(job, tmp_path / "x", 1, **{**changes, "judges": {"kind": {**judge, "rubric": "nowhere"}}})
