"""The backbone of a transformers causal LM: split from its head, run, put together with a head again, and
saved in the folder of a model with other heads.
"""

from __future__ import annotations

import copy
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, NamedTuple, Self

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mahalo_ray.logprobs import IGNORE_INDEX
from mahalo_ray.models.adapters import ADAPTER_PARAMETERS
from mahalo_ray.models.folder import (
    ADAPTER_FOLDER,
    BACKBONE_FOLDER,
    HEADS_FILE,
    Card,
    Metrics,
    check_tokenizer_fits,
    check_weight_files,
    check_weights_finite,
    fill_parameters,
    local_folder,
    read_metadata,
    save_tensors,
    weights_fingerprint,
    write_card,
    write_metadata,
)
from mahalo_ray.models.heads import LogitTransform
from mahalo_ray.models.lora import load_adapter
from mahalo_ray.models.pair_attention import enable_pair_packing, packed_arguments, sequence_numbers
from mahalo_ray.models.sharding import full_shape, whole_modules

logger = logging.getLogger(__name__)


def load_causal_lm(
    base: str | Path | PreTrainedModel,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A causal LM from a folder or hub id (dtype None: as stored); a model object is returned as it is.

    ValueError, naming the path, for weights that are damaged, missing or not finite, a LoRA adapter alone,
    and a tokenizer beside them that is larger than the embedding.
    """
    if isinstance(base, PreTrainedModel):
        if dtype is not None:
            base = base.to(dtype)
        if attn_implementation is not None:
            base.set_attn_implementation(attn_implementation)
        return base
    model = _from_pretrained(AutoModelForCausalLM, base, dtype, attn_implementation)
    check_tokenizer_of(Path(base), model)
    return model


def load_backbone(
    source: str | Path, dtype: torch.dtype | None = None, attn_implementation: str | None = None
) -> PreTrainedModel:
    """The base model (no head) from a folder or hub id; dtype None keeps the stored one."""
    return _from_pretrained(AutoModel, source, dtype, attn_implementation)


def _from_pretrained(
    kind: type[AutoModel] | type[AutoModelForCausalLM],
    source: str | Path,
    dtype: torch.dtype | None,
    attn_implementation: str | None,
) -> PreTrainedModel:
    """Load with every parameter from the files; ValueError, naming the source, for weights that are absent,
    damaged or incomplete (transformers would make up what is missing, and only log it)."""
    if Path(source).is_dir():
        check_weight_files(Path(source))
    with naming_errors("model", source):
        model, info = kind.from_pretrained(
            str(source),
            dtype="auto" if dtype is None else dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are errors, which are told below by name
            trust_remote_code=False,
        )
    if misfits := sorted(info["mismatched_keys"]):
        name, stored, expected = misfits[0]
        raise ValueError(
            f"the weights in '{source}' do not fit its config.json: '{name}' has shape {list(stored)}, not "
            f"{list(expected)} ({len(misfits)} such weights)"
        )
    unused = (
        sorted(info["unexpected_keys"]) if kind is AutoModelForCausalLM else []
    )  # a base model has no head
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        logger.warning(
            "the model in '%s' does not use all weights in its files: %s%s",
            source,
            ", ".join(unused[:3]),
            more,
        )
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"the weights in '{source}' lack {', '.join(missing[:3])}{more}: they are cut short, or belong "
            f"to another kind of model than {type(model).__name__}"
        )
    check_weights_finite(model, source)
    return model


def check_tokenizer_of(folder: Path, model: PreTrainedModel) -> None:
    """ValueError if the folder has a tokenizer that is larger than the model's embedding."""
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        rows = full_shape(model.get_input_embeddings().weight)[0]
        check_tokenizer_fits(load_tokenizer(folder), rows, folder)


@contextmanager
def naming_errors(what: str, source: str | Path) -> Iterator[None]:
    """ValueError, with the path, for all that transformers raises over the files of a model: broken JSON, a
    kind that it does not know, packages that a quantised model needs, code that would have to be run."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        SafetensorError,
        UnpicklingError,
        OSError,
        ImportError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        said = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        if isinstance(error, UnpicklingError):
            said = "its weights are a pickle that holds more than tensors: save them as safetensors"
        elif "trust_remote_code" in said:
            said = "it brings code of its own, which is never run here: take a model that transformers knows"
        raise ValueError(f"the {what} in '{source}' cannot be loaded: {said}") from error


def load_config(source: str | Path) -> PretrainedConfig:
    """The configuration of a folder or hub id. ValueError, with the path, if it cannot be read."""
    with naming_errors("configuration", source):
        return AutoConfig.from_pretrained(str(source), trust_remote_code=False)


_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "*.tiktoken", "*.bpe")


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id. ValueError, with the path, if there is none, or it cannot be
    read."""
    folder = Path(source)
    # transformers makes up a tokenizer of some families without a file, which then knows no token.
    if folder.is_dir() and not any(file for name in _TOKENIZER_FILES for file in folder.glob(name)):
        raise ValueError(
            f"'{source}' holds no tokenizer: copy the files of the model's own there, or save it beside the "
            "weights (tokenizer.save_pretrained)"
        )
    with naming_errors("tokenizer", source):
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)


