"""A loss or gradient that is not finite stops the step on every worker, and says which rows it came from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from mahalo_ray.training.batches import Indices
from mahalo_ray.training.recipe import Output, Recipe

_SHOWN = 20


class NonFiniteError(ValueError):
    """Training met a NaN or an infinity. Running it again would meet it again, so the run ends."""

    @classmethod
    def of_gradient(cls, recipe: Recipe, batch: Indices, step: int) -> NonFiniteError:
        """The losses were finite, their gradient was not: any row of the batch may be the cause."""
        return cls(
            f"step {step + 1}: the gradient is not finite although every loss is; nothing was updated. "
            f"Rows of the batch: {_listed(recipe.row_names(batch))}. "
            "Lower the learning rate, or look at these rows"
        )


def stop_unless_finite(recipe: Recipe, outputs: Sequence[tuple[Indices, Output]], step: int) -> None:
    """Raise NonFiniteError on all workers if any worker's loss is not finite. Costs one small all-reduce."""
    values = torch.cat([torch.cat([loss.detach()[None], rows]) for _, (loss, rows, _) in outputs])
    finite = torch.isfinite(values).all().int()
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    if finite.item():
        return
    names: list[str] = []
    for units, (_, rows, _) in outputs:
        bad = ~torch.isfinite(rows)
        names += [name for name, wrong in zip(recipe.row_names(units), bad.tolist(), strict=True) if wrong]
    gathered: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, names)
    rows_of_all = sorted({name for part in gathered for name in part})
    raise NonFiniteError(
        f"step {step + 1}: the loss is not finite (NaN or infinity) for {_listed(rows_of_all)}; "
        "nothing was updated"
    )


def _listed(names: Sequence[str]) -> str:
    """At most 20 names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
