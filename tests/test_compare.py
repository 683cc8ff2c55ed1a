"""The comparison with MAH-DPO's baselines: settings and stages, and a whole tiny run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_world as world
from tiny_run import EXAMPLE
from tiny_tutor import SAMPLING, TOKENIZER, model
from typer.testing import CliRunner

from mahalo_ray.cli import app
from mahalo_ray.config import ConfigError, EvaluationConfig, RunConfig, load_config
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.evaluation import methods
from mahalo_ray.evaluation.methods import Method, MethodPlayer
from mahalo_ray.models import MultiHeadCausalLM, ProcessRewardModel
from mahalo_ray.objectives import Weights
from mahalo_ray.pipeline.compare import REPORT, baseline_policies, comparison_pipeline, trainings
from mahalo_ray.pipeline.run import pipeline
from mahalo_ray.training.batches import plan_balanced_batches

TUTORING = ("tutoring_miniature", world.OBJECTIVES)


def example(*overrides: str) -> RunConfig:
    return load_config(EXAMPLE, list(overrides))


# --- configuration


@pytest.mark.parametrize(
    ("baselines", "message"),
    [
        ("[]", "at least 1 item"),
        ("[{method: ppo}]", "'dpo', 'scalarised', 'modpo' or 'soup'"),
        ("[{method: soup, weigths: []}]", "Did you mean 'weights'"),
        ("[{method: soup}, {method: dpo}, {method: soup}]", "has 'soup' twice"),
        ("[{method: dpo, weights: [{accuracy: 1}]}]", "'weights' is not used by 'method: dpo'"),
        ("[{method: scalarised, objective: accuracy}]", "'objective' is not used by 'method: scalarised'"),
        ("[{method: modpo, objective: speed}]", r"'compare\.baselines\.0\.objective': unknown objective"),
        ("[{method: soup, weights: [{acuracy: 1}]}]", r"weights\.0': .*Did you mean 'accuracy'"),
        ("[{method: soup, weights: [{accuracy: 0}]}]", "all weights are 0"),
        ("[{method: soup, weights: [{accuracy: 1}, {accuracy: 2}]}]", "the vector 1 / 0 twice"),
        (
            "[{method: modpo, objective: accuracy, weights: [{engagement: 1}]}]",
            "divides by the weight of 'accuracy', which is 0 at engagement=1",
        ),
    ],
)
def test_a_wrong_comparison_is_said(baselines: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        example(f"compare.baselines={baselines}")


def test_own_pairs_have_no_comparison() -> None:
    file = EXAMPLE.with_name("real_pairs.yaml")
    with pytest.raises(ConfigError, match="'compare' is set, but this run on own data"):
        load_config(file, ["compare.baselines=[{method: dpo}]"])
    result = CliRunner().invoke(app, ["compare", str(file)])
    assert result.exit_code == 2 and "no students to play" in result.output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy={method: dpo, objective: accuracy}", "that policy has one head"),
        ("policy.loss=ipo", "leave it out of 'compare.baselines'"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    override: str, message: str, tmp_path: Path
) -> None:
    arguments = ["compare", str(EXAMPLE), "--set", override, "--set", f"output={tmp_path / 'out'}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


# --- policies and stages


def test_baselines_have_the_sweeps_vectors_unless_told_otherwise() -> None:
    names = [policy.name for policy in baseline_policies(example())]
    assert names[:3] == ["DPO accuracy", "DPO engagement", "scalarised 0.9 / 0.1"]
    assert len(names) == 2 + 3 * 5
    own = "[{method: soup, weights: [{accuracy: 3, engagement: 1}]}, {method: dpo}]"
    config = example(f"compare.baselines={own}")
    assert [p.name for p in baseline_policies(config)] == [
        "soup 0.75 / 0.25",
        "DPO accuracy",
        "DPO engagement",
    ]


def test_modpo_trains_on_the_objective_that_weighs_most_unless_told_otherwise() -> None:
    found = trainings(example("compare.baselines=[{method: modpo}]"))
    assert [policy.objective for policy in found.values()] == ["accuracy"] * 3 + ["engagement"] * 2
    fixed = trainings(example("compare.baselines=[{method: modpo, objective: engagement}]"))
    assert {policy.objective for policy in fixed.values()} == {"engagement"}


def test_every_training_has_an_equal_budget() -> None:
    config = example("policy.alpha={accuracy: 2}", "policy.beta={accuracy: 0.2, engagement: 0.1}")
    found = trainings(config)
    assert len(found) == 2 + 5 + 5
    groups = {"accuracy": np.arange(1000), "engagement": np.arange(1000, 1900)}

    def plan(policy: Any) -> list[Any]:
        own = [groups[name] for name in policy.trained_objectives(config.objective_names)]
        return plan_balanced_batches(own, policy.training.batch_size, policy.training.epochs, None, 1)

    ours = plan(config.policy)
    for policy in found.values():
        policy.check_objectives(config.objective_names)
        trained = policy.trained_objectives(config.objective_names)
        batches = plan(policy)
        largest = "accuracy" in trained  # the smaller group alone needs fewer steps for one pass
        assert len(batches) == (len(ours) if largest else 57)
        for name in trained:
            assert policy.beta_of(name) == config.policy.beta_of(name)
            rows = groups[name]
            assert np.isin(batches[0], rows).sum() == np.isin(ours[0], rows).sum()
        shared = {"batch_size"}
        assert policy.training.model_dump(exclude=shared) == config.policy.training.model_dump(exclude=shared)


def test_the_runs_own_stages_do_not_know_of_the_comparison() -> None:
    plain = pipeline(example()).fingerprints(example())
    changed = example("compare.baselines=[{method: dpo}]")
    assert pipeline(example()).fingerprints(changed) == plain
    both = comparison_pipeline(changed).fingerprints(changed)
    assert {name: both[name] for name in plain} == plain


def test_another_vector_trains_one_policy_more_and_keeps_the_others() -> None:
    def fingerprints(vectors: str) -> dict[str, str]:
        config = example(f"compare.baselines=[{{method: scalarised, weights: [{vectors}]}}]")
        pipeline = comparison_pipeline(config)
        found = pipeline.fingerprints(config)
        return {stage.name: found[stage.name] for stage in pipeline.needed_for([REPORT])}

    one = fingerprints("{accuracy: 0.2, engagement: 0.8}")
    two = fingerprints("{accuracy: 0.2, engagement: 0.8}, {accuracy: 0.6, engagement: 0.4}")
    assert set(two) - set(one) == {"compare/scalarised-0.6-0.4"}
    assert {name for name in one if one[name] != two[name]} == {"compare/play", "compare/report"}
    assert "serve" not in one and "report" not in one


def test_a_soup_needs_the_dpo_policies_and_nothing_else_is_trained() -> None:
    config = example("compare.baselines=[{method: soup}]")
    stages = comparison_pipeline(config).stages
    own = [name for name in stages if name.startswith("compare/")]
    assert own == ["compare/dpo-accuracy", "compare/dpo-engagement", "compare/soups", "compare/play", REPORT]


def test_a_baselines_model_is_what_speaks_and_its_kl_is_measured(tmp_path: Path) -> None:
    sft, same, moved, plain = (str(tmp_path / name) for name in ("sft", "same", "moved", "plain"))
    model().save_pretrained(sft)
    TOKENIZER.save_pretrained(sft)
    for folder, noise in ((same, 0.0), (moved, 0.5)):
        policy = MultiHeadCausalLM.from_base(sft, ["modpo"], noise=noise)
        policy.save_pretrained(folder, TOKENIZER)
    policy.merge(Weights.one("modpo")).save_pretrained(plain)  # as a soup is stored
    TOKENIZER.save_pretrained(plain)
    config = EvaluationConfig(dialogues=3, sampling=SAMPLING)
    player = MethodPlayer(sft, "no policy", "no reward model", DeviceConfig(), config, range(3), *TUTORING)
    half = Weights.balanced(world.OBJECTIVES)
    base = player.run(Method("SFT", "sft")).result
    like_sft, one_head, averaged = (
        player.run(Method(name, "modpo", weights=half, model_url=folder)).result
        for name, folder in (("same", same), ("moved", moved), ("plain", plain))
    )
    assert base.kl_to_reference == 0.0
    assert like_sft.values == base.values and like_sft.kl_to_reference == pytest.approx(0.0, abs=1e-6)
    assert one_head.kl_to_reference is not None and one_head.kl_to_reference > 0.01
    assert averaged.values == one_head.values
    assert averaged.kl_to_reference == pytest.approx(one_head.kl_to_reference, rel=1e-4)
    assert one_head.weights == {"accuracy": 0.5, "engagement": 0.5}
    with pytest.raises(ValueError, match="strength 2 was given, but this policy is a single-head model"):
        player.run(Method("averaged", "soup", weights=half, model_url=plain, strength=2.0))


def test_strength_0_of_a_policy_with_the_sft_backbone_is_sft(tmp_path: Path) -> None:
    sft, folder = str(tmp_path / "sft"), str(tmp_path / "policy")
    model().save_pretrained(sft)
    TOKENIZER.save_pretrained(sft)
    policy = MultiHeadCausalLM.from_base(sft, list(world.OBJECTIVES), noise=0.5)
    policy.save_pretrained(folder, TOKENIZER)  # without its base head, which the player takes from SFT
    config = EvaluationConfig(dialogues=3, sampling=SAMPLING)
    player = MethodPlayer(sft, folder, "no reward model", DeviceConfig(), config, range(3), *TUTORING)
    half = Weights.balanced(world.OBJECTIVES)
    base = player.run(Method("SFT", "sft")).result
    at_0, at_1, at_2 = (
        player.run(Method(f"strength {s}", "weights", weights=half, strength=s)).result
        for s in (0.0, 1.0, 2.0)
    )
    assert at_0.values == base.values and at_0.kl_to_reference == pytest.approx(0.0, abs=1e-6)
    assert at_1.kl_to_reference is not None and at_2.kl_to_reference is not None
    assert 0.01 < at_1.kl_to_reference < at_2.kl_to_reference and at_2.strength == 2.0
    assert not at_1.same_policy_unguided(at_2)
    greedy, again = (
        player.run(Method(f"again {n}", "weights", weights=half, temperature=0.0)).result for n in range(2)
    )
    usual = Method("usual", "weights", weights=half, temperature=SAMPLING.temperature)
    assert player.run(usual).result.kl_to_reference == at_1.kl_to_reference
    assert again.values == greedy.values != at_1.values
    assert greedy.temperature == 0 and not at_1.same_policy_unguided(greedy)


def test_the_kl_of_guided_rows_is_measured_on_what_guidance_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft, moved, judge = (str(tmp_path / name) for name in ("sft", "moved", "judge"))
    model().save_pretrained(sft)
    TOKENIZER.save_pretrained(sft)
    policy = MultiHeadCausalLM.from_base(sft, list(world.OBJECTIVES), noise=0.5)
    policy.save_pretrained(moved, TOKENIZER)
    kinds = dict.fromkeys(world.OBJECTIVES, "value")
    reward = ProcessRewardModel.from_base(model(1), kinds, tuning="frozen", tokenizer=TOKENIZER)
    scores = {name: np.array([0.0, 1.0, 0.5, 0.7]) for name in kinds}
    reward.fit_calibration(scores, {name: ["a", "a", "b", "b"] for name in scores})
    reward.save_pretrained(judge)
    config = EvaluationConfig(dialogues=2, sampling=SAMPLING)
    half = Weights.balanced(world.OBJECTIVES)
    method = Method("guided policy", "guided", half, half, num_candidates=3)
    player = MethodPlayer(sft, moved, judge, DeviceConfig(), config, range(2), *TUTORING)
    played = player.run(method)
    log_ratio = tokens = turns = 0.0
    for dialogue in played.samples:
        ids = torch.tensor([[i for turn in dialogue.turns for i in turn.token_ids or []]])
        spoken = [turn.speaker == "tutor" for turn in dialogue.turns for _ in turn.token_ids or []]
        with torch.no_grad():
            of_policy, of_sft = (
                torch.log_softmax(m(input_ids=ids).logits[0], -1) for m in (policy.merge(half), model())
            )
        for position in np.flatnonzero(spoken):
            token = ids[0, position]
            log_ratio += float(of_policy[position - 1, token] - of_sft[position - 1, token])
        tokens += sum(spoken)
        turns += sum(turn.speaker == "tutor" for turn in dialogue.turns)
    expected = (log_ratio + turns * (math.log(3) - 2 / 3)) / tokens
    assert played.result.kl_to_reference == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr(methods, "KL_CHUNK_LOGITS", 1)  # one position at a time
    assert player.run(method).result.kl_to_reference == pytest.approx(expected, rel=1e-4)
