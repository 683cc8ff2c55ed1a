"""Train a policy for every weight vector of a sweep, as Ray Tune trials: each trains on Ray Train with the
losses weighted by its vector, and plays the result at the same weights.

A training goes on from the nearest policy that is finished, by the distance of the weights, or always from
the same one (`sweep.start`). Which are finished must not hang on how fast trainings happen to be: a round is
played in waves of as many trials as run side by side, nearest to the run's own policy first, and a trial of
one wave goes on from what the waves before it left. A killed sweep therefore ends in the same table.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray
from ray import tune

from mahalo_ray.config import ClusterConfig, PolicyConfig, TrainingStart
from mahalo_ray.data import storage
from mahalo_ray.evaluation.methods import Method, Played, PolicyTraining
from mahalo_ray.objectives import Weights
from mahalo_ray.sweeps.decoding import MethodSearch, PlayedCallback, Rounds, SweepSpec, Swept, run_search
from mahalo_ray.training.ray_train import run_stage
from mahalo_ray.training.settings import PolicySettings

RUNS_POLICY, SFT = "policy", "SFT"  # names of what a training goes on from: the run's policy, the SFT model


def policy_config_at(
    policy: PolicyConfig, objectives: Sequence[str], weights: Weights, share: float
) -> PolicyConfig:
    """The run's `policy` section for one weight vector: `alpha` is the vector, times the number of objectives
    (so that equal weights are the run's own losses) and times the run's own `alpha`.

    Every pair is seen as often as in the run's policy, for `share` of its training: an objective of weight 0
    has no pairs, and a step then has fewer of them. Figures that are measured while training are left out,
    unless a KL budget rests on them.
    """
    shares = dict(zip(objectives, weights.over(objectives), strict=True))
    alpha = {name: policy.alpha.get(name, 1.0) * len(objectives) * shares[name] for name in objectives}
    trained = [name for name in objectives if alpha[name] > 0]
    section = policy.unmeasured()
    training = section["training"]
    training["batch_size"] = max(1, training["batch_size"] * len(trained) // len(objectives))
    training["epochs"] *= share
    if training["max_steps"] is not None:
        training["max_steps"] = max(1, round(training["max_steps"] * share))
    beta = policy.beta if not isinstance(policy.beta, dict) else {n: policy.beta_of(n) for n in trained}
    return PolicyConfig.model_validate({**section, "alpha": alpha, "beta": beta, "training": training})


@dataclass(frozen=True)
class StartingPoint:
    """What a training goes on from. `url` None: the SFT model."""

    name: str
    url: str | None
    steps_from_sft: int


@dataclass(frozen=True)
class TrainingSpec(SweepSpec):
    """What every trial needs besides: the run's own training of its policy (`run_policy`, made in
    `policy_steps` steps), the share of it that a trial gets, what it goes on from, and how many trials run
    side by side."""

    run_policy: PolicySettings
    policy_steps: int
    cluster: ClusterConfig
    start: TrainingStart
    share: float
    at_once: int

    def model_path(self, method: Method) -> str:
        """The folder of the policy trained for a method, as a path in the sweep's."""
        return f"models/{self.digest(method)}"

    def settings_at(self, method: Method, start: StartingPoint) -> PolicySettings:
        """The training for a method."""
        assert method.weights is not None
        run = self.run_policy
        return replace(
            run,
            policy=policy_config_at(run.policy, run.objectives, method.weights, self.share),
            start_url=start.url,
            output_url=storage.join(self.output_url, self.model_path(method)),
        )

    def trained(self, method: Method, start: StartingPoint) -> PolicyTraining:
        """Train the policy of a method, unless it was trained before. ValueError for what would fail again
        (a loss that is not finite), StageError where workers were lost too often."""
        path = self.model_path(method)
        record = storage.join(self.output_url, f"{path}.json")  # written once the model is whole
        if storage.exists(record):
            return PolicyTraining(**storage.read_json(record))
        began = time.monotonic()
        checkpoints = storage.join(self.output_url, "checkpoints")
        result = run_stage(self.settings_at(method, start), cluster=self.cluster, run_dir=checkpoints)
        steps = round(result.metrics["step"])
        seconds = round(time.monotonic() - began, 3)
        training = PolicyTraining(path, start.name, steps, start.steps_from_sft + steps, seconds)
        storage.write_json(record, asdict(training))
        return training

    def failure_url(self, method: Method) -> str:
        """Where it is written that a training failed for good."""
        return storage.join(self.output_url, f"failed-{self.digest(method)}.json")

    def failure(self, method: Method) -> str | None:
        url = self.failure_url(method)
        return str(storage.read_json(url)["failure"]) if storage.exists(url) else None


