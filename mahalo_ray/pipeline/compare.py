"""The comparison of MAH-DPO with its baselines: the run's stages, and those that `mahalo compare` adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from mahalo_ray.config import BaselineName, PolicyConfig, PolicyMethod, RunConfig
from mahalo_ray.data import storage
from mahalo_ray.data.temporary import temporary_folder
from mahalo_ray.evaluation.claims import comparison_claims
from mahalo_ray.evaluation.guided_table import (
    SUM,
    UNGUIDED,
    GuidedRow,
    PlayedPolicy,
    guided_rows,
    markdown_of,
    print_guided_rows,
)
from mahalo_ray.evaluation.methods import Method
from mahalo_ray.evaluation.report import (
    ReportContents,
    print_claims,
    print_families,
    print_table,
    write_report,
)
from mahalo_ray.evaluation.results import (
    BASELINES,
    ComparisonTable,
    Family,
    FamilyCost,
    FamilyFront,
    MethodKind,
    family_fronts,
)
from mahalo_ray.models.soup import average_models
from mahalo_ray.objectives import Weights
from mahalo_ray.pipeline import run
from mahalo_ray.pipeline.evaluating import (
    measurement,
    other_methods,
    play,
    policy_at,
    samples,
    table_of,
    wide_enough,
)
from mahalo_ray.pipeline.rounds import all_rounds, last_stage
from mahalo_ray.pipeline.run import method_version, sections, train_heads
from mahalo_ray.pipeline.stages import Context, Manifest, Pipeline, Stage, StageResult
from mahalo_ray.pipeline.sweeping import check_heads, in_order, same_vector, unguided_vectors

SOUPS = "compare/soups"


@dataclass(frozen=True)
class BaselinePolicy:
    """One policy of a baseline: a row of the table. `stage` makes it, as its output `model`."""

    method: BaselineName
    name: str
    weights: Weights
    stage: str
    model: str = "model"


def baseline_policies(config: RunConfig) -> list[BaselinePolicy]:
    """All policies of `compare.baselines`, in that order."""
    names = config.objective_names
    return [
        _policy(config, baseline.method, weights)
        for baseline in config.compare.baselines
        for weights in baseline.vectors(names, config.sweep)
    ]


def _policy(config: RunConfig, method: BaselineName, weights: Weights) -> BaselinePolicy:
    if method == "dpo":
        objective = next(iter(weights))
        return BaselinePolicy(method, f"DPO {objective}", weights, _dpo_stage(objective))
    vector = in_order(config, weights)
    slug, name = vector.replace(" / ", "-"), "MODPO" if method == "modpo" else method
    if method == "soup":
        return BaselinePolicy(method, f"{name} {vector}", weights, SOUPS, slug)
    return BaselinePolicy(method, f"{name} {vector}", weights, f"compare/{method}-{slug}")


def _dpo_stage(objective: str) -> str:
    return f"compare/dpo-{objective}"


def training_stages(config: RunConfig, method: BaselineName) -> list[str]:
    """The stages whose trainings a baseline is made of; a soup is made of the DPO policies."""
    if method == "soup":
        return [_dpo_stage(objective) for objective in config.objective_names]
    return [policy.stage for policy in baseline_policies(config) if policy.method == method]


def trainings(config: RunConfig) -> dict[str, PolicyConfig]:
    """What each training stage trains, by its name."""
    by_stage: dict[str, PolicyConfig] = {}
    names = config.objective_names
    for baseline in config.compare.baselines:
        if baseline.method == "dpo" or baseline.method == "soup":
            by_stage |= {_dpo_stage(name): policy_settings(config, "dpo", name) for name in names}
            continue
        for weights in baseline.vectors(names, config.sweep):
            objective = baseline.pairs_of(weights, names) if baseline.method == "modpo" else None
            stage = _policy(config, baseline.method, weights).stage
            by_stage[stage] = policy_settings(config, baseline.method, objective, weights)
    return by_stage


def policy_settings(
    config: RunConfig,
    method: PolicyMethod,
    objective: str | None = None,
    mixture: Mapping[str, float] | None = None,
) -> PolicyConfig:
    """The run's `policy` section for another method, at an equal budget: every pair is seen as often.

    `alpha` and `extends` are MAH-DPO's alone. Figures that are measured while training are left out, unless
    a KL budget, which all methods get, rests on them.
    """
    policy, mixture = config.policy, dict(mixture or {})
    if policy.balance != "own":
        raise ValueError(
            "'policy.balance' is 'sampled', and baselines train a pair under its own objective's head: "
            "compare a run with 'balance: own', and set both runs side by side with `mahalo front RUN RUN`"
        )
    if method == "modpo" and policy.loss != "sigmoid":
        raise ValueError(
            f"'policy.loss' is '{policy.loss}', and MODPO is defined for 'sigmoid' only: leave it out of "
            "'compare.baselines'"
        )
    trained = [name for name in config.objective_names if mixture.get(name, 0.0) > 0]
    trained = trained if objective is None else [objective]
    pairs_per_step = policy.training.batch_size * len(trained) // len(config.objective_names)
    shared = policy.unmeasured("alpha", "extends")
    return PolicyConfig.model_validate(
        {
            **shared,
            "method": method,
            "objective": objective,
            "mixture": mixture,
            "beta": {name: policy.beta_of(name) for name in trained},
            "training": {**shared["training"], "batch_size": pairs_per_step},
        }
    )


def baseline_stages(config: RunConfig) -> list[Stage[RunConfig]]:
    """One stage per training, and one that averages the soups."""
    pairs = last_stage(config, "pairs")
    stages = [_training_stage(name, settings, pairs) for name, settings in trainings(config).items()]
    soups = [policy for policy in baseline_policies(config) if policy.method == "soup"]
    if soups:
        vectors = [dict(soup.weights) for soup in soups]
        stages.append(
            Stage(
                SOUPS,
                "Average the DPO policies",
                lambda context: _average_all(context, soups),
                lambda config: vectors,
                needs=tuple(training_stages(config, "soup")),
                uses_ray=False,
            )
        )
    return stages


def _training_stage(name: str, settings: PolicyConfig, pairs_stage: str) -> Stage[RunConfig]:
    """The `policy` stage with these settings, on the pairs of all rounds."""

    def train(context: Context[RunConfig]) -> StageResult:
        config = context.config.model_copy(update={"policy": settings})
        return train_heads(replace(context, config=config), context.input("sft", "model"), pairs_stage)

    def config_of(config: RunConfig) -> dict[str, Any]:
        rest = sections("pairs.held_out_fraction", "objective_names", "model")(config)
        # The comparison never had MODPO's first version.
        return {**rest, "policy": settings.shaping(), **method_version(settings, since=2)}

    title = f"Train {name.removeprefix('compare/')}"
    return Stage(name, title, train, config_of, needs=("sft", pairs_stage), resumes=True)


def _average_all(context: Context[RunConfig], soups: Sequence[BaselinePolicy]) -> StageResult:
    """An ordinary model per weight vector: the average of the objectives' DPO policies."""
    config = context.config
    folders = {
        name: storage.local_copy(context.input(_dpo_stage(name), "model")) for name in config.objective_names
    }
    context.progress.start(len(soups), "weight vectors")
    for soup in soups:
        with temporary_folder("soup") as folder:
            average_models(folders, soup.weights, folder)
            storage.upload_folder(folder, context.path(soup.model))
        context.progress.advance()
    return StageResult(outputs={soup.model: soup.model for soup in soups})


