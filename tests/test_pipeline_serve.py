"""A finished run as the application of a Ray Serve config file. Nothing is started here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from click.testing import CliRunner as ClickRunner
from ray import serve
from ray.serve.scripts import cli as ray_serve
from typer.testing import CliRunner

from mahalo_ray.cli import app
from mahalo_ray.config import dump_config, load_config
from mahalo_ray.data import storage
from mahalo_ray.pipeline.artifacts import run_model
from mahalo_ray.pipeline.serve import application
from mahalo_ray.pipeline.stages import Manifest

EXAMPLE = Path(__file__).parent.parent / "examples" / "quickstart.yaml"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[str]:
    """A run in an object store: its resolved config, policy and reward model said to be finished."""
    url = f"memory://{tmp_path.name}"
    config = load_config(EXAMPLE, ["serve.replicas=3", "serve.cpus_per_replica=0.5"])
    storage.write_bytes(storage.join(url, "config.yaml"), dump_config(config).encode())
    for stage in ("policy", "reward"):
        Manifest(stage, "fingerprint", {"model": "model"}, {}, 1.0).write(storage.join(url, stage))
    yield url
    storage.remove(url)


def test_a_finished_run_becomes_an_application(run: str) -> None:
    built = application({"run": run})
    assert isinstance(built, serve.Application)
    deployment = built._bound_deployment
    assert deployment.num_replicas == 3
    assert deployment.ray_actor_options["num_cpus"] == 0.5


def test_the_policy_of_the_last_round_is_served(run: str) -> None:
    config = load_config(EXAMPLE, ["rounds=2"])
    storage.write_bytes(storage.join(run, "config.yaml"), dump_config(config).encode())
    with pytest.raises(ValueError, match=r"stage 'round_2/policy' of the run at .*: run `mahalo policy`"):
        application({"run": run})
    folder = storage.join(run, "round_2/policy")
    Manifest("round_2/policy", "fingerprint", {"model": "model"}, {}, 1.0).write(folder)
    assert run_model(run, "policy") == storage.join(folder, "model")
    assert isinstance(application({"run": run}), serve.Application)


def test_a_missing_key_is_one_message_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAHALO_TEST_KEY", raising=False)
    answer = CliRunner().invoke(app, ["serve", str(EXAMPLE), "--set", "serve.api_key_env=MAHALO_TEST_KEY"])
    assert answer.exit_code == 2
    assert "'MAHALO_TEST_KEY', which is unset or empty" in answer.output
    assert not ray.is_initialized() and "Traceback" not in answer.output


def test_the_serve_command_ends_with_one_message(run: str) -> None:
    command = ["run", "mahalo_ray.pipeline.serve:application", f"run={run}", "api_key_env=MAHALO_TEST_KEY"]
    answer = ClickRunner().invoke(ray_serve, command)
    assert answer.exit_code == 2
    assert "'MAHALO_TEST_KEY', which is unset or empty" in answer.output
    assert not ray.is_initialized() and "Traceback" not in answer.output


def test_what_is_missing_is_named(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no run at 'memory://nowhere'"):
        application({"run": "memory://nowhere"})
    monkeypatch.delenv("MAHALO_TEST_KEY", raising=False)
    with pytest.raises(ValueError, match="'MAHALO_TEST_KEY', which is unset"):
        application({"run": run, "api_key_env": "MAHALO_TEST_KEY"})
    with pytest.raises(ValueError, match="apikey"):
        application({"run": run, "apikey": "secret"})
    storage.remove(storage.join(run, "policy"))
    with pytest.raises(ValueError, match="stage 'policy' of the run at"):
        application({"run": run})
