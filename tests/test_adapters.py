"""Adapters per objective on the upper blocks: between heads on one backbone and a soup of whole models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_policies import OBJECTIVES, batch, tiny
from tiny_tutor import TOKENIZER, model
from transformers import AutoModel, PreTrainedModel

from mahalo_ray.config import AdaptersConfig, ModelConfig, PolicyConfig, ScratchModelConfig
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.policy import MultiHeadPolicy
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.models.adapters import AdaptedLinear
from mahalo_ray.models.soup import average_models
from mahalo_ray.objectives import Weights
from mahalo_ray.planning import make_plan

SETTINGS = AdaptersConfig(depth=1, rank=2, alpha=4)
MIXTURE = Weights.parse("accuracy=0.5,engagement=0.2,brevity=0.3")
IDS = torch.tensor([[5, 9, 11, 4, 7], [8, 3, 12, 6, 10]])


def adapted(depth: int | str = 1, seed: int = 5, base: PreTrainedModel | None = None) -> MultiHeadCausalLM:
    """A policy whose adapters add something: their second matrices are drawn, too."""
    settings = SETTINGS.model_copy(update={"depth": depth})
    policy = MultiHeadCausalLM.from_base(base or tiny(), OBJECTIVES, noise=0.1, adapters=settings).eval()
    assert policy.adapters is not None
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.adapters.parameters().items():
        if name.endswith("adapter_up"):
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return policy


def test_depth_0_is_the_policy_of_heads_alone(tmp_path: Path) -> None:
    data, index = batch(), torch.tensor([0, 2, 1, 0])
    plain = MultiHeadCausalLM.from_base(tiny(), OBJECTIVES, noise=0.1).eval()
    flat = MultiHeadCausalLM.from_base(tiny(), OBJECTIVES, noise=0.1, adapters=AdaptersConfig()).eval()
    state = flat.state_dict()
    assert flat.adapters is None
    assert {name: t.tolist() for name, t in state.items()} == {
        name: t.tolist() for name, t in plain.state_dict().items()
    }
    with torch.no_grad():
        expected = plain.completion_logps(**data, head_index=index)
        assert torch.equal(flat.completion_logps(**data, head_index=index), expected)
        # New adapters add nothing yet, whatever they are mixed by.
        fresh = MultiHeadCausalLM.from_base(tiny(), OBJECTIVES, noise=0.1, adapters=SETTINGS).eval()
        assert torch.equal(fresh.completion_logps(**data, head_index=index), expected)
        assert torch.equal(fresh(IDS, weights=MIXTURE).logits, plain(IDS, weights=MIXTURE).logits)
    for policy, version in ((plain, 1), (fresh, 2)):
        policy.save_pretrained(tmp_path / str(version))
        assert f'"format_version": {version}' in (tmp_path / str(version) / "mahalo.json").read_text()


@pytest.mark.parametrize("depth", [1, "all"])
def test_every_row_goes_through_its_own_adapters(depth: int | str) -> None:
    """In training a row sees its objective's adapters and head alone; packed pairs too."""
    policy, data = adapted(depth), batch()
    index = torch.tensor([0, 2, 1, 0])
    with torch.no_grad():
        together = policy.completion_logps(**data, head_index=index)
        for row, objective in enumerate(index.tolist()):
            alone = policy.merge(Weights.one(OBJECTIVES[objective]))
            ids = data["input_ids"][row : row + 1]
            mask = data["attention_mask"][row : row + 1]
            labels = data["labels"][row]
            logps = alone(ids, attention_mask=mask).logits[0].log_softmax(-1)
            counted = labels != -100
            expected = logps[counted].gather(1, labels[counted][:, None]).sum()
            torch.testing.assert_close(together[row], expected, rtol=1e-5, atol=1e-5)
        # Two pairs of different objectives in one packed sequence.
        pairs = torch.tensor([[2, 2, 1], [1, 3, 2]])
        ids = torch.tensor([[5, 9, 11, 4, 7, 8, 3, 12, 6, 10, 20]])
        labels = torch.tensor([[-100, -100, 4, 30, 31, -100, 12, 6, 32, 20, 33]])
        packed = policy
        packed.enable_pair_packing()
        sums = packed.completion_logps(ids, None, labels, torch.tensor([0, 1, 0, 1]), pair_lengths=pairs)
        swapped = packed.completion_logps(ids, None, labels, torch.tensor([0, 2, 0, 2]), pair_lengths=pairs)
        ends = torch.eye(3)[[0, 1, 0, 1]]
        mixed = packed.mixture_logps(ids, None, labels, ends, pair_lengths=pairs)
    assert torch.equal(sums[[0, 2]], swapped[[0, 2]]) and not torch.isclose(sums[1], swapped[1])
    torch.testing.assert_close(mixed, sums)