PLAY, PLAY_GUIDED, REPORT = "compare/play", "compare/guided", "compare/report"
PLAYED = ("evaluate", "sweep", PLAY)
EQUAL = (
    "start, reference, pairs, held-out dialogues, learning rates, beta, schedule, seed, and how often each "
    "pair is seen"
)

Upstream = Mapping[str, tuple[str, Manifest]]


def comparison_pipeline(config: RunConfig) -> Pipeline[RunConfig]:
    """The run's own stages, one per baseline policy to train, the soups, and the table over all.

    ValueError where the run has no policy with a head per objective to compare.
    """
    check_heads(config)
    if config.sweep.kind == "training":
        raise ValueError(
            "'sweep.kind' is 'training': `mahalo compare` sets one policy at many decoding weights against "
            "its baselines; run it with the sweep over decoding weights, and `mahalo front` for both fronts"
        )
    names = config.objective_names
    for number, baseline in enumerate(config.compare.baselines):
        if not baseline.vectors(names, config.sweep):
            raise ValueError(
                f"'compare.baselines.{number}.weights' is missing: 'sweep' has no list of decoding weights "
                "to take them from"
            )
    baselines = baseline_stages(config)
    baseline_names = tuple(stage.name for stage in baselines)

    def played_settings(config: RunConfig) -> dict[str, Any]:
        rows = [method.name for method in _policy_rows(config)]
        rows += [policy.name for policy in baseline_policies(config)]
        return {"rows": rows, **run.sections("evaluation", "objective_names", "model.dtype")(config)}

    guided = Stage(
        PLAY_GUIDED,
        "Play all of them guided",
        play_guided,
        lambda config: {**played_settings(config), **run.sections("guided")(config)},
        needs=("sft", "reward", last_stage(config, "policy"), *baseline_names),
        resumes=True,
    )
    plays = [PLAY, *([PLAY_GUIDED] if config.compare.guided else [])]
    return Pipeline(
        [
            *run.pipeline(config).stages.values(),
            *baselines,
            Stage(
                PLAY,
                "Play the baselines",
                play_baselines,
                played_settings,
                needs=("sft", "reward", last_stage(config, "policy"), *baseline_names),
                version=2,  # students with problems of no training dialogue
                resumes=True,
            ),
            *([guided] if config.compare.guided else []),
            Stage(
                REPORT,
                "Compare the methods",
                report,
                run.sections("name", "objectives", "evaluation", "sweep", "guided", "compare"),
                needs=(*all_rounds(config, "policy"), "evaluate", "sweep", *baseline_names, *plays),
                uses_ray=False,
            ),
        ]
    )


