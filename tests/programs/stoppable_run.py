"""A run of two Ray stages for the tests of the command: the second works until the file named `go` appears.

Arguments: output folder. It prints the pid of its Ray worker once that works. With HOLD_FIRST in the
environment it stays in its first stage, which needs no Ray.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import ray

from mahalo_ray.cli.common import execute, guarded
from mahalo_ray.config import RunConfig
from mahalo_ray.pipeline.stages import Context, Pipeline, Stage, StageResult


@ray.remote
class Worker:
    def pid(self) -> int:
        return os.getpid()

    def work_until(self, path: str) -> None:
        while not Path(path).exists():
            time.sleep(0.05)


def first(context: Context) -> StageResult:
    Path(context.folder).mkdir(exist_ok=True)
    if "HOLD_FIRST" in os.environ:
        print("FIRST", flush=True)
        time.sleep(3600)
    return StageResult()


def second(context: Context) -> StageResult:
    worker = Worker.remote()  # type: ignore[attr-defined]
    print("WORKER", ray.get(worker.pid.remote()), flush=True)
    ray.get(worker.work_until.remote(os.path.join(context.config.output, "go")))
    return StageResult()


PIPELINE = Pipeline(
    [
        Stage("first", "First", first, lambda c: None, uses_ray=False),
        Stage("second", "Second", second, lambda c: None, needs=("first",), resumes=True),
    ]
)

if __name__ == "__main__":
    config = RunConfig.model_validate(
        {
            "name": "stoppable",
            "output": sys.argv[1],
            "objectives": [{"name": "accuracy", "supervision": "rollout_value"}],
            "model": {"scratch": {}},
            "sweep": {"weights": [{"accuracy": 1}]},
            "guided": {"weights": {"accuracy": 1}, "guidance": {"accuracy": 1}},
        }
    )
    guarded(lambda: execute(PIPELINE, config, None), debug=False)
