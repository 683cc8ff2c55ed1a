"""A run: the document of `mahalo run` and the sections that only a run has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from mahalo_ray.config.cluster_config import ClusterConfig
from mahalo_ray.config.section import (
    NOT_BOOL,
    SHAPING_WHERE_SET,
    BaselineName,
    Domain,
    DomainName,
    Fraction,
    LabelRange,
    NonNegativeInt,
    OpenFraction,
    OptionalWeights,
    OutcomeLabels,
    PairFormat,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    RubricJudgeConfig,
    RunName,
    SamplerName,
    Section,
    Seed,
    Strength,
    SweepKind,
    Temperature,
    Text,
    TraceFormat,
    TrainingStart,
    WeightVector,
)
from mahalo_ray.config.serve_config import ServeConfig
from mahalo_ray.config.stage_config import (
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
    """Weight vectors tried by Ray Tune; each is played against the same fresh students.

    The vectors are a fixed list (`weights`), asked for by a `sampler`, or both: then the sampler knows the
    results of the list. `kind` says what they weigh. Guidance weights, numbers of candidates and so on stand
    beside them and are crossed: every combination is a front of its own, with a sampler of its own.
    """

    kind: SweepKind = "decoding"
    """What the vectors weigh: the policy's heads (`decoding`), the reward model's objectives (`guidance`,
    with the heads at `guided.weights`), or the losses of a policy that is trained for each vector and decoded
    at it (`training`)."""

    weights: list[WeightVector] = []
    """Weight vectors that are tried, each divided by its sum: `[{accuracy: 0.9, engagement: 0.1}, ...]`."""

    sampler: SamplerName | None = None
    """What asks for further weight vectors: `surf` for points that lie evenly along the front of two
    objectives; `surface` for points spread evenly over that of two to six; `lattice` for equal steps of the
    weights, `sobol` and `dirichlet` for weights drawn evenly or at random. Null: only `weights` are tried."""

    points: Annotated[int, Field(ge=3, le=10_000), NOT_BOOL] = 11
    """Points that the sampler asks for in each round; of `surface`, in all rounds together."""

    rounds: Annotated[int, Field(ge=1, le=100), NOT_BOOL] = 2
    """Most rounds of the sampler. It stops sooner where another round would not help; all but `surf` and
    `surface` have one."""

    relaxation: PositiveFraction = 0.7
    """Of `surf`: how far a round's estimate replaces what was estimated before. Its paper has 0.3, for tens
    of rounds; with few rounds more has to come of each."""

    guidance: list[WeightVector] = []
    """Guidance weights that are crossed with the vectors of `kind: decoding`. Empty: no guidance."""

    num_candidates: list[PositiveInt] = []
    """Numbers of candidates K that are crossed with the vectors; 1 is no guidance. Empty: that of `guided`
    where there is guidance."""

    strength: list[Strength] = []
    """Decoding strengths that are crossed with the vectors; 0 is the SFT model, 1 the policy. Empty: 1."""

    temperature: list[Temperature] = []
    """Temperatures of sampling that are crossed with the vectors; 0 is greedy. Empty: that of
    `evaluation.sampling`."""

    start: Annotated[TrainingStart, Field(json_schema_extra=SHAPING_WHERE_SET)] = "nearest"
    """Of `kind: training`: what each training goes on from. `nearest` is the nearest policy that is finished:
    the run's own or another of the sweep, by the distance of the weights; `policy` is always the run's own;
    `sft` is the SFT model. All have the SFT model as reference."""

    training_share: Annotated[PositiveFraction, Field(json_schema_extra=SHAPING_WHERE_SET)] = 1.0
    """Of `kind: training`: how much of the training in `policy` each vector gets (of its epochs, or its
    `max_steps`). A training that goes on from another policy needs less."""

    concurrent_trainings: Annotated[PositiveInt, Field(json_schema_extra=SHAPING_WHERE_SET)] = 1
    """Of `kind: training`: how many trainings run side by side, each with `cluster.train_workers` workers.
    More leave fewer finished policies to go on from."""

    @model_validator(mode="after")
    def _options_fit_the_kind(self) -> Self:
        for name in ("start", "training_share", "concurrent_trainings"):
            if self.kind != "training" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"'{name}' is for 'kind: training', and the kind is '{self.kind}'")
        for name in ("guidance", "num_candidates", "strength", "temperature"):
            if self.kind == "training" and getattr(self, name):
                raise ValueError(
                    f"'{name}' is not crossed with the vectors of 'kind: training', each of which takes a "
                    "training: leave it out"
                )
        for name in ("points", "rounds"):
            if self.sampler is None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"'{name}' is the sampler's, and no 'sampler' is given")
        if self.sampler != "surf" and self.relaxation != type(self).model_fields["relaxation"].default:
            raise ValueError("'relaxation' is that of 'sampler: surf': leave it out")
        if self.sampler == "surface" and self.rounds < 2:
            raise ValueError("'sampler: surface' needs 'rounds' of at least 2: the first is a lattice")
        if self.kind == "guidance" and 1 in self.num_candidates:
            raise ValueError("'num_candidates' is 1, and one candidate leaves guidance nothing to choose")
        if self.kind == "guidance" and self.guidance:
            raise ValueError("'guidance' goes with 'kind: decoding': 'kind: guidance' varies it")
        if self.kind == "decoding" and not self.guidance and set(self.num_candidates) - {1}:
            raise ValueError("'num_candidates' above 1 needs 'guidance', which chooses among candidates")
        return self

    @property
    def is_empty(self) -> bool:
        """Whether nothing is tried."""
        return not self.weights and self.sampler is None

    @property
    def decoding_weights(self) -> list[Weights]:
        """The vectors of the list, where they weigh the policy's heads."""
        return list(self.weights) if self.kind == "decoding" else []

    @property
    def most_trainings(self) -> int:
        """At most how many policies are trained."""
        if self.kind != "training":
            return 0
        rounds = 1 if self.sampler in (None, "lattice", "sobol", "dirichlet", "surface") else self.rounds
        return len(self.weights) + (0 if self.sampler is None else rounds * self.points)


