"""A tiny tutor with random weights, and its tokenizer: it talks nonsense, which is all that is needed."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from mahalo_ray.config import SamplingConfig
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.domains.sft_text import train_tokenizer
from mahalo_ray.domains.tutoring.scripted import scripted_dialogue

SAMPLING = SamplingConfig(max_new_tokens=12)
TOKENIZER = train_tokenizer(
    (turn.content for d in map(scripted_dialogue, range(5_000_015, 5_000_045)) for turn in d.turns), 600
)
CHAT = ChatFormat(TOKENIZER)


def model(seed: int = 0) -> torch.nn.Module:
    """Two layers of random weights; turns end after some ten tokens."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=CHAT.end_id,
    )
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # Logits spread enough for candidates to differ.
        made.lm_head.weight[CHAT.end_id] *= 3
    return made.eval()


TUTOR = model()
