"""`mahalo generate`: answer a file of prompts by guided decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mahalo_ray.cli.common import Debug, guarded, out, say
from mahalo_ray.config.loading import checked, read_document
from mahalo_ray.config.rollouts import GenerateConfig, RewardSource
from mahalo_ray.objectives import Weights

Prompts = Annotated[str, typer.Argument(metavar="PROMPTS", help="JSON, JSON Lines or Parquet rows.")]
Output = Annotated[str, typer.Option("--output", "-o", help="The new folder, or one to go on with.")]
Policy = Annotated[str | None, typer.Option(help="A run's output, or a model folder.")]
Reward = Annotated[
    list[str] | None,
    typer.Option(help="A run's output or a reward model; objective=FOLDER for a foreign classifier."),
]
OverHeads = Annotated[str | None, typer.Option(help="Over the policy's heads: accuracy=0.7,engagement=0.3.")]
OverScores = Annotated[str | None, typer.Option(help="Over the reward models' objectives.")]
Domain = Annotated[str | None, typer.Option(help="Where steps end: math, human_values or tutoring.")]
Candidates = Annotated[int | None, typer.Option("--candidates", "-k", help="Candidates per step.")]
Stop = Annotated[list[str] | None, typer.Option(help="A stop string; may be given many times.")]
Actors = Annotated[int | None, typer.Option(help="Ray actors that answer.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=c", help="Any other key, e.g. cluster.use_gpu=true."),
]
File = Annotated[
    Path | None, typer.Option("--config", help="YAML with keys of the job; options here come before it.")
]


def register(app: typer.Typer) -> None:
    """Add this verb to the command."""
    app.command()(generate)


def generate(
    prompts: Prompts,
    output: Output,
    policy: Policy = None,
    reward: Reward = None,
    weights: OverHeads = None,
    guidance: OverScores = None,
    domain: Domain = None,
    candidates: Candidates = None,
    strategy: Annotated[str | None, typer.Option(help="argmax, sample, beam, dvts, best_of_n, none.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="0: off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="1: off.")] = None,
    min_p: Annotated[float | None, typer.Option(help="0: off.")] = None,
    seed: Annotated[int | None, typer.Option(help="Mixed with each row's id.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of a whole answer.")] = None,
    max_step_tokens: Annotated[int | None, typer.Option(help="Of a step.")] = None,
    stop: Stop = None,
    actors: Actors = None,
    config: File = None,
    set_: Overrides = None,
    debug: Debug = False,
) -> None:
    """Answer prompts by guided decoding: text, steps and every candidate's scores, as Parquet.

    Run again, it goes on where it stopped. The answers do not depend on the number of actors.
    """
    request: dict[str, Any] = {
        "weights": weights,
        "guidance": guidance,
        "num_candidates": candidates,
        "strategy": strategy,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "max_step_tokens": max_step_tokens,
        "stop": stop or None,
    }

    def work() -> None:
        from mahalo_ray.data import storage
        from mahalo_ray.pipeline.cluster import ray_session
        from mahalo_ray.pipeline.generate import generate as answer
        from mahalo_ray.pipeline.progress import RunProgress

        given: dict[str, Any] = {"prompts": prompts, "output": output, "policy": policy, "domain": domain}
        given["rewards"] = [RewardSource.parse(one).model_dump() for one in reward or []] or None
        parsed = {
            name: dict(Weights.parse(value)) if name in ("weights", "guidance") else value
            for name, value in request.items()
            if value is not None
        }
        document = read_document(config, set_)
        document |= {name: value for name, value in given.items() if value is not None}
        document["request"] = document.get("request", {}) | parsed
        if actors is not None:
            document["cluster"] = document.get("cluster", {}) | {"rollout_actors": actors}
        job = checked(document, GenerateConfig, "the command" if config is None else str(config))
        manifest = answer(job, lambda: ray_session(job.cluster), RunProgress(out))
        say(f"answered: {manifest.metrics['answered']}, quarantined: {manifest.metrics['quarantined']}")
        for name, path in manifest.outputs.items():
            say(f"{name}: {storage.join(output, path)}")

    guarded(work, debug)
