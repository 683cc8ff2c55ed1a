"""`mahalo portfolio`: a few policies of a finished run such that every balance has a nearly optimal one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mahalo_ray.config import RunConfig, SweepConfig, load_config
from mahalo_ray.data import storage
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.evaluation import plots
from mahalo_ray.evaluation.methods import Method, Played
from mahalo_ray.evaluation.results import MethodResult
from mahalo_ray.evaluation.statistics import align
from mahalo_ray.metrics import FloatArray
from mahalo_ray.objectives import Weights, unknown_name
from mahalo_ray.pipeline.artifacts import run_model
from mahalo_ray.pipeline.seed_blocks import domain_for_workers, fresh_students
from mahalo_ray.pipeline.sweeping import SweepFront
from mahalo_ray.sweeps import Portfolio, portfolio
from mahalo_ray.sweeps.decoding import PlayedCallback, SweepSpec, play_rounds, rounded
from mahalo_ray.sweeps.front_metrics import bootstrap_values
from mahalo_ray.sweeps.portfolio import FILE_IN_RUN, least_eps_by_size, sweep_fingerprint
from mahalo_ray.sweeps.sweep_table import FILE, SWEEP, TRAINING_SWEEP, SweepTable

PICTURE = "portfolio.png"  # in the run, beside the portfolio
RESAMPLES = 200  # kept with a portfolio, for the intervals of its losses
LARGEST_SIZE = 10  # of the picture of size against eps
_BEST = {
    "decoding": "the best of this run's policy over the decoding weights (and guidance, strength, "
    "temperature) that were played; a policy trained for one balance is not among them",
    "guidance": "the best of this run's guided policy over the guidance weights that were played",
    "training": "the best of the policies that the sweep trained, each for one balance; the run's own policy "
    "at other decoding weights is not among them",
    "decoding and training": "the best of both: this run's policy at the decoding weights that were played, "
    "and the policies that the sweep trained for one balance each",
}
# What a portfolio may be chosen from -> the stages that have played it.
POLICIES = {"swept": (SWEEP,), "trained": (TRAINING_SWEEP,), "both": (SWEEP, TRAINING_SWEEP)}


@dataclass(frozen=True)
class PortfolioDemand:
    """What a portfolio has to do: stay within `eps` and `delta`, or have at most `size` members.

    `scale`: "none" for weighted sums in the objectives' own units, "range" to divide every objective by its
    range over the candidates first.
    """

    eps: float | None = None
    delta: float | None = None
    size: int | None = None
    scale: str = "none"


@dataclass
class SweptPolicies:
    """The policies that a portfolio is chosen from, and what each reached with every student."""

    kind: str
    objectives: tuple[str, ...]
    students: list[Any]
    sweep: str  # its fingerprint
    vectors: list[Weights] = field(default_factory=list)  # the weights that each policy was found at
    policies: list[dict[str, Any]] = field(default_factory=list)
    values: list[FloatArray] = field(default_factory=list)  # of each policy, [students, objectives]

    def add(self, vector: Weights, result: MethodResult, model: str | None = None) -> None:
        """A policy found at a weight vector; `model`: the folder, as a path in the run, of one that was
        trained. One that was there before is left out, and so is one that met other students."""
        policy = {
            "method": result.name,
            "weights": result.weights,
            "guidance": result.guidance,
            "num_candidates": result.num_candidates,
            "strength": result.strength,
            **({} if result.temperature is None else {"temperature": result.temperature}),
            **({} if model is None else {"model": model}),
        }
        served = {name: value for name, value in policy.items() if name != "method"}
        known = [{n: v for n, v in other.items() if n != "method"} for other in self.policies]
        if served in known or set(result.student_ids) != set(self.students):
            return
        columns = [align(result.student_ids, result.values[o], self.students) for o in self.objectives]
        named = dict(zip(self.objectives, vector.over(self.objectives), strict=True))
        self.vectors.append(Weights(named))
        self.policies.append(policy)
        self.values.append(np.stack(columns, axis=1))

    @property
    def means(self) -> FloatArray:
        """[policies, objectives]."""
        return np.stack([values.mean(axis=0) for values in self.values])

    def scale(self, name: str) -> FloatArray:
        """What every objective is divided by, [objectives]."""
        spread = np.ptp(self.means, axis=0)
        return np.where(spread > 0, spread, 1.0) if name == "range" else np.ones(len(self.objectives))

    def choose(self, demand: PortfolioDemand, seed: int = 17, resamples: int = RESAMPLES) -> Portfolio:
        """The portfolio of these policies."""
        scale = self.scale(demand.scale)
        chosen = portfolio(self.means / scale, self.vectors, demand.eps, demand.delta, demand.size)
        unit = "weighted sum of the objectives in their own units"
        if demand.scale == "range":
            ranges = ", ".join(f"{n} by {s:.4g}" for n, s in zip(self.objectives, scale, strict=True))
            unit = f"weighted sum of the objectives, each divided by its range over the candidates ({ranges})"
        samples = None
        if resamples:
            samples = bootstrap_values(np.stack(self.values), resamples, seed) / scale
        named = chosen.described(tuple(self.policies), unit, _BEST[self.kind], samples, self.sweep)
        return replace(named, scale=tuple(scale.tolist()))


def candidates_of(run: str, policies: str | None = None) -> SweptPolicies:
    """The policies that the sweeps of a finished run have played, and, of a sweep over decoding weights, the
    heads alone, where the stage `evaluate` has played them: the corners.

    Args:
        policies: a key of `POLICIES`; None: `swept`, or `trained` where the run has no other sweep.

    ValueError where the run has no such finished sweep, or its two sweeps met different students.
    """
    folder = storage.absolute(run)
    if policies is None:
        only_trained = not _has_sweep(folder, SWEEP) and _has_sweep(folder, TRAINING_SWEEP)
        policies = "trained" if only_trained else "swept"
    if policies not in POLICIES:
        raise ValueError(unknown_name("choice of policies", policies, POLICIES))
    stages = POLICIES[policies]
    tables = {stage: SweepTable.of_run(run, stage) for stage in stages}
    for stage, table in tables.items():
        if not table.played:
            raise ValueError(f"the stage '{stage}' of the run at '{run}' has no point with a result")
    results = {stage: _results_of(folder, stage) for stage in stages}
    first = tables[stages[0]]
    students = results[stages[0]][first.played[0].method].student_ids
    kinds = " and ".join(table.played[0].kind for table in tables.values())
    if kinds not in _BEST:
        raise ValueError("a sweep over guidance weights and one over training weights weigh different things")
    found = SweptPolicies(kinds, first.objectives, students, sweep_fingerprint(run, stages))
    for stage, table in tables.items():
        before = len(found.vectors)
        for point in table.played:
            vector = point.guidance if point.kind == "guidance" else point.weights
            model = None if point.model is None else f"{stage}/{point.model}"
            found.add(Weights(vector or {}), results[stage][point.method], model)
        if len(found.vectors) == before:
            raise ValueError(
                f"the policies of '{stage}' met other students than those of '{stages[0]}': run "
                "`mahalo sweep` again for both with the same 'evaluation'"
            )
    heads = storage.join(folder, "evaluate", "methods.json")
    if SWEEP in stages and first.played[0].kind == "decoding" and storage.exists(heads):
        for document in storage.read_json(heads):
            result = MethodResult.model_validate(document["result"])
            if result.kind == "head":
                found.add(Weights(result.weights or {}), result)
    return found


def _has_sweep(folder: str, stage: str) -> bool:
    return storage.exists(storage.join(folder, stage, FILE))


def _results_of(folder: str, stage: str) -> dict[str, MethodResult]:
    """What every policy of a stage's sweep reached, by its name."""
    documents = storage.read_json(storage.join(folder, stage, "points.json"))
    return {d["result"]["name"]: MethodResult.model_validate(d["result"]) for d in documents}


