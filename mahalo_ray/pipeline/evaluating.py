"""The last stages: the methods beside the sweep, and the report over all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console

from mahalo_ray.config import RubricJudgeConfig, RunConfig
from mahalo_ray.data import storage
from mahalo_ray.data.records import Dialogue
from mahalo_ray.domains.protocol import Speaker, load_domain
from mahalo_ray.evaluation.claims import check_claims
from mahalo_ray.evaluation.methods import Method, Played
from mahalo_ray.evaluation.report import (
    EvenFront,
    ReportContents,
    SampleDialogue,
    SampleTurn,
    print_claims,
    print_table,
    write_report,
)
from mahalo_ray.evaluation.results import ComparisonTable, MethodResult
from mahalo_ray.objectives import Weights
from mahalo_ray.pipeline.rounds import all_rounds
from mahalo_ray.pipeline.stages import Context, Manifest, StageResult
from mahalo_ray.pipeline.sweeping import (
    METHODS,
    comparison_table,
    document_of,
    in_order,
    methods_progress,
    play_spec,
    same_vector,
    sweep_stage,
    unguided_vectors,
)
from mahalo_ray.sweeps.decoding import mean_and_error, play_methods
from mahalo_ray.sweeps.front_metrics import coefficient_of_variation, segment_lengths
from mahalo_ray.sweeps.sweep_table import SweepTable

PLAIN_WIDTH = 120  # columns of the table where the output is not a terminal


def policy_at(config: RunConfig, weights: Weights) -> str:
    """`weights 0.7 / 0.3`: the name of the policy at these decoding weights."""
    return f"weights {in_order(config, weights)}"


def other_methods(config: RunConfig) -> list[Method]:
    """SFT, guided SFT, each head alone, the guided policy, and the same policy unguided unless the sweep has
    it."""
    guided = config.guided
    weights, guidance = guided.point
    methods = [
        Method("SFT", "sft"),
        Method("guided SFT", "guided_sft", guidance=guidance, num_candidates=guided.num_candidates),
        *(Method(f"{name} head", "head", weights=Weights.one(name)) for name in config.objective_names),
        Method("guided policy", "guided", weights, guidance, guided.num_candidates),
    ]
    if not any(same_vector(config, weights, vector) for vector in unguided_vectors(config)):
        methods.append(Method(policy_at(config, weights), "weights", weights=weights, sweep=False))
    return methods


def evaluate(context: Context[RunConfig]) -> StageResult:
    """The methods that the sweep is compared with, against the same students as the sweep."""
    return play(context, other_methods(context.config))


def play(context: Context[RunConfig], methods: list[Method]) -> StageResult:
    """Every method against the run's fresh students; needs the stages sft, policy and reward."""
    played = play_methods(play_spec(context), methods, context.config.cluster, methods_progress(context))
    storage.write_json(context.path(METHODS), [document_of(one) for one in played])
    metrics = {one.result.name: one.result.means for one in played}
    return StageResult(metrics, {"methods": METHODS})


def report(context: Context[RunConfig]) -> StageResult:
    """The table, what it shows in words, and how it was measured, as a page, a picture and JSON."""
    config = context.config
    files = [context.input(stage, "methods") for stage in ("evaluate", sweep_stage(config))]
    documents = [document for file in files for document in storage.read_json(file)]
    table = table_of(config, documents)
    claims = check_claims(table)
    write_report(
        context.folder, table, claims, _contents(context, documents), even=even_front(context, table)
    )
    figures = {
        "claims": len([c for c in claims if c.required]),
        "claims_that_hold": len([c for c in claims if c.required and c.holds]),
        "hypervolume": table.hypervolume_of_all(),
    }
    return StageResult(figures, {"results": "results.json", "page": "report.html", "picture": "front.png"})


def even_front(context: Context[RunConfig], table: ComparisonTable) -> EvenFront | None:
    """The last round of the sweep's sampler, unguided; None where the sweep has no list beside it, or no
    sampler."""
    config = context.config
    if not config.sweep.weights or config.sweep.sampler is None:
        return None
    points = SweepTable.load(context.input(sweep_stage(config), "front")).played
    plain = (p for p in points if p.guidance is None and p.strength == 1 and p.temperature is None)
    asked = {p.method for p in plain if p.last_round}
    documents = storage.read_json(context.input(sweep_stage(config), "points"))
    even = [MethodResult.model_validate(d["result"]) for d in documents if d["result"]["name"] in asked]
    listed = [table.methods[index] for index in table.sweep_indices]
    if len(even) < 2 or len(config.objective_names) < 2:
        return None
    return EvenFront(
        config.sweep.sampler,
        comparison_table(config, even),
        _cv_of_gaps(even, config.objective_names),
        _cv_of_gaps(listed, config.objective_names),
    )


