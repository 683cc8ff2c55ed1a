"""What the documentation names is there: files, verbs of the command, imports."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from pkgutil import resolve_name

import pytest
from typer.main import get_command

from mahalo_ray.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def text(request: pytest.FixtureRequest) -> str:
    return request.param.read_text(encoding="utf-8")


def test_files_that_a_page_names_exist(text: str) -> None:
    named = set(re.findall(r"`([\w./-]+\.(?:py|yaml|jsonl|html))`", text))
    named |= set(
        re.findall(r"\b((?:mahalo_ray|examples|benchmarks|jobs|cluster|tests)/[\w./-]+\.\w+)\b", text)
    )
    here = [name for name in named if "/" in name and not name.startswith("runs/")]
    missing = [n for n in here if not (ROOT / n).exists() and not (ROOT / "mahalo_ray" / n).exists()]
    assert missing == []


def test_verbs_that_a_page_names_exist(text: str) -> None:
    verbs = set(get_command(app).commands)  # type: ignore[attr-defined]
    spans = re.findall(r"`([^`\n]+)`", text) + re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    named = {verb for span in spans for verb in re.findall(r"\bmahalo ([a-z]+)\b", span)}
    assert named <= verbs


def test_imports_that_a_page_shows_work(text: str) -> None:
    for module, names in re.findall(r"^from (mahalo_ray[\w.]*) import ([\w, ]+)$", text, re.MULTILINE):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_code_that_a_page_names_exists(text: str) -> None:
    for name in re.findall(r"`(mahalo_ray(?:\.\w+)+)\b", text):
        resolve_name(name)