def split_causal_lm(model: PreTrainedModel) -> tuple[PreTrainedModel, nn.Module, LogitTransform]:
    """(backbone, output layer, scale and soft cap behind it). ValueError for a model that is not
    head(backbone(x)) up to these two, or whose logits are not finite.
    """
    head = model.get_output_embeddings()
    backbone = model.base_model
    if model.config.is_encoder_decoder or head is None or backbone is model:
        raise ValueError(
            f"{type(model).__name__} is not a causal language model with a backbone and a head: choose one "
            "that transformers loads as a base model with a language modelling head"
        )
    transform = LogitTransform.of(model.config)
    _check_split(model, backbone, head, transform)
    return backbone, head, transform


@torch.no_grad()
def _check_split(
    model: PreTrainedModel, backbone: PreTrainedModel, head: nn.Module, transform: LogitTransform
) -> None:
    """ValueError unless the whole model and its parts give the same logits [1, 2, V] for two tokens.

    Largest difference allowed: 1e-3 of the largest logit in fp32, 5 % in half precision.
    """
    # Families differ in what they do between backbone and logits (a scale, a cap, a second norm), and config
    # keys for it are not standardised. Reading the known keys is therefore not enough: a family with another
    # one would train and decode with wrong logits, and nothing would say so. Two tokens suffice, since a head
    # works on single states; the ids exist in every vocabulary (they are taken modulo its size).
    training = model.training
    model.eval()
    ids = torch.tensor([[1, 2]], device=model.device) % model.config.get_text_config().vocab_size
    with whole_modules(model), _attention_of_device(model):
        whole = model(input_ids=ids, use_cache=False).logits.float()
        parts = transform(head(backbone(input_ids=ids, use_cache=False).last_hidden_state)).float()
    model.train(training)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    if not whole.isfinite().all():
        raise ValueError(
            f"the model of '{model.config._name_or_path}' gives logits that are not finite: its weights are "
            f"damaged, or {model.dtype} cannot hold them"
        )
    if (whole - parts).abs().max() > tolerance * whole.abs().max():
        raise ValueError(
            f"{type(model).__name__}: head(backbone(x)) differs from the model's own logits by up to "
            f"{(whole - parts).abs().max():.3g}; what this family does between the two is not supported"
        )


@contextmanager
def _attention_of_device(model: PreTrainedModel) -> Iterator[None]:
    """Flash attention runs on GPUs only; on the CPU, where a model may still be, SDPA computes the same."""
    chosen = model.config._attn_implementation
    if model.device.type != "cpu" or not str(chosen).startswith("flash"):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)


def row_independent_context(config: PretrainedConfig) -> int:
    """Tokens up to which a row's position encoding does not depend on the longest row of its batch; a number
    beyond every context if it never does.

    `longrope` (Phi-3, Phi-4-mini) takes other frequencies for the whole batch as soon as one row passes the
    original context, `dynamic` when one passes the configured one: beyond it, a row's result would depend on
    its neighbours, and keys that are cached already would have the old frequencies.
    """
    text = config.get_text_config()
    values = text.to_dict()
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    # Families with several kinds of layers keep one set of parameters per kind.
    rope_settings = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    limits = [sys.maxsize]
    for rope in rope_settings:
        kind = rope.get("rope_type", rope.get("type"))
        if kind == "longrope":
            original = rope.get("original_max_position_embeddings")
            limits.append(
                original or values.get("original_max_position_embeddings") or text.max_position_embeddings
            )
        elif kind == "dynamic":
            limits.append(text.max_position_embeddings)
    return min(limits)


