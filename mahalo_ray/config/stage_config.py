"""Sections that say what a stage does: model, training, rollouts, reward model, pairs, policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mahalo_ray.config.section import (
    NOT_BOOL,
    NOT_SHAPING,
    SHAPING_WHERE_SET,
    Dtype,
    Fraction,
    HeadInput,
    HeadKind,
    NonNegativeFloat,
    NonNegativeInt,
    OptionalWeights,
    PairSelection,
    PerObjective,
    PolicyMethod,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    PreferenceLoss,
    SamplingParams,
    Section,
    Supervision,
    Text,
    Tuning,
    ZeroStage,
)
from mahalo_ray.objectives import unknown_name

AdamBeta = Annotated[float, Field(ge=0, lt=1), NOT_BOOL]


class ObjectiveConfig(Section):
    """One objective and how its process reward is supervised (see docs, "Process reward model")."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Name used in weights, tables, data and folders: lower-case letters, digits and underscores, beginning
    with a letter."""

    supervision: Supervision
    """How its process reward is supervised: `rollout_value` (a number per step, from continuations),
    `judged_rollouts` (a judgement per step of what followed), `judged_prefix` (a judgement of the
    conversation so far), `pairwise` (which of two whole responses is better)."""

    description: str = ""
    """One sentence for people, shown in the report."""


class ScratchModelConfig(Section):
    """A small Qwen2 model with its own byte-level BPE tokenizer, trained on the domain's text."""

    hidden_size: PositiveInt = 96
    """Width of the hidden states. A multiple of `num_attention_heads`."""

    num_layers: PositiveInt = 3
    """Number of transformer layers."""

    num_attention_heads: PositiveInt = 4
    """Attention heads per layer."""

    intermediate_size: PositiveInt = 256
    """Width of the feed-forward layers."""

    vocab_size: PositiveInt = 512
    """Most tokens of the tokenizer that is trained (byte-level BPE)."""


