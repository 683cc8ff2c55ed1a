"""`mahalo portfolio RUN --check N`: whether a portfolio's certificate holds on problems that it has not met.

The certificate rests on means over the sweep's problems. Here its members are played on new ones, and at
random balances the loss of the member that answers is measured against the best policy that was known there
and, where the run's policy may be decoded at any weights, against that policy at exactly these weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace

import numpy as np
from rich.console import Console

from mahalo_ray.config import RunConfig
from mahalo_ray.data import storage
from mahalo_ray.evaluation.methods import Method, Played
from mahalo_ray.evaluation.statistics import align, percentile_interval
from mahalo_ray.metrics import FloatArray
from mahalo_ray.objectives import Weights
from mahalo_ray.pipeline.portfolios import candidates_of, decoding_config_of, run_spec
from mahalo_ray.pipeline.seed_blocks import fresh_students
from mahalo_ray.pipeline.sweeping import SweepFront
from mahalo_ray.sweeps import Portfolio, make_sampler
from mahalo_ray.sweeps.decoding import PlayedCallback, play_methods, rounded

FOLDER, FILE = "portfolio_check", "portfolio_check.json"
_RESAMPLES = 1000


@dataclass(frozen=True)
class CheckedBalance:
    """One random balance. `loss`: what the member that answers lacks against the best rival on the new
    problems (negative: it is better), with its own interval; `bound` and its interval: what was certified
    (infinite: nothing)."""

    weights: dict[str, float]
    member: str
    rival: str
    loss: float
    low: float
    high: float
    bound: float
    bound_low: float
    bound_high: float


@dataclass(frozen=True)
class PortfolioCheck:
    """What the new problems say of a portfolio."""

    problems: int
    confidence: float
    unit: str
    balances: tuple[CheckedBalance, ...]

    @property
    def certified(self) -> list[CheckedBalance]:
        """The balances at which something is certified."""
        return [one for one in self.balances if math.isfinite(one.bound)]


def check_portfolio(
    run: str,
    chosen: Portfolio,
    count: int,
    problems: int | None,
    seed: int,
    session: Callable[[RunConfig], AbstractContextManager[None]],
    progress: PlayedCallback,
    confidence: float = 0.95,
) -> PortfolioCheck:
    """Play a portfolio of the run on new problems, and compare its losses at `count` random balances with the
    certified ones; writes `portfolio_check.json` into the run. What was played before is read.

    Args:
        problems: new problems, that neither training nor the sweep has met; None: as many as the sweep's.
        seed: of the balances, which are drawn evenly from the simplex.

    ValueError for a portfolio that does not say its policies and its scale.
    """
    if not chosen.policies or not chosen.scale:
        raise ValueError("the portfolio was saved by an earlier version: make it anew to check it")
    folder = storage.absolute(run)
    config = decoding_config_of(folder)
    met = set(candidates_of(run).students)
    problems = len(met) if problems is None else problems
    new = [seed for seed in fresh_students(config, more=problems) if seed not in met][:problems]
    key = hashlib.sha256(f"{chosen.sweep} {new}".encode()).hexdigest()[:12]
    spec = replace(run_spec(folder, config), output_url=storage.join(folder, FOLDER, key), seeds=tuple(new))
    objectives = chosen.objectives
    drawn = make_sampler("dirichlet", objectives, max(count, len(objectives)), seed=seed).ask()[-count:]
    balances = [rounded(weights, objectives) for weights in drawn]
    # Chosen on the sweep's problems, so that being the best of many is no luck on the new ones.
    best_known = [_best_known(chosen, balance) for balance in balances]
    answering = [chosen.member(balance) for balance in balances]
    methods = {row: _method_of(chosen, row, folder) for row in {*best_known, *answering}}
    at_balance: list[Method] = []
    if _decodes(chosen):
        plain = SweepFront(None, 1, 1.0)
        at_balance = [plain.method_at(config, balance, "check") for balance in balances]
    wanted = list(dict.fromkeys([*methods.values(), *at_balance]))
    with session(config):
        played = dict(zip(wanted, play_methods(spec, wanted, config.cluster, progress), strict=True))
    values = {method: _values(one, chosen, spec.seeds) for method, one in played.items()}
    checked = []
    for number, balance in enumerate(balances):
        rivals = [methods[best_known[number]], *at_balance[number : number + 1]]
        checked.append(_checked(chosen, balance, methods[answering[number]], rivals, values, confidence))
    check = PortfolioCheck(problems, confidence, chosen.unit, tuple(checked))
    document = asdict(check)
    for row in document["balances"]:
        row.update({name: None for name in ("bound", "bound_low", "bound_high") if math.isinf(row[name])})
    storage.write_json(storage.join(folder, FILE), document)
    return check


def _best_known(chosen: Portfolio, balance: Weights) -> int:
    worth = chosen.values @ np.array(balance.over(chosen.objectives))
    return int(np.nanargmax(worth))


def _decodes(chosen: Portfolio) -> bool:
    """Whether some policy is the run's own without guidance, which can be decoded at any weights."""
    return any("model" not in policy and policy["guidance"] is None for policy in chosen.policies)


