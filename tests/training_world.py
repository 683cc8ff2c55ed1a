"""A tiny model and tiny data for the tests of training: every part real, nothing longer than a moment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from mahalo_ray.config import (
    ModelConfig,
    ObjectiveConfig,
    PolicyConfig,
    RewardConfig,
    ScratchModelConfig,
    SftConfig,
    TrainingConfig,
)
from mahalo_ray.data import storage
from mahalo_ray.data.records import EXAMPLE_SCHEMA, Message, PreferencePair, StepTrace
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.models.pair_attention import IMPLEMENTATION
from mahalo_ray.training.settings import PolicySettings, RewardSettings, SftSettings

OBJECTIVES = ("accuracy", "engagement")
MODEL = ModelConfig(base="unused", max_length=64)
SCRATCH = ModelConfig(scratch=ScratchModelConfig(), max_length=64)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = 32
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_base(folder: Path, weights: bool = True, tied: bool = True) -> str:
    """A folder with tokenizer and a two-layer Qwen2 model (or only its config)."""
    special = ["<pad>", "<end>", "<user>", "<assistant>", "<system>"]
    symbols = [*special, *LETTERS, "\u0120"]  # the last stands for a space
    inner = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<pad>", additional_special_tokens=special[2:]
    )
    tokenizer.chat_template = TEMPLATE
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(1)
    (Qwen2ForCausalLM(config) if weights else config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return str(folder)


def make_examples(folder: Path, count: int = 22) -> str:
    """SFT examples of different lengths; the first tokens of each do not count."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        length = int(rng.integers(6, 20))
        ids = rng.integers(5, VOCABULARY, length).tolist()
        rows.append({"id": f"e{number}", "input_ids": ids, "loss_mask": [i > 2 for i in range(length)]})
    storage.write_table(f"{folder}/part.parquet", pa.Table.from_pylist(rows, schema=EXAMPLE_SCHEMA))
    return str(folder)


def words(rng: np.random.Generator, low: int, high: int) -> str:
    """A random word of the given range of lengths, one token per letter."""
    return "".join(rng.choice(list(LETTERS), int(rng.integers(low, high))))


def make_pairs(
    counts: Sequence[int] = (14, 9), objectives: Sequence[str] = OBJECTIVES
) -> list[PreferencePair]:
    """Pairs per objective; two pairs of different objectives share a prompt now and then."""
    rng = np.random.default_rng(2)
    pairs = []
    for name, count in zip(objectives, counts, strict=True):
        for number in range(count):
            prompt = [Message(role="user", content=words(np.random.default_rng(number), 2, 5))]
            texts = (words(rng, 2, 9), words(rng, 2, 9))
            pair_id = f"{name[0]}{number}"
            pairs.append(
                PreferencePair(
                    id=pair_id,
                    objective=name,
                    prompt=prompt,
                    chosen=texts[0],
                    rejected=texts[1],
                    source="test",
                )
            )
    return pairs


def save_pairs(folder: Path, pairs: Sequence[PreferencePair]) -> str:
    """As a folder of Parquet files."""
    PreferencePair.save(list(pairs), f"{folder}/part.parquet")
    return str(folder)


SUPERVISION = (
    ObjectiveConfig(name="accuracy", supervision="rollout_value"),
    ObjectiveConfig(name="engagement", supervision="judged_prefix"),
    ObjectiveConfig(name="safety", supervision="pairwise"),
)


def make_traces(groups: int = 8, candidates: int = 3) -> list[StepTrace]:
    """Candidates of prompts, two steps each; some labels are unknown."""
    rng = np.random.default_rng(3)
    traces = []
    for group in range(groups):
        prompt = [Message(role="user", content=words(rng, 2, 6))]
        for candidate in range(candidates):
            labels: dict[str, list[float | None]] = {
                "accuracy": [None, float(rng.random())],
                "engagement": [
                    float(rng.integers(0, 2)),
                    None if candidate == 0 else float(rng.integers(0, 2)),
                ],
            }
            steps = [words(rng, 2, 5), words(rng, 2, 7)]
            name = f"t{group}.{candidate}"
            traces.append(
                StepTrace(
                    id=name, group=f"g{group}", prompt=prompt, steps=steps, labels=labels, source="test"
                )
            )
    return traces


def save_traces(folder: Path, traces: Sequence[StepTrace]) -> str:
    """As a folder of Parquet files."""
    StepTrace.save(list(traces), f"{folder}/part.parquet")
    return str(folder)


def policy_settings(
    pairs: str,
    base: str,
    policy: PolicyConfig,
    held_out: float = 0.2,
    model: ModelConfig = MODEL,
    output: str = "unused",
    seed: int = 5,
) -> PolicySettings:
    """A policy stage of both objectives."""
    return PolicySettings(
        model_url=base,
        output_url=output,
        model=model,
        seed=seed,
        pairs_url=pairs,
        objectives=OBJECTIVES,
        policy=policy,
        held_out_fraction=held_out,
    )


def sft_settings(
    examples: str,
    base: str,
    training: TrainingConfig,
    model: ModelConfig = MODEL,
    output: str = "unused",
    seed: int = 5,
) -> SftSettings:
    """An SFT stage."""
    return SftSettings(
        model_url=base,
        output_url=output,
        model=model,
        seed=seed,
        examples_url=examples,
        sft=SftConfig(training=training),
    )


def reward_settings(
    traces: str | None,
    pairs: str | None,
    base: str,
    reward: RewardConfig,
    objectives: Sequence[ObjectiveConfig] = SUPERVISION,
    features: str | None = None,
    output: str = "unused",
    seed: int = 5,
) -> RewardSettings:
    """A stage that trains a reward model."""
    return RewardSettings(
        model_url=base,
        output_url=output,
        model=MODEL,
        seed=seed,
        traces_url=traces,
        pairs_url=pairs,
        objectives=objectives,
        reward=reward,
        step_separator="\n\n",
        features_url=features,
    )


@contextlib.contextmanager
def ordinary_attention(model: MultiHeadCausalLM) -> Iterator[None]:
    """Inside, a model built to read packed pairs reads ordinary rows."""
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
