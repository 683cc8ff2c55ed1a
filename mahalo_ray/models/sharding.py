"""Parameters that may be sharded by ZeRO-3: created sharded, and whole only inside `gathered`.

ZeRO-3 is on when a `transformers.integrations.HfDeepSpeedConfig` of stage 3 is alive; transformers then
shards what it loads, and these helpers do the same for this package's modules. Without ZeRO-3 both are
no-ops.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers.integrations import deepspeed as hf_deepspeed


@contextmanager
def sharded_creation() -> Iterator[None]:
    """Modules built inside are sharded as they are built, so that no rank ever holds a full copy."""
    if not hf_deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=hf_deepspeed.deepspeed_config()):
        yield


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 owns the parameter (its own data is then empty outside `gathered`)."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The parameter's shape, also where ZeRO-3 holds only a shard of it."""
    return cast(torch.Size, parameter.ds_shape) if hasattr(parameter, "ds_shape") else parameter.shape


@contextmanager
def whole_modules(model: nn.Module) -> Iterator[None]:
    """Inside, the model can be called although ZeRO-3 has sharded it and no engine is around it yet.

    The parameters of each module are gathered while it runs. Every rank must make the same calls.
    """
    # Until an engine exists nothing gathers by itself, and a forward would meet parameters with no elements.
    # Gathering the model as a whole would need all of it on every rank, which ZeRO-3 is there to avoid. So a
    # hook gathers what a module holds directly (`recurse=False`: the root would gather everything), and
    # another one frees it, also after an error (`always_call`). A list per module, since one may run nested.
    running: dict[nn.Module, list[AbstractContextManager[None]]] = {}

    def gather(module: nn.Module, args: Any) -> None:
        context = gathered(list(module.parameters(recurse=False)))
        context.__enter__()
        running.setdefault(module, []).append(context)

    def release(module: nn.Module, args: Any, output: Any) -> None:
        running[module].pop().__exit__(None, None, None)

    hooks = []
    for module in model.modules():
        if any(is_sharded(parameter) for parameter in module.parameters(recurse=False)):
            hooks.append(module.register_forward_pre_hook(gather))
            hooks.append(module.register_forward_hook(release, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], writable: bool = False) -> Iterator[None]:
    """Whole parameters inside the block; with `writable`, what rank 0 wrote is what every rank gets.

    Gathering is a collective operation: a rank that does not come here leaves the others waiting for ever.
    """
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if writable else None):
        yield
