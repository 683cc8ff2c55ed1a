"""Serving a finished run: as a stage that tries it once, and in the foreground."""

from __future__ import annotations

import os

from rich.console import Console

from mahalo_ray.config import RunConfig, ServeConfig
from mahalo_ray.data import storage
from mahalo_ray.domains.tutoring.episode import Episode
from mahalo_ray.objectives import Weights
from mahalo_ray.pipeline.fingerprint import Manifest
from mahalo_ray.pipeline.stages import Context, StageResult
from mahalo_ray.pipeline.students import first_seed
from mahalo_ray.serving.launch import Serving, serve_forever, start
from mahalo_ray.serving.service import Defaults
from mahalo_ray.serving.smoke import smoke


def try_serving(context: Context) -> StageResult:
    """Start the endpoint on a free port, ask it through the OpenAI client, stop it."""
    config = context.config
    context.progress.start(2, "steps", "starting")
    any_port = config.serve.model_copy(update={"port": 0})
    weightings = [Weights(config.guided.weights), *config.sweep.vectors()]
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
    weights = ", ".join(f'"{name}": {value:.3g}' for name, value in Weights(config.guided.weights).items())
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


def _start(config: RunConfig, serve: ServeConfig, policy_url: str, reward_url: str) -> Serving:
    defaults = Defaults(
        objectives=Weights(config.guided.weights),
        guidance=Weights(config.guided.guidance),
        num_candidates=min(config.guided.num_candidates, serve.max_candidates),
        sampling=config.evaluation.sampling,
    )
    return start(
        serve,
        policy_url,
        reward_url,
        defaults=defaults,
        use_gpu=config.cluster.use_gpu,
        dtype=config.model.dtype,
    )
