"""The same DPO step three ways: as textbooks write it, as TRL's DPOTrainer takes it, and as ours."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from shapes import ABOUT_1_5B, ABOUT_7B, END, SMOLLM2_135M, TINY, Shape, words
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from mahalo_ray.config import HeadKind, LoraConfig
from mahalo_ray.losses import IGNORE_INDEX, dpo_loss, shift_labels
from mahalo_ray.models import ChunkedCausalLM, MultiHeadCausalLM
from mahalo_ray.models.lean_layers import keep_fewer_activations
from mahalo_ray.training.pairs import PackedPairs, TokenPairs, TokenRows, pair_inputs

BETA = 0.1
# The reference and the policy have different random weights, so that the losses compared are not all log 2.
_REFERENCE_SEED, _POLICY_SEED, _DATA_SEED = 1, 2, 3
_HEAD_NOISE = 0.02  # large enough for a row under the wrong head to change the loss


@dataclass(frozen=True)
class Preset:
    """Sizes of a step."""

    shape: Shape
    prompt_tokens: int
    min_length: int
    max_length: int
    chunk_size: int


PRESETS = {
    "smollm2-135m": Preset(SMOLLM2_135M, prompt_tokens=128, min_length=256, max_length=512, chunk_size=256),
    # As in dialogues, where most of a pair is what was said before.
    "smollm2-135m-dialogue": Preset(
        SMOLLM2_135M, prompt_tokens=224, min_length=256, max_length=512, chunk_size=256
    ),
    "1.5b": Preset(ABOUT_1_5B, prompt_tokens=128, min_length=256, max_length=512, chunk_size=256),
    "7b": Preset(ABOUT_7B, prompt_tokens=128, min_length=256, max_length=512, chunk_size=256),
    "tiny": Preset(TINY, prompt_tokens=8, min_length=20, max_length=40, chunk_size=16),
}


@dataclass(frozen=True)
class Setting:
    """Where and on how many pairs."""

    preset: Preset
    pairs: int
    device: torch.device
    dtype: torch.dtype

    def model(self, seed: int) -> PreTrainedModel:
        return self.preset.shape.build(seed, self.dtype, self.device)


@dataclass
class Step:
    """What a variant needs for one step. `loss` makes the graph of the loss, on the pairs it is given."""

    trained: nn.Module
    frozen: nn.Module | None  # the reference, where the variant holds one in memory
    loss: Callable[[Pairs, Tensor], Tensor]  # pairs, reference log-probs [pairs, 2] -> mean loss


@dataclass(frozen=True)
class Pairs:
    """Preference pairs as token ids; `objective` [pairs] numbers the heads."""

    objective: Tensor
    prompts: list[list[int]]
    chosen: list[list[int]]
    rejected: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompts)

    def cut_short(self, tokens: int) -> Pairs:
        """A few tokens of each: for a first step that only allocates what stays."""
        columns = (self.prompts, self.chosen, self.rejected)
        return Pairs(self.objective, *([ids[:tokens] for ids in column] for column in columns))

    def packed(self) -> PackedPairs:
        """As training has them."""
        ids, ones = [str(number) for number in range(len(self))], np.ones(len(self))
        columns = (TokenRows(rows) for rows in (self.prompts, self.chosen, self.rejected))
        return PackedPairs(TokenPairs(ids, self.objective.numpy(), *columns, ones, 0 * ones, 0))

    def batch(self, setting: Setting) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels [2 * pairs, T], chosen rows above rejected rows, right-padded.

        Labels are shifted; only the completions' tokens count.
        """
        rows = [(p, c) for p, c in zip(self.prompts * 2, self.chosen + self.rejected, strict=True)]
        columns = {
            "input_ids": ([p + c for p, c in rows], setting.preset.shape.end_id),
            "attention_mask": ([[1] * len(p + c) for p, c in rows], 0),
            "labels": ([[IGNORE_INDEX] * len(p) + c for p, c in rows], IGNORE_INDEX),
        }
        tensors = {
            name: pad_sequence(list(map(torch.tensor, ids)), batch_first=True, padding_value=filler)
            for name, (ids, filler) in columns.items()
        }
        tensors["labels"] = shift_labels(tensors["labels"])
        tensors["objective"] = self.objective
        return {name: tensor.to(setting.device) for name, tensor in tensors.items()}


def make_pairs(preset: Preset, count: int, num_heads: int) -> Pairs:
    """Random pairs; lengths run evenly from the preset's least to its most, the other way for rejected."""
    generator = torch.Generator().manual_seed(_DATA_SEED)
    lengths = torch.linspace(preset.min_length, preset.max_length, count).round().int().tolist()
    end_id = preset.shape.end_id

    def drawn(count: int) -> list[int]:
        return torch.randint(end_id, (count,), generator=generator).tolist()

    def completion(length: int) -> list[int]:
        return [*drawn(length - preset.prompt_tokens - 1), end_id]

    return Pairs(
        torch.arange(count) % num_heads,
        [drawn(preset.prompt_tokens) for _ in lengths],
        [completion(length) for length in lengths],
        [completion(length) for length in reversed(lengths)],
    )


def reference_logps(setting: Setting, pairs: Pairs) -> Tensor:
    """Log-probs [pairs, 2] of chosen and rejected under the reference, computed once as training does."""
    batch = pairs.batch(setting)
    reference = ChunkedCausalLM(setting.model(_REFERENCE_SEED))
    with torch.no_grad():
        logps = reference(
            batch["input_ids"], batch["attention_mask"], batch["labels"], setting.preset.chunk_size
        )
    return torch.stack(logps.chunk(2), dim=1).cpu()


