"""Ordinary clients, each as its own documentation uses it, at an endpoint on a real socket.

Those of the extra `clients` are skipped where they are not installed.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import tiny_guided
import yaml
from hypothesis import HealthCheck, given, settings, strategies
from openai import AsyncOpenAI, OpenAI
from served_app import served
from test_serving_app import make_app

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]
KEY = "not-checked"
LONG_S = 600  # longer than a slow machine takes: no verdict depends on it


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The endpoint's address, without `/v1`."""
    with served(make_app(max_request_bytes=100_000, max_new_tokens=64)) as address:
        yield address


# -- OpenAI's own --------------------------------------------------------------------------------------------


def test_openai_whole_streamed_asynchronous_and_sent_back(url: str) -> None:
    fields: dict[str, Any] = {"model": "mahalo", "messages": MESSAGES, "seed": 5, "max_tokens": 6}
    with OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["mahalo"]
        assert client.models.retrieve("mahalo").id == "mahalo"
        answer = client.chat.completions.create(**fields, n=2, logprobs=True, top_logprobs=2)
        assert [choice.index for choice in answer.choices] == [0, 1]
        content = answer.choices[0].logprobs.content
        assert content is not None and len(content[0].top_logprobs) == 2
        assert answer.usage is not None and answer.usage.completion_tokens == 12
        chunks = list(client.chat.completions.create(**fields, stream=True))
        streamed = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert streamed == answer.choices[0].message.content
        # Its accumulating stream wants answers that end by themselves, or at a stop string.
        stop = streamed[2:4]
        with client.chat.completions.stream(**fields, stop=stop) as events:
            final = events.get_final_completion()
        assert final.choices[0].message.content == streamed[: streamed.index(stop)]
        # The answer goes back as the library dumps it, with all its null fields.
        sent_back = [*MESSAGES, answer.choices[0].message.model_dump(), *MESSAGES]
        assert client.chat.completions.create(**{**fields, "messages": sent_back}).choices
        text = client.completions.create(
            model="mahalo", prompt="So we add", max_tokens=4, echo=True, logprobs=1
        )
        assert text.choices[0].text.startswith("So we add")
        with pytest.raises(openai.BadRequestError, match="tools"):
            client.chat.completions.create(**fields, tools=[{"type": "function", "function": {"name": "f"}}])

    async def ask_both() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(client.chat.completions.create(**fields) for _ in range(2)))

    assert {answer.choices[0].message.content for answer in asyncio.run(ask_both())} == {streamed}


