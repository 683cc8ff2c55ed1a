"""Stops that are read off text (step boundaries, stop strings) while sampling stays vectorised: only tokens
that can complete one make us look at text at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mahalo_ray.decoding.boundaries import Boundary
from mahalo_ray.decoding.candidates import StopReason


@dataclass(frozen=True)
class StopRule:
    """How one row's step may end: its boundary and its stop strings. `before` is the end of the response's
    text so far, so that a stop string that began in an earlier step is found."""

    boundary: Boundary
    stop_strings: tuple[str, ...] = ()
    before: str = ""
    begun: str = ""  # text and tokens of the same step that were accepted earlier (token by token)
    begun_tokens: int = 0

    @property
    def key(self) -> tuple[Boundary, tuple[str, ...]]:
        """What the tokens after which it must be asked depend on."""
        return self.boundary, self.stop_strings

    def is_trigger(self, piece: str) -> bool:
        return self.boundary.is_trigger(piece) or any(stop[-1] in piece for stop in self.stop_strings)

    def verdict(self, text: str, num_tokens: int) -> StopReason | None:
        if self.stop_strings:
            longest = max(map(len, self.stop_strings))
            seam = self.before[-(longest - 1) :] if longest > 1 else ""
            if any(stop in seam + text for stop in self.stop_strings):
                return StopReason.STRING
        return self.boundary.verdict(self.begun + text, self.begun_tokens + num_tokens)


class Vocabulary:
    """Texts of single tokens and of token sequences, with trigger tables cached per rule."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._pieces: list[str] | None = None
        self._tables: dict[tuple[Boundary, tuple[str, ...]], Tensor] = {}

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of these tokens, special tokens included, spaces untouched."""
        return self.tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def words(self, token_ids: Sequence[int]) -> str:
        """Text of these tokens without special ones."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def decode_many(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        return self.tokenizer.batch_decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def table(self, rule: StopRule) -> Tensor:
        """[tokens] bool: tokens after which this rule must be asked. Fragments of characters always count."""
        key = rule.key
        if key not in self._tables:
            if self._pieces is None:
                self._pieces = self.decode_many([[i] for i in range(len(self.tokenizer))])
            triggers = [rule.is_trigger(piece) for piece in self._pieces]
            some = any(triggers)  # none: fragments of characters cannot end anything either
            self._tables[key] = torch.tensor(
                [some and (own or "\ufffd" in p) for own, p in zip(triggers, self._pieces, strict=True)]
            )
        return self._tables[key]


def step_starts(token_ids: Sequence[int], boundary: Boundary, vocabulary: Vocabulary) -> list[int]:
    """Where the steps of a response sampled as a whole begin: at 0 and behind its inner boundaries."""
    triggers = vocabulary.table(StopRule(boundary))
    starts = [0]
    for at in range(len(token_ids) - 1):
        if token_ids[at] < len(triggers) and triggers[token_ids[at]]:
            text = vocabulary.decode(token_ids[starts[-1] : at + 1])
            if boundary.verdict(text, at + 1 - starts[-1]) is StopReason.STEP:
                starts.append(at + 1)
    return starts


class TextStop:
    """The stop rules of the rows of one `sample` call, in its order (None: no text rule for that row)."""

    def __init__(self, vocabulary: Vocabulary, rules: Sequence[StopRule | None]) -> None:
        self.vocabulary, self.rules = vocabulary, list(rules)

    def trigger_table(self, vocab_size: int) -> Tensor:
        """[vocab_size] bool, the union over rows; the model's vocabulary may be padded beyond the
        tokenizer's."""
        table = torch.zeros(vocab_size, dtype=torch.bool)
        for rule in {rule.key: rule for rule in self.rules if rule is not None}.values():
            known = self.vocabulary.table(rule)[:vocab_size]
            table[: len(known)] |= known
        return table

    def verdicts(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]]) -> list[StopReason | None]:
        """For the step so far of each suspect candidate of row rows[i]: why it ends here, or None."""
        verdicts: list[StopReason | None] = []
        for row, ids, text in zip(rows, token_ids, self.vocabulary.decode_many(token_ids), strict=True):
            rule = self.rules[row]
            verdicts.append(None if rule is None else rule.verdict(text, len(ids)))
        return verdicts
