"""`mahalo dialogues`: who tutors, who learns, what is talked about, and what becomes of it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mahalo_ray.config.section import (
    EndpointConfig,
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SamplingParams,
    Section,
    Temperature,
)
from mahalo_ray.config.stage_config import ActorsConfig, DialogueBatchConfig, PairsConfig
from mahalo_ray.objectives import Weights

Knowledge = Literal["none", "partial", "solid"]
Level = Literal["low", "medium", "high"]
Tone = Literal["friendly", "neutral", "frustrated"]
Verbosity = Literal["terse", "normal", "talkative"]


class MiniatureStudentConfig(Section):
    """The miniature's latent-state student: it brings its own problem, so `cases` and `personas` are
    unused."""

    kind: Literal["miniature"] = "miniature"


class _PersonaStudentConfig(Section):
    """What students made of a language model share. `post_test`: after the dialogue the student is asked to
    solve the task alone, and the answer is compared with what its persona knows (needs answer keys)."""

    max_new_tokens: PositiveInt = 96
    temperature: Temperature = 0.8
    post_test: bool = False


class ModelStudentConfig(_PersonaStudentConfig):
    """Any `transformers` causal language model with a chat template: a folder, URL or hub id."""

    kind: Literal["model"] = "model"
    path: str


class EndpointStudentConfig(_PersonaStudentConfig):
    """Any OpenAI-compatible endpoint. `concurrency` and `requests_per_minute` are those of the whole stage:
    the actors share them."""

    kind: Literal["endpoint"] = "endpoint"
    endpoint: EndpointConfig


StudentConfig = Annotated[
    MiniatureStudentConfig | ModelStudentConfig | EndpointStudentConfig, Field(discriminator="kind")
]


class PolicyTutorConfig(Section):
    """A multi-head policy of ours, decoded at these weights."""

    kind: Literal["policy"] = "policy"
    path: str
    weights: Annotated[dict[str, Annotated[float, Field(ge=0)]], Field(min_length=1)]
    instruction: str | None = None

    @model_validator(mode="after")
    def _on_the_simplex(self) -> Self:
        Weights(self.weights)  # refuses weights that are all zero
        return self


class ModelTutorConfig(Section):
    """An ordinary `transformers` causal language model: a folder, URL or hub id.

    `instruction`: the system message; the task is not repeated in it, the student's opening has it.
    """

    kind: Literal["model"] = "model"
    path: str
    instruction: str | None = None


class EndpointTutorConfig(Section):
    """An OpenAI-compatible endpoint. Its turns have no token ids: pairs from them are text."""

    kind: Literal["endpoint"] = "endpoint"
    endpoint: EndpointConfig
    instruction: str | None = None


TutorConfig = Annotated[
    PolicyTutorConfig | ModelTutorConfig | EndpointTutorConfig, Field(discriminator="kind")
]


class MathDialCases(Section):
    """MathDial rows: problem, student profile, confusion and wrong solution; JSON, JSON Lines or Parquet."""

    kind: Literal["mathdial"] = "mathdial"
    path: str


class PrefixCases(Section):
    """Beginnings of dialogues to be continued: rows with `messages` (the last one by the user, that is the
    student), and perhaps `id` and `topic`."""

    kind: Literal["prefixes"] = "prefixes"
    path: str


class GridProblem(Section):
    """One problem of a generated grid. `answer` is the key: neither side sees it."""

    topic: str
    problem: str
    answer: str | None = None


class GridCases(Section):
    """Every problem with every misconception."""

    kind: Literal["grid"] = "grid"
    problems: Annotated[list[GridProblem], Field(min_length=1)]
    misconceptions: Annotated[list[str], Field(min_length=1)]


CasesConfig = Annotated[MathDialCases | PrefixCases | GridCases, Field(discriminator="kind")]


class PersonasConfig(Section):
    """The values that personas are dealt from: all combinations occur equally often (give or take one)."""

    knowledge: Annotated[list[Knowledge], Field(min_length=1)] = ["none", "partial", "solid"]
    engagement: Annotated[list[Level], Field(min_length=1)] = ["low", "medium", "high"]
    tone: Annotated[list[Tone], Field(min_length=1)] = ["friendly", "neutral", "frustrated"]
    verbosity: Annotated[list[Verbosity], Field(min_length=1)] = ["terse", "normal", "talkative"]


class BranchingConfig(Section):
    """At each of the first `depth` tutor turns, `width` candidates go on as dialogues of their own."""

    depth: PositiveInt = 1
    width: Annotated[int, Field(ge=2)] = 2


class PlayConfig(DialogueBatchConfig):
    """How dialogues are played.

    `turns`: tutor turns per dialogue (null: as many as the miniature's problem allows). `candidates` K turns
    are drawn at every moment; `continuation` says which one goes on: the `best` by the reward model, one
    `sampled` by softmax(total / score_temperature), or a `random` one. Totals are the `guidance`-weighted
    sums of scores standardised among the K. `stop`: a student turn with one of these texts ends the dialogue.
    """

    turns: PositiveInt | None = None
    continuation: Literal["best", "sampled", "random"] = "random"
    score_temperature: PositiveFloat = 1.0
    guidance: dict[str, Annotated[float, Field(ge=0)]] = {}
    branching: BranchingConfig | None = None
    max_tokens: PositiveInt | None = None
    stop: list[str] = []

    @classmethod
    def of(cls, batch: DialogueBatchConfig) -> PlayConfig:
        """The same dialogues, everything else at its default."""
        return cls.model_validate({name: getattr(batch, name) for name in DialogueBatchConfig.model_fields})

    @model_validator(mode="after")
    def _options_are_used(self) -> Self:
        if self.continuation == "random" and self.guidance:
            raise ValueError("'guidance' is not used by 'continuation: random': leave it out")
        if self.continuation != "sampled" and self.score_temperature != 1.0:
            raise ValueError("'score_temperature' is used by 'continuation: sampled' alone: leave it out")
        if self.branching is not None and self.branching.width > self.candidates:
            raise ValueError(
                f"'branching.width' is {self.branching.width}, but there are {self.candidates} 'candidates'"
            )
        if not all(self.stop):
            raise ValueError("a text in 'stop' is empty: leave it out")
        return self


class DialoguesConfig(Section):
    """One set of dialogues. `output` is a folder or any fsspec URL that every node can reach.

    `reward`: a process reward model of ours that scores every candidate turn; without one there are no
    scores and no pairs. More than `max_failed_fraction` of failed dialogues ends the stage with the reason.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    output: str
    seed: NonNegativeInt = 17
    tutor: TutorConfig
    student: StudentConfig
    cases: CasesConfig | None = None
    personas: PersonasConfig = PersonasConfig()
    reward: str | None = None
    play: PlayConfig = PlayConfig()
    pairs: PairsConfig = PairsConfig()
    max_failed_fraction: Fraction = 0.1
    dtype: Literal["float32", "bfloat16"] = "float32"
    cluster: ActorsConfig = ActorsConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if isinstance(self.student, MiniatureStudentConfig):
            if self.cases is not None or self.personas != PersonasConfig():
                raise ValueError("'cases' and 'personas' are not used by 'student.kind: miniature'")
            if self.play.stop or isinstance(self.tutor, EndpointTutorConfig):
                raise ValueError(
                    "'student.kind: miniature' understands a policy trained on its own sentences and ends by "
                    "itself: no 'play.stop', no endpoint as 'tutor'"
                )
        else:
            if self.cases is None:
                raise ValueError("'cases' is missing: say what the dialogues are about")
            sampling = self.play.sampling
            if isinstance(self.tutor, EndpointTutorConfig) and (sampling.top_k or sampling.min_p):
                raise ValueError("an endpoint as 'tutor' knows no 'play.sampling.top_k' or 'min_p'")
            if self.play.turns is None:
                raise ValueError("'play.turns' is missing: tutor turns per dialogue")
            if self.student.post_test and isinstance(self.cases, PrefixCases):
                raise ValueError("'student.post_test' needs answer keys, and prefixes have none")
        if self.reward is None and self.play.continuation != "random":
            raise ValueError(f"'play.continuation: {self.play.continuation}' needs a 'reward' model")
        if self.reward is None and self.pairs != PairsConfig():
            raise ValueError("'pairs' are made from scores: give a 'reward' model or leave them out")
        if self.pairs.held_out_fraction != type(self.pairs).model_fields["held_out_fraction"].default:
            raise ValueError("'pairs.held_out_fraction' belongs to the run that trains on the pairs")
        return self


class RewardSource(Section):
    """A reward model: one of ours, which knows its objectives, or a classifier of another maker, for which
    `objective` says what it scores."""

    model: str
    objective: str | None = None

    @classmethod
    def parse(cls, text: str) -> RewardSource:
        """`FOLDER`, or `objective=FOLDER` for a model of another maker."""
        name, equals, folder = text.partition("=")
        return cls(model=folder, objective=name) if equals and name.isidentifier() else cls(model=text)


class ServerSource(Section):
    """A completion server in the policy's place: `tokenizer` is the folder of the server's tokenizer,
    `weights` what was merged into its model."""

    endpoint: EndpointConfig
    tokenizer: str
    weights: dict[str, Annotated[float, Field(ge=0)]] | None = None


_GUIDED = ("argmax", "sample", "beam", "dvts", "best_of_n")
# The strategies that make use of an option: setting it for another one is an error, never ignored.
_USED_BY = {
    "guidance": _GUIDED,
    "standardisation": _GUIDED,
    "beam_width": ("beam", "dvts"),
    "score_temperature": ("sample",),
}


class RequestConfig(SamplingParams):
    """What every prompt is answered with, as the endpoint's requests; rows may have weights, guidance and
    seed of their own. `seed` is mixed with each row's id."""

    weights: dict[str, Annotated[float, Field(ge=0)]] | None = None
    guidance: dict[str, Annotated[float, Field(ge=0)]] | None = None
    num_candidates: PositiveInt = 5
    strategy: Literal["argmax", "sample", "beam", "dvts", "best_of_n", "none"] = "argmax"
    beam_width: PositiveInt = 4
    score_temperature: PositiveFloat = 1.0
    standardisation: Literal["within_candidates", "calibrated"] = "within_candidates"
    seed: NonNegativeInt = 0
    max_new_tokens: PositiveInt = 512
    max_step_tokens: PositiveInt = 256
    max_steps: PositiveInt = 256
    stop: list[Annotated[str, Field(min_length=1)]] = []

    @model_validator(mode="after")
    def _options_are_used(self) -> Self:
        for values in (self.weights, self.guidance):
            if values is not None:
                Weights(values)
        for name, strategies in _USED_BY.items():
            given = getattr(self, name) != type(self).model_fields[name].default
            if given and self.strategy not in strategies:
                raise ValueError(f"'{name}' is not used by 'strategy: {self.strategy}': leave it out")
        default = type(self).model_fields["num_candidates"].default
        if self.strategy == "none" and self.num_candidates not in (1, default):
            raise ValueError("'strategy: none' decodes one candidate: leave 'num_candidates' out")
        return self


class GenerateConfig(Section):
    """`prompts`: a file or folder of JSON, JSON Lines or Parquet rows; `output`: a folder or URL that every
    node can reach. Either `policy` (a model folder or a finished run) or `server` samples. Chunks of
    `chunk_rows` prompts are decoded together: another size is another job, another number of actors is not.
    """

    prompts: str
    output: str
    domain: Literal["math", "human_values", "tutoring"] = "tutoring"
    policy: str | None = None
    server: ServerSource | None = None
    rewards: list[RewardSource] = []
    request: RequestConfig = RequestConfig()
    chunk_rows: PositiveInt = 64
    max_branches: PositiveInt = 256
    max_bad_fraction: Fraction = 0.05
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    cluster: ActorsConfig = ActorsConfig()

    @property
    def seed(self) -> int:
        """That of the requests."""
        return self.request.seed

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.policy is None) == (self.server is None):
            raise ValueError("give either a policy or a completion server")
        if not self.rewards and self.request.strategy != "none":
            raise ValueError(
                f"strategy '{self.request.strategy}' needs a reward model: name one, or use strategy 'none'"
            )
        if self.rewards and self.request.strategy == "none":
            raise ValueError("'rewards' are not used by strategy 'none': leave them out")
        if self.server is not None and self.max_branches != type(self).model_fields["max_branches"].default:
            raise ValueError("'max_branches' is for a policy: a completion server has its own limits")
        return self
