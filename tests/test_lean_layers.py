"""Layers that keep fewer activations compute what transformers' own layers compute, to the last bit."""

from __future__ import annotations

import pytest
import torch
from tiny_policies import policy
from torch import Tensor

from mahalo_ray.config import LoraConfig
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.models.lean_layers import keep_fewer_activations


def step(model: MultiHeadCausalLM) -> tuple[Tensor, dict[str, Tensor], int]:
    """(states, gradients, bytes that autograd kept for backward) of one reading of two rows."""
    model.zero_grad()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    ids = torch.randint(3, 20, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = model.hidden_states(ids)
    (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return states.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2-softcap"])
def test_states_and_gradients_are_equal_and_less_is_kept(family: str, lora: bool) -> None:
    model = policy(family)
    if lora:
        model.add_lora(LoraConfig(rank=2, dropout=0.0))
    for number, parameter in enumerate(model.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    states, gradients, kept = step(model.train())
    keep_fewer_activations(model)
    lean_states, lean_gradients, lean_kept = step(model)
    assert torch.equal(lean_states, states)
    assert gradients.keys() == lean_gradients.keys() and len(gradients) > 0
    assert [name for name in gradients if not torch.equal(gradients[name], lean_gradients[name])] == []
    assert lean_kept == kept if family == "gemma2-softcap" else lean_kept < 0.95 * kept


def test_half_precision_is_left_to_transformers() -> None:
    model = policy("llama").to(torch.bfloat16).train()
    states, gradients, kept = step(model)
    keep_fewer_activations(model)
    lean_states, lean_gradients, lean_kept = step(model)
    assert torch.equal(lean_states, states) and lean_kept == kept
    assert all(torch.equal(gradients[name], lean_gradients[name]) for name in gradients)


def test_a_model_that_recomputes_its_activations_is_refused() -> None:
    model = policy("llama")
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="recomputes its activations"):
        keep_fewer_activations(model)
