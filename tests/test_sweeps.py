"""Sweeps: rounds of samplers over result files, the table, the fronts of a run, and what a config may say."""

from __future__ import annotations

import itertools
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from ray.tune.search import Searcher
from tiny_run import EXAMPLE

from mahalo_ray.config import (
    ConfigError,
    EvaluationConfig,
    PolicyConfig,
    RunConfig,
    TrainingConfig,
    load_config,
)
from mahalo_ray.data import storage
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.evaluation.methods import Method, Played, PolicyTraining
from mahalo_ray.evaluation.results import MethodResult
from mahalo_ray.objectives import Weights
from mahalo_ray.pipeline.sweeping import rounds_of, sweep_fronts, sweep_methods, sweep_table
from mahalo_ray.sweeps.decoding import MethodSearch, SweepError, SweepSpec
from mahalo_ray.sweeps.sweep_table import SweepTable
from mahalo_ray.sweeps.training_trials import StartingPoint, TrainingSearch, TrainingSpec, policy_config_at
from mahalo_ray.training.policy_methods import plan_method
from mahalo_ray.training.settings import PolicySettings

STUDENTS = 60
LIST = "sweep.weights=[{accuracy: 0.9, engagement: 0.1}, {accuracy: 0.1, engagement: 0.9}]"
SURF = (LIST, "sweep.sampler=surf", "sweep.points=5", "sweep.rounds=2")


def example(*overrides: str) -> RunConfig:
    return load_config(EXAMPLE, list(overrides))


def spec_in(folder: Path) -> SweepSpec:
    return SweepSpec(
        *("", "", "", str(folder), DeviceConfig("cpu", "float32"), 1, EvaluationConfig()),
        *(tuple(range(STUDENTS)), "tutoring", ("accuracy", "engagement")),
    )


def play(spec: SweepSpec, method: Method, training: PolicyTraining | None = None) -> None:
    """What a trial leaves: a front that turns sharply near all weight on engagement, with noise."""
    assert method.weights is not None
    share = method.weights["accuracy"] ** 0.5
    noise = np.random.default_rng(0).normal(0, 0.02, (2, STUDENTS))
    result = MethodResult(
        name=method.name,
        kind=method.kind,
        weights=dict(method.weights),
        guidance=None if method.guidance is None else dict(method.guidance),
        num_candidates=method.num_candidates,
        student_ids=list(spec.seeds),
        values={"accuracy": (share + noise[0]).tolist(), "engagement": (1 - share**2 + noise[1]).tolist()},
        malformed_rate=0.0,
        tokens=100,
        sweep=True,
    )
    spec.write(method, Played(result, [], 1.0, training))


def search_of(config: RunConfig, spec: SweepSpec) -> MethodSearch:
    sources = [rounds_of(config, front) for front in sweep_fronts(config)]
    return MethodSearch(spec, sources, lambda done, total, name: None)


def run_trials(search: MethodSearch, at_most: int = 1000, failing: str = "never") -> list[str]:
    """Play what the search suggests, two trials at a time as Tune would; returns the methods played."""
    running: list[tuple[str, bool]] = []
    played: list[str] = []
    for number in itertools.count():
        suggestion = search.suggest(str(number)) if len(running) < 2 and len(played) < at_most else None
        if isinstance(suggestion, dict):
            method = Method.from_json(suggestion["method"])
            fails = failing in method.name
            if not fails:
                play(search.spec, method)
            running.append((str(number), fails))
            played.append(method.name)
        elif running:
            trial, fails = running.pop(0)
            search.on_trial_complete(trial, error=fails)
        else:
            assert suggestion == Searcher.FINISHED or len(played) == at_most
            return played
    raise AssertionError


def test_a_killed_sweep_plays_only_what_is_missing_and_ends_in_the_same_table(tmp_path: Path) -> None:
    config = example(*SURF)
    whole, halved = spec_in(tmp_path / "whole"), spec_in(tmp_path / "halved")
    search = search_of(config, whole)
    played = run_trials(search)
    table = sweep_table(config, search.swept())
    before = run_trials(search_of(config, halved), at_most=4)  # killed in the sampler's first round
    again = search_of(config, halved)
    after = run_trials(again)
    assert before + after == played and len(played) == len(set(played))
    url = str(tmp_path / "front.parquet")
    sweep_table(config, again.swept()).save(url)
    assert SweepTable.load(url).points == table.points
    assert search_of(config, halved).is_done  # and now nothing is left to play


