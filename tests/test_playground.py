"""The playground in a real browser: headless Chromium on a served tiny model, over a socket.

Skipped where no Chromium is installed (Debian's package `chromium`).
"""

from __future__ import annotations

import copy
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import pytest
import tiny_guided
import torch
import uvicorn
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from mahalo_ray.config import SamplingConfig, ServeConfig
from mahalo_ray.decoding import GuidedDecoder
from mahalo_ray.models.multi_head import MultiHeadCausalLM
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.serving.app import create_app
from mahalo_ray.serving.backend import GuidedBackend
from mahalo_ray.serving.service import ChatService, Defaults, KeyDigest, ServiceSettings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.slow
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: install the package 'chromium'"
)

TWO = {"accuracy": "value", "engagement": "probability"}
THREE = {"accuracy": "value", "engagement": "probability", "brevity": "value"}
QUESTION = "What is 2 + 3?"


@dataclass
class Served:
    """A tiny model served over a real socket, by uvicorn in a thread of this process."""

    kinds: dict[str, str]
    key: str | None = None
    port: int = 0

    def __enter__(self) -> Served:
        torch.manual_seed(0)
        base, scorer = copy.deepcopy((tiny_guided.model(), tiny_guided.model(1)))
        policy = MultiHeadCausalLM.from_base(base, tuple(self.kinds), noise=0.3).eval()
        reward = ProcessRewardModel.from_base(
            scorer, self.kinds, tuning="frozen", tokenizer=tiny_guided.tokenizer(), step_separator="\n\n"
        )
        decoder = GuidedDecoder(policy, reward, "tutoring", tiny_guided.tokenizer(), 64)
        config = ServeConfig(
            max_ongoing_requests=2, max_queued_requests=0, max_new_tokens=64, max_candidates=4, max_messages=8
        )
        settings = ServiceSettings(
            config,
            "mahalo",
            Defaults(num_candidates=3, sampling=SamplingConfig(max_new_tokens=24)),
            None if self.key is None else KeyDigest.of(self.key),
        )
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        app = create_app(ChatService(GuidedBackend(decoder), settings))
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, args=([listener],))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def two() -> Iterator[Served]:
    with Served(TWO) as served:
        yield served


@pytest.fixture(scope="module")
def three() -> Iterator[Served]:
    with Served(THREE) as served:
        yield served


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    opened = browser.new_context(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(20_000)
    yield opened
    opened.close()


def visit(context: BrowserContext, url: str, complaints: list[str] | None = None) -> Page:
    """The page, once it knows its model; what its console reports as an error goes to `complaints`."""
    page = context.new_page()
    if complaints is not None:
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
    page.goto(url)
    expect(page.locator("#about")).to_contain_text("mahalo")
    return page


def ask(page: Page, question: str = QUESTION) -> None:
    page.fill("#message", question)
    page.press("#message", "Enter")
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator(".turn .question").last).to_contain_text(question)


def last_answers(page: Page) -> list[str]:
    return page.locator(".turn").last.locator(".answer > .text").all_inner_texts()


# -- the files -----------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_elsewhere_and_never_reads_text_as_html() -> None:
    folder = resources.files("mahalo_ray.serving").joinpath("playground")
    texts = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}
    assert set(texts) >= {"index.html", "style.css", "main.js"}
    for name, text in texts.items():
        outside = text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn|@import|\burl\([^)]", outside), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), name
    assert not re.search(r"<style|\sstyle=|<script>|\son\w+=", texts["index.html"])


# -- one question at several balances ------------------------------------------------------------------------