class TrainingTrial(tune.Trainable):
    """One Tune trial: one policy, trained and played. It takes no CPUs itself; its workers do."""

    def setup(self, config: dict[str, Any], spec: TrainingSpec) -> None:
        """Note what to train."""
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self.spec = spec
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take over another method."""
        self.method = Method.from_json(new_config["method"])
        self.start = StartingPoint(**new_config["start"])
        return True

    def step(self) -> dict[str, Any]:
        """Train, play, and write the result. What would fail again is written down too, and not tried
        again."""
        try:
            training = self.spec.trained(self.method, self.start)
        except ValueError as error:
            storage.write_json(self.spec.failure_url(self.method), {"failure": str(error)})
            return {"failure": str(error), tune.result.DONE: True}
        cluster = self.spec.cluster
        playing = ray.remote(play_trained).options(
            num_cpus=cluster.cpus_per_rollout_actor,
            num_gpus=1 if cluster.use_gpu else 0,
            max_retries=cluster.max_failures,
            scheduling_strategy="DEFAULT",  # the trial's own placement group has no CPUs
        )
        played: Played = ray.get(playing.remote(self.spec, self.method, training))
        self.spec.write(self.method, played)
        return self.spec.trial_metrics(played)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Ray Train keeps the checkpoints of the training: nothing to save."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See save_checkpoint."""


def play_trained(spec: TrainingSpec, method: Method, training: PolicyTraining) -> Played:
    """The policy that was trained for a method, against the sweep's students."""
    began = time.monotonic()
    played = spec.player(storage.join(spec.output_url, training.model)).run(method)
    return replace(played, seconds=time.monotonic() - began, training=training)


class TrainingSearch(MethodSearch):
    """Gives Tune one wave after another, each trial with what it goes on from."""

    spec: TrainingSpec

    def playing_order(self, methods: Sequence[Method]) -> list[Method]:
        """Nearest to the run's own policy first: every training then begins near one that is finished."""
        return sorted(methods, key=lambda method: self._distance(method, None))

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next method of the wave, None until the wave before it is over."""
        waiting = self.next_waiting
        if waiting is not None and any(self.wave_of(m) < self.wave_of(waiting) for m in self.running):
            return None
        suggestion = super().suggest(trial_id)
        if isinstance(suggestion, dict):
            assert waiting is not None
            suggestion["start"] = asdict(self.start_of(waiting))
        return suggestion

    def wave_of(self, method: Method) -> tuple[int, int]:
        """(round, wave of the round) in which a method is first played."""
        for number, methods in enumerate(self.rounds[0]):
            if method in methods:
                return number, self.playing_order(methods).index(method) // self.spec.at_once
        raise AssertionError(f"{method.name} was not asked for")

    def start_of(self, method: Method) -> StartingPoint:
        """What the training of a method goes on from."""
        own = StartingPoint(RUNS_POLICY, self.spec.policy_url, self.spec.policy_steps)
        if self.spec.start == "sft":
            return StartingPoint(SFT, None, 0)
        if self.spec.start == "policy":
            return own
        nearest, least = own, self._distance(method, None)
        for other in self.methods:
            if self.wave_of(other) < self.wave_of(method) and (played := self.result(other)) is not None:
                distance = self._distance(method, other)
                if distance < least - 1e-9 and played.training is not None:
                    url = storage.join(self.spec.output_url, played.training.model)
                    nearest = StartingPoint(other.name, url, played.training.steps_from_sft)
                    least = distance
        return nearest

    def _distance(self, method: Method, other: Method | None) -> float:
        """Between the weights of two methods, the sum of differences; None: the run's own policy."""
        run = self.spec.run_policy
        theirs = Weights({n: run.policy.alpha.get(n, 1.0) for n in run.objectives})
        if other is not None:
            assert other.weights is not None
            theirs = other.weights
        assert method.weights is not None
        pairs = zip(method.weights.over(run.objectives), theirs.over(run.objectives), strict=True)
        return math.fsum(abs(a - b) for a, b in pairs)


def train_rounds(spec: TrainingSpec, source: Rounds, progress: PlayedCallback) -> list[Swept]:
    """Train and play what the rounds ask for; what is there already is read. A trial whose workers or actors
    are lost is tried again `cluster.max_failures` times; one that would fail again is left out, and
    `Swept.failure` says why.

    ray.init must have been called. Raises SweepError where a sampler has too few results to go on.
    """
    # A trial reserves no CPUs, which its workers and actors need; Tune has it reserve something: one byte.
    resources = {"cpu": 0, "memory": 1}
    trainable = tune.with_resources(tune.with_parameters(TrainingTrial, spec=spec), resources)
    return run_search(TrainingSearch(spec, [source], progress), trainable, spec.at_once, spec.cluster)
