"""`mahalo label` and `mahalo calibrate`: what is labelled, for which objectives, and who judges."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mahalo_ray.config.cluster_config import ActorsConfig
from mahalo_ray.config.section import (
    MAX_COUNT,
    NOT_BOOL,
    SHAPING_WHERE_SET,
    Domain,
    Dtype,
    Fraction,
    FunctionName,
    LabelRange,
    Number,
    OpenFraction,
    PositiveFraction,
    PositiveInt,
    RubricJudgeConfig,
    RunName,
    Section,
    Seed,
    Text,
    TraceFormat,
    WeightVector,
)
from mahalo_ray.config.stage_config import ObjectiveConfig, SamplingConfig
from mahalo_ray.objectives import unknown_name

ROLLOUT_SUPERVISION = ("rollout_value", "judged_rollouts")
DEFAULT_THRESHOLD = 0.5


class CheckerJudgeConfig(Section):
    """The domain's own checker (maths: math-verify), on whole responses against the reference answer."""

    kind: Literal["checker"] = "checker"
    """The domain's own checker."""


class _ThresholdJudgeConfig(Section):
    """Scores at or above the threshold count as positive: that of `calibration` (a calibration.json that
    `mahalo calibrate` wrote for this very judge), else `threshold`, else 0.5."""

    threshold: Number | None = None
    """Scores at or above it count as positive. Null: that of `calibration`, else 0.5."""

    calibration: Text | None = None
    """A calibration.json that `mahalo calibrate` wrote for this very judge; it holds the threshold. Null:
    none."""

    @model_validator(mode="after")
    def _one_threshold(self) -> Self:
        if self.threshold is not None and self.calibration is not None:
            raise ValueError("'calibration' holds the threshold: leave 'threshold' out")
        return self


class EndpointJudgeConfig(RubricJudgeConfig, _ThresholdJudgeConfig):
    """A language model behind an OpenAI-compatible endpoint, asked by a rubric.

    `endpoint.concurrency` and `requests_per_minute` are those of the whole job: the actors share them.
    """


class ModelJudgeConfig(_ThresholdJudgeConfig):
    """A local reward model: a process reward model of ours (`objective` chooses which of its scores), or a
    sequence or token classifier."""

    kind: Literal["model"] = "model"
    """A local reward model or classifier."""

    path: Text
    """Folder, URL or hub id of the model."""

    objective: Text | None = None
    """Which of a reward model's scores is used. Null: the objective that is judged, or a classifier's only
    score."""

    batch_size: PositiveInt = 16
    """Sequences that are scored together."""


class ProgramJudgeConfig(_ThresholdJudgeConfig):
    """A function of yours, "module:function", importable on every node: (prompt, steps, answer) with
    messages, texts and the reference answer or None; returns a number or a bool. Only a configuration names
    programs: nothing in the data can."""

    kind: Literal["program"] = "program"
    """A function of yours."""

    function: FunctionName
    """`module:function` of (prompt, steps, answer), importable on every node; returns a number or a bool."""


JudgeConfig = Annotated[
    CheckerJudgeConfig | EndpointJudgeConfig | ModelJudgeConfig | ProgramJudgeConfig,
    Field(discriminator="kind"),
]


class LabelTraces(Section):
    """A file, folder or hub data set of step traces in any of the readers' formats; labels are not read."""

    path: Text
    """File or folder (JSON, JSON Lines, Parquet; also compressed), URL, or
    `hub:OWNER/NAME[/CONFIG][:SPLIT]`."""

    format: TraceFormat = "auto"
    """Format of the rows; `auto` tells them apart by their fields. Labels are not read."""


class LabelPrompts(Section):
    """Questions with reference answers (`question` and `answer`, `problem` and `solution`, ...): the policy
    answers each `responses` times, and these responses are labelled."""

    path: Text
    """File or folder (JSON, JSON Lines, Parquet; also compressed), URL, or
    `hub:OWNER/NAME[/CONFIG][:SPLIT]`."""

    responses: PositiveInt = 4
    """How often the policy answers each question; these answers are labelled."""