class GuidedConfig(Section):
    """PRM-guided decoding at fixed decoding weights (heads) and guidance weights (reward objectives)."""

    num_candidates: PositiveInt = 5
    """Candidates per step of guided decoding."""

    weights: OptionalWeights = None
    """Weights over the policy's heads, divided by their sum. Needed unless the run is on own data."""

    guidance: OptionalWeights = None
    """Weights over the reward model's objectives, divided by their sum. Needed unless the run is on own
    data."""

    @property
    def point(self) -> tuple[Weights, Weights]:
        """Decoding weights and guidance weights, which every run that plays dialogues has."""
        assert self.weights is not None and self.guidance is not None
        return self.weights, self.guidance


class EvaluationConfig(Section):
    """Fresh dialogues behind every row of the table."""

    dialogues: PositiveInt = 240
    """Fresh dialogues behind every row of the table."""

    sampling: SamplingConfig = SamplingConfig()
    """How turns are drawn in them."""

    bootstrap_resamples: PositiveInt = 2000
    """Resamples behind every interval."""

    confidence: OpenFraction = 0.95
    """Confidence of the intervals: 0.95 is 95 %."""


# Told apart first, so that an error speaks of the form that was written.
PromptJudge = Annotated[
    Annotated[str, Field(pattern=r"^checker$|^[\w.]+:\w+$"), Tag("name")]
    | Annotated[RubricJudgeConfig, Tag("endpoint")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "endpoint"),
]


class PromptsConfig(Section):
    """Prompts of your own, each with a reference answer, and a judge per objective: the domain `prompts`."""

    path: Text
    """File or folder of prompts (`question` and `answer`, `problem` and `solution`, ...), URL, or
    `hub:OWNER/NAME[/CONFIG][:SPLIT]`."""

    evaluation_path: Text | None = None
    """The same for evaluation. Null: prompts of `path` that no training stage has met."""

    judges: Annotated[dict[str, PromptJudge], Field(min_length=1)]
    """Judge of each objective: `checker` (maths: math-verify against the reference answer),
    `module:function` of (prompt, steps, answer), importable on every node, which returns a number or a bool,
    or a language model behind an endpoint (`endpoint`, `rubric` and `scale`)."""

    boundary: Domain = "math"
    """Where a step of an answer ends: `math` at blank lines and closed boxes, `lines` at line ends,
    `human_values` at sentences, `tutoring` nowhere but at the answer's end."""

    instruction: Text | None = None
    """Text that is put behind every prompt, after a blank line. Null: none."""

    max_steps: PositiveInt = 16
    """Most steps of one answer."""

    limit: PositiveInt | None = None
    """Only the first so many prompts of each file. Null: all."""

    max_bad_fraction: Fraction = 0.01
    """Largest share of rows that cannot be used; they go to quarantine.parquet. More of them end the run."""


