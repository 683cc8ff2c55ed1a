"""Sections that say what a stage does: model, training, rollouts, reward model, pairs, policy."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mahalo_ray.config.section import (
    NOT_SHAPING,
    Fraction,
    NonNegativeInt,
    PerObjective,
    PositiveFloat,
    PositiveInt,
    SamplingParams,
    Section,
)
from mahalo_ray.objectives import Weights, unknown_name


class ObjectiveConfig(Section):
    """One objective and how its process reward is supervised (see docs, "Process reward model")."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    supervision: Literal["rollout_value", "judged_rollouts", "judged_prefix", "pairwise"]
    description: str = ""


class ActorsConfig(Section):
    """Where the work of a job that trains nothing runs. `address: null` starts a private local Ray unless
    RAY_ADDRESS is set."""

    address: str | None = None
    rollout_actors: PositiveInt = 2
    cpus_per_rollout_actor: PositiveFloat = 1
    use_gpu: bool = False
    max_failures: NonNegativeInt = 3

    @property
    def device(self) -> str:
        """Torch device type of every worker."""
        return "cuda" if self.use_gpu else "cpu"

    @model_validator(mode="before")
    @classmethod
    def _trains_nothing(cls, data: Any) -> Any:
        """The keys of a run's `cluster` that a job without training has no use for."""
        for name in ("train_workers", "cpus_per_train_worker"):
            if name not in cls.model_fields and isinstance(data, dict) and name in data:
                raise ValueError(f"'{name}' is not used: nothing is trained here, leave it out")
        return data


class ClusterConfig(ActorsConfig):
    """Where the work of a run with training stages runs."""

    train_workers: PositiveInt = 2
    cpus_per_train_worker: PositiveFloat = 1


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


# The package behind each entry of `report_to`, and how it is installed.
TRACKER_PACKAGES = {
    "tensorboard": ("tensorboardX", "pip install 'mahalo_ray[tensorboard]'"),
    "mlflow": ("mlflow", "pip install 'mahalo_ray[mlflow]'"),
    "trackio": ("trackio", "pip install 'mahalo_ray[trackio]'"),
    "wandb": ("wandb", "pip install 'mahalo_ray[wandb]'"),
}


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
    report_to: Annotated[
        list[Literal["tensorboard", "mlflow", "trackio", "wandb"]],
        Field(
            description="where training metrics go besides history.json, every report_every_steps steps",
            json_schema_extra=NOT_SHAPING,
        ),
    ] = []

    @field_validator("report_to")
    @classmethod
    def _trackers_are_installed(cls, trackers: list[str]) -> list[str]:
        for name in trackers:
            package, install = TRACKER_PACKAGES[name]
            if find_spec(package) is None:
                raise ValueError(f"'{name}' needs the package {package}, which is not installed: {install}")
        return trackers

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


class SamplingConfig(SamplingParams):
    """How candidate turns are drawn, and how long they may be."""

    max_new_tokens: Annotated[PositiveInt, Field(description="most tokens of one turn or response")] = 64


class DialogueBatchConfig(Section):
    """How many dialogues are played, and how candidate turns are drawn in them."""

    dialogues: PositiveInt = 64
    candidates: PositiveInt = 5
    batch_size_per_actor: PositiveInt = 32
    sampling: SamplingConfig = SamplingConfig()


class RolloutConfig(DialogueBatchConfig):
    """Dialogues played by the policy against simulated students."""

    dialogues: PositiveInt = 240
    candidates: PositiveInt = 6
    batch_size_per_actor: PositiveInt = 64
    continuations: NonNegativeInt = 0
    gamma: Annotated[float, Field(gt=0, le=1, description="discount of the outcome per later turn")] = 1.0

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
    dedicated: Annotated[
        list[Annotated[list[str], Field(min_length=1)]],
        Field(description="groups of objectives that get a reward model of their own too, to compare with"),
    ] = []
    cache_features: Annotated[
        bool, Field(description="a frozen backbone reads every trace once; its head inputs are kept")
    ] = True
    training: TrainingConfig = TrainingConfig(learning_rate=5e-4, batch_size=32)

    @model_validator(mode="after")
    def _lora_only_with_lora(self) -> Self:
        if (self.backbone == "lora") != (self.lora is not None):
            raise ValueError("'lora' settings go with 'backbone: lora', and only with it")
        if self.backbone != "frozen" and not self.cache_features:
            raise ValueError("'cache_features' is for 'backbone: frozen' alone: other backbones change")
        if not self.inputs:
            raise ValueError(
                "'inputs' is empty: the head needs at least one of last, pooled, reference_logps"
            )
        return self


class PairsConfig(Section):
    """Preference pairs per objective: best against worst candidate of one prompt by reward-model score."""

    min_gap_std: Annotated[float, Field(ge=0, description="in mean within-prompt standard deviations")] = 1.0
    max_pairs_per_objective: PositiveInt | None = None
    balance_length: Annotated[
        bool, Field(description="as many pairs with the longer turn chosen as with it rejected")
    ] = False
    split_by: Annotated[
        Literal["dialogue", "topic"], Field(description="what a held-out split keeps together")
    ] = "dialogue"
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
    share_prompts: Literal["auto", "always", "never"] = "auto"
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
        if self.head_kind == "full" and self.head_rank != type(self).model_fields["head_rank"].default:
            raise ValueError("'head_rank' is that of 'head_kind: low_rank': leave it out")
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
        for name in ("gradient_cosine", "metrics_rows"):
            given = getattr(self, name) != type(self).model_fields[name].default
            if given and self.metrics_every_steps == 0:
                raise ValueError(
                    f"'{name}' is for what is measured every 'metrics_every_steps' steps: set them above 0"
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