class WorstCells:
    """Rounds that play the policy at the weights where least is certified (PALM's lazy search), until all
    losses are certified within `tolerance`, or `at_most` policies were played."""

    def __init__(
        self, config: RunConfig, found: SweptPolicies, demand: PortfolioDemand, tolerance: float, at_most: int
    ) -> None:
        self._config, self._found, self._demand = config, found, demand
        self._tolerance, self._left, self._together = tolerance, at_most, config.cluster.rollout_actors
        self._asked: list[Weights] = []

    def next_round(self) -> list[Method]:
        known = {rounded(vector, self._found.objectives) for vector in self._found.vectors}
        cells = self._found.choose(self._demand, resamples=0).cells()
        worst = (
            rounded(cell.weights, self._found.objectives) for cell in cells if cell.loss > self._tolerance
        )
        new = [vector for vector in dict.fromkeys(worst) if vector not in known]
        self._asked = new[: min(self._left, self._together)]
        self._left -= len(self._asked)
        plain = SweepFront(None, 1, 1.0)
        return [plain.method_at(self._config, vector, "portfolio") for vector in self._asked]

    def tell(self, played: Sequence[Played | None]) -> None:
        for vector, one in zip(self._asked, played, strict=True):
            if one is not None:
                self._found.add(vector, one.result)


def split_worst_cells(
    run: str,
    found: SweptPolicies,
    demand: PortfolioDemand,
    tolerance: float,
    at_most: int,
    session: Callable[[RunConfig], AbstractContextManager[None]],
    progress: PlayedCallback,
) -> int:
    """Play up to `at_most` further policies of the run where least is certified, and add them to `found`;
    returns how many there are now beyond the sweep. What was played before is read.

    ValueError for a sweep that is not over decoding weights: another point would have to be trained, or has
    no corner to split.
    """
    if found.kind != "decoding":
        raise ValueError(
            f"further policies can be played of a sweep over decoding weights, and this is one of kind "
            f"'{found.kind}': leave out --evaluate; the certificate is over the policies that were played"
        )
    folder = storage.absolute(run)
    config = decoding_config_of(folder)
    spec = run_spec(folder, config)
    before = len(found.vectors)
    with session(config):
        play_rounds(spec, [WorstCells(config, found, demand, tolerance, at_most)], config.cluster, progress)
    return len(found.vectors) - before


