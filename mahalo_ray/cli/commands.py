"""The verbs of the command `mahalo`.

Imports that take seconds (torch, transformers, Ray) are inside the verbs: help and errors come at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Table
from typer.core import TyperGroup

from mahalo_ray.cli.common import (
    ConfigFile,
    Debug,
    Overrides,
    err,
    execute,
    guarded,
    load,
    open_session,
    out,
    say,
)
from mahalo_ray.config import (
    ConfigError,
    DialoguesConfig,
    GenerateConfig,
    LabelConfig,
    RewardSource,
    RunConfig,
    load_document,
    read_document,
)
from mahalo_ray.config.describe import DOCUMENTS, commented_config, kind_of
from mahalo_ray.data import storage
from mahalo_ray.objectives import Weights, unknown_name
from mahalo_ray.pipeline.progress import RunProgress
from mahalo_ray.pipeline.stages import Pipeline

if TYPE_CHECKING:
    import torch

    from mahalo_ray.models.combination import Combination

# Verb -> the stages it brings up to date (with all that they need), and its help text.
VERBS = {
    "sft": (("sft",), "Make the SFT model."),
    "rollout": (("reward_rollouts", "pair_rollouts"), "Play the dialogues for reward model and pairs."),
    "reward": (("reward",), "Train the process reward model."),
    "pairs": (("pairs",), "Build preference pairs from scored candidates."),
    "policy": (("policy",), "Train the multi-head policy (MAH-DPO)."),
    "sweep": (("sweep",), "Try the weight vectors of 'sweep', and print the table of what they reached."),
    "evaluate": (("evaluate",), "Evaluate SFT, each head alone and guided decoding."),
    "report": (("report",), "Write the report."),
}


def register(app: typer.Typer) -> None:
    """Add all verbs to the command."""
    app.command()(run)
    for name, (_, help_text) in VERBS.items():
        if name != "evaluate":  # a group: `evaluate CONFIG` and `evaluate reward`
            app.command(name, help=help_text)(stage_verb(name))
    group = typer.Typer(
        cls=_StageUnlessNamed,
        no_args_is_help=True,
        help="`evaluate CONFIG`: evaluate SFT, each head alone and guided decoding of a run. "
        "`evaluate reward`: metrics of a reward model.",
    )
    group.command(_STAGE, hidden=True)(stage_verb("evaluate"))
    group.command("reward")(evaluate_reward)
    app.add_typer(group, name="evaluate")
    data = typer.Typer(no_args_is_help=True, help="`data inspect`: what a file or folder of rows holds.")
    data.command("inspect")(inspect_data)
    app.add_typer(data, name="data")
    for verb in (
        serve,
        deploy,
        compare,
        config,
        validate,
        export,
        combine,
        plan,
        dialogues,
        label,
        calibrate,
        generate,
    ):
        app.command()(verb)


def inspect_data(
    path: Annotated[str, typer.Argument(help="File, folder, URL or hub:OWNER/NAME.")],
    against: Annotated[
        str | None, typer.Option(help="An evaluation set: name the rows that share text with its prompts.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, max=100, help="Rows to show.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """What rows are: format, counts, lengths, bad rows, samples, and what an evaluation set contains too."""

    def work() -> None:
        from mahalo_ray.data.inspection import inspect

        inspection = inspect(path, against, samples)
        if as_json:
            say(json.dumps(inspection.as_json(), indent=2, ensure_ascii=False))
            return
        for line in inspection.describe():
            say(line)

    guarded(work, debug)


def stage_verb(name: str) -> Callable[..., None]:
    """The command function of one verb."""
    targets = VERBS[name][0]

    def verb(config: ConfigFile, set_: Overrides = None, debug: Debug = False) -> None:
        guarded(lambda: run_stages(load(config, set_), targets, str(config)), debug)

    return verb


_STAGE = "stage"


class _StageUnlessNamed(TyperGroup):
    """What names no verb of this group is the configuration of a run. (`ctx`: typer carries a click of its
    own.)"""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = [_STAGE, *args]
        return super().parse_args(ctx, args)


def run(config: ConfigFile, set_: Overrides = None, debug: Debug = False) -> None:
    """Run all stages, and the comparison where the document asks for it; once for each of its seeds."""

    def work() -> None:
        loaded = load(config, set_, any_seeds=True)
        if loaded.seeds:
            run_seeds(loaded, compared=loaded.compare.with_run)
            return
        run_stages(loaded, None, str(config))
        if loaded.compare.with_run:
            run_comparison(loaded)

    guarded(work, debug)


def run_seeds(config: RunConfig, compared: bool) -> None:
    """The same run once for each of its seeds, and a report over all."""
    from mahalo_ray.pipeline.seeds import run_all_seeds

    run_all_seeds(out, config, compared, execute)


def serve(config: ConfigFile, set_: Overrides = None, debug: Debug = False) -> None:
    """Serve the run's policy and reward model in the foreground (OpenAI-compatible API) until Ctrl-C."""

    def work() -> None:
        serve_run(load(config, set_))

    guarded(work, debug)


