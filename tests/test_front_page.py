"""The page of `mahalo front` for three objectives in a real browser: headless Chromium, no server.

Skipped where no Chromium is installed (Debian's package `chromium`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from evaluated_run import STUDENTS
from playwright.sync_api import ConsoleMessage, Error, Page, expect, sync_playwright

from mahalo_ray.evaluation.results import MethodResult
from mahalo_ray.objectives import Weights
from mahalo_ray.sweeps import make_sampler
from mahalo_ray.sweeps.front_report import FrontLine, FrontMember, measure_fronts, write_fronts

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NAMES = ("helpful", "honest", "truthful")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: install the package 'chromium'"),
]


def line(name: str, points: int, is_line: bool = True) -> FrontLine:
    """A lattice of weights on a part of a sphere, the best on one objective at its corner, with noise."""
    members = []
    for number, weights in enumerate(make_sampler("lattice", NAMES, 6).ask()[:points]):
        vector = np.array(weights.over(NAMES)) + 0.1
        reached = vector / np.linalg.norm(vector)
        noise = np.random.default_rng(number).normal(0, 0.05, (3, STUDENTS))
        values = dict(zip(NAMES, (reached[:, None] + noise).tolist(), strict=True))
        result = MethodResult(
            name=f"{name} {number}",
            kind="weights" if is_line else "sft",
            weights=dict(weights) if is_line else None,
            student_ids=list(range(STUDENTS)),
            values=values,
            malformed_rate=0.0,
            tokens=1000,
        )
        turn = {"speaker": "tutor", "content": f"said by {name} {number}"}
        sample = {"topic": "tides", "outcome": dict.fromkeys(NAMES, 0.5), "turns": [turn]}
        members.append(FrontMember(result, (sample,)))
    return FrontLine(name, "runs/values", tuple(members), is_line)


@pytest.fixture(scope="module")
def page_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    document = measure_fronts([line("lattice", 6), line("model", 1, is_line=False)], resamples=50)
    files = write_fronts(str(tmp_path_factory.mktemp("front")), document)
    assert Path(files.picture).read_bytes().startswith(b"\x89PNG")
    return Path(files.page).as_uri()


@pytest.fixture(scope="module")
def page(page_url: str) -> Iterator[Page]:
    """The page on a phone in the dark; whatever it logs is an error."""
    logged: list[str] = []

    def note(said: ConsoleMessage | Error) -> None:
        logged.append(str(said))

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        opened.on("console", note)
        opened.on("pageerror", note)
        opened.goto(page_url)
        yield opened
        assert logged == []
        browser.close()


def places(page: Page) -> list[str]:
    """Where the points of the space are drawn."""
    marks = page.locator(".space circle").all()
    return [f"{mark.get_attribute('cx')} {mark.get_attribute('cy')}" for mark in marks]


def test_three_objectives_are_readable_on_a_phone(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    sizes = page.locator(".picture svg text").evaluate_all(
        "all => all.map(one => { const m = one.getScreenCTM(); return Math.hypot(m.a, m.b)"
        " * parseFloat(one.getAttribute('font-size')); })"
    )
    assert len(sizes) > 20 and min(sizes) > 10
    for kind, marks in (("space", 7), ("triangle", 6)):
        circles = page.locator(f".{kind} circle:not([fill=none])")
        assert circles.count() == marks  # one method has no weights, and no place in their triangle
    outside = page.locator(".space circle").evaluate_all(
        "all => all.filter(one => { const a = one.getBoundingClientRect(), b = one.closest('figure')"
        ".getBoundingClientRect(); return a.left < b.left || a.right > b.right || a.top < b.top })"
    )
    assert outside == []


def test_the_space_is_turned_by_keys_and_by_dragging(page: Page) -> None:
    space = page.locator(".space svg")
    before = places(page)
    space.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    assert places(page) != before
    page.keyboard.press("Home")
    assert places(page) == before
    box = space.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 90, box["y"] + 40, steps=3)
    page.mouse.up()
    assert places(page) != before
    space.focus()
    page.keyboard.press("Home")


def test_a_point_is_chosen_by_keyboard_and_coloured_by_what_it_reached(page: Page) -> None:
    button = page.get_by_role("button", name="lattice 0")
    button.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#nearest")).to_contain_text("lattice 0 is the nearest")
    expect(page.locator("#nearest")).to_contain_text("said by lattice 0")
    corner = next(name for name in NAMES if _weights_of(page)[name] == 1.0)
    fills = "all => new Set(all.map(one => one.getAttribute('fill'))).size"
    assert page.locator(".triangle circle:not([fill=none])").evaluate_all(fills) == 1
    page.get_by_label("colour by").select_option(corner)
    assert page.locator(".triangle circle:not([fill=none])").evaluate_all(fills) > 3
    page.get_by_label(f"weight of {corner}").fill("0")
    expect(page.locator("#nearest")).not_to_contain_text("lattice 0 is the nearest")


def _weights_of(page: Page) -> Weights:
    values = page.locator("#weights input").evaluate_all("all => all.map(one => [one.name, +one.value])")
    return Weights(dict(values))