def run_spec(folder: str, config: RunConfig) -> SweepSpec:
    """What it takes to play policies of the finished run in this folder as its sweep has done."""
    return SweepSpec(
        sft_url=run_model(folder, "sft"),
        policy_url=run_model(folder, "policy"),
        reward_url=run_model(folder, "reward"),
        output_url=storage.join(folder, SWEEP),
        placement=DeviceConfig.of(config.cluster, config.model.dtype),
        threads=max(1, math.floor(config.cluster.cpus_per_rollout_actor)),
        config=config.evaluation,
        seeds=fresh_students(config),
        domain=domain_for_workers(config.domain),
        objectives=config.objective_names,
    )


def config_of(run: str) -> RunConfig:
    """The configuration that the run in this folder was made with."""
    return load_config(storage.local_copy(storage.join(run, "config.yaml")))


def decoding_config_of(run: str) -> RunConfig:
    """The same with a sweep over decoding weights, whatever the last sweep of the run was over."""
    config = config_of(run)
    if config.sweep.kind == "decoding":
        return config
    return config.model_copy(update={"sweep": SweepConfig(weights=config.sweep.weights)})


def save_portfolio(run: str, found: SweptPolicies, demand: PortfolioDemand, chosen: Portfolio) -> list[str]:
    """Write the portfolio and its picture into the run; returns where they are."""
    files = [storage.join(storage.absolute(run), name) for name in (FILE_IN_RUN, PICTURE)]
    chosen.save(files[0])
    sizes = range(1, min(LARGEST_SIZE, len(found.vectors)) + 1)
    curve = least_eps_by_size(found.means / found.scale(demand.scale), found.vectors, sizes, demand.delta)
    storage.write_bytes(files[1], plots.portfolio_png(curve, len(chosen.members), chosen.unit))
    return files


def print_portfolio(console: Console, chosen: Portfolio, confidence: float = 0.95) -> None:
    """The members, what they guarantee, and over what "best" is."""
    drawn = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    drawn.add_column("member")
    for name in chosen.objectives:
        drawn.add_column(Text(name), justify="right")
    for member in chosen.members:
        values = [f"{value:.3f}" for value in chosen.values[member]]
        drawn.add_row(Text(chosen.name_of(member)), *values)
    console.print(drawn)
    lines = [
        f"{len(chosen.members)} of {len(chosen.values)} policies; at each of the {len(chosen.values)} weight "
        f"vectors that they were found at, one is worth at least best - {chosen.eps:.4g} |best|"
        + (f" - {chosen.delta:.4g}" if chosen.delta else ""),
        "no smaller portfolio does that"
        if chosen.exact
        else f"a smaller portfolio that does that may exist: at most {chosen.gap} members fewer",
        f"unit: {chosen.unit}",
        f'"best": {chosen.best}',
    ]
    worst = chosen.certificate()
    low, high = chosen.loss_interval(worst.weights, confidence)
    lines.append(
        f"certified at every balance between the weight vectors: a loss of at most {worst.loss:.4f} "
        f"[{low:.4f}, {high:.4f}], reached at {worst.weights.label()}. It bounds the loss against any policy "
        "of this kind, as long as the best found at a weight vector is the best there"
    )
    for line in lines:
        console.print(line, markup=False, highlight=False)
    missing = [n for n in chosen.objectives if math.isinf(chosen.loss_bound(Weights.one(n)))]
    if missing:
        console.print(
            f"nothing is certified towards all weight on {', '.join(missing)}: no such policy was played",
            markup=False,
        )


def print_choice(console: Console, chosen: Portfolio, weights: Weights, confidence: float = 0.95) -> None:
    """The member for a balance, and its certified loss."""
    member, bound = chosen.member(weights), chosen.loss_bound(weights)
    console.print(f"{weights.label()}: {chosen.name_of(member)}", markup=False, highlight=False)
    if math.isinf(bound):
        console.print("nothing is certified there: it lies outside the weights that were played")
        return
    low, high = chosen.loss_interval(weights, confidence)
    worth = float(chosen.values[member] @ np.array(weights.over(chosen.objectives)))
    console.print(
        f"worth {worth:.4f}; loss against the best that was played {chosen.known_loss(weights):.4f}, "
        f"certified loss at most {bound:.4f} [{low:.4f}, {high:.4f}] ({confidence:.0%} bootstrap interval; "
        f"unit: {chosen.unit})",
        markup=False,
        highlight=False,
    )