def test_surf_knows_the_list_and_lies_more_evenly_than_it_began(tmp_path: Path) -> None:
    search = search_of(example(*SURF), spec_in(tmp_path))
    run_trials(search)
    table = sweep_table(example(*SURF), search.swept())
    assert [point.round for point in table.points[:2]] == [0, 0]
    assert {point.sampler for point in table.points} == {None, "surf"}
    last = np.array([[p.mean[o] for o in table.objectives] for p in table.points if p.last_round and p.mean])
    even = np.linalg.norm(np.diff(last[np.argsort(last[:, 0])], axis=0), axis=1)
    weights = np.linspace(0, 1, 5) ** 0.5
    uniform = np.linalg.norm(np.diff(np.stack([weights, 1 - weights**2], axis=1), axis=0), axis=1)
    assert even.std() / even.mean() < 0.7 * uniform.std() / uniform.mean()
    near = table.nearest(Weights.parse("accuracy=0.88,engagement=0.12"))
    assert abs(near.weights["accuracy"] - 0.88) < 0.2 and near.n == STUDENTS
    assert near.mean and near.low and near.high and near.standard_error
    assert near.low["accuracy"] < near.mean["accuracy"] < near.high["accuracy"]
    assert near.standard_error["accuracy"] == pytest.approx(0.02 / STUDENTS**0.5, rel=0.3)


def test_rounds_of_surface_add_up_to_its_points(tmp_path: Path) -> None:
    config = example(LIST, "sweep.sampler=surface", "sweep.points=9", "sweep.rounds=3")
    search = search_of(config, spec_in(tmp_path))
    run_trials(search)
    table = sweep_table(config, search.swept())
    sampled = [point for point in table.points if point.sampler == "surface"]
    assert len(sampled) == 9 and all(point.last_round for point in sampled)
    assert {point.round for point in sampled} == {1, 2, 3}


def test_a_failed_trial_is_left_out_and_a_round_without_results_ends_the_sweep(tmp_path: Path) -> None:
    config = example(*SURF)
    search = search_of(config, spec_in(tmp_path / "one"))
    run_trials(search, failing="surf 0 / 1")
    table = sweep_table(config, search.swept())
    assert table.failed == ["surf 0 / 1"]
    assert np.isnan(table.means()).any(axis=1).sum() == 1 and len(table.points) > 7
    search = search_of(config, spec_in(tmp_path / "all"))
    run_trials(search, failing="surf")
    assert isinstance(search.error, SweepError) and "0 of 5 trials" in str(search.error)


def test_fronts_are_crossed_with_guidance_and_candidates(tmp_path: Path) -> None:
    crossed = ("sweep.guidance=[{accuracy: 1}, {engagement: 1}]", "sweep.num_candidates=[1, 3]")
    config = example(*SURF, *crossed)
    names = [method.name for method in sweep_methods(config)]
    assert len(names) == len(set(names)) == 6  # two vectors; unguided once, guided by each objective
    assert "weights 0.9 / 0.1, guided 0 / 1, K 3" in names and "weights 0.9 / 0.1" in names
    search = search_of(config, spec_in(tmp_path))
    run_trials(search)
    points = sweep_table(config, search.swept()).points
    sampled = [point for point in points if point.sampler == "surf" and point.last_round]
    assert {str(point.guidance) for point in sampled} == {str(point.guidance) for point in points}
    assert {point.temperature for point in points} == {None}
    usual = config.evaluation.sampling.temperature
    warm = example(LIST, f"sweep.temperature=[{usual}, 0.5]", "sweep.strength=[1, 2]")
    fronts = [(m.strength, m.temperature) for m in sweep_methods(warm)[::2]]
    assert fronts == [(1, None), (1, 0.5), (2, None), (2, 0.5)]  # the evaluation's own is no other front
    methods = sweep_methods(warm)
    assert methods[0] == sweep_methods(example(LIST))[0] and "temperature" not in methods[0].as_json()
    assert methods[2].name == "weights 0.9 / 0.1, temperature 0.5"
    assert Method.from_json(methods[2].as_json()) == methods[2]
    search = search_of(warm, spec_in(tmp_path / "warm"))
    run_trials(search)
    url = str(tmp_path / "warm.parquet")
    sweep_table(warm, search.swept()).save(url)
    points = SweepTable.load(url).points
    assert list(dict.fromkeys((p.strength, p.temperature) for p in points)) == fronts
    varied = example("sweep={kind: guidance, weights: [{accuracy: 1}], num_candidates: [2, 4]}")
    methods = sweep_methods(varied)
    assert [method.num_candidates for method in methods] == [2, 4]
    assert {method.weights for method in methods} == {varied.guided.point[0]}
    assert {method.guidance for method in methods} == {Weights.one("accuracy")}


