"""The whole run as one typed document: load, override, validate, write resolved.

Unknown keys are errors that name the file, the key and the nearest known key. Sizes are global unless their
name says `per_device`; times are seconds; lengths are tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic.fields import FieldInfo

from mahalo_ray.objectives import Weights, unknown_name

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Told apart first, so that an error speaks of the form that was written.
PerObjective = Annotated[
    Annotated[PositiveFloat, Tag("number")] | Annotated[dict[str, PositiveFloat], Tag("by_objective")],
    Discriminator(lambda value: "by_objective" if isinstance(value, dict) else "number"),
]


class ConfigError(ValueError):
    """The run's configuration cannot be used; the message says which key, where, and what to do."""


class Section(BaseModel):
    """Base of every section: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults_of_the_place(cls, data: Any) -> Any:
        """A section given in part keeps what its place sets: `policy.training` stays ZeRO-3, for example."""
        if not isinstance(data, dict):
            return data
        for name, info in cls.model_fields.items():
            if isinstance(info.default, Section) and isinstance(data.get(name), dict):
                data = {**data, name: info.default.model_dump(exclude_unset=True) | data[name]}
        return data


class ObjectiveConfig(Section):
    """One objective and how its process reward is supervised (see docs, "Process reward model")."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    supervision: Literal["rollout_value", "judged_rollouts", "judged_prefix", "pairwise"]
    description: str = ""


class ClusterConfig(Section):
    """Where the work runs. `address: null` starts a private local Ray unless RAY_ADDRESS is set."""

    address: str | None = None
    train_workers: PositiveInt = 2
    cpus_per_train_worker: PositiveFloat = 1
    rollout_actors: PositiveInt = 2
    cpus_per_rollout_actor: PositiveFloat = 1
    use_gpu: bool = False
    max_failures: NonNegativeInt = 3

    @property
    def device(self) -> str:
        """Torch device type of every worker."""
        return "cuda" if self.use_gpu else "cpu"


class ScratchModelConfig(Section):
    """A small Qwen2 model with its own byte-level BPE tokenizer, trained on the domain's text."""

    hidden_size: PositiveInt = 96
    num_layers: PositiveInt = 3
    num_attention_heads: PositiveInt = 4
    intermediate_size: PositiveInt = 256
    vocab_size: PositiveInt = 512


class LoraConfig(Section):
    """LoRA adapters on the backbone (peft)."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32
    dropout: Fraction = 0.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"


class ModelConfig(Section):
    """The language model everything starts from: a `base` folder or hub id, or one made from scratch."""

    base: str | None = None
    scratch: ScratchModelConfig | None = None
    max_length: PositiveInt = 1024
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.base is None) == (self.scratch is None):
            raise ValueError(
                "give exactly one of 'base' (a folder or hub id) and 'scratch' (a new small model)"
            )
        return self


class TrainingConfig(Section):
    """What every training stage shares. `batch_size` is global: how it is split changes nothing."""

    batch_size: PositiveInt = 32
    micro_batch_size_per_device: PositiveInt = 16
    epochs: PositiveFloat = 1.0
    max_steps: PositiveInt | None = None
    learning_rate: PositiveFloat = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_fraction: Fraction = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    gradient_clipping: Annotated[float, Field(ge=0, description="0 = off")] = 1.0
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    gradient_checkpointing: bool = False
    logit_chunk_size: PositiveInt = 1024
    checkpoint_every_steps: PositiveInt = 50
    keep_checkpoints: PositiveInt = 2
    report_every_steps: PositiveInt = 10

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> Self:
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("'offload_parameters' needs 'zero_stage: 3'")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("'offload_optimizer' needs 'zero_stage' 1, 2 or 3")
        return self


class SftConfig(Section):
    """Supervised fine-tuning on tutor turns (or from scratch, for a scratch model)."""

    training: TrainingConfig = TrainingConfig(learning_rate=3e-3, batch_size=64)
    loss_on: Literal["tutor", "all"] = "tutor"


class SamplingConfig(Section):
    """How candidate turns are drawn."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: NonNegativeInt = 0
    top_p: Fraction = 1.0
    min_p: Fraction = 0.0
    max_new_tokens: PositiveInt = 64


class RolloutConfig(Section):
    """Dialogues played by the policy against simulated students."""

    dialogues: PositiveInt = 240
    candidates: PositiveInt = 6
    continuations: NonNegativeInt = 0
    gamma: Annotated[float, Field(gt=0, le=1, description="discount of the outcome per later turn")] = 1.0
    batch_size_per_actor: PositiveInt = 64
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _gamma_needs_continuations(self) -> Self:
        if self.gamma != 1.0 and self.continuations == 0:
            raise ValueError("'gamma' discounts the outcome of continuations, and 'continuations' is 0")
        return self