class LabelInput(Section):
    """What is labelled. `limit`: the first so many traces and prompts together."""

    traces: list[LabelTraces] = []
    """Sources of traces."""

    prompts: list[LabelPrompts] = []
    """Sources of questions, which the policy answers first."""

    limit: PositiveInt | None = None
    """Only the first so many traces and prompts together. Null: all."""

    max_bad_fraction: Fraction = 0.01
    """Largest share of rows that cannot be used; they go to quarantine.parquet. More of them end the job."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.traces and not self.prompts:
            raise ValueError("give 'traces', 'prompts' or both: there is nothing to label")
        return self


class AdaptiveConfig(Section):
    """Stop sampling a prefix early: after every `round` continuations, when the Beta(1 + positives, 1 + rest)
    posterior of its mean lies above or below `threshold` with `confidence`, or when its central interval of
    `confidence` is narrower than `max_width`."""

    round: PositiveInt = 2
    """Continuations that are drawn before the next look."""

    confidence: Annotated[float, Field(gt=0.5, lt=1), NOT_BOOL] = 0.9
    """Probability that counts as certain."""

    threshold: OpenFraction | None = 0.5
    """Sampling ends when the mean is certainly above or below it. Null: not a reason to end."""

    max_width: OpenFraction | None = None
    """Sampling ends when the central interval of the mean is narrower. Null: not a reason to end."""

    @model_validator(mode="after")
    def _a_reason_to_stop(self) -> Self:
        if self.threshold is None and self.max_width is None:
            raise ValueError("give 'threshold', 'max_width' or both: nothing else ends the sampling early")
        return self


class ContinuationsConfig(Section):
    """Monte-Carlo continuations of every step prefix by a policy.

    `policy`: a multi-head policy of ours (with `weights`) or any causal language model with a chat template.
    `samples` is M. A step's value is the mean over its continuations of r_t + gamma^(n-t) * z, with n the
    steps of the completed response and z the judge's verdict; `step_reward`, "module:function" of (prompt,
    steps), gives r_t of the last step (default: 0).
    """

    policy: Text
    """Folder, URL or hub id of a multi-head policy of ours (with `weights`), or of any causal language model
    with a chat template."""

    weights: WeightVector | None = None
    """Weights over the heads of a multi-head policy, divided by their sum. Null: the model has one head."""

    samples: PositiveInt = 8
    """Continuations M of every prefix; with `adaptive` the most of them."""

    gamma: PositiveFraction = 0.9
    """Discount of the verdict per later step, for `rollout_value`. 1 is none."""

    adaptive: AdaptiveConfig | None = None
    """When to stop early. Null: always `samples` continuations."""

    search_first_error: Annotated[bool, Field(json_schema_extra=SHAPING_WHERE_SET)] = False
    """Whether the first wrong step of each response is searched by halving: log2 of its steps are continued
    instead of all. Steps from there on are labelled 0, those before 1, and all of a response that is right
    itself. Only where every objective labelled by rollouts is supervised by `judged_rollouts`."""

    sampling: SamplingConfig = SamplingConfig(max_new_tokens=256)
    """How continuations are drawn; `max_new_tokens` is the most of each one."""

    step_reward: FunctionName | None = None
    """`module:function` of (prompt, steps) that gives the last step's reward r_t, for `rollout_value`. Null:
    0."""


class CalibrationConfig(Section):
    """Human ratings that set the threshold of one objective's judge.

    `ratings`: rated dialogues (see the readers' format `rated`) with ratings in `label_range`; those at or
    above `positive_from` of the range (0..1) count as positive. Agreement is cross-validated over `folds`,
    dialogues kept together, with bootstrap intervals over dialogues.
    """

    objective: Text
    """The objective whose judge is calibrated."""

    ratings: Text
    """File, folder, URL or `hub:OWNER/NAME` with rated dialogues."""

    format: TraceFormat = "rated"
    """Format of the rows; `auto` tells them apart by their fields."""

    label_range: LabelRange = (0.0, 1.0)
    """Lowest and highest rating, which are mapped to 0..1."""

    positive_from: Fraction = 0.5
    """Ratings at or above this share of the range count as positive."""

    folds: Annotated[int, Field(ge=2, le=MAX_COUNT), NOT_BOOL] = 5
    """Parts of the cross-validation; a dialogue's ratings stay in one part."""

    max_bad_fraction: Fraction = 0.01
    """Largest share of rows that cannot be used. More of them end the job."""

    bootstrap_resamples: PositiveInt = 2000
    """Resamples behind every interval."""

    confidence: OpenFraction = 0.95
    """Confidence of the intervals: 0.95 is 95 %."""


class LabelConfig(Section):
    """One labelling job. `output` is a folder or any fsspec URL that every node can reach.

    `step_separator` stands between steps of a response (null: a step is a whole turn). More than
    `max_unjudged_fraction` of labels without a verdict end the job.
    """

    name: RunName
    """Name of the job: letters, digits, dots, dashes and underscores."""

    output: Text
    """Folder, or any fsspec URL that every node can reach, for everything that is written."""

    seed: Seed = 17
    """Seed of everything that is drawn."""

    domain: Domain
    """Where steps end and which checker there is: `math` at blank lines, `lines` at line ends, `human_values`
    at sentences and paragraphs of 8 tokens and more, `sentence` at all of them, `tutoring` at whole turns."""

    objectives: Annotated[list[ObjectiveConfig], Field(min_length=1)]
    """The objectives that are labelled."""

    judges: dict[str, JudgeConfig]
    """The judge of each objective, by its name."""

    input: LabelInput | None = None
    """What is labelled. Null: nothing, for `mahalo calibrate` alone."""

    continuations: ContinuationsConfig | None = None
    """The policy that answers prompts and continues steps. Null: no objective needs one."""

    calibration: CalibrationConfig | None = None
    """Human ratings for `mahalo calibrate`. Null: none."""

    step_separator: str | None = "\n\n"
    """Text between the steps of a response. Null: a step is a whole turn."""

    traces_per_chunk: PositiveInt = 16
    """Traces that one actor labels before it writes them. A killed job loses no more."""

    max_unjudged_fraction: Fraction = 0.05
    """Largest share of labels that may stay without a verdict; more of them end the job."""

    dtype: Dtype = "float32"
    """Number format of the policy's weights."""

    cluster: ActorsConfig = ActorsConfig()
    """Where the work runs."""

    @property
    def objective_names(self) -> tuple[str, ...]:
        return tuple(objective.name for objective in self.objectives)

    @property
    def uses_rollouts(self) -> bool:
        """Whether any objective is labelled by continuations."""
        return any(objective.supervision in ROLLOUT_SUPERVISION for objective in self.objectives)

    @model_validator(mode="after")
    def _judges_fit(self) -> Self:
        for objective in self.objectives:
            if objective.supervision == "pairwise":
                raise ValueError(
                    f"objective '{objective.name}' is supervised by pairs: there are no labels to make"
                )
            if objective.name not in self.judges:
                raise ValueError(f"'judges' has no judge for objective '{objective.name}'")
            if isinstance(self.judges[objective.name], CheckerJudgeConfig):
                if self.domain != "math":
                    raise ValueError(f"domain '{self.domain}' has no checker: give another kind of judge")
                if objective.supervision not in ROLLOUT_SUPERVISION:
                    raise ValueError(
                        f"the checker of '{objective.name}' judges whole responses: it goes with "
                        f"{' or '.join(ROLLOUT_SUPERVISION)}"
                    )
        for name in self.judges:
            if name not in self.objective_names:
                raise ValueError(f"'judges': {unknown_name('objective', name, self.objective_names)}")
        if self.calibration is not None and self.calibration.objective not in self.objective_names:
            named = self.calibration.objective
            raise ValueError(f"'calibration': {unknown_name('objective', named, self.objective_names)}")
        return self

    @model_validator(mode="after")
    def _first_errors_are_searched_for_votes(self) -> Self:
        if self.continuations is not None and self.continuations.search_first_error:
            for objective in self.objectives:
                if objective.supervision == "rollout_value":
                    raise ValueError(
                        "'continuations.search_first_error' gives labels of 0 and 1: supervise "
                        f"'{objective.name}' by judged_rollouts, or continue every step"
                    )
        return self

    @model_validator(mode="after")
    def _continuations_are_used(self) -> Self:
        asked = self.uses_rollouts or (self.input is not None and bool(self.input.prompts))
        if asked and self.continuations is None:
            raise ValueError("'continuations' is missing: say which policy continues the steps")
        if self.continuations is not None and not asked:
            raise ValueError(
                "'continuations' is not used: no objective has rollouts, and there are no prompts"
            )
        valued = any(objective.supervision == "rollout_value" for objective in self.objectives)
        for name in ("gamma", "step_reward"):
            default = ContinuationsConfig.model_fields[name].default
            if self.continuations is not None and not valued and getattr(self.continuations, name) != default:
                raise ValueError(
                    f"'continuations.{name}' belongs to 'rollout_value', which no objective has: leave it out"
                )
        if asked and self.domain == "tutoring":
            raise ValueError(
                "in tutoring a student answers every turn, a policy alone cannot go on: use 'judged_prefix' "
                "here, or `mahalo dialogues`"
            )
        return self