def _method_of(chosen: Portfolio, row: int, folder: str) -> Method:
    """The policy of a row, as it is played."""
    policy = chosen.policies[row]
    weights, guidance = policy["weights"], policy["guidance"]
    return Method(
        policy["method"],
        "weights" if guidance is None else "guided",
        None if weights is None else Weights(weights),
        None if guidance is None else Weights(guidance),
        policy["num_candidates"],
        sweep=True,
        model_url=storage.join(folder, policy["model"]) if "model" in policy else None,
        strength=policy["strength"],
        temperature=policy.get("temperature"),
    )


def _values(played: Played, chosen: Portfolio, seeds: tuple[int, ...]) -> FloatArray:
    """[problems, objectives], in the portfolio's scale."""
    result = played.result
    columns = [align(result.student_ids, result.values[name], list(seeds)) for name in chosen.objectives]
    scaled: FloatArray = np.stack(columns, axis=1) / np.array(chosen.scale)
    return scaled


def _checked(
    chosen: Portfolio,
    balance: Weights,
    member: Method,
    rivals: list[Method],
    values: dict[Method, FloatArray],
    confidence: float,
) -> CheckedBalance:
    vector = np.array(balance.over(chosen.objectives))
    losses = {rival: (values[rival] - values[member]) @ vector for rival in rivals}  # problem by problem
    worst = max(rivals, key=lambda rival: float(losses[rival].mean()))
    draws = np.random.default_rng(17).integers(0, len(losses[worst]), (_RESAMPLES, len(losses[worst])))
    low, high = percentile_interval(losses[worst][draws].mean(axis=1), confidence)
    bound, interval = chosen.loss_bound(balance), (math.inf, math.inf)
    if math.isfinite(bound):
        interval = chosen.loss_interval(balance, confidence)
    return CheckedBalance(
        dict(balance),
        member.name,
        worst.name,
        float(losses[worst].mean()),
        low,
        high,
        bound,
        *interval,
    )


def print_check(console: Console, check: PortfolioCheck) -> None:
    """How often the certified loss held on the new problems."""
    certified, count = check.certified, len(check.balances)
    lines = [
        f"checked on {check.problems} new problems at {count} random balances ({count - len(certified)} of "
        "them outside the weights that were played, where nothing is certified)",
        f"unit: {check.unit}",
    ]
    if certified:
        losses = [one.loss for one in certified]
        beyond = [one for one in certified if one.loss > one.bound_high]
        clearly = sum(one.low > one.bound_high for one in certified)
        lines += [
            f"loss of the member that answers: {np.mean(losses):.4f} on average, {max(losses):.4f} at most",
            f"within the certified loss at {sum(one.loss <= one.bound for one in certified)} of "
            f"{len(certified)} balances, within the upper end of its {check.confidence:.0%} interval at "
            f"{len(certified) - len(beyond)}; beyond that end by more than the new problems' own noise at "
            f"{clearly}",
        ]
        lines += [
            f"beyond at {Weights(one.weights).label()}: '{one.member}' loses {one.loss:.4f} [{one.low:.4f}, "
            f"{one.high:.4f}] to '{one.rival}', certified {one.bound:.4f} [{one.bound_low:.4f}, "
            f"{one.bound_high:.4f}]"
            for one in beyond
        ]
    for line in lines:
        console.print(line, markup=False, highlight=False)
