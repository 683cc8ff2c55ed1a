"""Multi-head policies of every backbone family, a few thousand parameters each."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.objectives import Weights

V = 61
OBJECTIVES = ["accuracy", "engagement", "brevity"]
WEIGHTS = Weights.parse("accuracy=0.5,engagement=0.2,brevity=0.3")

SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, tf.PretrainedConfig] = {
    "qwen2-tied": tf.Qwen2Config(**{**SMALL, "tie_word_embeddings": True}),
    "qwen2-untied": tf.Qwen2Config(**{**SMALL, "tie_word_embeddings": False}),
    "qwen3": tf.Qwen3Config(**SMALL),
    "llama": tf.LlamaConfig(**SMALL),
    "mistral": tf.MistralConfig(**{**SMALL, "sliding_window": 4}),
    "gemma": tf.GemmaConfig(**SMALL),
    # Caps small enough to bend the logits of a random model.
    "gemma2-softcap": tf.Gemma2Config(**SMALL, final_logit_softcapping=0.1, query_pre_attn_scalar=8),
    "gpt2": tf.GPT2Config(**GPT2, **ENDS),
    "phi-head-bias": tf.PhiConfig(**SMALL, partial_rotary_factor=0.5),
    "granite-scaled": tf.GraniteConfig(**SMALL, logits_scaling=4.0),
    "cohere-scaled": tf.CohereConfig(**SMALL, logit_scale=0.25),
}


def tiny(family: str = "qwen2-untied", seed: int = 0) -> tf.PreTrainedModel:
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]))
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias, std=0.1)
    return model.eval()


def policy(family: str = "qwen2-untied", noise: float = 0.1, **kwargs: Any) -> MultiHeadCausalLM:
    return MultiHeadCausalLM.from_base(tiny(family), OBJECTIVES, noise=noise, **kwargs).eval()


def batch(rows: int = 4, length: int = 9, seed: int = 1) -> dict[str, Tensor]:
    """Right-padded rows whose completion starts at position 3; labels already shifted."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (rows, length), generator=g)
    lengths = torch.randint(5, length + 1, (rows,), generator=g)
    positions = torch.arange(length)
    mask = (positions < lengths[:, None]).long()
    labels = torch.roll(ids, -1, 1).masked_fill((positions < 3) | (positions >= lengths[:, None] - 1), -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
