"""Judges of the labelling tests, named by configurations as programs."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any


def coin(prompt: list[dict[str, Any]], steps: list[str], answer: str | None) -> bool:
    """A verdict that every character of the response has a say in. It is held while the file that
    LABEL_JUDGE_HOLD names is there and the folder that this file names has a chunk."""
    hold = Path(os.environ.get("LABEL_JUDGE_HOLD", "nowhere"))
    while hold.exists() and any(Path(hold.read_text()).glob("*.parquet")):
        time.sleep(0.02)
    return hashlib.sha256("".join(steps).encode()).digest()[0] % 2 == 0


def never(prompt: list[dict[str, Any]], steps: list[str], answer: str | None) -> float:
    return 0.0


def share_of_es(prompt: list[dict[str, Any]], steps: list[str], answer: str | None) -> float:
    text = "".join(steps)
    return text.count("e") / len(text)


def nothing(prompt: list[dict[str, Any]], steps: list[str], answer: str | None) -> None:
    return None


def reward(prompt: list[dict[str, Any]], steps: list[str]) -> float:
    return 0.1 * len(steps)
