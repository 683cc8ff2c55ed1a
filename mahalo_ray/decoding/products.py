"""fp32 matrix products on processors where torch's own choice, MKL, leaves half the speed unused.

MKL takes AVX2 on AMD processors even where they have AVX-512; oneDNN, which torch carries too, does not. Only
the kernel differs, so results differ by rounding alone. Nothing here changes a model or its training.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# oneDNN's call is the dearer one: smaller matrices are left to MKL.
_SMALLEST_WEIGHT = 100_000  # numbers of a layer
_SMALLEST_WIDTH = 256  # of a vocabulary head


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, fp32 on the CPU through oneDNN. No gradients."""
    if x.dtype is torch.float32 and weight.dtype is torch.float32 and x.device.type == "cpu":
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return F.linear(x, weight, bias)


class FastProducts:
    """A context in which the linear layers of a module use `linear`, where that is faster.

    The layers of a backbone are called for every token: they are given the other forward for the time being,
    which costs nothing per call. Layers are as they were outside.
    """

    def __init__(self, module: nn.Module) -> None:
        self._swaps: list[tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = [
            (layer.__dict__, functools.partial(_forward, layer))
            for layer in module.modules()
            if type(layer) is nn.Linear
            and layer.weight.device.type == "cpu"
            and layer.weight.numel() >= _SMALLEST_WEIGHT
            and onednn_is_faster()
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


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


class _Intercepted(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear and not kwargs:
            return linear(*args)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def fast_head(width: int) -> Iterator[None]:
    """The same for a vocabulary head, which is a function of its parameters and not a linear layer."""
    if width < _SMALLEST_WIDTH or not onednn_is_faster():
        yield
        return
    with torch.no_grad(), _Intercepted():
        yield
