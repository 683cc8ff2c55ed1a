"""Requests of one session do not wait for each other, and no answer depends on who runs beside it."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from tiny_guided import as_read, model, reward

from mahalo_ray.decoding.guidance import GuidedRequest, GuidedResult
from mahalo_ray.decoding.guided import GuidedDecoder
from mahalo_ray.decoding.kv_cache import RaggedCache
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.decoding.session import GuidedSession, RequestState
from mahalo_ray.models.scoring import TokenTrace
from mahalo_ray.objectives import Weights
from mahalo_ray.serving.answer_job import AnswersWanted
from mahalo_ray.serving.backend import GuidedBackend
from mahalo_ray.serving.model_thread import Job


def decoder() -> GuidedDecoder:
    return GuidedDecoder(model(), reward(), "math")


def request(step: int, seed: int, text: str = "What is 2 + 3?", **options: Any) -> GuidedRequest:
    """Steps of at most `step` tokens, answers of at most 40."""
    settings = {"num_candidates": 3, "max_new_tokens": 40} | options
    return GuidedRequest([{"role": "user", "content": text}], seed=seed, max_step_tokens=step, **settings)


REQUESTS = [
    request(2, 1),
    request(5, 2, "So?", num_candidates=5),
    request(17, 3, "The answer"),
    request(40, 4, "Is it? Yes!", num_candidates=2),
    request(3, 5, num_candidates=1),
    request(11, 6, "Dr. Smith said", strategy="sample"),
]


def same(found: GuidedResult, alone: GuidedResult) -> None:
    assert found.token_ids == alone.token_ids and found.stop_reason == alone.stop_reason
    assert [step.chosen for step in found.steps] == [step.chosen for step in alone.steps]
    assert found.policy_tokens == alone.policy_tokens


def finish(session: GuidedSession) -> None:
    while session.is_busy:
        session.advance()


def test_answers_are_those_of_requests_alone_whoever_joins_and_leaves() -> None:
    session = decoder().session()
    running = [session.submit(one) for one in REQUESTS[:3]]
    cancelled = session.submit(request(40, 9, num_candidates=4))
    session.advance()
    running += [session.submit(one) for one in REQUESTS[3:]]
    session.advance()
    assert cancelled.stop_reason is None and not cancelled.steps  # in the middle of its first step
    session.cancel(cancelled)
    finish(session)
    assert len(session.engine) == 0
    for one, alone in zip(running, REQUESTS, strict=True):
        same(one.result(), decoder().generate_batch([alone])[0])


def test_scores_over_kept_caches_are_those_of_the_text_encoded_again() -> None:
    made = decoder()
    session = made.session()
    running = [session.submit(one) for one in REQUESTS]
    finish(session)
    checked = 0
    for one in running:
        before = list(one.prompt_ids)
        for step in one.result().steps:
            for candidate in step.candidates:
                if candidate.scores:
                    ids = before + as_read(candidate, len(before) - len(one.prompt_ids), 40)
                    again = reward().score_traces([TokenTrace(ids, [len(before)], [len(ids) - 1])])[0][0]
                    found = torch.tensor([candidate.scores[name] for name in reward().objectives])
                    torch.testing.assert_close(found, again, atol=1e-4, rtol=1e-4)
                    checked += 1
            before += step.accepted.token_ids
    assert checked > 30


def test_greedy_answers_are_those_of_transformers_whatever_runs_beside_them() -> None:
    """Another implementation, which encodes each prompt alone, finds the same likeliest tokens."""
    made = decoder()
    session = made.session()
    greedy = {"sampling": SamplingParams(temperature=0), "strategy": "none", "num_candidates": 1}
    asked = [
        request(step, 0, text, **greedy) for step, text in ((3, "So?"), (40, "The answer"), (7, "Is it?"))
    ]
    running = [session.submit(asked[0]), session.submit(REQUESTS[2]), session.submit(asked[1])]
    session.advance()
    running.append(session.submit(asked[2]))
    finish(session)
    for one in (running[0], running[2], running[3]):
        ids = torch.tensor([one.prompt_ids])
        mask = torch.ones_like(ids)
        whole = model().generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0)
        expected = whole[0, ids.shape[1] :].tolist()
        assert len(one.token_ids) > 8 and one.token_ids == expected[: len(one.token_ids)]


def test_short_steps_do_not_wait_for_a_long_one() -> None:
    """The short request is through while its neighbour is still in its first step."""
    session = decoder().session()
    long = session.submit(request(200, 3, num_candidates=2, max_new_tokens=200))
    short = session.submit(request(2, 1, max_new_tokens=12))
    while short.stop_reason is None:
        session.advance()
    assert len(short.result().steps) >= 6
    assert long.stop_reason is None and not long.steps


def test_one_forward_serves_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six requests need about as many forwards as the longest of them, not as all one after the other."""
    counts: dict[str, int] = {}
    made = decoder()
    reader = made.policy.reader
    where = "alone"

    def counting_reader(mixes: Any) -> Any:
        read = reader(mixes)

        def counted(*arguments: Any) -> Any:
            counts[where] = counts.get(where, 0) + 1
            return read(*arguments)

        return counted

    monkeypatch.setattr(made.policy, "reader", counting_reader)
    longest = 0
    for one in REQUESTS:
        before = counts.get("alone", 0)
        made.generate_batch([one])
        longest = max(longest, counts["alone"] - before)
    where = "together"
    session = made.session()
    for one in REQUESTS:
        session.submit(one)
    finish(session)
    # A request that is done may be held back a few tokens, to be scored together with others.
    assert counts["together"] < 0.5 * counts["alone"]
    assert counts["together"] <= 2 * longest


