"""What a run sets out to show, each claim as data: in words, with its figure, and whether it holds.

A claim whose rows are missing does not hold; it says so. Nothing here filters failing claims out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from mahalo_ray.evaluation.results import ComparisonTable, FamilyFront, MethodKind, MethodResult
from mahalo_ray.evaluation.statistics import Estimate
from mahalo_ray.objectives import Weights

NON_DOMINATED_SHARE = 0.8  # at least 4 of 5 points of the sweep


class Claim(BaseModel):
    """One claim. `difference` is the paired difference, or how many points more than needed for the front."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str  # stable name, e.g. "head:accuracy"
    statement: str
    difference: Estimate | None  # None: not measured
    n: int  # problems behind the figure
    holds: bool
    required: bool = True  # False: reported beside a required claim, such as one part of a weighted sum
    evidence: str  # the figure in words

    @property
    def words(self) -> str:
        """One sentence: the verdict, the statement and the figure."""
        verdict = "Holds" if self.holds else "Not measured" if self.difference is None else "DOES NOT HOLD"
        return f"{verdict}: {self.statement} ({self.evidence})."


def check_claims(table: ComparisonTable) -> list[Claim]:
    """All claims over a table: heads against SFT, guidance against none, the sweep's front.

    With one objective there is no trade-off, and so no claim about a front.
    """
    claims = [_head_claim(table, objective) for objective in table.objectives]
    expected: tuple[tuple[MethodKind, str], ...] = (
        ("guided", "the guided policy"),
        ("guided_sft", "guided SFT"),
    )
    for kind, what in expected:
        guided = [method for method in table.methods if method.kind == kind]
        for method in guided:
            claims += _guidance_claims(table, method)
        if not guided:
            statement = f"guidance beats no guidance for {what}"
            claims.append(_missing(f"guided:{kind}", statement, f"no row of {what}"))
    if len(table.objectives) > 1:
        claims.append(_front_claim(table))
    return claims


def comparison_claims(table: ComparisonTable, fronts: Sequence[FamilyFront]) -> list[Claim]:
    """MAH-DPO against every baseline: the hypervolume at the baseline's own weight vectors."""
    return [
        _family_claim(table, front, front.difference, front.mah_dpo)
        for front in fronts
        if front.difference is not None and front.mah_dpo is not None
    ]


def _family_claim(
    table: ComparisonTable, front: FamilyFront, difference: Estimate, mah_dpo: Estimate
) -> Claim:
    verdict = ""
    if not difference.above_zero:
        verdict = ": the baseline covers more" if difference.high < 0 else ": the two are not told apart"
    count = len(front.weights)
    vectors = "weight vector" if count == 1 else f"{count} weight vectors"
    return Claim(
        key=f"hypervolume:{front.family}",
        statement=f"MAH-DPO covers more than {front.name} at the same {vectors}",
        difference=difference,
        n=table.dialogues,
        holds=difference.above_zero,
        evidence=f"hypervolume {mah_dpo.value:.3f} against {front.hypervolume.value:.3f}, "
        + _difference_in_words(table, difference)
        + verdict,
    )


def _difference_in_words(table: ComparisonTable, difference: Estimate) -> str:
    return (
        f"paired difference {difference.value:+.3f}, {table.confidence:.0%} interval "
        f"[{difference.low:+.3f}, {difference.high:+.3f}], n = {table.dialogues}"
    )


def headline(claims: Sequence[Claim]) -> str:
    """One or two sentences over all claims, failing ones named first."""
    required = [claim for claim in claims if claim.required]
    failing = [claim for claim in required if not claim.holds]
    partial = [claim for claim in claims if not claim.required and not claim.holds]
    if failing:
        listed = "; ".join(claim.statement for claim in failing)
        text = f"{len(failing)} of {len(required)} claims of this run do NOT hold: {listed}."
    elif required:
        text = f"All {len(required)} claims of this run hold."
    else:
        text = "This run makes no claim."
    if partial:
        listed = "; ".join(claim.statement for claim in partial)
        text += f" Not shown on a single objective: {listed}."
    return text


