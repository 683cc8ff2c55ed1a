"""The comparison table: every method's means on the same students, dominance and hypervolume, and the fronts
of the families of baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mahalo_ray.config import BaselineName, PolicyMethod
from mahalo_ray.evaluation.statistics import (
    Estimate,
    StudentId,
    align,
    bootstrap_means,
    hypervolume,
    non_dominated,
    paired_difference,
    percentile_interval,
)
from mahalo_ray.metrics import FloatArray
from mahalo_ray.objectives import Weights, unknown_name

Family = Literal[PolicyMethod, BaselineName]
MethodKind = Literal["sft", "guided_sft", "head", "weights", "guided", BaselineName]
# Ways to a policy for every weight vector, unguided: what the comparison compares.
FAMILY_OF: dict[MethodKind, Family] = {
    "head": "mah_dpo",
    "weights": "mah_dpo",
    "dpo": "dpo",
    "scalarised": "scalarised",
    "modpo": "modpo",
    "soup": "soup",
}
BASELINES = tuple(kind for kind, family in FAMILY_OF.items() if family != "mah_dpo")


def compact_count(count: int) -> str:
    """31400 -> `31k`, 2500000 -> `2.5M`."""
    if count < 1000:
        return str(count)
    return f"{count / 1000:.0f}k" if count < 999_500 else f"{count / 1e6:.1f}M"


class MethodResult(BaseModel):
    """One method's outcome: one value per objective and dialogue, and what it cost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1)]
    kind: MethodKind
    # Decoding weights of the heads; of a baseline, the weights it was trained or averaged for; None for SFT.
    weights: dict[str, float] | None = None
    guidance: dict[str, float] | None = None  # guidance weights of the reward model; None when unguided
    num_candidates: Annotated[int, Field(ge=1)] = 1
    strength: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0  # of decoding; 1 is the policy itself
    # Of sampling; None: that of the evaluation.
    temperature: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
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
        is_guided = self.guidance is not None
        if is_guided != (self.kind in ("guided", "guided_sft")) and self.kind not in BASELINES:
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
    def means(self) -> dict[str, float]:
        """Mean of each objective over the dialogues."""
        return {name: sum(values) / len(values) for name, values in self.values.items()}

    @property
    def family(self) -> Family | None:
        """The family that the method is a point of; None for SFT and guided methods."""
        return FAMILY_OF.get(self.kind) if self.guidance is None else None

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
        family = FAMILY_OF.get(self.kind, "mah_dpo")
        return other.family == family and other.dials == self.dials and other.same_weights(self.weights)

    @property
    def dials(self) -> tuple[float, float | None]:
        """Strength and temperature."""
        return self.strength, self.temperature

    def same_weights(self, weights: Mapping[str, float]) -> bool:
        """Whether the method has these weights, up to rounding."""
        if self.weights is None:
            return False
        order = tuple(self.values)
        return np.allclose(Weights(self.weights).over(order), Weights(weights).over(order), atol=1e-6)


class Row(BaseModel):
    """One line of the table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: MethodKind
    weights: dict[str, float] | None
    guidance: dict[str, float] | None
    num_candidates: int
    strength: float = 1.0
    temperature: float | None = None
    means: dict[str, Estimate]
    kl_to_reference: float | None
    malformed_rate: float
    tokens: int
    in_sweep: bool
    non_dominated: bool  # among all methods, by their means
    non_dominated_in_sweep: bool | None  # among the sweep's points; None outside the sweep
    non_dominated_in_family: bool | None = None  # among a baseline's points; None outside the baselines

    @property
    def on_front(self) -> bool:
        """Non-dominated among its own kind: the sweep, the baseline, or, for other methods, all of them."""
        among_its_kind = self.non_dominated_in_sweep if self.in_sweep else self.non_dominated_in_family
        return self.non_dominated if among_its_kind is None else among_its_kind


class PairedDifference(BaseModel):
    """Method minus baseline on one objective, over the same students."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    baseline: str
    objective: str
    difference: Estimate