def test_single_tokens_are_told_beside_guided_neighbours() -> None:
    session = decoder().session()
    guided = session.submit(REQUESTS[2])
    plain = request(20, 4, num_candidates=1, max_new_tokens=20)
    streamed: RequestState = session.submit(plain, token_by_token=True)
    told: list[int] = []
    while session.is_busy:
        session.advance()
        told += [token for step in streamed.new_steps() for token in step.accepted.token_ids]
    alone = decoder().generate_batch([plain, REQUESTS[2]])
    assert told == streamed.token_ids == alone[0].token_ids
    assert all(len(step.accepted.token_ids) == 1 for step in streamed.steps)
    same(guided.result(), alone[1])


def test_only_the_chosen_candidates_are_copied_once_for_each_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many candidates there were, and whatever else runs: no whole prefix, no token twice."""
    copied: list[tuple[RaggedCache, np.ndarray]] = []
    accept = RaggedCache.accept

    def counted(self: RaggedCache, slots: np.ndarray, places: Any, counts: np.ndarray) -> None:
        copied.append((self, counts))
        accept(self, slots, places, counts)

    def refused(self: RaggedCache, source: np.ndarray, target: np.ndarray) -> None:
        raise AssertionError("a whole prefix is copied")

    monkeypatch.setattr(RaggedCache, "accept", counted)
    monkeypatch.setattr(RaggedCache, "copy", refused)
    results = decoder().generate_batch(REQUESTS)
    steps, tokens = sum(len(one.steps) for one in results), sum(len(one.token_ids) for one in results)
    caches = {id(cache): cache for cache, _ in copied}
    assert len(caches) == 2  # the policy's and the reward model's
    totals = [np.concatenate([counts for found, counts in copied if found is c]) for c in caches.values()]
    assert all((own > 0).sum() <= steps and own.sum() <= tokens for own in totals)
    # The policy has read all of a step but its last token when it is accepted.
    assert max(own.sum() for own in totals) == tokens - steps


def test_a_client_that_leaves_in_the_middle_of_a_step_changes_nothing_for_the_others() -> None:
    async def run() -> None:
        backend = GuidedBackend(decoder())
        jobs = [Job(chat_job(seed), timeout_s=60) for seed in range(3)]
        backend.admit(jobs)
        backend.advance()
        waiting = asyncio.ensure_future(jobs[1].result())
        await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        while not (jobs[0].finished and jobs[2].finished):
            backend.advance()
        assert not jobs[1].finished
        for job in (jobs[0], jobs[2]):
            alone = GuidedBackend(decoder())
            other = Job(job.payload, timeout_s=60)
            alone.admit([other])
            while not other.finished:
                alone.advance()
            (answer,), (expected_answer,) = await job.result(), await other.result()
            found, expected = answer.result, expected_answer.result
            assert found.text == expected.text
            assert [step.chosen for step in found.steps] == [step.chosen for step in expected.steps]
        late = Job(chat_job(7), timeout_s=60)  # the place is free again
        backend.admit([late])
        while not late.finished:
            backend.advance()
        (answer,) = await late.result()
        assert answer.result.token_ids

    asyncio.run(run())


def chat_job(seed: int) -> AnswersWanted:
    both = Weights({"accuracy": 0.5, "engagement": 0.5})
    return AnswersWanted((request(256, seed, guidance=both),), (None,))
