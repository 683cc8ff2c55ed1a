"""Folders that hold no usable model: each is a message with the path, at load."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tiny_policies import OBJECTIVES, tiny
from tiny_reward_models import TOKENIZER, base

from mahalo_ray.config import LoraConfig
from mahalo_ray.decoding.policy import DeviceConfig, load_policy
from mahalo_ray.models import MultiHeadCausalLM, SequenceClassifierScorer, load_scorer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def loads_refused(folder: Path, match: str) -> None:
    """To train and to serve."""
    with pytest.raises(ValueError, match=match) as trained:
        MultiHeadCausalLM.from_base(folder, OBJECTIVES)
    with pytest.raises(ValueError, match=match) as served:
        load_policy(str(folder), DeviceConfig())
    assert str(folder) in str(trained.value) and str(folder) in str(served.value)


def test_weights_that_are_pointers_cut_or_not_finite(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    loads_refused(folder, "git-LFS pointer")
    file.write_bytes(whole[: len(whole) // 2])
    loads_refused(folder, "damaged or incomplete")
    model = base()
    with torch.no_grad():
        model.get_input_embeddings().weight[7, 3] = torch.nan
    model.save_pretrained(folder)
    loads_refused(folder, "embed_tokens.weight' .* not finite")


def test_an_adapter_is_no_base(folder: Path, tmp_path: Path) -> None:
    policy = MultiHeadCausalLM.from_base(folder, OBJECTIVES)
    policy.add_lora(LoraConfig(rank=2))
    policy.save_pretrained(tmp_path / "policy")
    loads_refused_as_base = tmp_path / "policy" / "adapter"
    TOKENIZER.save_pretrained(loads_refused_as_base)
    loads_refused(loads_refused_as_base, "holds a LoRA adapter, not a whole model")


def test_an_adapter_on_another_base_of_the_same_shape(folder: Path, tmp_path: Path) -> None:
    policy = MultiHeadCausalLM.from_base(folder, OBJECTIVES)
    policy.add_lora(LoraConfig(rank=2))
    policy.save_pretrained(tmp_path / "policy")
    base(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has other weights: pass backbone="):
        MultiHeadCausalLM.from_pretrained(tmp_path / "policy", backbone=tmp_path / "other")
    shutil.copytree(folder, tmp_path / "copy")
    for dtype in (None, torch.bfloat16):
        MultiHeadCausalLM.from_pretrained(tmp_path / "policy", dtype, backbone=tmp_path / "copy")


def test_a_tokenizer_larger_than_the_embedding(folder: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(folder)
    loads_refused(folder, r"2 tokens that the model's embedding of 262 lacks, such as '<think>'")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "qwen9"}, "model type `qwen9`"),
        ({"hidden_size": 64}, "do not fit its config.json: '.*' has shape"),
        ({"num_hidden_layers": 9, "layer_types": None}, "lack model.layers"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "ImportError: Loading a GPTQ"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}, "code of its own, which is never run"),
        (None, "not a valid JSON file"),
    ],
)
def test_a_config_that_is_not_the_weights_is_named(
    changes: dict[str, Any] | None, match: str, folder: Path
) -> None:
    config = folder / "config.json"
    if changes is None:
        config.write_text("{")
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    loads_refused(folder, match)


def test_a_folder_without_a_tokenizer_or_with_a_broken_one(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"the tokenizer in '{folder}' cannot be loaded: KeyError"):
        load_policy(str(folder), DeviceConfig())
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=rf"'{folder}' holds no tokenizer: copy the files"):
        load_policy(str(folder), DeviceConfig())


def test_weights_that_the_config_does_not_use_are_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = folder / "config.json"
    fewer = {"num_hidden_layers": 1, "layer_types": None}
    config.write_text(json.dumps({**json.loads(config.read_text()), **fewer}))
    MultiHeadCausalLM.from_base(folder, OBJECTIVES)
    assert "does not use all weights in its files: model.layers.1." in caplog.text


def test_a_pickle_of_more_than_tensors_is_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Runs(str(tmp_path / "ran")), file)
    loads_refused(folder, "a pickle that holds more than tensors")
    assert not (tmp_path / "ran").exists()


class Runs:
    """Unpickling it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (self.path,)


@pytest.mark.parametrize("text", ['{"kind": "multi_head', "{}", "[]"])
def test_a_cut_mahalo_json(text: str, tmp_path: Path) -> None:
    MultiHeadCausalLM.from_base(tiny(), OBJECTIVES).save_pretrained(tmp_path)
    (tmp_path / "mahalo.json").write_text(text)
    with pytest.raises(ValueError, match=r"mahalo\.json is damaged"):
        MultiHeadCausalLM.from_pretrained(tmp_path)


def test_a_roberta_reads_two_tokens_fewer_than_it_has_positions(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = tf.RobertaConfig(
        vocab_size=300, hidden_size=16, max_position_embeddings=34, pad_token_id=1, num_labels=1, **options
    )
    model = tf.AutoModelForSequenceClassification.from_config(config)
    assert SequenceClassifierScorer(model, TOKENIZER, "helpful").max_length == 32
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    scorer = load_scorer(tmp_path, "helpful")
    with pytest.raises(ValueError, match="the model reads 32"):
        scorer.score([{"role": "user", "content": "word " * 7}], ["yes"])
