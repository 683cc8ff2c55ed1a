"""The whole run as one typed document."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from mahalo_ray.config.policy import PolicyConfig
from mahalo_ray.config.section import (
    NonNegativeInt,
    Section,
)
from mahalo_ray.config.stages import (
    ClusterConfig,
    DataConfig,
    EvaluationConfig,
    GuidedConfig,
    MiniatureConfig,
    ModelConfig,
    ObjectiveConfig,
    PairsConfig,
    RewardConfig,
    RolloutConfig,
    ServeConfig,
    SftConfig,
    SweepConfig,
)
from mahalo_ray.objectives import unknown_name

_ROLLOUT_SECTIONS = (
    *("domain", "sft", "reward_rollouts", "reward", "pair_rollouts"),
    *("sweep", "guided", "evaluation", "serve"),
)


class RunConfig(Section):
    """One run. `output` is a folder or any fsspec URL that every node can reach."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    output: str
    seed: NonNegativeInt = 17
    domain: MiniatureConfig = MiniatureConfig()
    data: DataConfig | None = None
    objectives: Annotated[list[ObjectiveConfig], Field(min_length=1)]
    cluster: ClusterConfig = ClusterConfig()
    model: ModelConfig
    sft: SftConfig = SftConfig()
    reward_rollouts: RolloutConfig = RolloutConfig(continuations=3)
    reward: RewardConfig = RewardConfig()
    pair_rollouts: RolloutConfig = RolloutConfig()
    pairs: PairsConfig = PairsConfig()
    policy: PolicyConfig = PolicyConfig()
    sweep: SweepConfig = SweepConfig()
    guided: GuidedConfig = GuidedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    serve: ServeConfig = ServeConfig()

    @property
    def objective_names(self) -> tuple[str, ...]:
        """Names in config order: the order of heads, scores and table columns."""
        return tuple(objective.name for objective in self.objectives)

    @model_validator(mode="after")
    def _rollouts_or_own_pairs(self) -> Self:
        if self.data is None:
            given = {"sweep.weights": self.sweep.weights, "guided.weights": self.guided.weights}
            given["guided.guidance"] = self.guided.guidance
            for key, value in given.items():
                if not value:
                    raise ValueError(f"'{key}' is missing: only a run on own pairs ('data') goes without it")
            return self
        if self.model.base is None:
            raise ValueError("'data' needs 'model.base': a model made from scratch has nothing to align")
        for name in _ROLLOUT_SECTIONS:
            if getattr(self, name).model_dump() != type(self).model_fields[name].default.model_dump():
                raise ValueError(f"'{name}' is set, but a run on own pairs ('data') makes no use of it")
        unused = self.pairs.model_dump(exclude={"held_out_fraction"})
        if unused != PairsConfig().model_dump(exclude={"held_out_fraction"}):
            raise ValueError("of 'pairs', a run on own pairs ('data') uses 'held_out_fraction' alone")
        for index, objective in enumerate(self.objectives):
            if objective.supervision != "pairwise":
                raise ValueError(f"'objectives.{index}.supervision': own pairs ('data') are 'pairwise'")
        for index, source in enumerate(self.data.pairs):
            if source.objective is not None and source.objective not in self.objective_names:
                unknown = unknown_name("objective", source.objective, self.objective_names)
                raise ValueError(f"'data.pairs.{index}.objective': {unknown}")
        return self

    @model_validator(mode="after")
    def _objectives_agree(self) -> Self:
        names = self.objective_names
        if len(set(names)) != len(names):
            raise ValueError(f"'objectives' names an objective twice: {', '.join(names)}")
        self.policy.check_objectives(names)
        if self.policy.metrics_every_steps and self.pairs.held_out_fraction == 0:
            raise ValueError(
                "'policy.metrics_every_steps' measures on held-out pairs: "
                "set 'pairs.held_out_fraction' above 0"
            )
        named = {"guided.weights": self.guided.weights, "guided.guidance": self.guided.guidance}
        named |= {f"sweep.weights[{i}]": w for i, w in enumerate(self.sweep.weights)}
        for where, values in named.items():
            for name in values:
                if name not in names:
                    raise ValueError(f"'{where}': {unknown_name('objective', name, names)}")
        return self