TRAINING = (
    "sweep={kind: training, sampler: surf, points: 5, rounds: 2}",
    "sweep.weights=[{accuracy: 0.9, engagement: 0.1}]",
)


def training_spec_in(folder: Path, config: RunConfig) -> TrainingSpec:
    run_policy = PolicySettings(
        model_url="sft",
        output_url="",
        model=config.model,
        seed=config.seed,
        pairs_url="pairs",
        objectives=config.objective_names,
        policy=config.policy,
    )
    shared = {field.name: getattr(spec_in(folder), field.name) for field in fields(SweepSpec)}
    return TrainingSpec(
        **{**shared, "policy_url": "policy"},
        run_policy=run_policy,
        policy_steps=60,
        cluster=config.cluster,
        start=config.sweep.start,
        share=config.sweep.training_share,
        at_once=config.sweep.concurrent_trainings,
    )


def train_trials(
    config: RunConfig, folder: Path, at_most: int = 1000, diverges: str = "never"
) -> tuple[TrainingSearch, list[str]]:
    """Run what the search suggests, as many trials at a time as it allows, the last one begun ending first;
    returns it and the names of the methods in the order in which they were begun."""
    spec = training_spec_in(folder, config)
    (front,) = sweep_fronts(config)
    search = TrainingSearch(spec, [rounds_of(config, front)], lambda done, total, name: None)
    running: list[tuple[str, Method]] = []
    begun: list[str] = []
    for number in itertools.count():
        free = len(running) < spec.at_once and len(begun) < at_most
        suggestion = search.suggest(str(number)) if free else None
        if isinstance(suggestion, dict):
            method, start = Method.from_json(suggestion["method"]), StartingPoint(**suggestion["start"])
            if diverges in method.name:
                storage.write_json(spec.failure_url(method), {"failure": "step 3: the loss is not finite"})
            else:
                steps = start.steps_from_sft + 10
                training = PolicyTraining(spec.model_path(method), start.name, 10, steps, 1.0)
                play(spec, method, training)
            running.append((str(number), method))
            begun.append(method.name)
        elif running:
            search.on_trial_complete(running.pop()[0])
        else:
            return search, begun
    raise AssertionError


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_killed_training_sweep_goes_on_from_the_same_policies(tmp_path: Path, at_once: int) -> None:
    config = example(*TRAINING, f"sweep.concurrent_trainings={at_once}")
    whole, begun = train_trials(config, tmp_path / "whole")
    _, before = train_trials(config, tmp_path / "halved", at_most=3)  # in the sampler's first round
    again, after = train_trials(config, tmp_path / "halved")
    tables = [sweep_table(config, search.swept()) for search in (whole, again)]
    assert before + after == begun and tables[0].points == tables[1].points
    points = {point.method: point for point in tables[0].points}
    assert begun[0] == "trained 0.9 / 0.1" and points[begun[0]].started_from == "policy"
    assert points[begun[0]].steps_from_sft == 70
    # Of the round from 0 to 1 the middle comes first, and its neighbours go on from it, the ends from these
    # (or from the listed vector, which is nearer to one of them).
    in_first_round = [name for name in begun if points[name].round == 1]
    assert points[in_first_round[0]].started_from == "policy"
    assert {points[name].weights["accuracy"] for name in in_first_round[-2:]} == {0.0, 1.0}
    assert points["trained surf 1 / 0"].started_from == "trained 0.9 / 0.1"
    assert points["trained surf 0 / 1"].started_from not in ("policy", "trained 0.9 / 0.1")
    url = str(tmp_path / "front.parquet")
    tables[0].save(url)
    assert SweepTable.load(url).points == tables[0].points


