"""`mahalo dialogues`: who tutors, who learns, what is talked about, and what becomes of it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mahalo_ray.config.cluster_config import ActorsConfig
from mahalo_ray.config.section import (
    MAX_COUNT,
    MAX_REQUEST_SEED,
    NOT_BOOL,
    Aggregation,
    Domain,
    Dtype,
    EndpointConfig,
    Fraction,
    LongText,
    OptionalWeights,
    PositiveFloat,
    PositiveInt,
    RunName,
    SamplingParams,
    Section,
    Seed,
    ServerSource,
    Standardisation,
    Strategy,
    Strength,
    Temperature,
    Text,
    WeightVector,
)
from mahalo_ray.config.stage_config import DialogueBatchConfig, PairsConfig

Knowledge = Literal["none", "partial", "solid"]
Level = Literal["low", "medium", "high"]
Tone = Literal["friendly", "neutral", "frustrated"]
Verbosity = Literal["terse", "normal", "talkative"]


class MiniatureStudentConfig(Section):
    """The miniature's latent-state student: it brings its own problem, so `cases` and `personas` are
    unused."""

    kind: Literal["miniature"] = "miniature"
    """A student of the miniature."""


class _PersonaStudentConfig(Section):
    """What students made of a language model share. `post_test`: after the dialogue the student is asked to
    solve the task alone, and the answer is compared with what its persona knows (needs answer keys)."""

    max_new_tokens: PositiveInt = 96
    """Most tokens of one reply of the student."""

    temperature: Temperature = 0.8
    """Temperature of the student's replies. 0 always takes the likeliest token."""

    post_test: bool = False
    """Whether the student is asked after the dialogue to solve the task alone, and its answer compared with
    what its persona knows. Needs cases with answer keys."""


class ModelStudentConfig(_PersonaStudentConfig):
    """Any `transformers` causal language model with a chat template: a folder, URL or hub id."""

    kind: Literal["model"] = "model"
    """A transformers causal language model."""

    path: Text
    """Folder, URL or hub id of the model."""


class EndpointStudentConfig(_PersonaStudentConfig):
    """Any OpenAI-compatible endpoint. `concurrency` and `requests_per_minute` are those of the whole stage:
    the actors share them."""

    kind: Literal["endpoint"] = "endpoint"
    """An OpenAI-compatible endpoint."""

    endpoint: EndpointConfig
    """The server. Its limits are those of the whole stage: the actors share them."""


StudentConfig = Annotated[
    MiniatureStudentConfig | ModelStudentConfig | EndpointStudentConfig, Field(discriminator="kind")
]


class PolicyTutorConfig(Section):
    """A multi-head policy of ours, decoded at these weights, or at weights drawn for each dialogue."""

    kind: Literal["policy"] = "policy"
    """A multi-head policy of ours."""

    path: Text
    """Folder or URL of the policy."""

    weights: OptionalWeights = None
    """Weights over its heads, divided by their sum. Empty: drawn for each dialogue."""

    concentration: PositiveFloat = 1.0
    """Concentration of the Dirichlet distribution that `weights` are drawn from where none are given: 1 draws
    all mixtures alike, less draws more near single objectives."""

    instruction: str | None = None
    """System message. Null: none."""

    @model_validator(mode="after")
    def _weights_given_or_drawn(self) -> Self:
        if self.weights and self.concentration != type(self).model_fields["concentration"].default:
            raise ValueError("'concentration' is for weights that are drawn: leave it or 'weights' out")
        return self


class ModelTutorConfig(Section):
    """An ordinary `transformers` causal language model: a folder, URL or hub id.

    `instruction`: the system message; the task is not repeated in it, the student's opening has it.
    """

    kind: Literal["model"] = "model"
    """A transformers causal language model."""

    path: Text
    """Folder, URL or hub id of the model."""

    instruction: str | None = None
    """System message; the task is not repeated in it, since the student's opening has it. Null: none."""


class EndpointTutorConfig(Section):
    """An OpenAI-compatible endpoint. Its turns have no token ids: pairs from them are text."""

    kind: Literal["endpoint"] = "endpoint"
    """An OpenAI-compatible endpoint."""

    endpoint: EndpointConfig
    """The server. Its limits are those of the whole stage: the actors share them."""

    instruction: str | None = None
    """System message. Null: none."""


TutorConfig = Annotated[
    PolicyTutorConfig | ModelTutorConfig | EndpointTutorConfig, Field(discriminator="kind")
]


class MathDialCases(Section):
    """MathDial rows: problem, student profile, confusion and wrong solution; JSON, JSON Lines or Parquet."""

    kind: Literal["mathdial"] = "mathdial"
    """MathDial rows."""

    path: Text
    """File, folder, URL or `hub:OWNER/NAME` with the rows."""


class PrefixCases(Section):
    """Beginnings of dialogues to be continued: rows with `messages` (the last one by the user, that is the
    student), and perhaps `id` and `topic`."""

    kind: Literal["prefixes"] = "prefixes"
    """Beginnings of dialogues."""

    path: Text
    """File, folder, URL or `hub:OWNER/NAME` with the rows."""


