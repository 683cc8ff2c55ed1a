"""Families of methods: several ways to a policy for every weight vector, as fronts and by what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from mahalo_ray.evaluation.outcomes import Family, MethodResult
from mahalo_ray.evaluation.results import ComparisonTable
from mahalo_ray.evaluation.statistics import Estimate

FAMILY_NAMES: dict[Family, str] = {
    "mah_dpo": "MAH-DPO",
    "dpo": "DPO per objective",
    "scalarised": "scalarised DPO",
    "modpo": "MODPO",
    "soup": "DPO soup",
}
ANOTHER_VECTOR: dict[Family, str] = {
    "mah_dpo": "nothing: weights come with the request",
    "dpo": "not possible",
    "scalarised": "a training run, a model",
    "modpo": "a training run, a model",
    "soup": "an average of all parameters, a model",
}


class FamilyCost(BaseModel):
    """What a family needs to serve its weight vectors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    training_runs: int
    pairs_trained: int  # over all runs: steps times pairs per step
    models: int  # that an endpoint for all its weight vectors holds
    parameter_bytes: int  # of these models as they are stored


class FamilyFront(BaseModel):
    """A family's points as a front, beside MAH-DPO at the same weight vectors.

    Hypervolumes are over the table's reference point. `mah_dpo` and `difference` (MAH-DPO minus the family,
    the same resampled students for both) are None for MAH-DPO itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: Family
    weights: list[dict[str, float]]
    hypervolume: Estimate
    mah_dpo: Estimate | None
    difference: Estimate | None
    kl_to_reference: tuple[float, float] | None  # lowest and highest of the points; None = not measured
    malformed_rate: float  # the highest of the points
    cost: FamilyCost

    @property
    def name(self) -> str:
        """The family's name in tables."""
        return FAMILY_NAMES[self.family]

    @property
    def another_vector(self) -> str:
        """What a further weight vector takes."""
        return ANOTHER_VECTOR[self.family]


def family_fronts(table: ComparisonTable, costs: Mapping[Family, FamilyCost]) -> list[FamilyFront]:
    """Every family of `costs`, in that order; MAH-DPO's own points are those of the sweep.

    Raises ValueError when MAH-DPO has no row at one of a family's weight vectors.
    """
    return [_front(table, family, cost) for family, cost in costs.items()]


def _front(table: ComparisonTable, family: Family, cost: FamilyCost) -> FamilyFront:
    ours = family == "mah_dpo"
    own = table.sweep_indices if ours else [i for i, m in enumerate(table.methods) if m.family == family]
    value, samples = table.hypervolumes(own)
    other = difference = None
    if not ours:
        at_same_weights = [_mah_dpo_at(table.methods, table.methods[index]) for index in own]
        other_value, other_samples = table.hypervolumes(at_same_weights)
        other = table.estimate(other_value, other_samples)
        difference = table.estimate(other_value - value, other_samples - samples)
    points = [table.methods[index] for index in own]
    divergences = [point.kl_to_reference for point in points if point.kl_to_reference is not None]
    return FamilyFront(
        family=family,
        weights=[dict(point.weights or {}) for point in points],
        hypervolume=table.estimate(value, samples),
        mah_dpo=other,
        difference=difference,
        kl_to_reference=(min(divergences), max(divergences)) if divergences else None,
        malformed_rate=max(point.malformed_rate for point in points),
        cost=cost,
    )


def _mah_dpo_at(methods: Sequence[MethodResult], point: MethodResult) -> int:
    """Position of MAH-DPO's row at the weights of a baseline's point."""
    for index, method in enumerate(methods):
        if method.family == "mah_dpo" and method.same_weights(point.weights or {}):
            return index
    raise ValueError(f"no row of MAH-DPO has the weights of '{point.name}' to compare it with")
