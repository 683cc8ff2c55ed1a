"""Play methods as Ray Tune trials: each plays one method (weights, guidance) against the same students.

Which methods are played is up to rounds (`Rounds`): a fixed list is one round, a sampler asks for the next
one once it knows the results of the last. Trials share actors, so the models are loaded once per actor and
not once per trial.

A method's result is a file of its own, named after what the method is and written as soon as it is known.
These files are the whole state of a sweep: a new driver goes through the same rounds again, which costs
nothing where the files are there, and plays what is missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from ray import tune
from ray.tune.search import Searcher

from mahalo_ray.config import ClusterConfig, DomainConfig, EvaluationConfig
from mahalo_ray.data import storage
from mahalo_ray.data.records import Dialogue
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.errors import StageError
from mahalo_ray.evaluation.methods import Method, MethodPlayer, Played, PolicyTraining
from mahalo_ray.evaluation.results import MethodResult
from mahalo_ray.metrics import FloatArray
from mahalo_ray.objectives import Weights
from mahalo_ray.sweeps.sampler import Sampler

PlayedCallback = Callable[[int, int, str], None]
MethodAt = Callable[[Weights], Method]

# Sampled weights have so many decimals: what is played is what the table and its file names say.
WEIGHT_DECIMALS = 4


class SweepError(StageError):
    """Some methods could not be played; finished ones are kept and are skipped next time."""


@dataclass(frozen=True)
class SweepSpec:
    """What every trial needs; the problems are those of the given seeds, the same for all methods."""

    sft_url: str
    policy_url: str
    reward_url: str
    output_url: str
    placement: DeviceConfig
    threads: int
    config: EvaluationConfig
    seeds: tuple[int, ...]
    domain: DomainConfig
    objectives: tuple[str, ...]

    def player(self, policy_url: str) -> MethodPlayer:
        """What plays methods with this policy, in the process that calls it."""
        torch.set_num_threads(self.threads)
        return MethodPlayer(
            self.sft_url,
            policy_url,
            self.reward_url,
            self.placement,
            self.config,
            self.seeds,
            self.domain,
            self.objectives,
        )

    def digest(self, method: Method) -> str:
        """What the files of a method are named after."""
        return hashlib.sha256(json.dumps(method.as_json(), sort_keys=True).encode()).hexdigest()[:16]

    def result_url(self, method: Method) -> str:
        """Where the result of a method lies."""
        return storage.join(self.output_url, f"method-{self.digest(method)}.json")

    def read(self, method: Method) -> Played | None:
        """The result of a method, None where it was not played yet."""
        url = self.result_url(method)
        if not storage.exists(url):
            return None
        document = storage.read_json(url)
        samples = [Dialogue.model_validate(sample) for sample in document["samples"]]
        result = MethodResult.model_validate(document["result"])
        training = document.get("training")
        trained = None if training is None else PolicyTraining(**training)
        return Played(result, samples, document["seconds"], trained)

    def write(self, method: Method, played: Played) -> None:
        """Keep the result of a method."""
        document = {
            "result": played.result.model_dump(mode="json"),
            "samples": [dialogue.model_dump(mode="json") for dialogue in played.samples],
            "seconds": round(played.seconds, 3),
            "training": None if played.training is None else asdict(played.training),
        }
        storage.write_json(self.result_url(method), document)

    def failure(self, method: Method) -> str | None:
        """Why a method will never have a result, where that is known; None: nothing speaks against it."""
        return None

    def trial_metrics(self, played: Played) -> dict[str, Any]:
        """What Ray Tune is told about a finished trial."""
        means = played.result.means
        return {**means, "malformed_rate": played.result.malformed_rate, tune.result.DONE: True}


class MethodTrial(tune.Trainable):
    """One Tune trial: one method, one iteration."""

    def setup(self, config: dict[str, Any], spec: SweepSpec) -> None:
        """Load the models; called once per actor."""
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self.spec = spec
        self.method = Method.from_json(config["method"])
        self.player = spec.player(spec.policy_url)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take over another method with the models already loaded."""
        self.method = Method.from_json(new_config["method"])
        return True

    def step(self) -> dict[str, Any]:
        """Play the method and write its result."""
        began = time.monotonic()
        played = replace(self.player.run(self.method), seconds=time.monotonic() - began)
        self.spec.write(self.method, played)
        return self.spec.trial_metrics(played)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A trial is one iteration whose result is already written: nothing to save."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See save_checkpoint."""


class Rounds(Protocol):
    """Says which methods are played, a round at a time."""

    def next_round(self) -> list[Method]:
        """The methods of the next round; empty when there is none."""

    def tell(self, played: Sequence[Played | None]) -> None:
        """Results of the last round, in its order; None: the trial failed."""


class FixedMethods:
    """One round: the given methods."""

    def __init__(self, methods: Sequence[Method]) -> None:
        self._methods = list(methods)

    def next_round(self) -> list[Method]:
        methods, self._methods = self._methods, []
        return methods

    def tell(self, played: Sequence[Played | None]) -> None:
        """Nothing follows."""


