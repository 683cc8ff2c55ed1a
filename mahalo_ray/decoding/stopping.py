"""Where a step of reasoning, of an answer or of a dialogue ends, read off the text sampled so far."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from mahalo_ray.objectives import unknown_name

INCOMPLETE = "\ufffd"  # how decoders show bytes that are not (yet) a character
_WINDOW = 16  # tokens: what their decoding depends on lies within so many before them, mostly
_BOUNDARIES_KEPT, _CHARACTERS_KEPT = 16, 64  # tables over the vocabulary, 1 byte per token each


class StopReason(StrEnum):
    """Why a candidate ended."""

    TOKEN = "stop_token"  # it emitted a stop token, which is its last token
    LENGTH = "length"  # max_new_tokens
    CONTEXT = "context"  # the model's context is full
    STEP = "step"  # the domain's boundary: the step is complete, the response may go on
    ANSWER = "answer"  # the domain's boundary: the response is complete (maths: \boxed{} closed)
    STRING = "stop_string"  # the text contains a stop string
    STEPS = "max_steps"  # guided decoding took as many steps as it may


class Boundary(Protocol):
    """A step's end. Equal boundaries must be hashable and equal: tables of trigger tokens are cached by
    them.

    `stop_strings`: texts that end a step for certain, for engines that know nothing else; `verdict` decides.
    """

    stop_strings: ClassVar[tuple[str, ...]]

    def is_trigger(self, piece: str) -> bool:
        """Whether a token with this text can complete a boundary; `verdict` is asked after such tokens
        only."""
        ...

    def verdict(self, text: str, num_tokens: int) -> StopReason | None:
        """STEP or ANSWER if the step with this text (num_tokens tokens) ends here, else None.

        The text may go beyond the boundary inside the last token; that rest belongs to the step and is never
        lost.
        """
        ...


@dataclass(frozen=True)
class MathBoundary:
    """A step ends at a blank line; the response ends where \\boxed{...} closes. A blank line inside an open
    box and blank lines before any text do not count."""

    stop_strings: ClassVar[tuple[str, ...]] = ("\n\n",)

    def is_trigger(self, piece: str) -> bool:
        return "\n" in piece or "}" in piece

    def verdict(self, text: str, num_tokens: int) -> StopReason | None:
        box = _box_state(text)
        if box == "closed":
            return StopReason.ANSWER
        if box == "none" and _BLANK_LINE.search(text.lstrip()):
            return StopReason.STEP
        return None


_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")


def _box_state(text: str) -> str:
    """'none', 'open' or 'closed': the first \\boxed{...}, braces balanced."""
    start = text.find("\\boxed{")
    if start < 0:
        return "none"
    depth, at = 0, start + len("\\boxed")
    while at < len(text):
        if text[at] == "\\":  # \{ and \} are characters, not groups
            at += 2
            continue
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return "closed"
        at += 1
    return "open"


@dataclass(frozen=True)
class SentenceBoundary:
    """A step ends with a sentence or a paragraph, once it has `min_tokens` tokens.

    Abbreviations ("e.g.", "Dr."), initials, decimals and bare list markers ("1.", "-", "a)") do not end a
    sentence. A full stop behind a digit counts only when white space follows, because more digits may come.
    """

    stop_strings: ClassVar[tuple[str, ...]] = ()  # no text ends every sentence it occurs in

    min_tokens: int = 8

    def is_trigger(self, piece: str) -> bool:
        return any(mark in piece for mark in _ENDS) or piece[:1].isspace()

    def verdict(self, text: str, num_tokens: int) -> StopReason | None:
        if num_tokens < self.min_tokens:
            return None
        return StopReason.STEP if _ends_sentence(text) else None


_ENDS = ".!?。！？\n\"')]”’"
_SENTENCE_END = re.compile(r"([.!?]+|[。！？]+)[\"')\]”’*_]*(\s|$)")
_ABBREVIATIONS = frozenset(
    [
        "e.g",
        "i.e",
        "etc",
        "vs",
        "cf",
        "mr",
        "mrs",
        "ms",
        "dr",
        "prof",
        "st",
        "jr",
        "sr",
        "inc",
        "ltd",
        "co",
        "no",
        "fig",
        "eq",
        "approx",
        "dept",
        "est",
        "vol",
        "pp",
        "al",
        "u.s",
        "u.k",
        "a.m",
        "p.m",
    ]
)
_LIST_MARKER = re.compile(r"^[\s>]*([-*+•#]+|\(?\d{1,3}[.)]|\(?[A-Za-z][.)])?[*_\s]*$")


def _ends_sentence(text: str) -> bool:
    """Whether the END of the text is the end of a sentence or paragraph; what follows it inside the last
    token is at most the next sentence's first word."""
    body = text.rstrip()
    if not body or _LIST_MARKER.match(body.rsplit("\n", 1)[-1]):
        return False
    if "\n" in text[len(body) :]:
        return True
    # The last token may have brought white space and the start of the next word along.
    for match in reversed(list(_SENTENCE_END.finditer(text))):
        tail = text[match.end() :]
        if re.search(r"\s", tail):
            return False
        if _is_end(text, match):
            return True
    return False


