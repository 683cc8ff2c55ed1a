"""The verbs that run stages: one per stage, `run` for all of them, and `serve`."""

from __future__ import annotations

from collections.abc import Callable

import typer

from mahalo_ray.cli.common import ConfigFile, Debug, Overrides, guarded, load, open_session, out, say
from mahalo_ray.config import ConfigError, RunConfig
from mahalo_ray.data import storage
from mahalo_ray.pipeline.progress import RunProgress
from mahalo_ray.pipeline.stages import Manifest, Pipeline

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


def stage_verb(name: str) -> Callable[..., None]:
    """The command function of one verb."""
    targets = VERBS[name][0]

    def verb(config: ConfigFile, set_: Overrides = None, debug: Debug = False) -> None:
        guarded(lambda: run_stages(load(config, set_), targets, str(config)), debug)

    return verb


def register(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    app.command()(run)
    for name, (_, help_text) in VERBS.items():
        if name != "evaluate":  # it has verbs of its own: see evaluate.py
            app.command(name, help=help_text)(stage_verb(name))
    app.command()(serve)


def run(config: ConfigFile, set_: Overrides = None, debug: Debug = False) -> None:
    """Run all stages."""
    guarded(lambda: run_stages(load(config, set_), None, str(config)), debug)


def serve(config: ConfigFile, set_: Overrides = None, debug: Debug = False) -> None:
    """Serve the run's policy and reward model in the foreground (OpenAI-compatible API) until Ctrl-C."""

    def work() -> None:
        serve_run(load(config, set_))

    guarded(work, debug)


def run_stages(config: RunConfig, targets: tuple[str, ...] | None, config_name: str) -> None:
    """Bring stages up to date (None: all) and say what came of it."""
    from mahalo_ray.evaluation.reward_report import print_report as print_reward_report
    from mahalo_ray.pipeline.evaluating import print_outcome, wide_enough

    targets = targets_of(config, targets)
    manifests = execute(pipeline_of(config, targets or ()), config, targets)
    if "report" in manifests:
        print_outcome(out, config, manifests)
        say(f"Serve it: mahalo serve {config_name}")
        return
    if "reward_report" in manifests:
        print_reward_report(wide_enough(out), storage.join(config.output, "reward_report"))
    for name in targets or manifests:
        say(f"{name}: {storage.join(config.output, name)}")


def targets_of(config: RunConfig, asked: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The stages behind a verb (None: all)."""
    from mahalo_ray.pipeline import datasets

    return asked if config.data is None else datasets.targets(config, asked)


def serve_run(config: RunConfig) -> None:
    """Make policy and reward model if they are not there yet, then serve them until Ctrl-C."""
    from mahalo_ray.pipeline.serve import serve_in_foreground

    manifests = execute(pipeline_of(config, ("serve",)), config, ("policy",))
    with open_session(config):
        serve_in_foreground(config, manifests, out)


def pipeline_of(config: RunConfig, targets: tuple[str, ...]) -> Pipeline:
    """The stages of this kind of run; ConfigError for a target that a run on own data does not have."""
    from mahalo_ray.pipeline import datasets, run

    if config.data is None:
        return run.PIPELINE
    pipeline = datasets.pipeline(config)
    for name in targets:
        if name not in pipeline.stages:
            raise ConfigError(
                f"this run on own data ('data') has no stage '{name}': it has {', '.join(pipeline.stages)}; "
                "`mahalo export` hands a policy to other engines"
            )
    return pipeline


def execute(pipeline: Pipeline, config: RunConfig, targets: tuple[str, ...] | None) -> dict[str, Manifest]:
    """Run stages of any pipeline with a Ray session of this configuration."""
    return pipeline.run(config, targets, session=lambda: open_session(config), progress=RunProgress(out))
