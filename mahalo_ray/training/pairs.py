"""Preference pairs as token ids: what the policy, its reference and a pairwise reward model all read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig

from mahalo_ray.config import ModelConfig, PolicyConfig
from mahalo_ray.data.records import PreferencePair
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.logprobs import IGNORE_INDEX
from mahalo_ray.losses import shift_labels
from mahalo_ray.models.pair_attention import why_not_packed
from mahalo_ray.objectives import unknown_name
from mahalo_ray.training.batches import Indices, RowGroups
from mahalo_ray.training.recipe import Tensors, pad

Ids = list[int]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TokenPairs:
    """Pairs cut to a maximal length. One entry per pair; `objective` numbers the objectives; `weights` and
    `margins` are the pairs' own (see `PreferencePair`); `cut` counts those that lost tokens; `packed`: the
    form that `tensors` gives."""

    ids: list[str]
    objective: Indices
    prompts: list[Ids]
    chosen: list[Ids]
    rejected: list[Ids]
    weights: Floats
    margins: Floats
    cut: int
    packed: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def row_groups(self) -> RowGroups:
        """One group per pair; its length is that of the longer sequence, or of the packed pair."""
        prompts, chosen, rejected = (
            np.array([len(ids) for ids in column], dtype=np.int64)
            for column in (self.prompts, self.chosen, self.rejected)
        )
        if self.packed:
            tokens = prompts - 1 + chosen + rejected
            return RowGroups(np.ones_like(tokens), tokens, tokens)
        lengths = prompts + np.maximum(chosen, rejected)
        return RowGroups(np.ones_like(lengths), lengths, 2 * prompts + chosen + rejected)

    def row_hashes(self) -> list[str]:
        """What a stored log-prob of a row depends on, besides the model: its token ids."""
        return [
            hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
            for parts in zip(self.prompts, self.chosen, self.rejected, strict=True)
        ]

    def tensors(self, rows: Indices, pad_id: int) -> Tensors:
        """What a model reads of R pairs, for log-probs [2R]: first all chosen, then all rejected sequences.

        input_ids, labels and attention_mask [2R, T] in padded rows; packed, input_ids and labels [1, N] and
        pair_lengths [R, 3] (see `models/pair_attention.py`). Labels are shifted; only the completions' tokens
        count.
        """
        if self.packed:
            return _packed([(self.prompts[row], self.chosen[row], self.rejected[row]) for row in rows])
        halves = [(self.prompts[row], self.chosen[row]) for row in rows]
        return _padded(halves + [(self.prompts[row], self.rejected[row]) for row in rows], pad_id)

    def chosen_tensors(self, rows: Indices, pad_id: int) -> Tensors:
        """The same of the chosen sequences alone; packed, their pairs have an empty rejected answer."""
        halves = [(self.prompts[row], self.chosen[row]) for row in rows]
        if self.packed:
            return _packed([(prompt, chosen, []) for prompt, chosen in halves])
        return _padded(halves, pad_id)

    def completion_tokens(self) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """Counted tokens [N, 2] of chosen and rejected."""
        counts = [[len(c), len(r)] for c, r in zip(self.chosen, self.rejected, strict=True)]
        return np.array(counts, dtype=np.int64).reshape(-1, 2)


def _padded(sequences: Sequence[tuple[Ids, Ids]], pad_id: int) -> Tensors:
    """(prompt, completion) of every row, right-padded."""
    labels = [[IGNORE_INDEX] * len(prompt) + completion for prompt, completion in sequences]
    return {
        "input_ids": pad([prompt + completion for prompt, completion in sequences], pad_id),
        "attention_mask": pad([[1] * len(row) for row in labels], 0),
        "labels": shift_labels(pad(labels, IGNORE_INDEX)),
    }


def _packed(pairs: Sequence[tuple[Ids, Ids, Ids]]) -> Tensors:
    """(prompt, chosen, rejected) of every pair; an answer's span begins with the prompt's last token."""
    ids: Ids = []
    labels: Ids = []
    lengths = []
    for prompt, *answers in pairs:
        ids += prompt[:-1]
        labels += [IGNORE_INDEX] * (len(prompt) - 1)
        for answer in filter(None, answers):
            ids += [prompt[-1], *answer[:-1]]
            labels += answer
        lengths.append([len(prompt) - 1, *map(len, answers)])
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "pair_lengths": torch.tensor(lengths),
    }


def encode_pairs(
    pairs: Sequence[PreferencePair], objectives: Sequence[str], chat: ChatFormat, max_length: int
) -> TokenPairs:
    """Token ids of all pairs: the stored ones where a pair has them, else made from its text by the chat
    template.

    Too long pairs keep the end of the prompt and the start of the completions. Raises ValueError naming the
    pair whose objective is unknown, whose id is not unique, or that has an empty or identical completion.
    """
    seen: set[str] = set()
    numbers = np.zeros(len(pairs), dtype=np.int64)
    weights = np.array([pair.weight for pair in pairs], dtype=np.float64)
    margins = np.array([pair.margin for pair in pairs], dtype=np.float64)
    result = TokenPairs([], numbers, [], [], [], weights, margins, 0)
    cut = 0
    for number, pair in enumerate(pairs):
        if pair.objective not in objectives:
            raise ValueError(f"pair '{pair.id}': {unknown_name('objective', pair.objective, objectives)}")
        if pair.id in seen:
            raise ValueError(f"pair id '{pair.id}' occurs twice: reference log-probs are kept by id")
        seen.add(pair.id)
        prompt, chosen, rejected = _token_ids(pair, chat)
        if not prompt or not chosen or not rejected:
            raise ValueError(f"pair '{pair.id}': the prompt or a completion has no tokens")
        if chosen == rejected:
            raise ValueError(f"pair '{pair.id}': chosen and rejected are the same")
        room = max_length - 1
        whole = len(prompt) + max(len(chosen), len(rejected))
        cut += whole > max_length
        chosen, rejected = chosen[:room], rejected[:room]
        prompt = prompt[-(max_length - max(len(chosen), len(rejected))) :]
        result.objective[number] = list(objectives).index(pair.objective)
        result.ids.append(pair.id)
        result.prompts.append(prompt)
        result.chosen.append(chosen)
        result.rejected.append(rejected)
    return replace(result, cut=cut)


def shares_prompts(policy: PolicyConfig, model: ModelConfig, folder: Path) -> bool:
    """Whether pairs are packed, their prompts read once; ValueError if that is demanded and cannot be."""
    if policy.share_prompts == "never":
        return False
    config = AutoConfig.from_pretrained(folder)
    reason = why_not_packed(config, model.attn_implementation, model.max_length)
    if reason is not None and policy.share_prompts == "always":
        raise ValueError(f"'policy.share_prompts: always' is not possible with this model: {reason}")
    return reason is None


def split_key(pair: PreferencePair) -> str:
    """The same for all pairs that a split keeps together: its own say, else their dialogue or prompt."""
    return pair.split or pair.dialogue or repr([(message.role, message.content) for message in pair.prompt])


def _token_ids(pair: PreferencePair, chat: ChatFormat) -> tuple[Ids, Ids, Ids]:
    if pair.prompt_ids is not None and pair.chosen_ids is not None and pair.rejected_ids is not None:
        return pair.prompt_ids, pair.chosen_ids, pair.rejected_ids
    return (
        chat.prompt_ids(pair.prompt),
        chat.encode_reply(pair.chosen),
        chat.encode_reply(pair.rejected),
    )


def pair_inputs(tensors: Tensors) -> dict[str, torch.Tensor | None]:
    """Those of a micro-batch's tensors that the model reads, whichever form they have."""
    return {name: tensors.get(name) for name in ("input_ids", "attention_mask", "labels", "pair_lengths")}


def pair_logps(logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[2R] as `TokenPairs.tensors` orders it -> (chosen [R], rejected [R])."""
    chosen, rejected = logps.chunk(2)
    return chosen, rejected
