"""The benchmarks at tiny sizes: what they compare must be the same loss and the same answer."""

from __future__ import annotations

import argparse

import pytest
import torch
from benchmark_runs import program, results_of

pytestmark = pytest.mark.slow


def test_a_policy_step_run_compares_steps_with_one_loss(tmp_path):
    results = results_of(
        "policy_step",
        tmp_path / "results.json",
        *("--preset", "tiny", "--heads", "2", "--textbook-heads", "2", "--rounds", "1"),
        *("--variants", "textbook,full"),  # a process each; the test below has low-rank heads
    )
    found = results["variants"]
    assert set(found) == {"textbook, H=2", "ours, full, H=2"}
    assert results["checks"]["loss of textbook, H=2 against ours, full, H=2"] < 1e-4
    # Losses of log 2 would be equal whatever was computed.
    assert abs(found["textbook, H=2"]["loss"] - torch.tensor(2.0).log().item()) > 1e-3
    assert all(one["seconds"] > 0 and one["above_weights"] > 0 for one in found.values())
    assert results["ratios"]["full against textbook, H=2: times as fast"] > 0
    assert "ours, full, H=2" in results["printed"]


def test_policy_step_finds_trl_s_loss_with_one_head(tmp_path):
    pytest.importorskip("trl")
    results = results_of(
        "policy_step",
        tmp_path / "results.json",
        *("--preset", "tiny", "--heads", "1", "--rounds", "1"),
        *("--variants", "trl,trl_precomputed,full,low_rank"),
    )
    assert len(results["checks"]) == 4
    assert max(results["checks"].values()) < 1e-4


@pytest.mark.parametrize("kind", ["full", "low_rank"])
def test_the_textbook_step_has_our_loss_and_our_gradients(kind):
    steps = program("step_variants")
    setting = steps.Setting(steps.PRESETS["tiny"], 3, torch.device("cpu"), torch.float32)
    pairs = steps.make_pairs(setting.preset, 3, 2)
    stored = steps.reference_logps(setting, pairs)
    losses, gradients = [], []
    for step in (steps.ours(setting, 2, kind), steps.textbook(setting, 2, kind)):
        loss = step.loss(pairs, stored)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in step.trained.named_parameters() if p.requires_grad})
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    # Two heads must not be one head.
    of_one_head = steps.ours(setting, 1, kind).loss(steps.make_pairs(setting.preset, 3, 1), stored)
    assert abs(of_one_head.item() - losses[0]) > 1e-4
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_every_way_of_guided_decoding_gives_one_answer(tmp_path, temperature):
    results = results_of(
        "guided_decoding",
        tmp_path / "results.json",
        *("--models", "tiny", "--prompts", "20", "--candidates", "1,3", "--steps", "3"),
        *("--step-tokens", "5", "--requests", "3", "--requests-candidates", "3"),
        *("--temperature", temperature),
    )
    alone, guided = results["cells"]
    for cell in (alone, guided):
        for name in ("published", "reencoded"):
            assert cell["agreement"][name]["same_tokens"], (cell["candidates"], name)
            assert cell["agreement"][name]["same_choices"], (cell["candidates"], name)
            assert cell["agreement"][name]["largest_score_difference"] < 1e-4
        assert {way["output_tokens"] for way in cell["ways"].values()} == {15}
    assert results["at_once"][0]["same_first_answer"]
    # Counted by hand: prompt 20, 3 steps of 5 tokens, 3 candidates; the last ones are read with an end token.
    ours, published = guided["ways"]["ours"], guided["ways"]["published"]
    assert published["policy_tokens"] == 20 + 3 * 3 * 4 + 2
    assert published["reward_tokens"] == 3 * (25 + 30 + 36)
    assert ours["policy_tokens"] == published["policy_tokens"]
    # Candidates that are the same are scored once: greedy ones all are.
    assert ours["reward_tokens"] == 20 + (3 * 5 + 1) * (1 if temperature == "0" else 3)
    assert alone["ways"]["ours"]["reward_tokens"] == 0
    assert "published: the same answer" in results["printed"]


def test_a_reward_training_run_compares_one_loss(tmp_path, monkeypatch):
    """Measured in this process: that each way has one of its own is tried with a policy's steps above."""
    training = program("reward_training")

    def measure_here(options, name):
        return training.measure(argparse.Namespace(**{**vars(options), "measure": name}))

    monkeypatch.setattr(training, "_run", measure_here)
    results = results_of("reward_training", tmp_path / "results.json", *("--preset", "tiny", "--rounds", "1"))
    assert results["checks"]["loss of prefixes against one pass"] < 1e-5
    assert results["checks"]["times fewer tokens than prefixes"] > 1.5
    assert results["variants"]["token_classifier"]["tokens"] == results["variants"]["one_pass"]["tokens"]
    assert all(one["seconds"] > 0 for one in results["variants"].values())


def test_a_reward_scoring_run_compares_the_same_scores(tmp_path):
    results = results_of(
        "reward_scoring",
        tmp_path / "results.json",
        *("--preset", "tiny", "--prefix", "60", "--step-tokens", "6", "--rounds", "1"),
    )
    assert results["largest_difference_of_scores"] < 1e-4
    assert results["kept"]["tokens_per_step"] == 30
    assert results["encoded_again"]["tokens_per_step"] == 5 * (60 + 6 + 6)  # 66, 72 and 78 tokens in turn
