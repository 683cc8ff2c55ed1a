"""Model folders: `mahalo.json` says what is inside, `README.md` is the card, weights are safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mahalo_ray.data import storage
from mahalo_ray.models.sharding import full_shape, gathered

METADATA_FILE = "mahalo.json"
# 2: `adapters.safetensors`, written where there are any. 3: fewer objectives have adapters than there are
# heads. All else is version 1.
FORMAT_VERSION = 3
BACKBONE_FOLDER = "backbone"
ADAPTER_FOLDER = "adapter"
HEADS_FILE = "heads.safetensors"
ADAPTERS_FILE = "adapters.safetensors"

Metrics = Mapping[str, float | str]


def local_folder(name: str | Path) -> Path:
    """The folder itself if it exists, else the hub repository of that name, downloaded."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    check_hub_id(name)
    return Path(snapshot_download(str(name)))


def check_hub_id(name: str | Path) -> None:
    """ValueError for what is no hub id, `owner/name`: it can only have been meant as a path."""
    folder = Path(name)
    if len(folder.parts) != 2 or folder.is_absolute() or str(name).startswith("."):
        raise ValueError(f"there is no model folder '{name}'")


def check_weight_files(folder: Path) -> None:
    """ValueError, with the path, for a folder without a whole model: a LoRA adapter alone, or weights that
    are git-LFS pointers or damaged."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds a LoRA adapter, not a whole model: merge it into its base (peft's "
            "merge_and_unload) and save that, or give the base itself"
        )
    for file in sorted(folder.glob("*.safetensors")):
        check_weight_file(file)


def check_weight_file(file: Path) -> None:
    """ValueError for a safetensors file that is a git-LFS pointer, cut or otherwise unreadable."""
    with file.open("rb") as content:
        if content.read(7) == b"version":
            raise ValueError(
                f"{file} is a git-LFS pointer, not the weights: run 'git lfs pull' in its folder"
            )
    try:
        with safe_open(str(file), framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or incomplete ({error}): download or copy it again") from error


def check_weights_finite(model: nn.Module, source: str | Path) -> None:
    """ValueError naming a parameter that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(
                f"'{name}' of the model in '{source}' holds values that are not finite: its training "
                "diverged, or the file is damaged; take an earlier checkpoint"
            )


def check_tokenizer_fits(tokenizer: PreTrainedTokenizerBase, rows: int, source: str | Path) -> None:
    """ValueError if the tokenizer can give an id that the embedding [rows, D] lacks. The ids of the padding
    and unknown tokens may lie outside: tokenizer classes add them by themselves, and byte-level ones never
    write them.
    """
    outside = {name: number for name, number in tokenizer.get_vocab().items() if number >= rows}
    for unread in (tokenizer.pad_token, tokenizer.unk_token):
        outside.pop(str(unread), None)
    if outside:
        first = sorted(outside, key=outside.__getitem__)[:3]
        examples = ", ".join(f"'{name}' ({outside[name]})" for name in first)
        raise ValueError(
            f"the tokenizer of '{source}' has {len(outside)} tokens that the model's embedding of {rows} "
            f"lacks, such as {examples}: call resize_token_embeddings({max(outside.values()) + 1}) on the "
            "model, train, and save both, or use the tokenizer the model was trained with"
        )


def tokenizer_difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """What two tokenizers differ in, in words: `vocabulary` or `chat template`; None where texts become the
    same token ids."""
    if one.get_vocab() != other.get_vocab():
        return "vocabulary"
    return "chat template" if one.chat_template != other.chat_template else None