def test_at_full_depth_a_mixture_is_the_soup_of_the_objectives_models(tmp_path: Path) -> None:
    policy = adapted("all", base=model())
    folders: dict[str, str | Path] = {}
    for objective in OBJECTIVES:
        folders[objective] = tmp_path / objective
        policy.merge(Weights.one(objective)).save_pretrained(folders[objective])
        TOKENIZER.save_pretrained(folders[objective])
    expected = dict(average_models(folders, MIXTURE, tmp_path / "soup").named_parameters())
    merged = policy.merge(MIXTURE)
    assert set(expected) == {name for name, _ in merged.named_parameters()}
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(policy(IDS, weights=MIXTURE).logits, merged(IDS).logits)


@pytest.mark.parametrize("strength", [1.0, 1.7])
def test_a_batch_of_different_weights_is_each_row_by_itself(strength: float) -> None:
    """Low-rank products row by row, against the merged model of every row; in one batch, in the engine, and
    where all rows have the same weights (then layers are folded)."""
    policy = adapted(1)
    policy.set_base_head(tiny())
    rows = [MIXTURE, Weights.one("brevity")]
    table = torch.tensor([weights.over(OBJECTIVES) for weights in rows])
    merged = [policy.merge(weights, strength=strength).eval() for weights in rows]
    with torch.no_grad():
        logits = policy(IDS, weights=table, strength=strength).logits
        for row, model in enumerate(merged):
            torch.testing.assert_close(logits[row], model(IDS[row : row + 1]).logits[0], rtol=1e-4, atol=1e-5)
    sampling = SamplingParams(temperature=0)

    def greedy(engine: Engine, weights: list[Weights]) -> list[list[int]]:
        sequences = engine.add(len(weights), weights, strength=strength)
        engine.append(sequences, IDS.tolist()[: len(weights)])
        sampled = engine.sample(sequences, 2, sampling, [1] * len(weights), 6, ())
        assert all(candidates[0] == candidates[1] for candidates in sampled.token_ids)
        engine.accept(sampled, [0] * len(weights))
        again = engine.sample(sequences, 1, sampling, [1] * len(weights), 4, ())
        return [a[0] + b[0] for a, b in zip(sampled.token_ids, again.token_ids, strict=True)]

    mixed = greedy(Engine(MultiHeadPolicy(policy)), rows)
    for row, model in enumerate(merged):
        one = model.generate(IDS[row : row + 1], max_new_tokens=10, do_sample=False, eos_token_id=None)
        assert mixed[row] == one[0, 5:].tolist()
    assert in_flight(policy, rows, strength) == mixed
    same = greedy(Engine(MultiHeadPolicy(policy)), [MIXTURE, MIXTURE])
    assert same[0] == mixed[0]
    generated = policy.generate(
        IDS[:1], weights=MIXTURE, strength=strength, max_new_tokens=10, do_sample=False
    )
    assert generated[0, 5:].tolist()[:3] == mixed[0][:3]