def test_openai_waits_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client tries again after a 503 with Retry-After, and gets its answer."""
    app = make_app(max_ongoing_requests=1, max_queued_requests=0)
    waited: list[float] = []
    # The library's own clock, not that of other threads of this process.
    clock = SimpleNamespace(**vars(time))
    clock.sleep = lambda seconds: (waited.append(seconds), holding.close())
    monkeypatch.setattr("openai._base_client.time", clock)
    holding = _Holding(app.state.services.first.worker)
    transport = _InThread(app)
    with OpenAI(base_url="http://x/v1", api_key=KEY, http_client=httpx.Client(transport=transport)) as client:
        answer = client.chat.completions.create(model="mahalo", messages=MESSAGES, max_tokens=2)  # type: ignore[arg-type]
    assert answer.choices and waited and waited[0] >= 1
    app.state.services.first.worker.close()


class _Holding:
    """Holds the only place there is, until it is closed."""

    def __init__(self, worker: Any) -> None:
        self._place = worker.reserve()
        self._place.__enter__()
        self._held = True

    def close(self) -> None:
        if self._held:
            self._held = False
            self._place.__exit__(None, None, None)


class _InThread(httpx.BaseTransport):
    """Synchronous requests to an app in this process."""

    def __init__(self, app: Any) -> None:
        self._inner = httpx.ASGITransport(app)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def answer() -> httpx.Response:
            response = await self._inner.handle_async_request(request)
            return httpx.Response(
                response.status_code, headers=response.headers, content=await response.aread()
            )

        return asyncio.run(answer())


# -- frameworks ----------------------------------------------------------------------------------------------


def test_langchain(url: str) -> None:
    chat = pytest.importorskip("langchain_openai").ChatOpenAI(
        base_url=f"{url}/v1", api_key=KEY, model="mahalo@accuracy=0.8,engagement=0.2", max_tokens=6, seed=5
    )
    answer = chat.invoke([("human", "What is 2 + 3?")])
    assert answer.content and answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream("What is 2 + 3?")) == answer.content
    # A conversation goes on with the answer as the library keeps it.
    assert chat.invoke([("human", "What is 2 + 3?"), answer, ("human", "And 4?")]).content
    answers = asyncio.run(chat.abatch(["What is 2 + 3?", "What is 2 + 3?"]))
    assert {one.content for one in answers} == {answer.content}


def test_litellm(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    fields = {"model": "openai/mahalo", "api_base": f"{url}/v1", "api_key": KEY, "messages": MESSAGES}
    fields |= {"max_tokens": 6, "seed": 5, "num_retries": 0}
    answer = litellm.completion(**fields)
    text = answer.choices[0].message.content
    assert text
    chunks = litellm.completion(**fields, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    sent_back = [*MESSAGES, answer.choices[0].message.model_dump(), *MESSAGES]
    assert litellm.completion(**{**fields, "messages": sent_back}).choices[0].message.content
    guided = litellm.completion(**fields, extra_body={"objectives": {"accuracy": 1.0}, "num_candidates": 2})
    assert guided.choices[0].message.content
    with pytest.raises(litellm.exceptions.NotFoundError):
        litellm.completion(**{**fields, "model": "openai/other"})


def test_llama_index(url: str) -> None:
    llms = pytest.importorskip("llama_index.llms.openai_like")
    from llama_index.core.llms import ChatMessage

    llm = llms.OpenAILike(
        model="mahalo",
        api_base=f"{url}/v1",
        api_key=KEY,
        is_chat_model=True,
        context_window=256,
        max_tokens=6,
        max_retries=0,
        additional_kwargs={"seed": 5},
    )
    question = [ChatMessage(role="user", content="What is 2 + 3?")]
    answer = llm.chat(question)
    assert answer.message.content
    assert list(llm.stream_chat(question))[-1].message.content == answer.message.content
    assert llm.chat([*question, answer.message, *question]).message.content


def test_instructor_is_refused_by_name(url: str) -> None:
    instructor = pytest.importorskip("instructor")
    from pydantic import BaseModel

    class Sum(BaseModel):
        value: int

    for mode, field in ((instructor.Mode.TOOLS, "tools"), (instructor.Mode.JSON, "response_format")):
        client = instructor.from_openai(OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0), mode=mode)
        with pytest.raises(Exception, match=f"'{field}': this server does not support it"):
            client.chat.completions.create(
                model="mahalo", messages=MESSAGES, response_model=Sum, max_retries=1
            )


# -- evaluation and load -------------------------------------------------------------------------------------

TASKS = {
    "tiny_generation": {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": ["3", "5"],
        "doc_to_target": 1,
        "metric_list": [{"metric": "acc"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of lm-evaluation-harness over two questions of our own."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"What is 2 + {n}?", "answer": str(2 + n)} for n in (3, 3)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, own in TASKS.items():
        files = {"test": str(folder / "rows.jsonl")}
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}}
        common |= {"test_split": "test", "doc_to_text": "{{question}}"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | own))
    return folder


@pytest.mark.parametrize(
    ("model", "path", "task"),
    [
        ("local-chat-completions", "chat/completions", "tiny_generation"),
        ("local-completions", "completions", "tiny_generation"),
        ("local-completions", "completions", "tiny_choice"),
    ],
)
def test_lm_evaluation_harness(
    url: str,
    tasks: Path,
    tokenizer_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    path: str,
    task: str,
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    results = lm_eval.simple_evaluate(
        model=model,
        model_args={
            "model": "mahalo",
            "base_url": f"{url}/v1/{path}",
            "tokenizer": tokenizer_folder,
            "max_retries": 1,
            "num_concurrent": 2,
            "max_length": 128,
        },
        tasks=[task],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        apply_chat_template=model == "local-chat-completions",
        bootstrap_iters=0,
    )
    samples = results["samples"][task]
    assert len(samples) == 2
    if task == "tiny_choice":
        # The log-likelihoods are those of a forward through question and answer.
        (likelihood, _), _ = samples[0]["filtered_resps"]
        tokenizer = tiny_guided.tokenizer()
        ids = tokenizer.encode("What is 2 + 3?") + tokenizer.encode(" 3")
        body = {"model": "mahalo", "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=LONG_S).json()
        found = answer["choices"][0]["logprobs"]
        start = len(tokenizer.encode("What is 2 + 3?"))
        assert float(likelihood) == pytest.approx(sum(found["token_logprobs"][start:]), abs=1e-4)


def test_guidellm(url: str, tokenizer_folder: str, tmp_path: Path) -> None:
    """Its command `guidellm run` (0.8), from whatever environment is on the path."""
    program = shutil.which("guidellm")
    if program is None:
        pytest.skip("guidellm is not installed")
    done = subprocess.run(
        [
            *(program, "run", "--disable-console", "--profile", "kind=synchronous"),
            *("--backend", f"kind=openai_http,target={url},model=mahalo"),
            *("--constraint", "kind=max_requests,count=3"),
            *("--tokenizer", f"kind=huggingface_auto,model={tokenizer_folder}"),
            *("--data", "kind=synthetic_text,prompt_tokens=12,output_tokens=6"),
            *("--output", f"kind=json,path={tmp_path / 'report.json'}"),
        ],
        capture_output=True,
        text=True,
        timeout=LONG_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (3, 0)


# -- the document --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/score", "/v1/student", "other"]
)
def test_schemathesis_finds_no_undocumented_answer(url: str, path: str) -> None:
    """Requests drawn from the document, valid and not: every answer is as the document says, and none a 500.

    That every request its schemas allow is taken is not asked: they cannot say which fields exclude others.
    """
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", timeout=LONG_S)
    operations = [result.ok() for result in schema.get_all_operations()]
    posts = {operation.path for operation in operations if operation.method == "post"}
    for operation in operations:
        if operation.path != path and (path != "other" or operation.path in posts):
            continue

        @settings(
            max_examples=30 if operation.path in posts else 3,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(), streams=strategies.booleans())
        def check(case: Any, streams: bool) -> None:
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = "mahalo"  # a name that is drawn is never that of a model
                case.body["max_tokens"] = 2
                if streams and "completions" in path:
                    case.body["stream"] = True
            case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=LONG_S)

        check()