def check_trained_length(config: PretrainedConfig, max_length: int) -> None:
    """ValueError if a training row of `max_length` tokens would change the other rows of its batch."""
    limit = row_independent_context(config)
    if max_length > limit:
        raise ValueError(
            f"'model.max_length' is {max_length}, and beyond {limit} tokens the position encoding of "
            f"'{config._name_or_path or config.model_type}' takes other frequencies for the whole batch: "
            f"what a row teaches would depend on its neighbours' length. Set it to {limit} or less"
        )


def assemble_causal_lm(backbone: nn.Module, weight: Tensor, bias: Tensor | None) -> PreTrainedModel:
    """An ordinary causal LM from a plain backbone and a head weight [V, D] (bias [V]). The backbone is used,
    not copied; the head is a copy, not tied to the embedding. ValueError for a family with other parameters.
    """
    config: PretrainedConfig = backbone.config
    # Built on the meta device, without memory; backbone and head are put in below.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    head.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        head.bias = nn.Parameter(bias.detach().clone())
    setattr(model, model.base_model_prefix, backbone)
    model.set_output_embeddings(head)
    model.config = copy.deepcopy(config)
    for level in {id(part): part for part in (model.config, model.config.get_text_config())}.values():
        level.tie_word_embeddings = False
    model.config.architectures = [type(model).__name__]
    unfilled = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if unfilled:
        raise ValueError(
            f"{type(model).__name__} has parameters besides its backbone and head: {', '.join(unfilled)}"
        )
    return model