class GridProblem(Section):
    """One problem of a generated grid. `answer` is the key: neither side sees it."""

    topic: Text
    """What the problem is about; pairs can be held out by it."""

    problem: LongText
    """The task, as both sides read it."""

    answer: str | None = None
    """The answer key, which neither side sees. Null: there is none."""


class GridCases(Section):
    """Every problem with every misconception."""

    kind: Literal["grid"] = "grid"
    """Problems and misconceptions, every one with every other."""

    problems: Annotated[list[GridProblem], Field(min_length=1)]
    """The problems."""

    misconceptions: Annotated[list[LongText], Field(min_length=1)]
    """What students get wrong, one sentence each."""


CasesConfig = Annotated[MathDialCases | PrefixCases | GridCases, Field(discriminator="kind")]


class PersonasConfig(Section):
    """The values that personas are dealt from: all combinations occur equally often (give or take one)."""

    knowledge: Annotated[list[Knowledge], Field(min_length=1)] = ["none", "partial", "solid"]
    """What a student knows at the start."""

    engagement: Annotated[list[Level], Field(min_length=1)] = ["low", "medium", "high"]
    """How willing a student is."""

    tone: Annotated[list[Tone], Field(min_length=1)] = ["friendly", "neutral", "frustrated"]
    """How a student speaks."""

    verbosity: Annotated[list[Verbosity], Field(min_length=1)] = ["terse", "normal", "talkative"]
    """How much a student says."""


class BranchingConfig(Section):
    """At each of the first `depth` tutor turns, `width` candidates go on as dialogues of their own."""

    depth: PositiveInt = 1
    """Number of first tutor turns at which dialogues branch."""

    width: Annotated[int, Field(ge=2, le=MAX_COUNT), NOT_BOOL] = 2
    """Candidates of each of these turns that go on as dialogues of their own; at most `candidates`."""


class PlayConfig(DialogueBatchConfig):
    """How dialogues are played.

    `turns`: tutor turns per dialogue (null: as many as the miniature's problem allows). `candidates` K turns
    are drawn at every moment; `continuation` says which one goes on: the `best` by the reward model, one
    `sampled` by softmax(total / score_temperature), or a `random` one. Totals are the `guidance`-weighted
    sums of scores standardised among the K. `stop`: a student turn with one of these texts ends the dialogue.
    """

    turns: PositiveInt | None = None
    """Tutor turns per dialogue. Null: as many as the miniature's problem allows."""

    continuation: Literal["best", "sampled", "random"] = "random"
    """Which candidate goes on: the `best` by the reward model, one `sampled` by softmax of the totals, or a
    `random` one."""

    score_temperature: PositiveFloat = 1.0
    """Divides the totals before the softmax of `continuation: sampled`."""

    guidance: OptionalWeights = None
    """Weights over the reward model's objectives for the totals, divided by their sum. Empty: all alike."""

    branching: BranchingConfig | None = None
    """Dialogues that branch at their first turns. Null: none do."""

    max_tokens: PositiveInt | None = None
    """Longest dialogue, in tokens; at most the models' contexts. Null: these alone."""

    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Texts that end the dialogue when a student's reply holds one of them."""

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
        return self


class DialoguesConfig(Section):
    """One set of dialogues. `output` is a folder or any fsspec URL that every node can reach.

    `reward`: a process reward model of ours that scores every candidate turn; without one there are no
    scores and no pairs. More than `max_failed_fraction` of failed dialogues ends the stage with the reason.
    """

    name: RunName
    """Name of the set: letters, digits, dots, dashes and underscores."""

    output: Text
    """Folder, or any fsspec URL that every node can reach, for everything that is written."""

    seed: Seed = 17
    """Seed of everything that is drawn."""

    tutor: TutorConfig
    """Who tutors."""

    student: StudentConfig
    """Who learns."""

    cases: CasesConfig | None = None
    """What the dialogues are about. Null, and only null, with the miniature's students, who bring their own
    problems."""

    personas: PersonasConfig = PersonasConfig()
    """The values that personas are dealt from."""

    reward: Text | None = None
    """Folder or URL of a process reward model of ours that scores every candidate. Null: no scores and no
    pairs."""

    play: PlayConfig = PlayConfig()
    """How dialogues are played."""

    pairs: PairsConfig = PairsConfig()
    """How pairs are made of scored candidates."""

    max_failed_fraction: Fraction = 0.1
    """Largest share of dialogues that may fail; more of them end the job with the reason."""

    dtype: Dtype = "float32"
    """Number format of the models' weights."""

    cluster: ActorsConfig = ActorsConfig()
    """Where the work runs."""

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

    model: Text
    """A run's output, or a reward model's folder, URL or hub id."""

    objective: Text | None = None
    """What a classifier of another maker scores. Null for a reward model of ours, which knows its
    objectives."""

    @classmethod
    def parse(cls, text: str) -> RewardSource:
        """`FOLDER`, or `objective=FOLDER` for a model of another maker."""
        name, equals, folder = text.partition("=")
        if not text.strip() or (equals and not folder.strip()):
            raise ValueError(f"'{text}' names no reward model: write FOLDER, or objective=FOLDER")
        return cls(model=folder, objective=name) if equals and name.isidentifier() else cls(model=text)


