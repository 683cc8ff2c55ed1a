"""Preference pairs as token ids: what the policy, its reference and a pairwise reward model all read."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict, overload

import numpy as np
import numpy.typing as npt
import torch
from jinja2 import TemplateError

from mahalo_ray.data.records import Message, PreferencePair
from mahalo_ray.data.row_fields import RowError
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.logprobs import IGNORE_INDEX
from mahalo_ray.losses import shift_labels
from mahalo_ray.objectives import unknown_name
from mahalo_ray.training.batches import Indices, RowGroups
from mahalo_ray.training.recipe import Tensors, pad

TokenIds = list[int]


class TokenRows(Sequence[TokenIds]):
    """Token ids of many sequences in one array: 4 bytes a token, where a list of Python integers takes 36."""

    def __init__(self, rows: Iterable[Iterable[int]] = ()) -> None:
        self._ids, self._bounds = array("i"), array("q", [0])
        for ids in rows:
            self.append(ids)

    def append(self, ids: Iterable[int]) -> None:
        """Add one sequence."""
        self._ids.extend(ids)
        self._bounds.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, row: int) -> TokenIds: ...

    @overload
    def __getitem__(self, row: slice) -> list[TokenIds]: ...

    def __getitem__(self, row: int | slice) -> TokenIds | list[TokenIds]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self._ids[self._bounds[row] : self._bounds[row + 1]].tolist()

    @property
    def lengths(self) -> Indices:
        """Tokens of every sequence [N]."""
        bounds = np.array(self._bounds, dtype=np.int64)
        return bounds[1:] - bounds[:-1]


@dataclass(frozen=True)
class TokenPairs:
    """Pairs cut to a maximal length, one entry per pair. `objective` numbers the objectives; `weights` and
    `margins` are the pairs' own (see `PreferencePair`); `cut` counts those that lost tokens."""

    ids: list[str]
    objective: Indices
    prompts: TokenRows
    chosen: TokenRows
    rejected: TokenRows
    weights: npt.NDArray[np.float64]
    margins: npt.NDArray[np.float64]
    cut: int

    def __len__(self) -> int:
        return len(self.ids)

    def row_hash(self, row: int) -> str:
        """A hash of the pair's token ids: besides the model, a stored log-prob depends on nothing else."""
        parts = (self.prompts[row], self.chosen[row], self.rejected[row])
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def completion_tokens(self) -> npt.NDArray[np.int64]:
        """Counted tokens [N, 2] of chosen and rejected."""
        return np.stack([self.chosen.lengths, self.rejected.lengths], axis=1)


class PairInputs(ABC):
    """Pairs in the form that a model reads them in."""

    def __init__(self, pairs: TokenPairs) -> None:
        self.pairs = pairs

    @property
    @abstractmethod
    def row_groups(self) -> RowGroups:
        """One group per pair."""

    @abstractmethod
    def tensors(self, rows: Indices) -> Tensors:
        """A model's inputs of R pairs, for log-probs [2R]: first all chosen, then all rejected sequences.

        Labels are shifted; only the completions' tokens count.
        """

    @abstractmethod
    def chosen_tensors(self, rows: Indices) -> Tensors:
        """The same of the chosen sequences alone."""


class PaddedPairs(PairInputs):
    """Two padded rows per pair: input_ids, labels and attention_mask [2R, T]."""

    def __init__(self, pairs: TokenPairs, pad_id: int) -> None:
        super().__init__(pairs)
        self._pad_id = pad_id

    @property
    def row_groups(self) -> RowGroups:
        """A pair's length is that of the longer of its two sequences."""
        prompts, chosen, rejected = (
            rows.lengths for rows in (self.pairs.prompts, self.pairs.chosen, self.pairs.rejected)
        )
        lengths = prompts + np.maximum(chosen, rejected)
        return RowGroups(np.ones_like(lengths), lengths, 2 * prompts + chosen + rejected)

    def tensors(self, rows: Indices) -> Tensors:
        pairs = self.pairs
        chosen = [(pairs.prompts[row], pairs.chosen[row]) for row in rows]
        return self._padded(chosen + [(pairs.prompts[row], pairs.rejected[row]) for row in rows])

    def chosen_tensors(self, rows: Indices) -> Tensors:
        return self._padded([(self.pairs.prompts[row], self.pairs.chosen[row]) for row in rows])

    def _padded(self, sequences: Sequence[tuple[TokenIds, TokenIds]]) -> Tensors:
        """(prompt, completion) of every row."""
        labels = [[IGNORE_INDEX] * len(prompt) + completion for prompt, completion in sequences]
        return {
            "input_ids": pad([prompt + completion for prompt, completion in sequences], self._pad_id),
            "attention_mask": pad([[1] * len(row) for row in labels], 0),
            "labels": shift_labels(pad(labels, IGNORE_INDEX)),
        }