def run_backbone(
    backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    """Hidden states [B, T, D] behind the final norm; kwargs reach the backbone and its attention function."""
    kwargs.setdefault("use_cache", False)
    return backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state


class CompletionStates(NamedTuple):
    """Inputs of a batch's completion log-probs: one entry per counted token, N in all.

    `hidden` [N, D]: the states that predict them; `labels` [N]: the tokens; `sequences` [N]: which of the
    `completions` each belongs to.
    """

    hidden: Tensor
    labels: Tensor
    sequences: Tensor
    completions: int


def completion_states(
    hidden_states: Callable[..., Tensor],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    pair_lengths: Tensor | None,
) -> CompletionStates:
    """One forward of `hidden_states(input_ids, attention_mask, **kwargs)`, and the states that count.

    Ordinary rows: input_ids, attention_mask and (shifted) labels [B, T], a completion per row. With
    `pair_lengths` [R, 3] the tokens [1, N] are packed pairs (see `models/pair_attention.py`) and there are
    2 R completions: first all chosen, then all rejected ones.
    """
    # Selecting by a mask reads [B, T] row by row, so states, labels and sequence numbers stay in one order.
    # The head then sees N counted tokens instead of B * T: prompts are most of a batch, and a row of logits
    # has V entries where a state has D. Numbering the sequences lets padded rows and packed pairs share all
    # that follows: a sum by number gives the log-prob of a completion wherever its tokens lie.
    sequences = sequence_numbers(labels, pair_lengths)
    count = labels.shape[0] if pair_lengths is None else 2 * len(pair_lengths)
    hidden = hidden_states(input_ids, attention_mask, **packed_arguments(pair_lengths))
    counted = labels != IGNORE_INDEX
    return CompletionStates(hidden[counted], labels[counted], sequences[counted], count)


def save_backbone(
    backbone: PreTrainedModel,
    folder: Path,
    state: Mapping[str, Tensor],
    with_backbone: bool | None,
    base_name: str | None,
    unchanged: bool,
) -> dict[str, Any]:
    """Write the backbone as a plain transformers folder and its LoRA adapter, if any, as a plain peft folder.
    Returns the metadata that `load_saved_backbone` reads.

    `state` holds the whole model's parameters, the backbone's under `backbone.` (under ZeRO-3 the modules
    hold only shards). `with_backbone` None saves the backbone unless there is an adapter on a base that has a
    name. `unchanged`: below an adapter, the backbone is as it was loaded. ValueError for a backbone that is
    to be left out although it was trained, or has no name to load it from.
    """
    adapter = isinstance(backbone, PeftModel)
    if with_backbone is None:
        with_backbone = not adapter or base_name is None
    if not with_backbone and not unchanged:
        raise ValueError("a backbone that was trained itself cannot be left out: save it too")
    if not with_backbone and base_name is None:
        raise ValueError(
            "the backbone comes from a model in memory, without a name to load it from: save it too"
        )
    state = prefixed(state, "backbone.")
    # Adapters per objective have a file of their own: the backbone's folder is an ordinary one.
    state = {name: tensor for name, tensor in state.items() if not name.endswith(ADAPTER_PARAMETERS)}
    plain, plain_state = backbone, dict(state)
    if isinstance(backbone, PeftModel):
        backbone.save_pretrained(
            str(folder / ADAPTER_FOLDER), state_dict=plain_state, save_embedding_layers=False
        )
        plain = backbone.get_base_model()
        plain_state = {
            name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
            for name, tensor in state.items()
            if ".lora_" not in name
        }
    fingerprint = None
    if with_backbone:
        plain.save_pretrained(str(folder / BACKBONE_FOLDER), state_dict=plain_state)
    else:
        names = {
            name.replace(".base_layer.", ".") for name, _ in plain.named_parameters() if ".lora_" not in name
        }
        fingerprint = weights_fingerprint({name: plain_state[name] for name in names})
    return {
        "base_fingerprint": fingerprint,
        "base": None if with_backbone else base_name,
        "saved_backbone": with_backbone,
        "adapter": adapter,
    }


class SavedModel(NamedTuple):
    """A model folder whose metadata and backbone have been read; `base_name`: where the backbone was."""

    folder: Path
    metadata: Mapping[str, Any]
    backbone: PreTrainedModel
    base_name: str
    dtype: torch.dtype | None
    attn_implementation: str | None


def load_saved_backbone(
    folder: Path,
    metadata: Mapping[str, Any],
    dtype: torch.dtype | None,
    attn_implementation: str | None,
    source: str | Path | None,
) -> SavedModel:
    """The backbone of a folder written by `save_backbone`; `source` overrides where its base is found.

    An adapter is trainable, so that training can go on. ValueError for a base that cannot be loaded or has
    other weights than the adapter was trained on.
    """
    if source is None:
        source = folder / BACKBONE_FOLDER if metadata["saved_backbone"] else metadata["base"]
    try:
        backbone = load_backbone(source, dtype, attn_implementation)
    except ValueError as error:
        raise ValueError(
            f"{folder} was saved without its backbone, which cannot be loaded from '{source}': pass "
            f"backbone=, the folder or hub id of that model ({error})"
        ) from error
    expected = metadata.get("base_fingerprint")  # folders of earlier versions have none
    if expected is not None and weights_fingerprint(dict(backbone.named_parameters())) != expected:
        raise ValueError(
            f"the adapter in {folder} was trained on '{metadata['base']}', and the model in '{source}' has "
            "other weights: pass backbone=, the folder or hub id of the model it was trained on"
        )
    check_tokenizer_of(folder, backbone)
    if metadata["adapter"]:
        backbone = load_adapter(backbone, folder / ADAPTER_FOLDER)
    return SavedModel(folder, metadata, backbone, str(source), dtype, attn_implementation)


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a state dict under `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


class BackboneModel(nn.Module, ABC):
    """A transformers base model (no head), perhaps with a LoRA adapter, under this package's heads.

    Its folder holds `backbone/` (an ordinary transformers folder) or the name of the base, `adapter/` (an
    ordinary peft folder), `heads.safetensors` with every other parameter, `mahalo.json` and a model card.
    """

    kind: ClassVar[str]  # the kind of model, as mahalo.json names it
    backbone: PreTrainedModel
    base_name: str | None
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def config(self) -> PretrainedConfig:
        """The backbone's transformers config."""
        return self.backbone.config

    @property
    def device(self) -> torch.device:
        """The device of the first backbone parameter."""
        return next(self.backbone.parameters()).device

    @property
    def has_lora(self) -> bool:
        """Whether the backbone carries a LoRA adapter."""
        return isinstance(self.backbone, PeftModel)

    @property
    def plain_backbone(self) -> PreTrainedModel:
        """The transformers model itself: inside an adapter, whose layers stay in it."""
        return self.backbone.get_base_model() if isinstance(self.backbone, PeftModel) else self.backbone

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Final normalised states [B, T, D]; kwargs (position_ids, kv_cache...) reach the backbone."""
        return run_backbone(self.backbone, input_ids, attention_mask, kwargs)

    def enable_pair_packing(self) -> None:
        """Switch to the attention of packed pairs. ValueError if one small pair shows that the model computes
        something else with it."""
        enable_pair_packing(self.plain_backbone)

    def set_attn_implementation(self, name: str) -> None:
        """Switch the attention function ("sdpa", "eager", or one registered with transformers)."""
        self.plain_backbone.set_attn_implementation(name)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the backbone's layers in backward instead of keeping their activations."""
        self.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.backbone.gradient_checkpointing_disable()

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """The backbone's trainable parameters: the adapter's with LoRA, none when it is frozen."""
        return (parameter for parameter in self.backbone.parameters() if parameter.requires_grad)

    def head_file_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of `heads.safetensors` by name: all but the backbones' (and what is tied to them).
        What heads share appears once."""
        backbones = ("backbone.", "reference.backbone.")
        return {
            name: parameter for name, parameter in self.named_parameters() if not name.startswith(backbones)
        }

    # -- folders ---------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        metrics: Metrics | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        with_backbone: bool | None = None,
    ) -> None:
        """Write the model's folder, which `from_pretrained` reads.

        `tokenizer` is saved beside the weights (None: the model's own, if it has one); `metrics` go into the
        model card. `state_dict` replaces the model's own (whole) parameters under the same names: what a
        ZeRO-3 engine gathered. `with_backbone` None leaves the backbone out where an adapter was trained on a
        base that has a name; True saves it, False does not. ValueError if it cannot be left out.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = dict(self.state_dict() if state_dict is None else state_dict)
        saved = save_backbone(
            self.backbone, folder, state, with_backbone, self.base_name, self._backbone_is_as_loaded()
        )
        self._save_extras(folder, state)
        save_tensors(folder / HEADS_FILE, {name: state[name] for name in self.head_file_parameters()})
        tokenizer = tokenizer or self.tokenizer
        metadata = {**self._metadata(), "tokenizer": tokenizer is not None, **saved}
        write_metadata(folder, self.kind, metadata)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        write_card(folder, self._card(), self.base_name, metrics)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
        device: torch.device | str | None = None,
        backbone: str | Path | None = None,
    ) -> Self:
        """Read a folder (or hub repository) written by `save_pretrained`.

        `dtype` None keeps the stored one. `backbone` overrides where an adapter's base model is found. An
        adapter comes trainable, so that training can go on. ValueError for a folder of another kind or a
        newer format, and naming what is missing in it.
        """
        path = local_folder(folder)
        metadata = read_metadata(path, cls.kind)
        model = cls._from_saved(load_saved_backbone(path, metadata, dtype, attn_implementation, backbone))
        fill_parameters(path / HEADS_FILE, model.head_file_parameters())
        model._fill_extras(path)
        return model if device is None else model.to(device)

    @abstractmethod
    def _backbone_is_as_loaded(self) -> bool:
        """Whether the backbone has its original weights (an adapter on it may be trained)."""

    @abstractmethod
    def _metadata(self) -> dict[str, Any]:
        """The entries of mahalo.json, besides weights, from which `_from_saved` builds the model."""

    @abstractmethod
    def _card(self) -> Card:
        """The model card's text."""

    def _save_extras(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the files that this kind of model has besides backbone, heads and tokenizer."""

    def _fill_extras(self, folder: Path) -> None:
        """Read the parameters that `_save_extras` wrote."""

    @classmethod
    @abstractmethod
    def _from_saved(cls, saved: SavedModel) -> Self:
        """The model as its folder describes it; the parameters of `heads.safetensors` are not filled yet."""
