"""Serving a finished run: once as a stage, in the foreground, and from a Ray Serve config file."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import yaml
from pydantic import BaseModel, ConfigDict
from ray import serve
from rich.console import Console

from mahalo_ray.config import RunConfig, ServeConfig
from mahalo_ray.data import storage
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.domains.tutoring.student import Episode
from mahalo_ray.pipeline.artifacts import run_model
from mahalo_ray.pipeline.seed_blocks import first_seed
from mahalo_ray.pipeline.stages import Context, Manifest, StageResult
from mahalo_ray.serving import launch
from mahalo_ray.serving.launch import Serving, serve_forever, smoke, start
from mahalo_ray.serving.service import Defaults, KeyDigest, ServiceSettings

DOMAIN = "tutoring"

logger = logging.getLogger(__name__)


def try_serving(context: Context[RunConfig]) -> StageResult:
    """Start the endpoint on a free port, ask it through the OpenAI client, stop it."""
    config = context.config
    context.progress.start(2, "steps", "starting")
    any_port = config.serve.model_copy(update={"port": 0})
    weightings = [config.guided.point[0], *config.sweep.weights]
    question = Episode.from_seed(first_seed(config.seed, "evaluation")).opening
    key = os.environ[config.serve.api_key_env] if config.serve.api_key_env else None
    with _start(
        config, any_port, context.input("policy", "model"), context.input("reward", "model")
    ) as serving:
        context.progress.advance(note="asking")
        answers = smoke(
            serving.url,
            serving.model,
            [{"role": "user", "content": question}],
            weightings,
            api_key=key,
            timeout_s=config.serve.request_timeout_s,
        )
    storage.write_json(context.path("answers.json"), answers)
    latencies = [answer["latency_s"] for answer in answers["answers"]]
    return StageResult(
        {"answers": len(latencies), "mean_latency_s": sum(latencies) / len(latencies)},
        {"answers": "answers.json"},
    )


def serve_in_foreground(config: RunConfig, manifests: dict[str, Manifest], console: Console) -> None:
    """Serve until Ctrl-C; Ray has to be connected."""
    output = storage.absolute(config.output)
    urls = [storage.join(output, name, manifests[name].outputs["model"]) for name in ("policy", "reward")]
    serving = _start(config, config.serve, *urls)
    weights = ", ".join(f'"{name}": {value:.3g}' for name, value in config.guided.point[0].items())
    console.print(
        f"Serving on {serving.url} (model '{serving.model}'); Ctrl-C stops it.", markup=False, soft_wrap=True
    )
    console.print(f"  playground  {serving.url}/", markup=False, soft_wrap=True)
    console.print(
        f"  curl {serving.url}/v1/chat/completions -H 'Content-Type: application/json' -d "
        f'\'{{"model": "{serving.model}", "objectives": {{{weights}}}, '
        '"messages": [{"role": "user", "content": "..."}]}\'',
        markup=False,
        soft_wrap=True,
    )
    serve_forever(serving)


class Deployed(BaseModel):
    """`args` of `application` in a Ray Serve config file. `run`: the output folder or URL of a finished run;
    `api_key_env`: the variable with the API key, in place of the run's own `serve.api_key_env`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    api_key_env: str | None = None


def application(args: Mapping[str, str]) -> serve.Application:
    """The endpoint of a finished run for `serve deploy` and KubeRay's RayService:
    `import_path: mahalo_ray.pipeline.serve:application`, with the fields of `Deployed` as `args`.

    Host and port are those of Ray Serve's own HTTP options, not of the run's `serve` section. Raises
    ValueError when the run has no finished policy or the API key's variable is empty.
    """
    deployed = Deployed.model_validate(dict(args))
    policy, reward = (run_model(deployed.run, stage) for stage in ("policy", "reward"))
    resolved = storage.read_bytes(storage.join(deployed.run, "config.yaml"))
    config = RunConfig.model_validate(yaml.safe_load(resolved))
    own = config.serve.model_copy(update={"api_key_env": deployed.api_key_env or config.serve.api_key_env})
    key = KeyDigest.from_environment(own)
    if key is None:
        logger.warning("serving '%s' without an API key: whoever reaches its port can use it", deployed.run)
    return launch.application(
        ServiceSettings(own, launch.DEFAULT_MODEL_NAME, _defaults(config), key),
        launch.ModelSource(
            policy,
            reward,
            DOMAIN,
            DeviceConfig(config.cluster.device, config.model.dtype),
        ),
        config.cluster.use_gpu,
    )


def _start(config: RunConfig, settings: ServeConfig, policy_url: str, reward_url: str) -> Serving:
    return start(
        settings,
        policy_url,
        reward_url,
        domain=DOMAIN,
        defaults=_defaults(config),
        use_gpu=config.cluster.use_gpu,
        dtype=config.model.dtype,
    )


def _defaults(config: RunConfig) -> Defaults:
    """What the run was evaluated with is what a request gets that does not say otherwise."""
    weights, guidance = config.guided.point
    return Defaults(
        objectives=weights,
        guidance=guidance,
        num_candidates=min(config.guided.num_candidates, config.serve.max_candidates),
        sampling=config.evaluation.sampling,
    )