class RewardConfig(Section):
    """The process reward model: backbone, head inputs and losses."""

    backbone: Literal["full", "lora", "frozen"] = "full"
    lora: LoraConfig | None = None
    inputs: list[Literal["last", "pooled", "reference_logps"]] = ["last", "pooled", "reference_logps"]
    head_hidden_size: NonNegativeInt = 128
    ranking_weight: Annotated[float, Field(ge=0)] = 1.0
    ranking_min_gap: Annotated[float, Field(ge=0)] = 0.02
    held_out_fraction: Fraction = 0.1
    head_learning_rate: PositiveFloat | None = None
    training: TrainingConfig = TrainingConfig(learning_rate=5e-4, batch_size=32)

    @model_validator(mode="after")
    def _lora_only_with_lora(self) -> Self:
        if (self.backbone == "lora") != (self.lora is not None):
            raise ValueError("'lora' settings go with 'backbone: lora', and only with it")
        if not self.inputs:
            raise ValueError(
                "'inputs' is empty: the head needs at least one of last, pooled, reference_logps"
            )
        return self


class PairsConfig(Section):
    """Preference pairs per objective: best against worst candidate of one prompt by reward-model score."""

    min_gap_std: Annotated[float, Field(ge=0, description="in mean within-prompt standard deviations")] = 1.0
    max_pairs_per_objective: PositiveInt | None = None
    held_out_fraction: Fraction = 0.1


_METHOD_OPTIONS = {
    "mah_dpo": {"alpha"},
    "dpo": {"objective"},
    "scalarised": {"mixture"},
    "modpo": {"objective", "mixture"},
}