def _cv_of_gaps(results: list[MethodResult], objectives: tuple[str, ...]) -> float:
    statistics = [mean_and_error(Played(result, []), objectives) for result in results]
    means, errors = (np.stack(column) for column in zip(*statistics, strict=True))
    return coefficient_of_variation(segment_lengths(means, errors))


def table_of(config: RunConfig, documents: list[dict[str, Any]]) -> ComparisonTable:
    """The table over what `play` wrote."""
    return comparison_table(config, [MethodResult.model_validate(d["result"]) for d in documents])


def _contents(context: Context[RunConfig], documents: list[dict[str, Any]]) -> ReportContents:
    config = context.config
    trained = ("sft", "reward", *all_rounds(config, "policy"))
    offered = load_domain(config.domain).objectives
    described = [f"{o.name} ({o.description or offered[o.name].description})" for o in config.objectives]
    return ReportContents(
        title=config.name,
        summary=f"One policy, aligned to {' and '.join(described)}.",
        measurement=measurement(config),
        timings={name: manifest.seconds for name, (_, manifest) in context.upstream.items()},
        samples=samples(config, documents),
        history={name: storage.read_json(context.input(name, "history")) for name in trained},
        reward_metrics=_reward_metrics(context.metrics_of("reward"), config.objective_names),
    )


def measurement(config: RunConfig) -> dict[str, str | int | float]:
    """How the rows of a table were measured."""
    return {
        "seed": config.seed,
        "dialogues per method": config.evaluation.dialogues,
        "problems": "fresh, of no training dialogue; the same for every method",
        "judges": _judges(config),
        "temperature": config.evaluation.sampling.temperature,
        "guidance candidates": config.guided.num_candidates,
        **({"rounds": config.rounds} if config.rounds > 1 else {}),
    }


def _judges(config: RunConfig) -> str:
    judges = {} if config.domain.prompts is None else config.domain.prompts.judges
    asked = [
        f"{name}: {judge.endpoint.model} behind an endpoint"
        for name, judge in judges.items()
        if isinstance(judge, RubricJudgeConfig)
    ]
    programs = ["programs of the domain"] if len(asked) < len(judges) or not judges else []
    return f"{', '.join([*programs, *asked])}, independent of the reward model that guides"


def samples(config: RunConfig, documents: list[dict[str, Any]]) -> list[SampleDialogue]:
    """A dialogue of every method, its sides called as in the run's domain."""
    model, other = load_domain(config.domain).speakers
    names = {"tutor": model, "student": other}
    return [_sample(Dialogue.model_validate(d["samples"][0]), names) for d in documents]


def _sample(dialogue: Dialogue, names: dict[str, Speaker]) -> SampleDialogue:
    turns = [SampleTurn(speaker=names[turn.speaker], content=turn.content) for turn in dialogue.turns]
    return SampleDialogue(method=dialogue.source, topic=dialogue.topic, turns=turns, outcome=dialogue.outcome)


def _reward_metrics(metrics: dict[str, float], objectives: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """`accuracy/correlation: 0.8` -> accuracy -> correlation -> 0.8."""
    by_objective: dict[str, dict[str, float]] = {name: {} for name in objectives}
    for key, value in metrics.items():
        objective, slash, metric = (
            key.rpartition("/")[0].rpartition("/")[2],
            "/" in key,
            key.rpartition("/")[2],
        )
        if slash and objective in by_objective:
            by_objective[objective][metric] = value
    return by_objective


def print_outcome(console: Console, config: RunConfig, manifests: dict[str, Manifest]) -> None:
    """Print the table and the claims of a finished report, and the path of its page."""
    output = storage.absolute(config.output)
    documents = []
    for stage in ("evaluate", sweep_stage(config)):
        documents += storage.read_json(storage.join(output, stage, manifests[stage].outputs["methods"]))
    table = table_of(config, documents)
    wide = wide_enough(console)
    wide.print()
    print_table(wide, table)
    wide.print()
    print_claims(wide, check_claims(table))
    page = storage.join(config.output, "report", manifests["report"].outputs["page"])
    wide.print(f"\nReport: {page}", markup=False, soft_wrap=True)


def wide_enough(console: Console) -> Console:
    """A console that a table fits, where the output is not a terminal."""
    if console.is_terminal:
        return console
    return Console(file=console.file, width=PLAIN_WIDTH, highlight=False)
