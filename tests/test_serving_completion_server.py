"""A policy on a completion server behind the endpoint: our own endpoint is the server, over a real socket."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tiny_guided
from fastapi.testclient import TestClient
from served_app import kept_port, served
from test_serving_app import CHAT, MESSAGES, body, error_of, events, make_app, text_of

from mahalo_ray.config import (
    DomainConfig,
    EndpointConfig,
    FurtherModel,
    MergedModel,
    RewardServer,
    SamplingConfig,
    ServeConfig,
    ServerSource,
)
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.domains.protocol import load_domain, outcomes, prefix_judgements
from mahalo_ray.objectives import Weights
from mahalo_ray.serving.app import create_app
from mahalo_ray.serving.backend import GuidedBackend
from mahalo_ray.serving.service import ChatService, Defaults, ServiceSettings

BALANCED = Weights.parse("accuracy=1,engagement=1")
GREEDY = {"temperature": 0, "num_candidates": 2}


@pytest.fixture(scope="module")
def direct() -> Iterator[TestClient]:
    """The endpoint that samples, asked directly."""
    with TestClient(make_app(max_new_tokens=64, max_ongoing_requests=8)) as asked:
        yield asked


@pytest.fixture(scope="module")
def address(direct: TestClient) -> Iterator[str]:
    """The same, as a completion server."""
    with served(direct.app) as url:  # type: ignore[arg-type]
        yield url


def source(address: str, tokenizer_folder: str, **options: Any) -> ServerSource:
    endpoint = EndpointConfig(base_url=f"{address}/v1", model="mahalo", max_retries=0)
    further = [MergedModel(model="mahalo@accuracy=1", weights=Weights.one("accuracy"))]
    return ServerSource(
        endpoint=endpoint, tokenizer=tokenizer_folder, weights=BALANCED, further_models=further, **options
    )


def over(server: ServerSource, judge: RewardServer | None = None, **defaults: Any) -> TestClient:
    """An endpoint whose policy is on this server; the reward model is the direct endpoint's, unless a model
    judges."""
    reward = copy.deepcopy(tiny_guided.reward()) if judge is None else judge
    backend = GuidedBackend.load(server, reward, "tutoring", DeviceConfig("cpu", "float32"), 64)
    config = ServeConfig(max_ongoing_requests=4, max_new_tokens=32, max_candidates=4)
    settings = Defaults(num_candidates=2, sampling=SamplingConfig(max_new_tokens=8), **defaults)
    app = create_app(ChatService(backend, ServiceSettings(config, "mahalo", settings)))
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(address: str, tokenizer_folder: str) -> Iterator[TestClient]:
    with over(source(address, tokenizer_folder)) as asked:
        yield asked


def text(answer: Any) -> str:
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("weights", [None, {"accuracy": 1}, {"accuracy": 2, "engagement": 2}])
def test_greedy_answers_are_those_of_the_server_at_each_of_its_weights(
    client: TestClient, direct: TestClient, weights: dict[str, float] | None
) -> None:
    fields = body(**GREEDY, **({} if weights is None else {"objectives": weights}))
    answer = client.post(CHAT, json=fields)
    assert answer.status_code == 200, answer.text
    assert text(answer) == text(direct.post(CHAT, json=fields))
    chunks = events(client.post(CHAT, json={**fields, "stream": True}).text)
    assert text_of(chunks) == text(answer)


def test_the_best_of_what_the_server_samples_is_taken(client: TestClient, direct: TestClient) -> None:
    answer = client.post(CHAT, json=body(num_candidates=4, guidance={"accuracy": 1})).json()
    (step,) = answer["mahalo"]["steps"]
    texts = [candidate["text"] for candidate in step["candidates"]]
    totals = [candidate["total"] for candidate in step["candidates"]]
    assert len(set(texts)) > 1 and totals[step["chosen"]] == max(totals)
    scored = direct.post("/v1/score", json={"messages": MESSAGES, "candidates": texts}).json()["data"]
    for candidate, rated in zip(step["candidates"], scored, strict=True):
        assert candidate["scores"] == pytest.approx(rated["scores"], abs=1e-4)
    again = client.post(CHAT, json=body(num_candidates=4, guidance={"accuracy": 1})).json()
    assert again["choices"] == answer["choices"]


def test_a_text_is_continued_and_candidates_are_scored(client: TestClient, direct: TestClient) -> None:
    asked = {"model": "mahalo", "prompt": "So we add 2 and", "max_tokens": 6, "temperature": 0, "echo": True}
    ours, theirs = (each.post("/v1/completions", json=asked).json() for each in (client, direct))
    assert ours["choices"] == theirs["choices"]
    rated = {"messages": MESSAGES, "candidates": ["5.", "6."]}
    assert client.post("/v1/score", json=rated).json()["data"][0]["scores"] == pytest.approx(
        direct.post("/v1/score", json=rated).json()["data"][0]["scores"], abs=1e-5
    )


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        (
            {"objectives": {"engagement": 1}},
            "objectives",
            "accuracy=0.5,engagement=0.5; accuracy=1 can be had",
        ),
        ({"strength": 2}, "strength", "on a completion server"),
        ({"logprobs": True}, "logprobs", "leave 'logprobs' out"),
    ],
)
def test_what_a_server_cannot_give_is_refused_by_name(
    client: TestClient, fields: dict[str, Any], param: str, says: str
) -> None:
    answer = client.post(CHAT, json=body(**fields))
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"] == param and says in error["message"]


def test_the_model_says_which_weights_it_has(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert model["merged_weights"] == [{"accuracy": 0.5, "engagement": 0.5}, {"accuracy": 1}]
    assert model["defaults"]["objectives"] == {"accuracy": 0.5, "engagement": 0.5}
    assert model["limits"]["max_strength"] == 1


@pytest.fixture(scope="module")
def judged(address: str, tokenizer_folder: str, direct: TestClient) -> Iterator[TestClient]:
    """Policy and judge both on the server. The tiny model speaks no English: what counts as yes and no are
    two of the likeliest tokens after any question."""
    chat = ChatFormat(tiny_guided.tokenizer())
    ids = chat.prompt_ids([tiny_guided.message({"role": "user", "content": "So? Answer with Yes or No."})])
    asked = {"model": "mahalo", "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 20}
    (top,) = direct.post("/v1/completions", json=asked).json()["choices"][0]["logprobs"]["top_logprobs"]
    yes, no = list(dict.fromkeys(token.strip().lower() for token in top if token.strip()))[:2]
    questions = {"accuracy": "Is the last reply right?", "engagement": "Is it kind?"}
    endpoint = EndpointConfig(base_url=f"{address}/v1", model="mahalo", max_retries=0)
    judge = RewardServer(
        endpoint=endpoint, tokenizer=tokenizer_folder, questions=questions, yes=yes, no=no, max_length=250
    )
    with over(source(address, tokenizer_folder), judge) as client:
        yield client


def test_a_judge_on_a_server_scores_by_how_likely_it_says_yes(judged: TestClient, direct: TestClient) -> None:
    answer = judged.post(CHAT, json=body(num_candidates=4, guidance={"accuracy": 1})).json()
    (step,) = answer["mahalo"]["steps"]
    totals = [candidate["total"] for candidate in step["candidates"]]
    assert totals[step["chosen"]] == max(totals) > min(totals)
    texts = [candidate["text"] for candidate in step["candidates"]]
    rated = judged.post("/v1/score", json={"messages": MESSAGES, "candidates": texts}).json()["data"]
    for candidate, score in zip(step["candidates"], rated, strict=True):
        assert candidate["scores"] == pytest.approx(score["scores"], abs=1e-6)
        assert all(0 < value < 1 for value in score["scores"].values())
    judge = judged.app.state.services.first.backend._decoder.reward_models[0]  # type: ignore[attr-defined]
    prompt = [tiny_guided.message(message) for message in MESSAGES]
    ids = judge._ids(prompt, texts[0], "accuracy")
    assert "Is the last reply right?" in tiny_guided.tokenizer().decode(ids)
    asked = {"model": "mahalo", "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 20}
    (top,) = direct.post("/v1/completions", json=asked).json()["choices"][0]["logprobs"]["top_logprobs"]
    shares = [
        sum(math.exp(logp) for token, logp in top.items() if token.strip().lower() == word)
        for word in judge._words
    ]
    assert rated[0]["scores"]["accuracy"] == pytest.approx(shares[0] / sum(shares), abs=1e-6)


def test_a_domain_of_prompts_is_judged_by_a_served_model(
    address: str, direct: TestClient, tmp_path: Path
) -> None:
    """What the tiny model says holds numbers: its last one is the score."""
    (tmp_path / "rubric.txt").write_text("{{ conversation }}\n{{ response }}")
    (tmp_path / "prompts.jsonl").write_text('{"question": "2 + 3?", "answer": "5"}')
    judge = {
        "endpoint": {"base_url": f"{address}/v1", "model": "mahalo", "max_retries": 0},
        "rubric": str(tmp_path / "rubric.txt"),
        "score_pattern": r"(\d+)",
        "scale": [0, 99],
        "max_tokens": 12,
    }
    prompts = {"path": str(tmp_path / "prompts.jsonl"), "judges": {"accuracy": "checker", "kind": judge}}
    domain = load_domain(DomainConfig.model_validate({"name": "prompts", "prompts": prompts}))
    episodes = [domain.episode(number) for number in range(2)]
    for episode, answer in zip(episodes, ("5", "It is 6."), strict=True):
        episode.hear(answer)
    values = []
    for answer in ("5", "It is 6."):
        said = text(direct.post(CHAT, json=rating(f"User: 2 + 3?\n{answer}")))
        values.append(float(re.findall(r"\d+", said)[-1]) / 99)
    assert values[0] != values[1]
    assert outcomes(episodes, ["accuracy", "kind"]) == [
        {"accuracy": 1.0, "kind": values[0]},
        {"accuracy": 0.0, "kind": values[1]},
    ]
    assert prefix_judgements(episodes, ["accuracy", "kind"]) == [{"kind": value} for value in values]


def rating(question: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": "mahalo", "messages": messages, "max_tokens": 12, "temperature": 0}


def test_a_judge_that_says_something_else_or_nothing_is_named(
    judged: TestClient, address: str, tokenizer_folder: str
) -> None:
    long = {"messages": [{"role": "user", "content": "2 + 3 " * 60}], "candidates": ["5."]}
    refused = judged.post("/v1/score", json=long)
    assert refused.status_code == 400 and "the model reads 250" in error_of(refused)["message"]
    endpoint = EndpointConfig(base_url=f"{address}/v1", model="mahalo", max_retries=0)
    silent = RewardServer(
        endpoint=endpoint, tokenizer=tokenizer_folder, questions={"a": "?"}, yes="\u2713", no="\u2717"
    )
    with pytest.raises(ValueError, match="neither \u2713 nor \u2717 is among its likeliest words"):
        over(source(address, tokenizer_folder), silent)
    gone = RewardServer(
        endpoint=EndpointConfig(base_url="http://127.0.0.1:9/v1", model="m", max_retries=0),
        tokenizer=tokenizer_folder,
        questions={"a": "So?"},
    )
    with pytest.raises(ValueError, match="gave up after 1 attempts"):
        over(source(address, tokenizer_folder), gone)


def test_a_server_that_is_gone_costs_a_503_and_not_the_replica(tokenizer_folder: str) -> None:
    with kept_port() as port, ExitStack() as asking:
        with served(make_app(max_new_tokens=64), port) as url:
            asked = asking.enter_context(over(source(url, tokenizer_folder)))
        answer = asked.post(CHAT, json=body(**GREEDY))
        assert (answer.status_code, error_of(answer)["code"]) == (503, "server_unavailable")
        assert url not in answer.text and answer.headers["Retry-After"]
        assert asked.get("/health").status_code == 200
        asking.close()
        with pytest.raises(RuntimeError, match="gave up after 1 attempts"):
            over(source(url, tokenizer_folder))


def test_defaults_have_to_be_weights_that_the_server_has(address: str, tokenizer_folder: str) -> None:
    with pytest.raises(ValueError, match="add one to 'further_models'"):
        over(source(address, tokenizer_folder), objectives=Weights.one("engagement"))
    with pytest.raises(ValueError, match="two models have the weights"):
        ServerSource(
            endpoint=EndpointConfig(base_url=address, model="a"),
            tokenizer=tokenizer_folder,
            weights=BALANCED,
            further_models=[MergedModel(model="b", weights=BALANCED)],
        )
    with pytest.raises(ValueError, match="'both' needs either a policy or a completion server"):
        FurtherModel(id="both", policy="a", server=source(address, tokenizer_folder))
