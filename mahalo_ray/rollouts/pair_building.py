"""From candidate sets to training data: step traces for the reward model, preference pairs for the policy."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import combinations
from typing import Any

import numpy as np

from mahalo_ray.config import PairsConfig, PairSelection
from mahalo_ray.data import storage
from mahalo_ray.data.records import Candidate, CandidateSet, PreferencePair, StepTrace
from mahalo_ray.rollouts.tutors import BRANCH

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
                    # Branches share the turns before them: metrics resample them with their origin.
                    dialogue=candidate_set.dialogue.partition(BRANCH)[0],
                    token_ids=candidate_set.prompt_ids + candidate.token_ids,
                    step_starts=[start],
                    step_ends=[start + len(candidate.token_ids) - 1],
                )
            )
    return traces


def judged_pairs(sets: Iterable[CandidateSet], objective: str) -> Iterator[PreferencePair]:
    """Every two distinct candidates of one moment whose labels for the objective differ: what a reward model
    supervised by `pairwise` learns from."""
    for candidate_set in sets:
        distinct = list({candidate.content: candidate for candidate in candidate_set.candidates}.values())
        values = np.array([(candidate.labels or {})[objective] for candidate in distinct])
        place = f"{candidate_set.id}/{objective}"
        for better, worse in _possible_pairs(values, "all", place):
            if values[better] > values[worse]:
                yield _pair(
                    candidate_set,
                    objective,
                    (distinct[better], distinct[worse]),
                    (float(values[better]), float(values[worse])),
                    id=f"{place}/{min(better, worse)}-{max(better, worse)}",
                    dialogue=candidate_set.dialogue.partition(BRANCH)[0],
                )


@dataclass(frozen=True)
class PairReport:
    """What became of the candidate sets of one objective, and what its pairs look like.

    `possible` pairs were looked at: one per prompt (best against worst) or every two candidates of it. Of
    these, `ties` have equal scores, `dropped_small_gap` too small a gap, `duplicates` the same words as
    another pair; then come those beyond the largest allowed number (`dropped_over_limit`) and those left out
    to balance lengths (`dropped_for_balance`). Lengths are in tokens, or in characters where turns have no
    token ids. `length_correlation`: of score with length, over all candidates, within prompts.
    `conflict`: other objective -> share of these pairs whose rejected turn it scores higher.
    """

    objective: str
    prompts: int
    possible: int
    pairs: int
    ties: int
    dropped_small_gap: int
    duplicates: int
    dropped_over_limit: int
    dropped_for_balance: int
    mean_gap: float
    mean_chosen_tokens: float
    mean_rejected_tokens: float
    chosen_longer: float
    length_correlation: float
    conflict: dict[str, float]

    def describe(self) -> str:
        """One line for people."""
        conflict = "".join(f", {share:.0%} against {name}" for name, share in self.conflict.items())
        return (
            f"{self.objective}: {self.pairs} pairs of {self.prompts} prompts, chosen longer in "
            f"{self.chosen_longer:.0%}{conflict}"
        )


@dataclass(frozen=True)
class CandidateShards:
    """The candidate sets of a folder, shard by shard: may be read again and again, holds none of them."""

    folder: str

    def __iter__(self) -> Iterator[CandidateSet]:
        for shard in storage.list_files(self.folder, ".parquet"):
            yield from CandidateSet.read(shard)


def build_pairs(
    sets: Iterable[CandidateSet], objective: str, config: PairsConfig
) -> tuple[Iterator[PreferencePair], PairReport]:
    """Pairs of distinct candidates of one prompt by reward-model score: the best against the worst, with
    `selection: all` every two of them, with `disjoint` each with one other, drawn by chance.

    A pair is kept if its gap reaches `min_gap_std` mean within-prompt standard deviations; the largest gaps
    are kept when `max_pairs_per_objective` is reached. With `balance_length`, as many pairs have the longer
    turn chosen as rejected, at every size of the difference.
    `sets` are read twice and not kept: what stays in memory is a few numbers per possible pair.
    """
    survey = _Survey(sets, objective, config.selection)
    selected, counts = _selected(survey, config)
    lengths, conflict = survey.lengths[selected], survey.against[selected]
    report = PairReport(
        objective=objective,
        prompts=survey.prompts,
        possible=len(survey.gaps),
        pairs=int(selected.sum()),
        **counts,
        mean_gap=_mean(survey.gaps[selected]),
        mean_chosen_tokens=_mean(lengths[:, 0]),
        mean_rejected_tokens=_mean(lengths[:, 1]),
        chosen_longer=_mean(lengths[:, 0] > lengths[:, 1]),
        length_correlation=survey.length_correlation,
        conflict={name: _mean(conflict[:, column]) for column, name in enumerate(survey.others)},
    )
    margin = config.gap_margin / survey.spread if survey.spread else 0.0
    return _pairs(sets, objective, config, selected, margin), report


def _possible_pairs(values: np.ndarray, selection: PairSelection, draw_key: str) -> list[tuple[int, int]]:
    """(chosen, rejected) of a prompt's candidates by their scores [K]; equal scores in the order given.
    `draw_key` decides what is drawn."""
    if selection == "best_worst":
        return [(int(values.argmax()), int(values.argmin()))]
    if selection == "all":
        pairs: Iterable[tuple[int, int]] = combinations(range(len(values)), 2)
    else:
        order = np.random.default_rng(_hash(draw_key, signed=False)).permutation(len(values)).tolist()
        pairs = zip(order[::2], order[1::2], strict=False)  # of an odd number, one is left over
    return [(i, j) if values[i] >= values[j] else (j, i) for i, j in pairs]


class _Survey:
    """What decides about N possible pairs: gaps [N], lengths [N, 2] of chosen and rejected, hashes [N], and
    whether each of the other objectives scores the rejected turn higher, [N, others]."""

    def __init__(self, sets: Iterable[CandidateSet], objective: str, selection: PairSelection) -> None:
        gaps, lengths, keys, spreads = array("d"), array("q"), array("q"), array("d")
        against = array("b")
        moments = np.zeros(3)  # of (score, length), each prompt's mean taken out: xy, xx, yy
        self.prompts, self.others = 0, tuple[str, ...]()
        for candidate_set in sets:
            candidates, values = _distinct_scored(candidate_set, objective)
            if not self.prompts:
                self.others = tuple(name for name in candidates[0].scores or {} if name != objective)
            self.prompts += 1
            for i, j in _possible_pairs(values, selection, f"{candidate_set.id}/{objective}"):
                chosen, rejected = candidates[i], candidates[j]
                gaps.append(float(values[i] - values[j]))
                lengths.extend((_length(chosen), _length(rejected)))
                keys.append(_pair_hash(candidate_set, chosen, rejected))
                against.extend(_score(rejected, name) > _score(chosen, name) for name in self.others)
            spreads.append(float(values.std()))
            sizes = np.array([_length(candidate) for candidate in candidates], dtype=float)
            x, y = values - values.mean(), sizes - sizes.mean()
            moments += (x @ y, x @ x, y @ y)
        self.gaps = np.array(gaps)
        self.lengths = np.array(lengths, dtype=np.int64).reshape(-1, 2)
        self.keys = np.array(keys, dtype=np.int64)
        self.against = np.array(against, dtype=bool).reshape(len(gaps), len(self.others))
        self.spread = _mean(spreads)
        scale = float(np.sqrt(moments[1] * moments[2]))
        self.length_correlation = float(moments[0]) / scale if scale else 0.0


def _selected(survey: _Survey, config: PairsConfig) -> tuple[np.ndarray, dict[str, int]]:
    """Which possible pairs are taken [N], and how many are not, by reason."""
    chosen = survey.gaps > 0
    counts = {"ties": int((~chosen).sum())}
    steps = {
        "dropped_small_gap": lambda: survey.gaps >= config.min_gap_std * survey.spread,
        "duplicates": lambda: _first_of_each(survey.keys, chosen),
        "dropped_over_limit": lambda: _largest(survey.gaps, chosen, config.max_pairs_per_objective),
        "dropped_for_balance": lambda: _balanced(survey, chosen) if config.balance_length else chosen,
    }
    for reason, wanted in steps.items():
        before = int(chosen.sum())
        chosen = chosen & wanted()
        counts[reason] = before - int(chosen.sum())
    return chosen, counts


def _first_of_each(keys: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Of pairs with the same key among the chosen ones, the first."""
    places = np.flatnonzero(chosen)
    _, first = np.unique(keys[places], return_index=True)
    return _at(places[first], len(keys))


