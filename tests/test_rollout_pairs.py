"""From candidate sets to preference pairs and traces: what is kept, what is left out, what stays together."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_tutor import CHAT

from mahalo_ray.config import PairsConfig
from mahalo_ray.data.pair_readers import ReadPairs, read_pairs
from mahalo_ray.data.records import Candidate, CandidateSet, Message, PreferencePair
from mahalo_ray.rollouts.pair_building import CandidateShards, build_pairs, labelled_traces
from mahalo_ray.training.pairs import encode_pairs, split_key


def candidate_set(
    name: str, dialogue: str, scores: list[float], lengths: list[int] | None = None, topic: str = "+"
) -> CandidateSet:
    """Candidate i has the i-th length (i + 1 tokens where none are given); its words say so."""
    sizes = lengths or list(range(1, len(scores) + 1))
    return CandidateSet(
        id=name,
        dialogue=dialogue,
        topic=topic,
        turn=0,
        prompt=[Message(role="user", content=f"{dialogue}?")],
        prompt_ids=[7],
        candidates=[
            Candidate(content=f"c{i}", token_ids=[10 + i] * size, scores={"accuracy": score})
            for i, (score, size) in enumerate(zip(scores, sizes, strict=True))
        ],
        chosen=0,
    )


def test_pairs_are_best_against_worst_with_a_wide_enough_gap() -> None:
    # Spreads (standard deviations): 0.4, 0.05, 0; their mean 0.15 is the least gap.
    sets = [
        candidate_set("a/0", "a", [0.1, 0.9]),
        candidate_set("b/0", "b", [0.5, 0.4]),
        candidate_set("c/0", "c", [0.5, 0.5]),
    ]
    pairs, report = build_pairs(sets, "accuracy", PairsConfig(min_gap_std=1.0))
    (first,) = pairs
    assert [(p.id, p.chosen, p.rejected) for p in [first]] == [("a/0/accuracy", "c1", "c0")]
    assert (first.chosen_ids, first.rejected_ids, first.dialogue) == ([11, 11], [10], "a")
    assert (report.prompts, report.pairs, report.ties, report.dropped_small_gap) == (3, 1, 1, 1)
    # Longer is better in a, worse in b: .4 * .5 * 2 against .05 * .5 * 2.
    assert report.length_correlation == pytest.approx((0.4 - 0.05) / ((0.32 + 0.005) ** 0.5 * 1.5**0.5))
    all_pairs, _ = build_pairs(sets, "accuracy", PairsConfig(min_gap_std=0.0))
    assert [p.id for p in all_pairs] == ["a/0/accuracy", "b/0/accuracy"]


def test_an_unscored_candidate_is_named() -> None:
    one = candidate_set("a/0", "a", [0.1, 0.9])
    broken = one.model_copy(update={"candidates": [one.candidates[0].model_copy(update={"scores": None})]})
    with pytest.raises(ValueError, match=r"candidate 0 of 'a/0' has no 'accuracy' score"):
        build_pairs([broken], "accuracy", PairsConfig())


def test_traces_label_the_candidate_turn_once_per_distinct_turn() -> None:
    one = candidate_set("a/0", "a", [0.1, 0.9])
    labelled = [c.model_copy(update={"labels": {"accuracy": 0.25}}) for c in one.candidates]
    twice = one.model_copy(update={"candidates": [*labelled, labelled[1]]})
    traces = labelled_traces([twice], ["accuracy"])
    assert [trace.group for trace in traces] == ["a/0", "a/0"]
    second = traces[1]
    assert (second.token_ids, second.step_starts, second.step_ends) == ([7, 11, 11], [1], [2])
    assert second.labels == {"accuracy": [0.25]}


ALL = PairsConfig(min_gap_std=0.0)


def test_the_same_words_make_one_pair() -> None:
    first = candidate_set("a/0", "a", [0.1, 0.9])
    again = first.model_copy(update={"id": "b/0", "dialogue": "b"})
    other = candidate_set("c/0", "c", [0.1, 0.9])
    pairs, report = build_pairs([first, again, other], "accuracy", ALL)
    assert [pair.dialogue for pair in pairs] == ["a", "c"]
    assert (report.duplicates, report.pairs) == (1, 2)


def test_balanced_pairs_prefer_the_longer_turn_as_often_as_the_shorter() -> None:
    """Differences of 2, 3 and 3 tokens for the longer turn, one of 2 for the shorter, one of 9, one of 0."""
    sets = [
        candidate_set("a/0", "a", [0.1, 0.5], [4, 6]),
        candidate_set("b/0", "b", [0.1, 0.9], [4, 7]),
        candidate_set("c/0", "c", [0.1, 0.6], [4, 7]),
        candidate_set("d/0", "d", [0.2, 0.4], [6, 4]),
        candidate_set("e/0", "e", [0.2, 0.9], [4, 13]),
        candidate_set("f/0", "f", [0.2, 0.3], [5, 5]),
    ]
    _, before = build_pairs(sets, "accuracy", ALL)
    assert (before.pairs, before.chosen_longer) == (6, pytest.approx(4 / 6))
    pairs, report = build_pairs(sets, "accuracy", ALL.model_copy(update={"balance_length": True}))
    # b has the largest gap of those that d can stand against; e has no counterpart.
    assert [pair.dialogue for pair in pairs] == ["b", "d", "f"]
    assert (report.dropped_for_balance, report.chosen_longer) == (3, pytest.approx(1 / 3))
    assert report.length_correlation == before.length_correlation


def test_the_largest_gaps_are_kept_where_there_are_too_many() -> None:
    sets = [candidate_set(f"{n}/0", f"d{n}", [0.0, gap]) for n, gap in enumerate([0.3, 0.9, 0.5])]
    pairs, report = build_pairs(sets, "accuracy", PairsConfig(min_gap_std=0.0, max_pairs_per_objective=2))
    assert [pair.id for pair in pairs] == ["1/0/accuracy", "2/0/accuracy"]
    assert report.dropped_over_limit == 1


def test_all_pairs_above_the_gap() -> None:
    """Scores 0.1, 0.5, 0.9 with two of the same words: three candidates, three pairs, two of them wide."""
    one = candidate_set("a/0", "a", [0.1, 0.9, 0.5])
    one.candidates.append(one.candidates[1])
    every = PairsConfig(min_gap_std=0.0, selection="all")
    pairs, report = build_pairs([one], "accuracy", every)
    assert {(p.chosen, p.rejected) for p in pairs} == {("c1", "c0"), ("c2", "c0"), ("c1", "c2")}
    assert (report.prompts, report.possible, report.pairs) == (1, 3, 3)
    wide = every.model_copy(update={"min_gap_std": 2.0})  # 2 * 0.327: only best against worst
    pairs, report = build_pairs([one], "accuracy", wide)
    assert [(p.id, p.chosen, p.rejected) for p in pairs] == [("a/0/accuracy/1-0", "c1", "c0")]
    assert report.dropped_small_gap == 2
    balanced, report = build_pairs([one], "accuracy", every.model_copy(update={"balance_length": True}))
    # c1 against c2 is the one pair whose chosen turn is shorter; c1 against c0 stands against it.
    assert {(p.chosen, p.rejected) for p in balanced} == {("c1", "c2"), ("c1", "c0")}


def test_pairs_that_another_objective_would_turn_round_are_counted() -> None:
    sets = [candidate_set(f"{n}/0", f"d{n}", [0.1, 0.9]) for n in range(4)]
    for number, one in enumerate(sets):
        for candidate, engagement in zip(one.candidates, (0.5, 0.4 if number == 0 else 0.6), strict=True):
            assert candidate.scores is not None
            candidate.scores["engagement"] = engagement
    _, report = build_pairs(sets, "accuracy", ALL)
    assert report.conflict == {"engagement": 0.25}
    assert "25% against engagement" in report.describe()
    assert build_pairs(sets, "engagement", ALL)[1].conflict == {"accuracy": 0.25}


def test_a_margin_grows_with_the_gap() -> None:
    sets = [candidate_set(f"{n}/0", f"d{n}", [0.0, gap]) for n, gap in enumerate([0.2, 0.6])]
    pairs, _ = build_pairs(sets, "accuracy", ALL.model_copy(update={"gap_margin": 0.5}))
    assert [pair.margin for pair in pairs] == pytest.approx([0.5, 1.5])  # the mean spread is 0.2


def test_what_a_split_keeps_together() -> None:
    branches = [candidate_set(f"{d}/0", d, [0.1, 0.9], topic="t") for d in ("a", "a~0.1", "a~0.1~1.2", "b")]
    by_dialogue, _ = build_pairs(branches, "accuracy", ALL)
    assert [split_key(pair) for pair in by_dialogue] == ["a", "a", "a", "b"]
    by_topic, _ = build_pairs(branches, "accuracy", ALL.model_copy(update={"split_by": "topic"}))
    made = list(by_topic)
    assert {split_key(pair) for pair in made} == {"t"}
    assert [pair.dialogue for pair in made] == ["a", "a~0.1", "a~0.1~1.2", "b"]


def test_turns_without_token_ids_make_pairs_of_text() -> None:
    one = candidate_set("a/0", "a", [0.1, 0.9])
    bare = one.model_copy(
        update={
            "prompt_ids": [],
            "candidates": [c.model_copy(update={"token_ids": []}) for c in one.candidates],
        }
    )
    pairs, _ = build_pairs([bare], "accuracy", ALL)
    (pair,) = pairs
    assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == (None, None, None)
    assert (pair.chosen, pair.rejected) == ("c1", "c0")


def test_written_pairs_are_read_back_whole(tmp_path: Path) -> None:
    CandidateSet.save([candidate_set("a/0", "a", [0.1, 0.9])], str(tmp_path / "sets" / "part.parquet"))
    pairs, _ = build_pairs(CandidateShards(str(tmp_path / "sets")), "accuracy", ALL)
    made = list(pairs)
    PreferencePair.save(made, str(tmp_path / "pairs" / "part.parquet"))
    found = ReadPairs()
    read_pairs(str(tmp_path / "pairs"), "auto", ["accuracy"], None, "objective", "0", found)
    assert found.bad == []
    assert found.pairs == made
    tokens = encode_pairs(found.pairs, ["accuracy"], CHAT, max_length=64)  # what the policy is trained on
    rows = (tokens.prompts, tokens.chosen, tokens.rejected)
    assert [list(column) for column in rows] == [[[7]], [[11, 11]], [[10]]]
