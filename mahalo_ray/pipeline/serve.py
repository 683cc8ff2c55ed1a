"""Serving a finished run: once as a stage, in the foreground, and from a Ray Serve config file."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import click
import yaml
from openai import OpenAI, OpenAIError
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam
from pydantic import BaseModel, ConfigDict
from ray import serve
from rich.console import Console

from mahalo_ray.config import SERVED_MODEL_ID, RewardServer, RunConfig, ServeConfig, ServerSource
from mahalo_ray.data import storage
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.domains.protocol import WHOLE_TURNS, load_domain
from mahalo_ray.errors import StageError
from mahalo_ray.models.folder import check_saved_model
from mahalo_ray.objectives import Weights
from mahalo_ray.pipeline.artifacts import find_model, run_model
from mahalo_ray.pipeline.rounds import last_output, last_stage
from mahalo_ray.pipeline.seed_blocks import first_seed
from mahalo_ray.pipeline.stages import Context, Manifest, StageResult
from mahalo_ray.serving import launch
from mahalo_ray.serving.api_key import KeyDigests
from mahalo_ray.serving.front import RunFiles
from mahalo_ray.serving.launch import Serving, error_log_folder, serve_forever, start
from mahalo_ray.serving.service import Defaults, ServiceSettings
from mahalo_ray.serving.simulated import SimulatedStudents
from mahalo_ray.sweeps.portfolio import FILE_IN_RUN, Portfolio, is_made_of

SMOKE_SEED = 7
EXAMPLES = 4

Server = TypeVar("Server", ServerSource, RewardServer)

logger = logging.getLogger(__name__)


def try_serving(context: Context[RunConfig]) -> StageResult:
    """Start the endpoint on a free port, ask it through the OpenAI client, stop it."""
    config = context.config
    context.progress.start(2, "steps", "starting")
    own: dict[str, object] = {"models": [], "server": None, "reward_server": None, "reward_deployment": None}
    any_port = config.serve.model_copy(update={"port": 0, **own})
    weightings = [config.guided.point[0], *config.sweep.decoding_weights]
    question = _opening(config, first_seed(config.seed, "evaluation"))
    # A trial needs no key of the user's: it has one of its own where the endpoint will have one.
    asks_for_key = config.serve.api_key_env is not None or config.serve.api_key_file is not None
    key = secrets.token_urlsafe() if asks_for_key else None
    digest = None if key is None else KeyDigests.of(key)
    with _start(
        config, any_port, last_output(context, "policy", "model"), context.input("reward", "model"), digest
    ) as serving:
        context.progress.advance(note="asking")
        answers = smoke(
            serving.url,
            serving.model,
            question,
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


def serve_in_foreground(
    config: RunConfig, manifests: dict[str, Manifest], key: KeyDigests | None, console: Console
) -> None:
    """Serve until Ctrl-C; Ray has to be connected. `key`: the digest of the API key, None: no key."""
    output = storage.absolute(config.output)
    stages = (last_stage(config, "policy"), "reward")
    urls = [storage.join(output, name, manifests[name].outputs["model"]) for name in stages]
    settings = with_model_folders(with_log_folder(config.serve, output))
    serving = _start(config, settings, urls[0], urls[1], key, run_files(config, output))
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
    console.print(f"  errors      {error_log_folder(settings)}", markup=False, soft_wrap=True)
    serve_forever(serving)


def with_model_folders(config: ServeConfig) -> ServeConfig:
    """The settings with the folders of further models in place of the runs that made them; ValueError for
    one that is not there."""

    def found(url: str | None, stage: str) -> str | None:
        return None if url is None else find_model(url, stage)

    def reachable(server: Server | None) -> Server | None:
        if server is None:
            return None
        return server.model_copy(update={"tokenizer": storage.absolute(server.tokenizer)})

    models = [
        model.model_copy(
            update={
                "policy": found(model.policy, "policy"),
                "server": reachable(model.server),
                "reward": found(model.reward, "reward"),
                "reward_server": reachable(model.reward_server),
            }
        )
        for model in config.models
    ]
    servers = {"server": reachable(config.server), "reward_server": reachable(config.reward_server)}
    return config.model_copy(update={"models": models, **servers})


def with_log_folder(config: ServeConfig, output: str) -> ServeConfig:
    """The settings with a folder for the log of errors: the run's own, where it is on a disk."""
    if config.log_folder is not None or not storage.is_local(output):
        return config
    return config.model_copy(update={"log_folder": storage.join(output, "serve_logs")})