class LoraConfig(Section):
    """LoRA adapters on the backbone (peft).

    >>> LoraConfig(rank=8).target_modules
    'all-linear'
    """

    rank: PositiveInt = 16
    """Rank of the two matrices that are added to each adapted layer."""

    alpha: PositiveFloat = 32
    """Scale: what an adapter adds is multiplied by `alpha / rank`."""

    dropout: Fraction = 0.0
    """Share of an adapter's inputs that is dropped in training. 0 is off."""

    target_modules: Annotated[list[Text], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Names of the layers that get an adapter, or `all-linear` for every linear layer of the backbone."""


class AdaptersConfig(Section):
    """LoRA adapters of each objective's own on the upper blocks of the policy's backbone, mixed by the
    decoding weights like the heads.

    The more blocks have them, the less the objectives share: with none (`depth: 0`) the policy is MAH-DPO's
    heads over one backbone, with all of them every mixture is a soup of one model per objective.

    >>> AdaptersConfig(depth=2).rank
    8
    """

    depth: NonNegativeInt | Literal["all"] = 0
    """Number of blocks, counted from the last, whose linear layers get an adapter per objective; or `all`.
    0: none."""

    rank: PositiveInt = 8
    """Rank of the two matrices that are added to each layer for each objective."""

    alpha: PositiveFloat = 16
    """Scale: what the adapters add is multiplied by `alpha / rank`."""

    learning_rate: PositiveFloat | None = None
    """Highest learning rate of the adapters. Null: `training.learning_rate`, that of the backbone."""

    freeze_backbone: bool = False
    """Whether adapters and heads alone are trained, and the backbone stays the SFT model's."""

    @model_validator(mode="after")
    def _options_are_used(self) -> Self:
        defaults = {name: info.default for name, info in type(self).model_fields.items()}
        if self.depth == 0 and dict(self) != defaults:
            raise ValueError("options of 'adapters' are set, but 'depth' is 0: no block has any")
        return self


class ModelConfig(Section):
    """The language model everything starts from: a `base` folder or hub id, or one made from scratch."""

    base: Text | None = None
    """Folder, URL or hub id of a transformers causal language model with a chat template. Either this or
    `scratch`."""

    scratch: ScratchModelConfig | None = None
    """Sizes of a new small Qwen2 model, which is trained from nothing with a tokenizer of its own. Either
    this or `base`."""

    max_length: PositiveInt = 1024
    """Longest sequence that is trained on, in tokens; what is longer is cut."""

    dtype: Dtype = "float32"
    """Number format of the weights in training and decoding."""

    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention function of transformers. `flash_attention_2` needs its package and a GPU."""

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
    """Examples (`sft`), sequences (`reward`) or pairs (`policy`) per optimizer step, over all workers. How it
    is split over workers and micro-batches changes nothing but rounding."""

    micro_batch_size_per_device: PositiveInt = 16
    """Most of them that one worker computes at one time. For `reward` at least the candidates of one prompt,
    which stay together."""

    epochs: PositiveFloat = 1.0
    """How often the data is gone through; may be a fraction. Not used when `max_steps` is given."""

    max_steps: PositiveInt | None = None
    """Number of optimizer steps. Null: as many as `epochs` says."""

    learning_rate: PositiveFloat = 1e-4
    """Highest learning rate, reached after the warm-up. Heads may have one of their own
    (`head_learning_rate`)."""

    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate goes on after the warm-up: as it is, or down to 0 in a line or half a cosine."""

    warmup_fraction: Fraction = 0.03
    """Share of the steps in which the learning rate rises from 0."""

    warmup_steps: Annotated[NonNegativeInt | None, Field(json_schema_extra=SHAPING_WHERE_SET)] = None
    """Number of these steps, in place of `warmup_fraction`. Null: as `warmup_fraction` says."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay (AdamW) of the matrices; biases and norms do not decay. 0 is off."""

    adam_betas: tuple[AdamBeta, AdamBeta] = (0.9, 0.999)
    """Decay of Adam's running means of the gradient and of its square: two numbers from 0 up to, but not
    with, 1."""

    gradient_clipping: NonNegativeFloat = 1.0
    """Largest global norm of the gradient; a larger one is scaled down to it. 0 is off."""

    zero_stage: ZeroStage = 2
    """DeepSpeed ZeRO stage, what is split over the workers: 0 nothing, 1 the optimizer's state, 2 also
    gradients, 3 also parameters."""

    offload_optimizer: bool = False
    """Whether the optimizer's state is kept in host memory. Needs ZeRO stage 1, 2 or 3."""

    offload_parameters: bool = False
    """Whether parameters are kept in host memory. Needs ZeRO stage 3."""

    gradient_checkpointing: bool = False
    """Whether activations are computed again in the backward pass: less memory, about a third more time."""

    logit_chunk_size: PositiveInt = 1024
    """Most tokens whose logits over the vocabulary exist at one time. Smaller takes less memory; the loss is
    the same."""

    logps_kernel: Annotated[Literal["torch", "triton"], Field(json_schema_extra=SHAPING_WHERE_SET)] = "torch"
    """What computes log-probs in training. `triton`: kernels for CUDA without logits in memory, not yet tried
    on a card."""

    checkpoint_every_steps: PositiveInt = 50
    """Optimizer steps between two checkpoints. A killed run goes on from the last one."""

    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints that are kept."""

    report_every_steps: PositiveInt = 10
    """Optimizer steps between two lines of the training history."""

    report_to: Annotated[
        list[Literal["tensorboard", "mlflow", "trackio", "wandb"]], Field(json_schema_extra=NOT_SHAPING)
    ] = []
    """Trackers that get the training metrics besides history.json, every `report_every_steps` steps."""

    @field_validator("report_to")
    @classmethod
    def _trackers_are_installed(cls, trackers: list[str]) -> list[str]:
        for name in trackers:
            package, install = TRACKER_PACKAGES[name]
            if find_spec(package) is None:
                raise ValueError(f"'{name}' needs the package {package}, which is not installed: {install}")
        return trackers

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps is not None and "warmup_fraction" in self.model_fields_set:
            raise ValueError("give either 'warmup_steps' or 'warmup_fraction', not both")
        return self

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
    """How it is trained."""

    loss_on: Literal["tutor", "all"] = "tutor"
    """Whether the loss counts the tutor's turns alone, or the tokens of all turns."""


class SamplingConfig(SamplingParams):
    """How candidate turns are drawn, and how long they may be."""

    max_new_tokens: PositiveInt = 64
    """Most tokens of one turn or response."""


class DialogueBatchConfig(Section):
    """How many dialogues are played, and how candidate turns are drawn in them."""

    dialogues: PositiveInt = 64
    """Number of dialogues that are begun."""

    candidates: PositiveInt = 5
    """Candidate turns K that are drawn at every moment."""

    batch_size_per_actor: PositiveInt = 32
    """Dialogues that one actor plays together. Larger takes more memory; another size gives other chunks of
    work."""

    sampling: SamplingConfig = SamplingConfig()
    """How candidate turns are drawn."""


class RolloutConfig(DialogueBatchConfig):
    """Dialogues played by the policy against simulated students."""

    dialogues: PositiveInt = 240
    """Number of dialogues that are played, each with a student of its own."""

    candidates: PositiveInt = 6
    """Candidate turns K that are drawn at every moment. Comparing needs at least 2."""

    batch_size_per_actor: PositiveInt = 64
    """Dialogues that one actor plays together. Larger takes more memory; another size gives other chunks of
    work."""

    continuations: NonNegativeInt = 0
    """Continuations M of every candidate to the dialogue's end, whose outcomes label it. 0: candidates get no
    labels."""

    gamma: PositiveFraction = 1.0
    """Discount of the outcome of a continuation per later turn. 1 is none."""

    @model_validator(mode="after")
    def _gamma_needs_continuations(self) -> Self:
        if self.gamma != 1.0 and self.continuations == 0:
            raise ValueError("'gamma' discounts the outcome of continuations, and 'continuations' is 0")
        return self


class RewardConfig(Section):
    """The process reward model: backbone, head inputs and losses."""

    backbone: Tuning = "full"
    """What is trained besides the heads: the `full` backbone, `lora` adapters on it, or nothing (`frozen`,
    where every trace is read once)."""

    lora: LoraConfig | None = None
    """Shape of the adapters. Only with `backbone: lora`, and needed there."""

    inputs: list[HeadInput] = ["last", "pooled", "reference_logps"]
    """What a head reads of each step: hidden state of its `last` token, mean of its hidden states (`pooled`),
    its log-probs under the reference model (`reference_logps`)."""

    head_hidden_size: NonNegativeInt = 128
    """Width of the heads' hidden layer. 0: heads are linear."""

    ranking_weight: NonNegativeFloat = 1.0
    """Weight of the ranking loss among the candidates of one prompt, beside the loss of each step by itself.
    0 is off."""

    ranking_min_gap: NonNegativeFloat = 0.02
    """Smallest difference between two candidates' labels for which the ranking loss asks for an order, in
    units of the labels."""

    held_out_fraction: Fraction = 0.1
    """Share of the prompts that is not trained on, for the metrics and the score calibration."""

    head_learning_rate: PositiveFloat | None = None
    """Highest learning rate of the heads. Null: `training.learning_rate`."""

    dedicated: list[Annotated[list[Text], Field(min_length=1)]] = []
    """Groups of objectives that get one more reward model of their own each, to compare with (runs on own
    data only)."""

    cache_features: bool = True
    """Whether a frozen backbone reads every trace once and the head inputs are kept in the output folder.
    Other backbones change, so for them it must stay true."""

    training: TrainingConfig = TrainingConfig(learning_rate=5e-4, batch_size=32)
    """How it is trained."""

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
    """Preference pairs per objective, of candidates of one prompt, by reward-model score."""

    selection: PairSelection = "best_worst"
    """Which candidates of a prompt make pairs: the best against the worst (`best_worst`), `all` two whose gap
    is wide enough, or each candidate with one other, drawn by chance (`disjoint`). `all` gives several times
    the pairs, and as many more training steps per epoch."""

    min_gap_std: NonNegativeFloat = 1.0
    """Smallest gap of reward-model scores between chosen and rejected, in mean standard deviations of the
    scores within a prompt."""

    max_pairs_per_objective: PositiveInt | None = None
    """Most pairs of one objective; those with the largest gaps are taken. Null: all."""

    balance_length: bool = False
    """Whether as many pairs are taken with the longer turn chosen as with it rejected."""

    gap_margin: NonNegativeFloat = 0.0
    """Margin of each pair's loss: this times its gap, in mean standard deviations of the scores within a
    prompt. Pairs with a wider gap are then pushed further apart. 0: no margin."""

    split_by: Literal["dialogue", "topic"] = "dialogue"
    """What stays together when pairs are held out: all pairs of a dialogue, or of a topic."""

    held_out_fraction: Fraction = 0.1
    """Share of the dialogues (or topics) whose pairs are not trained on, for the metrics."""


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
    (0 = never) training also measures the KL to the reference of every head and of several mixtures on up to
    `metrics_rows` held-out pairs (`max_kl` ends training there) and, with `gradient_cosine`, the cosine
    between the objectives' gradients on the backbone, on as many training pairs. ZeRO-3 leaves no worker with
    the whole parameters this cosine needs: it works with stages 0 to 2.

    >>> PolicyConfig(beta={"accuracy": 0.1, "engagement": 0.3}).beta_of("engagement")
    0.3
    """

    extends: Annotated[Text | None, Field(json_schema_extra=SHAPING_WHERE_SET)] = None
    """A trained policy (a run's output, or its model folder), made from the same SFT model: the objectives
    that it has no head for get one, which is trained alone. The backbone and the other heads stay as they
    are. Only with `mah_dpo`. Null: all heads are new, and the backbone is trained with them."""

    method: PolicyMethod = "mah_dpo"
    """`mah_dpo` trains one head per objective over a shared backbone. The others train one head: `dpo` on the
    pairs of one objective, `scalarised` on those of all objectives with weighted losses, `modpo` on the pairs
    of one objective with a margin from the other objectives' rewards."""

    objective: Text | None = None
    """Whose pairs `dpo` and `modpo` train on. The other methods go without it."""

    mixture: OptionalWeights = None
    """Weight of each objective for `scalarised` and `modpo`; divided by their sum. The other methods go
    without it."""

    loss: PreferenceLoss = "sigmoid"
    """`sigmoid` is DPO's loss, `ipo` the squared one of IPO. `regression` (REBEL) makes the policy's
    differences equal to the pairs' margins over `beta`, so pairs need margins: `pairs.gap_margin`."""

    balance: Annotated[Literal["own", "sampled"], Field(json_schema_extra=SHAPING_WHERE_SET)] = "own"
    """Under which mixture of the heads a pair is trained: the head of its `own` objective, or a mixture that
    is `sampled` for it, by the weighted difference of both answers' scores at that mixture. `sampled` needs
    `mah_dpo`, `loss: regression` and pairs of scored candidates; `pairs.selection: disjoint` fits it."""

    beta: PerObjective = 0.1
    """How closely the policy is held to the reference: larger is closer. One number for all objectives, or
    one per objective (`{accuracy: 0.1, engagement: 0.3}`); each above 0."""

    label_smoothing: Annotated[float, Field(ge=0, lt=0.5), NOT_BOOL] = 0.0
    """Share of the pairs that is taken to be labelled the wrong way round (conservative DPO)."""

    average_log_probs: bool = False
    """Whether a response's log-probability is divided by its number of tokens."""

    chosen_anchor: Annotated[NonNegativeFloat, Field(json_schema_extra=SHAPING_WHERE_SET)] = 0.0
    """Weight of the negative log-probability per token of the chosen answers, added to the preference loss:
    keeps them likely while the rejected ones are pushed down. 0 is off."""

    chosen_penalty: Annotated[NonNegativeFloat, Field(json_schema_extra=SHAPING_WHERE_SET)] = 0.0
    """DPO-Positive: how many times the nats that a chosen answer has lost against the reference count against
    its pair. 0 is off."""

    share_prompts: Literal["auto", "always", "never"] = "auto"
    """Whether the prompt of a pair is read once for both responses: where the model allows it, always (an
    error where it does not), or never."""

    alpha: dict[str, NonNegativeFloat] = {}
    """Weight of each objective's loss in `mah_dpo`; 1 where none is given. The pairs of an objective of
    weight 0 are left out, and its head stays as it began."""

    head_kind: HeadKind = "full"
    """`full` heads are whole matrices, `low_rank` ones a difference of rank `head_rank` from the SFT model's
    head."""

    head_rank: PositiveInt = 16
    """Rank of `low_rank` heads. Not used by `full` ones."""

    head_noise: NonNegativeFloat = 1e-3
    """Standard deviation of the noise that makes the heads different at the start. 0: all begin as the SFT
    model's head."""

    head_learning_rate: PositiveFloat = 6e-4
    """Highest learning rate of the heads; `training.learning_rate` is that of the backbone."""

    lora: LoraConfig | None = None
    """Shape of LoRA adapters on the backbone. Null: the whole backbone is trained."""

    adapters: Annotated[AdaptersConfig, Field(json_schema_extra=SHAPING_WHERE_SET)] = AdaptersConfig()
    """Adapters of each objective's own on the upper blocks of the backbone. Only with `mah_dpo`."""

    metrics_every_steps: NonNegativeInt = 0
    """Optimizer steps between two measurements, on held-out pairs, of the KL to the reference of every head
    and of several mixtures, of loss and accuracy. 0: never."""

    max_kl: Annotated[PositiveFloat | None, Field(json_schema_extra=SHAPING_WHERE_SET)] = None
    """KL budget in nats per token: training ends when a measurement finds more at any head or mixture, and
    the weights of the last measurement within it are kept. Null: none."""

    metrics_rows: PositiveInt = 64
    """Most held-out pairs (and training pairs, for the cosine) that are measured each time."""

    sampled_turns: Annotated[NonNegativeInt, Field(json_schema_extra=NOT_SHAPING)] = 0
    """Turns that are sampled at each measurement, on held-out prompts over all heads and mixtures, to count
    the malformed ones: cut off, or with a special token inside. 0: none."""

    gradient_cosine: bool = False
    """Whether the cosine between the objectives' gradients on the backbone is measured too. Not with ZeRO
    stage 3."""

    training: TrainingConfig = TrainingConfig(zero_stage=3, learning_rate=1e-4)
    """How it is trained."""

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
        if self.adapters.depth != 0 and self.method != "mah_dpo":
            raise ValueError(f"'adapters' are per objective, and 'method: {self.method}' has one head")
        if self.adapters.depth != 0 and self.lora is not None:
            raise ValueError("give either 'adapters' (per objective) or 'lora' (one for all), not both")
        if self.extends is not None:
            self._check_extends()
        if self.balance == "sampled":
            self._check_sampled()
        if self.method == "modpo" and self.loss != "sigmoid":
            raise ValueError("'method: modpo' is defined for 'loss: sigmoid' only")
        mixture: Mapping[str, float] = self.mixture or {}
        if self.method == "modpo" and mixture.get(self.objective or "", 0.0) == 0:
            raise ValueError(
                f"'method: modpo' divides by the weight of '{self.objective}': give it one in 'mixture'"
            )
        return self

    def _check_sampled(self) -> None:
        """ValueError for what has no meaning where pairs belong to no objective."""
        if self.method != "mah_dpo" or self.loss != "regression":
            raise ValueError(
                "'balance: sampled' regresses mixtures of heads on scores: it needs 'method: mah_dpo' and "
                "'loss: regression'"
            )
        unused = {
            "alpha": bool(self.alpha),
            "extends": self.extends is not None,
            "chosen_anchor": self.chosen_anchor > 0,
            "chosen_penalty": self.chosen_penalty > 0,
            "gradient_cosine": self.gradient_cosine,
        }
        for option, given in unused.items():
            if given:
                raise ValueError(
                    f"'{option}' is for pairs that belong to one objective, and with 'balance: sampled' they "
                    "are trained at any balance, where either answer may be the better one: leave it out"
                )

    def _check_extends(self) -> None:
        """ValueError for options of what is frozen beside a head that is trained alone."""
        unused = {
            "lora": self.lora is not None,
            "adapters": self.adapters.depth != 0,
            "gradient_cosine": self.gradient_cosine,
        }
        if self.method != "mah_dpo":
            raise ValueError(f"'extends' adds heads to a policy, and 'method: {self.method}' has one head")
        for option, given in unused.items():
            if given:
                raise ValueError(
                    f"'extends' trains new heads alone, on the backbone as it is, and '{option}' is for "
                    "training that changes the backbone: leave it out"
                )

    @model_validator(mode="after")
    def _metrics_can_be_measured(self) -> Self:
        for name in ("gradient_cosine", "metrics_rows", "max_kl", "sampled_turns"):
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

    def unmeasured(self, *without: str) -> dict[str, Any]:
        """The values of this section for another training beside the run's own: without the figures that are
        measured while training, unless a KL budget rests on them, and `without` these keys."""
        measured = ("metrics_every_steps", "metrics_rows", "sampled_turns") if self.max_kl is None else ()
        return self.model_dump(exclude={"gradient_cosine", *measured, *without})

    def trained_objectives(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of all objectives whose pairs the method trains on."""
        if self.objective is not None:
            return (self.objective,)
        shares = self.mixture or {name: self.alpha.get(name, 1.0) for name in names}
        return tuple(name for name in names if shares.get(name, 0.0) > 0)

    def check_objectives(self, names: Sequence[str]) -> None:
        """ValueError if the settings name an objective that is not one of `names`, or leave one out."""
        betas = self.beta if isinstance(self.beta, dict) else {}
        named = {"alpha": self.alpha, "mixture": dict(self.mixture or {}), "beta": betas}
        named["objective"] = {} if self.objective is None else {self.objective: 1.0}
        for where, values in named.items():
            for name in values:
                if name not in names:
                    raise ValueError(f"'policy.{where}': {unknown_name('objective', name, names)}")
        trained = self.trained_objectives(names)
        if not trained:
            raise ValueError("'policy.alpha' is 0 for every objective: nothing would be trained")
        if betas and (missing := [name for name in trained if name not in betas]):
            raise ValueError(f"'policy.beta' has no value for {', '.join(missing)}")
        if unused := [name for name in betas if name not in trained]:
            raise ValueError(f"'policy.beta': 'method: {self.method}' trains no pairs of {', '.join(unused)}")
        if self.gradient_cosine and len(trained) < 2:
            raise ValueError("'policy.gradient_cosine' compares objectives, and there is only one")