def _is_end(text: str, match: re.Match[str]) -> bool:
    before, mark = text[: match.start()], match.group(1)
    if _LIST_MARKER.match((before + mark).rsplit("\n", 1)[-1]):
        return False
    if mark != ".":
        return True
    word = re.split(r"[\s(\[\"']", before)[-1].lower()
    if word in _ABBREVIATIONS or (len(word) == 1 and word.isalpha()):
        return False
    return not (before[-1:].isdigit() and match.group(2) == "")


@dataclass(frozen=True)
class TurnBoundary:
    """A step is a whole turn: only stop tokens, stop strings and limits end it."""

    stop_strings: ClassVar[tuple[str, ...]] = ()

    def is_trigger(self, piece: str) -> bool:
        return False

    def verdict(self, text: str, num_tokens: int) -> StopReason | None:
        return None


@dataclass(frozen=True)
class AnswerOnly:
    """Another boundary of which only complete answers end anything: for sampling whole responses."""

    stop_strings: ClassVar[tuple[str, ...]] = ()

    boundary: Boundary

    def is_trigger(self, piece: str) -> bool:
        return self.boundary.is_trigger(piece)

    def verdict(self, text: str, num_tokens: int) -> StopReason | None:
        verdict = self.boundary.verdict(text, num_tokens)
        return None if verdict is StopReason.STEP else verdict


@dataclass(frozen=True)
class LineBoundary:
    """A step ends with a line that has words."""

    stop_strings: ClassVar[tuple[str, ...]] = ("\n",)

    def is_trigger(self, piece: str) -> bool:
        return "\n" in piece

    def verdict(self, text: str, num_tokens: int) -> StopReason | None:
        return StopReason.STEP if "\n" in text.lstrip() else None


BOUNDARIES: dict[str, Boundary] = {
    "math": MathBoundary(),
    "lines": LineBoundary(),
    "human_values": SentenceBoundary(),
    "sentence": SentenceBoundary(min_tokens=1),
    "tutoring": TurnBoundary(),
}


def boundary_for(domain: str, whole_answers: bool = False) -> Boundary:
    """The step boundary of a domain, or where its whole answers end; ValueError for a domain without one."""
    if domain not in BOUNDARIES:
        raise ValueError(unknown_name("domain", domain, BOUNDARIES))
    boundary = BOUNDARIES[domain]
    if whole_answers and not isinstance(boundary, TurnBoundary):
        return AnswerOnly(boundary)
    return boundary


