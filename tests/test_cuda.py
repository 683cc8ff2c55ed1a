"""On a CUDA card, where there is one: guided answers, scores and training steps against the CPU's."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import test_triton_logps
import tiny_guided
import torch
from tiny_policies import batch, policy
from torch import Tensor

from mahalo_ray import GuidedDecoder, MultiHeadCausalLM, Weights
from mahalo_ray.config import LoraConfig
from mahalo_ray.decoding.guidance import GuidedRequest
from mahalo_ray.decoding.policy import MultiHeadPolicy
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.decoding.step_graph import Recorder, record_cuda_graph
from mahalo_ray.losses import dpo_loss
from mahalo_ray.training.pairs import PackedPairs, TokenPairs, TokenRows, pair_inputs

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")


def guided(
    device: torch.device,
    dtype: torch.dtype,
    requests: list[GuidedRequest],
    recorder: Recorder | None = None,
) -> list[list[int]]:
    base = copy.deepcopy(tiny_guided.model())
    model = MultiHeadCausalLM.from_base(base, ["accuracy", "engagement"], noise=0.5).eval()
    reward = copy.deepcopy(tiny_guided.reward()).to(device, dtype)
    policy = MultiHeadPolicy(model.to(device, dtype), recorder=recorder)
    decoder = GuidedDecoder(policy, reward, "math")
    return [result.token_ids for result in decoder.generate_batch(requests)]


def requests(**options: Any) -> list[GuidedRequest]:
    weights = Weights.parse("accuracy=0.7,engagement=0.3")
    shared = {"weights": weights, "num_candidates": 3, "max_new_tokens": 12, "max_step_tokens": 4, **options}
    strategies = ["argmax", "sample", "best_of_n", "none"]
    return [
        GuidedRequest(tiny_guided.ASK, seed=seed, strategy=name, **shared)
        for seed, name in enumerate(strategies)
    ]


def test_guided_answers_are_the_cpus() -> None:
    for sampling in (SamplingParams(temperature=0.0), SamplingParams(top_p=0.9)):
        asked = requests(sampling=sampling)
        on_cpu = guided(torch.device("cpu"), torch.float32, asked)
        assert guided(DEVICE, torch.float32, asked) == on_cpu


def test_with_cuda_graphs_answers_are_the_cpus() -> None:
    asked = requests(sampling=SamplingParams(temperature=0.0), max_new_tokens=60, max_step_tokens=12)
    on_cpu = guided(torch.device("cpu"), torch.float32, asked)
    assert guided(DEVICE, torch.float32, asked, record_cuda_graph) == on_cpu


def test_the_same_batch_gives_the_same_answers_in_bfloat16() -> None:
    first, second = (guided(DEVICE, torch.bfloat16, requests()) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("kind", ["full", "lora", "packed pairs"])
def test_a_training_step_has_the_loss_and_gradients_of_the_cpu(kind: str) -> None:
    def step(device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = policy()
        if kind == "lora":
            model.add_lora(LoraConfig(rank=2))
        model.to(device)
        given: dict[str, Tensor | None] = {**batch(rows=4)}
        if kind == "packed pairs":
            model.enable_pair_packing()
            columns = ([[5, 3, 7], [2, 4]], [[9], [8, 6, 3]], [[6, 2], [3]])
            ids, ones = ["0", "1"], np.ones(2)
            pairs = TokenPairs(ids, np.array([0, 1]), *map(TokenRows, columns), ones, ones, 0)
            given = pair_inputs(PackedPairs(pairs).tensors(np.arange(2)))
        inputs: dict[str, Any] = {name: None if v is None else v.to(device) for name, v in given.items()}
        logps = model.completion_logps(**inputs, head_index=torch.tensor([0, 1, 0, 1], device=device))
        chosen, rejected = logps.chunk(2)
        loss = dpo_loss(chosen, rejected, chosen.detach() - 1, rejected.detach(), 0.1).sum()
        loss.backward()
        gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
        return loss.detach().cpu(), gradients

    loss, gradients = step(DEVICE)
    expected_loss, expected = step(torch.device("cpu"))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", test_triton_logps.HEADS)
def test_log_probs_by_triton_are_those_of_torch(head: test_triton_logps.Kind, dtype: torch.dtype) -> None:
    test_triton_logps.compare(dtype, head, DEVICE)
