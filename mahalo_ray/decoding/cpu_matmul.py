"""Faster fp32 matrix products on AMD processors with AVX-512: linear layers through oneDNN instead of MKL.

MKL takes AVX2 on AMD processors even where they have AVX-512; oneDNN, which torch carries too, does not. Only
the kernel differs, so results differ by rounding alone. Nothing here changes a model or its training.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
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


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512 and a torch with oneDNN."""
    info = Path("/proc/cpuinfo")
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and info.exists()
        and "AuthenticAMD" in info.read_text(errors="replace")
    )


class PackedWeights:
    """Weights in oneDNN's own layout. A product of few rows waits for memory and takes half the time with it.

    A weight is packed at its second use, so that one that is used once costs nothing, and again when it has
    changed in place. Packed weights are copies, so nothing is packed for a large model.
    """

    def __init__(self, bytes_to_pack: int) -> None:
        """`bytes_to_pack`: of all the weights that this store will meet."""
        self._packs = bytes_to_pack <= _MOST_PACKED
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear`, fp32 on the CPU through oneDNN. No gradients."""
        if x.dtype is torch.float32 and weight.dtype is torch.float32 and x.device.type == "cpu":
            packed = self._packed(weight)
            result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
            return result
        return F.linear(x, weight, bias)

    def _packed(self, weight: Tensor) -> Tensor:
        if not self._packs or weight.is_inference():  # such tensors do not say when they change
            return weight
        version, packed = self._known.get(weight, (None, None))
        if version != weight._version:
            self._known[weight] = (weight._version, None)
            return weight
        if packed is None:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
            self._known[weight] = (version, packed)
        return cast(Tensor, packed)


class OneDNNLinears:
    """A context in which the linear layers of a module multiply through oneDNN, where that is faster.

    The layers of a backbone are called for every token. Inside the context their `forward` is replaced, which
    costs nothing per call; outside they are as they were.
    """

    def __init__(self, module: nn.Module) -> None:
        layers = [
            layer
            for layer in module.modules()
            if type(layer) is nn.Linear
            and layer.weight.device.type == "cpu"
            and layer.weight.numel() >= _SMALLEST_WEIGHT
            and onednn_is_faster()
        ]
        store = PackedWeights(sum(layer.weight.nbytes for layer in layers))
        self._swaps: list[tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = [
            (layer.__dict__, functools.partial(_forward, store, layer)) for layer in layers
        ]

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        for attributes, forward in self._swaps:
            attributes["forward"] = forward
        try:
            yield
        finally:
            for attributes, _ in self._swaps:
                del attributes["forward"]


def _forward(store: PackedWeights, layer: nn.Linear, x: Tensor) -> Tensor:
    return store.linear(x, layer.weight, layer.bias)


class OneDNNHead:
    """The same for a vocabulary head [vocab_size, width], which calls `F.linear` and is no linear layer."""

    def __init__(self, width: int, vocab_size: int) -> None:
        self._store = PackedWeights(4 * width * vocab_size)
        self._fast = width >= _SMALLEST_WIDTH and onednn_is_faster()

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
