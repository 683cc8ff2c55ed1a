"""The playground in a real browser: headless Chromium on a served tiny model, over a socket.

Skipped where no Chromium is installed (Debian's package `chromium`). The check by axe-core is skipped where
`npm install axe-core` was not run in the repository's folder.
"""

from __future__ import annotations

import copy
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import tiny_guided
import torch
import uvicorn
from evaluated_run import run_of, table_of
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright
from served_app import kept_port

from mahalo_ray.config import SamplingConfig, ServeConfig
from mahalo_ray.decoding import GuidedDecoder
from mahalo_ray.domains.tutoring.student import TutoringEpisode
from mahalo_ray.models.multi_head import MultiHeadCausalLM
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.objectives import Weights
from mahalo_ray.serving.api_key import KeyDigests
from mahalo_ray.serving.app import create_app
from mahalo_ray.serving.backend import GuidedBackend
from mahalo_ray.serving.front import Measurements
from mahalo_ray.serving.service import ChatService, Defaults, ServiceSettings
from mahalo_ray.serving.simulated import SimulatedStudents
from mahalo_ray.sweeps import portfolio

LONG_MS = 240_000  # longer than a slow machine takes: no verdict depends on it
expect.set_options(timeout=LONG_MS)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.slow
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: install the package 'chromium'"
)

TWO = {"accuracy": "value", "engagement": "probability"}
THREE = {"accuracy": "value", "engagement": "probability", "brevity": "value"}
QUESTION = "What is 2 + 3?"
STUDENTS = SimulatedStudents(TutoringEpisode.from_seed, (3,))
AXE = Path(__file__).parent.parent / "node_modules" / "axe-core" / "axe.min.js"
# What a page draws is the same in every run: the order of a pair, and the seed where its field is empty.
DRAWS = """{
    let state = 7;
    const draw = () => (state = (state * 48271) % 2147483647);
    Math.random = () => draw() / 2147483647;
    crypto.getRandomValues = (array) => array.map((_, n, all) => (all[n] = draw())) && array;
}"""
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