def weights_fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """A hash over names, shapes and 16 to 31 values of every parameter, rounded to bf16: the same for a model
    stored in fp32 or bf16. 16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(parameters):
        tensor = parameters[name]
        with gathered([tensor] if isinstance(tensor, nn.Parameter) else []):
            values = (
                tensor.detach().flatten()[:: max(1, tensor.numel() // 16)].cpu().to(torch.bfloat16).float()
            )
            digest.update(f"{name} {list(tensor.shape)} {values.tolist()}".encode())
    return digest.hexdigest()[:16]


def write_metadata(folder: Path, kind: str, values: Mapping[str, Any]) -> None:
    """Write `mahalo.json`: kind and format version first, then the values."""
    # The lowest that fits: older versions of the package read all folders that they can.
    version = 3 if values.get("adapted_objectives") else 2 if values.get("adapters") else 1
    document = {"kind": kind, "format_version": version, **values}
    (folder / METADATA_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_metadata(folder: Path, kind: str) -> dict[str, Any]:
    """Read `mahalo.json`; ValueError if it is missing, of another kind or of a newer format."""
    file = folder / METADATA_FILE
    if not file.is_file():
        raise ValueError(f"{folder} holds no {METADATA_FILE}: it is not a folder saved by mahalo_ray")
    document = _read_document(file)
    if document["kind"] != kind:
        raise ValueError(f"{file} says this is a '{document['kind']}', not a '{kind}'")
    if document["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {document['format_version']}, this mahalo_ray reads up to "
            f"{FORMAT_VERSION}: install a newer one"
        )
    return document


def _read_document(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): copy or save the model's folder again") from error
    if not isinstance(document, dict) or not {"kind", "format_version"} <= document.keys():
        raise ValueError(f"{file} is damaged: it says neither kind nor format_version; save the model again")
    return document


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, contiguous and on the CPU."""
    save_file(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, str(file), {"format": "pt"}
    )


@torch.no_grad()
def fill_parameters(file: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Read exactly these parameters from safetensors, one at a time (under ZeRO-3: one gathered at a time).

    ValueError naming what is missing, unknown or of another shape.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    check_weight_file(file)
    with safe_open(str(file), framework="pt") as reader:
        saved = {name: torch.Size(reader.get_slice(name).get_shape()) for name in reader.keys()}  # noqa: SIM118
        expected = {name: full_shape(parameter) for name, parameter in parameters.items()}
        problems = [f"'{name}' is missing" for name in expected if name not in saved]
        problems += [f"'{name}' is unknown" for name in saved if name not in expected]
        problems += [
            f"'{name}' has shape {list(saved[name])}, not {list(shape)}"
            for name, shape in expected.items()
            if name in saved and saved[name] != shape
        ]
        if problems:
            raise ValueError(f"{file} does not fit the model: {'; '.join(problems)}")
        for name, parameter in parameters.items():
            with gathered([parameter], writable=True):
                parameter.copy_(reader.get_tensor(name))


@dataclass(frozen=True)
class Card:
    """A model card: what the model is and how to load it, and one line per objective."""

    title: str
    text: str
    objectives: Mapping[str, str]


def write_card(folder: Path, card: Card, base_model: str | None, metrics: Metrics | None) -> None:
    """Write the model card: front matter for the hub, what the model is, objectives, metrics if any."""
    lines = ["---", "library_name: transformers", "tags:", "- mahalo_ray", "- multi-objective"]
    # The hub accepts a repository id here; a path on somebody's machine would be both wrong and indiscreet.
    if base_model and base_model.count("/") == 1 and not base_model.startswith((".", "/")):
        lines.append(f"base_model: {base_model}")
    lines += ["---", "", f"# {card.title}", "", card.text, "", "| objective | |", "|---|---|"]
    lines += [f"| {name} | {note} |" for name, note in card.objectives.items()]
    if metrics:
        lines += ["", "| metric | value |", "|---|---|"]
        lines += [
            f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |"
            for name, value in metrics.items()
        ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def check_saved_model(url: str) -> None:
    """ValueError unless `url` holds a model saved by mahalo_ray; on a disk, one whose files are whole."""
    if not storage.exists(storage.join(url, METADATA_FILE)):
        raise ValueError(f"there is no model at '{url}': train it first, or correct the path")
    if storage.is_local(url):
        folder = Path(url)
        _read_document(folder / METADATA_FILE)
        for file in sorted(folder.rglob("*.safetensors")):
            check_weight_file(file)


def model_folder(url: str) -> Path:
    """A local folder with the model's files; what lies elsewhere is fetched. ValueError if there is
    nothing."""
    return Path(storage.local_copy(url)) if storage.exists(url) else local_folder(url)


def keeps_backbone(url: str) -> bool | None:
    """Whether an adapter trained on the model at `url` must be saved with its base: yes if only a temporary
    copy of the base lies here; else None, the model's own choice."""
    return True if storage.exists(url) and not storage.is_local(url) else None
