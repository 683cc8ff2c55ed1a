"""Recorded forwards of the token loop: the same tokens as without, whatever joins, leaves, ends and grows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_decoding_cache
import tiny_guided
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from other_device import moved, pretended_card, traffic
from repeated_operations import RepeatedOperations
from test_other_device import BOTH, REQUESTS, reward, two_headed
from tiny_policies import OBJECTIVES, tiny
from torch import Tensor
from transformers import PreTrainedModel

from mahalo_ray import GuidedDecoder, MultiHeadCausalLM, Weights
from mahalo_ray.config import ActorsConfig, AdaptersConfig, ConfigError, load_config
from mahalo_ray.decoding import branch_attention, step_graph
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.guidance import GuidedRequest, GuidedResult
from mahalo_ray.decoding.policy import CausalPolicy, MultiHeadPolicy
from mahalo_ray.decoding.sampling import SamplingParams


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2"])
@settings(max_examples=8)
@given(
    joining=st.sampled_from([set(), {"cpu"}]),
    prompts=st.lists(test_decoding_cache.tokens, min_size=1, max_size=4),
    rounds=st.lists(
        st.tuples(st.integers(1, 4), st.integers(4, 20), st.integers(0, 2**31)), min_size=1, max_size=3
    ),
)
def test_a_kept_cache_equals_reencoding(name: str, joining: set[str], prompts: Any, rounds: Any) -> None:
    recording = CausalPolicy(test_decoding_cache.model(name), RepeatedOperations())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branch_attention, "_JOINING", joining)
        patch.setattr(step_graph, "_OWN_TOKENS", 8)  # so that buffers grow on the way
        patch.setattr(test_decoding_cache, "policy", lambda _: recording)
        test_decoding_cache.compare_with_reencoding(name, prompts, rounds)


def sharp() -> PreTrainedModel:
    """A model whose draws show when it attends to something else."""
    return test_decoding_cache.model("qwen2")


def guided(policy: Any, options: dict[str, Any]) -> list[GuidedResult]:
    """Answers of requests that join at different times, of which one is cancelled."""
    decoder = GuidedDecoder(policy, reward(), "math")
    session = decoder.session()
    in_play = [fields for fields in REQUESTS if fields.get("strategy") != "beam"]  # which is played whole
    asked = [GuidedRequest(tiny_guided.ASK, seed=n, **{**options, **r}) for n, r in enumerate(in_play)]
    states = []
    for number, request in enumerate(asked):
        states.append(session.submit(request))
        if number == 3:
            session.cancel(states[1])
        if session.is_busy:
            session.advance()
    while session.is_busy:
        session.advance()
    return [state.result() for number, state in enumerate(states) if number != 1]


def test_guided_requests_that_join_and_leave_get_the_same_answers() -> None:
    options = {"weights": BOTH, "num_candidates": 3, "max_new_tokens": 40, "max_step_tokens": 9}
    recorder = RepeatedOperations()
    expected = guided(two_headed(), options)
    found = guided(MultiHeadPolicy(two_headed(), recorder=recorder), options)
    assert [own.token_ids for own in found] == [other.token_ids for other in expected]
    for own, other in zip(found, expected, strict=True):
        for step, same in zip(own.steps, other.steps, strict=True):
            totals = [candidate.total or 0 for candidate in same.candidates]
            assert [c.total or 0 for c in step.candidates] == pytest.approx(totals, rel=1e-3, abs=1e-4)
    assert recorder.repeats > recorder.recordings > 0


def tokens_of(engine: Engine, steps: int, length: int) -> tuple[list[list[int]], int]:
    """Steps of three sequences with two candidates each, all in flight together."""
    rows = engine.add(3, [Weights.one("accuracy"), BOTH, BOTH])
    engine.append(rows, [[1, 2, 3], [4, 5], [6]])
    forwards = 0
    for step in range(steps):
        seeds, params = [step, step + 1, step + 2], [SamplingParams()] * 3
        engine.start(rows, [2] * 3, params, seeds, [length] * 3, [None] * 3)
        done: list[int] = []
        while len(done) < 3:
            done += engine.step()
            forwards += 1
        engine.accept(engine.collect(rows), [1, 0, 1])
    return [engine.token_ids(row) for row in rows], forwards


def test_all_tokens_but_the_first_few_are_repeats() -> None:
    recorder = RepeatedOperations()
    expected, _ = tokens_of(Engine(two_headed()), 5, 10)
    found, forwards = tokens_of(Engine(MultiHeadPolicy(two_headed(), recorder=recorder)), 5, 10)
    assert found == expected
    # With openings and without; the cache's first growth is one more place in memory.
    assert recorder.recordings <= 4 and recorder.repeats >= forwards - 4


def test_requests_that_join_and_leave_are_seldom_a_new_recording() -> None:
    """Twelve requests, at most six at once, each of three steps of its own length."""
    recorder, found = RepeatedOperations(), []
    for policy in (CausalPolicy(sharp()), CausalPolicy(sharp(), recorder)):
        engine, texts = Engine(policy), {}
        left, steps, prompts = list(range(12)), {}, {}
        forwards = 0
        while left or len(engine):
            while left and len(engine) < 6:
                (row,) = engine.add(1)
                prompts[row] = left.pop(0)
                engine.append([row], [[1 + prompts[row], 2, 3][: 1 + prompts[row] % 3]])
                steps[row] = 0
                start_step(engine, row, prompts[row], 0)
            done, forwards = engine.step(), forwards + 1
            for row in done:
                engine.accept(engine.collect([row]), [prompts[row] % 2])
                steps[row] += 1
                if steps[row] < 3:
                    start_step(engine, row, prompts[row], steps[row])
                else:
                    texts[prompts[row]] = engine.token_ids(row)
                    engine.drop([row])
        found.append(texts)
        assert engine.nbytes == 0  # the last one has left
    assert found[0] == found[1] and len(found[0]) == 12
    assert recorder.recordings <= 6 and recorder.repeats >= forwards - 6


def start_step(engine: Engine, row: int, number: int, step: int) -> None:
    engine.start([row], [2], [SamplingParams()], [number], [3 + (5 * number + step) % 9], [None])


def test_candidates_stay_what_they_are_while_others_join() -> None:
    found = []
    for policy in (CausalPolicy(sharp()), CausalPolicy(sharp(), RepeatedOperations())):
        engine = Engine(policy)
        rows = engine.add(4)
        engine.append(rows, [[1, 2, 3], [4, 5], [6, 7], [8]])
        engine.start(rows[1:], [2] * 3, [SamplingParams()] * 3, [0, 1, 2], [6, 9, 9], [None] * 3)
        while not engine.step():
            pass
        candidates = engine.collect(rows[1:2])
        engine.collect(rows[1:2])  # what is thrown away frees nothing of what is held
        engine.start(rows[:1], [2], [SamplingParams()], [2], [8], [None])  # its row becomes the first
        for _ in range(3):
            engine.step()
        engine.accept(candidates, [1])
        start_step(engine, rows[1], 1, 0)
        while engine.is_busy:
            engine.step()
        found.append([engine.collect([row]).token_ids for row in rows])
    assert found[0] == found[1]


def test_a_sequence_that_moves_in_the_cache_is_read_where_it_lies_now() -> None:
    recorder, found = RepeatedOperations(), []
    for policy in (CausalPolicy(sharp()), CausalPolicy(sharp(), recorder)):
        engine = Engine(policy)
        rows = engine.add(3)
        engine.append(rows, [[7, 8, 9], [4, 5], [1, 2, 3]])
        engine.start(rows[2:], [2], [SamplingParams()], [0], [12], [None])
        for _ in range(6):
            engine.step()
        engine.drop(rows[:1])  # the last one takes its place
        while not engine.step():
            pass
        found.append(engine.collect(rows[2:]).token_ids)
    assert found[0] == found[1] and recorder.recordings == 2


def test_nothing_that_is_recorded_waits_for_the_card_or_copies_to_it() -> None:
    expected, _ = tokens_of(Engine(two_headed()), 3, 8)
    recorded = []

    def record(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def watched() -> Tensor:
            before = dict(traffic)
            result = compute()
            assert dict(traffic) == before
            return result

        recorded.append(watched)
        return watched

    with pretended_card():
        policy = MultiHeadPolicy(moved(two_headed()), recorder=record)  # type: ignore[arg-type]
        found, _ = tokens_of(Engine(policy), 3, 8)
    assert found == expected and recorded


def test_a_forward_that_gives_the_host_a_number_is_refused_while_recording() -> None:
    with pytest.raises(RuntimeError, match="not permitted while recording"):
        RepeatedOperations()(lambda: torch.ones(3) * float(torch.ones(3).sum()))


def test_what_cannot_be_recorded_is_said() -> None:
    base = copy.deepcopy(tiny())
    adapted = MultiHeadCausalLM.from_base(base, OBJECTIVES, adapters=AdaptersConfig(depth=1)).eval()
    with pytest.raises(ValueError, match=r"Set cluster\.cuda_graphs to false"):
        MultiHeadPolicy(adapted, recorder=RepeatedOperations())
    with pytest.raises(ValueError, match="'use_gpu' is not"):
        ActorsConfig(cuda_graphs=True)
    file = Path(__file__).parent.parent / "examples" / "quickstart.yaml"
    settings = ["cluster.use_gpu=true", "cluster.cuda_graphs=true", "policy.adapters={depth: 1}"]
    with pytest.raises(ConfigError, match=r"forwards through 'policy\.adapters' cannot be recorded"):
        load_config(file, settings)
