"""Llama-like models by their own arithmetic with fewer calls: the same states, bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from mahalo_ray.decoding import cached_backbone, cpu_matmul
from mahalo_ray.decoding.cached_backbone import CachedBackbone
from mahalo_ray.decoding.kv_cache import Branches, RaggedCache

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LARGE = {**SMALL, "hidden_size": 384, "intermediate_size": 512}  # packed, where the processor has the kernels
CONFIGS: dict[str, tf.PretrainedConfig] = {
    "llama": tf.LlamaConfig(**SMALL),
    "llama-large": tf.LlamaConfig(**LARGE),
    "llama-bias": tf.LlamaConfig(**LARGE, attention_bias=True, mlp_bias=True),
    "llama-gelu": tf.LlamaConfig(**SMALL, hidden_act="gelu"),
    "llama-wide-heads": tf.LlamaConfig(**SMALL, head_dim=32),
    "llama-scaled-positions": tf.LlamaConfig(
        **SMALL,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    ),
    "mistral": tf.MistralConfig(**SMALL, sliding_window=None),
    "qwen2": tf.Qwen2Config(**SMALL),
    "qwen3": tf.Qwen3Config(**{**LARGE, "head_dim": 64}),
}


def base_model(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype).eval().base_model
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases: all ones and zeros would hide a missing one
            nn.init.normal_(parameter, 1, 0.3)
    return model


def states(backbone: CachedBackbone) -> list[Tensor]:
    """Of a ragged prefill, one behind it, and three tokens of 3 x 4 branches."""
    generator = torch.Generator().manual_seed(1)
    cache = RaggedCache()
    slots, found = cache.add(3), []
    for _ in range(2):
        view = cache.append(slots, np.array([7, 5, 3]), 7)
        ids = torch.randint(60, (3, 7), generator=generator)
        found.append(backbone(ids, view.positions(7, torch.device("cpu")), view))
        view.commit()
    branches = Branches(cache, slots, 4)
    for _ in range(3):
        ids = torch.randint(60, (12, 1), generator=generator)
        found.append(backbone(ids, branches.positions(1, torch.device("cpu")), branches))
        branches.advance(1)
    return found


def both(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[Tensor]]:
    fewer_calls = CachedBackbone(model)
    assert fewer_calls._layers is not None
    monkeypatch.setattr(cached_backbone, "LLAMA_LIKE", ())
    by_transformers = CachedBackbone(model)
    assert by_transformers._layers is None
    return states(fewer_calls), states(by_transformers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_states_are_those_of_transformers_to_the_last_bit(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for found, expected in zip(*both(base_model(name, dtype), monkeypatch), strict=True):
        assert torch.equal(found, expected)


def test_lora_layers_are_called_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base_model("llama-large", torch.float32), settings).eval()
    adapted, expected = both(model, monkeypatch)
    assert all(torch.equal(*pair) for pair in zip(adapted, expected, strict=True))
    monkeypatch.undo()
    with model.disable_adapter():
        plain = states(CachedBackbone(model))
    assert not torch.allclose(plain[0], adapted[0], atol=1e-3)


def test_a_model_with_hooks_or_of_another_family_keeps_its_own_forward() -> None:
    model = base_model("llama", torch.float32)
    seen: list[nn.Module] = []
    hook = model.layers[1].register_forward_hook(lambda module, given, result: seen.append(module))
    states(CachedBackbone(model))
    assert seen
    hook.remove()
    gemma = tf.AutoModelForCausalLM.from_config(tf.GemmaConfig(**{**SMALL, "head_dim": 16})).eval().base_model
    assert CachedBackbone(gemma)._layers is None


def test_changed_weights_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = base_model("llama-large", torch.float32)
    backbone = CachedBackbone(model)
    before = states(backbone)
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight.mul_(1.5)
    after = states(backbone)
    assert not torch.allclose(before[0], after[0], atol=1e-3)
    monkeypatch.setattr(cpu_matmul, "packing_is_faster", lambda: False)
    for found, expected in zip(after, states(CachedBackbone(model)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