def deploy(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A Ray Serve configuration file.")],
    address: Annotated[
        str, typer.Option("--address", "-a", envvar="RAY_DASHBOARD_ADDRESS", help="The cluster's dashboard.")
    ] = "http://127.0.0.1:8265",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait until everything answers.")] = 600.0,
    debug: Debug = False,
) -> None:
    """Deploy a Ray Serve configuration file on a running cluster, until it answers or it is clear why not."""

    def work() -> None:
        from mahalo_ray.serving.deployment import deploy as deploy_and_wait

        deploy_and_wait(file, address, timeout, say)

    guarded(work, debug)


def run_stages(config: RunConfig, targets: tuple[str, ...] | None, config_name: str) -> None:
    """Bring stages up to date (None: all) and say what came of it."""
    from mahalo_ray.evaluation.reward_report import print_report as print_reward_report
    from mahalo_ray.pipeline.evaluating import print_outcome, wide_enough
    from mahalo_ray.pipeline.run import sweep_pipeline
    from mahalo_ray.pipeline.sweeping import sweep_stage
    from mahalo_ray.sweeps.sweep_table import TRAINING_SWEEP, SweepTable, print_sweep

    targets = targets_of(config, targets)
    swept = sweep_stage(config)
    adds_sweep = config.data is None and targets == (TRAINING_SWEEP,)
    stages = sweep_pipeline(config) if adds_sweep else pipeline_of(config, targets or ())
    manifests = execute(stages, config, targets)
    if "report" in manifests:
        print_outcome(out, config, manifests)
        say(f"Serve it: mahalo serve {config_name}")
        return
    if "reward_report" in manifests:
        print_reward_report(wide_enough(out), storage.join(config.output, "reward_report"))
    if targets == (swept,):
        print_sweep(wide_enough(out), SweepTable.of_run(config.output, swept))
    for name in targets or manifests:
        say(f"{name}: {storage.join(config.output, name)}")