class PolicyConfig(Section):
    """The policy: Multi-Action-Head DPO, or one of the methods it is compared with.

    `method`: `mah_dpo` trains one head per objective over a shared backbone, `alpha` times each objective's
    loss. The others train one head: `dpo` on the pairs of `objective` alone, `scalarised` on the pairs of all
    objectives with their losses weighted by `mixture`, `modpo` on the pairs of `objective` with a margin from
    the other objectives' rewards, for the weight vector `mixture`.

    `beta`: one number, or a mapping that gives every objective its own. Every `metrics_every_steps` steps
    (0 = never) training also measures every head's KL to the reference on up to `metrics_rows` held-out pairs
    and, with `gradient_cosine`, the cosine between the objectives' gradients on the backbone, on as many
    training pairs. ZeRO-3 leaves no worker with the whole parameters this cosine needs: it works with stages
    0 to 2.
    """

    method: Literal["mah_dpo", "dpo", "scalarised", "modpo"] = "mah_dpo"
    objective: str | None = None
    mixture: dict[str, Annotated[float, Field(ge=0)]] = {}
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: PerObjective = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    average_log_probs: bool = False
    alpha: dict[str, PositiveFloat] = {}
    head_kind: Literal["full", "low_rank"] = "full"
    head_rank: PositiveInt = 16
    head_noise: Annotated[float, Field(ge=0)] = 1e-3
    head_learning_rate: PositiveFloat = 6e-4
    lora: LoraConfig | None = None
    metrics_every_steps: NonNegativeInt = 0
    metrics_rows: PositiveInt = 64
    gradient_cosine: bool = False
    training: TrainingConfig = TrainingConfig(zero_stage=3, learning_rate=1e-4)

    @model_validator(mode="after")
    def _options_fit_the_method(self) -> Self:
        used = _METHOD_OPTIONS[self.method]
        given = {"alpha": self.alpha, "objective": self.objective, "mixture": self.mixture}
        for option, value in given.items():
            if value and option not in used:
                raise ValueError(f"'{option}' is not used by 'method: {self.method}': leave it out")
            if not value and option in used and option != "alpha":
                raise ValueError(f"'method: {self.method}' needs '{option}'")
        if self.mixture:
            Weights(self.mixture)  # refuses weights that are all zero
        if self.method == "modpo" and self.loss != "sigmoid":
            raise ValueError("'method: modpo' is defined for 'loss: sigmoid' only")
        if self.method == "modpo" and self.mixture.get(self.objective or "", 0.0) == 0:
            raise ValueError(
                f"'method: modpo' divides by the weight of '{self.objective}': give it one in 'mixture'"
            )
        return self

    @model_validator(mode="after")
    def _metrics_can_be_measured(self) -> Self:
        if self.gradient_cosine and self.metrics_every_steps == 0:
            raise ValueError(
                "'gradient_cosine' is measured every 'metrics_every_steps' steps: set them above 0"
            )
        if self.gradient_cosine and self.training.zero_stage == 3:
            raise ValueError(
                "'gradient_cosine' needs whole parameters on every worker, which 'training.zero_stage: 3' "
                "does not leave: set the stage to 2 or lower, or 'gradient_cosine' to false"
            )
        return self

    def beta_of(self, objective: str) -> float:
        """The DPO temperature of one objective's pairs."""
        return self.beta[objective] if isinstance(self.beta, dict) else self.beta

    def trained_objectives(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of all objectives whose pairs the method trains on."""
        if self.objective is not None:
            return (self.objective,)
        return tuple(name for name in names if not self.mixture or self.mixture.get(name, 0.0) > 0)

    def check_objectives(self, names: Sequence[str]) -> None:
        """ValueError if the settings name an objective that is not one of `names`, or leave one out."""
        betas = self.beta if isinstance(self.beta, dict) else {}
        named = {"alpha": self.alpha, "mixture": self.mixture, "beta": betas}
        named["objective"] = {} if self.objective is None else {self.objective: 1.0}
        for where, values in named.items():
            for name in values:
                if name not in names:
                    raise ValueError(f"'policy.{where}': {unknown_name('objective', name, names)}")
        trained = self.trained_objectives(names)
        if betas and (missing := [name for name in trained if name not in betas]):
            raise ValueError(f"'policy.beta' has no value for {', '.join(missing)}")
        if unused := [name for name in betas if name not in trained]:
            raise ValueError(f"'policy.beta': 'method: {self.method}' trains no pairs of {', '.join(unused)}")
        if self.gradient_cosine and len(trained) < 2:
            raise ValueError("'policy.gradient_cosine' compares objectives, and there is only one")


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
    """A file or folder of preference pairs (see `mahalo_ray.data.readers`), and which objective they are for:
    `objective` for all rows, or `objective_field`, the field of each row that names it."""

    path: str
    format: Literal["auto", "trl", "mahalo"] = "auto"
    objective: str | None = None
    objective_field: str | None = None

    @model_validator(mode="after")
    def _one_way_to_the_objective(self) -> Self:
        if (self.objective is None) == (self.objective_field is None):
            raise ValueError(
                "give exactly one of 'objective' (that of all rows) and 'objective_field' (the field of a "
                "row that names it)"
            )
        return self


class DataConfig(Section):
    """Own preference pairs, in place of a domain's rollouts: the policy is trained on them from `model.base`.

    Rows that cannot be used are written to quarantine.parquet; more than `max_bad_fraction` of them is an
    error.
    """

    pairs: Annotated[list[PairsSource], Field(min_length=1)]
    max_bad_fraction: Fraction = 0.01


# What a run on own pairs has no use for: setting it is an error, never ignored.
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


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, apply `a.b=c` overrides (values are YAML) and validate.

    Raises ConfigError naming the file and every wrong key.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"no config file at '{path}'")
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not {type(document).__name__}")
    for override in overrides or []:
        _apply_override(document, override)
    try:
        return RunConfig.model_validate(document)
    except ValidationError as error:
        raise ConfigError(_explain(error, str(path))) from error


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML, every default written out; loads back to the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(document: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"cannot read override '{override}': write --set section.key=value")
    node: Any = document
    for depth, key in enumerate(keys[:-1]):
        if isinstance(node, list):
            node = _list_item(node, key, override)
            continue
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict | list):
            raise ConfigError(
                f"override '{override}': '{'.'.join(keys[: depth + 1])}' is a value, not a section"
            )
    value = yaml.safe_load(text)
    if isinstance(node, list):
        _list_item(node, keys[-1], override)
        node[int(keys[-1])] = value
    else:
        node[keys[-1]] = value


def _list_item(items: list[Any], key: str, override: str) -> Any:
    if not key.isdigit() or int(key) >= len(items):
        raise ConfigError(f"override '{override}': '{key}' is not an index below {len(items)}")
    return items[int(key)]


def _explain(error: ValidationError, source: str) -> str:
    lines = []
    for item in error.errors():
        location = ".".join(str(part) for part in item["loc"]) or "(top level)"
        if item["type"] == "extra_forbidden":
            known = _known_keys(item["loc"][:-1])
            lines.append(f"  {location}: {unknown_name('key', str(item['loc'][-1]), known)}")
        else:
            given = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
            lines.append(f"  {location}: {item['msg'].removeprefix('Value error, ')}{given}")
    return f"{source} cannot be used:\n" + "\n".join(lines)


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        section = _section_of(section.model_fields[part])
    return list(section.model_fields)


def _section_of(field: FieldInfo) -> type[BaseModel]:
    candidates: list[Any] = [field.annotation]
    while candidates:
        annotation = candidates.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        candidates.extend(getattr(annotation, "__args__", ()))
    raise AssertionError(f"{field} holds no section")
