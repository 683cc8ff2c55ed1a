"""Serving without Ray: request checks, the API key, the model's thread, ports, the page."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from types import SimpleNamespace

import pytest
from openai.types.chat import ChatCompletionMessage
from served_app import kept_port

from mahalo_ray.config import ServeConfig
from mahalo_ray.data.records import Message
from mahalo_ray.objectives import Weights
from mahalo_ray.serving.api_key import KeyDigests, RateLimiter
from mahalo_ray.serving.backend import VisibleText
from mahalo_ray.serving.launch import ServeError, free_port
from mahalo_ray.serving.model_thread import MAX_FAILURES_IN_A_ROW, Job, ModelThread
from mahalo_ray.serving.proxy import OpenAIErrors
from mahalo_ray.serving.schema import (
    FULL_REPLICA_HEADER,
    ApiError,
    ChatCompletionRequest,
    FullReplica,
    Overloaded,
    RequestLimits,
    ScoreRequest,
    parse,
    weights_of,
)

LONG_S = 600  # longer than a slow machine takes: no verdict depends on it
LIMITS = RequestLimits(max_candidates=4, max_new_tokens=16, max_messages=3, max_strength=4, max_choices=2)
MINIMAL = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def chat_request(**fields: object) -> ChatCompletionRequest:
    return parse(ChatCompletionRequest, json.dumps({**MINIMAL, **fields}).encode(), LIMITS)


def proxied(app, body: bytes = b"{}", parts: int = 2, proxy: OpenAIErrors | None = None) -> list[dict]:
    """What comes out of the proxy in front of an app."""
    sent: list[dict] = []
    incoming = [
        {"type": "http.request", "body": body[n::parts], "more_body": n < parts - 1} for n in range(parts)
    ]

    async def receive() -> dict:
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run((proxy or OpenAIErrors(app))(scope, receive, send))
    return sent


def test_a_client_that_has_left_is_not_answered_again():
    asked = []

    async def app(scope, receive, send):
        asked.append(scope)
        while (await receive())["type"] != "http.disconnect":
            pass

    assert proxied(app) == [] and len(asked) == 1


@pytest.mark.parametrize("losses", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [2, 1_000_002])
@pytest.mark.parametrize("silent", [False, True])
def test_a_request_whose_replica_sent_nothing_is_given_to_another(monkeypatch, losses, size, silent):
    monkeypatch.setattr("mahalo_ray.serving.proxy._PAUSE_S", 0.0)
    read: list[int] = []

    async def app(scope, receive, send):
        read.append(0)
        while True:
            message = await receive()
            read[-1] += len(message["body"])
            if not message["more_body"]:
                break
        lost = len(read) <= losses
        if lost and silent:
            return
        headers = [(b"content-type", b"text/plain" if lost else b"application/json")]
        await send({"type": "http.response.start", "status": 500 if lost else 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"gone" if lost else b"{}"})

    start, answer = proxied(app, b"x" * size)
    repeated = losses if size == 2 else 0  # a large body is not kept
    assert read == [size] * min(3, repeated + 1)
    if losses and (size > 2 or losses == 3):
        assert start["status"] == 503
        assert json.loads(answer["body"])["error"]["code"] == "replica_lost"
    else:
        assert (start["status"], answer["body"]) == (200, b"{}")


def test_while_all_replicas_are_full_the_proxy_refuses_and_spreads_the_clients(monkeypatch):
    clock = [100.0]
    # The proxy's own clock, not that of everybody in this process.
    monkeypatch.setattr("mahalo_ray.serving.proxy.time", SimpleNamespace(monotonic=lambda: clock[0]))
    asked = []

    async def app(scope, receive, send):
        error = Overloaded("the server is busy", retry_after_s=2.5, pace_s=0.5)
        error.full = FullReplica(f"replica-{len(asked) % 2}", error.pace_s, 2)
        asked.append(scope)
        headers = {"content-type": "application/json", **error.headers()}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 503, "headers": raw})
        await send({"type": "http.response.body", "body": error.encode()})

    proxy = OpenAIErrors(app)
    waits = []
    for _ in range(9):
        start, answer = proxied(app, proxy=proxy)
        headers = dict(start["headers"])
        assert FULL_REPLICA_HEADER.encode() not in headers
        assert (start["status"], json.loads(answer["body"])["error"]["code"]) == (503, "overloaded")
        waits.append(int(headers[b"retry-after"]))
    assert len(asked) == 2  # of two replicas each has said so
    assert waits == [
        3,
        4,
        4,
        4,
        4,
        5,
        5,
        5,
        5,
    ]  # a quarter more each: four places a second
    clock[0] += 0.3  # a place may have become free
    proxied(app, proxy=proxy)
    assert len(asked) == 3
    for _ in range(200):
        last = dict(proxied(app, proxy=proxy)[0]["headers"])
    assert int(last[b"retry-after"]) == 20


# -- requests ------------------------------------------------------------------------------------------------


def test_what_the_openai_client_sends_is_accepted():
    request = chat_request(
        temperature=0,
        top_p=0.9,
        stop="\n",
        seed=3,
        n=1,
        max_completion_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
        objectives={"accuracy": 0.7, "engagement": 0.3},
        guidance={"accuracy": 1},
        num_candidates=4,
    )
    request.check(LIMITS)
    assert (request.stop, request.token_limit, request.temperature) == (["\n"], 8, 0.0)


def test_text_parts_and_developer_messages_become_plain_ones():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat_request(messages=[{"role": "developer", "content": parts}])
    record = request.messages[0].as_record()
    assert (record.role, record.content) == ("system", "ab")


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temprature": 1}, "temprature", "Did you mean 'temperature'"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than or equal to 0.000001"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "differ"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": True}, "n", "valid integer"),
        ({"seed": -2}, "seed", "0"),
        ({"top_k": -2}, "top_k", "0"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "null or 0"),
        ({"logprobs": 1}, "logprobs", "valid boolean"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "null or {}"),
        ({"response_format": {"type": "json_object"}}, "response_format", "{'type': 'text'}"),
        ({"ignore_eos": 1}, "ignore_eos", "valid boolean"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "'user' needs it"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "'user' needs it"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]},
            "messages[0].tool_calls",
            "null or []",
        ),
        ({"messages": [{"role": "user", "content": "x", "typ": 1}]}, "messages[0].typ", "unknown field"),
        ({"messages": MINIMAL["messages"] * 4}, "messages", "limit of 3"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "1 to 256"),
        ({"tools": [{"type": "function"}]}, "tools", "null or []"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "assistant"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "text",
        ),
        ({"objectives": {"accuracy": -1}}, "objectives.accuracy", "greater than or equal to 0"),
        ({"objectives": {"accuracy": 1e308}}, "objectives.accuracy", "less than or equal to"),
        ({"objectives": {f"o{n}": -1 for n in range(65)}}, "objectives", "65 weights are too many"),
        ({"objectives": "accuracy=1"}, "objectives", "an object"),
        ({"num_candidates": 0}, "num_candidates", "greater than or equal to 1"),
        ({"strategy": "best"}, "strategy", "argmax"),
        ({"strategy": "beam"}, "strategy", "argmax"),
        ({"strategy": "none", "num_candidates": 2}, "num_candidates", "one candidate"),
        ({"score_temperature": 2.0}, "score_temperature", "strategy 'sample'"),
        ({"strategy": "none", "guidance": {"a": 1}}, "guidance", "no reward model"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ],
)
def test_a_wrong_field_is_named(fields, param, says):
    with pytest.raises(ApiError) as caught:
        chat_request(**fields)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"num_candidates": 5}, "num_candidates"),
        ({"n": 3}, "n"),
    ],
)
def test_the_servers_limits_are_kept(fields, param):
    request = chat_request(**fields)
    with pytest.raises(ApiError, match="limit of") as caught:
        request.check(LIMITS)
    assert (caught.value.status, caught.value.param) == (400, param)


NEUTRAL = {
    "user": ["somebody"],
    "metadata": [{"run": "7"}],
    "store": [False],
    "service_tier": ["auto"],
    "safety_identifier": ["x"],
    "prompt_cache_key": ["x"],
    "frequency_penalty": [0, 0.0],
    "presence_penalty": [0],
    "repetition_penalty": [1, 1.0],
    "logit_bias": [{}],
    "logprobs": [False],
    "top_logprobs": [0],
    "response_format": [{"type": "text"}],
    "tools": [[]],
    "tool_choice": ["none"],
    "parallel_tool_calls": [True],
    "modalities": [["text"]],
    "n": [1],
    "reasoning_effort": [],
    "verbosity": [],
    "ignore_eos": [False],
    "min_tokens": [0],
    "stop": [[]],
    "seed": [-1],
    "top_k": [-1, 0],
    "temperature": [],
    "objectives": [],
    "of_a_client_nobody_knows": [],
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_changes_nothing_is_accepted(name):
    for value in [None, *NEUTRAL[name]]:
        chat_request(**{name: value})


def test_an_answer_can_be_sent_back_as_client_libraries_dump_it():
    dumped = ChatCompletionMessage(role="assistant", content="5").model_dump()
    assert dumped["tool_calls"] is None
    assert chat_request(messages=[*MINIMAL["messages"], dumped]).messages[1].text == "5"
    harness = {"role": "user", "content": "hi", "type": "text", "name": "me", "unknown": None}
    assert chat_request(messages=[harness]).messages[0].as_record() == Message(role="user", content="hi")
    kept = {**dumped, "provider_specific_fields": {"refusal": None}, "reasoning_content": "hm"}  # LiteLLM
    assert chat_request(messages=[*MINIMAL["messages"], kept]).messages[1].text == "5"
    empty = {"role": "assistant", "content": None, "annotations": []}
    assert chat_request(messages=[empty, MINIMAL["messages"][0]]).messages[0].text == ""
    parts = [{"type": "text", "text": "a", "annotations": None, "cache_control": {"type": "ephemeral"}}]
    assert chat_request(messages=[{"role": "user", "content": parts}]).messages[0].text == "a"


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": 3}] * 3},
        {"messages": [{"role": "user", "content": [{"type": "tex"}] * 50_000}]},
        {"messages": [{"role": "user", "content": "x", **{f"x{n}": 1 for n in range(80_000)}}]},
        {"messages": ["x"] * 300_000},
        {"objectives": {f"x{n}": -1 for n in range(80_000)}},
        {"objectives": {"x" * 900_000: -1}},
        {"stop": [1] * 300_000},
        {"logit_bias": {f"{n}": 1 for n in range(80_000)}},
        {"model": 1, "x" * 900_000: 1},
        {"model": "m", **{f"x{n}": 1 for n in range(80_000)}},
    ],
)
def test_a_megabyte_of_wrong_items_is_one_short_error(fields):
    """The error is small; so is the work: none of these makes an error for every item."""
    with pytest.raises(ApiError) as caught:
        chat_request(**fields)
    assert caught.value.status == 400
    assert len(json.dumps(caught.value.body())) < 1500
    assert "x" * 200 not in json.dumps(caught.value.body())


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"\xff{", "invalid_json"),
        (b"[]", "invalid_value"),
        (b"", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"seed": NaN}', "invalid_json"),
        (b'{"model": "\\ud800"}', "invalid_json"),
    ],
)
def test_a_body_that_is_no_object_is_refused(body, code):
    with pytest.raises(ApiError) as caught:
        parse(ChatCompletionRequest, body, LIMITS)
    assert (caught.value.status, caught.value.code) == (400, code)


def test_candidates_to_score_are_bounded_and_not_empty():
    fields = {"messages": MINIMAL["messages"], "candidates": ["a"] * 5}
    with pytest.raises(ApiError) as caught:
        parse(ScoreRequest, json.dumps(fields).encode(), LIMITS)
    assert caught.value.param == "candidates"
    fields["candidates"] = ["a", " "]
    with pytest.raises(ApiError) as caught:
        parse(ScoreRequest, json.dumps(fields).encode(), LIMITS)
    assert caught.value.param == "candidates[1]"


def test_weights_are_resolved_or_refused_by_name():
    known, default = ("accuracy", "engagement"), Weights.one("accuracy")
    assert weights_of(None, known, default, "objectives") == default
    assert weights_of({"engagement": 2}, known, default, "objectives") == Weights.one("engagement")
    for values, param in (
        ({"accurcy": 1.0}, "objectives.accurcy"),
        ({"a" * 10_000: 1.0}, f"objectives.{'a' * 97}..."),
        ({"accuracy": 0.0}, "objectives"),
        ({}, "objectives"),
    ):
        with pytest.raises(ApiError) as caught:
            weights_of(values, known, default, "objectives")
        assert (caught.value.status, caught.value.param) == (400, param)


def test_errors_have_openais_form():
    error = ApiError(503, "busy", code="overloaded", retry_after_s=0.2)
    assert error.body() == {
        "error": {"message": "busy", "type": "server_error", "param": None, "code": "overloaded"}
    }
    assert error.headers() == {"Retry-After": "1"}


# -- the key -------------------------------------------------------------------------------------------------


def test_the_key_is_wanted_right_and_never_kept(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret-key")
    key = KeyDigests.configured(ServeConfig(api_key_env="SOME_KEY"))
    assert key is not None
    key.check("Bearer secret-key")
    key.check("bearer  secret-key ")
    for header in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer secret",
        "Basic secret-key",
        "secret-key",
        "Bearer ä",
    ):
        with pytest.raises(ApiError) as caught:
            key.check(header)
        assert caught.value.status == 401
        assert caught.value.headers()["WWW-Authenticate"] == "Bearer"
    assert b"secret" not in key.digests[0] and "secret" not in repr(key)


def test_several_keys_of_a_variable_and_a_file_are_told_apart(monkeypatch, tmp_path):
    file = tmp_path / "keys"
    file.write_text("# of the night shift\nthird\n\nfourth\nfirst\n")
    monkeypatch.setenv("SOME_KEY", "first, second")
    config = ServeConfig(api_key_env="SOME_KEY", api_key_file=str(file))
    keys = KeyDigests.configured(config)
    numbers = [keys.check(f"Bearer {name}") for name in ("first", "second", "third", "fourth")]
    assert numbers == [0, 1, 2, 3] and len(keys.digests) == 4
    with pytest.raises(ApiError):
        keys.check("Bearer # of the night shift")
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="keys', which is unset or empty"):
        KeyDigests.configured(ServeConfig(api_key_file=str(file)))
    with pytest.raises(ValueError, match="cannot be read"):
        KeyDigests.configured(ServeConfig(api_key_file=str(tmp_path / "missing")))


def test_a_key_that_asks_too_often_is_told_when_to_come_back(monkeypatch):
    clock = 100.0
    monkeypatch.setattr("mahalo_ray.serving.api_key.time", SimpleNamespace(monotonic=lambda: clock))
    limiter = RateLimiter(3)
    for _ in range(3):
        limiter.take(0)
    limiter.take(1)  # another key has its own
    with pytest.raises(ApiError) as caught:
        limiter.take(0)
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    assert caught.value.headers() == {"Retry-After": "20"}
    clock += 19
    with pytest.raises(ApiError):
        limiter.take(0)
    clock += 1
    limiter.take(0)
    RateLimiter(None).take(0)


@pytest.mark.parametrize("value", [None, "", "  "])
def test_an_empty_key_refuses_to_start(monkeypatch, value):
    monkeypatch.delenv("SOME_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(ValueError, match="'SOME_KEY', which is unset or empty"):
        KeyDigests.configured(ServeConfig(api_key_env="SOME_KEY"))
    assert KeyDigests.configured(ServeConfig()) is None


@pytest.mark.parametrize("value", ["schlüssel", "two words", "tab\tkey"])
def test_a_key_that_no_client_can_send_refuses_to_start(monkeypatch, value):
    monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(ValueError, match="'SOME_KEY', and the key in it has characters"):
        KeyDigests.configured(ServeConfig(api_key_env="SOME_KEY"))


# -- the model's thread --------------------------------------------------------------------------------------


class Steps:
    """An engine whose jobs take as many steps as their payload says; can be held up; "bad" breaks it, and
    once `dead`, nothing works any more."""

    def __init__(self) -> None:
        self.active: list[Job] = []
        self.left: dict[int, int] = {}
        self.batches: list[list[object]] = []
        self.go = threading.Event()
        self.go.set()
        self.dead = False
        self.prepared: list[object] = []
        self.readable = threading.Event()
        self.readable.set()

    def prepare(self, job):
        assert self.readable.wait(LONG_S)
        self.prepared.append(job.payload)
        if job.payload == "unreadable":
            job.fail(ApiError(400, "too long"))

    def admit(self, jobs):
        self.active += jobs
        self.left |= {id(job): job.payload if isinstance(job.payload, int) else 1 for job in jobs}

    def advance(self):
        self.active = [job for job in self.active if job.wanted]
        if self.active:
            self.batches.append([job.payload for job in self.active])
        assert self.go.wait(LONG_S)
        for job in self.active:
            if job.payload == "bad":
                raise KeyError("bad")
            self.left[id(job)] -= 1
            job.step("part")
            if self.left[id(job)] == 0:
                job.finish(len(self.active))
        self.active = [job for job in self.active if not job.finished]

    def reset(self):
        self.active = []

    def probe(self):
        if self.dead:
            raise RuntimeError("the device is gone")


async def until(condition):
    async with asyncio.timeout(LONG_S):
        while not condition():
            await asyncio.sleep(0.005)


def run_with_worker(scenario, max_active=4, max_waiting=4, window_s=0.05):
    engine = Steps()

    async def main():
        worker = ModelThread(engine, max_active, max_waiting, window_s)

        def submit(payload, timeout_s=LONG_S, is_long=False):
            job = Job(payload, timeout_s, streams=True, is_long=is_long)
            worker.submit(job)
            return job

        try:
            return await scenario(worker, engine, submit)
        finally:
            engine.go.set()
            worker.close()

    return asyncio.run(main()), engine


def test_requests_sent_at_once_share_a_batch_up_to_its_size():
    async def scenario(worker, engine, submit):
        jobs = [submit("one step") for _ in range(8)]
        return await asyncio.gather(*(job.result() for job in jobs))

    # However long the window: a full batch has nobody to wait for.
    sizes, engine = run_with_worker(scenario, window_s=LONG_S)
    assert [len(batch) for batch in engine.batches] == [4, 4]
    assert sizes == [4] * 8


def test_later_requests_join_between_steps():
    async def scenario(worker, engine, submit):
        engine.go.clear()
        long = submit(3)
        await until(lambda: engine.batches)
        short = submit(1)
        engine.go.set()
        await asyncio.gather(long.result(), short.result())

    _, engine = run_with_worker(scenario)
    assert engine.batches == [[3], [3, 1], [3]]


def test_steps_come_before_the_result():
    async def scenario(worker, engine, submit):
        return [event async for happened in submit(2).events() for event in happened]

    events, _ = run_with_worker(scenario)
    assert events == [("step", "part"), ("step", "part"), ("done", 1)]


def test_beyond_the_bound_requests_are_refused_with_a_time_to_come_back():
    async def scenario(worker, engine, submit):
        engine.go.clear()
        held = [submit(1) for _ in range(2)]
        await until(lambda: engine.batches)
        held.append(submit(1))
        with pytest.raises(ApiError) as caught:
            submit(1)
        assert (caught.value.status, caught.value.code) == (503, "overloaded")
        assert int(caught.value.headers()["Retry-After"]) >= 1
        with pytest.raises(ApiError):
            worker.check_room()
        engine.go.set()
        await asyncio.gather(*(job.result() for job in held))
        await until(lambda: not worker._active)
        worker.check_room()

    run_with_worker(scenario, max_active=2, max_waiting=1)


def test_long_requests_are_prepared_beside_the_batch_and_hold_a_place():
    async def scenario(worker, engine, submit):
        engine.readable.clear()
        long = [submit(payload, is_long=True) for payload in ("long", "unreadable")]
        await submit("short").result()  # is not held up
        await until(lambda: worker.num_held == 2)
        engine.go.clear()
        submit("last place")
        with pytest.raises(ApiError) as caught:
            submit("one too many")
        assert caught.value.code == "overloaded"
        engine.go.set()
        engine.readable.set()
        await long[0].result()
        with pytest.raises(ApiError, match="too long"):
            await long[1].result()
        await until(lambda: worker.num_held == 0)

    _, engine = run_with_worker(scenario, max_active=2, max_waiting=1)
    assert engine.prepared == ["long", "unreadable"]
    assert ["unreadable"] not in engine.batches


def test_a_request_nobody_waits_for_leaves_its_place_before_and_while_it_runs():
    async def scenario(worker, engine, submit):
        engine.go.clear()
        running = asyncio.create_task(submit(50).result())
        await until(lambda: engine.batches)
        waiting = asyncio.create_task(submit("gone").result())
        await asyncio.sleep(0)
        for task in (running, waiting):
            task.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        last = asyncio.create_task(submit("last").result())
        await asyncio.sleep(0)
        engine.go.set()
        await last

    _, engine = run_with_worker(scenario, max_active=1, max_waiting=1)
    assert engine.batches == [[50], ["last"]]


def test_a_request_nobody_waits_for_is_taken_out_though_nothing_follows_it():
    async def scenario(worker, engine, submit):
        engine.go.clear()
        running = asyncio.create_task(submit(50).result())
        await until(lambda: engine.batches)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        engine.go.set()
        await until(lambda: not engine.active)

    _, engine = run_with_worker(scenario)
    assert engine.batches == [[50]]


def test_the_deadline_is_kept_and_tells_the_worker():
    async def scenario(worker, engine, submit):
        engine.go.clear()
        job = submit(1, timeout_s=0.1)
        with pytest.raises(ApiError) as caught:
            await job.result()  # no engine ever answers
        assert caught.value.status == 504
        assert not job.wanted

    run_with_worker(scenario)


def test_the_error_of_one_request_never_reaches_another(caplog):
    """The batch breaks in its second round: who has had a part by then gets no part twice."""

    async def scenario(worker, engine, submit):
        jobs = [submit(3), submit("bad"), submit(2)]

        async def events(job):
            return [event async for happened in job.events() for event in happened]

        results = await asyncio.gather(*(events(job) for job in jobs), return_exceptions=True)
        assert [kind for kind, _ in results[0]] == ["step"] * 3 + ["done"]
        assert [kind for kind, _ in results[2]] == ["step"] * 2 + ["done"]
        assert results[1].status == 500
        assert "KeyError" not in str(results[1])
        assert worker.alive and worker.trouble is None
        return str(results[1]), await submit("again").result()

    (message, again), _ = run_with_worker(scenario)
    assert again == 1
    assert "KeyError" in caplog.text
    reference = re.search(r"'error (\w+)'", message)
    assert reference is not None and f"error {reference[1]}:" in caplog.text


def test_an_engine_that_can_never_work_again_is_told_from_a_request_that_fails(caplog):
    async def scenario(worker, engine, submit):
        engine.dead = True
        waiting = [submit("bad"), submit("bad"), submit(1)]
        results = await asyncio.gather(*(job.result() for job in waiting), return_exceptions=True)
        assert {error.status for error in results} == {500}
        await until(lambda: worker.trouble is not None)
        with pytest.raises(ApiError, match="being replaced") as caught:
            submit(1)
        assert (caught.value.status, caught.value.code) == (503, "unhealthy")
        with pytest.raises(ApiError):
            worker.check_room()

    run_with_worker(scenario, max_active=3, window_s=LONG_S)  # all three in one batch
    assert "the device is gone" in caplog.text


def test_a_run_of_failures_without_an_answer_between_them_is_the_servers_own():
    async def scenario(worker, engine, submit):
        for _ in range(MAX_FAILURES_IN_A_ROW - 1):
            with pytest.raises(ApiError):
                await submit("bad").result()
        await submit(1).result()
        for _ in range(MAX_FAILURES_IN_A_ROW):
            assert worker.trouble is None
            with pytest.raises(ApiError):
                await submit("bad").result()
        await until(lambda: worker.trouble is not None)

    run_with_worker(scenario)


def test_requests_that_are_being_parsed_hold_places():
    async def scenario(worker, engine, submit):
        with worker.reserve(), worker.reserve(), worker.reserve():
            assert worker.num_held == 3
            with pytest.raises(ApiError, match="busy"), worker.reserve():
                pass
        assert worker.num_held == 0
        await submit(1).result()

    run_with_worker(scenario, max_active=2, max_waiting=1)


def test_draining_refuses_new_requests_and_finishes_the_others():
    async def scenario(worker, engine, submit):
        engine.go.clear()
        running = submit(2)
        await until(lambda: engine.batches)
        waiting = submit(1)
        worker.drain()
        with pytest.raises(ApiError) as caught:
            submit(1)
        assert (caught.value.status, caught.value.code) == (503, "shutting_down")
        assert caught.value.headers()["Retry-After"]
        assert worker.num_held == 2
        engine.go.set()
        await asyncio.gather(running.result(), waiting.result())
        await until(lambda: worker.num_held == 0)

    run_with_worker(scenario)


def test_closing_answers_what_runs_and_what_waits():
    async def scenario(worker, engine, submit):
        engine.go.clear()
        running = submit(1)
        await until(lambda: engine.batches)
        waiting = submit(2)
        worker.close()
        for job in (running, waiting):
            with pytest.raises(ApiError) as caught:
                await job.result()
            assert caught.value.status == 503
        with pytest.raises(ApiError, match="shutting down"):
            submit(3)
        engine.go.set()
        await until(lambda: not worker.alive)

    run_with_worker(scenario)


# -- stop strings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "stops", "handed_out", "rest"),
    [
        (["hello ", "world"], (), ["hello ", "world"], ""),
        (["caf\ufffd", "caf\u00e9 \ufffd\ufffd"], (), ["caf", "\u00e9 "], "\ufffd\ufffd"),
        (["a. b", "END c", "d"], ("END",), ["a. b", "", ""], ""),
        (["say EN", "D now", "more"], ("END",), ["say ", "", ""], ""),
        (["say EN", "ough"], ("END",), ["say ", "ENough"], ""),
        (["aa", "ab"], ("aab",), ["", "a"], ""),
        (["x STO", "P y E"], ("STOP!", "END"), ["x ", "STOP y "], "E"),
        (["one two"], ("two", "one"), [""], ""),
    ],
)
def test_text_is_cut_at_the_first_stop_string_even_across_pieces(pieces, stops, handed_out, rest):
    visible = VisibleText(stops)
    wholes = pieces if "\ufffd" in "".join(pieces) else ["".join(pieces[: n + 1]) for n in range(len(pieces))]
    assert [visible.grow(whole) for whole in wholes] == handed_out
    assert visible.cut(wholes[-1]) == "".join(handed_out) + rest


# -- ports ---------------------------------------------------------------------------------------------------


def test_a_busy_port_is_named():
    with kept_port() as port:
        busy = rf"port {port} on 127\.0\.0\.1 is already in use.*serve\.port"
        with socket.create_server(("127.0.0.1", port)), pytest.raises(ServeError, match=busy):
            free_port("127.0.0.1", port)
        assert free_port("127.0.0.1", port) == port
    assert free_port("127.0.0.1", 0) > 0


def test_a_host_that_is_not_ours_is_named():
    with pytest.raises(ServeError, match=r"203\.0\.113\.1"):
        free_port("203.0.113.1", 0)
