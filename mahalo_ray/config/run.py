"""The whole run as one typed document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from mahalo_ray.config.compare import CompareConfig
from mahalo_ray.config.own_data import DataConfig, PairsSource, TracesSource
from mahalo_ray.config.policy import PolicyConfig
from mahalo_ray.config.section import (
    NonNegativeInt,
    Section,
)
from mahalo_ray.config.stages import (
    ClusterConfig,
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

# What a run on own data has no use for: setting it is an error, never ignored.
_ROLLOUT_SECTIONS = (
    *("domain", "sft", "reward_rollouts", "pair_rollouts"),
    *("sweep", "guided", "evaluation", "compare", "serve"),
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
    compare: CompareConfig = CompareConfig()
    serve: ServeConfig = ServeConfig()

    @property
    def objective_names(self) -> tuple[str, ...]:
        """Names in config order: the order of heads, scores and table columns."""
        return tuple(objective.name for objective in self.objectives)

    @property
    def trains_policy(self) -> bool:
        """Whether there is a policy to train: not on own step traces."""
        return self.data is None or not self.data.traces

    @model_validator(mode="after")
    def _rollouts_or_own_data(self) -> Self:
        if self.data is None:
            given = {"sweep.weights": self.sweep.weights, "guided.weights": self.guided.weights}
            given["guided.guidance"] = self.guided.guidance
            for key, value in given.items():
                if not value:
                    raise ValueError(f"'{key}' is missing: only a run on own data ('data') goes without it")
            if self.reward.dedicated:
                raise ValueError("'reward.dedicated' is for runs on own data ('data')")
            return self
        if self.model.base is None:
            raise ValueError("'data' needs 'model.base': a model made from scratch has nothing to align")
        unused = _ROLLOUT_SECTIONS if self.trains_policy else (*_ROLLOUT_SECTIONS, "pairs", "policy")
        for name in unused:
            if self._is_set(name):
                raise ValueError(f"'{name}' is set, but this run on own data ('data') makes no use of it")
        unused_of_pairs = self.pairs.model_dump(exclude={"held_out_fraction"})
        if unused_of_pairs != PairsConfig().model_dump(exclude={"held_out_fraction"}):
            raise ValueError("of 'pairs', a run on own data ('data') uses 'held_out_fraction' alone")
        for name in ("rollout_actors", "cpus_per_rollout_actor"):
            if getattr(self.cluster, name) != ClusterConfig.model_fields[name].default:
                raise ValueError(f"'cluster.{name}' is set, but a run on own data ('data') has no rollouts")
        self._check_sources(self.data)
        return self

    def _is_set(self, section: str) -> bool:
        default = type(self).model_fields[section].default
        return bool(getattr(self, section).model_dump() != default.model_dump())

    def _check_sources(self, data: DataConfig) -> None:
        """Every objective has its kind of source, every source a known objective."""
        sources: dict[str, Sequence[PairsSource | TracesSource]]
        sources = {"pairs": data.pairs, "traces": data.traces}
        for index, objective in enumerate(self.objectives):
            wanted, there = (
                ("pairs", data.pairs) if objective.supervision == "pairwise" else ("traces", data.traces)
            )
            if not there:
                raise ValueError(
                    f"'objectives.{index}.supervision' is {objective.supervision}: it needs 'data.{wanted}'"
                )
        for kind, own in sources.items():
            for index, source in enumerate(own):
                if source.objective is not None and source.objective not in self.objective_names:
                    unknown = unknown_name("objective", source.objective, self.objective_names)
                    raise ValueError(f"'data.{kind}.{index}.objective': {unknown}")
        named = [name for group in self.reward.dedicated for name in group]
        for name in named:
            if name not in self.objective_names:
                raise ValueError(
                    f"'reward.dedicated': {unknown_name('objective', name, self.objective_names)}"
                )
            if named.count(name) > 1:
                raise ValueError(f"'reward.dedicated' names '{name}' twice")

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
        self.compare.check_objectives(names, self.sweep)
        return self
