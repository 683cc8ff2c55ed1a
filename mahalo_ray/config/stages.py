"""The sections of a run: one per stage, and what stages share."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mahalo_ray.config.section import (
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SamplingParams,
    Section,
)
from mahalo_ray.objectives import Weights


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


class SamplingConfig(SamplingParams):
    """How candidate turns are drawn, and how long they may be."""

    max_new_tokens: Annotated[PositiveInt, Field(description="most tokens of one turn or response")] = 64


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