class SampledFront:
    """Rounds of a sampler over one front: first the methods that are played in any case, then at most
    `rounds` rounds of what the sampler asks for. It is told the results of all of them; where it chooses its
    weights beforehand, and so would ask nothing after them, of its own round alone.

    Args:
        make: a fresh sampler.
        method_at: what is played at a weight vector.
        fixed: what is played in any case, by its weight vector.
    """

    def __init__(
        self,
        make: Callable[[], Sampler],
        objectives: Sequence[str],
        rounds: int,
        method_at: MethodAt,
        fixed: Mapping[Weights, Method] | None = None,
    ) -> None:
        self._make, self._sampler = make, make()
        self._objectives, self._rounds, self._left = tuple(objectives), rounds, rounds
        self._method_at = method_at
        self._fixed = {
            rounded(weights, self._objectives): method for weights, method in (fixed or {}).items()
        }
        self._known: dict[Weights, Method] = {}
        self._asked: list[Weights] = []

    def next_round(self) -> list[Method]:
        if self._fixed:
            self._asked = list(self._fixed)
            self._known, self._fixed = self._fixed, {}
        elif self._left == 0 or self._sampler.finished:
            return []
        else:
            self._left -= 1
            asked = (rounded(weights, self._objectives) for weights in self._sampler.ask())
            self._asked = list(dict.fromkeys(asked))  # points that fall together are one
            for weights in self._asked:
                if weights not in self._known:
                    self._known[weights] = self._method_at(weights)
        return [self._known[weights] for weights in self._asked]

    def tell(self, played: Sequence[Played | None]) -> None:
        statistics = [mean_and_error(one, self._objectives) for one in played]
        came, of_sampler = sum(one is not None for one in played), self._left < self._rounds
        if came < 2 and not of_sampler:
            return  # too little to tell it
        if came < min(2, len(played)):
            raise SweepError(
                f"{came} of {len(played)} trials of a round have a result, and the sampler needs 2 to go on. "
                "Trial logs are in the stage's folder 'tune'; run again to play only what is missing"
            )
        means, errors = (np.stack(column) for column in zip(*statistics, strict=True))
        self._sampler.tell(self._asked, means, errors)
        if self._sampler.finished and not of_sampler:
            self._sampler = self._make()


def rounded(weights: Weights, objectives: Sequence[str]) -> Weights:
    """The nearest weights with few decimals that name every objective, in order.

    >>> rounded(Weights({"b": 1, "a": 2}), ["a", "b"])
    Weights(a=0.6667,b=0.3333)
    """
    scale = 10**WEIGHT_DECIMALS
    counts = [round(value * scale) for value in weights.over(objectives)]
    counts[counts.index(max(counts))] += scale - sum(counts)
    return Weights({name: count / scale for name, count in zip(objectives, counts, strict=True)})


def mean_and_error(played: Played | None, objectives: Sequence[str]) -> tuple[FloatArray, FloatArray]:
    """Means over students and their standard errors, each [objectives]; NaN where the trial failed."""
    if played is None:
        return np.full(len(objectives), np.nan), np.full(len(objectives), np.nan)
    values = np.array([played.result.values[name] for name in objectives])
    students = values.shape[1]
    errors = values.std(axis=1, ddof=1) / math.sqrt(students) if students > 1 else np.zeros(len(values))
    return values.mean(axis=1), errors


@dataclass(frozen=True)
class Swept:
    """A method that a sweep played. `played` None: its trial failed, and `failure` says why, where it would
    fail again. `rounds`: those of its source that asked for it, from 0."""

    method: Method
    played: Played | None
    source: int
    rounds: tuple[int, ...]
    failure: str | None = None


