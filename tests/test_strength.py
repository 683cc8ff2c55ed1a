"""Strength: decoding with W_0 + s * sum_i w_i (W_i - W_0), by hand and through every way of asking for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_guided
import torch
from tiny_policies import OBJECTIVES, WEIGHTS, batch, policy, tiny
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mahalo_ray import GuidedDecoder
from mahalo_ray.cli import app
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.guidance import GuidedRequest
from mahalo_ray.decoding.policy import CausalPolicy, HeadMix, MultiHeadPolicy
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.models.heads import merge_heads
from mahalo_ray.objectives import Weights


def two_headed(**options: Any) -> MultiHeadCausalLM:
    """On a backbone as it was: strength 0 is the base model itself."""
    objectives = ["accuracy", "engagement"]
    options = {"keep_base_head": True, **options}
    return MultiHeadCausalLM.from_base(tiny_guided.model(), objectives, noise=0.5, seed=1, **options).eval()


@pytest.mark.parametrize("kind", ["full", "low_rank"])
@pytest.mark.parametrize("family", ["qwen2-tied", "gemma2-softcap", "phi-head-bias"])
@torch.no_grad()
def test_logits_are_those_of_the_formula(family: str, kind: Any) -> None:
    model, data = policy(family, head_kind=kind, rank=2, keep_base_head=True), batch(rows=3)
    hidden = model.hidden_states(data["input_ids"], data["attention_mask"])
    base = model.base_head.project(hidden)
    moved = sum(w * (model.heads[name].project(hidden) - base) for name, w in WEIGHTS.items())
    table = torch.tensor([WEIGHTS.over(OBJECTIVES)] * 3)
    strengths = torch.tensor([0.0, 1.0, 2.5])
    rows = model.logits(hidden, table, strengths)
    for row, s in enumerate(strengths.tolist()):
        expected = model.transform(base + s * moved)
        torch.testing.assert_close(model.merged_head(WEIGHTS, s)(hidden), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.logits(hidden, WEIGHTS, s), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rows[row], expected[row], rtol=1e-4, atol=1e-5)
    merged = model.merge(WEIGHTS, strength=2.5)
    logits = merged(data["input_ids"], attention_mask=data["attention_mask"]).logits
    expected = model.transform(base + 2.5 * moved)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    called = model(data["input_ids"], data["attention_mask"], weights=WEIGHTS, strength=2.5).logits
    torch.testing.assert_close(called, expected, rtol=1e-4, atol=1e-5)


def test_at_1_nothing_is_computed_otherwise_and_at_0_the_head_is_the_base_models() -> None:
    model = two_headed()
    weights = Weights.parse("accuracy=0.7,engagement=0.3")
    today = merge_heads([model.heads[name] for name in model.objectives], (0.7, 0.3))
    assert torch.equal(model.merged_head(weights, 1.0).weight, today.weight)
    assert torch.equal(model.merged_head(weights, 0.0).weight, tiny_guided.model().lm_head.weight)


@pytest.mark.parametrize("kind", ["full", "low_rank"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_at_0_every_token_is_the_base_models_and_at_1_the_policys(kind: Any, temperature: float) -> None:
    model, plain = two_headed(head_kind=kind), tiny_guided.model()
    reward, tokenizer = tiny_guided.reward(), tiny_guided.tokenizer()
    decoder = GuidedDecoder(model, reward, "math", tokenizer)
    base = GuidedDecoder(plain, reward, "math", tokenizer)
    weights = Weights.parse("accuracy=0.7,engagement=0.3")
    options: dict[str, Any] = {
        "num_candidates": 2,
        "max_new_tokens": 12,
        "max_step_tokens": 4,
        "seed": 3,
        "sampling": SamplingParams(temperature=temperature),
    }
    ask = tiny_guided.ASK
    expected = base.generate(ask, **options).token_ids
    own = decoder.generate(ask, weights=weights, **options).token_ids
    assert expected != own
    asked = [GuidedRequest(ask, weights=weights, strength=s, **options) for s in (0.0, 1.0, 3.0)]
    at_0, at_1, beyond = (result.token_ids for result in decoder.generate_batch(asked))
    assert (at_0, at_1) == (expected, own)
    assert decoder.generate(ask, weights=weights, strength=0.0, **options).token_ids == expected
    assert decoder.generate(ask, weights=weights, strength=3.0, **options).token_ids == beyond
    assert temperature == 0 or beyond != own
    merged = GuidedDecoder(model.merge(weights, strength=3.0), reward, "math", tokenizer)
    assert merged.generate(ask, **options).token_ids == beyond


def test_a_policy_without_its_base_head_refuses_by_name_until_it_gets_it(tmp_path: Path) -> None:
    model = two_headed(keep_base_head=False)
    model.save_pretrained(tmp_path / "old", tiny_guided.tokenizer())
    tiny_guided.model().save_pretrained(tmp_path / "sft")
    old = MultiHeadCausalLM.from_pretrained(tmp_path / "old")
    half = Weights.balanced(old.objectives)
    for ask in (
        lambda: old.merge(half, strength=2.0),
        lambda: old.logits(torch.zeros(1, 32), half, 2.0),
        lambda: MultiHeadPolicy(old).check_mix(HeadMix(half, 0.0)),
    ):
        with pytest.raises(
            ValueError, match=r"saved without it: add it with `MultiHeadCausalLM\.set_base_head"
        ):
            ask()
    with pytest.raises(ValueError, match="give the model that the policy was made from"):
        old.set_base_head(tiny())
    old.set_base_head(tmp_path / "sft")
    kept = two_headed()
    assert torch.equal(old.merged_head(half, 2.0).weight, kept.merged_head(half, 2.0).weight)
    old.save_pretrained(tmp_path / "new", tiny_guided.tokenizer())
    again = MultiHeadCausalLM.from_pretrained(tmp_path / "new")
    assert torch.equal(again.merged_head(half, 2.0).weight, kept.merged_head(half, 2.0).weight)
    with pytest.raises(ValueError, match="low-rank heads are differences"):
        two_headed(head_kind="low_rank").set_base_head(tmp_path / "sft")


@pytest.mark.parametrize("strength", [-0.5, float("nan"), float("inf")])
def test_strengths_that_are_no_numbers_from_0_up_are_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=r"strength is .*: it must be a finite number of at least 0"):
        two_headed().merge(Weights.one("accuracy"), strength=strength)
    with pytest.raises(ValueError, match=r"strength is .*: it must be a finite number of at least 0"):
        GuidedRequest(tiny_guided.ASK, strength=strength)


def test_a_policy_with_a_single_head_has_one_strength() -> None:
    single = CausalPolicy(tiny_guided.model())
    engine = Engine(single)
    engine.append(engine.add(1, strength=2.0), [[1, 2]])
    with pytest.raises(ValueError, match="strength 2 was given, but this policy is a single-head model"):
        engine.sample([0], 1, SamplingParams(), [0], 4, [])


@torch.no_grad()
def test_export_merges_at_a_strength(tmp_path: Path) -> None:
    model = two_headed()
    model.save_pretrained(tmp_path / "policy", tiny_guided.tokenizer())
    arguments = ["export", str(tmp_path / "policy"), str(tmp_path / "out"), "--weights", "accuracy=1"]
    result = CliRunner().invoke(app, [*arguments, "--strength", "1.5"])
    assert result.exit_code == 0 and "strength 1.5" in " ".join(result.output.split())
    ids = torch.tensor([[3, 4, 5]])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits
    expected = model(ids, weights=Weights.one("accuracy"), strength=1.5).logits
    torch.testing.assert_close(exported, expected)
    metadata = json.loads((tmp_path / "policy" / "mahalo.json").read_text())
    assert metadata["keep_base_head"] is True
