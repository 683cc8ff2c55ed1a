"""The comparison of MAH-DPO with its baselines: the run's stages, and those that `mahalo compare` adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from mahalo_ray.config import RunConfig
from mahalo_ray.data import storage
from mahalo_ray.evaluation.claims import comparison_claims
from mahalo_ray.evaluation.families import FamilyCost, FamilyFront, family_fronts
from mahalo_ray.evaluation.methods import Method
from mahalo_ray.evaluation.outcomes import Family
from mahalo_ray.evaluation.report import ReportContents, write_report
from mahalo_ray.evaluation.results import ComparisonTable
from mahalo_ray.evaluation.terminal import print_claims, print_families, print_table
from mahalo_ray.objectives import Weights
from mahalo_ray.pipeline import steps
from mahalo_ray.pipeline.compare_policies import (
    baseline_policies,
    baseline_stages,
    training_stages,
    trainings,
)
from mahalo_ray.pipeline.evaluating import (
    check_heads,
    measurement,
    other_methods,
    play,
    policy_at,
    same_vector,
    samples,
    sweep_methods,
    table_of,
    wide_enough,
)
from mahalo_ray.pipeline.fingerprint import Manifest
from mahalo_ray.pipeline.stages import Context, Pipeline, Stage, StageResult

PLAY, REPORT = "compare/play", "compare/report"
PLAYED = ("evaluate", "sweep", PLAY)
EQUAL = (
    "start, reference, pairs, held-out dialogues, learning rates, beta, schedule, seed, and how often each "
    "pair is seen"
)

Upstream = Mapping[str, tuple[str, Manifest]]


def comparison_pipeline(config: RunConfig) -> Pipeline:
    """The run's own stages, one per baseline policy to train, the soups, and the table over all.

    ValueError where the run has no policy with a head per objective to compare.
    """
    check_heads(config)
    baselines = baseline_stages(config)
    made = tuple(stage.name for stage in baselines)

    def played_settings(config: RunConfig) -> dict[str, Any]:
        rows = [method.name for method in _policy_rows(config)]
        rows += [policy.name for policy in baseline_policies(config)]
        return {"rows": rows, **steps.sections("evaluation", "objective_names", "model.dtype")(config)}

    return Pipeline(
        [
            *steps.PIPELINE.stages.values(),
            *baselines,
            Stage(
                PLAY,
                "Play the baselines",
                play_baselines,
                played_settings,
                needs=("sft", "reward", "policy", *made),
                resumes=True,
            ),
            Stage(
                REPORT,
                "Compare the methods",
                report,
                steps.sections("name", "objectives", "evaluation", "sweep", "guided", "compare"),
                needs=("policy", "evaluate", "sweep", *made, PLAY),
                uses_ray=False,
            ),
        ]
    )


def play_baselines(context: Context) -> StageResult:
    """Every baseline policy, and MAH-DPO at weights of theirs that it was not played at, against the students
    of the sweep."""
    baselines = [
        Method(
            policy.name,
            policy.method,
            weights=policy.weights,
            model_url=context.input(policy.stage, policy.model),
        )
        for policy in baseline_policies(context.config)
    ]
    return play(context, [*_policy_rows(context.config), *baselines])


def _policy_rows(config: RunConfig) -> list[Method]:
    """MAH-DPO at the baselines' weight vectors that the run itself plays it not at."""
    known = [m.weights for m in (*sweep_methods(config), *other_methods(config)) if m.kind != "guided"]
    vectors = [weights for weights in known if weights is not None]
    missing: list[Weights] = []
    for policy in baseline_policies(config):
        if not any(same_vector(config, policy.weights, other) for other in (*vectors, *missing)):
            missing.append(policy.weights)
    return [Method(policy_at(config, weights), "weights", weights=weights) for weights in missing]


def report(context: Context) -> StageResult:
    """Table, families, claims and picture, as the run's own report has them."""
    config = context.config
    documents, table, fronts = _comparison(config, context.upstream)
    claims = comparison_claims(table, fronts)
    contents = ReportContents(
        title=f"{config.name}: MAH-DPO and its baselines",
        summary="One policy with a head per objective, against policies made for one weight vector each.",
        measurement={**measurement(config), "equal for all trainings": EQUAL},
        timings={name: manifest.seconds for name, (_, manifest) in context.upstream.items()},
        samples=samples(documents),
    )
    write_report(context.folder, table, claims, contents, fronts)
    figures = {"claims": len(claims), "claims_that_hold": sum(claim.holds for claim in claims)}
    return StageResult(figures, {"results": "results.json", "page": "report.html", "picture": "front.png"})


def _comparison(
    config: RunConfig, upstream: Upstream
) -> tuple[list[dict[str, Any]], ComparisonTable, list[FamilyFront]]:
    documents = [d for stage in PLAYED for d in storage.read_json(_output(upstream, stage, "methods"))]
    table = table_of(config, documents)
    return documents, table, family_fronts(table, _costs(config, upstream))


def _costs(config: RunConfig, upstream: Upstream) -> dict[Family, FamilyCost]:
    """MAH-DPO first, then the baselines in their order."""
    batches = {"policy": config.policy, **trainings(config)}

    def cost(stages: list[str], models: list[str]) -> FamilyCost:
        pairs = [upstream[s][1].metrics["step"] * batches[s].training.batch_size for s in stages]
        stored = sum(_parameter_bytes(model) for model in models)
        return FamilyCost(
            training_runs=len(stages),
            pairs_trained=round(sum(pairs)),
            models=len(models),
            parameter_bytes=stored,
        )

    found: dict[Family, FamilyCost] = {"mah_dpo": cost(["policy"], [_output(upstream, "policy", "model")])}
    for baseline in config.compare.baselines:
        own = [policy for policy in baseline_policies(config) if policy.method == baseline.method]
        models = [_output(upstream, policy.stage, policy.model) for policy in own]
        found[baseline.method] = cost(training_stages(config, baseline.method), models)
    return found


def _output(upstream: Upstream, stage: str, output: str) -> str:
    folder, manifest = upstream[stage]
    return storage.join(folder, manifest.outputs[output])


def _parameter_bytes(model: str) -> int:
    """Bytes of a model folder's safetensors files: its own, and its backbone's or adapter's."""
    fs, path = storage.filesystem(model)
    return sum(fs.size(file) for file in fs.find(path) if file.endswith(".safetensors"))


def print_comparison(console: Console, config: RunConfig, manifests: Mapping[str, Manifest]) -> None:
    """What the comparison shows, for the terminal, and where the page lies."""
    output = storage.absolute(config.output)
    upstream = {name: (storage.join(output, name), manifest) for name, manifest in manifests.items()}
    _, table, fronts = _comparison(config, upstream)
    wide = wide_enough(console)
    wide.print()
    print_table(wide, table)
    wide.print()
    print_families(wide, fronts)
    wide.print()
    print_claims(wide, comparison_claims(table, fronts))
    page = storage.join(config.output, REPORT, manifests[REPORT].outputs["page"])
    wide.print(f"\nReport: {page}", markup=False, soft_wrap=True)