class DomainConfig(Section):
    """The world whose problems are worked on, and how much of it is made for SFT."""

    name: DomainName = "tutoring_miniature"
    """A generated world (`tutoring_miniature`, `maths_miniature`, `human_values_miniature`), `prompts` for
    your own, or any other domain as `package.module:NAME` (see docs, "Domains")."""

    prompts: Annotated[PromptsConfig | None, Field(json_schema_extra=SHAPING_WHERE_SET)] = None
    """Prompts of your own and their judges. With `name: prompts`, and only with it."""

    sft_dialogues: NonNegativeInt = 12000
    """Dialogues that the SFT model learns from: generated ones, or of `prompts` with their reference
    answers. 0: no SFT, `model.base` takes the SFT model's place."""

    @model_validator(mode="after")
    def _prompts_go_together(self) -> Self:
        if (self.name == "prompts") != (self.prompts is not None):
            raise ValueError("'name: prompts' and 'prompts' go together: give both or neither")
        return self


class PairsSource(Section):
    """A file or folder of preference pairs (see `mahalo_ray.data.pair_readers`), and which objective they are
    for: `objective` for all rows, or `objective_field`, the field of each row that names it. `sample`: share
    of the dialogues that is used, whole dialogues."""

    path: Text
    """File or folder (JSON, JSON Lines, Parquet; also compressed), URL, or
    `hub:OWNER/NAME[/CONFIG][:SPLIT]`."""

    format: PairFormat = "auto"
    """Format of the rows; `auto` tells them apart by their fields."""

    objective: Text | None = None
    """The objective that all rows are for. Either this or `objective_field`."""

    objective_field: Text | None = None
    """The field of each row that names its objective. Either this or `objective`."""

    aspect: Text | None = None
    """Formats with ratings of several aspects (`ultrafeedback`, `helpsteer`): the aspect that says which
    answer is better, such as `helpfulness`, `honesty` or `truthfulness`."""

    sample: PositiveFraction = 1.0
    """Share of the dialogues that is used, whole dialogues, chosen by the run's seed."""

    @model_validator(mode="after")
    def _one_way_to_the_objective(self) -> Self:
        if (self.objective is None) == (self.objective_field is None):
            raise ValueError(
                "give exactly one of 'objective' (that of all rows) and 'objective_field' (the field of a "
                "row that names it)"
            )
        if self.format == "truthfulqa" and self.objective is None:
            raise ValueError("rows of TruthfulQA name no objective: give 'objective'")
        if self.aspect is not None and self.format not in ("auto", "ultrafeedback", "helpsteer"):
            raise ValueError(f"rows of format '{self.format}' have no ratings by 'aspect'")
        return self