def _largest(gaps: np.ndarray, chosen: np.ndarray, most: int | None) -> np.ndarray:
    places = np.flatnonzero(chosen)
    return _at(places[np.argsort(-gaps[places], kind="stable")[:most]], len(gaps))


def _balanced(survey: _Survey, chosen: np.ndarray) -> np.ndarray:
    """As many pairs with the chosen turn longer as with it shorter in every class of the difference (1, 2-3,
    4-7, ... tokens); the larger side keeps its largest gaps."""
    difference = survey.lengths[:, 0] - survey.lengths[:, 1]
    sizes = np.floor(np.log2(np.maximum(np.abs(difference), 1))).astype(int)
    balanced = chosen & (difference == 0)
    for size in np.unique(sizes[chosen]):
        sides = [chosen & (sizes == size) & (np.sign(difference) == sign) for sign in (1, -1)]
        fewest = min(int(side.sum()) for side in sides)
        for side in sides:
            balanced |= _largest(survey.gaps, side, fewest)
    return balanced


def _at(places: np.ndarray, size: int) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[places] = True
    return mask


def _pairs(
    sets: Iterable[CandidateSet],
    objective: str,
    config: PairsConfig,
    selected: np.ndarray,
    margin_per_gap: float,
) -> Iterator[PreferencePair]:
    wanted = iter(selected)
    for candidate_set in sets:
        candidates, values = _distinct_scored(candidate_set, objective)
        place = f"{candidate_set.id}/{objective}"
        for i, j in _possible_pairs(values, config.selection, place):
            if next(wanted):
                yield _pair(
                    candidate_set,
                    objective,
                    (candidates[i], candidates[j]),
                    (float(values[i]), float(values[j])),
                    id=place if config.selection == "best_worst" else f"{place}/{i}-{j}",
                    dialogue=candidate_set.dialogue,
                    split=_split(candidate_set, config.split_by),
                    chosen_scores=candidates[i].scores,
                    rejected_scores=candidates[j].scores,
                    margin=margin_per_gap * float(values[i] - values[j]) if margin_per_gap else 0.0,
                )


