"""The first stage: the miniature's training text, and the model that learns it (a new one, or a base)."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence

import pyarrow as pa
from transformers import PreTrainedTokenizerFast, Qwen2Config

from mahalo_ray.config import RunConfig, ScratchModelConfig
from mahalo_ray.data import storage
from mahalo_ray.data.records import EXAMPLE_SCHEMA, Dialogue
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.domains.tutoring.corpus import (
    encode_example,
    scripted_dialogues,
    train_tokenizer,
)
from mahalo_ray.models.backbone import load_tokenizer
from mahalo_ray.models.folder import local_folder
from mahalo_ray.pipeline.stages import Context, StageResult

# Enough text to learn the vocabulary from; the miniature has few words.
TOKENIZER_DIALOGUES = 2000
REPORT_EVERY = 200
START_MODEL = "start_model"


def make_sft_data(context: Context) -> StageResult:
    """Write the SFT examples (EXAMPLE_SCHEMA) and the folder of the model that training starts from."""
    config = context.config
    context.progress.start(2 * config.domain.sft_dialogues, "dialogues")
    dialogues = list(_counted(context, scripted_dialogues(config.domain.sft_dialogues, config.seed), "made"))
    Dialogue.save(dialogues, context.path("dialogues", "part-000000.parquet"))
    chat = _start_model(context, dialogues)
    rows = [encode_example(d, chat, config.sft.loss_on) for d in _counted(context, dialogues, "encoded")]
    table = pa.Table.from_pylist(rows, schema=EXAMPLE_SCHEMA)
    storage.write_table(context.path("examples", "part-000000.parquet"), table)
    return StageResult(
        {
            "dialogues": len(rows),
            "tokens": len(table["input_ids"].combine_chunks().flatten()),
            "vocabulary": len(chat.tokenizer),
        },
        {"examples": "examples", "dialogues": "dialogues"},
    )


def _counted(
    context: Context, items: Iterator[Dialogue] | Sequence[Dialogue], note: str
) -> Iterator[Dialogue]:
    for number, item in enumerate(items, start=1):
        yield item
        if number % REPORT_EVERY == 0:
            context.progress.advance(REPORT_EVERY, note)


def start_model_url(config: RunConfig, sft_data_folder: str) -> str:
    """The model that SFT starts from: a base with a path stays there, all else is in the stage's folder."""
    base = config.model.base
    if base is not None and storage.exists(base):
        return storage.absolute(base)
    return storage.join(sft_data_folder, START_MODEL)


def _start_model(context: Context, dialogues: Sequence[Dialogue]) -> ChatFormat:
    """Make the model that SFT starts from, or fetch it from a hub; returns its chat format."""
    config = context.config
    if config.model.scratch is not None:
        some = itertools.islice(dialogues, TOKENIZER_DIALOGUES)
        texts = (turn.content for dialogue in some for turn in dialogue.turns)
        tokenizer = train_tokenizer(texts, config.model.scratch.vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            scratch_config(config, config.model.scratch, tokenizer).save_pretrained(folder)
            storage.upload_folder(folder, context.path(START_MODEL))
        return ChatFormat(tokenizer)
    assert config.model.base is not None
    if storage.exists(config.model.base):
        return ChatFormat(load_tokenizer(storage.local_copy(config.model.base)))
    downloaded = local_folder(config.model.base)
    storage.upload_folder(downloaded, context.path(START_MODEL))  # where every node can reach it
    return ChatFormat(load_tokenizer(downloaded))


def scratch_config(
    config: RunConfig, scratch: ScratchModelConfig, tokenizer: PreTrainedTokenizerFast
) -> Qwen2Config:
    """A small Qwen2 for this tokenizer; embedding and output layer are not tied, as heads need their own."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=scratch.hidden_size,
        num_hidden_layers=scratch.num_layers,
        num_attention_heads=scratch.num_attention_heads,
        num_key_value_heads=scratch.num_attention_heads,
        intermediate_size=scratch.intermediate_size,
        max_position_embeddings=config.model.max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["Qwen2ForCausalLM"],
    )
