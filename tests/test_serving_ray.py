"""The whole endpoint on a real Ray Serve, asked through the official OpenAI client."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import ray
import torch
from openai import (
    APIError,
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    OpenAI,
)
from openai.types.chat import ChatCompletion
from processes import started_here
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from mahalo_ray.cli.common import open_session
from mahalo_ray.config import (
    FurtherModel,
    RewardDeploymentConfig,
    SamplingConfig,
    ServeConfig,
    load_config,
)
from mahalo_ray.decoding import GuidedDecoder
from mahalo_ray.models.multi_head import MultiHeadCausalLM
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.models.scoring import StepEncoder, TraceReader
from mahalo_ray.objectives import Weights
from mahalo_ray.pipeline.serve import SmokeError, smoke
from mahalo_ray.serving.api_key import KeyDigests
from mahalo_ray.serving.launch import APP_NAME, ServeError, Serving, serve_forever, start
from mahalo_ray.serving.local_socket import socket_folder
from mahalo_ray.serving.model_thread import ModelThread
from mahalo_ray.serving.service import Defaults

pytestmark = pytest.mark.slow

T = TypeVar("T")

EXAMPLE = Path(__file__).parent.parent / "examples" / "quickstart.yaml"
OBJECTIVES = ("accuracy", "engagement")
KEY = "test-key-1234"
LONG_S = 600  # longer than a slow machine takes: no verdict depends on it
MESSAGES = [{"role": "user", "content": "what is 2 plus 3?"}]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["what is 2 plus 3? well done. try the next step. the answer is 5."] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    wrapped.chat_template = TEMPLATE
    return wrapped


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """A random policy with two clearly different heads and a random reward model, saved to disk."""
    root: Path = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
    )
    policy = MultiHeadCausalLM.from_base(Qwen2ForCausalLM(config), OBJECTIVES, noise=0.3)
    policy.save_pretrained(root / "policy", tokenizer)
    kinds = {"accuracy": "value", "engagement": "probability"}
    reward = ProcessRewardModel.from_base(
        Qwen2ForCausalLM(config), kinds, inputs=["last", "pooled"], tokenizer=tokenizer, step_separator=None
    )
    generator = torch.Generator().manual_seed(1)
    drawn = {name: torch.randn(40, generator=generator).tolist() for name in OBJECTIVES}
    reward.fit_calibration(drawn, {name: [n // 4 for n in range(40)] for name in OBJECTIVES})
    reward.save_pretrained(root / "reward")
    return str(root / "policy"), str(root / "reward")


@pytest.fixture(scope="module")
def cluster():
    """A private Ray as `mahalo serve` starts it, with the API key in the environment before."""
    one_of_each = ["cluster.train_workers=1", "cluster.rollout_actors=1"]
    config = load_config(EXAMPLE, ["serve.api_key_env=MAHALO_TEST_KEY", *one_of_each])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MAHALO_TEST_KEY", KEY)
        with open_session(config, serves=True):
            yield
        assert os.environ["MAHALO_TEST_KEY"] == KEY


@pytest.fixture(scope="module")
def serving(cluster, folders, tmp_path_factory):
    """One endpoint for most tests: with a key, small limits and room for three requests."""
    config = ServeConfig(
        port=0,
        max_ongoing_requests=2,
        max_queued_requests=1,
        max_candidates=4,
        max_new_tokens=200,
        max_request_bytes=20_000,
        request_timeout_s=LONG_S,  # also of a model that is paused
        shutdown_grace_s=LONG_S,
        api_key_env="MAHALO_TEST_KEY",
        models=[FurtherModel(id="plain", policy=folders[0])],
        log_folder=str(tmp_path_factory.mktemp("logs")),
    )
    defaults = Defaults(num_candidates=3, sampling=SamplingConfig(max_new_tokens=8))
    with start(config, *folders, defaults=defaults, key=KeyDigests.of(KEY)) as running:
        yield running


@pytest.fixture
def client(serving):
    with OpenAI(base_url=f"{serving.url}/v1", api_key=KEY, max_retries=0, timeout=LONG_S) as made:
        yield made


def ask(client: OpenAI, extra: dict | None = None, **fields):
    return client.chat.completions.create(
        **{"model": "mahalo", "messages": MESSAGES, "seed": 5, **fields}, extra_body=extra or {}
    )


def post(serving: Serving, path: str, body: bytes, **headers: str):
    """(status, headers, JSON) of a plain request."""
    own = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}", **headers}
    request = urllib.request.Request(serving.url + path, body, own)
    try:
        with urllib.request.urlopen(request, timeout=LONG_S) as answer:
            return answer.status, answer.headers, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, json.load(error)


def in_replica(work: Callable[[ModelThread], T]) -> T:
    """What `work` gives in the process of the only replica, asked about the thread of its first model. A
    function within a test is sent there as it stands, and imports what it needs itself."""

    def find_and_work(_replica) -> T:
        import gc

        from mahalo_ray.serving import service

        if not hasattr(service, "first_worker"):  # kept there: to look for it takes a while
            gc.unfreeze()  # Serve freezes what a replica holds when it is ready
            services = [each for each in gc.get_objects() if isinstance(each, service.ChatService)]
            (service.first_worker,) = [
                each.worker for each in services if each.settings.model_name == "mahalo"
            ]
        return work(service.first_worker)

    (actor,) = [
        ray.get_actor(named["name"], named["namespace"])
        for named in ray.util.list_named_actors(all_namespaces=True)
        if named["name"].startswith(f"SERVE_REPLICA::{APP_NAME}#{APP_NAME}#")
    ]
    return ray.get(actor.__ray_call__.remote(find_and_work))


def pause_model() -> None:
    """From now on the replica takes requests and makes no token, until `resume_model`."""

    def pause(worker: ModelThread) -> None:
        import threading
        import time

        advance, worker.may_advance = worker._engine.advance, threading.Event()
        worker._engine.advance = lambda: advance() if worker.may_advance.is_set() else time.sleep(0.01)

    in_replica(pause)


def resume_model() -> None:
    def resume(worker: ModelThread) -> None:
        worker.may_advance.set()
        del worker._engine.advance

    in_replica(resume)


def until_held(number: int) -> None:
    """Wait until so many requests hold places of the replica."""
    deadline = time.monotonic() + LONG_S
    while (held := in_replica(lambda worker: worker.num_held)) != number:
        assert time.monotonic() < deadline, f"{held} places are held, not {number}"
        time.sleep(0.02)


def test_an_answer_carries_its_candidates_scores_and_counts(client):
    weights = {"accuracy": 0.7, "engagement": 0.3}
    answer = ask(client, {"objectives": weights, "guidance": {"engagement": 1.0}, "num_candidates": 4})
    details = answer.model_extra["mahalo"]
    assert details["objectives"] == pytest.approx(weights)
    assert details["guidance"] == {"engagement": 1.0}
    (step,) = details["steps"]
    assert len(step["candidates"]) == 4
    totals = [candidate["total"] for candidate in step["candidates"]]
    engagement = [candidate["scores"]["engagement"] for candidate in step["candidates"]]
    assert step["chosen"] == totals.index(max(totals)) == engagement.index(max(engagement))
    assert set(step["candidates"][0]["scores"]) == set(OBJECTIVES)
    assert answer.choices[0].message.content == step["candidates"][step["chosen"]]["text"]
    assert answer.choices[0].finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens == step["candidates"][step["chosen"]]["tokens"]
    assert details["sampled_tokens"] == sum(candidate["tokens"] for candidate in step["candidates"])


def test_the_same_seed_gives_the_same_answer_and_weights_matter(client):
    first, again = ask(client), ask(client)
    assert first.choices[0].message.content == again.choices[0].message.content
    assert ask(client, seed=6).choices[0].message.content != first.choices[0].message.content
    one, other = (ask(client, {"objectives": {name: 1}, "strategy": "none"}) for name in OBJECTIVES)
    assert one.choices[0].message.content != other.choices[0].message.content
    assert one.model_extra["mahalo"]["steps"][0]["candidates"][0]["scores"] is None


def test_neighbours_in_a_batch_change_nothing(client):
    alone = ask(client).choices[0].message.content
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(ask, client, {"objectives": {"engagement": 1}, "num_candidates": 2}, seed=9)
        same = pool.submit(ask, client)
        assert same.result().choices[0].message.content == alone
        assert other.result().choices[0].message.content


def test_streaming_gives_the_same_text_and_ends_properly(client):
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[1].model_extra["mahalo"]["candidates"]
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert len({chunk.id for chunk in chunks}) == 1


def test_an_answer_can_be_sent_back_as_the_client_dumps_it(client):
    """Two turns by the synchronous client, and the same two by the asynchronous one."""
    answer = ask(client).choices[0].message
    follow_up = [*MESSAGES, answer.model_dump(), {"role": "user", "content": "why?"}]
    second = ask(client, messages=follow_up).choices[0].message.content

    async def converse() -> str:
        async with AsyncOpenAI(base_url=client.base_url, api_key=KEY, max_retries=0) as other:
            fields = {"model": "mahalo", "seed": 5}
            first = await other.chat.completions.create(messages=MESSAGES, **fields)
            turns = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "why?"}]
            stream = await other.chat.completions.create(messages=turns, stream=True, **fields)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(converse()) == second


def test_unguided_answers_stream_by_token(client):
    whole = ask(client, {"strategy": "none"}, max_tokens=8)
    chunks = list(ask(client, {"strategy": "none"}, max_tokens=8, stream=True))
    assert len(chunks) == whole.usage.completion_tokens + 2  # its opening and its end
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content


def test_stop_strings_end_the_answer_before_them(client):
    whole = ask(client, {"strategy": "none"}).choices[0].message.content
    stop = whole[3]
    cut = ask(client, {"strategy": "none"}, stop=[stop])
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("strategy", ["argmax", "sample", "best_of_n"])
def test_every_guided_strategy_answers_with_scores(client, strategy):
    details = ask(client, {"strategy": strategy, "num_candidates": 2}).model_extra["mahalo"]
    assert details["strategy"] == strategy
    assert all(candidate["scores"] for candidate in details["steps"][0]["candidates"])


def test_temperature_zero_is_greedy_whatever_the_seed(client):
    answers = {
        ask(client, {"strategy": "none"}, temperature=0, seed=seed).choices[0].message.content
        for seed in range(3)
    }
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"objectives": {"accuracy": 0.7, "engagment": 0.3}}, "objectives.engagment"),
        ({"objectives": {"accuracy": -0.1}}, "objectives.accuracy"),
        ({"objectives": {"accuracy": 0.0}}, "objectives"),
        ({"guidance": {"kindness": 1.0}}, "guidance.kindness"),
        ({"num_candidates": 5}, "num_candidates"),
        ({"objectivs": {}}, "objectivs"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "5"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "far too long " * 200}]}, "messages"),
    ],
)
def test_what_is_wrong_with_a_request_is_named(client, extra, param):
    with pytest.raises(BadRequestError) as caught:
        ask(client, extra)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(NotFoundError, match="'mahalo'") as caught:
        ask(client, model="gpt-4")
    assert caught.value.code == "model_not_found"


def test_a_key_is_wanted_for_the_api_but_not_for_page_and_health(serving):
    with OpenAI(base_url=f"{serving.url}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(AuthenticationError):
            ask(stranger)
        with pytest.raises(AuthenticationError):
            stranger.models.list()
    for path in ("/", "/health", "/ready"):
        with urllib.request.urlopen(serving.url + path, timeout=LONG_S) as answer:
            assert answer.status == 200


def test_too_large_a_request_is_413_whether_it_says_so_or_not(serving):
    body = json.dumps({"model": "mahalo", "messages": [{"role": "user", "content": "x" * 30_000}]}).encode()
    status, _, answer = post(serving, "/v1/chat/completions", body)
    assert (status, answer["error"]["code"]) == (413, "too_large")
    host, port = serving.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=LONG_S) as raw:
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            b"Content-Type: application/json\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n\r\n"
        )
        raw.sendall(b"7530\r\n" + b"x" * 30_000 + b"\r\n0\r\n\r\n")
        assert b" 413 " in raw.recv(4096).split(b"\r\n")[0]


def test_only_json_is_read(serving):
    status, _, answer = post(serving, "/v1/chat/completions", b"{}", **{"Content-Type": "text/plain"})
    assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")


def test_scores_are_the_reward_models_own(serving, folders):
    candidates = ["well done.", "the answer is 5."]
    body = json.dumps({"messages": MESSAGES, "candidates": candidates}).encode()
    status, _, answer = post(serving, "/v1/score", body)
    assert status == 200
    reward = ProcessRewardModel.from_pretrained(folders[1])
    for text, item in zip(candidates, answer["data"], strict=True):
        expected = {name: scores[0] for name, scores in reward.score(MESSAGES, [text]).items()}
        assert item["scores"] == pytest.approx(expected, abs=1e-4)


def test_models_tell_objectives_and_limits(client):
    model, _ = client.models.list()
    assert model.id == "mahalo"
    assert model.model_extra["objectives"] == list(OBJECTIVES)
    assert model.model_extra["limits"]["max_candidates"] == 4
    assert client.models.retrieve("mahalo") == model
    with pytest.raises(NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_further_model_is_chosen_by_its_id(client):
    assert [model.id for model in client.models.list()] == ["mahalo", "plain"]
    assert client.models.retrieve("plain").model_extra["guidance_objectives"] == []
    plain = ask(client, model="plain", max_tokens=8)
    assert plain.model == "plain"
    # The same policy, here without a reward model.
    assert (
        plain.choices[0].message.content
        == ask(client, {"strategy": "none", "objectives": {"accuracy": 1, "engagement": 1}}, max_tokens=8)
        .choices[0]
        .message.content
    )
    with pytest.raises(BadRequestError) as refused:
        ask(client, {"num_candidates": 2}, model="plain")
    assert refused.value.param == "num_candidates"
    with pytest.raises(NotFoundError, match="'mahalo', 'plain'"):
        ask(client, model="other")


def test_the_key_is_in_no_environment_of_what_ray_started(serving):
    started = psutil.Process().children(recursive=True)
    assert started_here("ServeReplica")
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            assert KEY not in process.environ().values(), process.cmdline()


def test_the_endpoint_has_the_priority_of_the_process_that_started_it(serving):
    for name in ("ServeReplica", "ProxyActor"):
        assert [process.nice() for process in started_here(name)] == [psutil.Process().nice()]


def test_the_proxy_asks_the_replica_over_its_socket(client):
    client.models.list()
    folder = socket_folder(ray.get_runtime_context().get_node_id())
    (replica,) = started_here("ServeReplica")
    there = [each for each in replica.net_connections("unix") if str(each.laddr).startswith(str(folder))]
    assert len(there) > 1, "what listens, and a connection that the proxy keeps"


def test_beyond_the_bound_requests_are_refused_at_once_and_none_hangs(client):
    """Two may run and one wait: of twelve sent at once, all are told when to return while others hold the
    places, and some are answered when nobody does."""

    def one(seed: int) -> int:
        try:
            ask(client, {"num_candidates": 4}, seed=seed, max_tokens=40)
        except InternalServerError as error:
            assert error.status_code == 503
            assert int(error.response.headers["Retry-After"]) >= 1
            assert error.code == "overloaded"
            return 503
        return 200

    def hold_all(worker: ModelThread) -> None:
        from contextlib import ExitStack

        worker.places = ExitStack()
        for _ in range(3):
            worker.places.enter_context(worker.reserve())

    until_held(0)
    in_replica(hold_all)
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, range(12), timeout=LONG_S)) == [503] * 12
        in_replica(lambda worker: worker.places.close())
        answered_again(client)
        until_held(0)
        statuses = list(pool.map(one, range(12), timeout=LONG_S))
    assert statuses.count(200) >= 3 and set(statuses) <= {200, 503}
    answered_again(client)


def answered_again(client: OpenAI) -> ChatCompletion:
    """The first answer to one who comes back as long as places or replicas are missing."""
    deadline = time.monotonic() + LONG_S
    while True:
        try:
            return ask(client, max_tokens=8)
        except InternalServerError as error:
            assert error.status_code == 503 and error.code in ("replica_lost", "overloaded", "not_ready")
            assert int(error.response.headers["Retry-After"]) >= 1
            assert time.monotonic() < deadline, f"still {error.code}"
            time.sleep(0.2)


def send_and_leave(serving: Serving) -> None:
    """A client that leaves when its request has come to the replica, whose model is paused."""
    body = json.dumps({"model": "mahalo", "messages": MESSAGES, "max_tokens": 100}).encode()
    address = urllib.parse.urlsplit(serving.url)
    with socket.create_connection((address.hostname, address.port), timeout=LONG_S) as raw:
        raw.sendall(
            b"POST %s/v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s"
            % (address.path.encode(), KEY.encode(), len(body), body)
        )
        until_held(1)


def test_clients_that_leave_do_not_block_the_endpoint(client, serving):
    until_held(0)
    pause_model()
    for _ in range(4):  # one more than there are places
        send_and_leave(serving)
        until_held(0)
    resume_model()
    assert ask(client, max_tokens=2).choices


def test_the_page_may_load_nothing_and_post_nowhere_else(serving):
    with urllib.request.urlopen(serving.url + "/", timeout=LONG_S) as answer:
        page, headers = answer.read().decode(), answer.headers
    assert "<title>mahalo_ray playground</title>" in page
    assert headers["Content-Security-Policy"].startswith(
        "default-src 'none'; script-src 'self'; style-src 'self'"
    )
    with urllib.request.urlopen(serving.url + "/playground/main.js", timeout=LONG_S) as answer:
        assert "javascript" in answer.headers["Content-Type"]


def test_smoke_passes_here_and_says_why_it_does_not_elsewhere(serving):
    weightings = [Weights({"accuracy": 0.7, "engagement": 0.3}), Weights.one("engagement")]
    found = smoke(serving.url, serving.model, MESSAGES, weightings, api_key=KEY)
    assert [Weights(answer["objectives"]) for answer in found["answers"]] == weightings
    assert all(answer["latency_s"] > 0 for answer in found["answers"])
    assert found["streamed"]["text"] == found["answers"][0]["text"]
    with pytest.raises(SmokeError, match="not 'other'"):
        smoke(serving.url, "other", MESSAGES, weightings, api_key=KEY)
    with pytest.raises(SmokeError, match="API key"):
        smoke(serving.url, serving.model, MESSAGES, weightings)


def test_a_second_endpoint_on_the_cluster_is_refused(serving, folders):
    with pytest.raises(ServeError, match="already runs"):
        start(ServeConfig(port=0), *folders)


def test_a_replica_that_dies_is_replaced_and_clients_get_openais_errors(client, serving):
    (old,) = started_here("ServeReplica")
    # A whole answer has sent nothing yet: it is asked for again.
    before = ask(client, {"num_candidates": 4}, max_tokens=40)
    until_held(0)
    pause_model()
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(ask, client, {"num_candidates": 4}, max_tokens=40)
        stream = ask(client, {"num_candidates": 4}, max_tokens=40, stream=True)
        until_held(2)
        old.kill()
        with pytest.raises(APIError, match="the replica that was answering is gone"):
            list(stream)
        answered_again(client)
        assert old.pid not in [process.pid for process in started_here("ServeReplica")]
        assert whole.result(timeout=LONG_S).choices[0].message.content == before.choices[0].message.content


def test_a_replica_whose_model_is_broken_is_replaced(client, serving):
    """Its weights are cut off: every forward raises, its own probe's too."""

    def break_models(_: ModelThread) -> int:
        import gc

        found = [module for module in gc.get_objects() if isinstance(module, torch.nn.Embedding)]
        for module in found:
            module.weight.data = module.weight.data[:0]
        return len(found)

    (old,) = started_here("ServeReplica")
    before = ask(client, max_tokens=8)
    assert in_replica(break_models) >= 2
    after = answered_again(client)
    assert after.choices[0].message.content == before.choices[0].message.content
    assert old.pid not in [process.pid for process in started_here("ServeReplica")]