def targets_of(config: RunConfig, asked: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The stages behind a verb (None: all)."""
    from mahalo_ray.pipeline import datasets
    from mahalo_ray.pipeline.rounds import last_stage
    from mahalo_ray.pipeline.sweeping import sweep_stage

    if config.data is not None:
        return datasets.targets(config, asked)
    if asked == ("sweep",):
        return (sweep_stage(config),)
    return None if asked is None else tuple(last_stage(config, stage) for stage in asked)


def serve_run(config: RunConfig) -> None:
    """Make policy and reward model if they are not there yet, then serve them until Ctrl-C."""
    from mahalo_ray.serving.api_key import KeyDigests

    key = KeyDigests.configured(config.serve)  # before anything takes time
    from mahalo_ray.pipeline.serve import serve_in_foreground

    manifests = execute(pipeline_of(config, ("serve",)), config, targets_of(config, ("policy",)))
    with open_session(config, serves=True):
        serve_in_foreground(config, manifests, key, out)


def pipeline_of(config: RunConfig, targets: tuple[str, ...]) -> Pipeline[RunConfig]:
    """The stages of this kind of run; ConfigError for a target that a run on own data does not have."""
    from mahalo_ray.pipeline import datasets, run

    if config.data is None:
        return run.pipeline(config)
    pipeline = datasets.pipeline(config)
    for name in targets:
        if name not in pipeline.stages:
            raise ConfigError(
                f"this run on own data ('data') has no stage '{name}': it has {', '.join(pipeline.stages)}; "
                "`mahalo export` hands a policy to other engines"
            )
    return pipeline


def compare(config: ConfigFile, set_: Overrides = None, debug: Debug = False) -> None:
    """Train the baselines ('compare'), and compare all methods in one table and picture."""

    def work() -> None:
        loaded = load(config, set_, any_seeds=True)
        if loaded.data is not None:
            raise ConfigError("a run on own data ('data') has no students to play, and so no table")
        if loaded.seeds:
            run_seeds(loaded, compared=True)
        else:
            run_comparison(loaded)

    guarded(work, debug)


def run_comparison(config: RunConfig) -> None:
    """Make what the comparison lacks, and print it."""
    from mahalo_ray.pipeline.compare import REPORT, comparison_pipeline, print_comparison

    manifests = execute(comparison_pipeline(config), config, (REPORT,))
    print_comparison(out, config, manifests)


def evaluate_reward(
    model: Annotated[
        str, typer.Argument(help="A run's output, or folder of a reward model or classifier (or its hub id).")
    ],
    data: Annotated[list[str], typer.Argument(help="Files or folders of step traces or preference pairs.")],
    objective: Annotated[
        str | None,
        typer.Option(help="Objective of rows that name none, and what a third-party classifier scores."),
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="Of step traces; default: by their fields.")
    ] = "auto",
    threshold_from: Annotated[
        list[str] | None,
        typer.Option(help="Other data, on which the threshold of the first error is chosen."),
    ] = None,
    output: Annotated[str, typer.Option(help="Folder for JSON, picture and bad rows.")] = "reward_evaluation",
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    max_bad_fraction: Annotated[float, typer.Option(min=0, max=1)] = 0.01,
    debug: Debug = False,
) -> None:
    """Figures of a reward model on data it was not trained on, each with n and interval."""

    def work() -> None:
        from mahalo_ray.evaluation.reward_report import evaluate_scorer, print_report
        from mahalo_ray.models.classifiers import is_own_model, load_scorer
        from mahalo_ray.pipeline.artifacts import find_model
        from mahalo_ray.pipeline.outputs import check_output, sign_output

        check_output(output)
        sign_output(output)
        folder = find_model(model, "reward") if storage.exists(model) else model
        scorer = load_scorer(folder, None if is_own_model(folder) else objective, device=device)
        evaluate_scorer(
            scorer, data, objective, format_, threshold_from or [], output, batch_size, max_bad_fraction
        )
        print_report(out, output)
        say(f"metrics and picture: {output}")

    guarded(work, debug)


def validate(config: ConfigFile, set_: Overrides = None, debug: Debug = False) -> None:
    """Check a configuration of any kind without running anything."""

    def work() -> None:
        document = read_document(config, set_)
        kind = kind_of(document.values)
        if DOCUMENTS[kind].schema is RunConfig:
            loaded = load(config, set_, any_seeds=True)
            objectives = ", ".join(loaded.objective_names)
            rounds = f", {loaded.rounds} rounds" if loaded.rounds > 1 else ""
            rounds += f", {len(loaded.seeds)} seeds" if loaded.seeds else ""
            say(
                f"{config} is valid: run '{loaded.name}', objectives {objectives}{rounds}, "
                f"output {loaded.output}"
            )
            return
        document.validate(DOCUMENTS[kind].schema)
        what, output = DOCUMENTS[kind].title, document.values["output"]
        say(f"{config} is valid: a configuration of {what}, output {output}")

    guarded(work, debug)


def config(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"One of {', '.join(DOCUMENTS)}.")] = "run",
    debug: Debug = False,
) -> None:
    """Print a commented configuration to begin with: every key with its meaning, range and default."""
    guarded(lambda: typer.echo(commented_config(kind), nl=False), debug)


def export(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL_FOLDER", help="A run's output or a policy.")],
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="The new folder.")],
    weights: Annotated[str, typer.Option("--weights", help="For example accuracy=0.7,engagement=0.3.")],
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: as stored.")] = None,
    strength: Annotated[
        float,
        typer.Option(min=0, help="0: the SFT model's head, 1: the policy's, above 1: beyond it."),
    ] = 1.0,
    debug: Debug = False,
) -> None:
    """Merge a policy's heads at fixed weights and strength into an ordinary transformers folder."""

    def work() -> None:
        merged = Weights.parse(weights)
        export_policy(source, output, merged, dtype, strength)
        beyond = "" if strength == 1 else f", strength {strength:g}"
        say(f"{output}: the policy at {merged.label()}{beyond}, for AutoModelForCausalLM.from_pretrained")

    guarded(work, debug)


def combine(
    base: Annotated[
        str, typer.Argument(help="The model all others were made from: a folder, run or hub id.")
    ],
    models: Annotated[
        list[str],
        typer.Argument(metavar="NAME=MODEL...", help="Each objective's model: a folder, run or hub id."),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="The new folder.")],
    rank: Annotated[
        str, typer.Option(help="Of the adapters where the models' backbones differ; 'full' loses nothing.")
    ] = "16",
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: as stored.")] = None,
    debug: Debug = False,
) -> None:
    """Make one policy of single-objective models, without training: a head per model, and adapters."""

    def work() -> None:
        named: dict[str, str] = {}
        for text in models:
            name, equals, source = text.partition("=")
            if not equals or not source:
                raise ValueError(f"'{text}' names no model: write objective=FOLDER")
            if name in named:
                raise ValueError(f"objective '{name}' is given twice")
            named[name] = source
        if rank != "full" and not (rank.isdecimal() and int(rank) > 0):
            raise ValueError(f"--rank is '{rank}': give a number above 0, or full")
        from mahalo_ray.pipeline.artifacts import combine as combine_and_save

        made = combine_and_save(base, named, output, "full" if rank == "full" else int(rank), dtype_of(dtype))
        print_combination(made)
        say(f"{output}: a policy with heads for {', '.join(named)}")

    guarded(work, debug)


