"""Model families with tiny random configs: each is decoded as `transformers.generate` does it, token for
token, or is refused at load, by name and with the way out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.policy import as_policy
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.models import MultiHeadCausalLM, ProcessRewardModel
from mahalo_ray.models.backbone import check_trained_length
from mahalo_ray.objectives import Weights

V = 61
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    **ENDS,
}
NO_HEAD_DIM = {name: value for name, value in SMALL.items() if name != "head_dim"}
GPT = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **ENDS}
OLD = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **ENDS}
RECURRENT = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2}
ORIGINAL = {"original_max_position_embeddings": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
ROUTED_GROUPS = {**ROUTED, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
MLA = {
    **SMALL,
    **ROUTED_GROUPS,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 16,
}


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


# Decoded as transformers does.
EQUAL: dict[str, tf.PretrainedConfig] = {
    "llama": tf.LlamaConfig(**SMALL),
    "llama, llama3 rope": tf.LlamaConfig(
        **SMALL,
        **rope(
            "llama3",
            factor=2.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama, yarn": tf.LlamaConfig(**SMALL, **rope("yarn", factor=2.0, **ORIGINAL)),
    "llama, dynamic rope": tf.LlamaConfig(
        **{**SMALL, "max_position_embeddings": 16}, **rope("dynamic", factor=4.0)
    ),
    "mistral": tf.MistralConfig(**SMALL, sliding_window=None),
    "ministral": tf.MinistralConfig(**SMALL),
    "mixtral": tf.MixtralConfig(**SMALL, num_local_experts=4),
    "qwen2": tf.Qwen2Config(**SMALL),
    "qwen2-moe": tf.Qwen2MoeConfig(**SMALL, **EXPERTS, shared_expert_intermediate_size=12),
    "qwen3": tf.Qwen3Config(**SMALL),
    "qwen3-moe": tf.Qwen3MoeConfig(**SMALL, **EXPERTS),
    "gemma": tf.GemmaConfig(**SMALL),
    "gemma2": tf.Gemma2Config(
        **SMALL, query_pre_attn_scalar=8, final_logit_softcapping=0.5, attn_logit_softcapping=2.0
    ),
    "gemma3": tf.Gemma3TextConfig(**SMALL, query_pre_attn_scalar=8),
    "gemma3, nested": tf.Gemma3Config(
        text_config={**SMALL, "query_pre_attn_scalar": 8},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    ),
    "gemma3n": tf.Gemma3nTextConfig(
        **{**SMALL, "num_hidden_layers": 4},
        vocab_size_per_layer_input=V,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        num_kv_shared_layers=2,
    ),
    "phi": tf.PhiConfig(**SMALL, partial_rotary_factor=0.5),
    "phi3": tf.Phi3Config(**SMALL),
    "phi3, longrope": tf.Phi3Config(**SMALL, original_max_position_embeddings=16, rope_parameters=LONGROPE),
    "phimoe": tf.PhimoeConfig(**SMALL, num_local_experts=4),
    "gpt2": tf.GPT2Config(**GPT),
    "gpt-bigcode": tf.GPTBigCodeConfig(**GPT),
    "gpt-neox": tf.GPTNeoXConfig(**SMALL),
    "opt": tf.OPTConfig(
        **OLD, ffn_dim=24, max_position_embeddings=64, word_embed_proj_dim=16, pad_token_id=0
    ),
    "biogpt": tf.BioGptConfig(**OLD, intermediate_size=24, max_position_embeddings=64, pad_token_id=0),
    "deepseek-v2": tf.DeepseekV2Config(**MLA, v_head_dim=8),
    "deepseek-v3": tf.DeepseekV3Config(**MLA, v_head_dim=8),
    "olmo": tf.OlmoConfig(**SMALL),
    "olmo2": tf.Olmo2Config(**SMALL),
    "olmo3": tf.Olmo3Config(**SMALL),
    "olmoe": tf.OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2),
    "starcoder2": tf.Starcoder2Config(**SMALL),
    "cohere": tf.CohereConfig(**SMALL, logit_scale=0.25),
    "cohere2": tf.Cohere2Config(**SMALL, logit_scale=0.25),
    "granite": tf.GraniteConfig(
        **SMALL,
        logits_scaling=4.0,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.3,
    ),
    "granite-moe": tf.GraniteMoeConfig(**SMALL, **LOCAL_EXPERTS),
    "glm": tf.GlmConfig(**SMALL),
    "glm4": tf.Glm4Config(**SMALL),
    "glm4-moe": tf.Glm4MoeConfig(**SMALL, **ROUTED_GROUPS),
    "smollm3": tf.SmolLM3Config(**SMALL),
    "exaone4": tf.Exaone4Config(**SMALL),
    "persimmon": tf.PersimmonConfig(**SMALL),
    "helium": tf.HeliumConfig(**SMALL),
    "seed-oss": tf.SeedOssConfig(**SMALL),
    "ernie4.5": tf.Ernie4_5Config(**SMALL),
    "hunyuan": tf.HunYuanDenseV1Config(**SMALL),
    "arcee": tf.ArceeConfig(**SMALL),
    "apertus": tf.ApertusConfig(**SMALL),
    "bitnet": tf.BitNetConfig(**SMALL),
}
# Refused, and what the message says of why.
REFUSED: dict[str, tuple[tf.PretrainedConfig, str]] = {
    "falcon-h1": (
        tf.FalconH1Config(
            **SMALL,
            mamba_d_ssm=16,
            mamba_n_heads=2,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_expand=1,
            mamba_chunk_size=8,
        ),
        "its states differ from those of one forward",
    ),
    "deepseek-v3, other values": (tf.DeepseekV3Config(**MLA, v_head_dim=4), "RuntimeError|differ"),
    "qwen3-next": (
        tf.Qwen3NextConfig(
            **SMALL,
            **EXPERTS,
            shared_expert_intermediate_size=12,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        "linear_attention layers",
    ),
    "gpt-neo": (
        tf.GPTNeoConfig(
            vocab_size=V,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64,
            intermediate_size=24,
            **ENDS,
        ),
        "0 of its 2 layers",
    ),
    "gptj": (tf.GPTJConfig(**GPT, rotary_dim=4), "0 of its 2 layers"),
    "gpt-oss": (tf.GptOssConfig(**SMALL, **LOCAL_EXPERTS, **rope("default")), "s_aux"),
    "falcon": (tf.FalconConfig(**OLD), "FalconModel"),
    "falcon-mamba": (
        tf.FalconMambaConfig(**RECURRENT, state_size=4),
        "0 of its",
    ),
    "mamba": (tf.MambaConfig(**RECURRENT, state_size=4), "0 of its 2"),
    "mamba2": (
        tf.Mamba2Config(
            vocab_size=V, hidden_size=16, num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=1
        ),
        "0 of its 2 layers",
    ),
    "stablelm": (tf.StableLmConfig(**SMALL, partial_rotary_factor=0.5), "did not receive kv_cache"),
    "granite-moe-hybrid": (
        tf.GraniteMoeHybridConfig(
            **SMALL,
            **LOCAL_EXPERTS,
            shared_intermediate_size=24,
            layer_types=["mamba", "attention"],
            mamba_n_heads=4,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_expand=2,
        ),
        "keeps keys and values only",
    ),
    "bloom": (tf.BloomConfig(vocab_size=V, hidden_size=16, n_layer=2, n_head=2, **ENDS), "0 of its 2 layers"),
    "mpt": (
        tf.MptConfig(vocab_size=V, d_model=16, n_layers=2, n_heads=2, max_seq_len=64, **ENDS),
        "MptModel",
    ),
    "jamba": (
        tf.JambaConfig(
            **NO_HEAD_DIM, attn_layer_period=2, attn_layer_offset=1, num_experts=2, use_mamba_kernels=False
        ),
        "JambaModel",
    ),
    "zamba2": (
        tf.Zamba2Config(
            **{**SMALL, "num_hidden_layers": 4},
            layers_block_type=["mamba", "hybrid", "mamba", "mamba"],
            mamba_d_state=8,
            n_mamba_heads=2,
            mamba_headdim=16,
            mamba_ngroups=1,
            use_mamba_kernels=False,
            num_mem_blocks=1,
        ),
        "Zamba2Model",
    ),
    "recurrent-gemma": (
        tf.RecurrentGemmaConfig(**{**SMALL, "num_hidden_layers": 3}, lru_width=16, attention_window_size=8),
        "RecurrentGemma",
    ),
    "nemotron": (tf.NemotronConfig(**SMALL), "did not receive kv_cache"),
    "bamba": (
        tf.BambaConfig(**NO_HEAD_DIM, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=8),
        "BambaModel",
    ),
    "codegen": (tf.CodeGenConfig(**{**GPT, "n_head": 4}, rotary_dim=4), "0 of its 2 layers"),
    "xglm": (
        tf.XGLMConfig(vocab_size=V, d_model=16, ffn_dim=24, num_layers=2, attention_heads=2, **ENDS),
        "0 of its 2 layers",
    ),
    "lfm2": (tf.Lfm2Config(**NO_HEAD_DIM, layer_types=["conv", "full_attention"]), "conv layers"),
    "llama4": (
        tf.Llama4TextConfig(**SMALL, intermediate_size_mlp=24, num_local_experts=2, attention_chunk_size=32),
        "not a causal language model with a backbone and a head",
    ),
    "minimax": (
        tf.MiniMaxConfig(**SMALL, num_local_experts=4, layer_types=["linear_attention", "full_attention"]),
        "linear_attention layers",
    ),
}


def make(config: tf.PretrainedConfig, std: float | None = 0.2) -> tf.PreTrainedModel:
    """`std`: of matrices wide enough for the greedy token to be clear; None leaves the family's own start."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if std is not None and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    model.generation_config.eos_token_id = None
    return model


