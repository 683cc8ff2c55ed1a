"""Faster matrix products on CPUs for weights that do not change: linear layers over oneDNN's packed weights.

A product of few rows, as in decoding, waits for the weights to arrive from memory. MKL, through which torch
multiplies fp32, lays them out anew in every call; oneDNN, which torch carries too, keeps them in its own
layout. Only kernel and layout differ, so results differ by rounding alone. Nothing here changes a model or
its training.

Which kernel is taken follows from the processor's features and the weights' sizes, never from a timing or
from the number of rows: one machine gives the same answers every time, whatever else is in a batch.

    weights      processor                           kernel
    fp32         x86 with AVX2 or AVX-512            oneDNN, packed
    fp32         AMD with AVX-512, > 1 GiB to pack   oneDNN, as they are (MKL takes AVX2 there)
    bf16         AVX-512 or AMX for bf16             oneDNN, packed (torch itself: oneDNN, as they are)
    any other                                        torch's own
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from mahalo_ray.models.reward import ProcessRewardModel

# oneDNN's call costs more than MKL's: smaller matrices are left to MKL.
_SMALLEST_WEIGHT = 100_000  # numbers of a layer
_SMALLEST_WIDTH = 256  # of a vocabulary head
_MOST_PACKED = 1 << 30  # bytes of a model's weights, or of a head's: of larger ones there is no second copy
_ROWS = 64  # the batch that packed weights are laid out for: as good for 1 row and for 1000, within noise
# Layers of one parent that read the same input, one after the other: one product over their weights together.
_SIDE_BY_SIDE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@functools.cache
def packing_is_faster() -> bool:
    """Whether packed weights are faster than torch's products on this processor, with this torch."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in (
        "AVX2",
        "AVX512",
    )


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN is faster than MKL even for weights that are not packed: AMD processors with AVX-512."""
    info = Path("/proc/cpuinfo")
    return (
        packing_is_faster()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and info.exists()
        and "AuthenticAMD" in info.read_text(errors="replace")
    )


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products in bf16 (AVX-512 or AMX)."""
    return packing_is_faster() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedWeights:
    """Weights in oneDNN's own layout. A product of few rows waits for memory and takes half the time with it.

    A weight is packed at its second use, so that one that is used once costs nothing, and again when it has
    changed in place. Packed weights are copies, so nothing is packed for a large model.
    """

    def __init__(self, bytes_to_pack: int) -> None:
        """`bytes_to_pack`: of all the weights that this store will meet."""
        self.packs = bytes_to_pack <= _MOST_PACKED
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear` by the kernel that the module's docstring names. No gradients."""
        if self.takes(x, weight):
            packed = self._packed(weight)
            return _multiply(x, packed, bias)
        return F.linear(x, weight, bias)

    def takes(self, x: Tensor, weight: Tensor) -> bool:
        """Whether this product is oneDNN's."""
        if x.device.type != "cpu" or x.dtype is not weight.dtype:
            return False
        if x.dtype is torch.float32:
            return self.packs or onednn_is_faster()
        return x.dtype is torch.bfloat16 and self.packs and multiplies_bfloat16()

    def _packed(self, weight: Tensor) -> Tensor:
        if not self.packs or weight.is_inference():  # such tensors do not say when they change
            return weight
        version, packed = self._known.get(weight, (None, None))
        if version != weight._version:
            self._known[weight] = (weight._version, None)
            return weight
        if packed is None:
            packed = packed_weight(weight.detach())
            self._known[weight] = (version, packed)
        return cast(Tensor, packed)


def packed_weight(weight: Tensor) -> Tensor:
    """A copy of a weight [out, in] in oneDNN's layout."""
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS))


class SideBySide:
    """Linear layers that read one input, as one product over their packed weights together."""

    def __init__(self, store: PackedWeights, layers: Sequence[nn.Linear]) -> None:
        self._store, self._layers = store, layers
        self._widths = [layer.out_features for layer in layers]
        self._parameters = [parameter for layer in layers for parameter in layer.parameters()]
        self._versions: list[int] = []
        self._packed: Tensor | None = None
        self._bias: Tensor | None = None

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        """The output of every layer."""
        out = self.product(x)
        if out is None:
            return [self._store.linear(x, layer.weight, layer.bias) for layer in self._layers]
        return out.split(self._widths, dim=-1)

    def product(self, x: Tensor) -> Tensor | None:
        """The outputs of all layers behind each other, [..., their widths together]; None where they cannot
        be multiplied together (yet)."""
        if not self._store.packs or not self._store.takes(x, self._parameters[0]):
            return None
        if any(parameter.is_inference() for parameter in self._parameters):
            return None
        versions = [parameter._version for parameter in self._parameters]
        if versions != self._versions:  # packed at the second use, as single weights are
            self._versions, self._packed = versions, None
            return None
        if self._packed is None:
            weights = [layer.weight.detach() for layer in self._layers]
            biases = [layer.bias.detach() for layer in self._layers if layer.bias is not None]
            self._packed = packed_weight(torch.cat(weights))
            self._bias = torch.cat(biases) if biases else None
        return _multiply(x, self._packed, self._bias)


class _Shared:
    """The same behind the layers' own `forward`: the first that is called makes the product for all."""

    def __init__(self, together: SideBySide, store: PackedWeights, layers: Sequence[nn.Linear]) -> None:
        self._together, self._store, self._layers = together, store, layers
        self._input: Tensor | None = None  # of the last product, until the last layer has asked for its part
        self._parts: Sequence[Tensor] = ()

    def forward(self, number: int, x: Tensor) -> Tensor:
        """The output of the layer of this number. One that is called with another input than the first layer
        multiplies by itself."""
        if number == 0:
            self._input, self._parts = x, self._together.parts(x)
        if self._input is not x or not self._parts:
            layer = self._layers[number]
            return self._store.linear(x, layer.weight, layer.bias)
        part = self._parts[number]
        if number == len(self._layers) - 1:
            self._input, self._parts = None, ()
        return part


class OneDNNLinears:
    """A context in which the linear layers of a module multiply through oneDNN, where that is faster.

    The layers of a backbone are called for every token. Inside the context their `forward` is replaced, which
    costs nothing per call; outside they are as they were.
    """

    def __init__(self, module: nn.Module) -> None:
        groups = [layers for layers in _side_by_side(module) if _is_worthwhile(layers)]
        grouped = {layer for layers in groups for layer in layers}
        single = [
            layer
            for layer in module.modules()
            if type(layer) is nn.Linear and layer not in grouped and _is_worthwhile([layer])
        ]
        self._store = PackedWeights(sum(layer.weight.nbytes for layer in [*grouped, *single]))
        self._swaps: list[tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = [
            (layer.__dict__, functools.partial(_forward, self._store, layer)) for layer in single
        ]
        for layers in groups:
            shared = _Shared(SideBySide(self._store, layers), self._store, layers)
            self._swaps += [
                (layer.__dict__, functools.partial(shared.forward, number))
                for number, layer in enumerate(layers)
            ]

    def together(self, layers: Sequence[nn.Module]) -> SideBySide | None:
        """One product for these layers of the module, which read one input; None where their own are as
        good, or where they are no plain linear layers."""
        linears = [layer for layer in layers if type(layer) is nn.Linear]
        kinds = {(layer.in_features, layer.bias is None, layer.weight.dtype) for layer in linears}
        if len(linears) < len(layers) or len(kinds) > 1 or not _is_worthwhile(linears):
            return None
        return SideBySide(self._store, linears)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        for attributes, forward in self._swaps:
            attributes["forward"] = forward
        try:
            yield
        finally:
            for attributes, _ in self._swaps:
                del attributes["forward"]


def _is_worthwhile(layers: Sequence[nn.Linear]) -> bool:
    return (
        sum(layer.weight.numel() for layer in layers) >= _SMALLEST_WEIGHT
        and layers[0].weight.device.type == "cpu"
        and packing_is_faster()
    )


def _side_by_side(module: nn.Module) -> Iterator[list[nn.Linear]]:
    """Layers under one parent that read the same input, as their names say; all with a bias, or none."""
    for parent in module.modules():
        children = dict(parent.named_children())
        for names in _SIDE_BY_SIDE:
            layers = [child for name in names if type(child := children.get(name)) is nn.Linear]
            kinds = {(layer.in_features, layer.bias is None, layer.weight.dtype) for layer in layers}
            if len(layers) == len(names) and len(kinds) == 1:
                yield layers


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _forward(store: PackedWeights, layer: nn.Linear, x: Tensor) -> Tensor:
    return store.linear(x, layer.weight, layer.bias)


class OneDNNHead:
    """The same for a vocabulary head [vocab_size, width], which calls `F.linear` and is no linear layer."""

    def __init__(self, width: int, vocab_size: int) -> None:
        self._store = PackedWeights(4 * width * vocab_size)
        self._fast = width >= _SMALLEST_WIDTH and packing_is_faster()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if not self._fast:
            yield
            return
        with torch.no_grad(), _Intercepted(self._store):
            yield


class OneDNNRewardModel:
    """Both for a reward model that reads whole texts; keep the object, and its packed weights, between
    calls."""

    def __init__(self, reward: ProcessRewardModel) -> None:
        text = reward.config.get_text_config()
        self._products, self._head = OneDNNLinears(reward), OneDNNHead(text.hidden_size, text.vocab_size)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._products(), self._head():
            yield


class _Intercepted(TorchFunctionMode):
    def __init__(self, store: PackedWeights) -> None:
        super().__init__()
        self._store = store

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear and not kwargs:
            return self._store.linear(*args)
        return func(*args, **(kwargs or {}))
