"""The comparison's section: which baselines of MAH-DPO are made, and for which weight vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mahalo_ray.config.section import Section
from mahalo_ray.config.stages import SweepConfig
from mahalo_ray.objectives import Weights, unknown_name

BaselineName = Literal["dpo", "scalarised", "modpo", "soup"]


class BaselineConfig(Section):
    """One baseline. `dpo` is one policy per objective; the others are made for weight vectors.

    `weights`: the vectors that `scalarised` and `modpo` train a policy for, and that `soup` averages the DPO
    policies at; none: those of the sweep. `objective`: the one whose pairs `modpo` trains on; none: at every
    vector the objective with the largest weight (the first of equal ones).
    """

    method: BaselineName
    weights: list[dict[str, Annotated[float, Field(ge=0)]]] = []
    objective: str | None = None

    @model_validator(mode="after")
    def _options_fit_the_method(self) -> Self:
        if self.method == "dpo" and self.weights:
            raise ValueError("'weights' is not used by 'method: dpo', which is one policy per objective")
        if self.method != "modpo" and self.objective is not None:
            raise ValueError(f"'objective' is not used by 'method: {self.method}': leave it out")
        return self

    def vectors(self, objectives: Sequence[str], sweep: SweepConfig) -> list[Weights]:
        """The weight vectors of its policies, in order."""
        if self.method == "dpo":
            return [Weights.one(name) for name in objectives]
        return [Weights(vector) for vector in self.weights or sweep.weights]

    def pairs_of(self, weights: Weights, objectives: Sequence[str]) -> str:
        """The objective whose pairs MODPO trains on for this vector."""
        return self.objective or max(objectives, key=lambda name: weights.get(name, 0.0))

    def check_objectives(self, where: str, names: Sequence[str], sweep: SweepConfig) -> None:
        """See `CompareConfig.check_objectives`; `where` is the key of this baseline."""
        named = {f"{where}.weights.{index}": list(vector) for index, vector in enumerate(self.weights)}
        named[f"{where}.objective"] = [] if self.objective is None else [self.objective]
        for key, mentioned in named.items():
            for name in mentioned:
                if name not in names:
                    raise ValueError(f"'{key}': {unknown_name('objective', name, names)}")
        given = [[f"{value:.3g}" for value in Weights(vector).over(names)] for vector in self.weights]
        if repeated := [vector for vector in given if given.count(vector) > 1]:
            raise ValueError(f"'{where}.weights' has the vector {' / '.join(repeated[0])} twice")
        for vector in [] if self.objective is None else self.vectors(names, sweep):
            if vector.get(self.objective or "", 0.0) == 0:
                raise ValueError(
                    f"'{where}.objective': MODPO divides by the weight of '{self.objective}', which is 0 at "
                    f"{vector.label()}: leave that vector out, or leave 'objective' out"
                )


class CompareConfig(Section):
    """`mahalo compare`: which baselines are made of the run's pairs and played against the same students."""

    baselines: Annotated[list[BaselineConfig], Field(min_length=1)] = [
        BaselineConfig(method="dpo"),
        BaselineConfig(method="scalarised"),
        BaselineConfig(method="modpo"),
        BaselineConfig(method="soup"),
    ]

    @model_validator(mode="after")
    def _each_method_once(self) -> Self:
        methods = [baseline.method for baseline in self.baselines]
        if repeated := [method for method in methods if methods.count(method) > 1]:
            raise ValueError(f"'baselines' has '{repeated[0]}' twice: give it all its 'weights' in one entry")
        return self

    def check_objectives(self, names: Sequence[str], sweep: SweepConfig) -> None:
        """ValueError if a baseline names an unknown objective, a vector twice, or one MODPO is not defined
        for."""
        for number, baseline in enumerate(self.baselines):
            baseline.check_objectives(f"compare.baselines.{number}", names, sweep)
