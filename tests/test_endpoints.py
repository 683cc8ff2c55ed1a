"""The endpoint client against a real local server: retries, limits, counts, and keys that stay secret."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from local_endpoint import GARBAGE, HANGS, LocalEndpoint, Received, Scripted, TimeRunsOut, fails, says

from mahalo_ray import endpoints
from mahalo_ray.config import EndpointConfig
from mahalo_ray.endpoints import ChatCall, CompletionCall, Endpoint, EndpointReply, Failure


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "_BACKOFF_S", 0.01)


def asked(text: str = "2+2?") -> ChatCall:
    return ChatCall([{"role": "user", "content": text}], max_tokens=7, temperature=0.0, seed=3)


def test_a_chat_is_asked_as_given_and_answered() -> None:
    with LocalEndpoint([says("4", "four")]) as server, Endpoint(server.config()) as endpoint:
        request = ChatCall(
            [{"role": "user", "content": "2+2?"}], n=2, stop=("\n",), extra={"guidance": {"accuracy": 1.0}}
        )
        ((number, reply),) = endpoint.chat([request])
    assert number == 0 and isinstance(reply, EndpointReply)
    assert (reply.texts, reply.finish_reasons) == (["4", "four"], ["stop", "stop"])
    (received,) = server.received
    assert received.path == "/v1/chat/completions"
    assert received.body == {
        "model": "m",
        "messages": [{"role": "user", "content": "2+2?"}],
        "max_tokens": 512,
        "temperature": 1.0,
        "n": 2,
        "stop": ["\n"],
        "guidance": {"accuracy": 1.0},
    }


def test_a_completion_takes_token_ids() -> None:
    with LocalEndpoint([says("4")]) as server, Endpoint(server.config()) as endpoint:
        ((_, reply),) = endpoint.complete([CompletionCall([1, 2, 3], logprobs=0, seed=5)])
    assert isinstance(reply, EndpointReply) and reply.texts == ["4"]
    assert server.received[0].path == "/v1/completions"
    sent = server.received[0].body
    assert (sent["prompt"], sent["logprobs"], sent["seed"]) == ([1, 2, 3], 0, 5)


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [(fails(500), "http_500"), (fails(429), "http_429"), (GARBAGE, "garbage"), (HANGS, "timeout")],
)
def test_trouble_is_tried_again_and_counted(
    trouble: Scripted, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, ends = {"timeout_s": 600, "max_retries": 2}, TimeRunsOut(monkeypatch)
    with LocalEndpoint([trouble, says("4")], ends) as server, Endpoint(server.config(**settings)) as endpoint:
        ((_, reply),) = endpoint.chat([asked()])
        assert isinstance(reply, EndpointReply) and reply.texts == ["4"]
        assert endpoint.usage.retries == {kind: 1} and endpoint.usage.failures == {}
    with LocalEndpoint([trouble], ends) as server, Endpoint(server.config(**settings)) as endpoint:
        ((_, failure),) = endpoint.chat([asked()])
        assert isinstance(failure, Failure)
        assert (failure.kind, failure.attempts, len(server.received)) == (kind, 3, 3)
        assert endpoint.usage.failures == {kind: 1} and endpoint.usage.requests == 1
    assert ends.limits_s == [600] * 5


def test_an_attempt_has_its_time_and_no_more() -> None:
    with LocalEndpoint([HANGS]) as server, Endpoint(server.config(timeout_s=0.3, max_retries=1)) as endpoint:
        ((_, failure),) = endpoint.chat([asked()])
    assert isinstance(failure, Failure) and (failure.kind, failure.attempts) == ("timeout", 2)


@pytest.mark.parametrize("body", [b"{}", b'{"choices": []}', b'{"choices": [{"index": 0}]}', b"[1]", b"null"])
def test_json_that_is_no_completion_is_garbage(body: bytes) -> None:
    with LocalEndpoint([Scripted(body=body)]) as server, Endpoint(server.config(max_retries=0)) as endpoint:
        for answers in (endpoint.chat([asked()]), endpoint.complete([CompletionCall("a")])):
            ((_, failure),) = answers
            assert isinstance(failure, Failure) and failure.kind == "garbage"


def test_what_another_try_cannot_mend_fails_at_once() -> None:
    with LocalEndpoint([fails(400, "no such model")]) as server, Endpoint(server.config()) as endpoint:
        ((_, failure),) = endpoint.chat([asked()])
    assert isinstance(failure, Failure) and len(server.received) == 1
    assert failure.kind == "http_400" and "no such model" in failure.message


def test_nobody_listens() -> None:
    config = EndpointConfig(base_url="http://127.0.0.1:9/v1", model="m", max_retries=1)
    with Endpoint(config) as endpoint:
        ((_, failure),) = endpoint.chat([asked()])
    assert isinstance(failure, Failure) and (failure.kind, failure.attempts) == ("connection", 2)


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_honoured_by_all_requests(date: bool) -> None:
    """Given as a number of seconds, or as a date, which is one of whole seconds."""
    come: list[float] = []

    def script(received: Received) -> Scripted:
        come.append(time.time())
        if len(come) > 1:
            return says("4")
        moment = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(come[0] + 2))
        return fails(429, retry_after=moment if date else "0.4")

    with LocalEndpoint(script) as server, Endpoint(server.config(concurrency=1)) as endpoint:
        answers = list(endpoint.chat([asked(), asked()]))
    assert [number for number, _ in answers] == [0, 1] and len(come) == 3
    assert come[1] > (int(come[0]) + 2 if date else come[0] + 0.4) - 0.05  # clocks are not that exact


def test_requests_are_bounded_taken_lazily_and_yielded_as_they_finish() -> None:
    taken = []

    def requests() -> Iterator[ChatCall]:
        for n in range(20):
            taken.append(n)
            yield asked("slow" if n == 0 else str(n))

    def script(received: Received) -> Scripted:
        return HANGS if received.content == "slow" else says(received.content)

    with LocalEndpoint(script) as server, Endpoint(server.config(concurrency=3)) as endpoint:
        answers = endpoint.chat(requests())
        number, reply = next(answers)
        assert number in (1, 2) and isinstance(reply, EndpointReply) and reply.texts == [str(number)]
        assert taken == [0, 1, 2]
        for _ in range(5):
            assert next(answers)[0] != 0
        answers.close()  # type: ignore[attr-defined]
        assert len(taken) < 10 and server.most_at_once <= 3


def test_requests_per_minute() -> None:
    """A tenth of a second between them at least."""
    with LocalEndpoint([says("4")]) as server, Endpoint(server.config(requests_per_minute=600)) as endpoint:
        start = time.monotonic()
        assert len(list(endpoint.chat(asked() for _ in range(10)))) == 10
        assert time.monotonic() - start >= 0.9


def test_tokens_and_cost_are_counted() -> None:
    prices = {"input_price": 2.0, "output_price": 4.0}
    script = [says("4", prompt_tokens=1000, completion_tokens=500)]
    with LocalEndpoint(script) as server, Endpoint(server.config(**prices)) as endpoint:
        list(endpoint.chat([asked(), asked()]))
        usage = endpoint.usage.to_json()
    assert usage == {
        "requests": 2,
        "retries": {},
        "failures": {},
        "prompt_tokens": 2000,
        "completion_tokens": 1000,
        "cost": pytest.approx(0.008),
    }
    with pytest.raises(ValueError, match="both 'input_price' and 'output_price'"):
        server.config(input_price=1.0)


def test_keys_come_from_the_environment_and_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalEndpoint([fails(401, "wrong key sk-secret-123")]) as server:
        config = server.config(api_key_env="JUDGE_KEY")
        with pytest.raises(ValueError, match="'JUDGE_KEY' is not set"):
            Endpoint(config)
        monkeypatch.setenv("JUDGE_KEY", "sk-secret-123")
        with Endpoint(config) as endpoint:
            ((_, failure),) = endpoint.chat([asked()])
            assert "sk-secret" not in repr(endpoint) + repr(config) + repr(failure)
    assert server.received[0].headers["authorization"] == "Bearer sk-secret-123"
    assert isinstance(failure, Failure) and failure.kind == "http_401" and "$JUDGE_KEY" in failure.message