_GUIDED = ("argmax", "sample", "beam", "dvts", "best_of_n")
# The strategies that make use of an option: setting it for another one is an error, never ignored.
_USED_BY = {
    "guidance": _GUIDED,
    "standardisation": _GUIDED,
    "aggregation": _GUIDED,
    "beam_width": ("beam", "dvts"),
    "score_temperature": ("sample",),
}


class RequestConfig(SamplingParams):
    """What every prompt is answered with, as the endpoint's requests; rows may have weights, guidance and
    seed of their own. `seed` is mixed with each row's id."""

    weights: WeightVector | None = None
    """Weights over the policy's heads, divided by their sum. Null: a single-head model, or rows that name
    their own."""

    strength: Strength = 1.0
    """0 decodes with the head of the model that the policy was made from, 1 with the policy's own, above 1
    beyond it. Other than 1 needs a policy with its base head."""

    guidance: WeightVector | None = None
    """Weights over the reward models' objectives, divided by their sum. Null: all alike."""

    num_candidates: PositiveInt = 5
    """Candidates per step (of `best_of_n`: whole responses)."""

    strategy: Strategy = "argmax"
    """`argmax` takes each step's best candidate, `sample` draws one by its total, `beam` and `dvts` search,
    `best_of_n` chooses among whole responses, `none` samples one response without guidance."""

    beam_width: PositiveInt = 4
    """Continuations of each beam of `beam` and `dvts`; at least 2 there, and a divisor of
    `num_candidates`."""

    score_temperature: PositiveFloat = 1.0
    """Divides the totals before the softmax of `strategy: sample`."""

    standardisation: Standardisation = "within_candidates"
    """What scores are divided by before they are added: their spread `within_candidates`, or the `calibrated`
    one stored with the reward model."""

    aggregation: Aggregation = Aggregation()
    """How the scores of a candidate become what candidates are compared by."""

    seed: Annotated[int, Field(ge=0, le=MAX_REQUEST_SEED), NOT_BOOL] = 0
    """Seed of the answers; mixed with each row's id."""

    max_new_tokens: PositiveInt = 512
    """Most tokens of a whole answer."""

    max_step_tokens: PositiveInt = 256
    """Most tokens of one step."""

    max_steps: PositiveInt = 256
    """Most steps of an answer."""

    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Texts that end an answer; they are not part of it."""

    @model_validator(mode="after")
    def _options_are_used(self) -> Self:
        for name, strategies in _USED_BY.items():
            given = getattr(self, name) != type(self).model_fields[name].default
            if given and self.strategy not in strategies:
                raise ValueError(f"'{name}' is not used by 'strategy: {self.strategy}': leave it out")
        if self.aggregation.kind == "thresholds" and self.strategy == "sample":
            raise ValueError(
                "'aggregation.kind: thresholds' gives an order only, and 'strategy: sample' draws"
            )
        default = type(self).model_fields["num_candidates"].default
        if self.strategy == "none" and self.num_candidates not in (1, default):
            raise ValueError("'strategy: none' decodes one candidate: leave 'num_candidates' out")
        return self


class GenerateConfig(Section):
    """`prompts`: a file or folder of JSON, JSON Lines or Parquet rows; `output`: a folder or URL that every
    node can reach. Either `policy` (a model folder or a finished run) or `server` samples. Chunks of
    `chunk_rows` prompts are decoded together: another size is another job, another number of actors is not.
    """

    prompts: Text
    """File or folder (JSON, JSON Lines, Parquet) with the prompts."""

    output: Text
    """Folder, or any fsspec URL that every node can reach, for the answers."""

    domain: Domain = "tutoring"
    """Where steps end: `math` at blank lines, `lines` at line ends, `human_values` at sentences and
    paragraphs of 8 tokens and more, `sentence` at all of them, `tutoring` at whole turns."""

    policy: Text | None = None
    """A run's output, or the folder, URL or hub id of a policy or any causal language model. Either this or
    `server`."""

    server: ServerSource | None = None
    """A completion server that samples in the policy's place. Either this or `policy`."""

    rewards: list[RewardSource] = []
    """Reward models that guide. Needed by every strategy but `none`."""

    request: RequestConfig = RequestConfig()
    """What every prompt is answered with; rows may have weights, guidance and seed of their own."""

    chunk_rows: PositiveInt = 64
    """Prompts that one actor answers together. Another size is another job."""

    max_branches: PositiveInt = 256
    """Most candidates that one actor decodes at one time, over its prompts. Not used with `server`."""

    max_bad_fraction: Fraction = 0.05
    """Largest share of rows that cannot be used; they go to quarantine.parquet. More of them end the job."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the models' weights."""

    cluster: ActorsConfig = ActorsConfig()
    """Where the work runs."""

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
        if self.server is not None and self.cluster.cuda_graphs:
            raise ValueError("'cluster.cuda_graphs' is for a policy: a completion server has its own way")
        return self
