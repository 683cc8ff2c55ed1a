"""Decoding, scoring, training and evaluation on a pretended card, where what works on the CPU alone fails."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import tiny_guided
import torch
from other_device import CARD, DeviceError, moved, pretended_card, traffic
from tiny_policies import batch, policy
from torch import Tensor

from mahalo_ray import GuidedDecoder, MultiHeadCausalLM, ProcessRewardModel, Weights
from mahalo_ray.config import LoraConfig
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.guidance import GuidedRequest
from mahalo_ray.decoding.likelihood import token_logps
from mahalo_ray.decoding.policy import CausalPolicy, HeadMix, MultiHeadPolicy
from mahalo_ray.decoding.sampling import DrawLimits, SamplingBatch, SamplingParams, draw
from mahalo_ray.decoding.step_graph import Recorder
from mahalo_ray.decoding.stopping import StopRule, TokenTexts, boundary_for
from mahalo_ray.evaluation.methods import _divergence
from mahalo_ray.losses import dpo_loss
from mahalo_ray.training.pairs import PackedPairs, TokenPairs, TokenRows, pair_inputs

BOTH = Weights.parse("accuracy=0.7,engagement=0.3")


def two_headed() -> MultiHeadCausalLM:
    base = copy.deepcopy(tiny_guided.model())
    objectives = ["accuracy", "engagement"]
    return MultiHeadCausalLM.from_base(base, objectives, noise=0.5, keep_base_head=True).eval()


def reward() -> ProcessRewardModel:
    return copy.deepcopy(tiny_guided.reward())


def test_the_pretended_card_refuses_what_cuda_refuses_and_counts_what_waits() -> None:
    with pretended_card():
        ours, index = torch.zeros(3, device=CARD), torch.tensor([0, 2])
        assert (ours + torch.tensor(1.0)).tolist() == [1, 1, 1]  # a scalar of the host may join
        with pytest.raises(DeviceError, match=r"aten::add: tensors of the card and of the host \(\[3\]\)"):
            ours + torch.ones(3)
        with pytest.raises(DeviceError, match="indexed by one of the card"):
            torch.ones(3)[index.to(CARD)]
        with pytest.raises((TypeError, RuntimeError)):
            ours.numpy()
        traffic.clear()
        ours[index] = torch.ones(2, device=CARD)  # torch copies the index
        assert dict(traffic) == {"copy": 1} and ours.cpu().tolist() == [1, 0, 1]
        assert bool(ours.any()) and len(ours[ours > 0]) == 2 and traffic["wait"] == 3


REQUESTS: list[dict[str, Any]] = [
    {"strength": 2.0},
    {"weights": Weights.one("engagement"), "sampling": SamplingParams(temperature=0.0)},
    {"sampling": SamplingParams(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01), "stop": ("e",)},
    {"strategy": "sample", "max_step_tokens": 3},
    {"strategy": "best_of_n"},
    {"strategy": "beam", "num_candidates": 4, "beam_width": 2},
    {"strategy": "none"},
    {"min_tokens": 6, "repetition_penalty": 1.3},
]


def test_guided_answers_are_the_cpus() -> None:
    shared = {"weights": BOTH, "num_candidates": 3, "max_new_tokens": 10, "max_step_tokens": 4}
    requests = [GuidedRequest(tiny_guided.ASK, seed=n, **{**shared, **r}) for n, r in enumerate(REQUESTS)]
    expected = GuidedDecoder(two_headed(), reward(), "math").generate_batch(requests)
    with pretended_card():
        decoder = GuidedDecoder(moved(two_headed()), moved(reward()), "math")  # type: ignore[arg-type]
        found = decoder.generate_batch(requests)
    for own, other in zip(found, expected, strict=True):
        assert (own.token_ids, own.stop_reason) == (other.token_ids, other.stop_reason)
        for step, same in zip(own.steps, other.steps, strict=True):
            totals = [c.total or 0 for c in same.candidates]
            assert [c.total or 0 for c in step.candidates] == pytest.approx(totals, rel=1e-3, abs=1e-4)


def test_requests_join_and_are_cancelled_on_the_card() -> None:
    options: dict[str, Any] = {"weights": BOTH, "num_candidates": 2, "max_step_tokens": 3}
    requests = [GuidedRequest(tiny_guided.ASK, seed=n, max_new_tokens=9, **options) for n in range(3)]
    expected = GuidedDecoder(two_headed(), reward(), "math").generate_batch(requests)
    with pretended_card():
        decoder = GuidedDecoder(moved(two_headed()), moved(reward()), "math")  # type: ignore[arg-type]
        session = decoder.session()
        states = [session.submit(requests[0]), session.submit(requests[1])]
        session.advance()
        session.cancel(states[0])
        states.append(session.submit(requests[2]))
        while session.is_busy:
            session.advance()
        assert [state.result().token_ids for state in states[1:]] == [r.token_ids for r in expected[1:]]


@pytest.mark.parametrize("recorder", [None, lambda compute: compute], ids=["run", "recorded"])
def test_the_token_loop_waits_for_the_card_once_per_token(recorder: Recorder | None) -> None:
    """Twice where a text is read, and once more where the set of branches changes."""
    with pretended_card():
        model = MultiHeadPolicy(moved(two_headed()), recorder=recorder)  # type: ignore[arg-type]
        texts = TokenTexts(tiny_guided.tokenizer())
        limits = [DrawLimits(8, 1.2)] * 2
        for weights, known, most in ((BOTH, None, 1), ([BOTH, Weights.one("accuracy")], texts, 2)):
            engine = Engine(model, stop_ids=[], texts=known)
            rows = engine.add(2, weights)
            engine.append(rows, [[1, 2, 3], [4, 5]])
            rules = [None if known is None else StopRule(boundary_for("math"))] * 2
            engine.start(rows, [2, 2], [SamplingParams()] * 2, [0, 1], [9, 6], rules, limits)
            engine.step()
            for _ in range(4):
                traffic.clear()
                assert engine.step() == []
                assert 1 <= traffic["wait"] <= most and traffic["copy"] <= most
            traffic.clear()
            assert engine.step() == [rows[1]] and traffic["wait"] <= most + 1


@pytest.mark.parametrize("kind", ["full", "low_rank", "lora", "packed"])
def test_a_training_step_has_the_gradients_of_the_cpu(kind: str) -> None:
    data, index = batch(rows=4), torch.tensor([0, 1, 0, 1])
    if kind == "packed":
        texts = ([[3, 4, 5], [6]], [[7, 8], [9]], [[1], [2, 3]])  # prompts, chosen and rejected answers
        columns = [TokenRows(rows) for rows in texts]
        preferences = TokenPairs(["a", "b"], np.array([0, 1]), *columns, np.ones(2), np.ones(2), 0)
        packed = pair_inputs(PackedPairs(preferences).tensors(np.arange(2)))
        data = {name: value for name, value in packed.items() if isinstance(value, Tensor)}
        data["attention_mask"] = None

    def step(on_card: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = policy(head_kind="low_rank" if kind == "low_rank" else "full", rank=2)
        if kind == "lora":
            model.add_lora(LoraConfig(rank=2))
        if kind == "packed":
            model.enable_pair_packing()
        given = {n: value.to(CARD) if on_card and value is not None else value for n, value in data.items()}
        heads = index.to(CARD) if on_card else index
        if on_card:
            moved(model)
        logps = model.completion_logps(**given, head_index=heads, chunk_size=3)
        chosen, rejected = logps.chunk(2)
        losses = dpo_loss(chosen, rejected, chosen.detach() - 1, rejected.detach(), 0.1)
        losses.sum().backward()
        return {
            name: parameter.grad.cpu()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }

    expected = step(on_card=False)
    with pretended_card():
        found = step(on_card=True)
    assert found.keys() == expected.keys() and len(expected) > 3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_scores_and_divergences_are_the_cpus() -> None:
    traces = [(tiny_guided.ASK, ["So we add.", "The answer is 5."]), (tiny_guided.ASK, ["It is 4."])]
    sequences = [[1, 2, 3, 4, 5], [6, 7, 8]]
    spoken = [[False, False, True, True, True], [False, True, True]]
    expected = reward().score_batch(traces)
    mix = HeadMix(BOTH, 1.5)
    plain = copy.deepcopy(tiny_guided.model())
    told = _divergence(MultiHeadPolicy(two_headed()), mix, CausalPolicy(plain), sequences, spoken)
    read = token_logps(MultiHeadPolicy(two_headed()), sequences, [mix, HeadMix(BOTH)], top=2)
    with pretended_card():
        found = moved(reward()).score_batch(traces)  # type: ignore[operator]
        ours = MultiHeadPolicy(moved(two_headed()))  # type: ignore[arg-type]
        theirs = CausalPolicy(moved(copy.deepcopy(plain)))  # type: ignore[arg-type]
        measured = _divergence(ours, mix, theirs, sequences, spoken)
        likely = token_logps(ours, sequences, [mix, HeadMix(BOTH)], top=2)
    for own, other in zip(found, expected, strict=True):
        for name, scores in other.items():
            assert own[name] == pytest.approx(scores, abs=1e-5)
    assert measured == pytest.approx(told, rel=1e-4)
    for card, host in zip(likely, read, strict=True):
        assert card.logps[1:] == pytest.approx(host.logps[1:], abs=1e-4)


@torch.no_grad()
def test_in_bfloat16_log_probs_scores_and_draws_are_made_in_fp32() -> None:
    model, data = policy(dtype=torch.bfloat16), batch(rows=4)
    index, labels = torch.tensor([0, 1, 2, 0]), data["labels"]
    hidden = model.hidden_states(data["input_ids"], data["attention_mask"])
    assert hidden.dtype is torch.bfloat16
    found = model.completion_logps(**data, head_index=index, chunk_size=3)
    expected = []
    for row, number in enumerate(index.tolist()):
        logits = model.heads[model.objectives[number]](hidden[row]).float()
        logps = logits.log_softmax(-1).gather(1, labels[row].clamp(min=0)[:, None])[:, 0]
        expected.append(logps[labels[row] != -100].sum())
    assert found.dtype is torch.float32  # rounded to bf16, sums of 20 nats would be off by 0.05
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-3)

    logits = torch.randn(5, 300).bfloat16()
    parameters = SamplingBatch.of([SamplingParams()] * 5, torch.device("cpu"))
    tokens, logps = draw(logits, parameters, torch.linspace(0.1, 0.9, 5, dtype=torch.float64), True)
    wide, exact = draw(logits.float(), parameters, torch.linspace(0.1, 0.9, 5, dtype=torch.float64), True)
    assert torch.equal(tokens, wide) and torch.equal(logps, exact) and logps.dtype is torch.float32  # type: ignore[arg-type, union-attr]

    judge = reward().to(torch.bfloat16)
    scores = judge.score_traces([judge.encoder.encode(tiny_guided.ASK, ["It is 4."])])
    assert scores[0].dtype is torch.float32