class TracesSource(Section):
    """A file or folder of step traces (see `mahalo_ray.data.step_readers`). `objective` (or
    `objective_field`, the field of each row that names it) is that of labels which name none.

    `outcome_labels` and `gamma`: where only the outcome is known, it labels the last step, or as
    gamma^(n-t) * outcome every step t of n. `sample`: share of the prompts that is used, whole prompts.
    """

    path: Text
    """File or folder (JSON, JSON Lines, Parquet; also compressed), URL, or
    `hub:OWNER/NAME[/CONFIG][:SPLIT]`."""

    format: TraceFormat = "auto"
    """Format of the rows; `auto` tells them apart by their fields."""

    objective: Text | None = None
    """The objective of labels that name none. At most one of this and `objective_field`."""

    objective_field: Text | None = None
    """The field of each row that names the objective. At most one of this and `objective`."""

    label_range: LabelRange = (0.0, 1.0)
    """Lowest and highest value of the labels in the data, which are mapped to 0..1."""

    outcome_labels: OutcomeLabels = "last"
    """Where only the outcome is known: it labels the `last` step, or `all` of them, discounted by `gamma`."""

    gamma: PositiveFraction = 1.0
    """Discount of the outcome per step before the last. Only with `outcome_labels: all`; 1 is none."""

    sample: PositiveFraction = 1.0
    """Share of the prompts that is used, whole prompts, chosen by the run's seed."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.objective is not None and self.objective_field is not None:
            raise ValueError("give at most one of 'objective' and 'objective_field'")
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
    """Sources of preference pairs."""

    traces: list[TracesSource] = []
    """Sources of step traces. With any of them the run trains a reward model and no policy."""

    step_separator: str | None = "\n\n"
    """Text that ends every step where the reward model reads it. Null: a step is a whole turn."""

    max_bad_fraction: Fraction = 0.01
    """Largest share of rows that cannot be used; they go to quarantine.parquet. More of them end the run."""

    @model_validator(mode="after")
    def _something_to_read(self) -> Self:
        if not self.pairs and not self.traces:
            raise ValueError("give 'pairs', 'traces' or both: there is nothing to read")
        return self


class BaselineConfig(Section):
    """One baseline. `dpo` is one policy per objective; the others are made for weight vectors.

    `weights`: the vectors that `scalarised` and `modpo` train a policy for, and that `soup` averages the DPO
    policies at; none: those of the sweep. `objective`: the one whose pairs `modpo` trains on; none: at every
    vector the objective with the largest weight (the first of equal ones).
    """

    method: BaselineName
    """`dpo` is one policy per objective, `soup` averages their weights; `scalarised` and `modpo` train a
    policy per weight vector."""

    weights: list[WeightVector] = []
    """Weight vectors of its policies, each divided by its sum. Empty: those of the sweep. Not used by
    `dpo`."""

    objective: Text | None = None
    """The objective whose pairs `modpo` trains on. Null: at every vector the one with the largest weight."""

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
        return list(self.weights) or sweep.decoding_weights

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
        given = [[f"{value:.3g}" for value in vector.over(names)] for vector in self.weights]
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
    """The baselines, each method once."""

    guided: bool = False
    """Whether SFT, every head, the policy and every baseline are also played guided by each objective's
    scores alone and by their weighted sum ('guided.guidance'), as a table of its own."""

    with_run: bool = False
    """Whether `mahalo run` makes the comparison too."""

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
ROLLOUT_SECTIONS = (
    *("domain", "sft", "reward_rollouts", "pair_rollouts"),
    *("sweep", "guided", "evaluation", "compare", "serve"),
)


def _different(seeds: list[int]) -> list[int]:
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"a seed is named twice: {', '.join(map(str, seeds))}")
    return seeds


class RunConfig(Section):
    """One run. `output` is a folder or any fsspec URL that every node can reach."""

    name: RunName
    """Name of the run in its report: letters, digits, dots, dashes and underscores."""

    output: Text
    """Folder, or any fsspec URL that every node can reach, for everything the run writes."""

    seed: Seed = 17
    """Seed of everything that is drawn."""

    seeds: Annotated[list[Seed], AfterValidator(_different)] = []
    """Run everything once for each of these seeds, each in a folder of its own under 'output' (`seed_17`),
    and make one report over all. For `run` and `compare`. Empty: 'seed' alone."""

    domain: DomainConfig = DomainConfig()
    """The world of a run that plays dialogues."""

    data: DataConfig | None = None
    """Own preference pairs and step traces, in place of a domain's rollouts. Null: the run plays
    dialogues."""

    objectives: Annotated[list[ObjectiveConfig], Field(min_length=1)]
    """What is traded off. The order is that of heads, scores and columns."""

    cluster: ClusterConfig = ClusterConfig()
    """Where the work runs."""

    model: ModelConfig
    """The language model that everything starts from."""

    sft: SftConfig = SftConfig()
    """Supervised fine-tuning."""

    reward_rollouts: RolloutConfig = RolloutConfig(continuations=3)
    """Dialogues whose candidates are labelled for the reward model."""

    reward: RewardConfig = RewardConfig()
    """The process reward model."""

    pair_rollouts: RolloutConfig = RolloutConfig()
    """Dialogues whose candidates are scored for the preference pairs."""

    pairs: PairsConfig = PairsConfig()
    """Preference pairs."""

    rounds: PositiveInt = 1
    """Rounds of rollouts, pairs and policy. In every round after the first the last policy plays
    `pair_rollouts` at weights drawn for each dialogue, and the next one is trained from the SFT model on the
    pairs of all rounds. The last policy is evaluated, served and exported."""

    round_concentration: PositiveFloat = 1.0
    """Concentration of the Dirichlet distribution that the decoding weights of the dialogues of later rounds
    are drawn from: 1 draws all mixtures alike, less draws more near single objectives, more draws near the
    middle."""

    policy: PolicyConfig = PolicyConfig()
    """The policy."""

    sweep: SweepConfig = SweepConfig()
    """Weight vectors that are tried in decoding."""

    guided: GuidedConfig = GuidedConfig()
    """Guided decoding in evaluation, and the endpoint's defaults."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """Dialogues behind the figures of the report."""

    compare: CompareConfig = CompareConfig()
    """Baselines of `mahalo compare`."""

    serve: ServeConfig = ServeConfig()
    """The endpoint of `mahalo serve`."""

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
            given = {"guided.weights": self.guided.weights, "guided.guidance": self.guided.guidance}
            if self.sweep.is_empty:
                raise ValueError(
                    "'sweep.weights' is missing: give it, or a 'sweep.sampler'; only a run on own data "
                    "('data') goes without both"
                )
            for key, value in given.items():
                if not value:
                    raise ValueError(f"'{key}' is missing: only a run on own data ('data') goes without it")
            is_own = self.policy.balance == "own"
            if not is_own and self.pairs.gap_margin > 0:
                raise ValueError(
                    "'pairs.gap_margin' gives pairs a margin of their own, and 'policy.balance: sampled' "
                    "makes it at each pair's balance: leave it out"
                )
            if self.policy.loss == "regression" and is_own and self.pairs.gap_margin == 0:
                raise ValueError(
                    "'policy.loss' is 'regression', which regresses on the gaps of the scores, and "
                    "'pairs.gap_margin' is 0: set it (1 asks for 1 / beta nats per standard deviation)"
                )
            if self.reward.dedicated:
                raise ValueError("'reward.dedicated' is for runs on own data ('data')")
            self._check_sft()
            return self
        if self.seeds:
            raise ValueError("'seeds' reports on played dialogues: a run on own data ('data') has none")
        if self.model.base is None:
            raise ValueError("'data' needs 'model.base': a model made from scratch has nothing to align")
        unused = ROLLOUT_SECTIONS if self.trains_policy else (*ROLLOUT_SECTIONS, "pairs", "policy")
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

    def _check_sft(self) -> None:
        if self.domain.sft_dialogues > 0:
            return
        if self.model.base is None:
            raise ValueError(
                "'domain.sft_dialogues' is 0, and a model made from scratch can say nothing before SFT: give "
                "'model.base', or dialogues"
            )
        if self._is_set("sft"):
            raise ValueError("'sft' is set, but with 'domain.sft_dialogues' 0 there is no SFT: leave one out")

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
    def _rounds_are_played(self) -> Self:
        if self.rounds == 1:
            if self.round_concentration != type(self).model_fields["round_concentration"].default:
                raise ValueError("'round_concentration' is for rounds after the first: set 'rounds' above 1")
            return self
        if self.data is not None:
            raise ValueError("'rounds' above 1 play dialogues, and a run on own data ('data') plays none")
        if self.policy.method != "mah_dpo":
            raise ValueError(
                f"'rounds' above 1 play the policy at weights over its heads, and 'policy.method: "
                f"{self.policy.method}' has one head: leave 'rounds' at 1"
            )
        return self

    @model_validator(mode="after")
    def _graphs_fit_the_policy(self) -> Self:
        if self.cluster.cuda_graphs and self.policy.adapters.depth != 0:
            raise ValueError(
                "'cluster.cuda_graphs' is set, and forwards through 'policy.adapters' cannot be recorded: "
                "set it to false, or 'policy.adapters.depth' to 0"
            )
        return self

    @model_validator(mode="after")
    def _objectives_agree(self) -> Self:
        names = self.objective_names
        if len(set(names)) != len(names):
            raise ValueError(f"'objectives' names an objective twice: {', '.join(names)}")
        self.policy.check_objectives(names)
        if self.policy.extends is not None and self.sweep.kind == "training":
            raise ValueError(
                "'sweep.kind: training' trains policies as a whole, and 'policy.extends' new heads alone: "
                "sweep decoding weights, or leave 'extends' out"
            )
        if self.policy.metrics_every_steps and self.pairs.held_out_fraction == 0:
            raise ValueError(
                "'policy.metrics_every_steps' measures on held-out pairs: "
                "set 'pairs.held_out_fraction' above 0"
            )
        named: dict[str, Mapping[str, float]]
        named = {"guided.weights": self.guided.weights or {}, "guided.guidance": self.guided.guidance or {}}
        named |= {f"sweep.weights[{i}]": w for i, w in enumerate(self.sweep.weights)}
        named |= {f"sweep.guidance[{i}]": w for i, w in enumerate(self.sweep.guidance)}
        for where, values in named.items():
            for name in values:
                if name not in names:
                    raise ValueError(f"'{where}': {unknown_name('objective', name, names)}")
        if self.sweep.sampler is not None and len(names) < 2:
            raise ValueError("'sweep.sampler' needs at least 2 objectives: there is no front of one")
        if self.sweep.sampler == "surf" and len(names) > 2:
            raise ValueError(
                f"'sweep.sampler' is surf, which follows a curve: {len(names)} objectives need 'surface'"
            )
        if self.sweep.sampler == "surface" and not len(names) < min(self.sweep.points, 7):
            raise ValueError(
                f"'sweep.sampler' is surface: {len(names)} objectives need more than {len(names)} points, "
                "and it is for at most 6"
            )
        self.compare.check_objectives(names, self.sweep)
        return self
