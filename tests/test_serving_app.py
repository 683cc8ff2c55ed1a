"""The endpoint's app over real tiny models, asked in this process: no Ray, no sockets."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import jsonschema
import pytest
import tiny_guided
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from mahalo_ray.config import SamplingConfig, ServeConfig
from mahalo_ray.data import storage
from mahalo_ray.decoding import GuidedDecoder
from mahalo_ray.decoding.session import GuidedSession
from mahalo_ray.domains.tutoring.student import TutoringEpisode
from mahalo_ray.models.multi_head import MultiHeadCausalLM
from mahalo_ray.objectives import Weights
from mahalo_ray.serving.api_key import KeyDigests
from mahalo_ray.serving.app import create_app
from mahalo_ray.serving.backend import GuidedBackend
from mahalo_ray.serving.front import Measurements, RunFiles
from mahalo_ray.serving.schema import (
    ApiError,
    ChatCompletionRequest,
    RequestLimits,
    ScoreRequest,
    parse,
)
from mahalo_ray.serving.service import ChatService, Defaults, ServiceSettings
from mahalo_ray.serving.simulated import SimulatedStudents
from mahalo_ray.sweeps import portfolio

OBJECTIVES = ("accuracy", "engagement")
MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]
CHAT = "/v1/chat/completions"
STUDENTS = SimulatedStudents(TutoringEpisode.from_seed, (3, 4))


def make_app(
    key: KeyDigests | None = None,
    domain: str = "tutoring",
    measured: Measurements | None = None,
    **config: Any,
) -> FastAPI:
    torch.manual_seed(0)
    # Copies: every app runs its models in a thread of its own.
    base, reward = copy.deepcopy((tiny_guided.model(), tiny_guided.reward()))
    policy = MultiHeadCausalLM.from_base(base, OBJECTIVES, noise=0.3, keep_base_head=True).eval()
    decoder = GuidedDecoder(policy, reward, domain, tiny_guided.tokenizer(), 64)
    defaults = Defaults(num_candidates=2, sampling=SamplingConfig(max_new_tokens=8))
    limits = {"max_ongoing_requests": 4, "max_queued_requests": 4, "max_new_tokens": 32, "max_candidates": 4}
    limits["request_timeout_s"] = 600  # longer than a slow machine takes: no verdict depends on it
    described = {"accuracy": "The answer is right."}
    service_settings = ServiceSettings(
        ServeConfig(**{**limits, **config}), "mahalo", defaults, key, described, students=STUDENTS
    )
    return create_app(ChatService(GuidedBackend(decoder), service_settings, measured))


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = make_app(cors_origins=["https://example.org"], max_request_bytes=20_000)
    with TestClient(app, raise_server_exceptions=False) as asked:
        yield asked


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "mahalo", "messages": MESSAGES, "seed": 3, **fields}


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def error_of(answer: httpx.Response) -> dict[str, Any]:
    details = answer.json()["error"]
    assert set(details) == {"message", "type", "param", "code"}
    return details


# -- answers -------------------------------------------------------------------------------------------------


def test_an_answer_without_guidance_streams_token_by_token(client: TestClient) -> None:
    fields = body(strategy="none", max_tokens=12)
    whole = client.post(CHAT, json=fields).json()
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(client.post(CHAT, json={**fields, "stream": True, "stream_options": options}).text)
    answer = whole["choices"][0]["message"]["content"]
    assert text_of(chunks) == answer
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    tokens = whole["usage"]["completion_tokens"]
    assert counts == [*range(tokens + 1), tokens, tokens]  # the opening, each token, the end, and the usage
    assert tokens > 3
    assert all("mahalo" not in chunk for chunk in chunks[:-2])
    (step,) = chunks[-2]["mahalo"]["steps"]
    assert step["candidates"][0] == {"text": answer, "tokens": tokens, "scores": None, "total": None}
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (tokens + 1) + ["length"]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:-1])


def test_a_guided_answer_streams_steps_with_their_candidates(client: TestClient) -> None:
    whole = client.post(CHAT, json=body()).json()
    chunks = events(client.post(CHAT, json=body(stream=True)).text)
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]
    assert [chunk["mahalo"] for chunk in chunks[1:-1]] == whole["mahalo"]["steps"]
    assert all("usage" not in chunk for chunk in chunks)


def test_each_answer_has_the_strength_that_was_asked_for(client: TestClient) -> None:
    fields = body(strategy="none", max_tokens=12)
    as_before, at_1, at_0, beyond = (
        client.post(CHAT, json={**fields, **strength}).json()
        for strength in ({}, {"strength": 1}, {"strength": 0}, {"strength": 4})
    )
    texts = [answer["choices"][0]["message"]["content"] for answer in (as_before, at_1, at_0, beyond)]
    assert texts[0] == texts[1] and len(set(texts)) == 3
    assert [answer["mahalo"]["strength"] for answer in (as_before, at_0, beyond)] == [1, 0, 4]
    (served,) = client.get("/v1/models").json()["data"]
    assert served["limits"]["max_strength"] == 4


def test_max_tokens_above_the_limit_are_lowered_to_it(client: TestClient) -> None:
    answer = client.post(CHAT, json=body(strategy="none", max_tokens=4096)).json()
    assert answer["usage"]["completion_tokens"] == 32
    assert answer["choices"][0]["finish_reason"] == "length"


def test_stop_strings_cut_answers_and_streams_alike(client: TestClient) -> None:
    fields = body(strategy="none", max_tokens=24)
    full = client.post(CHAT, json=fields).json()["choices"][0]["message"]["content"]
    stop = full[4:7]
    for stopped in ({"stop": stop}, {"stop": [stop, "never there"]}):
        whole = client.post(CHAT, json={**fields, **stopped}).json()
        assert whole["choices"][0]["message"]["content"] == full[: full.index(stop)]
        assert whole["choices"][0]["finish_reason"] == "stop"
        chunks = events(client.post(CHAT, json={**fields, **stopped, "stream": True}).text)
        assert text_of(chunks) == full[: full.index(stop)]


def test_n_answers_have_seeds_of_their_own_and_can_be_asked_for_one_by_one(client: TestClient) -> None:
    fields = body(n=3, max_tokens=6)
    choices = client.post(CHAT, json=fields).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert choices[0]["mahalo"]["seed"] == 3
    texts = [choice["message"]["content"] for choice in choices]
    for choice, text in zip(choices, texts, strict=True):
        again = client.post(CHAT, json={**fields, "n": 1, "seed": choice["mahalo"]["seed"]}).json()
        assert again["choices"][0]["message"]["content"] == text
    assert len(set(texts)) > 1
    chunks = events(client.post(CHAT, json={**fields, "stream": True}).text)
    for index, text in enumerate(texts):
        own = [{"choices": [c for c in chunk["choices"] if c["index"] == index]} for chunk in chunks]
        assert text_of(own) == text


def test_log_probabilities_are_those_of_the_policy_itself(client: TestClient) -> None:
    fields = body(strategy="none", max_tokens=5, logprobs=True, top_logprobs=2, temperature=0)
    choice = client.post(CHAT, json=fields).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 5
    sampled = b"".join(bytes(item["bytes"]) for item in content)
    assert sampled.decode(errors="replace") == choice["message"]["content"]
    for item in content:  # greedy: the likeliest token
        assert item["logprob"] == item["top_logprobs"][0]["logprob"] > item["top_logprobs"][1]["logprob"]
    chunks = events(client.post(CHAT, json={**fields, "stream": True}).text)
    streamed = [c["logprobs"]["content"] for chunk in chunks for c in chunk["choices"] if c["logprobs"]]
    assert [item["token"] for part in streamed for item in part] == [item["token"] for item in content]
    plain = client.post(CHAT, json=body(strategy="none", max_tokens=5)).json()
    assert plain["choices"][0]["logprobs"] is None


def test_end_tokens_wait_for_min_tokens_and_repetition_is_penalised(client: TestClient) -> None:
    ends = client.app.state.services.first.backend._decoder.format.end_ids  # type: ignore[attr-defined]
    fields = body(strategy="none", max_tokens=30, temperature=2, top_k=-1)
    lengths = (
        client.post(CHAT, json={**fields, "seed": seed}).json()["usage"]["completion_tokens"]
        for seed in range(40)
    )
    early = next(seed for seed, length in enumerate(lengths) if length < 20)
    for bound in ({"min_tokens": 20}, {"ignore_eos": True}):
        answer = client.post(CHAT, json={**fields, "seed": early, **bound, "logprobs": True}).json()
        least = bound.get("min_tokens", 30)
        assert answer["usage"]["completion_tokens"] >= least
        assert answer["choices"][0]["finish_reason"] == "length" or least == 20
        ids = {tiny_guided.tokenizer().convert_ids_to_tokens(end) for end in ends}
        assert not ids & {item["token"] for item in answer["choices"][0]["logprobs"]["content"][:least]}
    greedy = body(strategy="none", max_tokens=30, temperature=0, ignore_eos=True, logprobs=True)
    plain, penalised = (
        client.post(CHAT, json={**greedy, "repetition_penalty": penalty}).json() for penalty in (1, 100)
    )
    different = [
        len({item["token"] for item in answer["choices"][0]["logprobs"]["content"]})
        for answer in (plain, penalised)
    ]
    assert different[1] == 30 > different[0]


def test_a_models_id_can_carry_the_weights(client: TestClient) -> None:
    balanced = {**body(max_tokens=6), "model": "mahalo@accuracy=0.8,engagement=0.2"}
    answer = client.post(CHAT, json=balanced).json()
    same = client.post(CHAT, json=body(max_tokens=6, objectives={"accuracy": 0.8, "engagement": 0.2})).json()
    assert answer["choices"] == same["choices"]
    assert answer["model"] == balanced["model"]
    assert answer["mahalo"]["objectives"] == answer["mahalo"]["guidance"]
    assert client.get(f"/v1/models/{balanced['model']}").json()["defaults"]["objectives"] == {
        "accuracy": 0.8,
        "engagement": 0.2,
    }
    twice = client.post(CHAT, json={**balanced, "objectives": {"accuracy": 1}})
    assert error_of(twice)["param"] == "objectives"
    for wrong in ("mahalo@", "mahalo@speed=1", "mahalo@accuracy", "other@accuracy=1"):
        assert client.post(CHAT, json={**balanced, "model": wrong}).status_code == 404


# -- completions ---------------------------------------------------------------------------------------------


def complete(client: TestClient, **fields: Any) -> Any:
    answer = client.post("/v1/completions", json={"model": "mahalo", "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_text_and_its_token_ids_are_continued_alike(client: TestClient) -> None:
    text = "So we add 2 and"
    ids = tiny_guided.tokenizer().encode(text)
    by_text = complete(client, prompt=text, max_tokens=6)
    by_ids = complete(client, prompt=ids, max_tokens=6)
    assert by_text["choices"] == by_ids["choices"]
    assert by_text["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": 6,
        "total_tokens": len(ids) + 6,
    }
    echoed = complete(client, prompt=text, max_tokens=6, echo=True)["choices"][0]["text"]
    assert echoed == text + by_text["choices"][0]["text"]
    both = complete(client, prompt=[text, "1 + 1"], n=2, max_tokens=3)
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    fields = {"model": "mahalo", "prompt": text, "max_tokens": 6, "temperature": 0, "stream": True}
    chunks = events(client.post("/v1/completions", json=fields).text)
    assert "".join(c["choices"][0]["text"] for c in chunks) == by_text["choices"][0]["text"]


def test_log_likelihoods_are_those_of_a_forward_through_the_whole_text(client: TestClient) -> None:
    tokenizer = tiny_guided.tokenizer()
    ids = tokenizer.encode("So we add 2 and 3. The answer is")
    answer = complete(client, prompt=[ids, ids[:4]], max_tokens=0, echo=True, logprobs=1)
    torch.manual_seed(0)
    policy = MultiHeadCausalLM.from_base(copy.deepcopy(tiny_guided.model()), OBJECTIVES, noise=0.3).eval()
    with torch.no_grad():
        logits = policy.merge(Weights.balanced(OBJECTIVES))(torch.tensor([ids])).logits[0]
    expected = torch.log_softmax(logits, dim=-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    whole, part = (choice["logprobs"] for choice in answer["choices"])
    assert whole["token_logprobs"][0] is None and whole["top_logprobs"][0] is None
    assert whole["token_logprobs"][1:] == pytest.approx(expected.tolist(), abs=1e-4)
    assert part["token_logprobs"][1:] == pytest.approx(expected.tolist()[:3], abs=1e-4)
    assert len(whole["tokens"]) == len(whole["text_offset"]) == len(ids)
    best = torch.log_softmax(logits, dim=-1)[:-1].max(dim=-1).values
    tops = [max(top.values()) for top in whole["top_logprobs"][1:]]
    assert tops == pytest.approx(best.tolist(), abs=1e-4)
    assert answer["choices"][0]["text"] == "So we add 2 and 3. The answer is"
    longer = complete(client, prompt=ids, max_tokens=1, echo=True, logprobs=1)["choices"][0]["logprobs"]
    assert len(longer["tokens"]) == len(ids) + 1 and longer["tokens"][:-1] == whole["tokens"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": [0, 10**6]}, "prompt", "invalid_value"),
        ({"prompt": "word " * 300}, "prompt", "context_length_exceeded"),
        ({"prompt": [1, "a"]}, "prompt", "invalid_value"),
        ({"prompt": ["a"] * 99}, "prompt", None),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", None),
        ({"prompt": "a", "guidance": {"accuracy": 1}}, "guidance", "invalid_value"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "invalid_value"),
    ],
)
def test_what_is_wrong_with_a_completion_is_named(
    client: TestClient, fields: dict[str, Any], param: str, code: str | None
) -> None:
    answer = client.post("/v1/completions", json={"model": "mahalo", **fields})
    assert answer.status_code == 400
    assert (error_of(answer)["param"], error_of(answer)["code"]) == (param, code)


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": [{"role": "user", "content": "long " * 300}]}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "a " * 5500}]}, "messages", "context_length_exceeded"),
        ({"objectives": {"accuracy": 1e308, "engagement": 1e308}}, "objectives.accuracy", "invalid_value"),
        ({"objectives": {"accuracy": 5e-324}, "max_tokens": 2}, None, None),
        ({"temperature": 1e-39, "max_tokens": 2}, "temperature", "invalid_value"),
        ({"top_p": 1e-300}, "top_p", "invalid_value"),
        ({"min_p": 1e-300, "max_tokens": 2}, None, None),
        ({"model": "gpt-4" * 1000}, "model", "model_not_found"),
        ({"strength": 4.5}, "strength", None),
        ({"aggregation": {"kind": "mean"}}, "aggregation.kind", "invalid_value"),
        ({"aggregation": {"kind": "sum", "temperature": 2}}, "aggregation", "invalid_value"),
        (
            {"aggregation": {"kind": "thresholds", "thresholds": [{"objective": "speed", "at_least": 0}]}},
            "aggregation.thresholds",
            "unknown_objective",
        ),
        ({"aggregation": {"kind": "soft_min"}, "strategy": "none"}, "aggregation", None),
        ({"aggregation": {"kind": "soft_min", "temperature": 0.5}, "max_tokens": 2}, None, None),
        ({"strength": -1}, "strength", "invalid_value"),
        ({"n": 99}, "n", None),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"response_format": {"type": "json_object"}}, "response_format", "invalid_value"),
    ],
)
def test_values_at_the_edge_are_answered_or_refused_by_name(
    client: TestClient, fields: dict[str, Any], param: str | None, code: str | None
) -> None:
    answer = client.post(CHAT, json=body(**fields))
    if param is None:
        assert answer.status_code == 200
        return
    details = error_of(answer)
    assert (details["param"], details["code"]) == (param, code)
    assert answer.status_code == (404 if code == "model_not_found" else 400)
    assert len(details["message"]) < 700


def test_an_error_of_the_server_has_a_reference_that_its_log_holds(caplog: pytest.LogCaptureFixture) -> None:
    app = make_app()

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a defect")

    app.state.services.first.chat = broken
    with TestClient(app, raise_server_exceptions=False) as asked:
        answer = asked.post(CHAT, json=body())
    assert answer.status_code == 500
    reference = error_of(answer)["message"].split("'error ")[1].rstrip("'")
    assert f"error {reference}" in caplog.text and "a defect" in caplog.text


def test_a_request_that_breaks_the_models_harms_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """Three are decoded together, and each round with the third breaks: only the third one fails."""
    app = make_app(max_ongoing_requests=3, batch_window_s=10)  # a full batch does not wait

    async def ask_all() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as asked:
            return await asyncio.gather(
                *(asked.post(CHAT, json=body(strategy="none", seed=n, max_tokens=9)) for n in range(3))
            )

    advance = GuidedSession.advance

    def advance_or_break(self: GuidedSession) -> None:
        advance(self)
        if any(state.request.seed == 2 for state in self._active):
            raise RuntimeError("device-side assert")

    alone = asyncio.run(ask_all())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GuidedSession, "advance", advance_or_break)
        together = asyncio.run(ask_all())
    assert [answer.status_code for answer in together] == [200, 200, 500]
    for before, after in zip(alone[:2], together[:2], strict=True):
        assert before.json()["choices"] == after.json()["choices"]
    assert "device-side assert" in caplog.text
    app.state.services.first.worker.close()


# -- bodies --------------------------------------------------------------------------------------------------


async def ask_slowly(app: FastAPI, waiting: list[FastAPI]) -> tuple[int, dict[str, Any]]:
    """Send the head and one byte of a body, and no more: (status, body) of the answer. `waiting` grows when
    the app waits for more."""
    sent: list[Any] = []
    first = True

    async def receive() -> dict[str, Any]:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": b"{", "more_body": True}
        waiting.append(app)
        await asyncio.sleep(3600)
        raise AssertionError("nobody waits that long")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "server": ("x", 80),
        "client": ("y", 1),
        "scheme": "http",
        "root_path": "",
    }
    async with asyncio.timeout(300):
        await app(scope, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_a_body_that_does_not_arrive_is_given_up_and_gives_its_place_back() -> None:
    app = make_app(body_timeout_s=0.1)
    status, answer = asyncio.run(ask_slowly(app, []))
    assert (status, answer["error"]["code"]) == (408, "timeout")
    assert app.state.services.first.worker.num_held == 0
    app.state.services.first.worker.close()


def test_half_sent_bodies_keep_nobody_out() -> None:
    app = make_app(max_ongoing_requests=1, max_queued_requests=1, body_timeout_s=1000)

    async def besieged() -> None:
        waiting: list[FastAPI] = []
        most = app.state.services.first.settings.config.max_bodies
        slow = [asyncio.create_task(ask_slowly(app, waiting)) for _ in range(most)]
        while len(waiting) < most:
            await asyncio.sleep(0)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as asked:
            answer = await asked.post(CHAT, json=body())
        assert answer.status_code == 200
        # Of too many bodies the one that has taken longest is refused.
        status, refusal = await slow[0]
        assert (status, refusal["error"]["code"]) == (503, "overloaded")
        assert not any(task.done() for task in slow[1:])
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)

    asyncio.run(besieged())
    app.state.services.close()


def test_a_full_replica_refuses_before_it_reads() -> None:
    app = make_app(max_ongoing_requests=1, max_queued_requests=1)
    worker = app.state.services.first.worker
    with worker.reserve(), worker.reserve(), TestClient(app) as asked:
        answer = asked.post(CHAT, json=body())
        assert (answer.status_code, error_of(answer)["code"]) == (503, "overloaded")
        assert int(answer.headers["Retry-After"]) >= 1
        assert asked.get("/ready").status_code == 503
        assert asked.get("/health").status_code == 200


def test_scores_are_given_a_few_at_a_time_between_the_tokens(client: TestClient) -> None:
    candidates = ["So we add.", "5", "no"]
    fields = {"messages": MESSAGES, "candidates": candidates}
    alone = client.post("/v1/score", json=fields).json()["data"]
    reward = tiny_guided.reward()
    for text, item in zip(candidates, alone, strict=True):
        expected = {name: scores[0] for name, scores in reward.score(MESSAGES, [text]).items()}
        assert item["scores"] == pytest.approx(expected, abs=1e-4)
    app = make_app(max_ongoing_requests=2, batch_window_s=10)  # a full batch does not wait
    order: list[str] = []

    async def ask_both() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as asked:

            async def post(name: str, path: str, fields: dict[str, Any]) -> httpx.Response:
                answer = await asked.post(path, json=fields)
                order.append(name)
                return answer

            short = body(strategy="none", max_tokens=2)
            return await asyncio.gather(
                post("score", "/v1/score", {**fields, "candidates": ["x y"] * 4}), post("chat", CHAT, short)
            )

    scored, chatted = asyncio.run(ask_both())
    assert (scored.status_code, chatted.status_code) == (200, 200)
    assert order == ["chat", "score"]  # the answer does not wait for four forwards of the reward model
    app.state.services.first.worker.close()


# -- addresses -----------------------------------------------------------------------------------------------


def test_head_options_and_cross_origin_requests(client: TestClient) -> None:
    head = client.head("/v1/models")
    assert head.status_code == 200 and head.content == b""
    options = client.options("/v1/models")
    assert (options.status_code, options.headers["Allow"]) == (204, "GET, HEAD, OPTIONS")
    asks = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    preflight = client.options(CHAT, headers=asks)
    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == "https://example.org"
    answer = client.get("/v1/models", headers={"Origin": "https://example.org"})
    assert answer.headers["Access-Control-Allow-Origin"] == "https://example.org"
    stranger = client.get("/v1/models", headers={"Origin": "https://elsewhere.org"})
    assert "Access-Control-Allow-Origin" not in stranger.headers
    assert client.put(CHAT).status_code == 405


def test_one_model_can_be_retrieved(client: TestClient) -> None:
    (listed,) = client.get("/v1/models").json()["data"]
    assert client.get("/v1/models/mahalo").json() == listed
    missing = client.get("/v1/models/org/other")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")


def swept(name: str, weights: dict[str, float] | None, accuracy: list[float], engagement: list[float]) -> Any:
    kind = "sft" if weights is None else "weights"
    values = {"accuracy": accuracy, "engagement": engagement}
    fields = {"name": name, "kind": kind, "weights": weights, "student_ids": [1, 2], "values": values}
    return {"result": {**fields, "malformed_rate": 0.0, "tokens": 10}, "samples": []}


@pytest.fixture(scope="module")
def measuring() -> Iterator[TestClient]:
    """An endpoint of a run with a sweep of two points and a portfolio of them."""
    vectors = [{"accuracy": 1.0, "engagement": 0.0}, {"accuracy": 0.5, "engagement": 0.5}]
    points = [
        swept("SFT", None, [0.1, 0.1], [0.1, 0.1]),
        swept("accurate", vectors[0], [0.9, 0.7], [0.1, 0.1]),
        swept("middle", vectors[1], [0.6, 0.6], [0.8, 0.6]),
    ]
    storage.write_json("memory://measured/methods.json", points)
    made = portfolio([[0.8, 0.1], [0.6, 0.7]], [Weights(v) for v in vectors], eps=0.3)
    made.save("memory://measured/portfolio.json")
    files = RunFiles(
        ("memory://measured/methods.json",), "memory://measured/portfolio.json", OBJECTIVES, 0.95, 100, 1
    )
    with TestClient(make_app(measured=files.read())) as asked:
        yield asked


def test_the_front_is_what_the_run_measured(measuring: TestClient, client: TestClient) -> None:
    front = measuring.get("/v1/front").json()
    assert front["objectives"][0] == {"name": "accuracy", "description": "The answer is right."}
    assert front["reference_point"] == {"accuracy": 0.0, "engagement": 0.0}
    labels = [(point["label"], point["in_sweep"], point["on_front"]) for point in front["points"]]
    assert labels == [("SFT", False, False), ("accurate", True, True), ("middle", True, True)]
    accuracy = front["points"][1]["values"]["accuracy"]
    assert accuracy["value"] == pytest.approx(0.8) and accuracy["low"] < 0.8 < accuracy["high"]
    missing = client.get("/v1/front")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "no_front")
    described = client.get("/v1/models/mahalo").json()["descriptions"]
    assert described == [*front["objectives"][:1], {"name": "engagement", "description": ""}]


def test_the_portfolio_names_a_member_and_its_certified_loss(
    measuring: TestClient, client: TestClient
) -> None:
    report = measuring.get("/v1/portfolio").json()
    (member,) = report["members"]
    assert (member["model"], member["name"]) == ("mahalo@member-1", "accuracy=0.5,engagement=0.5")
    assert member["values"] == {"accuracy": 0.6, "engagement": 0.7}
    assert [choice["loss_bound"] for choice in report["choices"]] == pytest.approx([0.2, 0.0])
    asked = measuring.get("/v1/portfolio", params={"weights": "accuracy=0.75,engagement=0.25"}).json()
    (choice,) = asked["choices"]
    # The best of both ends is worth 0.8 and 0.65, so no policy is worth more than 0.725 in the middle.
    assert choice["loss_bound"] == pytest.approx(0.725 - (0.75 * 0.6 + 0.25 * 0.7))
    outside = measuring.get("/v1/portfolio", params={"weights": "engagement=1"}).json()
    assert outside["choices"][0]["loss_bound"] is None
    wrong = measuring.get("/v1/portfolio", params={"weights": "acuracy=1"})
    assert (wrong.status_code, error_of(wrong)["param"]) == (400, "weights")
    answer = measuring.post(CHAT, json={**body(max_tokens=4), "model": "mahalo@member-1"}).json()
    # Answered as it was measured: at its weights, without guidance.
    assert answer["mahalo"]["objectives"] == member["objectives"] == {"accuracy": 0.5, "engagement": 0.5}
    assert (answer["mahalo"]["strategy"], answer["mahalo"]["guidance"]) == ("none", None)
    listed = [model["id"] for model in measuring.get("/v1/models").json()["data"]]
    assert listed == ["mahalo", "mahalo@member-1"]
    twice = measuring.post(CHAT, json={**body(strategy="argmax"), "model": "mahalo@member-1"})
    assert (twice.status_code, error_of(twice)["param"]) == (400, "strategy")
    missing = client.get("/v1/portfolio")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "no_portfolio")


def test_a_simulated_student_answers_the_conversation_that_it_began(client: TestClient) -> None:
    opening = STUDENTS.openings[1]
    said = [{"role": "user", "content": opening}]
    twin = TutoringEpisode.from_seed(4)
    # Bored until it leaves; every request brings the whole conversation.
    for _ in range(40):
        said.append({"role": "assistant", "content": "Listen. Listen. Listen. Listen."})
        answer = client.post("/v1/student", json={"messages": said}).json()
        assert answer["message"] == {"role": "user", "content": twin.hear(said[-1]["content"])}
        assert (answer["over"], answer["outcome"]) == (twin.over, twin.outcome())
        if twin.over:
            break
        said.append(answer["message"])
    assert answer["over"]
    again = [*said, answer["message"], {"role": "assistant", "content": "Wait!"}]
    assert client.post("/v1/student", json={"messages": again}).json()["message"] is None
    for messages, code in (
        (said[:1], "invalid_value"),
        ([{**said[0], "content": "Hi"}, said[1]], "no_student"),
    ):
        refused = client.post("/v1/student", json={"messages": messages})
        assert (refused.status_code, error_of(refused)["code"]) == (400 + 4 * (code == "no_student"), code)


def test_the_openapi_document_types_every_body_and_answer(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}:
        assert reference in document["components"]["schemas"]
    chat = document["paths"][CHAT]["post"]
    assert {"200", "400", "401", "404", "408", "413", "415", "500", "503", "504"} <= set(chat["responses"])
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}

    def check(value: Any, name: str) -> None:
        jsonschema.validate(value, {"$ref": f"#/components/schemas/{name}", **document})

    check(body(stop=None, tools=None, temperature=0.5), "ChatCompletionRequest")
    check(client.post(CHAT, json=body()).json(), "ChatCompletion")
    check(client.post(CHAT, json={}).json(), "ErrorBody")
    check({"model": "mahalo", "prompt": [[1, 2]], "echo": True}, "CompletionRequest")
    check(complete(client, prompt="a", max_tokens=2, logprobs=2), "TextCompletion")
    check(client.get("/v1/models").json(), "ServedModels")
    for chunk in events(client.post(CHAT, json=body(stream=True)).text):
        check(chunk, "ChatCompletionChunk")
    with pytest.raises(jsonschema.ValidationError):
        check(body(temperature="hot"), "ChatCompletionRequest")


def test_each_key_has_an_allowance_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # It fills again with the time that passes: none does.
    monkeypatch.setattr("mahalo_ray.serving.api_key.time", SimpleNamespace(monotonic=lambda: 100.0))
    with TestClient(make_app(key=KeyDigests.of("one", "two"), requests_per_minute=2)) as asked:

        def ask(key: str) -> httpx.Response:
            headers = {"Authorization": f"Bearer {key}"}
            return asked.post(CHAT, json=body(strategy="none", max_tokens=2), headers=headers)

        assert [ask("one").status_code for _ in range(3)] == [200, 200, 429]
        refused = ask("one")
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert error_of(refused)["type"] == "rate_limit_error" and int(refused.headers["Retry-After"]) > 1
        assert ask("two").status_code == 200
        assert ask("three").status_code == 401


def test_the_figures_are_prometheus_text(client: TestClient) -> None:
    client.post(CHAT, json=body(max_tokens=4))
    client.post(CHAT, json=body(stream=True, strategy="none", max_tokens=4))
    client.get("/nowhere/at/all")
    answer = client.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    samples: Counter[Any] = Counter()
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            label = sample.labels.get("objective") or sample.labels.get("path")
            samples[sample.name, label] += sample.value
    assert samples["mahalo_requests_total", CHAT] >= 2
    assert samples["mahalo_requests_total", "other"] >= 1
    for name in ("first_step", "queue", "answer"):
        assert samples[f"mahalo_{name}_seconds_count", None] >= 2
    assert samples["mahalo_step_seconds_count", None] >= 3  # of the stream's tokens
    assert samples["mahalo_guidance_lift_count", "accuracy"] >= 1
    assert samples["mahalo_answer_tokens_total", None] >= 5
    assert samples["mahalo_rows", None] == 0


def test_a_path_prefix_is_part_of_every_address() -> None:
    with TestClient(make_app(), root_path="/tutor") as asked:
        assert asked.get("/tutor/v1/models").status_code == 200
        assert asked.get("/tutor/openapi.json").json()["servers"] == [{"url": "/tutor"}]
        asked.post(f"/tutor{CHAT}", json=body(strategy="none", max_tokens=2))
        assert f'mahalo_requests_total{{path="{CHAT}"' in asked.get("/tutor/metrics").text


def test_the_openapi_document_says_that_a_key_is_needed() -> None:
    app = make_app(key=KeyDigests.of("secret"))
    with TestClient(app) as asked:
        document = asked.get("/openapi.json").json()
        assert asked.get("/v1/models").status_code == 401
    assert document["paths"][CHAT]["post"]["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/health"]["get"]


# -- fuzz ----------------------------------------------------------------------------------------------------

FIELDS = [*ChatCompletionRequest.model_fields, *ScoreRequest.model_fields, "x", "", "content"]
NAMES = st.sampled_from(FIELDS)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**400), max_value=10**400)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["user", "assistant", "system", "text", "mahalo", "argmax", "none", 1e308, 5e-324])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=8), inner, max_size=5)
    ),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "developer", "tool"]), "content": VALUES},
    optional={"name": VALUES, "refusal": VALUES, "tool_calls": VALUES, "type": VALUES, "audio": VALUES},
)
BODIES = st.fixed_dictionaries(
    {"model": st.just("mahalo") | VALUES, "messages": st.lists(MESSAGE, max_size=3) | VALUES},
    optional={
        name: VALUES
        for name in {**ChatCompletionRequest.model_fields, **ScoreRequest.model_fields}
        if name not in ("model", "messages")
    },
)
LIMITS = RequestLimits(max_candidates=4, max_new_tokens=8, max_messages=3, max_strength=4, max_choices=2)


NASTY: list[Any] = [
    *(None, True, -1, 0, 1, 2**63, 10**400, 1e308, 5e-324, "", "x" * 5000, "\ud800", "\x00", [], {}, [[]]),
    *([None] * 50, {"type": "text"}, {"": None}, [{"role": "user"}], [{"type": "text", "text": 1}]),
]


def mutations(fields: Any, seed: int, count: int) -> Iterator[bytes]:
    """The body, and others near it: values replaced at any depth, keys renamed, bytes changed or missing."""
    yield json.dumps(fields).encode()
    rng = random.Random(seed)
    for number in range(count - 1):
        changed = copy.deepcopy(fields)
        inner = [changed]
        while isinstance(inner[-1], dict | list) and inner[-1] and rng.random() < 0.7:
            part = inner[-1]
            inner.append(part[rng.choice(list(part) if isinstance(part, dict) else range(len(part)))])
        containers = [part for part in inner if isinstance(part, dict | list) and part]
        if containers and number % 4:
            part = containers[-1]
            if isinstance(part, dict) and number % 2:
                part[rng.choice(FIELDS)] = rng.choice(NASTY)
            else:
                part[rng.choice(list(part) if isinstance(part, dict) else range(len(part)))] = rng.choice(
                    NASTY
                )
        data = bytearray(json.dumps(changed).encode())
        if number % 4 == 0 and data:
            position = rng.randrange(len(data))
            data[position : position + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        yield bytes(data)


def bounded(number: int) -> settings:
    return settings(
        max_examples=number,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.slow
@bounded(1000)
@given(fields=BODIES | VALUES, seed=st.integers(0, 2**32))
def test_no_body_is_more_than_a_400(fields: Any, seed: int) -> None:
    """100,000 bodies: a thousand drawn, each changed in a hundred ways."""
    for number, data in enumerate(mutations(fields, seed, 100)):
        try:
            parse(ScoreRequest if number % 8 == 7 else ChatCompletionRequest, data, LIMITS)
        except ApiError as error:
            assert error.status == 400
            assert len(error.encode()) < 6000


@pytest.mark.slow
@bounded(100)
@given(fields=BODIES)
def test_what_is_taken_is_answered(client: TestClient, fields: Any) -> None:
    answer = client.post(CHAT, json={**fields, "max_tokens": 2})
    assert answer.status_code < 500, answer.text
