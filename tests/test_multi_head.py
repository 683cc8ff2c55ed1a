"""The multi-head policy on every backbone family, against the all-heads computation done by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_policies import FAMILIES, OBJECTIVES, SMALL, WEIGHTS, batch, policy, tiny
from torch import Tensor

from mahalo_ray.config import LoraConfig
from mahalo_ray.models import ChunkedCausalLM, MultiHeadCausalLM
from mahalo_ray.objectives import Weights


def all_heads_logps(model: MultiHeadCausalLM, data: dict[str, Tensor]) -> Tensor:
    """[H, B]: every row through every head, whole logits."""
    hidden = model.hidden_states(data["input_ids"], data["attention_mask"])
    labels, found = data["labels"], []
    for head in model.heads.values():
        logps = head(hidden).log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
        found.append((logps * (labels != -100)).sum(1))
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["full", "low_rank"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_routes_merges_saves_and_loads(family: str, kind: Any, tmp_path: Path) -> None:
    model, data = policy(family, head_kind=kind, rank=3), batch()
    with torch.no_grad():
        index = torch.tensor([0, 2, 1, 0])
        routed = model.completion_logps(**data, head_index=index, chunk_size=3)
        torch.testing.assert_close(routed, all_heads_logps(model, data)[index, torch.arange(4)])

        hidden = model.hidden_states(data["input_ids"], data["attention_mask"])
        scale, cap = model.transform.scale, model.transform.softcap
        weighted = sum(w * model.heads[o].project(hidden) for o, w in WEIGHTS.items()) * scale
        weighted = weighted if cap is None else cap * torch.tanh(weighted / cap)
        torch.testing.assert_close(model.logits(hidden, WEIGHTS), weighted)
        torch.testing.assert_close(model.merged_head(WEIGHTS)(hidden), weighted)
        shares = torch.tensor([[1.0, 0, 0], [0.2, 0.3, 0.5], [0, 0.6, 0.4], [0.25, 0.75, 0]])
        mixed = model.logits(hidden, shares).log_softmax(-1)
        labels = data["labels"]
        logps = mixed.gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
        torch.testing.assert_close(model.mixture_logps(**data, weights=shares, chunk_size=3), logps.sum(1))
        merged = model.merge(WEIGHTS)
        assert isinstance(merged, type(tiny(family)))
        torch.testing.assert_close(
            merged(data["input_ids"], attention_mask=data["attention_mask"]).logits, weighted
        )

        model.save_pretrained(tmp_path / "policy")
        loaded = MultiHeadCausalLM.from_pretrained(tmp_path / "policy").eval()
        assert loaded.objectives == model.objectives and loaded.head_kind == kind
        torch.testing.assert_close(
            loaded.completion_logps(**data, head_index=index), routed, rtol=1e-6, atol=1e-6
        )
        merged.save_pretrained(tmp_path / "merged")
        plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(
            plain(data["input_ids"], attention_mask=data["attention_mask"]).logits, weighted
        )


@pytest.mark.parametrize("kind", ["full", "low_rank"])
def test_heads_start_as_the_base_head_plus_noise_seeded_by_name(kind: Any) -> None:
    base = tiny()
    weight = base.lm_head.weight
    one = MultiHeadCausalLM.from_base(base, ["a", "b"], noise=1e-3, head_kind=kind, rank=4)
    two = MultiHeadCausalLM.from_base(base, ["b", "c", "a"], noise=1e-3, head_kind=kind, rank=4)
    for name in ("a", "b"):
        difference = one.heads[name].weight - weight
        assert 0.7e-3 < difference.std() < 1.3e-3
        torch.testing.assert_close(one.heads[name].weight, two.heads[name].weight, rtol=0, atol=0)
    assert not torch.equal(one.heads["a"].weight, one.heads["b"].weight)
    other = MultiHeadCausalLM.from_base(base, ["a"], noise=1e-3, seed=7, head_kind=kind, rank=4)
    assert not torch.equal(other.heads["a"].weight, one.heads["a"].weight)
    assert one.head_kind == "full" or one.base_head.weight.requires_grad is False


def test_training_does_not_touch_the_base_model_heads_or_embedding_through_a_tied_weight() -> None:
    base = tiny("qwen2-tied")
    model = MultiHeadCausalLM.from_base(base, OBJECTIVES)
    for head in model.heads.values():
        assert head.weight.data_ptr() != base.get_input_embeddings().weight.data_ptr()


@settings(max_examples=15)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=6),
    st.integers(1, 20),
    st.booleans(),
    st.sampled_from(["full", "low_rank"]),
)
def test_routing_equals_the_all_heads_computation_with_gradients(
    index: list[int], chunk: int, average: bool, kind: Any
) -> None:
    """Values, gradients of heads and backbone; heads without rows get a gradient of zero."""
    data = batch(rows=len(index), seed=len(index))
    upstream = torch.randn(len(index), generator=torch.Generator().manual_seed(chunk))
    counts = (data["labels"] != -100).sum(1) if average else 1
    grads = []
    for routed in (True, False):
        model = policy(head_kind=kind, rank=2)
        if routed:
            logps = model.completion_logps(
                **data, head_index=torch.tensor(index), chunk_size=chunk, average=average
            )
        else:
            logps = all_heads_logps(model, data)[torch.tensor(index), torch.arange(len(index))] / counts
        (logps * upstream).sum().backward()
        own = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        grads.append((logps, own))
    torch.testing.assert_close(grads[0][0], grads[1][0])
    for name, expected in grads[1][1].items():
        found = grads[0][1][name]
        if expected is None and name.startswith("heads."):
            expected = torch.zeros_like(found)
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    for number, objective in enumerate(OBJECTIVES):
        if number not in index:
            for parameter in grads[0][1]:
                if parameter.startswith(f"heads.{objective}."):
                    assert not grads[0][1][parameter].any()


@pytest.mark.parametrize("kind", ["full", "low_rank"])
def test_gradients_of_mixtures_equal_those_of_whole_logits(kind: Any) -> None:
    data, upstream = batch(), torch.tensor([1.0, -2.0, 0.5, 1.0])
    shares = torch.tensor([[1.0, 0, 0], [0.2, 0.3, 0.5], [0, 0.6, 0.4], [0.25, 0.75, 0]])
    grads = []
    for in_chunks in (True, False):
        model = policy(head_kind=kind, rank=2)
        if in_chunks:
            logps = model.mixture_logps(**data, weights=shares, chunk_size=3)
        else:
            hidden = model.hidden_states(data["input_ids"], data["attention_mask"])
            mixed, labels = model.logits(hidden, shares).log_softmax(-1), data["labels"]
            logps = (mixed.gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)).sum(1)
        (logps * upstream).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, expected in grads[1].items():
        torch.testing.assert_close(grads[0][name], expected, rtol=1e-4, atol=1e-5)


def test_the_backbone_gradient_is_the_weighted_sum_over_objectives() -> None:
    data, alpha = batch(rows=6), torch.tensor([1.0, 0.5, 2.0])
    index = torch.tensor([0, 1, 2, 2, 1, 0])
    model = policy()
    (model.completion_logps(**data, head_index=index) * alpha[index]).sum().backward()
    together = [p.grad.clone() for p in model.backbone.parameters()]
    apart = [torch.zeros_like(g) for g in together]
    for number in range(3):
        model.zero_grad()
        rows = index == number
        model.completion_logps(
            **{k: v[rows] for k, v in data.items()}, head_index=index[rows]
        ).sum().backward()
        for total, parameter in zip(apart, model.backbone.parameters(), strict=True):
            total += alpha[number] * parameter.grad
    for found, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "low_rank"])
@pytest.mark.parametrize("family", ["qwen2-tied", "gemma2-softcap", "phi-head-bias"])
def test_each_row_with_its_own_weights_decodes_in_one_pass(family: str, kind: Any) -> None:
    model, data = policy(family, head_kind=kind, rank=2), batch(rows=3)
    rows = [WEIGHTS, Weights.one("brevity"), Weights.parse("accuracy=1,engagement=3")]
    table = torch.tensor([w.over(OBJECTIVES) for w in rows])
    with torch.no_grad():
        hidden = model.hidden_states(data["input_ids"], data["attention_mask"])
        for states in (hidden, hidden[:, -1]):
            found = model.logits(states, table)
            for row, weights in enumerate(rows):
                torch.testing.assert_close(found[row], model.merged_head(weights)(states[row]))
    with pytest.raises(ValueError, match=r"expected \(3, 3\)"):
        model.logits(hidden, table[:2])


def test_one_weight_on_one_objective_is_that_head_exactly() -> None:
    model = policy()
    assert torch.equal(model.merged_head(Weights.one("engagement")).weight, model.heads["engagement"].weight)
    with pytest.raises(ValueError, match="Did you mean 'brevity'"):
        model.merged_head(Weights.one("brevty"))


@pytest.mark.parametrize("kind", ["full", "low_rank"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_called_and_generates_like_the_merged_transformers_model(family: str, kind: Any) -> None:
    model, data = policy(family, head_kind=kind, rank=2).train(), batch(rows=2)
    model.add_lora(LoraConfig(rank=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.eval()
    merged, ids, mask = model.merge(WEIGHTS), data["input_ids"], data["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        found = model(ids, mask, WEIGHTS, labels=labels)
        expected = merged(ids, attention_mask=mask, labels=labels)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-5)
        table = torch.tensor([WEIGHTS.over(OBJECTIVES), [0.0, 1.0, 0.0]])
        each = model(ids, mask, table).logits
        torch.testing.assert_close(each[:1], found.logits[:1])
        torch.testing.assert_close(each[1:], model(ids, mask, Weights.one("engagement")).logits[1:])
        prefix = model(ids[:1, :4], weights=WEIGHTS, use_cache=True)
        following = model(
            ids[:1, 4:5], weights=WEIGHTS, past_key_values=prefix.past_key_values, use_cache=True
        )
        torch.testing.assert_close(following.logits, merged(ids[:1, :5]).logits[:, 4:], rtol=1e-4, atol=1e-5)
    left = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    model.train()
    assert torch.equal(model.generate(**left, weights=WEIGHTS, **options), merged.generate(**left, **options))
    assert model.training, "the mode must be put back"
    with pytest.raises(ValueError, match="give weights: this policy has a head for each of accuracy"):
        model(ids)


def test_a_policy_with_one_head_needs_no_weights() -> None:
    model, data = MultiHeadCausalLM.from_base(tiny(), ["only"], noise=0.0).eval(), batch(rows=2)
    with torch.no_grad():
        torch.testing.assert_close(
            model(data["input_ids"]).logits, tiny()(data["input_ids"]).logits, rtol=0, atol=0
        )
    assert torch.equal(
        model.generate(data["input_ids"][:1], max_new_tokens=4, do_sample=False),
        tiny().generate(data["input_ids"][:1], max_new_tokens=4, do_sample=False),
    )


def test_gradient_checkpointing_changes_memory_only() -> None:
    data, index, grads = batch(), torch.tensor([0, 1, 2, 0]), []
    for checkpointed in (False, True):
        model = policy().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            loss = model.completion_logps(**data, head_index=index).sum()
        loss.backward()
        grads.append(([p.grad for p in model.parameters()], sum(saved)))
    assert grads[1][1] < grads[0][1] / 2
    for found, expected in zip(grads[1][0], grads[0][0], strict=True):
        torch.testing.assert_close(found, expected)


def test_keyword_arguments_reach_the_backbone() -> None:
    model, data = policy(), batch()
    with torch.no_grad():
        plain = model.hidden_states(data["input_ids"])
        moved = model.hidden_states(data["input_ids"], position_ids=torch.arange(9)[None] * 3)
    assert not torch.allclose(plain, moved)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["qwen2-tied", "gemma2-softcap", "gpt2"])
def test_causal_lm_logps_equal_whole_logits_and_train_the_model(family: str) -> None:
    base, data = tiny(family), batch()
    logits = base(data["input_ids"], attention_mask=data["attention_mask"]).logits
    labels = data["labels"]
    logps = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    (-logps.sum(1)).sum().backward()
    expected = {n: p.grad.clone() for n, p in base.named_parameters()}
    base.zero_grad()
    found = ChunkedCausalLM(base)(**data, chunk_size=5)
    torch.testing.assert_close(found, logps.sum(1))
    (-found).sum().backward()
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4)
    average = ChunkedCausalLM(base)(**data, average=True)
    torch.testing.assert_close(average, logps.sum(1) / (labels != -100).sum(1))


def test_bad_input_is_refused_by_name(tmp_path: Path) -> None:
    for objectives, complaint in (
        ([], "at least one"),
        ("accuracy", "give a list"),
        (["a", "a"], "twice"),
        (["a.b"], "cannot name"),
        (["keys"], "cannot name"),
    ):
        with pytest.raises(ValueError, match=complaint):
            MultiHeadCausalLM.from_base(tiny(), objectives)
    with pytest.raises(ValueError, match="unknown head kind 'ful'"):
        MultiHeadCausalLM.from_base(tiny(), ["a"], head_kind="ful")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a causal language model"):
        MultiHeadCausalLM.from_base(tf.AutoModel.from_config(FAMILIES["llama"]), ["a"])
    with pytest.raises(ValueError, match=r"outside 0\.\.2"):
        policy().completion_logps(**batch(), head_index=torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="no model folder"):
        MultiHeadCausalLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no mahalo\.json"):
        MultiHeadCausalLM.from_pretrained(tmp_path)
    policy().save_pretrained(tmp_path)
    document = json.loads((tmp_path / "mahalo.json").read_text())
    (tmp_path / "mahalo.json").write_text(json.dumps({**document, "objectives": ["accuracy", "style"]}))
    with pytest.raises(
        ValueError, match=r"'heads\.style\.weight' is missing.*'heads\.brevity\.weight' is unknown"
    ):
        MultiHeadCausalLM.from_pretrained(tmp_path)
    (tmp_path / "mahalo.json").write_text(json.dumps({**document, "format_version": 9}))
    with pytest.raises(ValueError, match="format version 9"):
        MultiHeadCausalLM.from_pretrained(tmp_path)


def test_a_family_with_hidden_tricks_is_refused() -> None:
    """MiniCPM3 scales the states between backbone and head: head(backbone(x)) is not its logits."""
    config = tf.MiniCPM3Config(
        **{**SMALL, "num_key_value_heads": 2},
        dim_model_base=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=8,
    )
    with pytest.raises(ValueError, match="not supported"):
        MultiHeadCausalLM.from_base(tf.AutoModelForCausalLM.from_config(config), ["a"])