class Deployed(BaseModel):
    """`args` of `application` in a Ray Serve config file. `run`: the output folder or URL of a finished run;
    `api_key_env`, `api_key_file`: the variable or file with the API keys, in place of the run's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    api_key_env: str | None = None
    api_key_file: str | None = None


def application(args: Mapping[str, str]) -> serve.Application:
    """The endpoint of a finished run for `serve deploy` and KubeRay's RayService:
    `import_path: mahalo_ray.pipeline.serve:application`, with the fields of `Deployed` as `args`.

    Host and port are those of Ray Serve's own HTTP options, not of the run's `serve` section. Raises
    ApplicationError when the run has no finished policy, a model of it is missing or damaged, or the API
    key's variable is empty.
    """
    try:
        return _application(args)
    except ValueError as error:
        raise ApplicationError(str(error)) from error


class ApplicationError(click.UsageError, ValueError):
    """The application cannot be built. Ray's command `serve`, which is written with click, prints the message
    and exits with code 2."""


def _application(args: Mapping[str, str]) -> serve.Application:
    deployed = Deployed.model_validate(dict(args))
    policy, reward = (run_model(deployed.run, stage) for stage in ("policy", "reward"))
    for url in (policy, reward):
        check_saved_model(url)
    resolved = storage.read_bytes(storage.join(deployed.run, "config.yaml"))
    config = RunConfig.model_validate(yaml.safe_load(resolved))
    given = deployed.model_dump(include={"api_key_env", "api_key_file"}, exclude_none=True)
    named = config.serve.model_copy(update=given)
    settings = with_model_folders(with_log_folder(named, storage.absolute(deployed.run)))
    key = KeyDigests.configured(settings)
    if key is None:
        logger.warning("serving '%s' without an API key: whoever reaches its port can use it", deployed.run)
    return launch.application(
        ServiceSettings(
            settings,
            SERVED_MODEL_ID,
            _defaults(config),
            key,
            _descriptions(config),
            example_questions(config),
            simulated_students(config),
        ),
        launch.ModelSource(
            policy if settings.server is None else settings.server,
            reward if settings.reward_server is None else None,
            boundary_name(config),
            DeviceConfig.of(config.cluster, config.model.dtype),
            run_files(config, storage.absolute(deployed.run)),
            settings.reward_server,
        ),
    )


def _start(
    config: RunConfig,
    settings: ServeConfig,
    policy_url: str,
    reward_url: str,
    key: KeyDigests | None,
    run: RunFiles | None = None,
) -> Serving:
    return start(
        settings,
        policy_url,
        reward_url,
        domain=boundary_name(config),
        defaults=_defaults(config),
        placement=DeviceConfig.of(config.cluster, config.model.dtype),
        key=key,
        descriptions=_descriptions(config),
        run=run,
        examples=example_questions(config),
        students=simulated_students(config),
    )


def _is_served(portfolio: str, output: str) -> bool:
    """Whether it was made from the sweep that the run has now, and all members are the run's own policy: the
    endpoint holds no other."""
    found = Portfolio.load(portfolio)
    trained = any("model" in found.policies[member] for member in found.members if found.policies)
    return is_made_of(output, found.sweep) and not trained


def run_files(config: RunConfig, output: str) -> RunFiles:
    """What the finished stages of the run in `output` have measured."""
    finished = {}
    for stage in ("sweep", "evaluate"):
        if (manifest := Manifest.read(storage.join(output, stage))) is not None:
            outputs = manifest.outputs.items()
            finished[stage] = {name: storage.join(output, stage, file) for name, file in outputs}
    portfolio = storage.join(output, FILE_IN_RUN)
    return RunFiles(
        # A sweep's own file has the points of all rounds, not only the report's rows.
        methods=tuple(files.get("points", files["methods"]) for files in finished.values()),
        portfolio=portfolio if storage.exists(portfolio) and _is_served(portfolio, output) else None,
        objectives=config.objective_names,
        confidence=config.evaluation.confidence,
        resamples=config.evaluation.bootstrap_resamples,
        seed=config.seed,
    )


def _descriptions(config: RunConfig) -> dict[str, str]:
    return {objective.name: objective.description for objective in config.objectives}


def example_questions(config: RunConfig) -> tuple[str, ...]:
    """Problems of the run's domain; nothing for a run on data of its own."""
    if config.data is not None:
        return ()
    first = first_seed(config.seed, "dialogues")
    return tuple(_opening(config, first + number)[-1]["content"] for number in range(EXAMPLES))


def _opening(config: RunConfig, seed: int) -> list[dict[str, str]]:
    messages = load_domain(config.domain).episode(seed).opening_messages
    return [message.model_dump() for message in messages]


def boundary_name(config: RunConfig) -> str:
    """Where steps end at the endpoint; at whole turns for a run on data of its own."""
    return WHOLE_TURNS if config.data is not None else load_domain(config.domain).boundary