@dataclass
class Served:
    """A tiny model served over a real socket, by uvicorn in a thread of this process; without objectives it
    has a single head and no reward model."""

    kinds: dict[str, str]
    key: str | None = None
    port: int = 0
    measured: Measurements | None = None

    def __enter__(self) -> Served:
        torch.manual_seed(0)
        base, scorer = copy.deepcopy((tiny_guided.model(), tiny_guided.model(1)))
        if self.kinds:
            policy = MultiHeadCausalLM.from_base(base, tuple(self.kinds), noise=0.3).eval()
            reward = ProcessRewardModel.from_base(
                scorer, self.kinds, tuning="frozen", tokenizer=tiny_guided.tokenizer(), step_separator="\n\n"
            )
            decoder = GuidedDecoder(policy, reward, "tutoring", tiny_guided.tokenizer(), 64)
        else:
            decoder = GuidedDecoder(base, [], "tutoring", tiny_guided.tokenizer(), 64)
        limits = {"max_ongoing_requests": 2, "max_queued_requests": 4, "max_new_tokens": 64}
        config = ServeConfig(**limits, max_candidates=4, max_messages=8, request_timeout_s=LONG_MS / 1000)
        settings = ServiceSettings(
            config,
            "mahalo",
            Defaults(num_candidates=3, sampling=SamplingConfig(max_new_tokens=24)),
            None if self.key is None else KeyDigests.of(self.key),
            {"accuracy": "does the student solve the problem"},
            (QUESTION, *STUDENTS.openings),
            STUDENTS,
        )
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        self._app = create_app(ChatService(GuidedBackend(decoder), settings, self.measured))
        self._server = uvicorn.Server(
            uvicorn.Config(self._app, log_level="error", timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(target=self._server.run, args=([listener],))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Every place for a request is taken."""
        worker = self._app.state.services.first.worker
        while worker.num_held:  # by what was answered just now
            time.sleep(0.01)
        with ExitStack() as held:
            for _ in range(6):
                held.enter_context(worker.reserve())
            yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, timeout=LONG_MS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def two() -> Iterator[Served]:
    """Two objectives, with the measurements of a made-up run and a portfolio of its sweep."""
    methods = run_of()
    swept = [method for method in methods if method.kind == "weights" and method.weights]
    values = [[sum(method.values[name]) / len(method.values[name]) for name in TWO] for method in swept]
    members = portfolio(values, [Weights(method.weights) for method in swept], size=2)
    with Served(TWO, measured=Measurements(table_of(methods), members)) as served:
        yield served


@pytest.fixture(scope="module")
def three() -> Iterator[Served]:
    with Served(THREE) as served:
        yield served


@pytest.fixture(scope="module")
def scripts(browser: Browser, two: Served) -> Iterator[Page]:
    """A page whose modules are called directly."""
    context = open_context(browser)
    yield visit(context, two.url)
    context.close()


def open_context(browser: Browser, **options: Any) -> BrowserContext:
    opened = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    opened.set_default_timeout(LONG_MS)
    opened.add_init_script(DRAWS)
    return opened


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    opened = open_context(browser)
    yield opened
    opened.close()


def visit(context: BrowserContext, url: str, complaints: list[str] | None = None) -> Page:
    """The page, once it knows its model; what its console reports as an error goes to `complaints`."""
    page = context.new_page()
    if complaints is not None:
        page.on("pageerror", lambda error: complaints.append(str(error)))

        def note(said: ConsoleMessage) -> None:
            # Without a front the answer is 404, which the browser reports on its own.
            if said.type == "error" and not said.text.startswith("Failed to load resource"):
                complaints.append(said.text)

        page.on("console", note)
    page.goto(url)
    expect(page.locator("#about")).to_contain_text("Model")
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
    expect(page.locator(":focus")).to_contain_text("In the conversation")
    sent.clear()
    ask(page, "And 4 + 4?")
    history = [message["content"].strip() for message in sent[0]["messages"]]
    assert history == [QUESTION, answers[1].strip(), "And 4 + 4?"]
    # The answer that was not taken has stepped back.
    expect(page.locator(".turn").first.get_by_text("1 other answer to this question")).to_be_visible()
    assert complaints == []


@needs_browser
def test_differences_are_words_that_not_all_answers_have(scripts: Page) -> None:

    def marked(*texts: str) -> Any:
        return scripts.evaluate(
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
def test_of_merged_weights_the_nearest_write_and_the_balance_chooses(scripts: Page) -> None:
    body = scripts.evaluate(
        """async () => {
          const set = await import("/playground/settings.js");
          const entry = {
            id: "m", objectives: ["a", "b"], guidance_objectives: ["a", "b"], limits: {max_strength: 1},
            merged_weights: [{a: 0.5, b: 0.5}, {a: 1}], defaults: {num_candidates: 2},
          };
          const model = set.servedModel(entry);
          return set.requestBody(model, set.defaultSettings(model), [0.9, 0.1], [], 1);
        }"""
    )
    assert body["objectives"] == {"a": 1} and body["guidance"] == {"a": 0.9, "b": 0.1}


@needs_browser
def test_three_objectives_are_a_triangle_with_sliders_for_the_keyboard(
    context: BrowserContext, three: Served
) -> None:
    complaints: list[str] = []
    page = visit(context, three.url, complaints)
    box = page.locator("#balance .triangle").bounding_box()
    assert box is not None
    # Into the lower right corner: all of the third objective, for balance A, which stands at the top.
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * 34 / 214)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.94, box["y"] + box["height"] * 0.883, steps=4)
    page.mouse.up()
    expect(page.locator(".tab").first).to_contain_text("0 / 0 / 100")
    page.get_by_role("slider", name="accuracy").fill("40")
    expect(page.locator(".tab").first).to_contain_text("40 / 0 / 60")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page)
    assert request.value.post_data_json["objectives"] == {"accuracy": 0.4, "engagement": 0, "brevity": 0.6}
    assert complaints == []


@needs_browser
def test_moving_a_balance_answers_again_only_where_it_moved(context: BrowserContext, two: Served) -> None:
    page = visit(context, two.url)
    ask(page)
    first = last_answers(page)
    page.get_by_label("Answer again as I move").check()
    sent: list[dict[str, Any]] = []
    page.on("request", lambda request: request.method == "POST" and sent.append(request.post_data_json))
    slider = page.get_by_role("slider", name="Balance A, from accuracy to engagement")
    with page.expect_response("**/v1/chat/completions"):
        slider.fill("60")
    expect(page.locator("#stop")).to_be_hidden()
    assert [body["objectives"]["accuracy"] for body in sent] == [0.4]
    assert last_answers(page)[1] == first[1]
    slider.fill("90")  # where B stands: its answer is known
    expect(page.locator(".comparison")).to_contain_text("All balances lead to the same words here")
    assert last_answers(page) == [first[1], first[1]]
    assert len(sent) == 1
    assert page.locator(".turn").count() == 1


@needs_browser
def test_a_model_without_objectives_just_answers(context: BrowserContext) -> None:
    complaints: list[str] = []
    with Served({}) as served:
        page = visit(context, served.url, complaints)
        expect(page.locator("#mode-hint")).to_contain_text("no goals to balance")
        ask(page)
        assert len(last_answers(page)) == 1
        expect(page.locator("#balance")).to_be_hidden()
    assert complaints == []


# -- what was measured ---------------------------------------------------------------------------------------


@needs_browser
def test_a_point_of_the_front_sets_the_selected_balance_and_the_portfolio_follows(
    context: BrowserContext, two: Served
) -> None:
    complaints: list[str] = []
    page = visit(context, two.url, complaints)
    points = page.get_by_role("radio", name=re.compile("taken as sampled: reached accuracy"))
    expect(points).to_have_count(7)  # the sweep's five and the two heads; the model before has no balance
    slider = page.get_by_role("slider", name="Balance B, from accuracy to engagement")
    slider.focus()  # selects B
    portfolio = page.locator("#portfolio")
    expect(portfolio).to_contain_text(re.compile("For balance B the portfolio has .* Certified:"))
    with page.expect_response("**/v1/portfolio?*"):
        page.get_by_role("radio", name=re.compile(r"^accuracy 75\s%, engagement 25")).click(force=True)
    assert slider.input_value() == "25"
    expect(portfolio).to_contain_text(re.compile("For balance B the portfolio has .* Certified:"))
    before = slider.input_value()
    page.keyboard.press("Tab")
    chosen = page.get_by_role("radio", name=re.compile(r"^accuracy 75\s%"), checked=True)
    chosen.focus()
    with page.expect_response("**/v1/portfolio?*"):
        page.keyboard.press("ArrowRight")
    assert slider.input_value() != before
    page.get_by_role("button", name="Use this member").click()
    expect(page.locator("#status")).to_contain_text("Balance B is now")
    assert complaints == []


@needs_browser
def test_without_measurements_there_is_no_picture(context: BrowserContext, three: Served) -> None:
    page = visit(context, three.url)
    expect(page.get_by_role("button", name=QUESTION)).to_be_visible()
    expect(page.locator("#front-part")).to_be_hidden()


# -- scores and choices --------------------------------------------------------------------------------------


@needs_browser
def test_bars_of_an_objective_have_the_same_ends_everywhere(context: BrowserContext, two: Served) -> None:
    page = visit(context, two.url)
    ask(page)
    for summary in page.get_by_text("and why this one").all():
        summary.click()
    bars = page.evaluate(
        """() => [...document.querySelectorAll(".scores dt")].map((name) => {
            const track = name.nextElementSibling, fill = track.firstElementChild;
            const value = Number(track.nextElementSibling.textContent.replace("\u2212", "-"));
            return [name.textContent, value, parseFloat(fill.style.left), parseFloat(fill.style.width)];
        })"""
    )
    assert len(bars) == 2 * (2 + 2 * 3)  # two objectives: two answers, and three candidates of each
    for name in TWO:
        own = [bar for bar in bars if bar[0] == name]
        low = min(0.0, *(bar[1] for bar in own))
        # One scale: equal differences of scores are equal differences of lengths.
        lengths = {round(width / abs(value)) for _, value, _, width in own if abs(value) > 0.05}
        assert max(lengths) - min(lengths) <= 1, (name, low, own)


@needs_browser
@pytest.mark.parametrize(
    ("totals", "texts", "chosen", "said"),
    [
        ([1.0, 2.0, 2.0], "abc", 1, "same total as candidate 3; of equal totals the one sampled first"),
        (
            [1.5, 2.0, 2.0],
            "abb",
            1,
            "Candidate 3 is the same text, sampled again. It has the highest total, 2.00",
        ),
        ([1.6842, 1.6821], "ab", 0, "highest total, 1.684; next comes candidate 2 with 1.682"),
        ([1.0, 3.0], ["a", " "], 0, "says nothing at all"),
    ],
)
def test_the_page_says_why_a_candidate_was_chosen(
    scripts: Page, totals: list[float], texts: str, chosen: int, said: str
) -> None:
    candidates = [
        {"text": text, "total": total, "scores": {"accuracy": total / 4}}
        for text, total in zip(texts, totals, strict=True)
    ]
    told = scripts.evaluate(
        """async (step) => {
            const {whyChosen} = await import("/playground/answers.js");
            return whyChosen(step, "argmax", {accuracy: 1});
        }""",
        {"candidates": candidates, "chosen": chosen},
    )
    assert said in told


@needs_browser
def test_which_do_you_prefer_learns_a_balance(context: BrowserContext, two: Served) -> None:
    page = visit(context, two.url)
    page.get_by_text("Which do you prefer?").click()
    ask(page)
    assert "%" not in page.locator(".answers").inner_text()  # the balances stay hidden until the choice
    page.get_by_role("button", name="I prefer the second").click()
    note = page.locator(".preference")
    expect(note).to_contain_text("After 1 choice")
    expect(page.locator(".answer.taken")).to_have_count(1)
    expect(page.locator(":focus")).to_have_text("Another pair")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="No difference to me").click()
    expect(note).to_contain_text("After 2 choices")
    page.get_by_role("button", name="Use this balance").click()
    expect(page.get_by_role("slider", name="Balance, from accuracy to engagement")).to_be_visible()


@needs_browser
def test_a_simulated_student_goes_on_with_the_conversation_that_it_began(
    context: BrowserContext, two: Served
) -> None:
    complaints: list[str] = []
    page = visit(context, two.url, complaints)
    student = page.get_by_role("button", name="Let the student answer")
    ask(page)
    expect(student).to_be_hidden()  # no student said this
    page.click("#clear")
    (opening,) = STUDENTS.openings
    page.get_by_role("button", name=opening).click()
    expect(page.locator("#stop")).to_be_hidden()
    taken = page.locator(".turn").last.locator(".answer.taken > .text").inner_text()
    twin = TutoringEpisode.from_seed(3)
    student.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(2)
    said = page.locator(".turn").last.locator(".question")
    expect(said).to_contain_text("Simulated student")
    expect(said.locator(".text")).to_have_text(twin.hear(taken))
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator("#lesson")).to_contain_text(f"engagement {twin.outcome()['engagement']:.2f}")
    page.reload()
    expect(page.locator("#lesson")).to_contain_text("The lesson so far")
    expect(student).to_be_visible()
    assert not complaints


@needs_browser
def test_choices_lead_to_the_balance_of_who_makes_them(scripts: Page) -> None:
    """A person whose balance is 80 : 20 decides between pairs that the page chooses."""
    learned = scripts.evaluate(
        """async () => {
            const {belief, choiceOf, nextPair} = await import("/playground/preference.js");
            const names = ["a", "b"], choices = [], worth = ({a, b}) => 0.8 * a + 0.2 * b;
            let state = 7;
            const random = () => (state = (state * 48271) % 2147483647) / 2147483647;
            const before = belief(names, choices);
            for (let n = 0; n < 40; n++) {
                // Answers reach what their balances ask for, along a curved front, with some luck.
                const [first, second] = nextPair(names, choices, random).map((shares) => ({shares, scores: {
                    a: Math.sqrt(shares[0]) + 0.2 * random(), b: Math.sqrt(shares[1]) + 0.2 * random()}}));
                const kept = worth(first.scores) > worth(second.scores) ? 1 : -1;
                choices.push(choiceOf(names, first, second, kept, [0.1, 0.1]));
            }
            const after = belief(names, choices);
            return {before, after};
        }"""
    )
    assert learned["before"]["mean"] == pytest.approx([0.5, 0.5])
    after = learned["after"]
    assert after["mean"][0] == pytest.approx(0.8, abs=0.07)
    assert after["low"][0] <= 0.8 <= after["high"][0]
    assert after["high"][0] - after["low"][0] < 0.2


@needs_browser
def test_without_scores_choices_pull_towards_the_preferred_balances(scripts: Page) -> None:
    mean = scripts.evaluate(
        """async () => {
            const {belief, choiceOf, nextPair} = await import("/playground/preference.js");
            const names = ["a", "b", "c"], wish = [0.6, 0.3, 0.1], choices = [];
            let state = 7;
            const random = () => (state = (state * 48271) % 2147483647) / 2147483647;
            const far = (shares) => Math.hypot(...shares.map((share, n) => share - wish[n]));
            for (let n = 0; n < 60; n++) {
                const pair = nextPair(names, choices, random);
                const [first, second] = pair.map((shares) => ({shares, scores: null}));
                const kept = far(first.shares) < far(second.shares) ? 1 : -1;
                choices.push(choiceOf(names, first, second, kept, [1, 1, 1]));
            }
            return belief(names, choices).mean;
        }"""
    )
    assert mean == pytest.approx([0.6, 0.3, 0.1], abs=0.1)


@needs_browser
def test_a_link_carries_settings_and_question_but_no_key(context: BrowserContext, two: Served) -> None:
    page = visit(context, two.url)
    page.get_by_role("slider", name="Balance A, from accuracy to engagement").fill("35")
    page.get_by_text("Advanced", exact=True).click()
    page.get_by_label("Candidates per step").fill("2")
    page.get_by_label("What the total is").select_option("soft_min")
    ask(page, "Is 'this' \"quoted\"?")
    page.get_by_role("button", name="Copy as curl").first.click()
    command = page.input_value("#copy-text")
    assert '"accuracy": 0.65' in command
    assert "Is '\\''this'\\''" in command
    page.get_by_role("button", name="Python", exact=True).click()
    compile(page.input_value("#copy-text"), "copied", "exec")
    page.get_by_role("button", name="Link", exact=True).click()
    link = page.input_value("#copy-text")
    page.keyboard.press("Escape")
    expect(page.locator(":focus")).to_have_text(re.compile("^Copy as curl"))
    other = context.new_page()
    other.goto(link)
    expect(other.locator("#message")).to_have_value("Is 'this' \"quoted\"?")
    expect(other.get_by_role("slider", name="Balance A, from accuracy to engagement")).to_have_value("35")
    expect(other.locator("#candidates")).to_have_value("2")
    expect(other.locator("#aggregation")).to_have_value("soft_min")
    assert other.url == two.url  # a reload keeps what is changed from here on


# -- what can go wrong ---------------------------------------------------------------------------------------


@needs_browser
def test_a_refused_answer_can_be_tried_again(context: BrowserContext, two: Served) -> None:
    page = visit(context, two.url)
    with two.busy():
        ask(page)
        failed = page.locator(".failure")
        expect(failed).to_have_count(2)
        expect(failed.first).to_contain_text("busy with other questions")
    failed.first.get_by_role("button", name="Try again").focus()
    page.keyboard.press("Enter")  # for all that failed
    expect(failed).to_have_count(0)
    expect(page.locator("#stop")).to_be_hidden()
    assert all(text.strip() for text in last_answers(page))
    expect(page.locator("body :focus")).to_have_count(1)


@needs_browser
def test_a_stopped_answer_says_so_and_can_be_asked_for_again(context: BrowserContext, two: Served) -> None:
    page = visit(context, two.url)
    held: list[Any] = []
    page.route(
        "**/v1/chat/completions", lambda route: held.append(route)
    )  # the requests are on their way, and stay there
    page.fill("#message", QUESTION)
    page.press("#message", "Enter")
    page.wait_for_timeout(500)  # a double click is no stop
    page.click("#stop")
    expect(page.get_by_text("You stopped this answer here.")).to_have_count(2)
    expect(page.locator("#send")).to_be_focused()
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".answer.taken")).to_have_count(1)


@needs_browser
def test_a_conversation_that_is_too_long_offers_a_new_one(context: BrowserContext, two: Served) -> None:
    page = visit(context, two.url)
    page.fill("#message", "long " * 300)
    page.press("#message", "Enter")
    expect(page.locator(".failure").first).to_contain_text("too long for the model")
    page.get_by_role("button", name="New conversation with this question").first.click()
    assert page.input_value("#message").startswith("long long")
    expect(page.locator("#message")).to_be_focused()
    ask(page)
    assert len(last_answers(page)) == 2


@needs_browser
def test_a_server_that_is_gone_can_be_asked_again_when_it_is_back(context: BrowserContext) -> None:
    with kept_port() as port:
        with Served(TWO, port=port) as served:
            page = visit(context, served.url)
            ask(page)
            before = last_answers(page)
        page.get_by_role("button", name="Answer again").click()
        expect(page.locator("#status")).to_contain_text("The server cannot be reached")
        assert last_answers(page) == before
        with Served(TWO, port=port):
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
    expect(page.locator("#message")).to_have_value("half a thou")
    expect(page.get_by_role("slider", name="Balance B, from accuracy to engagement")).to_have_value("60")


@needs_browser
def test_a_seed_that_cannot_be_sent_is_said(context: BrowserContext, two: Served) -> None:
    page = visit(context, two.url)
    page.get_by_text("Advanced", exact=True).click()
    page.fill("#message", QUESTION)
    for seed, said in (
        ("9007199254740993", "cannot send numbers above"),
        ("-1", "only digits"),
        ("1e3", "only digits"),
    ):
        page.get_by_label("Seed").fill(seed)
        expect(page.locator("#seed-note")).to_contain_text(said)
        page.click("#send")
        expect(page.locator("#status")).to_contain_text("Nothing was asked")
        expect(page.locator("#seed")).to_be_focused()
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
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_contain_text("does not accept this key")
        page.fill("#key", "sesame")
        page.get_by_role("button", name="Use this key").click()
        expect(page.locator("#key-form")).to_be_hidden()
        ask(page)
        assert "sesame" not in page.evaluate("JSON.stringify(sessionStorage) + JSON.stringify(localStorage)")
        assert all(text.strip() for text in last_answers(page))


# -- for everyone --------------------------------------------------------------------------------------------


@needs_browser
@pytest.mark.skipif(not AXE.exists(), reason="no axe-core: run `npm install axe-core` here")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing(browser: Browser, two: Served, scheme: Any, width: int) -> None:
    context = open_context(browser, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = visit(context, two.url)

    def violations() -> list[str]:
        page.evaluate(AXE.read_text(encoding="utf-8"))
        found = page.evaluate("(tags) => axe.run(document, {runOnly: tags})", WCAG)
        return [f"{rule['id']}: {rule['nodes'][0]['target']}" for rule in found["violations"]]

    assert violations() == []
    page.evaluate("document.querySelectorAll('#controls details').forEach((part) => { part.open = true; })")
    ask(page)
    page.get_by_text("and why this one").first.click()
    assert violations() == []
    page.get_by_text("Which do you prefer?").click()
    page.get_by_role("button", name="Answer again").click()
    page.get_by_role("button", name="I prefer the first").click()
    assert violations() == []
    context.close()


@needs_browser
def test_on_a_phone_the_balances_and_the_question_stay_in_sight(browser: Browser, two: Served) -> None:
    context = open_context(
        browser, viewport={"width": 390, "height": 844}, has_touch=True, reduced_motion="reduce"
    )
    page = visit(context, two.url)
    ask(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    for name in ("Balance A, from accuracy to engagement", "Balance B, from accuracy to engagement"):
        expect(page.get_by_role("slider", name=name)).to_be_in_viewport()
    expect(page.locator("#message")).to_be_in_viewport()
    expect(page.locator("#more > section").first).to_be_hidden()  # folded
    context.close()
