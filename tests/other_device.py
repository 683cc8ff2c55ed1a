"""A device that does not exist: tensors that say they are elsewhere and are computed on the CPU.

Code that forgets to move a tensor, or reads values back to the host too often, works on the CPU and fails, or
crawls, on a card. Inside `pretended_card()` every tensor made on `CARD`, and every parameter of a module
given to `moved`, is a `CardTensor`: it holds a CPU tensor, says that it is on `CARD`, and every operation on
it goes through `_run`, which computes the real values and applies CUDA's rules on devices:

- all tensors of an operation are on one device, but for those of the host without dimensions, and for indices
  of the host, which torch moves by itself;
- a value that the host asks for (`item`, `bool`, `tolist`, `cpu`, a shape that depends on values) waits for
  the card and is counted, as is what is copied to the card.

Torch's fake tensors have no values, so an engine that stops at tokens, scores and chooses cannot run on them;
this one runs, and its answers are compared with the CPU's. The device is called "meta", since a torch without
CUDA refuses to index a tensor that says "cuda". What this cannot see: kernels that a card lacks or that
compute something else there, memory, streams and races, half precision, autocast, code that is not torch's.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

CARD = torch.device("meta")
aten = torch.ops.aten

_TAKES_HOST_INDICES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_SHAPE_OF_VALUES = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::repeat_interleave",
    "aten::equal",
    "aten::bincount",
}
traffic: Counter[str] = Counter()  # "wait": the host waited for the card; "copy": something was copied to it


class DeviceError(RuntimeError):
    """What CUDA would have refused."""


class CardTensor(Tensor):
    """A CPU tensor that says it is on the card."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> CardTensor:
        made: CardTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=CARD,
            requires_grad=False,
        )
        return made

    def __init__(self, real: Tensor) -> None:
        self.held = real

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        traffic["wait"] += 1
        return self.held.tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"on the card: {self.held!r}"


class _Card(TorchDispatchMode):
    """Also what has no tensor among its arguments, as `torch.zeros(3, device="cuda")`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Constructors(TorchFunctionMode):
    """`torch.tensor` asks a card for memory before any operation is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor):
            device = given.pop("device", None)
            made = func(*args, **given)
            return made if device is None else made.to(device)
        if func is Tensor.new_tensor and isinstance(args[0], CardTensor):
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **given}).to(CARD)
        return func(*args, **given)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    flat, _ = tree_flatten((args, kwargs))
    on_card = [value for value in flat if isinstance(value, CardTensor)]
    on_host = [value for value in flat if isinstance(value, Tensor) and not isinstance(value, CardTensor)]
    device = kwargs.get("device")
    to_card = None if device is None else torch.device(device).type == CARD.type
    if name == "aten::_to_copy" or (name == "aten::to" and to_card is not None):
        if to_card and on_host:
            traffic["copy"] += 1
        if to_card is False and on_card:
            traffic["wait"] += 1
        result = func(*_real(args), **_real({**kwargs, "device": "cpu" if device is not None else None}))
        return CardTensor(result) if (bool(on_card) if to_card is None else to_card) else result
    if name == "aten::_local_scalar_dense" and on_card:
        traffic["wait"] += 1
        return func(*_real(args))
    if name == "aten::copy_" and on_card and on_host:
        traffic["copy" if isinstance(args[0], CardTensor) else "wait"] += 1
        func(*_real(args), **kwargs)
        return args[0]
    if on_card:
        _check(name, args, on_host)
        if name == "aten::_fused_sdp_choice":
            return 0  # the mathematical form: the fused kernels of a card do not exist here
        if name in _SHAPE_OF_VALUES or (name in _TAKES_HOST_INDICES and _has_mask(args[1])):
            traffic["wait"] += 1
    if to_card:
        kwargs = {**kwargs, "device": "cpu"}
    result = func(*_real(args), **_real(kwargs))
    if not on_card and not to_card:
        return result
    wrapped = tree_map(lambda value: CardTensor(value) if isinstance(value, Tensor) else value, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if on_card else wrapped


def _check(name: str, args: Any, on_host: list[Tensor]) -> None:
    if name in _TAKES_HOST_INDICES:
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        moved = [index for index in indices if not isinstance(index, CardTensor)]
        traffic["copy"] += len(moved)
        on_host = [value for value in on_host if not any(value is index for index in moved)]
        if not isinstance(args[0], CardTensor) and any(isinstance(index, CardTensor) for index in indices):
            raise DeviceError(f"{name}: a tensor of the host is indexed by one of the card")
    if wrong := [value for value in on_host if value.dim() > 0]:
        shapes = ", ".join(str(list(value.shape)) for value in wrong)
        raise DeviceError(f"{name}: tensors of the card and of the host ({shapes}) in one operation")


def _has_mask(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype is torch.bool for index in indices)


def _real(values: Any) -> Any:
    return tree_map(lambda value: value.held if isinstance(value, CardTensor) else value, values)


def moved(module: nn.Module) -> nn.Module:
    """The module with its parameters and buffers on the card; tied ones stay tied."""
    known: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                if id(parameter) not in known:
                    card = CardTensor(parameter.detach())
                    known[id(parameter)] = nn.Parameter(card, requires_grad=parameter.requires_grad)
                owner._parameters[name] = known[id(parameter)]
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = CardTensor(buffer.detach())
    return module


@contextlib.contextmanager
def pretended_card() -> Iterator[None]:
    """Tensors made on "cuda" inside are on the card that does not exist."""
    no_autocast = mock.patch.multiple(
        torch, is_autocast_enabled=lambda *_: False, autocast=lambda *_, **__: contextlib.nullcontext()
    )
    with no_autocast, _Card(), _Constructors():
        traffic.clear()
        yield
