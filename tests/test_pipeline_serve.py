"""A finished run as the application of a Ray Serve config file. Nothing is started here."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import ray
import yaml
from click.testing import CliRunner as ClickRunner
from click.testing import Result
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
        finish(url, stage)
    yield url
    storage.remove(url)


def finish(run: str, stage: str) -> None:
    Manifest(stage, "fingerprint", {"model": "model"}, {}, 1.0).write(storage.join(run, stage))
    storage.write_bytes(storage.join(run, stage, "model/mahalo.json"), b"{}")


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
    finish(run, "round_2/policy")
    assert run_model(run, "policy") == storage.join(run, "round_2/policy/model")
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
    storage.remove(storage.join(run, "policy/model"))
    with pytest.raises(ValueError, match=r"there is no model at '.*policy/model'"):
        application({"run": run})
    storage.remove(storage.join(run, "policy"))
    with pytest.raises(ValueError, match="stage 'policy' of the run at"):
        application({"run": run})


def test_a_damaged_model_is_refused_before_it_is_deployed(run: str, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    storage.upload_folder(Path(storage.local_copy(run)), str(copy))
    (copy / "reward/model/mahalo.json").write_text('{"kind": "reward", "format_version": 1}')
    with pytest.raises(ValueError, match=r"policy/model/mahalo\.json is damaged"):
        application({"run": str(copy)})
    (copy / "policy/model/mahalo.json").write_text('{"kind": "policy", "format_version": 1}')
    assert isinstance(application({"run": str(copy)}), serve.Application)
    (copy / "policy/model/backbone").mkdir()
    (copy / "policy/model/backbone/model.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1"
    )
    with pytest.raises(ValueError, match=r"backbone/model\.safetensors is a git-LFS pointer"):
        application({"run": str(copy)})


FAILED = """Deploying app 'mahalo' failed with exception:
Traceback (most recent call last):
  File "serve.py", line 1, in _application
ValueError: serve.api_key_env names the environment variable 'KEY', which is unset or empty: put an API key in

The above exception was the direct cause of the following exception:

ray::build_serve_application() (pid=7, ip=10.0.0.1)
  File "serve.py", line 2, in application
mahalo_ray.pipeline.serve.ApplicationError: serve.api_key_env names the environment variable 'KEY', which is
unset or empty: put an API key into it
"""


class Dashboard(BaseHTTPRequestHandler):
    """A Ray dashboard as `mahalo deploy` sees it: its answers were recorded from Ray 2.60."""

    states: ClassVar[list[dict[str, Any]]] = []
    deployed: ClassVar[list[Any]] = []

    def _answer(self, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        if self.path == "/api/ray/version":
            return self._answer({"version": "4", "ray_version": "2.60.0", "ray_commit": "0"})
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return self._answer({"applications": {"mahalo": {"name": "mahalo", **state}}})

    def do_PUT(self) -> None:
        self.deployed.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._answer({})

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def dashboard() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def deploy(file: Path, address: str, *options: str) -> Result:
    return CliRunner().invoke(app, ["deploy", str(file), "--address", address, *options])


def test_a_deployment_ends_with_what_came_of_it(dashboard: str, tmp_path: Path) -> None:
    document = {
        "applications": [
            {
                "name": "mahalo",
                "import_path": "mahalo_ray.pipeline.serve:application",
                "args": {"run": "/runs/quickstart", "api_key_env": "KEY"},
            }
        ]
    }
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(document))
    starting = {"status": "DEPLOYING", "message": "", "deployments": {}}
    Dashboard.states[:] = [starting, {**starting, "status": "RUNNING"}]
    answer = deploy(file, dashboard)
    assert answer.exit_code == 0 and answer.output == "mahalo: deploying\nmahalo: running\n"
    assert Dashboard.deployed.pop() == document

    Dashboard.states[:] = [{**starting, "status": "DEPLOY_FAILED", "message": FAILED}]
    answer = deploy(file, dashboard)
    assert answer.exit_code == 2 and "Traceback" not in answer.output
    assert "error: the application 'mahalo' cannot be deployed: serve.api_key_env names" in answer.output
    assert answer.output.count("unset or empty") == 1

    waits = {"status": "UPDATING", "message": "Deployment 'mahalo' has 1 replicas that cannot be placed."}
    Dashboard.states[:] = [{**starting, "deployments": {"mahalo": waits}}]
    answer = deploy(file, dashboard, "--timeout", "1")
    assert answer.exit_code == 2 and "cannot be placed" in answer.output

    answer = deploy(file, "http://127.0.0.1:1")
    assert answer.exit_code == 2 and "no Ray dashboard answers at 'http://127.0.0.1:1'" in answer.output
    file.write_text("applications: {}")
    answer = deploy(file, dashboard)
    assert answer.exit_code == 2 and "is no configuration of Ray Serve: applications:" in answer.output