def in_words(claims: Sequence[Claim]) -> list[str]:
    """Every claim as a sentence, in order."""
    return [claim.words for claim in claims]


def _head_claim(table: ComparisonTable, objective: str) -> Claim:
    statement = f"the {objective} head beats SFT on {objective}"
    key = f"head:{objective}"
    sft = table.only("sft")
    head = next((m for m in table.methods if _is_head_of(m, objective)), None)
    if sft is None or head is None:
        return _missing(key, statement, "no SFT row" if sft is None else "no row of this head alone")
    return _difference_claim(table, key, statement, head, sft, Weights.one(objective))


def _is_head_of(method: MethodResult, objective: str) -> bool:
    """Whether a method decodes, unguided, with all the weight on one head."""
    return method.family == "mah_dpo" and method.same_weights(Weights.one(objective))


def _guidance_claims(table: ComparisonTable, method: MethodResult) -> list[Claim]:
    """The weighted sum that guidance optimises (required), and each objective in it."""
    assert method.guidance is not None
    guidance = Weights({name: weight for name, weight in method.guidance.items() if weight > 0})
    key = f"guided:{method.name}"
    plain = table.unguided(method)
    aim = next(iter(guidance)) if len(guidance) == 1 else f"the guided objective ({_sum_in_words(guidance)})"
    if plain is None:
        statement = f"guidance beats no guidance on {aim}: '{method.name}'"
        return [_missing(key, statement, "no unguided row with the same policy and decoding weights")]
    statement = f"'{method.name}' beats '{plain.name}' on {aim}"
    claims = [_difference_claim(table, key, statement, method, plain, guidance)]
    if len(guidance) == 1:
        return claims
    for objective in guidance:
        statement = f"'{method.name}' beats '{plain.name}' on {objective}"
        part = _difference_claim(
            table, f"{key}:{objective}", statement, method, plain, Weights.one(objective), required=False
        )
        claims.append(part)
    return claims


def _sum_in_words(weights: Weights) -> str:
    return " + ".join(f"{value:.3g} {name}" for name, value in weights.items())


def _difference_claim(
    table: ComparisonTable,
    key: str,
    statement: str,
    method: MethodResult,
    baseline: MethodResult,
    weights: Weights,
    required: bool = True,
) -> Claim:
    difference = table.difference(method, baseline, weights)
    return Claim(
        key=key,
        statement=statement,
        difference=difference,
        n=table.dialogues,
        holds=difference.above_zero,
        required=required,
        evidence=_difference_in_words(table, difference),
    )


def _front_claim(table: ComparisonTable) -> Claim:
    front = table.sweep_front()
    statement = f"at least {NON_DOMINATED_SHARE:.0%} of the sweep's points are non-dominated"
    if front is None:
        return _missing("front", statement, "no sweep")
    if front.points < 2:
        return _missing("front", statement, "a sweep of one point has no front")
    needed = math.ceil(NON_DOMINATED_SHARE * front.points - 1e-9)
    counted = front.non_dominated
    evidence = (
        f"{counted.value:.0f} of {front.points} distinct points are, "
        f"{counted.low:.0f} to {counted.high:.0f} when problems are resampled, n = {table.dialogues}"
    )
    return Claim(
        key="front",
        statement=f"at least {needed} of {front.points} points of the sweep are non-dominated",
        difference=Estimate(
            value=counted.value - needed, low=counted.low - needed, high=counted.high - needed
        ),
        n=table.dialogues,
        holds=counted.low >= needed,
        evidence=evidence,
    )


def _missing(key: str, statement: str, reason: str) -> Claim:
    return Claim(
        key=key, statement=statement, difference=None, n=0, holds=False, evidence=f"not measured: {reason}"
    )
