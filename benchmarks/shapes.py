"""Models of known shapes with random weights, and a tokenizer whose words are its token numbers.

What a step costs depends on shapes and lengths, not on what the weights say; so nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A Llama architecture with tied embeddings."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    context: int = 2048

    def build(self, seed: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """A causal LM with random weights, the same for the same seed."""
        config = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        torch.manual_seed(seed)
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return model.eval()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Token i is the word "t<i>"; the last three are the end token and the two speakers."""
        words = [f"t{i}" for i in range(self.vocab_size - 3)] + [END, USER, ASSISTANT]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=END))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
        fast.add_special_tokens({"additional_special_tokens": [USER, ASSISTANT]})
        fast.chat_template = _TEMPLATE
        return fast

    @property
    def end_id(self) -> int:
        return self.vocab_size - 3


TINY = Shape(vocab_size=256, hidden_size=32, intermediate_size=48, layers=2, heads=4, kv_heads=2, context=512)
ABOUT_1M = Shape(vocab_size=2048, hidden_size=128, intermediate_size=384, layers=4, heads=4, kv_heads=2)
ABOUT_30M = Shape(vocab_size=32768, hidden_size=384, intermediate_size=1024, layers=10, heads=6, kv_heads=2)
SMOLLM2_135M = Shape(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, layers=30, heads=9, kv_heads=3
)
# The sizes of Qwen2.5, but for its biases, and with tied embeddings.
ABOUT_1_5B = Shape(
    vocab_size=151936, hidden_size=1536, intermediate_size=8960, layers=28, heads=12, kv_heads=2
)
ABOUT_7B = Shape(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, layers=28, heads=28, kv_heads=4
)


def words(ids: list[int]) -> str:
    """The text of ordinary token ids."""
    return " ".join(f"t{i}" for i in ids)
