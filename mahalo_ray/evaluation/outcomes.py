"""What one method reached, and which family of methods it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mahalo_ray.evaluation.statistics import StudentId, align
from mahalo_ray.objectives import Weights

Family = Literal["mah_dpo", "dpo", "scalarised", "modpo", "soup"]
MethodKind = Literal["sft", "guided_sft", "head", "weights", "guided", "dpo", "scalarised", "modpo", "soup"]
# Ways to a policy for every weight vector, unguided: what the comparison compares.
FAMILY_OF: dict[MethodKind, Family] = {
    "head": "mah_dpo",
    "weights": "mah_dpo",
    "dpo": "dpo",
    "scalarised": "scalarised",
    "modpo": "modpo",
    "soup": "soup",
}


class MethodResult(BaseModel):
    """One method's outcome: one value per objective and dialogue, and what it cost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1)]
    kind: MethodKind
    # Decoding weights of the heads; of a baseline, the weights it was trained or averaged for; None for SFT.
    weights: dict[str, float] | None = None
    guidance: dict[str, float] | None = None  # guidance weights of the reward model; None when unguided
    num_candidates: Annotated[int, Field(ge=1)] = 1
    student_ids: list[StudentId]  # one per dialogue, each once
    values: dict[str, list[float]]  # objective -> one value per dialogue, in the order of student_ids
    kl_to_reference: float | None = (
        None  # nats per token to the SFT model on own samples; None = not measured
    )
    malformed_rate: Annotated[float, Field(ge=0, le=1)]  # share of the method's turns
    tokens: Annotated[int, Field(ge=0)]  # through the policy: prompts, replies and all candidates
    sweep: bool | None = None  # whether it is a point of the sweep; None: it is when its kind is "weights"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        guided = self.kind in ("guided", "guided_sft")
        if guided != (self.guidance is not None):
            raise ValueError(
                f"method '{self.name}' ({self.kind}): guidance weights go with guided methods only"
            )
        aligned = self.kind not in ("sft", "guided_sft")
        if aligned != (self.weights is not None):
            raise ValueError(f"method '{self.name}' ({self.kind}): weights go with aligned policies only")
        for named in (self.weights, self.guidance):
            if named is not None:
                Weights(named).over(self.values)
        if not self.student_ids or not self.values:
            raise ValueError(f"method '{self.name}' has no dialogues or no objectives")
        for objective, values in self.values.items():
            try:
                align(self.student_ids, values, self.student_ids)
            except ValueError as error:
                raise ValueError(f"method '{self.name}', objective '{objective}': {error}") from error
        return self

    @property
    def family(self) -> Family | None:
        """The family that the method is a point of; None for SFT and guided methods."""
        return FAMILY_OF.get(self.kind)

    @property
    def in_sweep(self) -> bool:
        """Whether the method is a point of the weight sweep."""
        return self.kind == "weights" if self.sweep is None else self.sweep

    def same_policy_unguided(self, other: MethodResult) -> bool:
        """Whether `other` is this method without guidance: same decoding weights, or SFT for guided SFT."""
        if other.guidance is not None or (self.weights is None) != (other.weights is None):
            return False
        if self.weights is None or other.weights is None:
            return other.kind == "sft"
        return other.family == "mah_dpo" and other.same_weights(self.weights)

    def same_weights(self, weights: Mapping[str, float]) -> bool:
        """Whether the method has these weights, up to rounding."""
        if self.weights is None:
            return False
        order = tuple(self.values)
        return np.allclose(Weights(self.weights).over(order), Weights(weights).over(order), atol=1e-6)
