"""What a run has measured, for whoever chooses a balance: the points of its front and its portfolio.

A replica reads them from the run's files when it starts, as it reads its models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from mahalo_ray.data import storage
from mahalo_ray.evaluation.results import ComparisonTable, MethodResult, Row
from mahalo_ray.evaluation.statistics import Estimate
from mahalo_ray.objectives import Weights
from mahalo_ray.sweeps import Portfolio


class ObjectiveReport(BaseModel):
    """An objective, and what it means in a sentence (empty where the run does not say)."""

    name: str
    description: str = ""


class FrontPoint(BaseModel):
    """One measured way to answer: decoding weights (null: the model before alignment), guidance weights
    (null: unguided), and what it reached on every objective."""

    label: str
    kind: str = Field(
        description="`weights`: a point of the sweep; `guided`, `head`, `sft` and so on: others"
    )
    weights: dict[str, float] | None
    guidance: dict[str, float] | None
    num_candidates: int
    strength: float
    temperature: float | None = Field(default=None, description="of sampling; null: the evaluation's")
    values: dict[str, Estimate] = Field(
        description="means over the dialogues, with intervals; more is better"
    )
    in_sweep: bool
    on_front: bool = Field(description="no other point of its kind dominates it")

    @classmethod
    def of(cls, row: Row) -> FrontPoint:
        """The table's row."""
        return cls(
            label=row.name,
            kind=row.kind,
            weights=row.weights,
            guidance=row.guidance,
            num_candidates=row.num_candidates,
            strength=row.strength,
            temperature=row.temperature,
            values=row.means,
            in_sweep=row.in_sweep,
            on_front=row.on_front,
        )


class Front(BaseModel):
    """The answer of GET /v1/front: what the run's sweep and evaluation measured, on the same dialogues."""

    object: Literal["front"] = "front"
    objectives: list[ObjectiveReport]
    reference_point: dict[str, float] = Field(description="where hypervolumes begin")
    hypervolume: Estimate | None = Field(description="of the sweep's points; null without a sweep")
    dialogues: int = Field(description="behind every point")
    confidence: float = Field(description="of the intervals")
    points: list[FrontPoint]

    @classmethod
    def of(cls, table: ComparisonTable, descriptions: Mapping[str, str]) -> Front:
        """The table as points."""
        swept = table.sweep_front()
        return cls(
            objectives=describe(table.objectives, descriptions),
            reference_point=dict(zip(table.objectives, table.reference_point, strict=True)),
            hypervolume=None if swept is None else swept.hypervolume,
            dialogues=table.dialogues,
            confidence=table.confidence,
            points=[FrontPoint.of(row) for row in table.rows],
        )


class PortfolioMember(BaseModel):
    """A member: `model` is the id that asks for it in a request's `model`, with everything it was measured
    with. `weights`: where it was found; `objectives`: its decoding weights; `guidance` null: unguided."""

    model: str
    name: str
    weights: dict[str, float]
    objectives: dict[str, float] | None
    strength: float
    temperature: float | None = Field(default=None, description="of sampling; null: the evaluation's")
    guidance: dict[str, float] | None
    num_candidates: int
    values: dict[str, float]


class CertifiedChoice(BaseModel):
    """The member for some weights. `loss_bound`: no policy is worth more than that beyond the member, in the
    unit of the weighted sum of the objectives; null outside the hull of the weights that were tried, where
    nothing is certified."""

    weights: dict[str, float]
    member: str
    worth: float
    loss_bound: float | None


class PortfolioReport(BaseModel):
    """The answer of GET /v1/portfolio: a few policies of which one is nearly the best at every weight vector:
    at least best - eps |best| - delta."""

    object: Literal["portfolio"] = "portfolio"
    objectives: list[ObjectiveReport]
    eps: float
    delta: float
    exact: bool = Field(description="whether no smaller portfolio keeps eps and delta")
    gap: int = Field(description="members more than a proven lower bound")
    unit: str = Field(description="of values, worth and losses, in words")
    best: str = Field(description="what the best policy is the best of, in words")
    members: list[PortfolioMember]
    choices: list[CertifiedChoice] = Field(
        description="at every weight vector that was tried; with `weights` in the address, at those alone"
    )