def in_flight(policy: MultiHeadCausalLM, rows: list[Weights], strength: float) -> list[list[int]]:
    """Ten greedy tokens of every row, the second of which joins when the first is at its third token."""
    engine = Engine(MultiHeadPolicy(policy))
    sequences = engine.add(len(rows), rows, strength=strength)
    engine.append(sequences, IDS.tolist())
    settings = ([1], [SamplingParams(temperature=0)], [1], [10], [None])
    engine.start(sequences[:1], *settings)
    done = engine.step() + engine.step()
    engine.start(sequences[1:], *settings)
    while engine.is_busy:
        done += engine.step()
    assert sorted(done) == sorted(sequences)
    return [ids[0] for ids in engine.collect(sequences).token_ids]


def test_a_folder_keeps_the_adapters_and_an_ordinary_backbone(tmp_path: Path) -> None:
    policy = adapted(1)
    policy.save_pretrained(tmp_path)
    loaded = MultiHeadCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.adapters is not None and loaded.adapters.depth == 1
    with torch.no_grad():
        assert torch.equal(loaded(IDS, weights=MIXTURE).logits, policy(IDS, weights=MIXTURE).logits)
        backbone = AutoModel.from_pretrained(tmp_path / "backbone").eval()
        torch.testing.assert_close(backbone(IDS).last_hidden_state, policy.hidden_states(IDS))
    adapted_layers = [
        name for name, module in loaded.backbone.named_modules() if isinstance(module, AdaptedLinear)
    ]
    assert adapted_layers and all(name.startswith("layers.1.") for name in adapted_layers)
    (tmp_path / "adapters.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapters.safetensors is missing"):
        MultiHeadCausalLM.from_pretrained(tmp_path)


def test_folded_layers_follow_the_parameters() -> None:
    policy = adapted(1)
    with torch.no_grad():
        before = policy(IDS, weights=MIXTURE).logits
        for parameter in policy.adapter_parameters():
            parameter.mul_(1.5)
        after = policy(IDS, weights=MIXTURE).logits
        torch.testing.assert_close(after, policy.merge(MIXTURE)(IDS).logits)
    assert not torch.allclose(before, after)


def test_the_plan_counts_adapters() -> None:
    """Per objective and rank: 4 layers of 96 to 96, 3 between 96 and 256."""
    model = ModelConfig(scratch=ScratchModelConfig(hidden_size=96, intermediate_size=256, num_layers=3))
    plans = {
        depth: make_plan(model, PolicyConfig.model_validate({"adapters": {"depth": depth}}), 2, 1)
        for depth in (0, 2, "all")
    }
    one_block = 8 * 2 * (4 * (96 + 96) + 3 * (96 + 256))
    assert [plan.counts.adapter for plan in plans.values()] == [0, 2 * one_block, 3 * one_block]
    assert len({plan.counts.backbone for plan in plans.values()}) == 1
    assert plans[2].counts.trained - plans[0].counts.trained == 2 * one_block
    frozen = PolicyConfig.model_validate({"adapters": {"depth": 2, "freeze_backbone": True}})
    counts = make_plan(model, frozen, 2, 1).counts
    assert counts.trained == counts.adapter + counts.heads


def test_adapters_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"'adapters\.depth' is 3, and the backbone has 2 blocks"):
        adapted(3)
    with pytest.raises(ValueError, match="have none"):
        MultiHeadCausalLM.from_base(tiny("gpt2"), OBJECTIVES, adapters=SETTINGS)
    for settings, message in (
        ({"adapters": {"rank": 4}}, "'depth' is 0: no block has any"),
        ({"adapters": {"depth": 1}, "lora": {}}, "not both"),
        ({"adapters": {"depth": 1}, "method": "dpo", "objective": "a"}, "'method: dpo' has one head"),
    ):
        with pytest.raises(ValueError, match=message):
            PolicyConfig.model_validate(settings)
