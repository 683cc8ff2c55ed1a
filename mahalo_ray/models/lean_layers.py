"""Llama-like layers in training on a CPU: the same numbers, with fewer activations kept for backward.

Autograd keeps what every single operation reads: of a root mean square norm the input and the normalised
states, of a gated layer gate, up and the activated gate. Here each is one function that keeps its inputs and
computes the rest again, which costs little beside the products. Operations and their order, those of the
backward pass too, are what autograd would run, so states and gradients are equal to the last bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import LlamaModel, MistralModel, Qwen2Model, Qwen3Model
from transformers.activations import SiLUActivation

# Base models whose layers are: norm, attention with rotary positions (queries and keys normalised in Qwen3),
# norm, gated MLP. Subclasses may differ and are not among them.
LLAMA_LIKE = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)


def keep_fewer_activations(model: nn.Module) -> None:
    """Let the layers of the Llama-like base models in `model` keep less for the backward pass, in fp32 on a
    CPU; elsewhere, and in models of other kinds, nothing changes.

    Not together with activation checkpointing, which keeps less still: transformers does it in the layers'
    own `forward`, which this replaces. ValueError where it is on.
    """
    for backbone in model.modules():
        if type(backbone) in LLAMA_LIKE:
            _change_layers(backbone)


def _change_layers(backbone: Any) -> None:
    if any(layer.gradient_checkpointing for layer in backbone.layers):
        raise ValueError("the model recomputes its activations: its layers cannot keep fewer beside that")
    norms = [backbone.norm]
    for layer in backbone.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [m for name, m in layer.self_attn.named_children() if name in ("q_norm", "k_norm")]
        if type(layer.mlp.act_fn) is SiLUActivation:
            layer.mlp.forward = partial(_gated_mlp, layer.mlp)
        layer.forward = partial(_layer, layer)
    for norm in norms:
        norm.forward = partial(_norm, norm)


def _is_lean(x: Tensor) -> bool:
    return x.dtype is torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def _layer(layer: Any, hidden_states: Tensor, **arguments: Any) -> Tensor:
    """A decoder layer [B, T, D] -> [B, T, D]. Its norms hand the residual on, see `_RmsNorm`."""
    normed, residual = layer.input_layernorm(hidden_states, with_input=True)
    attended, _ = layer.self_attn(hidden_states=normed, **arguments)
    normed, residual = layer.post_attention_layernorm(residual + attended, with_input=True)
    out: Tensor = residual + layer.mlp(normed)
    return out


def _norm(module: Any, x: Tensor, with_input: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    # Called as the module, not past it: ZeRO-3 gathers the weight there.
    if not _is_lean(x):
        normed: Tensor = type(module).forward(module, x)
        return (normed, x) if with_input else normed
    result: Tensor | tuple[Tensor, Tensor] = _RmsNorm.apply(
        x, module.weight, module.variance_epsilon, with_input
    )
    return result


def _gated_mlp(module: Any, x: Tensor) -> Tensor:
    if not _is_lean(x):
        plain: Tensor = type(module).forward(module, x)
        return plain
    out: Tensor = module.down_proj(_Gated.apply(module.gate_proj(x), module.up_proj(x)))
    return out


class _RmsNorm(torch.autograd.Function):
    """w x / rms(x) (Zhang and Sennrich 2019, arXiv 1910.07467), and the input itself where the layer adds it
    to what follows."""

    # An input that is normalised and added gets three gradients. Autograd adds the one of the sum first, then
    # that of the product, then that of the square; floating point sums depend on the order. So the input is
    # handed on as a second output: its gradient arrives here and is added in that order.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, epsilon: float, with_input: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        scale = x.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.set_materialize_grads(False)
        normed = (x * scale).mul_(weight)
        return (normed, x.view_as(x)) if with_input else normed

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, of_input: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        if grad is None:
            return of_input, None, None, None
        of_weight = (grad * (x * scale)).sum_to_size(weight.shape) if ctx.needs_input_grad[1] else None
        of_normal = grad * weight
        of_square = (of_normal * x).sum(-1, keepdim=True).mul_(-0.5).mul_(scale.pow(3)).div_(x.shape[-1])
        of_product = of_normal.mul_(scale)
        total = of_product if of_input is None else of_product.add_(of_input)
        return total.add_((x * 2).mul_(of_square)), of_weight, None, None


class _Gated(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202), elementwise."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return of_gate, F.silu(gate).mul_(grad)
