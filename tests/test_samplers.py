"""Samplers through their protocol, and as searchers of Ray Tune."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from mahalo_ray.objectives import Weights
from mahalo_ray.sweeps import SAMPLERS, Sampler, SamplerSearcher, make_sampler
from mahalo_ray.sweeps.front_metrics import largest_empty_ball

MODULES = (".sampler", ".simplex", "", ".searcher", ".surf", ".surface", ".curve_walks")


def rows(weights: list[Weights], names: str) -> np.ndarray:
    return np.array([vector.over(tuple(names)) for vector in weights])


def circle(weights: list[Weights], names: str = "ab") -> np.ndarray:
    """The point of the unit sphere at which the weighted sum is largest."""
    vectors = rows(weights, names)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_keeps_the_protocol_and_can_be_told_again(name: str) -> None:
    first, second = (make_sampler(name, ["a", "b"], 7) for _ in range(2))
    assert isinstance(first, Sampler)
    assert first.objectives == ("a", "b")
    rounds = 0
    while not first.finished:
        asked = first.ask()
        assert first.ask() == asked
        assert second.ask() == asked
        first.tell(asked, circle(asked))
        second.tell(asked, circle(asked))
        rounds += 1
        assert rounds <= 600
    assert second.finished
    assert len(first.ask()) == 7
    assert first.notes == ()


@pytest.mark.parametrize("name", SAMPLERS)
def test_bad_input_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="2 objectives"):
        make_sampler(name, ["a"], 5)
    with pytest.raises(ValueError, match="n is 0"):
        make_sampler(name, ["a", "b"], 0)
    with pytest.raises(ValueError, match=f"'{name}': .*no_option"):
        make_sampler(name, ["a", "b"], 5, no_option=1)
    sampler = make_sampler(name, ["a", "b"], 5)
    asked = sampler.ask()
    with pytest.raises(ValueError, match=r"0 of .* trials have a result"):
        sampler.tell(asked, np.full((len(asked), 2), np.nan))
    with pytest.raises(ValueError, match="not on the simplex"):
        sampler.tell([{"a": 1.2, "b": -0.2}] * len(asked), circle(asked))  # type: ignore[list-item]
    with pytest.raises(ValueError, match="not finite"):
        sampler.tell(asked, np.full((len(asked), 2), np.inf))
    with pytest.raises(ValueError, match="unknown objective 'c'"):
        sampler.tell([Weights.one("c")] * len(asked), circle(asked))
    assert sampler.ask() == asked
    with pytest.raises(ValueError, match=r"unknown sampler 'latice'\. Did you mean 'lattice'"):
        make_sampler("latice", ["a", "b"], 5)


def test_failed_trials_and_equal_results_are_stated() -> None:
    sampler = make_sampler("lattice", ["a", "b"], 3)
    values = np.ones((3, 2))
    values[1] = np.nan
    sampler.tell(sampler.ask(), values)
    assert sampler.notes == (
        "1 of 3 trials failed and are left out: a=0.5,b=0.5",
        "all 2 results are equal: the front is one point, and the weights stay as asked",
    )


def test_chosen_beforehand() -> None:
    lattice = make_sampler("lattice", list("abc"), 12)
    assert rows(lattice.ask(), "abc").shape == (10, 3)
    assert lattice.notes == ("the largest lattice of at most 12 points has 10",)
    assert len({vector.label() for vector in lattice.ask()}) == 10
    for name in ("sobol", "dirichlet"):
        drawn = rows(make_sampler(name, list("abcd"), 4096, seed=3).ask(), "abcd")
        assert drawn.min() >= 0
        # uniform on the simplex: mean 1/k, second moment 2/(k (k + 1))
        assert drawn.mean(axis=0) == pytest.approx(np.full(4, 0.25), abs=0.01)
        assert np.square(drawn).mean(axis=0) == pytest.approx(np.full(4, 0.1), abs=0.01)
        again = rows(make_sampler(name, list("abcd"), 4096, seed=4).ask(), "abcd")
        assert not np.array_equal(drawn, again)
    with pytest.raises(ValueError, match="at least 3 points"):
        make_sampler("lattice", list("abc"), 2)


def cover(sampler: Sampler, concave: bool, noise: float = 0.0) -> float:
    """Run to the end on an eighth of the sphere; the radius of the largest empty ball of the chosen."""
    names = sampler.objectives
    draws = np.random.default_rng(5)

    def front(weights: list[Weights]) -> np.ndarray:
        vectors = np.array([vector.over(names) for vector in weights])
        directions = 1 / vectors if concave else vectors
        points = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        return -points if concave else points

    while not sampler.finished:
        asked = sampler.ask()
        values = front(asked)
        errors = np.full(values.shape, noise)
        sampler.tell(asked, values + draws.normal(size=values.shape) * noise, errors)
    dense = np.abs(draws.normal(size=(20_000, len(names))))
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    return largest_empty_ball(front(sampler.ask()), -dense if concave else dense)


def test_three_objectives_are_covered_better_than_by_a_lattice() -> None:
    weights = rows(make_sampler("lattice", list("abc"), 28).ask(), "abc")
    directions = 1 / np.maximum(weights, 1e-3)
    dense = np.abs(np.random.default_rng(5).normal(size=(20_000, 3)))
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    lattice = largest_empty_ball(directions / np.linalg.norm(directions, axis=1, keepdims=True), dense)
    filled = make_sampler("surface", list("abc"), 28, scalarisation="chebyshev")
    assert cover(filled, concave=True) < 0.72 * lattice
    assert len(filled.ask()) == 28
    noisy = make_sampler("surface", list("abc"), 28, scalarisation="chebyshev")
    assert cover(noisy, concave=True, noise=0.05) < 0.8 * lattice
    spaced = make_sampler("surface", list("abc"), 28, scalarisation="chebyshev", respacings=3)
    assert cover(spaced, concave=True) < 0.62 * lattice
    assert len(spaced.ask()) == 28
    # the convex front, whose lattice is nearly even already (0.221)
    assert cover(make_sampler("surface", list("abc"), 28, respacings=3), concave=False) < 0.2


@pytest.mark.parametrize(
    ("objectives", "n", "radius"), [(2, 12, 0.12), (3, 9, 0.45), (4, 14, 0.62), (4, 60, 0.4)]
)
def test_a_surface_may_be_a_curve_begin_with_corners_and_have_four_objectives(
    objectives: int, n: int, radius: float
) -> None:
    sampler = make_sampler("surface", list("abcd")[:objectives], n)
    assert cover(sampler, concave=False) < radius
    assert len(sampler.ask()) == n


def test_a_surface_knows_what_was_told_before_its_first_round() -> None:
    sampler = make_sampler("surface", list("abc"), 20)
    start = sampler.ask()
    before = [Weights.balanced("abc"), Weights.parse("a=0.2,b=0.2,c=0.6")]
    sampler.tell(before, circle(before, "abc"))
    assert sampler.ask() == start
    cover(sampler, concave=False)
    assert len(sampler.ask()) == 22


def test_a_surface_stops_at_gaps_noise_and_single_points() -> None:
    point = make_sampler("surface", list("abc"), 30)
    point.tell(point.ask(), np.ones((len(point.ask()), 3)))
    assert point.finished
    assert "the front is one point" in point.notes[0]
    corners = make_sampler("surface", list("abc"), 60, rounds=12)
    while not corners.finished:  # three policies and nothing between them
        asked = corners.ask()
        best = rows(asked, "abc").argmax(axis=1)
        corners.tell(asked, np.eye(3)[best])
    assert "new weights give points that are known" in corners.notes[-1]
    loud = make_sampler("surface", list("abc"), 60)
    cover(loud, concave=False, noise=0.8)
    assert "within the noise" in loud.notes[-1]
    assert len(loud.ask()) < 60


@pytest.mark.parametrize("name", ["root_finding", "arc_length"])
def test_walks_along_a_curve_end_with_equal_chords(name: str) -> None:
    sampler = make_sampler(name, ["a", "b"], 9)
    failed = 0
    while not sampler.finished:
        asked = sampler.ask()
        values = circle(asked)
        if len(asked) == 1 and failed < 3 and sampler.evaluations % 2:  # type: ignore[attr-defined]
            values[:] = np.nan
            failed += 1
        sampler.tell(asked, values)
    assert failed == 3
    assert "3 of" in sampler.notes[0]
    chords = np.linalg.norm(np.diff(circle(sampler.ask()), axis=0), axis=1)
    assert chords.std() / chords.mean() < 0.01
    stuck = make_sampler(name, ["a", "b"], 9)
    stuck.tell(stuck.ask(), circle(stuck.ask()))
    with pytest.raises(ValueError, match="weights that it asked for"):
        stuck.tell([Weights.one("a")], [[1, 0]])
    for _ in range(2):
        stuck.tell(stuck.ask(), np.full((1, 2), np.nan))
    with pytest.raises(ValueError, match="0 of 1 trials"):
        stuck.tell(stuck.ask(), np.full((1, 2), np.nan))


def play(searcher: SamplerSearcher, steps: int | None = None) -> None:
    """Answer the searcher's suggestions, the newest trial of a round first."""
    running: list[tuple[str, dict[str, float]]] = []
    count = len(searcher.table())
    while steps is None or len(searcher.table()) < count + steps:
        suggested = searcher.suggest(f"trial-{len(searcher.table())}-{len(running)}")
        if suggested == "FINISHED":
            return
        if suggested is not None:
            running.append((f"trial-{len(searcher.table())}-{len(running)}", suggested["weights"]))
            continue
        trial, weights = running.pop()
        searcher.on_trial_complete(trial, {**reached(weights), "standard_error/a": 0.0})


