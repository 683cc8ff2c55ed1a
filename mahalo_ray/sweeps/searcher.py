"""Any sampler of weights as a search algorithm of Ray Tune."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from mahalo_ray.objectives import Weights
from mahalo_ray.sweeps.sampler import Sampler

FORMAT = 1  # of the file that `save` writes
STANDARD_ERROR = "standard_error"  # under this key of its result a trial may report one per objective


class SamplerSearcher(Searcher):
    """Suggests the weights of a sampler's round, waits for all of its trials, tells the sampler, asks again.

    A trial finds its weights in `config[key]` as {objective: weight} and reports one number per objective
    under the objective's name, and, where they are known, standard errors under `standard_error` as
    {objective: number}. A trial that fails or reports NaN is told to the sampler as failed. Give Tune
    `num_samples=-1`: the sampler says when the search is over; `max_concurrent_trials` works as always.

    The state is kept as lines of JSON: the rounds told, the results of the open round, and which trial has
    which weights. `Tuner.restore` continues with it after a killed driver and asks what it would have asked.

    Args:
        sampler: a fresh one; on a restore, made with the arguments that it had.
        key: where in a trial's config the weights stand.
        reuse: take a result known for the same weights instead of evaluating them again, as is right where
            an evaluation is repeated exactly (fixed seeds).

    Example:
        >>> from mahalo_ray.sweeps import make_sampler
        >>> searcher = SamplerSearcher(make_sampler("lattice", ["a", "b"], 2))
        >>> searcher.suggest("trial-1")
        {'weights': {'a': 1.0, 'b': 0.0}}
        >>> searcher.on_trial_complete("trial-1", {"a": 0.9, "b": 0.1})
        >>> searcher.suggest("trial-2")
        {'weights': {'a': 0.0, 'b': 1.0}}
        >>> searcher.suggest("trial-3") is None  # waits for trial-2
        True
        >>> searcher.on_trial_complete("trial-2", {"a": 0.2, "b": 0.8})
        >>> searcher.suggest("trial-3")
        'FINISHED'
    """

    def __init__(self, sampler: Sampler, *, key: str = "weights", reuse: bool = True) -> None:
        super().__init__()
        self.sampler, self.key, self.reuse = sampler, key, reuse
        self._told: list[list[_Row]] = []
        self._trials: dict[str, int] = {}  # trial -> its position in the open round
        self._results: dict[int, _Row] = {}  # position -> result
        self._asked: list[Weights] = []
        self._open_round()

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """The search is over weights and needs no metric: whatever a scheduler was given is accepted."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """The config of a trial, None while the round's last trials run, or `Searcher.FINISHED`."""
        if self.sampler.finished:
            return Searcher.FINISHED
        given = {*self._trials.values(), *self._results}
        position = next((n for n in range(len(self._asked)) if n not in given), None)
        if position is None:
            return None
        self._trials[trial_id] = position
        return {self.key: dict(self._asked[position])}

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Note a trial's result; with the last one of the round, tell the sampler."""
        if trial_id not in self._trials:
            return
        position = self._trials.pop(trial_id)
        self._results[position] = self._row(self._asked[position], {} if error or not result else result)
        self._close_round()

    def save(self, checkpoint_path: str) -> None:
        """Write the state, one JSON document a line: what it is for, each round told, the open round."""
        lines: list[dict[str, Any]] = [{"format": FORMAT, "objectives": list(self.sampler.objectives)}]
        lines += [{"told": [row.as_json() for row in rows]} for rows in self._told]
        results = {str(n): row.as_json() for n, row in self._results.items()}
        lines.append({"open": results, "trials": self._trials})
        Path(checkpoint_path).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def restore(self, checkpoint_path: str) -> None:
        """Read what `save` wrote and tell it all to the (fresh) sampler again.

        Tune copies the file to its storage in pieces: a last line cut off by a kill is left out, and what it
        told is evaluated again. ValueError if the file is something else or belongs to another sampler.
        """
        rounds: list[list[_Row]] = []
        results: dict[int, _Row] = {}
        trials: dict[str, int] = {}
        try:
            lines = Path(checkpoint_path).read_text().split("\n")[:-1]
            documents = [json.loads(line) for line in lines]
            head = documents[:1]
            if head and (head[0]["format"], head[0]["objectives"]) != (FORMAT, list(self.sampler.objectives)):
                raise ValueError(f"it has format {head[0]['format']}, for {', '.join(head[0]['objectives'])}")
            for document in documents[1:]:
                if "told" in document:
                    rounds.append([_Row.from_json(row) for row in document["told"]])
                else:
                    results = {int(n): _Row.from_json(row) for n, row in document["open"].items()}
                    trials = {str(trial): int(n) for trial, n in document["trials"].items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            names = ", ".join(self.sampler.objectives)
            raise ValueError(f"'{checkpoint_path}' is no state of a search over {names}: {error}") from error
        self._told, self._trials, self._results = [], {}, {}
        for rows in rounds:
            self._tell(rows)
        self._open_round()
        self._trials, self._results = trials, {**self._results, **results}

    def table(self) -> list[dict[str, Any]]:
        """All results in the order asked, with those of the open round: {weights, values, standard_errors,
        round}."""
        rows = [(n, row) for n, rows in enumerate(self._told) for row in rows]
        rows += [(len(self._told), self._results[n]) for n in sorted(self._results)]
        return [{"round": n, **row.as_json()} for n, row in rows]

    def _open_round(self) -> None:
        self._asked = [] if self.sampler.finished else self.sampler.ask()
        self._results = {}
        if self.reuse:
            known = {row.key(): row for rows in self._told for row in rows if row.succeeded}
            keys = [_key(vector) for vector in self._asked]
            self._results = {n: known[key] for n, key in enumerate(keys) if key in known}
            self._close_round()

    def _close_round(self) -> None:
        if self._asked and len(self._results) == len(self._asked):
            self._tell([self._results[n] for n in range(len(self._asked))])
            self._open_round()

    def _tell(self, rows: list[_Row]) -> None:
        self.sampler.tell(
            [row.weights for row in rows],
            np.array([row.values for row in rows], dtype=np.float64),
            np.array([row.errors for row in rows], dtype=np.float64),
        )
        self._told.append(rows)

    def _row(self, weights: Weights, result: Mapping[str, Any]) -> _Row:
        """Tune hands over nested results with their keys joined by '/'."""
        names = self.sampler.objectives
        values = [float(result.get(name, math.nan)) for name in names]
        errors = [float(result.get(f"{STANDARD_ERROR}/{name}", 0.0)) for name in names]
        return _Row(weights, values, errors)


class _Row:
    """One trial: its weights, and what it reached; NaN where it failed."""

    def __init__(self, weights: Weights, values: list[float], errors: list[float]) -> None:
        self.weights, self.values = weights, values
        self.errors = [0.0 if math.isnan(error) else error for error in errors]

    @property
    def succeeded(self) -> bool:
        return not any(math.isnan(value) for value in self.values)

    def key(self) -> tuple[tuple[str, float], ...]:
        return _key(self.weights)

    def as_json(self) -> dict[str, Any]:
        values = self.values if self.succeeded else None
        return {"weights": dict(self.weights), "values": values, "standard_errors": self.errors}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> _Row:
        errors = [float(error) for error in document["standard_errors"]]
        values = [math.nan] * len(errors) if document["values"] is None else document["values"]
        return cls(Weights(document["weights"]), [float(value) for value in values], errors)


def _key(weights: Weights) -> tuple[tuple[str, float], ...]:
    return tuple((name, round(weight, 12)) for name, weight in sorted(weights.items()) if weight > 0)