# Keep these last: they need the cluster without the endpoint above.


@pytest.fixture(scope="module")
def stopped(serving):
    """The endpoint after SIGTERM: (streams that ran, refusals of those who came later, what was printed)."""
    body = {"model": "mahalo", "messages": MESSAGES, "num_candidates": 4, "max_tokens": 40, "stream": True}
    request = urllib.request.Request(
        serving.url + "/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )
    short = {"model": "mahalo", "messages": MESSAGES, "strategy": "none", "max_tokens": 1}
    begun = threading.Barrier(3)
    refused: list[dict] = []
    usual = signal.getsignal(signal.SIGTERM)

    def stream(_: int) -> str:
        with urllib.request.urlopen(request, timeout=LONG_S) as answer:
            begun.wait(LONG_S)
            return answer.read().decode()

    def knock() -> None:
        begun.wait(LONG_S)
        while signal.getsignal(signal.SIGTERM) is usual:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
        while not in_replica(lambda worker: worker._draining):
            time.sleep(0.02)
        for _ in range(3):
            status, headers, answer = post(serving, "/v1/chat/completions", json.dumps(short).encode())
            refused.append({"status": status, "headers": headers, **answer["error"]})
        resume_model()

    until_held(0)
    pause_model()
    with ThreadPoolExecutor(3) as pool, contextlib.redirect_stdout(io.StringIO()) as printed:
        streams = [pool.submit(stream, number) for number in range(2)]
        knocking = pool.submit(knock)
        serve_forever(serving)
        knocking.result(LONG_S)
        return [running.result(LONG_S) for running in streams], refused, printed.getvalue()


def test_a_stop_lets_running_answers_end_and_refuses_new_ones(stopped):
    streams, refused, printed = stopped
    for text in streams:
        assert text.endswith("data: [DONE]\n\n") and '"error"' not in text
    assert len(refused) == 3
    for refusal in refused:
        assert (refusal["status"], refusal["code"]) == (503, "shutting_down")
        assert refusal["headers"]["Retry-After"]
    assert "infinite retries" not in printed


def test_after_stop_nothing_answers_and_another_can_start(stopped, serving, folders):
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(serving.url + "/health", timeout=LONG_S)
    config = ServeConfig(
        port=0,
        path_prefix="/tutor",
        request_timeout_s=2,
        max_ongoing_requests=2,
        max_queued_requests=1,
    )
    with start(config, folders[0], None) as bare:
        assert bare.url.endswith("/tutor")
        with urllib.request.urlopen(f"{bare.url}/openapi.json", timeout=LONG_S) as answer:
            assert json.load(answer)["servers"] == [{"url": "/tutor"}]
        client = OpenAI(base_url=f"{bare.url}/v1", api_key="none", max_retries=0)

        def status(_: int) -> int:
            with pytest.raises(InternalServerError) as caught:
                ask(client, max_tokens=2)
            return caught.value.status_code

        pause_model()
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(status, range(3))) == [504] * 3
        until_held(0)
        with pytest.raises(BadRequestError) as refused:
            ask(client, {"num_candidates": 2}, max_tokens=2)
        assert refused.value.param == "num_candidates"
        client.close()


