"""Where a step of reasoning, of an answer or of a dialogue ends, read off the text sampled so far."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Protocol

from mahalo_ray.decoding.candidates import StopReason
from mahalo_ray.objectives import unknown_name


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


BOUNDARIES: dict[str, Boundary] = {
    "math": MathBoundary(),
    "human_values": SentenceBoundary(),
    "tutoring": TurnBoundary(),
}


def boundary_for(domain: str) -> Boundary:
    """The step boundary of a domain; ValueError for a domain without one."""
    if domain not in BOUNDARIES:
        raise ValueError(unknown_name("domain", domain, BOUNDARIES))
    return BOUNDARIES[domain]