def greedy(model: tf.PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0}
    return model.generate(torch.tensor([prompt]), **options)[0].tolist()


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, V, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("family", EQUAL)
def test_a_family_decodes_what_transformers_generates(family: str) -> None:
    """Three prompts of different lengths side by side, two branches each, two steps."""
    model, prompts = make(EQUAL[family]), random_prompts(3, 7, 5)
    expected = [greedy(model, prompt, 8) for prompt in prompts]
    engine = Engine(as_policy(model))
    rows = engine.add(3)
    engine.append(rows, prompts)
    for choice in ([1, 0, 1], [0, 1, 1]):
        candidates = engine.sample(rows, 2, SamplingParams(temperature=0), [0, 1, 2], 4, [])
        engine.accept(candidates, choice)
    assert [engine.token_ids(row) for row in rows] == expected


@pytest.mark.parametrize("std", [0.2, None])
@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_would_be_decoded_wrongly_is_refused_at_load(family: str, std: float | None) -> None:
    config, reason = REFUSED[family]
    with pytest.raises(ValueError, match=reason) as caught:
        as_policy(make(config, std))
    assert any(way in str(caught.value) for way in ("CompletionDecoder", "choose one", "is not supported"))


@pytest.mark.parametrize("family", ["gemma3, nested", "gpt2", "phi3, longrope"])
def test_heads_on_a_family_are_merged_into_a_model_that_generates_alike(family: str) -> None:
    policy = MultiHeadCausalLM.from_base(make(EQUAL[family]), ["a", "b"], noise=0.05).eval()
    weights, (prompt,) = Weights.parse("a=3,b=1"), random_prompts(5)
    engine = Engine(policy)
    rows = engine.add(1, weights)
    engine.append(rows, [prompt])
    candidates = engine.sample(rows, 1, SamplingParams(temperature=0), [0], 6, [])
    assert prompt + candidates.token_ids[0][0] == greedy(policy.merge(weights), prompt, 6)


def test_position_encodings_that_depend_on_the_longest_row_bound_the_context() -> None:
    assert as_policy(make(EQUAL["phi3, longrope"])).max_context == 16
    assert as_policy(make(EQUAL["llama, dynamic rope"])).max_context == 16
    assert as_policy(make(EQUAL["llama, yarn"])).max_context == 64
    longrope = make(EQUAL["phi3, longrope"])
    assert ProcessRewardModel.from_base(longrope, {"right": "probability"}).max_length == 16
    check_trained_length(longrope.config, 16)
    with pytest.raises(ValueError, match="is 17, and beyond 16 tokens"):
        check_trained_length(longrope.config, 17)
    check_trained_length(make(EQUAL["llama, yarn"]).config, 1024)