def play_baselines(context: Context[RunConfig]) -> StageResult:
    """Every baseline policy, and MAH-DPO at weights of theirs that it was not played at, against the students
    of the sweep."""
    return play(context, [*_policy_rows(context.config), *_baseline_methods(context)])


def _baseline_methods(context: Context[RunConfig]) -> list[Method]:
    return [
        Method(
            policy.name,
            policy.method,
            weights=policy.weights,
            model_url=context.input(policy.stage, policy.model),
        )
        for policy in baseline_policies(context.config)
    ]


def play_guided(context: Context[RunConfig]) -> StageResult:
    """SFT, every head, the policy and every baseline under every guide, but for what the run itself has
    played."""
    config = context.config
    bases = [m for m in other_methods(config) if m.guidance is None] + _baseline_methods(context)
    if not any(method.kind == "weights" for method in bases):  # the sweep has it
        bases.append(Method(policy_at(config, config.guided.point[0]), "weights", config.guided.point[0]))
    guided = [
        replace(
            base,
            name=guided_name(config, base.name, guide),
            kind=_guided_kind(base),
            guidance=weights,
            num_candidates=config.guided.num_candidates,
            sweep=False,
        )
        for base in bases
        for guide, weights in _guides(config).items()
    ]
    known = {method.name for method in other_methods(config)}
    return play(context, [method for method in guided if method.name not in known])


def _guides(config: RunConfig) -> dict[str, Weights]:
    """Each objective's scores alone, and their weighted sum."""
    return {**{name: Weights.one(name) for name in config.objective_names}, SUM: config.guided.point[1]}


def _guided_kind(base: Method) -> MethodKind:
    if base.kind in BASELINES:
        return base.kind
    return "guided_sft" if base.kind == "sft" else "guided"


def guided_name(config: RunConfig, policy: str, guide: str) -> str:
    """The name of a policy's row under a guide; SFT and the policy under the sum are rows of every run."""
    rows = {("SFT", SUM): "guided SFT", (policy_at(config, config.guided.point[0]), SUM): "guided policy"}
    return rows.get((policy, guide), f"{policy}, guided by {guide}")


def compared_policies(config: RunConfig) -> list[PlayedPolicy]:
    """The rows of the table by guide: SFT, the baselines, then MAH-DPO's heads and its policy."""
    names = ["SFT", *(policy.name for policy in baseline_policies(config))]
    names += [f"{name} head" for name in config.objective_names]
    names.append(policy_at(config, config.guided.point[0]))
    return [
        PlayedPolicy(
            name, {UNGUIDED: name, **{guide: guided_name(config, name, guide) for guide in _guides(config)}}
        )
        for name in names
    ]


def _policy_rows(config: RunConfig) -> list[Method]:
    """MAH-DPO at those weight vectors of the baselines at which the run itself has not played it."""
    vectors = unguided_vectors(config)
    vectors += [m.weights for m in other_methods(config) if m.kind != "guided" and m.weights is not None]
    missing: list[Weights] = []
    for policy in baseline_policies(config):
        if not any(same_vector(config, policy.weights, other) for other in (*vectors, *missing)):
            missing.append(policy.weights)
    return [Method(policy_at(config, weights), "weights", weights=weights) for weights in missing]


