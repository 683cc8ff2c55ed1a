"""From candidate sets to training data: step traces for the reward model, preference pairs for the policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mahalo_ray.config import PairsConfig
from mahalo_ray.data.records import Candidate, CandidateSet, PreferencePair, StepTrace

ROLLOUTS = "rollouts"


def labelled_traces(sets: Iterable[CandidateSet], objectives: Sequence[str]) -> list[StepTrace]:
    """One trace per distinct labelled candidate: the conversation so far, then this turn as the one step that
    carries labels. Candidates of one moment share a `group` (they are ranked against each other)."""
    traces = []
    for candidate_set in sets:
        seen: set[tuple[int, ...]] = set()
        for number, candidate in enumerate(candidate_set.candidates):
            key = tuple(candidate.token_ids)
            if candidate.labels is None or key in seen:
                continue
            seen.add(key)
            start = len(candidate_set.prompt_ids)
            traces.append(
                StepTrace(
                    id=f"{candidate_set.id}/{number}",
                    group=candidate_set.id,
                    prompt=candidate_set.prompt,
                    steps=[candidate.content],
                    labels={objective: [candidate.labels[objective]] for objective in objectives},
                    source=ROLLOUTS,
                    dialogue=candidate_set.dialogue,
                    token_ids=candidate_set.prompt_ids + candidate.token_ids,
                    step_starts=[start],
                    step_ends=[start + len(candidate.token_ids) - 1],
                )
            )
    return traces


@dataclass(frozen=True)
class PairReport:
    """What became of the candidate sets of one objective, and what its pairs look like.

    `length_correlation`: of score with length in tokens, within prompts.
    """

    objective: str
    prompts: int
    pairs: int
    dropped_small_gap: int
    mean_gap: float
    mean_chosen_tokens: float
    mean_rejected_tokens: float
    length_correlation: float


def build_pairs(
    sets: Sequence[CandidateSet], objective: str, config: PairsConfig
) -> tuple[list[PreferencePair], PairReport]:
    """Best against worst distinct candidate of every prompt by reward-model score.

    A pair is kept if its gap reaches `min_gap_std` mean within-prompt standard deviations; the largest gaps
    are kept when `max_pairs_per_objective` is reached.
    """
    distinct = [_distinct_scored(candidate_set, objective) for candidate_set in sets]
    scores = [np.array([_score(c, objective) for c in own]) for own in distinct]
    spread = float(np.mean([s.std() for s in scores])) if scores else 0.0
    pairs: list[PreferencePair] = []
    for candidate_set, own, values in zip(sets, distinct, scores, strict=True):
        best, worst = int(values.argmax()), int(values.argmin())
        gap = float(values[best] - values[worst])
        if gap <= 0 or gap < config.min_gap_std * spread:
            continue
        pairs.append(_pair(candidate_set, objective, own[best], own[worst]))
    dropped = len(sets) - len(pairs)
    if config.max_pairs_per_objective is not None:
        pairs = sorted(pairs, key=_gap, reverse=True)[: config.max_pairs_per_objective]
        pairs.sort(key=lambda pair: pair.id)
    return pairs, PairReport(
        objective=objective,
        prompts=len(sets),
        pairs=len(pairs),
        dropped_small_gap=dropped,
        mean_gap=_mean([_gap(pair) for pair in pairs]),
        mean_chosen_tokens=_mean([len(pair.chosen_ids or []) for pair in pairs]),
        mean_rejected_tokens=_mean([len(pair.rejected_ids or []) for pair in pairs]),
        length_correlation=_within_correlation(
            scores, [np.array([len(c.token_ids) for c in own], dtype=float) for own in distinct]
        ),
    )


def _pair(
    candidate_set: CandidateSet, objective: str, chosen: Candidate, rejected: Candidate
) -> PreferencePair:
    return PreferencePair(
        id=f"{candidate_set.id}/{objective}",
        objective=objective,
        prompt=candidate_set.prompt,
        chosen=chosen.content,
        rejected=rejected.content,
        chosen_score=_score(chosen, objective),
        rejected_score=_score(rejected, objective),
        source=ROLLOUTS,
        dialogue=candidate_set.dialogue,
        prompt_ids=candidate_set.prompt_ids,
        chosen_ids=chosen.token_ids,
        rejected_ids=rejected.token_ids,
        chosen_scores=chosen.scores,
        rejected_scores=rejected.scores,
    )


def _distinct_scored(candidate_set: CandidateSet, objective: str) -> list[Candidate]:
    """One candidate per token sequence; a missing score is an error that names the set and candidate."""
    own = {tuple(candidate.token_ids): candidate for candidate in candidate_set.candidates}
    for number, candidate in enumerate(candidate_set.candidates):
        if candidate.scores is None or objective not in candidate.scores:
            raise ValueError(
                f"candidate {number} of '{candidate_set.id}' has no '{objective}' score: "
                "score the candidates with a reward model first"
            )
    return list(own.values())


def _score(candidate: Candidate, objective: str) -> float:
    assert candidate.scores is not None
    return candidate.scores[objective]


def _gap(pair: PreferencePair) -> float:
    assert pair.chosen_score is not None and pair.rejected_score is not None
    return pair.chosen_score - pair.rejected_score


def _within_correlation(scores: list[np.ndarray], lengths: list[np.ndarray]) -> float:
    """Pearson correlation after taking each prompt's mean out of both."""
    if not scores:
        return 0.0
    x = np.concatenate([s - s.mean() for s in scores])
    y = np.concatenate([length - length.mean() for length in lengths])
    scale = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / scale if scale else 0.0


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