@needs_browser
def test_one_question_is_answered_at_two_balances_and_one_of_the_answers_goes_on(
    context: BrowserContext, two: Served
) -> None:
    complaints: list[str] = []
    page = visit(context, two.url, complaints)
    sent: list[dict[str, Any]] = []
    page.on("request", lambda request: request.method == "POST" and sent.append(request.post_data_json))
    ask(page)
    assert [body["objectives"]["accuracy"] for body in sent] == [0.9, 0.1]
    assert sent[0]["seed"] == sent[1]["seed"]
    assert all(body["guidance"] == body["objectives"] for body in sent)
    answers = last_answers(page)
    assert len(answers) == 2
    assert answers[0] != answers[1]
    expect(page.locator(".answer").nth(0)).to_contain_text("In the conversation")
    page.get_by_role("button", name="Take this one instead: Answer B").click()
    expect(page.locator(".answer.taken")).to_contain_text(answers[1].strip())
    focused = page.evaluate("document.activeElement.textContent")
    assert "In the conversation" in focused
    sent.clear()
    ask(page, "And 4 + 4?")
    history = [message["content"].strip() for message in sent[0]["messages"]]
    assert history == [QUESTION, answers[1].strip(), "And 4 + 4?"]
    # The answer that was not taken has stepped back.
    expect(page.locator(".turn").first.get_by_text("1 other answer to this question")).to_be_visible()
    assert complaints == []


@needs_browser
def test_differences_are_words_that_not_all_answers_have(context: BrowserContext, two: Served) -> None:
    page = visit(context, two.url)

    def marked(*texts: str) -> Any:
        return page.evaluate(
            """async (texts) => {
                const {differences} = await import("/playground/differences.js");
                const shown = (run) => run.differs ? `[${run.text}]` : run.text;
                return differences(texts).marked.map((runs) => runs.map(shown).join(""));
            }""",
            list(texts),
        )

    assert marked("First, 4 + 3 = 7.", "First, 4 + 3 = 8.") == ["First, 4 + 3 = [7].", "First, 4 + 3 = [8]."]
    assert marked("a b c", "a b c") == ["a b c", "a b c"]
    assert marked("Good try! Add two.", "Add two.") == ["[Good try!] Add two.", "Add two."]
    assert marked("a b", "a c", "a b") == ["a [b]", "a [c]", "a [b]"]


@needs_browser
def test_a_slider_between_two_objectives_sets_words_and_choice_together(
    context: BrowserContext, two: Served
) -> None:
    page = visit(context, two.url)
    slider = page.get_by_role("slider", name="Balance A, from accuracy to engagement")
    slider.focus()
    for _ in range(15):
        page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "accuracy 75\u00a0%, engagement 25\u00a0%"
    page.get_by_text("Advanced", exact=True).click()
    page.get_by_label("A balance of its own for picking among candidates").check()
    page.get_by_role("slider", name="Balance, from accuracy to engagement").fill("40")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page)
    body = request.value.post_data_json
    assert body["objectives"] == {"accuracy": 0.75, "engagement": 0.25}
    assert body["guidance"] == {"accuracy": 0.6, "engagement": 0.4}


@needs_browser
def test_three_objectives_are_a_triangle_with_sliders_for_the_keyboard(
    context: BrowserContext, three: Served
) -> None:
    complaints: list[str] = []
    page = visit(context, three.url, complaints)
    box = page.locator("#balance .triangle").bounding_box()
    assert box is not None
    # Into the lower right corner: all of the third objective, for balance A, which stands at the top.
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * 22 / 196)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.95, box["y"] + box["height"] * 0.97, steps=4)
    page.mouse.up()
    expect(page.locator(".tab").first).to_contain_text("0 / 0 / 100")
    page.get_by_role("slider", name="accuracy").fill("40")
    expect(page.locator(".tab").first).to_contain_text("40 / 0 / 60")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page)
    assert request.value.post_data_json["objectives"] == {"accuracy": 0.4, "engagement": 0, "brevity": 0.6}
    assert complaints == []


# -- what can go wrong ---------------------------------------------------------------------------------------


