"""The command `mahalo`: one verb per stage, `run` for all of them, `validate`, and `serve`."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from mahalo_ray import __version__
from mahalo_ray.config import ConfigError, RunConfig, load_config
from mahalo_ray.data import storage
from mahalo_ray.errors import StageError
from mahalo_ray.objectives import Weights, unknown_name
from mahalo_ray.pipeline.fingerprint import Manifest
from mahalo_ray.pipeline.progress import RunProgress
from mahalo_ray.pipeline.stages import Pipeline, RunInterrupted
from mahalo_ray.pipeline.students import check_domain

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=c", help="Override one key; may be given many times."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

# Verb -> the stages it brings up to date (with all that they need), and its help text.
VERBS = {
    "sft": (("sft",), "Make the SFT model."),
    "rollout": (("reward_rollouts", "pair_rollouts"), "Play the dialogues for reward model and pairs."),
    "reward": (("reward",), "Train the process reward model."),
    "pairs": (("pairs",), "Build preference pairs from scored candidates."),
    "policy": (("policy",), "Train the multi-head policy (MAH-DPO)."),
    "sweep": (("sweep",), "Evaluate the sweep's weight vectors."),
    "evaluate": (("evaluate",), "Evaluate SFT, each head alone and guided decoding."),
    "report": (("report",), "Write the report."),
}

app = typer.Typer(
    name="mahalo",
    help="Multi-objective alignment of language models on Ray, with per-request weights. "
    "Every verb first runs what it needs; finished stages are skipped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def main() -> NoReturn:
    """Entry point of the command. Exit codes: 0 done, 2 wrong input, 130 Ctrl-C, 143 SIGTERM, 1 a stage
    that failed for good, or a defect."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    app()
    raise AssertionError("typer exits by itself")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        say(f"mahalo_ray {__version__}")
        raise typer.Exit


@app.command()
def validate(config: ConfigFile, set_: Overrides = None, debug: Debug = False) -> None:
    """Check a configuration without running anything."""

    def work() -> None:
        loaded = load(config, set_)
        objectives = ", ".join(loaded.objective_names)
        say(f"{config} is valid: run '{loaded.name}', objectives {objectives}, output {loaded.output}")

    guarded(work, debug)


@app.command()
def run(config: ConfigFile, set_: Overrides = None, debug: Debug = False) -> None:
    """Run all stages."""
    guarded(lambda: run_stages(load(config, set_), None, str(config)), debug)


def _add_verb(name: str, targets: tuple[str, ...], help_text: str) -> None:
    def verb(config: ConfigFile, set_: Overrides = None, debug: Debug = False) -> None:
        guarded(lambda: run_stages(load(config, set_), targets, str(config)), debug)

    app.command(name, help=help_text)(verb)


for _name, (_targets, _help) in VERBS.items():
    _add_verb(_name, _targets, _help)


@app.command()
def serve(config: ConfigFile, set_: Overrides = None, debug: Debug = False) -> None:
    """Serve the run's policy and reward model in the foreground (OpenAI-compatible API) until Ctrl-C."""

    def work() -> None:
        serve_run(load(config, set_))

    guarded(work, debug)


@app.command()
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


@app.command()
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


def run_stages(config: RunConfig, targets: tuple[str, ...] | None, config_name: str) -> None:
    """Bring stages up to date (None: all) and say what came of it."""
    from mahalo_ray.pipeline.evaluating import print_outcome

    manifests = execute(pipeline_of(config, targets or ()), config, targets)
    if "report" in manifests:
        print_outcome(out, config, manifests)
        say(f"Serve it: mahalo serve {config_name}")
    else:
        for name in targets or manifests:
            say(f"{name}: {storage.join(config.output, name)}")


def serve_run(config: RunConfig) -> None:
    """Make policy and reward model if they are not there yet, then serve them until Ctrl-C."""
    from mahalo_ray.pipeline.serve import serve_in_foreground

    manifests = execute(pipeline_of(config, ("policy", "reward")), config, ("policy",))
    with open_session(config):
        serve_in_foreground(config, manifests, out)


def pipeline_of(config: RunConfig, targets: tuple[str, ...]) -> Pipeline:
    """The stages of this kind of run; ConfigError for a target that a run on own pairs does not have."""
    from mahalo_ray.pipeline import own_pairs, steps

    if config.data is None:
        return steps.PIPELINE
    for name in targets:
        if name not in own_pairs.PIPELINE.stages:
            raise ConfigError(
                f"a run on own pairs ('data') has no stage '{name}': it has "
                f"{', '.join(own_pairs.PIPELINE.stages)}; `mahalo export` hands its policy to other engines"
            )
    return own_pairs.PIPELINE


def execute(pipeline: Pipeline, config: RunConfig, targets: tuple[str, ...] | None) -> dict[str, Manifest]:
    """Run stages of any pipeline with a Ray session of this configuration."""
    return pipeline.run(config, targets, session=lambda: open_session(config), progress=RunProgress(out))


def open_session(config: RunConfig) -> AbstractContextManager[None]:
    """Ray, as this configuration wants it."""
    from mahalo_ray.pipeline.cluster import ray_session

    return ray_session(config.cluster, config.serve.replicas * config.serve.cpus_per_replica)


def load(file: Path, overrides: list[str] | None) -> RunConfig:
    """The configuration, checked for what its domain can do."""
    config = load_config(file, overrides)
    if config.data is None:
        check_domain(config)
    return config


def guarded(work: Callable[[], None], debug: bool) -> None:
    """Do the work; what the user can mend becomes one clear message and exit code 2."""
    try:
        work()
    except RunInterrupted as stop:
        err.print(escape(str(stop)))
        _leave(stop.exit_code)
    except KeyboardInterrupt:
        err.print("Stopped.")
        _leave(130)
    except StageError as error:
        if debug:
            traceback.print_exception(error)
        err.print(f"[bold red]failed:[/] {escape(str(error))}")
        raise SystemExit(1) from None
    except ValueError as error:
        if debug:
            traceback.print_exception(error)
        notes = "".join(f"\n({note})" for note in getattr(error, "__notes__", ()))
        err.print(f"[bold red]error:[/] {escape(_message(error))}{escape(notes)}")
        raise SystemExit(2) from None


def say(message: str) -> None:
    """Print one line as it is, however long."""
    out.print(message, markup=False, soft_wrap=True)


def _message(error: ValueError) -> str:
    """Without the remote traceback that Ray adds to an error from a worker."""
    cause = getattr(error, "cause", None)
    return str(cause if isinstance(cause, ValueError) else error)


def _leave(code: int) -> NoReturn:
    """End at once: a stage's thread may still be computing, and nothing it does counts any more."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