def reached(weights: Mapping[str, float]) -> dict[str, float]:
    """As the trials of programs/swept_run.py, to the last digit."""
    length = float(np.hypot(weights["a"], weights["b"]))
    return {name: weight / length for name, weight in weights.items()}


def test_a_searcher_continues_from_its_file_and_ends_with_the_same_table(tmp_path: Path) -> None:
    whole = SamplerSearcher(make_sampler("surf", ["a", "b"], 6))
    play(whole)
    assert whole.sampler.finished
    broken = SamplerSearcher(make_sampler("surf", ["a", "b"], 6))
    play(broken, steps=9)
    broken.save(str(tmp_path / "state"))
    resumed = SamplerSearcher(make_sampler("surf", ["a", "b"], 6))
    resumed.restore(str(tmp_path / "state"))
    assert resumed.table() == broken.table()
    for trial in list(resumed._trials):  # Tune runs interrupted trials again, under the ids that they had
        weights = resumed._asked[resumed._trials[trial]]
        resumed.on_trial_complete(trial, reached(weights))
    play(resumed)
    assert resumed.table() == whole.table()
    whole_state = (tmp_path / "state").read_text()
    (tmp_path / "state").write_text(whole_state[: len(whole_state) - 30])  # cut off while it was copied
    shortened = SamplerSearcher(make_sampler("surf", ["a", "b"], 6))
    shortened.restore(str(tmp_path / "state"))
    play(shortened)
    assert shortened.table() == whole.table()
    (tmp_path / "other").write_text("[]\n")
    with pytest.raises(ValueError, match="other' is no state of a search over a, b"):
        resumed.restore(str(tmp_path / "other"))