def _split(candidate_set: CandidateSet, split_by: str) -> str | None:
    """What decides on which side of a split a pair falls, where its dialogue does not: branches share the
    turns before them and stay on the side of their origin."""
    root = candidate_set.dialogue.partition(BRANCH)[0]
    return candidate_set.topic if split_by == "topic" else None if root == candidate_set.dialogue else root


def _pair(
    candidate_set: CandidateSet,
    objective: str,
    turns: tuple[Candidate, Candidate],
    values: tuple[float, float],
    **fields: Any,
) -> PreferencePair:
    """The pair of a chosen and a rejected turn with their values for the objective."""
    chosen, rejected = turns
    return PreferencePair(
        objective=objective,
        prompt=candidate_set.prompt,
        chosen=chosen.content,
        rejected=rejected.content,
        chosen_score=values[0],
        rejected_score=values[1],
        source=ROLLOUTS,
        prompt_ids=candidate_set.prompt_ids or None,
        chosen_ids=chosen.token_ids or None,
        rejected_ids=rejected.token_ids or None,
        **fields,
    )


def _distinct_scored(candidate_set: CandidateSet, objective: str) -> tuple[list[Candidate], np.ndarray]:
    """One candidate per distinct turn, and their scores; a missing one is an error that names it."""
    by_turn = {
        (tuple(candidate.token_ids), candidate.content): candidate for candidate in candidate_set.candidates
    }
    for number, candidate in enumerate(candidate_set.candidates):
        if candidate.scores is None or objective not in candidate.scores:
            raise ValueError(
                f"candidate {number} of '{candidate_set.id}' has no '{objective}' score: "
                "score the candidates with a reward model first"
            )
    distinct = list(by_turn.values())
    return distinct, np.array([_score(candidate, objective) for candidate in distinct])


def _pair_hash(candidate_set: CandidateSet, chosen: Candidate, rejected: Candidate) -> int:
    said = [(message.role, message.content) for message in candidate_set.prompt]
    return _hash(repr((said, chosen.content, rejected.content)), signed=True)


def _hash(text: str, signed: bool) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big", signed=signed)


def _score(candidate: Candidate, objective: str) -> float:
    assert candidate.scores is not None
    return candidate.scores[objective]


def _length(candidate: Candidate) -> int:
    return len(candidate.token_ids) or len(candidate.content)


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0