def multi_head_policy(setting: Setting, num_heads: int, kind: HeadKind) -> MultiHeadCausalLM:
    """With one head it is the base model exactly, so that a single-head trainer must find the same loss."""
    names = [f"objective_{number}" for number in range(num_heads)]
    noise = 0.0 if num_heads == 1 else _HEAD_NOISE
    return MultiHeadCausalLM.from_base(
        setting.model(_POLICY_SEED), names, noise=noise, head_kind=kind
    ).train()


def ours(
    setting: Setting, num_heads: int, kind: HeadKind, recomputed: bool = False, lora: bool = False
) -> Step:
    """Chosen and rejected behind one prompt, own head per row, completion tokens only, reference stored;
    `recomputed`: with activation checkpointing; `lora`: adapters of rank 16 on a frozen backbone."""
    policy = multi_head_policy(setting, num_heads, kind)
    if lora:
        policy.add_lora(LoraConfig())
    policy.enable_pair_packing()
    if recomputed:
        policy.gradient_checkpointing_enable()
    else:
        keep_fewer_activations(policy)

    def loss(pairs: Pairs, reference: Tensor) -> Tensor:
        tensors = pairs.packed().tensors(np.arange(len(pairs)))
        logps = policy.completion_logps(
            **pair_inputs({name: tensor.to(setting.device) for name, tensor in tensors.items()}),
            head_index=pairs.objective.to(setting.device).repeat(2),
            chunk_size=setting.preset.chunk_size,
        )
        chosen, rejected = logps.chunk(2)
        stored = reference.to(setting.device)
        return dpo_loss(chosen, rejected, stored[:, 0], stored[:, 1], BETA).mean()

    return Step(policy, None, loss)


def textbook(setting: Setting, num_heads: int, kind: HeadKind = "full") -> Step:
    """Four forwards, every head on every row, whole logits; the reference has one head."""
    policy = multi_head_policy(setting, num_heads, kind)
    reference = setting.model(_REFERENCE_SEED).requires_grad_(False)

    def under_every_head(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        hidden = policy.hidden_states(ids, mask)
        return torch.stack([whole_logps(policy.head(name)(hidden), labels) for name in policy.objectives])

    @torch.no_grad()
    def under_reference(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return whole_logps(reference(input_ids=ids, attention_mask=mask, use_cache=False).logits, labels)

    def loss(pairs: Pairs, _: Tensor) -> Tensor:
        batch = pairs.batch(setting)
        chosen, rejected = halves(batch)
        losses = dpo_loss(
            under_every_head(*chosen),
            under_every_head(*rejected),
            under_reference(*chosen),
            under_reference(*rejected),
            BETA,
        )
        own = torch.arange(num_heads, device=setting.device)[:, None] == batch["objective"]
        return (losses * own).sum() / len(pairs)

    return Step(policy, reference, loss)


def halves(batch: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(ids, mask, labels) of the chosen and of the rejected rows, each cut to its own longest."""
    columns = [batch[name].chunk(2) for name in ("input_ids", "attention_mask", "labels")]
    found = []
    for side in (0, 1):
        longest = int(columns[1][side].sum(dim=1).max())
        found.append(tuple(column[side][:, :longest] for column in columns))
    return found[0], found[1]


def whole_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed log-probs [B] from whole logits [B, T, V]; labels are shifted already."""
    counted = labels != IGNORE_INDEX
    logps = logits.float().log_softmax(-1).gather(-1, labels.where(counted, 0)[..., None])[..., 0]
    return (logps * counted).sum(-1)


def trl(setting: Setting, precompute: bool, pairs: Pairs) -> Step:
    """TRL's DPOTrainer: its data preparation, collator and loss, on the model as it is (tied head)."""
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    texts = {
        "prompt": [words(ids) for ids in pairs.prompts],
        "chosen": [" " + words(ids[:-1]) + END for ids in pairs.chosen],
        "rejected": [" " + words(ids[:-1]) + END for ids in pairs.rejected],
    }
    reference = setting.model(_REFERENCE_SEED)
    policy = setting.model(_POLICY_SEED)
    # With precompute TRL takes the model it is given for the reference, and keeps none.
    model = reference if precompute else policy
    trainer = DPOTrainer(
        model=model,
        ref_model=None if precompute else reference,
        args=DPOConfig(
            output_dir=tempfile.mkdtemp(prefix="policy_step_"),
            beta=BETA,
            max_length=None,
            per_device_train_batch_size=len(pairs),
            precompute_ref_log_probs=precompute,
            gradient_checkpointing=False,
            bf16=False,  # no autocast: the model has the dtype asked for
            use_cpu=setting.device.type == "cpu",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(texts),
        processing_class=setting.preset.shape.tokenizer(),
    )
    if precompute:
        model.load_state_dict(policy.state_dict())  # as if training had moved it there
    rows: list[dict[str, Any]] = list(trainer.train_dataset)
    read = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]
    assert read == list(zip(pairs.prompts, pairs.chosen, pairs.rejected, strict=True)), "other tokens"
    model.train()

    def loss(wanted: Pairs, _: Tensor) -> Tensor:
        columns = zip(rows, wanted.prompts, wanted.chosen, wanted.rejected, strict=True)
        inputs = trainer.data_collator(
            [
                {**row, "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
                for row, prompt, chosen, rejected in columns
            ]
        )
        inputs = {name: tensor.to(setting.device) for name, tensor in inputs.items()}
        return trainer.compute_loss(model, inputs)

    return Step(model, None if precompute else reference, loss)
