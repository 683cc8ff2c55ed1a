"""How many of torch's operations a token of guided decoding starts, as usual and with its forward recorded.

    python benchmarks/calls_per_token.py

Operations are counted where torch dispatches them, without those that only give another view of a tensor. On
a card each is one kernel or more, started by the host; a recorded forward is started as a whole. Prefix and
branches are attended to in one call, as on a card. Nothing is timed, so any machine will do.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from decoding_task import Models, Task
from guided_decoding import SIZES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mahalo_ray.decoding import branch_attention
from mahalo_ray.decoding.token_loop import BranchDecoder


class Operations(TorchDispatchMode):
    """Counts operations, those of recorded forwards apart."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.recordings = 0
        self._is_recorded = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(
            one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns
        )
        self.count += not is_view and not self._is_recorded
        return func(*args, **(kwargs or {}))

    def record(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A recorder that runs what it recorded, uncounted."""
        self.recordings += 1

        def repeat() -> Tensor:
            self._is_recorded = True
            result = compute()
            self._is_recorded = False
            return result

        return repeat


def counts(models: Models, task: Task, with_recorder: bool) -> tuple[list[int], int]:
    """Operations of every token of a request, and the recordings made."""
    operations, each = Operations(), []
    models.decoder.policy.recorder = operations.record if with_recorder else None
    session, step = models.decoder.session(), BranchDecoder.step

    def counted(self: BranchDecoder) -> list[int]:
        before = operations.count
        done = step(self)
        each.append(operations.count - before)
        return done

    session.submit(task.request(models.shape))
    BranchDecoder.step = counted  # type: ignore[method-assign]
    try:
        with operations:
            while session.is_busy:
                session.advance()
    finally:
        BranchDecoder.step = step  # type: ignore[method-assign]
    return each, operations.recordings


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", default="1m,30m,135m", help=f"of {','.join(SIZES)}")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args(arguments)
    branch_attention._JOINING = {"cpu"}
    print("model  tokens  as usual  recorded (median, mean)  recordings")
    for name in options.models.split(","):
        models = Models.build(SIZES[name].shape, torch.device("cpu"), torch.float32)
        task = Task(100, 5, options.steps, 40, 1.0)
        usual, _ = counts(models, task, with_recorder=False)
        recorded, recordings = counts(models, task, with_recorder=True)
        median, few, mean = statistics.median(usual), statistics.median(recorded), statistics.mean(recorded)
        print(f"{name:5}  {len(usual):6}  {median:8.0f}  {few:8.0f} {mean:14.1f}  {recordings:10}")


if __name__ == "__main__":
    main()
