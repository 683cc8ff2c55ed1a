"""Reward models in a deployment of their own under load: how the number of their replicas follows the queue.

One policy replica answers 16 clients that ask without a pause, for `--seconds`; then nobody asks. Every
second the replicas of the reward model that run are counted.

    python benchmarks/reward_replicas.py runs/quickstart --output replicas.json     # two minutes
"""

from __future__ import annotations

import argparse
import asyncio
import threading
import time
from pathlib import Path
from typing import Any

from finished_run import read_config
from measuring import machine, table, write_results
from ray import serve
from serving import body_of, endpoint, questions
from serving_faults import load, summarise

from mahalo_ray.config import RewardDeploymentConfig
from mahalo_ray.serving.launch import APP_NAME


class Counted:
    """The replicas of the reward model's deployment, every second."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []
        self._began = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(1):
            deployments = serve.status().applications[APP_NAME].deployments
            running = deployments[f"{APP_NAME}-reward-1"].replica_states.get("RUNNING", 0)
            self.seen.append((round(time.monotonic() - self._began, 1), int(running)))

    def changes(self) -> list[tuple[float, int]]:
        """Seconds and number of replicas wherever it changed."""
        pairs = zip([(0.0, 0), *self.seen], self.seen, strict=False)
        return [after for before, after in pairs if after[1] != before[1]]

    def __enter__(self) -> Counted:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="output folder of a finished run")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the load")
    parser.add_argument("--quiet", type=float, default=40.0, help="seconds without load after it")
    parser.add_argument("--target", type=float, default=0.1, help="requests that run or wait, per replica")
    parser.add_argument("--most", type=int, default=3, help="replicas of the reward model")
    parser.add_argument("--output", type=Path, default=None, help="results as JSON")
    options = parser.parse_args()
    config = read_config(options.run)
    apart = RewardDeploymentConfig(
        max_replicas=options.most,
        target_requests=options.target,
        upscale_delay_s=3,
        downscale_delay_s=10,
        cpus_per_replica=0.1,
    )
    settings = config.serve.model_copy(update={"reward_deployment": apart, "cpus_per_replica": 0.5})
    bodies = [body_of(question, number) for number, question in enumerate(questions(config, 24))]
    results: dict[str, Any] = {"machine": machine()}
    with endpoint(options.run, config.model_copy(update={"serve": settings})) as url:
        calm = asyncio.run(load(url, bodies, 1, options.seconds / 4))
        right = {number: outcome.text for number, outcome in calm if outcome.is_whole}
        # One policy replica waits for its scores: it has one or two calls open at a time, hence the target.
        with Counted() as counted:
            results["load"] = summarise(asyncio.run(load(url, bodies, 16, options.seconds)), right)
            time.sleep(options.quiet)
    results["replicas"] = counted.changes()
    print(table(["s", "replicas of the reward model"], [[f"{at:g}", str(n)] for at, n in counted.changes()]))
    print(f"under the load, which ended at {options.seconds:g} s: {results['load']}")
    if options.output is not None:
        write_results(options.output, results)


if __name__ == "__main__":
    main()