def simulated_students(config: RunConfig) -> SimulatedStudents | None:
    """Who answers the model in the conversations that the examples begin; None for a run on data of its own,
    and for a domain whose episodes do not talk back."""
    if config.data is not None:
        return None
    domain, first = load_domain(config.domain), first_seed(config.seed, "dialogues")
    if domain.episode(first).hear("Let us begin.") is None:
        return None
    return SimulatedStudents(domain.episode, tuple(range(first, first + EXAMPLES)))


def _defaults(config: RunConfig) -> Defaults:
    """What the run was evaluated with is what a request gets that does not say otherwise."""
    weights, guidance = config.guided.point
    return Defaults(
        objectives=weights,
        guidance=guidance,
        num_candidates=min(config.guided.num_candidates, config.serve.max_candidates),
        sampling=config.evaluation.sampling,
    )


class SmokeError(StageError):
    """The endpoint answered, but not as it should, or did not answer."""


def smoke(
    url: str,
    model: str,
    messages: Sequence[dict[str, str]],
    weightings: Sequence[Weights],
    api_key: str | None = None,
    timeout_s: float = 60.0,
) -> dict[str, Any]:
    """Ask once per weighting (`extra_body={"objectives": ...}`), then stream the first one once.

    Returns {"model", "answers": [{"objectives", "text", "latency_s", "completion_tokens", "candidates"}],
    "streamed": {"text", "chunks", "latency_s"}}. Raises SmokeError with the reason if anything is off; the
    same seed must give the same text streamed and whole.
    """
    # The client insists on a key; a server without one ignores it.
    client = OpenAI(base_url=f"{url}/v1", api_key=api_key or "none", timeout=timeout_s, max_retries=0)
    try:
        names = [known.id for known in client.models.list()]
        if model not in names:
            raise SmokeError(f"{url} serves {', '.join(names)}, not '{model}'")
        answers = [_ask(client, model, messages, weights) for weights in weightings]
        streamed = _ask_streaming(client, model, messages, weightings[0])
    except OpenAIError as error:
        raise SmokeError(f"{url} did not answer as it should: {error}") from error
    finally:
        client.close()
    if streamed["text"] != answers[0]["text"]:
        raise SmokeError(
            f"with one seed the streamed answer is {streamed['text']!r}, the whole one {answers[0]['text']!r}"
        )
    return {"model": model, "answers": answers, "streamed": streamed}


def _typed(messages: Sequence[dict[str, str]]) -> list[ChatCompletionMessageParam]:
    return [cast(ChatCompletionMessageParam, message) for message in messages]


def _ask(client: OpenAI, model: str, messages: Sequence[dict[str, str]], weights: Weights) -> dict[str, Any]:
    started = time.monotonic()
    completion = client.chat.completions.create(
        model=model,
        messages=_typed(messages),
        seed=SMOKE_SEED,
        extra_body={"objectives": dict(weights)},
    )
    latency = time.monotonic() - started
    text = completion.choices[0].message.content
    details = (completion.model_extra or {}).get("mahalo")
    if not text or not text.strip():
        raise SmokeError(f"the answer with {weights.label()} is empty")
    if completion.usage is None or completion.usage.completion_tokens < 1:
        raise SmokeError(f"the answer with {weights.label()} has no token counts")
    if details is None or Weights(details["objectives"]) != weights:
        raise SmokeError(f"the answer does not say that it was decoded with {weights.label()}: {details}")
    for number, step in enumerate(details["steps"]):
        if not 0 <= step["chosen"] < len(step["candidates"]):
            raise SmokeError(f"step {number} chose candidate {step['chosen']} of {len(step['candidates'])}")
    return {
        "objectives": dict(weights),
        "text": text,
        "latency_s": latency,
        "completion_tokens": completion.usage.completion_tokens,
        "candidates": sum(len(step["candidates"]) for step in details["steps"]),
    }


def _ask_streaming(
    client: OpenAI, model: str, messages: Sequence[dict[str, str]], weights: Weights
) -> dict[str, Any]:
    started = time.monotonic()
    text, chunks, ended = "", 0, None
    stream = client.chat.completions.create(
        model=model,
        messages=_typed(messages),
        seed=SMOKE_SEED,
        stream=True,
        extra_body={"objectives": dict(weights)},
    )
    for chunk in stream:
        assert isinstance(chunk, ChatCompletionChunk)
        chunks += 1
        for choice in chunk.choices:
            text += choice.delta.content or ""
            ended = choice.finish_reason or ended
    if ended is None:
        raise SmokeError("the stream ended without a finish_reason")
    return {"text": text, "chunks": chunks, "latency_s": time.monotonic() - started}