@dataclass(frozen=True)
class StopRule:
    """How the next step of one answer may end: its boundary and its stop strings.

    `before` is the answer's text so far, so that a stop string that began in an earlier step is found, and
    `context_ids` are its last tokens: what new tokens say can depend on those before them. `begun` and
    `begun_tokens` are of the same step, where it is accepted token by token.
    """

    boundary: Boundary
    stop_strings: tuple[str, ...] = ()
    before: str = ""
    begun: str = ""
    begun_tokens: int = 0
    context_ids: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[Boundary, tuple[str, ...]]:
        """What the tokens after which it must be asked depend on."""
        return self.boundary, self.stop_strings

    def is_trigger(self, piece: str) -> bool:
        """Whether the text may end with a token of this text; `verdict` is asked after such tokens only."""
        return self.boundary.is_trigger(piece) or any(stop[-1] in piece for stop in self.stop_strings)

    def verdict(self, text: str, num_tokens: int) -> StopReason | None:
        """Why the step ends after this text of so many tokens, all new; None if it goes on."""
        if self.stop_strings:
            longest = max(map(len, self.stop_strings))
            seam = self.before[-(longest - 1) :] if longest > 1 else ""
            if any(stop in seam + text for stop in self.stop_strings):
                return StopReason.STRING
        return self.boundary.verdict(self.begun + text, self.begun_tokens + num_tokens)


# Byte-level BPE (GPT-2's) writes every byte as a character: a visible one as itself, the others from 256 on.
_VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + n): byte for n, byte in enumerate(_HIDDEN)}


