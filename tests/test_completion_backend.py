"""Guided decoding over a real completion server: a tiny model behind HTTP, sampled by seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from local_endpoint import LocalEndpoint, Received, Scripted, fails
from tiny_guided import ASK, as_read, memorised, model, reward, tokenizer

from mahalo_ray.decoding.guidance import GuidedRequest
from mahalo_ray.decoding.guided import GuidedDecoder
from mahalo_ray.decoding.remote import CompletionDecoder, CompletionServerError
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.endpoints import Endpoint
from mahalo_ray.models.scoring import TokenTrace
from mahalo_ray.objectives import Weights

STEPS_TEXT = "We add 2 and 3.\n\nThat gives 5.\n\nSo \\boxed{5} is it.\n\nMore"
GREEDY = SamplingParams(temperature=0)


class CompletionServer:
    """What vLLM does for one request, slowly: n completions of token ids, up to a stop string.

    `tells`: whether it says which stop string ended a completion, as vLLM's `stop_reason`.
    """

    def __init__(self, policy: Any, tells: bool = True, longest: int = 200) -> None:
        self.policy, self.tells, self.longest = policy, tells, longest

    def __call__(self, received: Received) -> Scripted:
        body = received.body
        if len(body["prompt"]) > self.longest:
            return fails(400, "the prompt is longer than the context")
        choices = [self._completion(body, k) for k in range(body["n"])]
        tokens = sum(choice.pop("tokens") for choice in choices)
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": tokens, "total_tokens": 0}
        answer = {"id": "x", "object": "text_completion", "created": 0, "model": "m"}
        return Scripted(body=json.dumps({**answer, "choices": choices, "usage": usage}).encode())

    @torch.no_grad()
    def _completion(self, body: dict[str, Any], k: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(body["seed"] + k)
        ids, text, reason, stopped = list(body["prompt"]), "", "length", None
        for _ in range(body["max_tokens"]):
            logits = self.policy(torch.tensor([ids])).logits[0, -1]
            if body["temperature"] == 0:
                token = int(logits.argmax())
            else:
                shares = torch.softmax(logits / body["temperature"], -1)
                token = int(torch.multinomial(shares, 1, generator=generator))
            ids.append(token)
            if token == tokenizer().eos_token_id:
                reason = "stop"
                break
            text = tokenizer().decode(ids[len(body["prompt"]) :], skip_special_tokens=True)
            found = [stop for stop in body.get("stop") or [] if stop in text]
            if found:
                text, reason, stopped = text[: text.index(found[0])], "stop", found[0]
                break
        told = {"stop_reason": stopped} if self.tells else {}
        tokens = len(ids) - len(body["prompt"])
        return {"index": k, "text": text, "finish_reason": reason, "logprobs": None, "tokens": tokens, **told}


def guided(
    server: LocalEndpoint, boundary: str = "math", separator: str | None = "\n\n", **options: Any
) -> CompletionDecoder:
    return CompletionDecoder(Endpoint(server.config()), reward(separator), boundary, **options)


SHORT = {"max_step_tokens": 8, "max_new_tokens": 24, "num_candidates": 3}


@pytest.mark.parametrize("tells", [True, False])
def test_greedy_decoding_over_a_server_is_greedy_decoding_here(tells: bool) -> None:
    policy = memorised(STEPS_TEXT)
    options: dict[str, Any] = {"sampling": GREEDY, "num_candidates": 2, "max_new_tokens": 100}
    here = GuidedDecoder(policy, reward(), "math").generate(ASK, **options)
    with LocalEndpoint(CompletionServer(policy, tells)) as server:
        there = guided(server).generate(ASK, **options)
        stops = [received.body.get("stop") for received in server.received]
    assert [s.text.strip() for s in there.steps] == ["We add 2 and 3.", "That gives 5.", "So \\boxed{5}"]
    assert there.text.strip() == here.text[: len(there.text)].strip()
    assert there.stop_reason == here.stop_reason == "answer"
    assert stops[0] == ["\n\n"] and (stops[-1] == ["\n\n"]) == tells


def test_every_step_takes_the_best_of_n_as_the_whole_text_would_score_it() -> None:
    with LocalEndpoint(CompletionServer(model())) as server:
        made = guided(server)
        result = made.generate(ASK, guidance=Weights.one("accuracy"), seed=3, **SHORT)
        again = made.generate(ASK, guidance=Weights.one("accuracy"), seed=3, **SHORT)
        bodies = [received.body for received in server.received]
    assert result.text == again.text and len(result.steps) >= 2
    assert all(body["n"] == 3 and body["max_tokens"] <= 8 for body in bodies)
    assert len({body["seed"] for body in bodies[: len(result.steps)]}) == len(result.steps)
    before = bodies[0]["prompt"]
    for step in result.steps:
        totals = [candidate.total for candidate in step.candidates]
        assert step.chosen == max(range(3), key=totals.__getitem__)
        for candidate in step.candidates:
            ids = before + as_read(candidate, len(before) - len(bodies[0]["prompt"]), 24)
            expected = reward().score_traces([TokenTrace(ids, [len(before)], [len(ids) - 1])])[0][0]
            found = torch.tensor([candidate.scores[name] for name in reward().objectives])
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        before = before + step.accepted.token_ids
    assert "".join(step.text for step in result.steps) == result.text
    assert result.reward_tokens <= result.policy_tokens + 3 * 3 * len(result.steps)


def test_limits_stop_strings_and_sampling_options_reach_the_server() -> None:
    with LocalEndpoint(CompletionServer(memorised(STEPS_TEXT))) as server:
        made = guided(server)
        cut = made.generate(ASK, sampling=GREEDY, num_candidates=2, max_new_tokens=7)
        assert cut.stop_reason == "length" and len(cut.token_ids) == 7
        stopped = made.generate(
            ASK,
            sampling=SamplingParams(temperature=0, top_p=0.5, min_p=0.1),
            num_candidates=2,
            stop=("gives 5",),
        )
        assert stopped.stop_reason == "stop_string" and stopped.text.endswith("gives 5")
        assert made.generate(ASK, sampling=GREEDY, max_steps=1).stop_reason == "max_steps"
        body = server.received[-2].body
    assert body["top_p"] == 0.5 and body["min_p"] == 0.1 and "top_k" not in body


def test_an_answer_ends_where_the_reward_model_stops_reading() -> None:
    with LocalEndpoint(CompletionServer(model(), longest=300)) as server:
        made = guided(server)
        long = [{"role": "user", "content": "2 + 3 " * 54}]
        options = {"num_candidates": 2, "max_step_tokens": 9, "max_new_tokens": 100, "seed": 1}
        result = made.generate(long, **options)
    assert 200 < result.prompt_tokens < 240
    assert result.stop_reason == "context" and len(result.token_ids) <= 256 - result.prompt_tokens


@pytest.mark.parametrize("strategy", ["sample", "best_of_n", "none"])
def test_other_strategies_and_requests_in_company(strategy: str) -> None:
    requests = [GuidedRequest(ASK, strategy=strategy, seed=seed, **SHORT) for seed in (1, 2)]
    with LocalEndpoint(CompletionServer(model())) as server:
        made = guided(server)
        together = made.generate_each(requests)
        alone = [made.generate_each([request])[0] for request in requests]
    for one, other in zip(together, alone, strict=True):
        assert not isinstance(one, ValueError) and not isinstance(other, ValueError)
        assert one.text == other.text
        assert len(one.steps[0].candidates) == (1 if strategy == "none" else 3)
        assert (strategy != "best_of_n") or len(one.steps) == 1


def after(*troubles: Scripted) -> Callable[[Received], Scripted]:
    """These answers first, then a server that works."""
    left, works = list(troubles), CompletionServer(memorised("Yes."))
    return lambda received: left.pop(0) if left else works(received)


def test_a_busy_server_is_asked_again_and_one_that_gives_up_is_named() -> None:
    with LocalEndpoint(after(fails(429, retry_after="0"), fails(500))) as server:
        made = guided(server, "tutoring", None)
        result = made.generate(ASK, sampling=GREEDY, num_candidates=2)
        assert result.text == "Yes." and result.stop_reason == "stop_token"
        assert dict(made.endpoint.usage.retries) == {"http_429": 1, "http_500": 1}
    with (
        LocalEndpoint([fails(401, "who are you")]) as server,
        pytest.raises(CompletionServerError, match=r"after 1 attempts \(http_401\): .*who are you"),
    ):
        CompletionDecoder(Endpoint(server.config(max_retries=0)), reward(), "math").generate(ASK)


def test_a_prompt_that_a_server_always_fails_at_is_its_own_error() -> None:
    works = CompletionServer(memorised("Yes."))

    def fails_at_long_ones(received: Received) -> Scripted:
        return fails(500, "out of memory") if len(received.body["prompt"]) > 60 else works(received)

    long = [{"role": "user", "content": "2 + 3 " * 30}]
    with LocalEndpoint(fails_at_long_ones) as server:
        made = CompletionDecoder(Endpoint(server.config(max_retries=0)), None, "tutoring", tokenizer())
        good, bad = made.generate_each(
            [GuidedRequest(messages, sampling=GREEDY, num_candidates=1) for messages in (ASK, long)]
        )
    assert not isinstance(good, ValueError) and good.text == "Yes."
    assert isinstance(bad, ValueError) and "failed at the prompt 1 times (http_500)" in str(bad)


def test_what_a_server_cannot_do_is_refused() -> None:
    with LocalEndpoint(CompletionServer(memorised("Yes."))) as server:
        balanced = Weights.parse("accuracy=1,engagement=1")
        made = guided(server, "tutoring", None, served_weights=balanced)
        assert made.generate(ASK, weights=balanced, sampling=GREEDY).text == "Yes."
        with pytest.raises(ValueError, match=r"declared to serve \(accuracy=0.5,engagement=0.5\)"):
            made.generate(ASK, weights=Weights.one("accuracy"))
        with pytest.raises(ValueError, match="'beam' is not possible"):
            made.generate(ASK, strategy="beam", num_candidates=4, beam_width=2)
        with pytest.raises(ValueError, match=r"prompt has \d+ tokens and the reward model reads"):
            made.generate([{"role": "user", "content": "2 + 3 " * 200}])
        long = [{"role": "user", "content": "2 + 3 " * 52}]
        good, bad = made.generate_each(
            [GuidedRequest(ASK, sampling=GREEDY), GuidedRequest(long, sampling=GREEDY)]
        )
        assert not isinstance(good, ValueError) and good.text == "Yes."
        assert isinstance(bad, ValueError) and "longer than the context" in str(bad)


def test_a_server_without_n_is_named() -> None:
    def one_only(received: Received) -> Scripted:
        received.body["n"] = 1
        return CompletionServer(model())(received)

    with (
        LocalEndpoint(one_only) as server,
        pytest.raises(CompletionServerError, match="1 completions where 3 were asked for"),
    ):
        guided(server).generate(ASK, **SHORT)