def report(context: Context[RunConfig]) -> StageResult:
    """Table, families, claims and picture, as the run's own report has them."""
    config = context.config
    documents, table, fronts = _comparison(config, context.upstream)
    claims = comparison_claims(table, fronts)
    contents = ReportContents(
        title=f"{config.name}: MAH-DPO and its baselines",
        summary="One policy with a head per objective, against policies made for one weight vector each.",
        measurement={**measurement(config), "equal for all trainings": EQUAL},
        timings={name: manifest.seconds for name, (_, manifest) in context.upstream.items()},
        samples=samples(config, documents),
    )
    write_report(context.folder, table, claims, contents, fronts)
    if config.compare.guided:
        write_guided_table(context.folder, guided_table(config, context.upstream), config.objective_names)
    figures = {"claims": len(claims), "claims_that_hold": sum(claim.holds for claim in claims)}
    return StageResult(figures, {"results": "results.json", "page": "report.html", "picture": "front.png"})


def guided_table(config: RunConfig, upstream: Upstream) -> list[GuidedRow]:
    """Every policy by guide, from what was played."""
    documents = played_documents(upstream, (*PLAYED, PLAY_GUIDED))
    return guided_rows(table_of(config, documents), compared_policies(config))


def played_documents(upstream: Upstream, stages: Sequence[str]) -> list[dict[str, Any]]:
    """What `play` wrote in these stages: each method's result and samples."""
    return [d for stage in stages for d in storage.read_json(_output(upstream, stage, "methods"))]


def write_guided_table(folder: str, rows: Sequence[GuidedRow], objectives: Sequence[str]) -> None:
    """`guided.json` and `guided.md`."""
    storage.write_json(storage.join(folder, "guided.json"), [row.model_dump() for row in rows])
    storage.write_bytes(storage.join(folder, "guided.md"), markdown_of(rows, objectives).encode())


def _comparison(
    config: RunConfig, upstream: Upstream
) -> tuple[list[dict[str, Any]], ComparisonTable, list[FamilyFront]]:
    documents = played_documents(upstream, PLAYED)
    table = table_of(config, documents)
    return documents, table, family_fronts(table, family_costs(config, upstream))


def family_costs(config: RunConfig, upstream: Upstream) -> dict[Family, FamilyCost]:
    """MAH-DPO first, then the baselines in their order."""
    rounds = all_rounds(config, "policy")
    batches = {**dict.fromkeys(rounds, config.policy), **trainings(config)}

    def cost(stages: list[str], models: list[str]) -> FamilyCost:
        pairs = [upstream[s][1].metrics["step"] * batches[s].training.batch_size for s in stages]
        stored = sum(_parameter_bytes(model) for model in models)
        return FamilyCost(
            training_runs=len(stages),
            pairs_trained=round(sum(pairs)),
            models=len(models),
            parameter_bytes=stored,
        )

    costs: dict[Family, FamilyCost] = {"mah_dpo": cost(rounds, [_output(upstream, rounds[-1], "model")])}
    for baseline in config.compare.baselines:
        policies = [policy for policy in baseline_policies(config) if policy.method == baseline.method]
        models = [_output(upstream, policy.stage, policy.model) for policy in policies]
        costs[baseline.method] = cost(training_stages(config, baseline.method), models)
    return costs


def _output(upstream: Upstream, stage: str, output: str) -> str:
    folder, manifest = upstream[stage]
    return storage.join(folder, manifest.outputs[output])


def _parameter_bytes(model: str) -> int:
    """Bytes of a model folder's safetensors files: its own, and its backbone's or adapter's."""
    fs, path = storage.filesystem(model)
    return sum(fs.size(file) for file in fs.find(path) if file.endswith(".safetensors"))


def print_comparison(console: Console, config: RunConfig, manifests: Mapping[str, Manifest]) -> None:
    """Print the tables and claims of a finished comparison, and the path of its page."""
    output = storage.absolute(config.output)
    upstream = {name: (storage.join(output, name), manifest) for name, manifest in manifests.items()}
    _, table, fronts = _comparison(config, upstream)
    wide = wide_enough(console)
    wide.print()
    print_table(wide, table)
    wide.print()
    print_families(wide, fronts)
    if config.compare.guided:
        wide.print()
        print_guided_rows(wide, guided_table(config, upstream), config.objective_names)
    wide.print()
    print_claims(wide, comparison_claims(table, fronts))
    page = storage.join(config.output, REPORT, manifests[REPORT].outputs["page"])
    wide.print(f"\nReport: {page}", markup=False, soft_wrap=True)