def print_combination(made: Combination) -> None:
    """How much of each model's difference from the base is lost, block by block."""
    if made.rank is None:
        say("the models differ in their output layers alone: heads without adapters, nothing is lost")
        return
    table = Table(
        title=f"Relative error at rank {made.rank}: ||lost|| / ||model - base||", title_justify="left"
    )
    table.add_column("linear layers of")
    for name in made.layers:
        table.add_column(name, justify="right")
    rows = {**made.by_block(), "all blocks": made.overall()}
    rows["other parameters (shared: the models' mean)"] = {n: r.relative_error for n, r in made.rest.items()}
    for label, errors in rows.items():
        table.add_row(label, *(f"{error:.3g}" for error in errors.values()))
    out.print(table)


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
        from mahalo_ray.planning import make_plan, plan_to_json, print_plan

        loaded = load(config, set_, any_seeds=True)
        count = gpus if gpus is not None else loaded.cluster.train_workers
        policy, trained = loaded.policy, len(loaded.objectives)
        if policy.extends is not None:
            from mahalo_ray.pipeline.run import extended_policy, trained_objectives

            policy = policy.model_copy(update={"extends": extended_policy(policy.extends)})
            trained = len(trained_objectives(loaded))
        made = make_plan(loaded.model, policy, trained, count, loaded.sweep.most_trainings)
        if json_:
            typer.echo(plan_to_json(made, gpu_memory_gb))
        else:
            print_plan(out, made, gpu_memory_gb)
            if loaded.rounds > 1:
                say(
                    f"The run has {loaded.rounds} rounds: as many trainings of this size, one after another, "
                    "each on the pairs of all rounds up to its own."
                )

    guarded(work, debug)