class MethodSearch(Searcher):
    """Gives Tune the methods of all sources, each source's next round as soon as its last one is known.

    Its state is the result files: `save` has nothing to write, and a new search over the same sources stands
    where the last one was stopped.
    """

    def __init__(self, spec: SweepSpec, sources: Sequence[Rounds], progress: PlayedCallback) -> None:
        super().__init__()
        self.spec, self.sources, self.progress = spec, list(sources), progress
        self.failed: list[Method] = []
        self.error: SweepError | None = None
        self.rounds: list[list[list[Method]]] = [[] for _ in sources]  # source -> its rounds so far
        self._open: list[list[Method] | None] = [[] for _ in sources]  # round that is played; None: no more
        self._waiting: list[Method] = []
        self._running: dict[str, Method] = {}
        self._results: dict[Method, Played] = {}
        for source in range(len(sources)):
            self._advance(source)

    @property
    def methods(self) -> list[Method]:
        """All that were asked for, each once, in order."""
        every = (method for rounds in self.rounds for methods in rounds for method in methods)
        return list(dict.fromkeys(every))

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to play."""
        return not self._waiting and not self._running

    @property
    def next_waiting(self) -> Method | None:
        """The method that is suggested next."""
        return self._waiting[0] if self._waiting else None

    @property
    def running(self) -> list[Method]:
        """The methods of the trials that run now."""
        return list(self._running.values())

    def swept(self) -> list[Swept]:
        """Everything that was played, in the order it was asked for."""
        places: dict[Method, tuple[int, list[int]]] = {}
        for source, rounds in enumerate(self.rounds):
            for number, methods in enumerate(rounds):
                for method in methods:
                    places.setdefault(method, (source, []))[1].append(number)
        return [
            Swept(method, self.result(method), source, tuple(numbers), self.spec.failure(method))
            for method, (source, numbers) in places.items()
        ]

    def playing_order(self, methods: Sequence[Method]) -> list[Method]:
        """The order in which the methods of a round are played."""
        return list(methods)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next method; None while another round may follow what is being played."""
        if self._waiting:
            method = self._running[trial_id] = self._waiting.pop(0)
            return {"method": method.as_json()}
        return None if self._running else Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Note what the trial came to, and begin the next round of every source that waited for it."""
        method = self._running.pop(trial_id)
        if self.result(method) is None:
            self.failed.append(method)
        try:
            for source in range(len(self.sources)):
                self._advance(source)
        except SweepError as error:  # raised once Tune has come to its end
            self.error = error
            self._waiting.clear()
        self._report(method.name)

    def _advance(self, source: int) -> None:
        """Begin the source's next rounds, as far as the results of the last ones are known."""
        methods = self._open[source]
        while methods is not None and all(map(self._is_settled, methods)):
            if methods:
                self.sources[source].tell([self.result(method) for method in methods])
            methods = self.sources[source].next_round() or None
            self._open[source] = methods
            if methods is not None:
                self.rounds[source].append(methods)
                underway = {*self._waiting, *self._running.values()}
                ordered = self.playing_order(methods)
                self._waiting += [m for m in ordered if not self._is_settled(m) and m not in underway]
        self._report("")

    def _is_settled(self, method: Method) -> bool:
        if method in self.failed or self.result(method) is not None:
            return True
        return self.spec.failure(method) is not None

    def result(self, method: Method) -> Played | None:
        """What a method came to, None where it has no result."""
        if method not in self._results and (played := self.spec.read(method)) is not None:
            self._results[method] = played
        return self._results.get(method)

    def _report(self, name: str) -> None:
        methods = self.methods
        self.progress(sum(map(self._is_settled, methods)), len(methods), name)

    def save(self, checkpoint_path: str) -> None:
        """Everything is in the result files."""

    def restore(self, checkpoint_path: str) -> None:
        """See save."""

    def __getstate__(self) -> dict[str, Any]:
        # Tune stores its searcher for a restore, which is not used: a progress bar cannot be pickled.
        return {**self.__dict__, "progress": _ignore}


def _ignore(done: int, total: int, name: str) -> None:
    """Stands for the caller's progress function in what Tune stores."""


def play_rounds(
    spec: SweepSpec, sources: Sequence[Rounds], cluster: ClusterConfig, progress: PlayedCallback
) -> list[Swept]:
    """Play the rounds of all sources; what was played before is read. A trial that fails is tried again
    `cluster.max_failures` times, and then left out (`Swept.played` is None).

    ray.init must have been called. Raises SweepError where a sampler has too few results to go on.
    """
    resources = {"cpu": cluster.cpus_per_rollout_actor, "gpu": 1 if cluster.use_gpu else 0}
    trainable = tune.with_resources(tune.with_parameters(MethodTrial, spec=spec), resources)
    return run_search(MethodSearch(spec, sources, progress), trainable, cluster.rollout_actors, cluster)


def play_methods(
    spec: SweepSpec, methods: Sequence[Method], cluster: ClusterConfig, progress: PlayedCallback
) -> list[Played]:
    """Play every method whose result is not there yet; returns all results in order of `methods`.

    ray.init must have been called. Raises SweepError naming the methods that failed.
    """
    swept = play_rounds(spec, [FixedMethods(methods)], cluster, progress)
    by_method = {one.method: one.played for one in swept}
    played = [by_method[method] for method in methods]
    failed = [method.name for method, result in zip(methods, played, strict=True) if result is None]
    if failed:
        raise methods_failed(failed, spec)
    return [result for result in played if result is not None]


def methods_failed(names: Sequence[str], spec: SweepSpec) -> SweepError:
    """The error that names them and says where to look."""
    return SweepError(
        f"methods without a result: {', '.join(names)}. Trial logs are in '{tune_folder(spec)}'; run again "
        "to play only these."
    )


def tune_folder(spec: SweepSpec) -> str:
    """Where Ray Tune keeps the logs of the trials."""
    return storage.join(spec.output_url, "tune")


def run_search(search: MethodSearch, trainable: Any, at_once: int, cluster: ClusterConfig) -> list[Swept]:
    """Run what the search suggests as trials of `trainable`, `at_once` side by side; see `play_rounds`."""
    if not search.is_done:
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=search, num_samples=-1, reuse_actors=True, max_concurrent_trials=at_once
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=tune_folder(search.spec),
                failure_config=tune.FailureConfig(max_failures=cluster.max_failures),
                verbose=0,
            ),
        )
        tuner.fit()
    if search.error is not None:
        raise search.error
    return search.swept()
