"""Adapters and folders of multi-head policies: what is saved, and what comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from tiny_policies import FAMILIES, OBJECTIVES, WEIGHTS, V, batch, policy, tiny
from torch import Tensor

from mahalo_ray.config import LoraConfig
from mahalo_ray.logprobs import completion_logps
from mahalo_ray.models import ChunkedCausalLM, MultiHeadCausalLM
from mahalo_ray.objectives import Weights


def reference_logps(model: MultiHeadCausalLM, data: dict[str, Tensor]) -> Tensor:
    """[B] under the model it was made from: adapter off, base head."""
    assert model.base_head is not None
    with model.disable_adapter():
        hidden = model.hidden_states(data["input_ids"], data["attention_mask"])
    return completion_logps(hidden, model.base_head.weight, data["labels"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backbone_folder_is_one_that_transformers_loads(family: str, tmp_path: Path) -> None:
    model, data = policy(family), batch()
    model.save_pretrained(tmp_path)
    backbone = tf.AutoModel.from_pretrained(tmp_path / "backbone").eval()
    with torch.no_grad():
        found = backbone(data["input_ids"], attention_mask=data["attention_mask"]).last_hidden_state
        torch.testing.assert_close(found, model.hidden_states(data["input_ids"], data["attention_mask"]))


def test_lora_trains_the_adapter_alone_and_off_it_is_the_base(tmp_path: Path) -> None:
    base, data, index = tiny(), batch(), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        expected = ChunkedCausalLM(base)(**data, chunk_size=4)
    base.save_pretrained(tmp_path / "base")
    model = MultiHeadCausalLM.from_base(tmp_path / "base", OBJECTIVES, keep_base_head=True)
    model.add_lora(LoraConfig(rank=2, alpha=4.0))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([*model.backbone_parameters(), *model.head_parameters()], lr=0.5)
    assert all("lora_" in n for n, p in model.backbone.named_parameters() if p.requires_grad)
    for _ in range(3):
        optimizer.zero_grad()
        model.completion_logps(**data, head_index=index).sum().backward()
        optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    model.eval()
    with torch.no_grad():
        trained = model.completion_logps(**data, head_index=index)
        assert (trained - expected).abs().min() > 0.1
        torch.testing.assert_close(reference_logps(model, data), expected)

        model.save_pretrained(tmp_path / "policy")
        assert not (tmp_path / "policy" / "backbone").exists()
        loaded = MultiHeadCausalLM.from_pretrained(tmp_path / "policy").eval()
        torch.testing.assert_close(loaded.completion_logps(**data, head_index=index), trained)
        torch.testing.assert_close(reference_logps(loaded, data), expected)
        hidden = model.hidden_states(data["input_ids"], data["attention_mask"])
        merged = loaded.merge(WEIGHTS)
        assert not any("lora" in name for name, _ in merged.named_parameters())
        found = merged(data["input_ids"], attention_mask=data["attention_mask"]).logits
        torch.testing.assert_close(found, model.logits(hidden, WEIGHTS), rtol=1e-4, atol=1e-4)
        assert loaded.has_lora, "merging must leave the policy as it was"
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="pass backbone"):
        MultiHeadCausalLM.from_pretrained(tmp_path / "policy")
    moved = MultiHeadCausalLM.from_pretrained(tmp_path / "policy", backbone=tmp_path / "moved").eval()
    torch.testing.assert_close(moved.completion_logps(**data, head_index=index), trained)
    # With its backbone inside, the folder needs nothing else, and that is the base, not the adapted one.
    loaded.save_pretrained(tmp_path / "whole", with_backbone=True)
    whole = MultiHeadCausalLM.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(whole.completion_logps(**data, head_index=index), trained)
    torch.testing.assert_close(reference_logps(whole, data), expected)


def test_lora_refuses_what_it_cannot_do() -> None:
    model = policy()
    with pytest.raises(ValueError, match="no LoRA adapter to disable"), model.disable_adapter():
        pass
    base = tiny()
    other = MultiHeadCausalLM.from_base(base, OBJECTIVES)
    other.add_lora()
    with pytest.raises(ValueError, match="already carries"):
        other.add_lora()
    with pytest.raises(ValueError, match="already carries"):
        MultiHeadCausalLM.from_base(base, OBJECTIVES)


def test_a_padded_vocabulary_is_kept_as_it_is(tmp_path: Path) -> None:
    """Heads have the model's rows, whatever the tokenizer's size, and the merged model can still resize."""
    base = tiny()
    base.resize_token_embeddings(V + 3)
    model = MultiHeadCausalLM.from_base(base, ["a"])
    assert model.heads["a"].weight.shape == (V + 3, 16) and model.vocab_size == V + 3
    model.save_pretrained(tmp_path)
    merged = MultiHeadCausalLM.from_pretrained(tmp_path).merge(Weights.one("a"))
    assert merged.config.vocab_size == V + 3 and not merged.config.tie_word_embeddings


def test_generation_config_tokenizer_card_and_dtype_survive(tmp_path: Path) -> None:
    base = tiny("qwen2-tied")
    base.generation_config.eos_token_id = [2, 7]
    model = MultiHeadCausalLM.from_base(base, OBJECTIVES)
    model.save_pretrained(tmp_path, metrics={"reward accuracy": 0.71, "data": "toy"})
    card = (tmp_path / "README.md").read_text()
    assert (
        "| engagement | full head |" in card
        and "| reward accuracy | 0.71 |" in card
        and "| data | toy |" in card
    )
    document = json.loads((tmp_path / "mahalo.json").read_text())
    assert document["objectives"] == OBJECTIVES and document["format_version"] == 1
    loaded = MultiHeadCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.merge(WEIGHTS).generation_config.eos_token_id == [2, 7]


def test_a_gathered_state_dict_is_saved_instead_of_the_modules_own(tmp_path: Path) -> None:
    model = policy(head_kind="low_rank", rank=2)
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = MultiHeadCausalLM.from_pretrained(tmp_path)
    assert all(bool((p == 0.5).all()) for p in loaded.parameters())


def test_an_adapter_on_a_loaded_policy_is_saved_on_that_policys_backbone(tmp_path: Path) -> None:
    """Not on the base the policy was once made from."""
    tiny().save_pretrained(tmp_path / "base")
    model, data = MultiHeadCausalLM.from_base(tmp_path / "base", OBJECTIVES), batch()
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.mul_(1.5)
    with pytest.raises(ValueError, match="trained itself cannot be left out"):
        model.save_pretrained(tmp_path / "trained", with_backbone=False)
    model.save_pretrained(tmp_path / "trained")
    loaded = MultiHeadCausalLM.from_pretrained(tmp_path / "trained")
    loaded.add_lora(LoraConfig(rank=2))
    loaded.save_pretrained(tmp_path / "adapted")
    assert not (tmp_path / "adapted" / "backbone").exists()
    again = MultiHeadCausalLM.from_pretrained(tmp_path / "adapted").eval()
    index = torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(
        again.completion_logps(**data, head_index=index),
        model.eval().completion_logps(**data, head_index=index),
    )
