"""A run: the document of `mahalo run` and the sections that only a run has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mahalo_ray.config.section import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section
from mahalo_ray.config.stage_config import (
    ClusterConfig,
    ModelConfig,
    ObjectiveConfig,
    PairsConfig,
    PolicyConfig,
    RewardConfig,
    RolloutConfig,
    SamplingConfig,
    SftConfig,
)
from mahalo_ray.objectives import Weights, unknown_name


class SweepConfig(Section):
    """Decoding weight vectors tried by Ray Tune; each is played against the same fresh students."""

    weights: list[dict[str, Annotated[float, Field(ge=0)]]] = []

    def vectors(self) -> list[Weights]:
        """The weight vectors as points on the simplex."""
        return [Weights(w) for w in self.weights]


class GuidedConfig(Section):
    """PRM-guided decoding at fixed decoding weights (heads) and guidance weights (reward objectives)."""

    num_candidates: PositiveInt = 5
    weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    guidance: dict[str, Annotated[float, Field(ge=0)]] = {}


class EvaluationConfig(Section):
    """Fresh dialogues behind every row of the table."""

    dialogues: PositiveInt = 240
    sampling: SamplingConfig = SamplingConfig()
    bootstrap_resamples: PositiveInt = 2000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95


class ServeConfig(Section):
    """The OpenAI-compatible endpoint. Binds to loopback unless told otherwise; port 0 takes a free one.

    Per replica, up to `max_ongoing_requests` are decoded together and `max_queued_requests` more may wait;
    beyond that the answer is 503 with Retry-After. Requests that arrive within `batch_window_s` seconds
    share a batch.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    replicas: PositiveInt = 1
    cpus_per_replica: PositiveFloat = 1
    max_ongoing_requests: PositiveInt = 16
    max_queued_requests: NonNegativeInt = 64
    batch_window_s: Annotated[float, Field(ge=0, le=10)] = 0.01
    max_candidates: PositiveInt = 16
    max_new_tokens: PositiveInt = 512
    max_messages: PositiveInt = 128
    max_request_bytes: PositiveInt = 1_000_000
    request_timeout_s: PositiveFloat = 60.0
    api_key_env: str | None = None


class MiniatureConfig(Section):
    """The generated tutoring miniature: how much of it is made for SFT, and its world's seed."""

    name: Literal["tutoring_miniature"] = "tutoring_miniature"
    sft_dialogues: PositiveInt = 12000


class PairsSource(Section):
    """A file or folder of preference pairs (see `mahalo_ray.data.pair_readers`), and which objective they are
    for: `objective` for all rows, or `objective_field`, the field of each row that names it. `sample`: share
    of the dialogues that is used, whole dialogues."""

    path: str
    format: Literal["auto", "trl", "mahalo", "records", "truthfulqa"] = "auto"
    objective: str | None = None
    objective_field: str | None = None
    sample: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _one_way_to_the_objective(self) -> Self:
        if (self.objective is None) == (self.objective_field is None):
            raise ValueError(
                "give exactly one of 'objective' (that of all rows) and 'objective_field' (the field of a "
                "row that names it)"
            )
        if self.format == "truthfulqa" and self.objective is None:
            raise ValueError("rows of TruthfulQA name no objective: give 'objective'")
        return self


class TracesSource(Section):
    """A file or folder of step traces (see `mahalo_ray.data.step_readers`). `objective` (or
    `objective_field`, the field of each row that names it) is that of labels which name none.

    `outcome_labels` and `gamma`: where only the outcome is known, it labels the last step, or as
    gamma^(n-t) * outcome every step t of n. `sample`: share of the prompts that is used, whole prompts.
    """

    path: str
    format: str = "auto"
    objective: str | None = None
    objective_field: str | None = None
    label_range: tuple[float, float] = (0.0, 1.0)
    outcome_labels: Literal["last", "all"] = "last"
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    sample: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.objective is not None and self.objective_field is not None:
            raise ValueError("give at most one of 'objective' and 'objective_field'")
        if self.label_range[0] >= self.label_range[1]:
            raise ValueError(f"'label_range' is {list(self.label_range)}: the first must be below the second")
        if self.gamma != 1.0 and self.outcome_labels != "all":
            raise ValueError("'gamma' discounts outcomes over all steps: it goes with 'outcome_labels: all'")
        return self


