"""Maths: the final answer of a response, and whether it equals the reference (by the library math-verify)."""

from __future__ import annotations

import logging
import multiprocessing
import re
import threading
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache

logging.getLogger("math_verify").setLevel(logging.ERROR)

TIMEOUT_S = 5  # of parsing and of comparing, each
_MARKED = re.compile(r"(?:^|\n)\s*(?:####|A:)[ \t]*(.+)")
_INTEGER = re.compile(r"[+-]?\d{1,18}")
_BOX = "\\boxed{"


def final_answer(text: str) -> str | None:
    """What a response marks as its answer: the last \\boxed{...}, else the last `#### n` (GSM8K) or `A: n`
    line; None if it marks none."""
    at = text.rfind(_BOX)
    if at >= 0:
        inside = _balanced(text[at + len(_BOX) :])
        if inside is not None:
            return inside.strip()
    marked = _MARKED.findall(text)
    return marked[-1].strip() if marked else None


def is_correct(response: str, reference: str) -> bool:
    """Whether the response's final answer equals that of the reference (an answer, or a worked solution).

    A response that marks no answer is judged by the last expression math-verify finds in it. What takes
    longer than TIMEOUT_S to parse or compare counts as wrong. ValueError for a reference without an answer.
    """
    given, wanted = final_answer(response), final_answer(reference)
    wanted = reference.strip() if wanted is None else wanted
    if not wanted:
        raise ValueError("the reference answer is empty")
    if given is not None:
        plain = _plain(given), _plain(wanted)
        if plain[0] == plain[1]:
            return True
        if all(_INTEGER.fullmatch(number) for number in plain):
            return int(plain[0]) == int(plain[1])  # needs no algebra
    # math-verify's timeouts are signals, which only a main thread receives.
    if threading.current_thread() is threading.main_thread():
        return _equal(response, given, wanted)
    return _other_process().submit(_equal, response, given, wanted).result()


def _equal(response: str, given: str | None, wanted: str) -> bool:
    from math_verify import parse, verify  # loads sympy: half a second

    answer = _boxed(given) if given is not None else response
    found = parse(answer, parsing_timeout=TIMEOUT_S)
    return bool(verify(parse(_boxed(wanted), parsing_timeout=TIMEOUT_S), found, timeout_seconds=TIMEOUT_S))


def _boxed(answer: str) -> str:
    return f"${_BOX}{answer}}}$"


def _plain(answer: str) -> str:
    """The answer without what people put around a number."""
    return re.sub(r"[\s$,%]|\\[$!,%]|\.0*$", "", answer)


def _balanced(text: str) -> str | None:
    """The text up to the brace that closes it; None if none does. \\{ and \\} are characters, not groups."""
    depth, at = 1, 0
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[:at]
        at += 1
    return None


@lru_cache(maxsize=1)
def _other_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