def export_policy(source: str, output: str, weights: Weights, dtype: str | None, strength: float) -> None:
    """`mahalo_ray.pipeline.artifacts.export` with a dtype by name."""
    from mahalo_ray.pipeline.artifacts import export as merge_and_save

    merge_and_save(source, output, weights, dtype_of(dtype), strength)


def dtype_of(name: str | None) -> torch.dtype | None:
    """The number format of a model's weights; None: as stored."""
    if name not in (None, "float32", "bfloat16"):
        raise ValueError(unknown_name("dtype", str(name), ("float32", "bfloat16")))
    import torch

    return None if name is None else cast("torch.dtype", getattr(torch, name))


DialoguesFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML: who talks, about what.")]


def dialogues(config: DialoguesFile, set_: Overrides = None, debug: Debug = False) -> None:
    """Play tutor-student dialogues with K candidates per turn, score them and make preference pairs.

    Run again, it goes on where it stopped and plays failed dialogues again.
    """

    def work() -> None:
        from mahalo_ray.pipeline.cluster import ray_session
        from mahalo_ray.pipeline.make_dialogues import make_dialogues

        loaded = load_document(config, DialoguesConfig, set_)
        manifest = make_dialogues(loaded, lambda: ray_session(loaded.cluster), RunProgress(out))
        metrics = manifest.metrics
        say(f"dialogues: {metrics['dialogues']}, candidates: {metrics['candidates']}")
        if metrics["failed"]:
            kinds = ", ".join(f"{kind} {count}" for kind, count in metrics["failed"].items())
            say(f"failed: {kinds}; the same command plays them again")
        for name, path in manifest.outputs.items():
            say(f"{name}: {storage.join(loaded.output, path)}")

    guarded(work, debug)


LabelFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML: what is labelled, who judges.")]


def label(config: LabelFile, set_: Overrides = None, debug: Debug = False) -> None:
    """Label the steps of traces for a process reward model: continuations, judges, or both.

    Run again, it goes on where it stopped.
    """

    def work() -> None:
        from mahalo_ray.pipeline.cluster import ray_session
        from mahalo_ray.pipeline.labelling import make_labels

        loaded = load_document(config, LabelConfig, set_)
        manifest = make_labels(loaded, lambda: ray_session(loaded.cluster), RunProgress(out))
        print_labels(manifest.metrics)
        for name, path in manifest.outputs.items():
            say(f"{name}: {storage.join(loaded.output, path)}")

    guarded(work, debug)


def print_labels(metrics: dict[str, Any]) -> None:
    """What a labelling job came to, in lines."""
    say(f"traces: {metrics['traces']}")
    for name, judge in metrics["judges"].items():
        made, without = (metrics[kind].get(name, 0) for kind in ("labels", "unjudged"))
        say(f"{name}: {made} labels ({judge['supervision']}), {without} without verdict")
        if not judge["calibrated"]:
            err.print(
                f"[bold yellow]warning:[/] the judge of '{name}' is not calibrated (threshold "
                f"{judge['threshold']:g}): `mahalo calibrate` fits it to human ratings"
            )
    sampling = metrics["sampling"]
    if sampling:
        say(
            f"continuations: {sampling['samples']} of at most {sampling['samples_full']} "
            f"({sampling['samples_saved']:.0%} saved), for {sampling['prefixes']} distinct prefixes of "
            f"{sampling['steps']}"
        )
    for name, asked in metrics["endpoints"].items():
        cost = "" if asked["cost"] is None else f", cost {asked['cost']:.4g}"
        say(f"{name}: {asked['requests']} requests, {sum(asked['failures'].values())} failed{cost}")