class PackedPairs(PairInputs):
    """All pairs behind each other, every prompt once: input_ids and labels [1, N] and pair_lengths [R, 3]
    (see `models/pair_attention.py`)."""

    @property
    def row_groups(self) -> RowGroups:
        """A pair's length is that of its packed sequence."""
        pairs = self.pairs
        tokens = pairs.prompts.lengths - 1 + pairs.chosen.lengths + pairs.rejected.lengths
        return RowGroups(np.ones_like(tokens), tokens, tokens)

    def tensors(self, rows: Indices) -> Tensors:
        pairs = self.pairs
        return _packed([(pairs.prompts[row], pairs.chosen[row], pairs.rejected[row]) for row in rows])

    def chosen_tensors(self, rows: Indices) -> Tensors:
        """Pairs with an empty rejected answer."""
        return _packed([(self.pairs.prompts[row], self.pairs.chosen[row], []) for row in rows])


def _packed(pairs: Sequence[tuple[TokenIds, TokenIds, TokenIds]]) -> Tensors:
    """(prompt, chosen, rejected) of every pair.

    The prompt's last token predicts the first token of both answers, so it opens each answer's span and is
    left out of the prompt's; the last token of an answer predicts nothing that counts and is left out. Every
    position then predicts exactly one token, and labels need no further shift. Prompt a b c, chosen x y and
    rejected z become

        input_ids     a b | c x | c
        labels        - - | x y | z        (- is -100)
        pair_lengths  2     2     1
    """
    ids: TokenIds = []
    labels: TokenIds = []
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


class PairEncoder:
    """Collects pairs as token ids: the stored ones where a pair has them, else made from its text by the chat
    template."""

    def __init__(self, objectives: Sequence[str], chat: ChatFormat, max_length: int) -> None:
        self._objectives, self._chat, self._max_length = tuple(objectives), chat, max_length
        self._numbers = {name: number for number, name in enumerate(objectives)}
        self._seen: set[str] = set()
        self._ids: list[str] = []
        self._objective, self._weights, self._margins = array("q"), array("d"), array("d")
        self._prompts, self._chosen, self._rejected = TokenRows(), TokenRows(), TokenRows()
        self._cut = 0

    def add(self, pair: PreferencePair) -> None:
        """Add a pair; a too long one is cut as `cut_pair` does it.

        Raises ValueError naming a pair whose objective is unknown, whose id is not unique, or that has an
        empty or identical completion.
        """
        if pair.objective not in self._numbers:
            raise ValueError(
                f"pair '{pair.id}': {unknown_name('objective', pair.objective, self._objectives)}"
            )
        if pair.id in self._seen:
            raise ValueError(f"pair id '{pair.id}' occurs twice: messages and reports name pairs by it")
        self._seen.add(pair.id)
        try:
            prompt, chosen, rejected = pair_token_ids(pair, self._chat)
        except (ValueError, TemplateError) as error:
            raise ValueError(f"pair '{pair.id}': {error}") from error
        if not prompt or not chosen or not rejected:
            raise ValueError(f"pair '{pair.id}': the prompt or a completion has no tokens")
        if chosen == rejected:
            raise ValueError(f"pair '{pair.id}': chosen and rejected are the same")
        cut = cut_pair(prompt, chosen, rejected, self._max_length)
        self._cut += cut != (prompt, chosen, rejected)
        prompt, chosen, rejected = cut
        self._ids.append(pair.id)
        self._objective.append(self._numbers[pair.objective])
        self._weights.append(pair.weight)
        self._margins.append(pair.margin)
        self._prompts.append(prompt)
        self._chosen.append(chosen)
        self._rejected.append(rejected)

    def pairs(self) -> TokenPairs:
        """All pairs that were added."""
        return TokenPairs(
            self._ids,
            np.array(self._objective, dtype=np.int64),
            self._prompts,
            self._chosen,
            self._rejected,
            np.array(self._weights, dtype=np.float64),
            np.array(self._margins, dtype=np.float64),
            self._cut,
        )


