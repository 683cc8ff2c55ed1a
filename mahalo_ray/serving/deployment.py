"""Deploying a Ray Serve configuration file on a running cluster, and what comes of it.

Ray's own `serve deploy` ends when its request is sent, and `serve run FILE` waits for ever for an application
that cannot be built or whose models cannot be loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.exceptions import AuthenticationError
from ray.serve.schema import ServeDeploySchema

from mahalo_ray.config import ConfigError, read_document
from mahalo_ray.serving.launch import ServeError, last_errors

_POLL_S = 1.0


def deploy(file: Path, address: str, timeout_s: float, say: Callable[[str], None]) -> None:
    """Deploy the applications of a Ray Serve configuration file on the cluster whose dashboard is at
    `address`, and return when all of them answer with what was deployed now. `say` is told what goes on.

    Ray replaces an application's replicas one after the other, a new one first; an application whose import
    path, arguments and environment are those of the running one stays as it is. Raises ConfigError for a
    file that is no such configuration; ServeError when no cluster answers, an application cannot be built, a
    replica cannot load its models, or not all of them answer within `timeout_s`.
    """
    config = _read(file)
    client = _connect(address)
    names = [application.name for application in config.applications]
    try:
        client.deploy_applications(config.model_dump(exclude_unset=True))
    except RuntimeError as error:
        raise ServeError(f"the cluster refuses {file}: {_shorten(str(error))}") from error
    deadline, shown = time.monotonic() + timeout_s, ""
    while True:
        found = client.get_serve_details()["applications"]
        states = {name: found.get(name, {"status": "NOT_STARTED"}) for name in names}
        for name, state in states.items():
            if state["status"] == "DEPLOY_FAILED":
                raise ServeError(f"the application '{name}' cannot be deployed: {_reason(state)}")
        line = ", ".join(f"{name}: {state['status'].lower()}" for name, state in states.items())
        if line != shown:
            say(line)
            shown = line
        if all(state["status"] == "RUNNING" for state in states.values()):
            return
        if time.monotonic() > deadline:
            reasons = " ".join(filter(None, map(_reason, states.values())))
            raise ServeError(
                f"not everything answers after {timeout_s:g} s ({line}). {reasons} Ray goes on trying; what "
                "answered before still does. `serve status` shows more"
            )
        time.sleep(_POLL_S)


def _read(file: Path) -> ServeDeploySchema:
    draft = read_document(file, None)
    try:
        return ServeDeploySchema.model_validate(draft.values)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" if item["loc"] else item["msg"]
            for item in error.errors()
        )
        raise ConfigError(f"{file} is no configuration of Ray Serve: {wrong}") from error


def _connect(address: str) -> ServeSubmissionClient:
    advice = (
        "start Ray with `ray start --head`, or name the dashboard of the cluster with --address (on one "
        "machine without a cluster, `mahalo serve` needs none)"
    )
    try:
        return ServeSubmissionClient(address)
    except AuthenticationError as error:
        raise ServeError(
            f"the Ray cluster at '{address}' asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN "
            "where ~/.ray/auth_token does not hold it"
        ) from error
    except ValueError as error:
        raise ServeError(
            f"'{address}' is no dashboard's address, such as http://HEAD:8265: {advice}"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise ServeError(f"no Ray dashboard answers at '{address}': {advice}") from error


def _reason(state: Mapping[str, Any]) -> str:
    """Why an application does not answer, in the words of the error behind it."""
    deployments = state.get("deployments", {}).values()
    texts = [state.get("message", ""), *(deployment.get("message", "") for deployment in deployments)]
    return _shorten("\n".join(dict.fromkeys(last_errors(text) for text in texts if text)))


def _shorten(text: str) -> str:
    return text if len(text) <= 2000 else f"{text[:2000]} ..."