@dataclass(frozen=True)
class RunFiles:
    """Where the measurements of a run lie, and how its table is made of them.

    `methods`: the files that its sweep and evaluation wrote; `portfolio`: None if it has none.
    """

    methods: tuple[str, ...]
    portfolio: str | None
    objectives: tuple[str, ...]
    confidence: float
    resamples: int
    seed: int

    def read(self) -> Measurements:
        """Read all files. ValueError naming the file that cannot be used."""
        return Measurements(self._table(), None if self.portfolio is None else Portfolio.load(self.portfolio))

    def _table(self) -> ComparisonTable | None:
        results = []
        for url in self.methods:
            try:
                results += [MethodResult.model_validate(entry["result"]) for entry in storage.read_json(url)]
            except (ValidationError, KeyError, TypeError) as error:
                raise ValueError(f"'{url}' does not hold the results of a sweep: {error}") from error
        if not results:
            return None
        return ComparisonTable(
            results,
            self.objectives,
            confidence=self.confidence,
            resamples=self.resamples,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Measurements:
    """What a run has measured; None for what it has not."""

    table: ComparisonTable | None = None
    portfolio: Portfolio | None = None

    def front(self, descriptions: Mapping[str, str]) -> Front | None:
        """The answer of GET /v1/front."""
        return None if self.table is None else Front.of(self.table, descriptions)

    def members(self, model: str) -> dict[str, PortfolioMember]:
        """The portfolio's members by the model ids that ask for them, `mahalo@member-1` and so on."""
        found = self.portfolio
        if found is None:
            return {}
        members = {}
        for number, row in enumerate(found.members, start=1):
            vector = _vector(found, row)
            # A portfolio of bare weight vectors is one of decoding weights.
            policy = found.policies[row] if found.policies else {"weights": dict(vector)}
            members[f"{model}@member-{number}"] = PortfolioMember(
                model=f"{model}@member-{number}",
                name=found.name_of(row),
                weights=dict(vector),
                objectives=policy["weights"],
                strength=policy.get("strength", 1.0),
                temperature=policy.get("temperature"),
                guidance=policy.get("guidance"),
                num_candidates=policy.get("num_candidates", 1),
                values=dict(zip(found.objectives, found.values[row].tolist(), strict=True)),
            )
        return members

    def report_portfolio(
        self, model: str, descriptions: Mapping[str, str], weights: Weights | None
    ) -> PortfolioReport | None:
        """The answer of GET /v1/portfolio; `weights`: the only ones to choose a member for."""
        found = self.portfolio
        if found is None:
            return None
        members = self.members(model)
        ids = dict(zip(found.members, members, strict=True))
        asked = [_vector(found, row) for row in range(len(found.weights))] if weights is None else [weights]
        return PortfolioReport(
            objectives=describe(found.objectives, descriptions),
            eps=found.eps,
            delta=found.delta,
            exact=found.exact,
            gap=found.gap,
            unit=found.unit,
            best=found.best,
            members=list(members.values()),
            choices=[_choice(found, vector, ids) for vector in asked],
        )


def _vector(found: Portfolio, row: int) -> Weights:
    return Weights(dict(zip(found.objectives, found.weights[row].tolist(), strict=True)))


def _choice(found: Portfolio, weights: Weights, ids: Mapping[int, str]) -> CertifiedChoice:
    member, bound = found.member(weights), found.loss_bound(weights)
    worth = float(found.values[member] @ np.array(weights.over(found.objectives)))
    return CertifiedChoice(
        weights=dict(weights),
        member=ids[member],
        worth=worth,
        loss_bound=bound if math.isfinite(bound) else None,
    )


def describe(objectives: tuple[str, ...], descriptions: Mapping[str, str]) -> list[ObjectiveReport]:
    """The objectives with what is known of their meaning."""
    return [ObjectiveReport(name=name, description=descriptions.get(name, "")) for name in objectives]