class ReadAgain(TraceReader):
    """A reward model that reads every candidate's text again, as one that is somewhere else does."""

    def __init__(self, model: ProcessRewardModel) -> None:
        self.model, self.objectives, self.calibration = model, model.objectives, model.calibration
        self.output_kinds = model.output_kinds

    @property
    def max_length(self) -> int:
        return self.model.max_length

    @property
    def encoder(self) -> StepEncoder:
        return self.model.encoder

    def score_traces(self, traces, batch_size=16):
        return self.model.score_traces(traces, batch_size)


def test_a_reward_model_of_its_own_deployment_scores_alike_and_may_die(stopped, folders):
    apart = RewardDeploymentConfig(cpus_per_replica=0.5)
    config = ServeConfig(
        port=0,
        reward_deployment=apart,
        cpus_per_replica=0.5,
        request_timeout_s=LONG_S,
        shutdown_grace_s=LONG_S,
    )
    decoder = GuidedDecoder(
        MultiHeadCausalLM.from_pretrained(folders[0]).eval(),
        ReadAgain(ProcessRewardModel.from_pretrained(folders[1]).eval()),
        "tutoring",
        make_tokenizer(),
    )
    weights = Weights.balanced(OBJECTIVES)
    options = {"num_candidates": 5, "max_new_tokens": 8, "seed": 5, "standardisation": "calibrated"}
    here = decoder.generate(MESSAGES, weights=weights, guidance=weights, **options)

    def check(answer) -> None:
        (step,) = answer.model_extra["mahalo"]["steps"]
        assert [candidate["text"] for candidate in step["candidates"]] == [
            candidate.text for candidate in here.steps[0].candidates
        ]
        for there, own in zip(step["candidates"], here.steps[0].candidates, strict=True):
            assert there["scores"] == pytest.approx(own.scores, abs=1e-4)
        assert answer.choices[0].message.content == here.text

    with (
        start(config, *folders) as running,
        OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client,
    ):
        asked = {"num_candidates": 5}
        check(ask(client, asked, max_tokens=8))
        scored = post(running, "/v1/score", json.dumps({"messages": MESSAGES, "candidates": ["5."]}).encode())
        assert scored[0] == 200 and set(scored[2]["data"][0]["scores"]) == set(OBJECTIVES)
        (reward,) = started_here("mahalo-reward-1")
        reward.kill()
        check(ask(client, asked, max_tokens=8))


def test_models_that_cannot_be_loaded_are_named(stopped, folders, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ServeError, match=r"could not be started[\s\S]*empty") as caught:
        start(ServeConfig(port=0), folders[0], str(tmp_path / "empty"))
    assert "Traceback" not in str(caught.value)
    with pytest.raises(ServeError, match=r"1000 replica\(s\) need 1000 CPU, the Ray cluster has"):
        start(ServeConfig(port=0, replicas=1000), *folders)
    with pytest.raises(ServeError, match="no model at"):
        start(ServeConfig(port=0), str(tmp_path / "nowhere"), None)