def calibrate(config: LabelFile, set_: Overrides = None, debug: Debug = False) -> None:
    """Fit a judge's threshold to human ratings, and report how well the judge agrees with them."""

    def work() -> None:
        from mahalo_ray.data.rows import describe_account
        from mahalo_ray.pipeline.judging import calibrate_judge

        url, found = calibrate_judge(load_document(config, LabelConfig, set_))
        ratings = f"{found['ratings']} ratings ({found['positive']} positive)"
        for line in describe_account(found["data"]):
            say(line)
        say(f"threshold {found['threshold']:.4g} from {ratings}")
        for name, figure in found["agreement"].items():
            shown = "undefined" if figure is None else "{value:.3f} [{low:.3f}, {high:.3f}]".format(**figure)
            say(f"{name}: {shown}")
        say(f"({found['method']})")
        say(f"calibration: {url}")

    guarded(work, debug)


Prompts = Annotated[str, typer.Argument(metavar="PROMPTS", help="JSON, JSON Lines or Parquet rows.")]
Output = Annotated[str, typer.Option("--output", "-o", help="The new folder, or one to go on with.")]
Policy = Annotated[str | None, typer.Option(help="A run's output, or a model folder.")]
Reward = Annotated[
    list[str] | None,
    typer.Option(help="A run's output or a reward model; objective=FOLDER for a third-party classifier."),
]
OverHeads = Annotated[str | None, typer.Option(help="Over the policy's heads: accuracy=0.7,engagement=0.3.")]
OverScores = Annotated[str | None, typer.Option(help="Over the reward models' objectives.")]
Domain = Annotated[
    str | None, typer.Option(help="Where steps end: math, lines, human_values, sentence or tutoring.")
]
Candidates = Annotated[int | None, typer.Option("--candidates", "-k", help="Candidates per step.")]
Stop = Annotated[list[str] | None, typer.Option(help="A stop string; may be given many times.")]
Actors = Annotated[int | None, typer.Option(help="Ray actors that answer.")]
OtherKeys = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=c", help="Any other key, e.g. cluster.use_gpu=true."),
]
File = Annotated[
    Path | None, typer.Option("--config", help="YAML with keys of the job; options here come before it.")
]


_OPTION_NAMES = {"num_candidates": "candidates", "rollout_actors": "actors", "rewards": "reward"}


def generate(
    prompts: Prompts,
    output: Output,
    policy: Policy = None,
    reward: Reward = None,
    weights: OverHeads = None,
    strength: Annotated[
        float | None, typer.Option(help="0: the SFT model's head, 1: the policy's, above 1: beyond it.")
    ] = None,
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
    set_: OtherKeys = None,
    debug: Debug = False,
) -> None:
    """Answer prompts by guided decoding: text, steps and every candidate's scores, as Parquet.

    Run again, it goes on where it stopped. The answers do not depend on the number of actors.
    """
    request: dict[str, Any] = {
        "weights": weights,
        "strength": strength,
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
        from mahalo_ray.pipeline.cluster import ray_session
        from mahalo_ray.pipeline.generate import generate as answer

        given: dict[str, Any] = {"prompts": prompts, "output": output, "policy": policy, "domain": domain}
        given["rewards"] = [RewardSource.parse(text).model_dump() for text in reward or []] or None
        options: dict[tuple[str, ...], Any] = {(name,): value for name, value in given.items()}
        options |= {("request", name): value for name, value in request.items()}
        options["cluster", "rollout_actors"] = actors
        document = read_document(config, set_)
        for key, value in options.items():
            if value is not None:
                document.put(key, value, f"--{_OPTION_NAMES.get(key[-1], key[-1]).replace('_', '-')}")
        job = document.validate(GenerateConfig)
        manifest = answer(job, lambda: ray_session(job.cluster), RunProgress(out))
        say(f"answered: {manifest.metrics['answered']}, quarantined: {manifest.metrics['quarantined']}")
        for name, path in manifest.outputs.items():
            say(f"{name}: {storage.join(output, path)}")

    guarded(work, debug)
