"""Run methods as Ray Tune trials: each plays one method (weights, guidance) against the same students.

Trials share actors, so the models are loaded once per actor and not once per trial. A method's result is a
file of its own, written as soon as it is known: a finished method is not played again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ray import tune
from ray.tune.experiment import Trial

from mahalo_ray.config import ClusterConfig, EvaluationConfig
from mahalo_ray.data import storage
from mahalo_ray.data.records import Dialogue
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.errors import StageError
from mahalo_ray.evaluation.methods import Method, MethodPlayer, Played
from mahalo_ray.evaluation.results import MethodResult

PlayedCallback = Callable[[int, int, str], None]


class SweepError(StageError):
    """Some methods could not be played; finished ones are kept and are skipped next time."""


@dataclass(frozen=True)
class SweepSpec:
    """What every trial needs; students are the given seeds, the same for all methods."""

    methods: tuple[Method, ...]
    sft_url: str
    policy_url: str
    reward_url: str
    output_url: str
    placement: DeviceConfig
    threads: int
    config: EvaluationConfig
    seeds: tuple[int, ...]

    def result_url(self, number: int) -> str:
        """Where the result of method `number` lies."""
        return storage.join(self.output_url, f"method-{number:03d}.json")


class MethodTrial(tune.Trainable):
    """One Tune trial: one method, one iteration."""

    def setup(self, config: dict[str, Any], spec: SweepSpec) -> None:
        """Load the models; called once per actor."""
        torch.set_num_threads(spec.threads)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self.spec = spec
        self.number = int(config["method"])
        self.player = MethodPlayer(
            spec.sft_url, spec.policy_url, spec.reward_url, spec.placement, spec.config, spec.seeds
        )

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take over another method with the models already loaded."""
        self.number = int(new_config["method"])
        return True

    def step(self) -> dict[str, Any]:
        """Play the method and write its result."""
        played = self.player.run(self.spec.methods[self.number])
        document = {
            "result": played.result.model_dump(mode="json"),
            "samples": [dialogue.model_dump(mode="json") for dialogue in played.samples],
        }
        storage.write_json(self.spec.result_url(self.number), document)
        means = {name: sum(values) / len(values) for name, values in played.result.values.items()}
        return {**means, "malformed_rate": played.result.malformed_rate, tune.result.DONE: True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A trial is one iteration whose result is already written: nothing to save."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See save_checkpoint."""


def _ignore(done: int, total: int, name: str) -> None:
    """Stands for the caller's progress function in what Tune stores."""


class _Progress(tune.Callback):
    def __init__(self, spec: SweepSpec, done: int, callback: PlayedCallback) -> None:
        self.spec, self.done, self.callback = spec, done, callback

    def __getstate__(self) -> dict[str, Any]:
        # Tune stores its callbacks for a restore, which is not used: a progress bar cannot be pickled.
        return {**self.__dict__, "callback": _ignore}

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.done += 1
        name = self.spec.methods[int(trial.config["method"])].name
        self.callback(self.done, len(self.spec.methods), name)


def play_methods(
    spec: SweepSpec, cluster: ClusterConfig, run_name: str, progress: PlayedCallback
) -> list[Played]:
    """Play every method whose result is not there yet; returns all results in order of `spec.methods`.

    ray.init must have been called. Raises SweepError naming the methods that failed.
    """
    open_methods = [n for n in range(len(spec.methods)) if not storage.exists(spec.result_url(n))]
    done = len(spec.methods) - len(open_methods)
    progress(done, len(spec.methods), "")
    if open_methods:
        _tune(spec, cluster, run_name, open_methods, _Progress(spec, done, progress))
    failed = [spec.methods[n].name for n in open_methods if not storage.exists(spec.result_url(n))]
    if failed:
        raise SweepError(
            f"methods without a result: {', '.join(failed)}. Trial logs are in "
            f"'{storage.join(spec.output_url, 'tune', run_name)}'; run again to play only these."
        )
    return [_read(spec.result_url(number)) for number in range(len(spec.methods))]


def _tune(
    spec: SweepSpec, cluster: ClusterConfig, run_name: str, numbers: Sequence[int], callback: _Progress
) -> None:
    resources = {"cpu": cluster.cpus_per_rollout_actor, "gpu": 1 if cluster.use_gpu else 0}
    trainable = tune.with_resources(tune.with_parameters(MethodTrial, spec=spec), resources)
    tuner = tune.Tuner(
        trainable,
        param_space={"method": tune.grid_search(list(numbers))},
        tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=cluster.rollout_actors),
        run_config=tune.RunConfig(
            name=run_name,
            storage_path=storage.join(spec.output_url, "tune"),
            callbacks=[callback],
            failure_config=tune.FailureConfig(max_failures=cluster.max_failures),
            verbose=0,
        ),
    )
    tuner.fit()


def _read(url: str) -> Played:
    document = storage.read_json(url)
    samples = [Dialogue.model_validate(sample) for sample in document["samples"]]
    return Played(MethodResult.model_validate(document["result"]), samples)