class DataConfig(Section):
    """Own preference pairs and step traces, in place of a domain's rollouts: reward model or policy are
    trained on them from `model.base`.

    Rows that cannot be used are written to quarantine.parquet; more than `max_bad_fraction` of them is an
    error. `step_separator` ends every step of a trace in the reward model's reading (null: a step is a whole
    turn).
    """

    pairs: list[PairsSource] = []
    traces: list[TracesSource] = []
    step_separator: str | None = "\n\n"
    max_bad_fraction: Fraction = 0.01

    @model_validator(mode="after")
    def _something_to_read(self) -> Self:
        if not self.pairs and not self.traces:
            raise ValueError("give 'pairs', 'traces' or both: there is nothing to read")
        return self


BaselineName = Literal["dpo", "scalarised", "modpo", "soup"]


class BaselineConfig(Section):
    """One baseline. `dpo` is one policy per objective; the others are made for weight vectors.

    `weights`: the vectors that `scalarised` and `modpo` train a policy for, and that `soup` averages the DPO
    policies at; none: those of the sweep. `objective`: the one whose pairs `modpo` trains on; none: at every
    vector the objective with the largest weight (the first of equal ones).
    """

    method: BaselineName
    weights: list[dict[str, Annotated[float, Field(ge=0)]]] = []
    objective: str | None = None

    @model_validator(mode="after")
    def _options_fit_the_method(self) -> Self:
        if self.method == "dpo" and self.weights:
            raise ValueError("'weights' is not used by 'method: dpo', which is one policy per objective")
        if self.method != "modpo" and self.objective is not None:
            raise ValueError(f"'objective' is not used by 'method: {self.method}': leave it out")
        return self

    def vectors(self, objectives: Sequence[str], sweep: SweepConfig) -> list[Weights]:
        """The weight vectors of its policies, in order."""
        if self.method == "dpo":
            return [Weights.one(name) for name in objectives]
        return [Weights(vector) for vector in self.weights or sweep.weights]

    def pairs_of(self, weights: Weights, objectives: Sequence[str]) -> str:
        """The objective whose pairs MODPO trains on for this vector."""
        return self.objective or max(objectives, key=lambda name: weights.get(name, 0.0))

    def check_objectives(self, where: str, names: Sequence[str], sweep: SweepConfig) -> None:
        """See `CompareConfig.check_objectives`; `where` is the key of this baseline."""
        named = {f"{where}.weights.{index}": list(vector) for index, vector in enumerate(self.weights)}
        named[f"{where}.objective"] = [] if self.objective is None else [self.objective]
        for key, mentioned in named.items():
            for name in mentioned:
                if name not in names:
                    raise ValueError(f"'{key}': {unknown_name('objective', name, names)}")
        given = [[f"{value:.3g}" for value in Weights(vector).over(names)] for vector in self.weights]
        if repeated := [vector for vector in given if given.count(vector) > 1]:
            raise ValueError(f"'{where}.weights' has the vector {' / '.join(repeated[0])} twice")
        for vector in [] if self.objective is None else self.vectors(names, sweep):
            if vector.get(self.objective or "", 0.0) == 0:
                raise ValueError(
                    f"'{where}.objective': MODPO divides by the weight of '{self.objective}', which is 0 at "
                    f"{vector.label()}: leave that vector out, or leave 'objective' out"
                )


class CompareConfig(Section):
    """`mahalo compare`: which baselines are made of the run's pairs and played against the same students."""

    baselines: Annotated[list[BaselineConfig], Field(min_length=1)] = [
        BaselineConfig(method="dpo"),
        BaselineConfig(method="scalarised"),
        BaselineConfig(method="modpo"),
        BaselineConfig(method="soup"),
    ]

    @model_validator(mode="after")
    def _each_method_once(self) -> Self:
        methods = [baseline.method for baseline in self.baselines]
        if repeated := [method for method in methods if methods.count(method) > 1]:
            raise ValueError(f"'baselines' has '{repeated[0]}' twice: give it all its 'weights' in one entry")
        return self

    def check_objectives(self, names: Sequence[str], sweep: SweepConfig) -> None:
        """ValueError if a baseline names an unknown objective, a vector twice, or one MODPO is not defined
        for."""
        for number, baseline in enumerate(self.baselines):
            baseline.check_objectives(f"compare.baselines.{number}", names, sweep)


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
