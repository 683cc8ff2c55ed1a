"""The policy's section: Multi-Action-Head DPO and the methods it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mahalo_ray.config.section import (
    NonNegativeInt,
    PerObjective,
    PositiveFloat,
    PositiveInt,
    Section,
)
from mahalo_ray.config.stages import LoraConfig, TrainingConfig
from mahalo_ray.objectives import Weights, unknown_name

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
