"""The baselines that a comparison makes: their settings, and the stages that train or average them.

Every training is the `policy` stage with another PolicyConfig: same recipe, same start and reference (SFT),
same pairs and held-out dialogues, same learning rates, beta, schedule and seed. A batch has as many pairs of
each objective that is trained on as MAH-DPO's, so each pair is seen as often and a run takes as many steps;
a policy for one objective therefore sees that objective's share of MAH-DPO's pairs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mahalo_ray.config import BaselineName, PolicyConfig, RunConfig
from mahalo_ray.data import storage
from mahalo_ray.models.soup import average_models
from mahalo_ray.objectives import Weights
from mahalo_ray.pipeline.evaluating import in_order
from mahalo_ray.pipeline.heads import method_version, train_heads
from mahalo_ray.pipeline.stages import Context, Stage, StageResult
from mahalo_ray.pipeline.steps import sections

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
    found: dict[str, PolicyConfig] = {}
    names = config.objective_names
    for baseline in config.compare.baselines:
        if baseline.method == "dpo" or baseline.method == "soup":
            found |= {_dpo_stage(name): policy_settings(config, "dpo", name) for name in names}
            continue
        for weights in baseline.vectors(names, config.sweep):
            objective = baseline.pairs_of(weights, names) if baseline.method == "modpo" else None
            stage = _policy(config, baseline.method, weights).stage
            found[stage] = policy_settings(config, baseline.method, objective, weights)
    return found


def policy_settings(
    config: RunConfig,
    method: Literal["dpo", "scalarised", "modpo"],
    objective: str | None = None,
    mixture: Mapping[str, float] | None = None,
) -> PolicyConfig:
    """The run's `policy` section for another method, at an equal budget (see the top of this file).

    `alpha` is MAH-DPO's alone; figures that are measured while training are left out.
    """
    policy, mixture = config.policy, dict(mixture or {})
    if method == "modpo" and policy.loss != "sigmoid":
        raise ValueError(
            f"'policy.loss' is '{policy.loss}', and MODPO is defined for 'sigmoid' only: leave it out of "
            "'compare.baselines'"
        )
    trained = [name for name in config.objective_names if mixture.get(name, 0.0) > 0]
    trained = trained if objective is None else [objective]
    pairs_per_step = policy.training.batch_size * len(trained) // len(config.objective_names)
    shared = policy.model_dump(exclude={"alpha", "metrics_every_steps", "metrics_rows", "gradient_cosine"})
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


def baseline_stages(config: RunConfig) -> list[Stage]:
    """One stage per training, and one that averages the soups."""
    stages = [_training_stage(name, settings) for name, settings in trainings(config).items()]
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


def _training_stage(name: str, settings: PolicyConfig) -> Stage:
    """The `policy` stage with these settings."""

    def train(context: Context) -> StageResult:
        config = context.config.model_copy(update={"policy": settings})
        return train_heads(replace(context, config=config), context.input("sft", "model"))

    def config_of(config: RunConfig) -> dict[str, Any]:
        rest = sections("pairs.held_out_fraction", "objective_names", "model")(config)
        # The comparison never had MODPO's first version.
        return {**rest, "policy": settings.model_dump(mode="json"), **method_version(settings, since=2)}

    title = f"Train {name.removeprefix('compare/')}"
    return Stage(name, title, train, config_of, needs=("sft", "pairs"), resumes=True)


def _average_all(context: Context, soups: Sequence[BaselinePolicy]) -> StageResult:
    """An ordinary model per weight vector: the average of the objectives' DPO policies."""
    config = context.config
    folders = {
        name: storage.local_copy(context.input(_dpo_stage(name), "model")) for name in config.objective_names
    }
    context.progress.start(len(soups), "weight vectors")
    for soup in soups:
        with tempfile.TemporaryDirectory(prefix="mahalo-soup-") as folder:
            average_models(folders, soup.weights, folder)
            storage.upload_folder(folder, context.path(soup.model))
        context.progress.advance()
    return StageResult(outputs={soup.model: soup.model for soup in soups})