class TokenTexts:
    """Texts of single tokens and of token sequences, and tables of the tokens that can end a step.

    What is kept is bounded: the text of every token, and a table each for a few boundaries and characters. A
    rule's table is put together from these, whatever stop strings it has.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._pieces = lru_cache(maxsize=1)(self._decode_vocabulary)
        self._fragments = lru_cache(maxsize=1)(lambda: self._where(lambda piece: INCOMPLETE in piece))
        self._can_end: Callable[..., Tensor] = lru_cache(maxsize=_BOUNDARIES_KEPT)(
            lambda boundary: self._where(boundary.is_trigger)
        )
        self._holding = lru_cache(maxsize=_CHARACTERS_KEPT)(
            lambda character: self._where(lambda piece: character in piece)
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of these tokens, special tokens included, spaces untouched."""
        return self.tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def words(self, token_ids: Sequence[int]) -> str:
        """Text of these tokens without special ones."""
        return str(
            self.tokenizer.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def piece(self, token_id: int) -> str:
        """The text of one token as it stands behind another one."""
        return self._pieces()[token_id]

    def name(self, token_id: int) -> str:
        """The tokenizer's own name of a token, which no other has."""
        return str(self.tokenizer.convert_ids_to_tokens(token_id))

    def raw_bytes(self, token_id: int) -> bytes:
        """The UTF-8 of one token, also of one that is only a part of a character; empty if its tokenizer does
        not say which part (byte-level BPE and SentencePiece do)."""
        piece = self.piece(token_id)
        if INCOMPLETE not in piece:
            return piece.encode()
        name = self.name(token_id)
        if fallback := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name):
            return bytes([int(fallback[1], 16)])
        return bytes(_BYTE_OF[character] for character in name) if set(name) <= _BYTE_OF.keys() else b""

    def decode_many(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of several sequences."""
        return self.tokenizer.batch_decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def table(self, rule: StopRule) -> Tensor:
        """[tokens] bool: tokens after which this rule must be asked.

        A character can end with any token that holds a fragment of one, so these count wherever something
        can end the step at all.
        """
        table = self._can_end(rule.boundary)
        for stop in rule.stop_strings:
            table = table | self._holding(stop[-1])
        if rule.stop_strings or bool(table.any()):
            table = table | self._fragments()
        return table

    def _where(self, holds: Callable[[str], bool]) -> Tensor:
        return torch.tensor([holds(piece) for piece in self._pieces()], dtype=torch.bool)

    def _decode_vocabulary(self) -> list[str]:
        """The text of every token as it stands behind another one: alone, SentencePiece tokens lose the space
        that they begin with."""
        anchor = self.tokenizer.encode("a", add_special_tokens=False)[-1:]
        head = self.decode(anchor)
        alone = self.decode_many([[number] for number in range(len(self.tokenizer))])
        behind = self.decode_many([[*anchor, number] for number in range(len(self.tokenizer))])
        return [
            both[len(head) :] if both.startswith(head) else piece
            for both, piece in zip(behind, alone, strict=True)
        ]


@dataclass(frozen=True)
class TextTail:
    """The end of an answer's tokens, to decode what follows them without decoding the whole again. `shown`:
    its text so far, without a character of which tokens are still to come."""

    token_ids: tuple[int, ...] = ()
    shown: str = ""

    def read(
        self, token_ids: Sequence[int], decode: Callable[[Sequence[int]], str], is_last: bool
    ) -> tuple[str, TextTail]:
        """The text that these tokens add, and the tail behind them. An incomplete character is held back
        until it is complete or, with `is_last`, nothing follows."""
        ids = (*self.token_ids, *token_ids)
        text = _complete(decode(ids), is_last)
        if text.startswith(self.shown):
            added = text[len(self.shown) :]
        elif not is_last:
            return "", TextTail(ids, self.shown)  # a run of bytes, all shown as incomplete until it is not
        else:
            added = text[_common_length(text, self.shown) :]
        if len(ids) > 2 * _WINDOW:
            window = ids[-_WINDOW:]
            end = _complete(decode(window), is_last)
            # Only a window that says the same as it does at the end of all: it may begin inside a character.
            if end and text.endswith(end):
                return added, TextTail(window, end)
        return added, TextTail(ids, text)


def _complete(text: str, is_last: bool) -> str:
    """Without the replacement characters at its end, which stand for what is incomplete."""
    return text if is_last else text.rstrip(INCOMPLETE)


def _common_length(text: str, other: str) -> int:
    pairs = enumerate(zip(text, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(text), len(other)))


def step_starts(token_ids: Sequence[int], boundary: Boundary, texts: TokenTexts) -> list[int]:
    """Where the steps of a response sampled as a whole begin: at 0 and behind its inner boundaries."""
    triggers = texts.table(StopRule(boundary))
    starts, num_read, text, tail = [0], 0, "", TextTail()
    for at in range(len(token_ids) - 1):
        if token_ids[at] < len(triggers) and triggers[token_ids[at]]:
            added, tail = tail.read(token_ids[num_read : at + 1], texts.decode, is_last=False)
            text, num_read = text + added, at + 1
            if boundary.verdict(text, at + 1 - starts[-1]) is StopReason.STEP:
                starts.append(at + 1)
                text = ""
    return starts


class TextStop:
    """The stop rules of several requests, in their order (None: no text ends that one)."""

    def __init__(self, texts: TokenTexts, rules: Sequence[StopRule | None]) -> None:
        self.texts, self.rules = texts, list(rules)

    def trigger_table(self, vocab_size: int) -> Tensor:
        """[vocab_size] bool, the union over requests; the model's vocabulary may be padded beyond the
        tokenizer's."""
        table = torch.zeros(vocab_size, dtype=torch.bool)
        for rule in {rule.key: rule for rule in self.rules if rule is not None}.values():
            known = self.texts.table(rule)[:vocab_size]
            table[: len(known)] |= known
        return table

    def verdicts(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]]) -> list[StopReason | None]:
        """For the new tokens of each suspect candidate of request rows[i]: why it ends here, or None."""
        rules = [self.rules[row] for row in rows]
        contexts = [() if rule is None else rule.context_ids for rule in rules]
        heads = self.texts.decode_many(contexts)
        wholes = self.texts.decode_many([(*c, *ids) for c, ids in zip(contexts, token_ids, strict=True)])
        verdicts: list[StopReason | None] = []
        for rule, ids, head, whole in zip(rules, token_ids, heads, wholes, strict=True):
            known = head.rstrip(INCOMPLETE)
            text = whole[len(known) :] if whole.startswith(known) else self.texts.decode(ids)
            verdicts.append(None if rule is None else rule.verdict(text, len(ids)))
        return verdicts
