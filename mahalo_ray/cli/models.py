"""The verbs that look at a configuration or a finished model: `validate`, `plan`, `export`."""

from __future__ import annotations

from typing import Annotated

import typer

from mahalo_ray.cli.common import ConfigFile, Debug, Overrides, guarded, load, out, say
from mahalo_ray.objectives import Weights, unknown_name


def register(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    for verb in (validate, export, plan):
        app.command()(verb)


def validate(config: ConfigFile, set_: Overrides = None, debug: Debug = False) -> None:
    """Check a configuration without running anything."""

    def work() -> None:
        loaded = load(config, set_)
        objectives = ", ".join(loaded.objective_names)
        say(f"{config} is valid: run '{loaded.name}', objectives {objectives}, output {loaded.output}")

    guarded(work, debug)


def export(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL_FOLDER", help="A run's output or a policy.")],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="The new folder.")],
    weights: Annotated[str, typer.Option("--weights", help="For example accuracy=0.7,engagement=0.3.")],
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: as stored.")] = None,
    debug: Debug = False,
) -> None:
    """Merge a policy's heads at fixed weights into an ordinary transformers folder."""

    def work() -> None:
        merged = Weights.parse(weights)
        export_policy(source, output, merged, dtype)
        say(f"{output}: the policy at {merged.label()}, for AutoModelForCausalLM.from_pretrained")

    guarded(work, debug)


def plan(
    config: ConfigFile,
    gpu_memory_gb: Annotated[float, typer.Option(min=0.1, help="Memory of one GPU (GiB).")] = 80.0,
    gpus: Annotated[int | None, typer.Option(min=1, help="Default: cluster.train_workers.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    set_: Overrides = None,
    debug: Debug = False,
) -> None:
    """Parameters and memory of the policy's training by ZeRO stage, without loading weights."""

    def work() -> None:
        from mahalo_ray.pipeline.show_plan import plan_of, print_plan, to_json

        loaded = load(config, set_)
        made = plan_of(loaded, gpus)
        if json_:
            typer.echo(to_json(made, gpu_memory_gb))
        else:
            print_plan(out, made, gpu_memory_gb)

    guarded(work, debug)


def export_policy(source: str, output: str, weights: Weights, dtype: str | None) -> None:
    """`mahalo_ray.pipeline.export.export` with a dtype by name."""
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(unknown_name("dtype", str(dtype), ("float32", "bfloat16")))
    import torch

    from mahalo_ray.pipeline.export import export as merge_and_save

    merge_and_save(source, output, weights, None if dtype is None else getattr(torch, dtype))
