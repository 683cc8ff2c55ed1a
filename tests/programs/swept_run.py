"""A search of Ray Tune over weights, for the test that kills its driver.

Arguments: address of a running Ray, folder. It continues what it finds in the folder. Every evaluation is a
line in `evaluated`; from the sixth on they wait for the file `go`. What the search found is written to
`results.json`, by weights.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune

from mahalo_ray.sweeps import SamplerSearcher, make_sampler

NAME = "search"


class Circle(tune.Trainable):
    def setup(self, config: dict[str, Any]) -> None:
        self.weights, self.folder = config["weights"], Path(config["folder"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        with (self.folder / "evaluated").open("a") as file:
            file.write(f"{self.weights}\n")
        while (
            len((self.folder / "evaluated").read_text().splitlines()) > 5
            and not (self.folder / "go").exists()
        ):
            time.sleep(0.05)
        length = float(np.hypot(self.weights["a"], self.weights["b"]))
        values = {name: weight / length for name, weight in self.weights.items()}
        return {**values, "standard_error": {"a": 0.0, "b": 0.0}, tune.result.DONE: True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        pass

    def load_checkpoint(self, checkpoint: Any) -> None:
        pass


def main(address: str, folder: Path) -> None:
    ray.init(address, log_to_driver=False)
    path = str(folder / NAME)
    if tune.Tuner.can_restore(path):
        tuner = tune.Tuner.restore(path, trainable=Circle)
    else:
        searcher = SamplerSearcher(make_sampler("surf", ["a", "b"], 4, max_rounds=3))
        tuner = tune.Tuner(
            Circle,
            param_space={"folder": str(folder)},
            tune_config=tune.TuneConfig(
                search_alg=searcher, num_samples=-1, max_concurrent_trials=2, reuse_actors=True
            ),
            run_config=tune.RunConfig(name=NAME, storage_path=str(folder), verbose=0),
        )
    found = {}
    for result in tuner.fit():
        weights = result.config["weights"]  # type: ignore[index]
        found[str(weights)] = [result.metrics[name] for name in weights]  # type: ignore[index]
    (folder / "results.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
