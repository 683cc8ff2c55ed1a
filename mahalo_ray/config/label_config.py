"""`mahalo label` and `mahalo calibrate`: what is labelled, for which objectives, and who judges."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from mahalo_ray.config.section import (
    EndpointConfig,
    Fraction,
    NonNegativeInt,
    PositiveInt,
    Section,
    Temperature,
)
from mahalo_ray.config.stage_config import ActorsConfig, ObjectiveConfig, SamplingConfig
from mahalo_ray.objectives import Weights, unknown_name

ROLLOUT_SUPERVISION = ("rollout_value", "judged_rollouts")
DEFAULT_THRESHOLD = 0.5


class CheckerJudgeConfig(Section):
    """The domain's own checker (maths: math-verify), on whole responses against the reference answer."""

    kind: Literal["checker"] = "checker"


class _ThresholdJudgeConfig(Section):
    """Scores at or above the threshold count as positive: that of `calibration` (a calibration.json that
    `mahalo calibrate` wrote for this very judge), else `threshold`, else 0.5."""

    threshold: float | None = None
    calibration: str | None = None

    @model_validator(mode="after")
    def _one_threshold(self) -> Self:
        if self.threshold is not None and self.calibration is not None:
            raise ValueError("'calibration' holds the threshold: leave 'threshold' out")
        return self


class EndpointJudgeConfig(_ThresholdJudgeConfig):
    """A language model behind an OpenAI-compatible endpoint, asked by a rubric.

    `rubric`: a file with a jinja2 template of the question (docs/labelling.md has its variables). The last
    match of `score_pattern` (its first group) in the reply is the score; `scale`, its lowest and highest
    value, is mapped to 0..1. A reply without a score in the scale is asked for `parse_retries` times more.
    `endpoint.concurrency` and `requests_per_minute` are those of the whole job: the actors share them.
    """

    kind: Literal["endpoint"] = "endpoint"
    endpoint: EndpointConfig
    rubric: str
    score_pattern: str = r"(?i)score\s*[:=]\s*(-?\d+(?:\.\d+)?)"
    scale: tuple[float, float] = (0.0, 1.0)
    max_tokens: PositiveInt = 512
    temperature: Temperature = 0.0
    parse_retries: NonNegativeInt = 2

    @field_validator("score_pattern")
    @classmethod
    def _has_a_group(cls, value: str) -> str:
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        if groups < 1:
            raise ValueError("the score is the first group of the pattern, and it has none")
        return value

    @field_validator("scale")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] >= value[1]:
            raise ValueError("the first must be below the second")
        return value


class ModelJudgeConfig(_ThresholdJudgeConfig):
    """A local reward model: a process reward model of ours (`objective` chooses which of its scores), or a
    sequence or token classifier."""

    kind: Literal["model"] = "model"
    path: str
    objective: str | None = None
    batch_size: PositiveInt = 16


class ProgramJudgeConfig(_ThresholdJudgeConfig):
    """A function of yours, "module:function", importable on every node: (prompt, steps, answer) with
    messages, texts and the reference answer or None; returns a number or a bool. Only a configuration names
    programs: nothing in the data can."""

    kind: Literal["program"] = "program"
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]


JudgeConfig = Annotated[
    CheckerJudgeConfig | EndpointJudgeConfig | ModelJudgeConfig | ProgramJudgeConfig,
    Field(discriminator="kind"),
]


class LabelTraces(Section):
    """A file, folder or hub data set of step traces in any of the readers' formats; labels are not read."""

    path: str
    format: str = "auto"


class LabelPrompts(Section):
    """Questions with reference answers (`question` and `answer`, `problem` and `solution`, ...): the policy
    answers each `responses` times, and these responses are labelled."""

    path: str
    responses: PositiveInt = 4


class LabelInput(Section):
    """What is labelled. `limit`: the first so many traces and prompts together."""

    traces: list[LabelTraces] = []
    prompts: list[LabelPrompts] = []
    limit: PositiveInt | None = None
    max_bad_fraction: Fraction = 0.01

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
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.9
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = 0.5
    max_width: Annotated[float, Field(gt=0, lt=1)] | None = None

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

    policy: str
    weights: dict[str, Annotated[float, Field(ge=0)]] | None = None
    samples: PositiveInt = 8
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.9
    adaptive: AdaptiveConfig | None = None
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=256)
    step_reward: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None

    @model_validator(mode="after")
    def _on_the_simplex(self) -> Self:
        if self.weights is not None:
            Weights(self.weights)
        return self


class CalibrationConfig(Section):
    """Human ratings that set the threshold of one objective's judge.

    `ratings`: rated dialogues (see the readers' format `rated`) with ratings in `label_range`; those at or
    above `positive_from` of the range (0..1) count as positive. Agreement is cross-validated over `folds`,
    dialogues kept together, with bootstrap intervals over dialogues.
    """

    objective: str
    ratings: str
    format: str = "rated"
    label_range: tuple[float, float] = (0.0, 1.0)
    positive_from: Fraction = 0.5
    folds: Annotated[int, Field(ge=2)] = 5
    max_bad_fraction: Fraction = 0.01
    bootstrap_resamples: PositiveInt = 2000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95


class LabelConfig(Section):
    """One labelling job. `output` is a folder or any fsspec URL that every node can reach.

    `step_separator` stands between steps of a response (null: a step is a whole turn). More than
    `max_unjudged_fraction` of labels without a verdict end the job.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    output: str
    seed: NonNegativeInt = 17
    domain: Literal["math", "human_values", "tutoring"]
    objectives: Annotated[list[ObjectiveConfig], Field(min_length=1)]
    judges: dict[str, JudgeConfig]
    input: LabelInput | None = None
    continuations: ContinuationsConfig | None = None
    calibration: CalibrationConfig | None = None
    step_separator: str | None = "\n\n"
    traces_per_chunk: PositiveInt = 16
    max_unjudged_fraction: Fraction = 0.05
    dtype: Literal["float32", "bfloat16"] = "float32"
    cluster: ActorsConfig = ActorsConfig()

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