@needs_browser
def test_a_refused_answer_can_be_tried_again(context: BrowserContext, two: Served) -> None:
    page = visit(context, two.url)
    page.get_by_role("button", name="Add a third balance").click()
    ask(page)  # the server has two places
    failed = page.locator(".failure")
    expect(failed).to_have_count(1)
    expect(failed).to_contain_text("busy with other people")
    failed.get_by_role("button", name="Try again").focus()
    page.keyboard.press("Enter")
    expect(failed).to_have_count(0)
    expect(page.locator("#stop")).to_be_hidden()
    assert all(text.strip() for text in last_answers(page))
    assert page.evaluate("document.activeElement !== document.body")


@needs_browser
def test_a_conversation_that_is_too_long_offers_a_new_one(context: BrowserContext, two: Served) -> None:
    page = visit(context, two.url)
    page.fill("#message", "long " * 300)
    page.press("#message", "Enter")
    expect(page.locator(".failure").first).to_contain_text("too long for the model")
    page.get_by_role("button", name="New conversation with this question").first.click()
    assert page.input_value("#message").startswith("long long")
    assert page.evaluate("document.activeElement.id") == "message"
    ask(page)
    assert len(last_answers(page)) == 2


@needs_browser
def test_a_server_that_is_gone_can_be_asked_again_when_it_is_back(context: BrowserContext) -> None:
    with Served(TWO) as served:
        page = visit(context, served.url)
        ask(page)
        before = last_answers(page)
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator("#status")).to_contain_text("The server cannot be reached")
    assert last_answers(page) == before
    with Served(TWO, port=served.port):
        page.get_by_role("button", name="Answer again").click()
        expect(page.locator("#status")).to_have_text("")
        assert last_answers(page) == before  # equal seeds


@needs_browser
def test_a_reload_keeps_the_conversation_and_the_settings(context: BrowserContext, two: Served) -> None:
    page = visit(context, two.url)
    page.get_by_role("slider", name="Balance B, from accuracy to engagement").fill("60")
    ask(page)
    page.fill("#message", "half a thou")
    before = last_answers(page)
    page.locator("#message").blur()
    page.reload()
    expect(page.locator(".turn")).to_have_count(1)
    assert last_answers(page) == before
    assert page.input_value("#message") == "half a thou"
    assert page.get_by_role("slider", name="Balance B, from accuracy to engagement").input_value() == "60"


@needs_browser
@pytest.mark.parametrize(
    ("seed", "said"),
    [("9007199254740993", "cannot send numbers above"), ("-1", "only digits"), ("1e3", "only digits")],
)
def test_a_seed_that_cannot_be_sent_is_said(
    context: BrowserContext, two: Served, seed: str, said: str
) -> None:
    page = visit(context, two.url)
    page.get_by_text("Advanced", exact=True).click()
    page.get_by_label("Seed").fill(seed)
    expect(page.locator("#seed-note")).to_contain_text(said)
    page.fill("#message", QUESTION)
    page.click("#send")
    expect(page.locator("#status")).to_contain_text("Nothing was asked")
    assert page.evaluate("document.activeElement.id") == "seed"
    assert page.locator(".turn").count() == 0
    page.get_by_label("Seed").fill("")
    expect(page.locator("#seed-note")).to_contain_text("a random seed")
    page.click("#send")
    expect(page.locator(".turn")).to_have_count(1)


@needs_browser
def test_a_key_is_asked_for_and_kept_out_of_storage(context: BrowserContext) -> None:
    with Served(TWO, key="sesame") as served:
        page = context.new_page()
        page.goto(served.url)
        expect(page.locator("#status")).to_contain_text("needs a key")
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_contain_text("does not accept this key")
        page.fill("#key", "sesame")
        page.get_by_role("button", name="Use this key").click()
        expect(page.locator("#key-form")).to_be_hidden()
        ask(page)
        assert "sesame" not in page.evaluate("JSON.stringify(sessionStorage) + JSON.stringify(localStorage)")
        assert all(text.strip() for text in last_answers(page))