@pytest.mark.slow
def test_a_killed_driver_of_tune_ends_with_the_table_of_an_unbroken_run(tmp_path: Path) -> None:
    program = Path(__file__).parent / "programs" / "swept_run.py"
    context = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        command = [sys.executable, str(program), context.address_info["gcs_address"], str(tmp_path)]
        environment = {**os.environ, "TUNE_GLOBAL_CHECKPOINT_S": "2"}
        driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        try:
            while not told(tmp_path) or not at_rest(driver, tmp_path / "search"):
                assert driver.poll() is None, "the driver ended by itself"
                time.sleep(0.1)
            assert len(told(tmp_path)) >= 4, "the first round has 4 results"
        finally:
            driver.kill()
            driver.wait()
        (tmp_path / "go").touch()
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    finally:
        ray.shutdown()
    unbroken = SamplerSearcher(make_sampler("surf", ["a", "b"], 4, max_rounds=3))
    play(unbroken)
    expected = {str(row["weights"]): row["values"] for row in unbroken.table()}
    assert json.loads((tmp_path / "results.json").read_text()) == expected
    evaluated = (tmp_path / "evaluated").read_text().splitlines()
    # The first round was not played again; of the second, what was running at the kill.
    assert len(set(evaluated[:4])) == 4
    assert not set(evaluated[:4]) & set(evaluated[4:])


def at_rest(driver: subprocess.Popen[bytes], folder: Path) -> bool:
    """Stop the driver; whether it was not copying its state, in which case it stays stopped."""
    driver.send_signal(signal.SIGSTOP)
    if time.time() - max(path.stat().st_mtime for path in folder.iterdir()) > 0.5:
        return True
    driver.send_signal(signal.SIGCONT)
    return False


def told(folder: Path) -> list[dict[str, Any]]:
    """The table in the newest state that Tune saved, once a round was told."""
    searcher = SamplerSearcher(make_sampler("surf", ["a", "b"], 4, max_rounds=3))
    try:
        searcher.restore_from_dir(str(folder / "search"))
    except RuntimeError:
        return []  # no state is saved yet
    return searcher.table() if searcher.sampler.rounds else []  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_in_the_middle_of_its_search_can_be_pickled(name: str) -> None:
    sampler = make_sampler(name, ["a", "b"], 7)
    asked = sampler.ask()
    sampler.tell(asked, circle(asked))
    copy = pickle.loads(pickle.dumps(sampler))  # noqa: S301  # its own
    assert copy.ask() == sampler.ask()
    assert copy.finished == sampler.finished


@pytest.mark.parametrize("module", MODULES)
def test_the_docstring_examples_run(module: str) -> None:
    results = doctest.testmod(importlib.import_module(f"mahalo_ray.sweeps{module}"))
    assert not results.failed