def test_a_training_that_diverges_is_left_out_and_not_tried_again(tmp_path: Path) -> None:
    config = example(*TRAINING, "sweep.start=policy")
    search, begun = train_trials(config, tmp_path, diverges="surf 0 / 1")
    failures = {one.method.name: one.failure for one in search.swept() if one.played is None}
    assert failures == {"trained surf 0 / 1": "step 3: the loss is not finite"}
    table = sweep_table(config, search.swept())
    assert table.failed == list(failures) and {p.started_from for p in table.played} == {"policy"}
    assert begun.count("trained surf 0 / 1") == 1
    again, begun = train_trials(config, tmp_path)
    assert begun == [] and sweep_table(config, again.swept()).points == table.points


def test_the_training_for_a_vector_weighs_the_losses_by_it() -> None:
    policy = PolicyConfig(
        beta={"accuracy": 0.1, "engagement": 0.3},
        alpha={"accuracy": 2},
        metrics_every_steps=5,
        training=TrainingConfig(batch_size=32, epochs=2, max_steps=40),
    )
    names = ("accuracy", "engagement")
    uneven = policy_config_at(policy, names, Weights({"accuracy": 3, "engagement": 1}), 0.25)
    assert uneven.alpha == {"accuracy": 3.0, "engagement": 0.5}  # its own 2 and 1, times 2 x (3/4, 1/4)
    assert (uneven.training.batch_size, uneven.training.epochs, uneven.training.max_steps) == (32, 0.5, 10)
    assert uneven.metrics_every_steps == 0
    corner = policy_config_at(policy, names, Weights.one("engagement"), 1.0)
    plan = plan_method(corner, names)
    assert plan.objectives == ("engagement",) and plan.heads == names and plan.head_of.tolist() == [1]
    assert corner.training.batch_size == 16  # every pair as often as in a training of both
    with pytest.raises(ValueError, match=r"'policy\.alpha' is 0 for every objective"):
        plan_method(PolicyConfig(alpha={"accuracy": 0, "engagement": 0}), names)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep={}"], "'sweep.weights' is missing: give it, or a 'sweep.sampler'"),
        (
            ["sweep={weights: [{accuracy: 1}], points: 5}"],
            "'points' is the sampler's, and no 'sampler' is given",
        ),
        (["sweep.sampler=serf"], "Did you mean 'surf'"),
        (["sweep.sampler=surf", "sweep.points=2"], "greater than or equal to 3"),
        (["sweep.sampler=surface", "sweep.rounds=1"], "'sampler: surface' needs 'rounds' of at least 2"),
        (["sweep.num_candidates=[4]"], "'num_candidates' above 1 needs 'guidance'"),
        (["sweep.kind=guidance", "sweep.num_candidates=[1]"], "one candidate leaves guidance nothing"),
        (["sweep.kind=guidance", "sweep.guidance=[{accuracy: 1}]"], "'kind: guidance' varies it"),
        (["sweep.start=sft"], "'start' is for 'kind: training', and the kind is 'decoding'"),
        (["sweep.kind=training", "sweep.strength=[2]"], "'strength' is not crossed with the vectors"),
        (["sweep.kind=training", "sweep.temperature=[0.5]"], "'temperature' is not crossed with the vectors"),
        (["sweep.guidance=[{speed: 1}]"], r"sweep\.guidance\[0\].*unknown objective 'speed'"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        example(*overrides)


def test_a_table_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no finished sweep"):
        SweepTable.of_run(str(tmp_path))
