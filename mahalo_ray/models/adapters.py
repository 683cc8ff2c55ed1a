"""Per-objective adapters on the upper blocks of a backbone, mixed by weights per token.

Shapes: H objectives, r the rank, x [..., in]. A linear layer of an adapted block computes

    y = W x + b + s * sum_i c_i B_i A_i x        (LoRA, Hu et al. 2021, arXiv 2106.09685, one per objective)

where c are the mixing weights of the token's conversation and s = alpha / rank. Mixing what adapters add is
the same as averaging the models that they make of the backbone: at full depth, and with the heads mixed by
the same weights, the mixture is a soup (Ramé et al. 2023, arXiv 2306.04488); without adapted blocks it is a
multi-head policy. Weights may differ from row to row, where a soup is one model per weight vector.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from mahalo_ray.config import AdaptersConfig
from mahalo_ray.models.heads import head_seed
from mahalo_ray.models.sharding import full_shape, gathered, sharded_creation

ADAPTER_PARAMETERS = ("adapter_down", "adapter_up")
_FOLDED_KEPT = 4  # weight vectors whose folded matrices a layer keeps

Coefficients = tuple[float, ...]


@dataclass(eq=False)
class MixingWeights:
    """What the adapted layers of one backbone mix by, set before every forward: a tensor that broadcasts
    against [B, T, H], one vector for all tokens (then folded matrices are used), or None: no adapters.

    It stays until the next forward sets another: recomputed activations (checkpointing) need it in backward.
    """

    current: Tensor | Coefficients | None = None


class AdaptedLinear(nn.Module):
    """A linear layer with one low-rank difference per objective; `weight` and `bias` are those of the layer
    it takes the place of. All use of the parameters is in `forward`, as ZeRO-3 needs it."""

    def __init__(
        self, linear: nn.Linear, objectives: int, rank: int, scale: float, mix: MixingWeights
    ) -> None:
        super().__init__()
        self.weight, self.bias = cast(nn.Parameter, linear.weight), linear.bias
        self.objectives, self.rank, self.scale = objectives, rank, scale
        out_features, in_features = full_shape(self.weight)
        # One matrix for all objectives: two products serve them all, whatever their number.
        self.adapter_down = nn.Parameter(linear.weight.new_empty(objectives * rank, in_features))
        self.adapter_up = nn.Parameter(linear.weight.new_empty(out_features, objectives * rank))
        self._mix = mix
        self._folded: OrderedDict[tuple[Coefficients, int], Tensor] = OrderedDict()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]; x is [B, T, in] where the weights are a tensor."""
        current = self._mix.current
        if current is None:
            return F.linear(x, self.weight, self.bias)
        if isinstance(current, tuple) and not torch.is_grad_enabled():
            return F.linear(x, self._folded_weight(current), self.bias)
        if isinstance(current, tuple):
            current = x.new_tensor(current)
        return F.linear(x, self.weight, self.bias) + self._difference(x, current)

    def _difference(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """s * sum_i c_i B_i A_i x, with coefficients [..., H] that broadcast against x's leading shape."""
        inner = F.linear(x, self.adapter_down)
        # Coefficient i times the r inner values of objective i.
        scales = (self.scale * coefficients).to(x.dtype).repeat_interleave(self.rank, dim=-1)
        return F.linear(inner * scales, self.adapter_up)

    @torch.no_grad()
    def folded(self, coefficients: Coefficients) -> Tensor:
        """W + s * sum_i c_i B_i A_i, summed in fp32 and stored in the layer's dtype."""
        scales = torch.tensor(coefficients, device=self.weight.device).repeat_interleave(self.rank)
        difference = (self.adapter_up.float() * (self.scale * scales)) @ self.adapter_down.float()
        return (self.weight.float() + difference).to(self.weight.dtype)

    def _folded_weight(self, coefficients: Coefficients) -> Tensor:
        parameters = (self.weight, self.adapter_down, self.adapter_up)
        if any(parameter.is_inference() for parameter in parameters):  # they do not say when they change
            return self.folded(coefficients)
        key = (coefficients, sum(parameter._version for parameter in parameters))
        weight = self._folded.pop(key, None)
        self._folded[key] = weight = self.folded(coefficients) if weight is None else weight
        if len(self._folded) > _FOLDED_KEPT:
            self._folded.popitem(last=False)
        return weight


@dataclass
class ObjectiveAdapters:
    """The adapters of a backbone, which has been changed in place: every linear layer of its upper `depth`
    blocks is an `AdaptedLinear`. The first `objectives` of the policy have adapters; those that were added to
    it later have none."""

    settings: AdaptersConfig
    depth: int
    objectives: int
    layers: dict[str, AdaptedLinear] = field(default_factory=dict)
    mix: MixingWeights = field(default_factory=MixingWeights)

    @classmethod
    def on(
        cls, backbone: nn.Module, objectives: Sequence[str], settings: AdaptersConfig
    ) -> ObjectiveAdapters:
        """New adapters, not yet initialised. ValueError for a backbone with fewer blocks, or whose blocks
        have no linear layers."""
        blocks = upper_blocks(backbone, settings)
        adapters = cls(settings, len(blocks), len(objectives))
        scale = settings.alpha / settings.rank
        for name, block in blocks.items():
            for path, module in list(block.named_modules()):
                if type(module) is not nn.Linear:
                    continue
                parent, _, attribute = path.rpartition(".")
                with sharded_creation():
                    layer = AdaptedLinear(module, len(objectives), settings.rank, scale, adapters.mix)
                setattr(block.get_submodule(parent), attribute, layer)
                adapters.layers[f"{name}.{path}"] = layer
        if not adapters.layers:
            raise ValueError(
                f"'adapters' go on linear layers, and the blocks of {type(backbone).__name__} have none"
            )
        return adapters

    @torch.no_grad()
    def initialise(self, objectives: Sequence[str], seed: int) -> None:
        """A_i [r, in] ~ N(0, 1 / in), by a seed of the objective's and the layer's own; B_i = 0, so that all
        mixtures start as the backbone itself."""
        for name, layer in self.layers.items():
            with gathered([layer.adapter_down, layer.adapter_up], writable=True):
                in_features = layer.adapter_down.shape[1]
                drawn = [
                    torch.randn(
                        layer.rank,
                        in_features,
                        generator=torch.Generator().manual_seed(head_seed(seed, f"{objective}/{name}")),
                    )
                    for objective in objectives
                ]
                layer.adapter_down.copy_(torch.cat(drawn) / in_features**0.5)
                layer.adapter_up.zero_()

    def metadata(self) -> dict[str, Any]:
        """What the adapters are built from again, as JSON values."""
        return {"depth": self.depth, "rank": self.settings.rank, "alpha": self.settings.alpha}

    def parameters(self) -> dict[str, nn.Parameter]:
        """All adapters' parameters by name: `layers.2.mlp.up_proj.adapter_down`."""
        return {
            f"{name}.{kind}": cast(nn.Parameter, getattr(layer, kind))
            for name, layer in self.layers.items()
            for kind in ADAPTER_PARAMETERS
        }

    def fold_into(self, backbone: nn.Module, coefficients: Coefficients) -> nn.Module:
        """The backbone (or a copy of it) with ordinary linear layers that hold the mixture."""
        for name in self.layers:
            layer = cast(AdaptedLinear, backbone.get_submodule(name))
            out_features, in_features = layer.weight.shape
            plain = nn.Linear(in_features, out_features, bias=layer.bias is not None, device="meta")
            plain.weight = nn.Parameter(layer.folded(coefficients))
            if layer.bias is not None:
                plain.bias = layer.bias
            parent, _, attribute = name.rpartition(".")
            setattr(backbone.get_submodule(parent), attribute, plain)
        return backbone


def upper_blocks(backbone: nn.Module, settings: AdaptersConfig) -> dict[str, nn.Module]:
    """The last `depth` of a backbone's blocks by name. ValueError if there are not so many."""
    config = cast(PretrainedConfig, backbone.config).get_text_config()
    count = config.num_hidden_layers
    stacks = [
        (name, module)
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not stacks:
        raise ValueError(f"the blocks of {type(backbone).__name__} are not found: it cannot have 'adapters'")
    name, blocks = stacks[0]
    depth = count if settings.depth == "all" else settings.depth
    if depth > count:
        raise ValueError(f"'adapters.depth' is {depth}, and the backbone has {count} blocks: lower it")
    return {f"{name}.{number}": blocks[number] for number in range(count - depth, count)}