def encode_pairs(
    pairs: Iterable[PreferencePair], objectives: Sequence[str], chat: ChatFormat, max_length: int
) -> TokenPairs:
    """Token ids of all pairs; see `PairEncoder.add`."""
    encoder = PairEncoder(objectives, chat, max_length)
    for pair in pairs:
        encoder.add(pair)
    return encoder.pairs()


def cut_pair(
    prompt: TokenIds, chosen: TokenIds, rejected: TokenIds, max_length: int
) -> tuple[TokenIds, TokenIds, TokenIds]:
    """A pair of at most `max_length` tokens per sequence, as training and evaluation read it: the beginning
    of both answers, and as much of the prompt's end (at least one token) as the longer one leaves."""
    chosen, rejected = chosen[: max_length - 1], rejected[: max_length - 1]
    return prompt[-(max_length - max(len(chosen), len(rejected))) :], chosen, rejected


class RoleCheck:
    """Refuses pairs whose roles the chat template cannot render; each order of roles is rendered once."""

    def __init__(self, chat: ChatFormat) -> None:
        self._chat = chat
        self._reasons: dict[tuple[str, ...], str | None] = {}

    def __call__(self, pair: PreferencePair) -> None:
        """RowError with the template's reason. Stored token ids need no template."""
        if pair.prompt_ids is not None:
            return
        roles = tuple(message.role for message in pair.prompt)
        if roles not in self._reasons:
            self._reasons[roles] = self._refusal(pair.prompt)
        reason = self._reasons[roles]
        if reason is not None:
            raise RowError(f"roles {', '.join(roles)}: {reason}")

    def _refusal(self, prompt: Sequence[Message]) -> str | None:
        try:
            self._chat.prompt_ids(prompt)
        except (ValueError, TemplateError) as error:
            return str(error)
        return None


def split_key(pair: PreferencePair) -> str:
    """The same for all pairs that a split keeps together: its own `split`, else its dialogue or prompt."""
    return pair.split or pair.dialogue or repr([(message.role, message.content) for message in pair.prompt])


def pair_token_ids(pair: PreferencePair, chat: ChatFormat) -> tuple[TokenIds, TokenIds, TokenIds]:
    """Token ids of prompt, chosen and rejected."""
    if pair.prompt_ids is not None and pair.chosen_ids is not None and pair.rejected_ids is not None:
        return pair.prompt_ids, pair.chosen_ids, pair.rejected_ids
    return (
        chat.prompt_ids(pair.prompt),
        chat.encode_reply(pair.chosen),
        chat.encode_reply(pair.rejected),
    )


class CompletionTensors(TypedDict):
    """A micro-batch's inputs of `completion_logps`: padded rows have a mask, packed pairs their lengths."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    labels: torch.Tensor
    pair_lengths: torch.Tensor | None


def pair_inputs(tensors: Tensors) -> CompletionTensors:
    """Those of a micro-batch's tensors that `completion_logps` reads."""
    return CompletionTensors(
        input_ids=tensors["input_ids"],
        attention_mask=tensors.get("attention_mask"),
        labels=tensors["labels"],
        pair_lengths=tensors.get("pair_lengths"),
    )


def pair_logps(logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[2R] as `PairInputs.tensors` orders it -> (chosen [R], rejected [R])."""
    chosen, rejected = logps.chunk(2)
    return chosen, rejected