class FrontSummary(BaseModel):
    """The sweep's points as a front; intervals resample students, the same draw for all points."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    points: int
    non_dominated: Estimate  # how many distinct points neither another point of the sweep nor SFT dominates
    hypervolume: Estimate


class ComparisonTable:
    """All methods over the same students: means, intervals, dominance and hypervolume.

    Raises ValueError when methods share a name, lack an objective or did not meet the same students.
    """

    def __init__(
        self,
        methods: Sequence[MethodResult],
        objectives: Sequence[str],
        *,
        confidence: float = 0.95,
        resamples: int = 2000,
        seed: int = 17,
        reference_point: Sequence[float] | None = None,
    ) -> None:
        self.methods = tuple(methods)
        self.objectives = tuple(objectives)
        self.confidence, self.resamples, self.seed = confidence, resamples, seed
        self.reference_point = tuple(reference_point or (0.0,) * len(self.objectives))
        self._check()
        # [dialogues, methods, objectives], one order of students for all
        self.student_ids = tuple(self.methods[0].student_ids)
        self.values: FloatArray = np.stack([self._aligned(method) for method in self.methods], axis=1)
        n = len(self.student_ids)
        # [resamples, methods, objectives]: one draw of students serves every method
        self._samples = bootstrap_means(self.values.reshape(n, -1), resamples, seed).reshape(
            resamples, len(self.methods), len(self.objectives)
        )
        self.points: FloatArray = self.values.mean(axis=0)  # [methods, objectives]
        self.rows = self._rows()

    @property
    def dialogues(self) -> int:
        """Dialogues (students) behind every row."""
        return len(self.student_ids)

    @property
    def sweep_indices(self) -> list[int]:
        """Positions of the sweep's points among the methods."""
        return [index for index, method in enumerate(self.methods) if method.in_sweep]

    def hypervolume_of_all(self) -> float:
        """Hypervolume of all methods' means over the reference point."""
        return hypervolume(self.points, self.reference_point)

    def sweep_front(self) -> FrontSummary | None:
        """The sweep's hypervolume and count of non-dominated points with intervals; None without a sweep.

        SFT stands among the rivals: a sweep that the model before alignment dominates is no front.
        """
        indices = self.sweep_indices
        if not indices:
            return None
        rivals = [index for index, method in enumerate(self.methods) if method.kind == "sft"]
        compared = [*indices, *rivals]

        def count(points: FloatArray) -> float:
            return float(non_dominated(points, distinct=True)[: len(indices)].sum())

        counts = [count(sample) for sample in self._samples[:, compared]]
        return FrontSummary(
            points=len(indices),
            non_dominated=self.estimate(count(self.points[compared]), counts),
            hypervolume=self.estimate(*self.hypervolumes(indices)),
        )

    def hypervolumes(self, indices: Sequence[int]) -> tuple[float, FloatArray]:
        """Hypervolume of some methods' means, and of the same methods' resampled means [resamples].

        The n-th resample has the same students whatever the methods: differences are paired.
        """
        volumes = [hypervolume(sample, self.reference_point) for sample in self._samples[:, indices]]
        return hypervolume(self.points[indices], self.reference_point), np.array(volumes)

    def method(self, name: str) -> MethodResult:
        """The method of that name; ValueError if there is none."""
        for method in self.methods:
            if method.name == name:
                return method
        raise ValueError(unknown_name("method", name, (m.name for m in self.methods)))

    def only(self, kind: MethodKind) -> MethodResult | None:
        """The first method of a kind, None when there is none."""
        return next((method for method in self.methods if method.kind == kind), None)

    def unguided(self, guided: MethodResult) -> MethodResult | None:
        """The same policy at the same decoding weights without guidance, None when it was not measured."""
        return next((m for m in self.methods if guided.same_policy_unguided(m)), None)

    def difference(self, method: MethodResult, baseline: MethodResult, weights: Weights) -> Estimate:
        """Paired difference (method - baseline) of the weighted sum of the objectives."""
        return paired_difference(
            method.student_ids,
            self._weighted(method, weights),
            baseline.student_ids,
            self._weighted(baseline, weights),
            confidence=self.confidence,
            resamples=self.resamples,
            seed=self.seed,
        )

    def relative_change(
        self, method: MethodResult, baseline: MethodResult, objective: str
    ) -> Estimate | None:
        """(method - baseline) / baseline of the means of one objective, with its interval over resampled
        students, the same for both; None where the baseline's mean is 0 in the data or in a resample."""
        column = self.objectives.index(objective)
        names = [one.name for one in self.methods]
        row, base = names.index(method.name), names.index(baseline.name)
        samples = self._samples[:, (row, base), column]
        if self.points[base, column] == 0 or not samples[:, 1].all():
            return None
        value = float(self.points[row, column] / self.points[base, column]) - 1
        return self.estimate(value, samples[:, 0] / samples[:, 1] - 1)

    def paired_differences(self) -> list[PairedDifference]:
        """Every method against SFT, and every guided one against itself unguided, on every objective."""
        sft = self.only("sft")
        pairs = [(method, sft) for method in self.methods if sft is not None and method is not sft]
        for method in self.methods:
            plain = self.unguided(method) if method.guidance is not None else None
            if plain is not None and plain is not sft:
                pairs.append((method, plain))
        return [
            PairedDifference(
                method=method.name,
                baseline=baseline.name,
                objective=objective,
                difference=self.difference(method, baseline, Weights.one(objective)),
            )
            for method, baseline in pairs
            for objective in self.objectives
        ]

    def _check(self) -> None:
        if not self.methods or not self.objectives:
            raise ValueError("a comparison needs at least one method and one objective")
        if len(self.reference_point) != len(self.objectives):
            raise ValueError(
                f"the reference point has {len(self.reference_point)} values "
                f"for {len(self.objectives)} objectives"
            )
        names = [method.name for method in self.methods]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two methods are named '{name}': every row of the table needs its own name")
        for method in self.methods:
            missing = [objective for objective in self.objectives if objective not in method.values]
            if missing:
                raise ValueError(f"method '{method.name}' has no values for {', '.join(missing)}")

    def _aligned(self, method: MethodResult) -> FloatArray:
        order = self.methods[0].student_ids
        try:
            columns = [align(method.student_ids, method.values[o], order) for o in self.objectives]
        except ValueError as error:
            raise ValueError(f"method '{method.name}' against '{self.methods[0].name}': {error}") from error
        return np.stack(columns, axis=1)

    def _weighted(self, method: MethodResult, weights: Weights) -> FloatArray:
        columns = np.array([method.values[objective] for objective in self.objectives])
        return np.asarray(np.array(weights.over(self.objectives)) @ columns)

    def estimate(self, value: float, samples: Sequence[float] | FloatArray) -> Estimate:
        """A value with the interval of its resampled values."""
        low, high = percentile_interval(samples, self.confidence)
        return Estimate(value=value, low=low, high=high)

    def _rows(self) -> list[Row]:
        among_all = non_dominated(self.points)
        sweep = self.sweep_indices
        among_sweep = dict(zip(sweep, non_dominated(self.points[sweep]), strict=True))
        among_family: dict[int, bool] = {}
        for family in set(FAMILY_OF.values()) - {"mah_dpo"}:
            members = [index for index, method in enumerate(self.methods) if method.family == family]
            among_family |= dict(zip(members, non_dominated(self.points[members]).tolist(), strict=True))
        rows = []
        for index, method in enumerate(self.methods):
            means = {
                objective: self.estimate(float(self.points[index, column]), self._samples[:, index, column])
                for column, objective in enumerate(self.objectives)
            }
            shared = method.model_dump(exclude={"student_ids", "values", "sweep"})
            rows.append(
                Row(
                    **shared,
                    means=means,
                    in_sweep=method.in_sweep,
                    non_dominated=bool(among_all[index]),
                    non_dominated_in_sweep=bool(among_sweep[index]) if index in among_sweep else None,
                    non_dominated_in_family=among_family.get(index),
                )
            )
        return rows


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
    members = table.sweep_indices if ours else [i for i, m in enumerate(table.methods) if m.family == family]
    value, samples = table.hypervolumes(members)
    other = difference = None
    if not ours:
        at_same_weights = [_mah_dpo_at(table.methods, table.methods[index]) for index in members]
        other_value, other_samples = table.hypervolumes(at_same_weights)
        other = table.estimate(other_value, other_samples)
        difference = table.estimate(other_value - value, other_samples - samples)
    points = [table.methods[index] for index in members]
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
