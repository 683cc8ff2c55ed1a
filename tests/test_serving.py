"""Serving without Ray: request checks, the API key, the model's thread, ports, the page."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from importlib import resources

import pytest

from mahalo_ray.config import ServeConfig
from mahalo_ray.objectives import Weights
from mahalo_ray.serving.backend import StopTrimmer
from mahalo_ray.serving.launch import ServeError, free_port
from mahalo_ray.serving.schema import ApiError, ChatRequest, Limits, ScoreRequest, parse, weights_of
from mahalo_ray.serving.service import KeyDigest
from mahalo_ray.serving.worker import Job, Worker

LIMITS = Limits(max_candidates=4, max_new_tokens=16, max_messages=3, max_request_bytes=1000)
MINIMAL = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def chat_request(**fields: object) -> ChatRequest:
    return parse(ChatRequest, json.dumps({**MINIMAL, **fields}).encode())


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
        ({"max_tokens": 4, "max_completion_tokens": 4}, "max_tokens", "not both"),
        ({"n": 2}, "n", "1"),
        ({"seed": -1}, "seed", "0"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "1 to 256"),
        ({"tools": []}, "tools", "unknown field"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "assistant"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "text",
        ),
        ({"objectives": {"accuracy": -1}}, "objectives.accuracy", "greater than or equal to 0"),
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
        ({"max_tokens": 17}, "max_tokens"),
        ({"max_completion_tokens": 17}, "max_completion_tokens"),
        ({"messages": MINIMAL["messages"] * 4}, "messages"),
    ],
)
def test_the_servers_limits_are_kept(fields, param):
    request = chat_request(**fields)
    with pytest.raises(ApiError, match="limit of") as caught:
        request.check(LIMITS)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("body", "code"), [(b"\xff{", "invalid_json"), (b"[]", "invalid_value"), (b"", "invalid_json")]
)
def test_a_body_that_is_no_object_is_refused(body, code):
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, body)
    assert (caught.value.status, caught.value.code) == (400, code)


def test_candidates_to_score_are_bounded_and_not_empty():
    fields = {"messages": MINIMAL["messages"], "candidates": ["a"] * 5}
    with pytest.raises(ApiError) as caught:
        parse(ScoreRequest, json.dumps(fields).encode()).check(LIMITS)
    assert caught.value.param == "candidates"
    fields["candidates"] = ["a", " "]
    with pytest.raises(ApiError) as caught:
        parse(ScoreRequest, json.dumps(fields).encode()).check(LIMITS)
    assert caught.value.param == "candidates[1]"


def test_weights_are_resolved_or_refused_by_name():
    known, default = ("accuracy", "engagement"), Weights.one("accuracy")
    assert weights_of(None, known, default, "objectives") == default
    assert weights_of({"engagement": 2}, known, default, "objectives") == Weights.one("engagement")
    for values, param in (
        ({"accurcy": 1.0}, "objectives.accurcy"),
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
    monkeypatch.setenv("SOME_KEY", "secret-äöü")
    key = KeyDigest.from_environment(ServeConfig(api_key_env="SOME_KEY"))
    assert key is not None
    key.check("Bearer secret-äöü")
    key.check("bearer  secret-äöü ")
    for header in (None, "", "Bearer", "Bearer ", "Bearer secret", "Basic secret-äöü", "secret-äöü"):
        with pytest.raises(ApiError) as caught:
            key.check(header)
        assert caught.value.status == 401
        assert caught.value.headers()["WWW-Authenticate"] == "Bearer"
    assert b"secret" not in key.digest and "secret" not in repr(key)


@pytest.mark.parametrize("value", [None, "", "  "])
def test_an_empty_key_refuses_to_start(monkeypatch, value):
    monkeypatch.delenv("SOME_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(ValueError, match="'SOME_KEY', which is unset or empty"):
        KeyDigest.from_environment(ServeConfig(api_key_env="SOME_KEY"))
    assert KeyDigest.from_environment(ServeConfig()) is None


# -- the model's thread --------------------------------------------------------------------------------------


class Steps:
    """An engine whose jobs take as many steps as their payload says; can be held up; "bad" breaks it."""

    def __init__(self) -> None:
        self.active: list[Job] = []
        self.left: dict[int, int] = {}
        self.batches: list[list[object]] = []
        self.go = threading.Event()
        self.go.set()

    def admit(self, jobs):
        self.active += jobs
        self.left |= {id(job): job.payload if isinstance(job.payload, int) else 1 for job in jobs}

    def advance(self):
        self.active = [job for job in self.active if job.wanted]
        if self.active:
            self.batches.append([job.payload for job in self.active])
        assert self.go.wait(10)
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


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def run_with_worker(scenario, max_active=4, max_waiting=4, window_s=0.05):
    engine = Steps()

    async def main():
        worker = Worker(engine, max_active, max_waiting, window_s)

        def submit(payload, timeout_s=10.0):
            job = Job(payload, timeout_s)
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
        jobs = [submit("one step") for _ in range(6)]
        return await asyncio.gather(*(job.result() for job in jobs))

    sizes, engine = run_with_worker(scenario)
    assert [len(batch) for batch in engine.batches] == [4, 2]
    assert sizes == [4, 4, 4, 4, 2, 2]


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
        return [event async for event in submit(2).events()]

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


def test_the_deadline_is_kept_and_tells_the_worker():
    async def scenario(worker, engine, submit):
        engine.go.clear()
        job = submit(1, timeout_s=0.1)
        started = time.monotonic()
        with pytest.raises(ApiError) as caught:
            await job.result()
        assert caught.value.status == 504
        assert time.monotonic() - started < 5
        assert not job.wanted

    run_with_worker(scenario)


def test_a_failing_batch_answers_everyone_and_the_thread_goes_on(caplog):
    async def scenario(worker, engine, submit):
        jobs = [submit("good"), submit("bad"), submit("never reached")]
        results = await asyncio.gather(*(job.result() for job in jobs), return_exceptions=True)
        assert results[0] == 3
        assert [error.status for error in results[1:]] == [500, 500]
        assert "KeyError" not in str(results[1])
        assert worker.alive
        return await submit("again").result()

    assert run_with_worker(scenario)[0] == 1
    assert "KeyError" in caplog.text


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
        (["a. b", "END c", "d"], ("END",), ["a. b", "", ""], ""),
        (["say EN", "D now", "more"], ("END",), ["say ", "", ""], ""),
        (["say EN", "ough"], ("END",), ["say ", "ENough"], ""),
        (["aa", "ab"], ("aab",), ["", "a"], ""),
        (["x STO", "P y E"], ("STOP!", "END"), ["x ", "STOP y "], "E"),
        (["one two"], ("two", "one"), [""], ""),
    ],
)
def test_text_is_cut_at_the_first_stop_string_even_across_pieces(pieces, stops, handed_out, rest):
    trimmer = StopTrimmer(stops)
    assert [trimmer.feed(piece) for piece in pieces] == handed_out
    assert trimmer.rest() == rest


# -- ports and the page --------------------------------------------------------------------------------------


def test_a_busy_port_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServeError, match=rf"port {port} on 127\.0\.0\.1 is already in use.*serve\.port"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", port) == port
    assert free_port("127.0.0.1", 0) > 0


def test_a_host_that_is_not_ours_is_named():
    with pytest.raises(ServeError, match=r"203\.0\.113\.1"):
        free_port("203.0.113.1", 0)


def test_the_page_needs_nothing_from_elsewhere_and_never_reads_text_as_html():
    page = resources.files("mahalo_ray.serving").joinpath("playground.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//cdn|<link|<img|@import|url\(|src=", page)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=", page)
