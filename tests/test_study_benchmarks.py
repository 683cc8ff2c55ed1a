"""What the benchmarks of conflict, noise, many objectives and early rejection are built of, against values
worked out by hand or by drawing."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from benchmark_runs import program

from mahalo_ray.data.records import Candidate, CandidateSet
from mahalo_ray.decoding.guidance import ChoiceScores
from mahalo_ray.decoding.scorers import ScorerGroup
from mahalo_ray.objectives import Weights
from mahalo_ray.rollouts.pair_building import CandidateShards


@pytest.fixture(scope="module")
def studies() -> ModuleType:
    return program("noise_and_mixtures")


@pytest.fixture(scope="module")
def exact() -> ModuleType:
    return program("conflict_and_noise")


def moment(number: int, scores: list[tuple[float, float]]) -> CandidateSet:
    candidates = [
        Candidate(content=f"{number} {k}", token_ids=[k], scores={"right": first, "kind": second})
        for k, (first, second) in enumerate(scores)
    ]
    return CandidateSet(
        id=str(number),
        dialogue="d",
        topic="t",
        turn=1,
        prompt=[{"role": "user", "content": "?"}],
        prompt_ids=[1],
        candidates=candidates,
        chosen=0,
    )


def saved(folder: Path, moments: list[CandidateSet]) -> CandidateShards:
    CandidateSet.save(moments, str(folder / "part-000000.parquet"))
    return CandidateShards(str(folder))


@pytest.mark.parametrize("level", [0.1, 0.3])
def test_noise_swaps_the_share_of_pairs_that_it_says(studies, tmp_path, level):
    random = np.random.default_rng(3)
    drawn = 2.0 * random.normal(size=(2000, 2, 2))  # scores with a spread of 2, of two candidates
    sets = saved(tmp_path, [moment(number, scores) for number, scores in enumerate(drawn.tolist())])
    noisy = studies.NoisySets(sets, {"right": 2.0, "kind": 2.0}, level, seed=5)
    seen = np.array([[list(c.scores.values()) for c in one.candidates] for one in noisy])
    swapped = np.sign(np.diff(seen, axis=1)) != np.sign(np.diff(drawn, axis=1))
    assert swapped.mean() == pytest.approx(level, abs=0.03)  # 4,000 pairs: four standard deviations
    again = np.array([[list(c.scores.values()) for c in one.candidates] for one in noisy])
    assert (again == seen).all()  # pairs are chosen in one reading and made in another


def test_a_mixture_weighs_scores_in_units_of_their_spread(studies, tmp_path):
    sets = saved(tmp_path, [moment(0, [(1.0, 10.0), (3.0, 30.0)]), moment(1, [(5.0, 0.0), (3.0, 20.0)])])
    spreads = studies.within_prompt_stds(sets, ["right", "kind"])
    assert spreads == pytest.approx({"right": 1.0, "kind": 10.0})
    mixed = studies.MixedSets(sets, spreads, {"mixture0": Weights({"right": 0.75, "kind": 0.25})})
    found = [[c.scores["mixture0"] for c in one.candidates] for one in mixed]
    assert found == [pytest.approx([1.0, 3.0]), pytest.approx([3.75, 2.75])]


def test_a_noisy_guide_disturbs_every_objective_by_its_own_spread(studies, monkeypatch):
    plain = ScorerGroup([], ["right", "kind"])
    noisy = studies.NoisyScorers(plain, [0.0, 3.0])
    refused = ValueError("too long")
    results = [ChoiceScores(torch.zeros(4000, 2), 7), ChoiceScores(refused)]
    monkeypatch.setattr(ScorerGroup, "score", lambda self, choices: results)
    disturbed, still_refused = noisy.score([])
    assert disturbed.tokens == 7 and still_refused.scores is refused
    assert disturbed.scores.std(0).tolist() == pytest.approx([0.0, 3.0], abs=0.15)


@pytest.mark.parametrize(("conflict", "noise"), [(0.25, 0.0), (0.75, 0.2)])
def test_the_exact_world_has_as_much_conflict_and_noise_as_asked_for(exact, conflict, noise):
    worlds = [exact.World(exact.Setting(conflict=conflict, noise=noise), seed) for seed in range(12)]
    against, swapped = [], []
    for world in worlds:
        first, second = torch.multinomial(world.base_logps.exp(), 2).unbind(1)
        rows = torch.arange(len(first))
        gaps = world.true[rows, first] - world.true[rows, second]
        seen = world.seen[rows, first] - world.seen[rows, second]
        against.append((gaps[:, 0].sign() != gaps[:, 1].sign()).float().mean())
        swapped.append((gaps.sign() != seen.sign()).float().mean())
    assert torch.stack(against).mean().item() == pytest.approx(conflict, abs=0.1)
    assert torch.stack(swapped).mean().item() == pytest.approx(noise, abs=0.05)


def test_guidance_in_closed_form_is_the_best_of_what_is_drawn(exact):
    world = exact.World(exact.Setting(), 1)
    balance = torch.tensor([0.4, 0.6])
    chances = exact.guided(world, 3)(balance).exp()[0]
    prompt = world.new[0]
    generator = torch.Generator().manual_seed(2)
    drawn = torch.multinomial(world.base_logps[prompt].exp().expand(60_000, -1), 3, True, generator=generator)
    best = drawn.gather(1, (world.seen[prompt] @ balance)[drawn].argmax(1, keepdim=True))[:, 0]
    found = torch.bincount(best, minlength=exact.ANSWERS) / len(best)
    torch.testing.assert_close(found, chances, atol=0.01, rtol=0)


def test_the_best_of_two_candidates_of_four_is_no_worst_one():
    early = program("early_rejection")
    assert early.chances_of_best(4, 2).tolist() == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6])
    whole = np.array([[1.0, 2.0, 3.0, 4.0]])
    tokens = np.full((1, 4), 10.0)
    _, lost, used, _ = early.compare(np.array([[4.0, 3.0, 2.0, 1.0]]), whole, tokens, 0.5)
    assert (lost, used) == (
        "2.000 ± 0.000",
        "75%",
    )  # half of the tokens of all, then the worse half to its end


def test_an_answer_is_likened_to_its_nearest_references():
    answers = program("truthful_answers")
    assert answers.word_overlap("A mole, a mole!", "a mole is small") == pytest.approx(2 * 2 / 8)
    references = {
        "Correct Answers": "Nothing happens; You digest them",
        "Incorrect Answers": "A plant grows in you; You die",
    }
    # "you digest" shares both words with three, against one shared word with two.
    assert answers.likeness("You digest.", references) == pytest.approx(4 / 5 - 2 / 4)
    assert answers.likeness("You die", references) < 0
