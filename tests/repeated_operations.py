"""What a CUDA graph does, on the CPU: the same operations again on the same tensors.

A recorder (decoding/step_graph.py) that runs a computation and notes every operation with its arguments and
results. Repeating it calls each of them with the arguments of then and writes what comes out into the tensors
of then. No line of Python in between runs again, so a length, an index or a mask that the host worked out
while recording stays what it was, as in a graph; an operation that gives the host a number is refused, as
CUDA refuses it. What this cannot see: kernels, streams, and memory that a card gives to somebody else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"}


class RepeatedOperations:
    """A recorder, and how often what it recorded was repeated."""

    def __init__(self) -> None:
        self.recordings = 0
        self.repeats = 0

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        compute()  # as a graph's first run
        noted = _Noted()
        with noted:
            result = compute()
        self.recordings += 1

        def repeat() -> Tensor:
            self.repeats += 1
            noted.repeat()
            return result

        return repeat


class _Noted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in _WAITING:
            raise RuntimeError(f"{name}: operation not permitted while recording")
        result = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, result))
        return result

    def repeat(self) -> None:
        for func, args, kwargs, result in self._operations:
            again = func(*args, **kwargs)
            if any(returned.alias_info is not None for returned in func._schema.returns):
                continue  # a view of a tensor of then, or one that was written into
            for then, now in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(then, Tensor) and then is not now:
                    then.copy_(now)
