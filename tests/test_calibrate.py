"""Judges calibrated on human ratings: threshold, agreement with intervals, and whose calibration it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from local_endpoint import LocalEndpoint, Received, Scripted, says
from typer.testing import CliRunner

from mahalo_ray.cli import app
from mahalo_ray.config import ConfigError, LabelConfig
from mahalo_ray.data.records import StepTrace
from mahalo_ray.errors import StageError
from mahalo_ray.evaluation.agreement import cohens_kappa, fit_threshold, fold_of, measure_agreement
from mahalo_ray.evaluation.statistics import Bootstrap
from mahalo_ray.pipeline.judging import calibrate_judge, judge_spec

sys.path.insert(0, str(Path(__file__).parent / "programs"))
HOW = Bootstrap(resamples=200)


def test_kappa_and_threshold_by_hand() -> None:
    # Observed agreement 3/4; chance 1/2 * 1/4 + 1/2 * 3/4 = 1/2.
    assert cohens_kappa(np.array([1.0, 1, 0, 0]), np.array([1.0, 0, 0, 0])) == pytest.approx(0.5)
    assert np.isnan(cohens_kappa(np.ones(3), np.ones(3)))
    assert fit_threshold(np.array([0.1, 0.4, 0.6, 0.9]), np.array([0, 0, 1, 1], bool)) == pytest.approx(0.5)
    # Mostly positive: calling all of them positive would be 80 % accurate and useless.
    scores, positive = np.arange(10.0), np.array([0, 0, 1, 1, 1, 1, 1, 1, 1, 1], bool)
    assert fit_threshold(scores, positive) == pytest.approx(1.5)


def test_dialogues_stay_in_one_fold() -> None:
    groups = [f"d{n // 3}" for n in range(30)]
    fold = fold_of(groups, 5)
    assert set(fold.tolist()) == set(range(5))
    assert all(len({fold[n] for n in range(30) if groups[n] == g}) == 1 for g in set(groups))


def test_agreement_is_measured_on_ratings_the_threshold_has_not_seen() -> None:
    generator = np.random.default_rng(0)
    positive = generator.random(200) < 0.4
    groups = [f"d{n}" for n in range(200)]
    good = measure_agreement(positive + generator.normal(0, 0.5, 200), positive, groups, 5, HOW)
    assert good.accuracy is not None and good.kappa is not None and good.auc is not None
    assert good.accuracy.low > 0.7 and good.kappa.low > 0.4 and good.auc.low > 0.85
    assert 0.2 < good.threshold < 0.8
    assert (good.n, good.positive, good.groups) == (200, int(positive.sum()), 200)
    noise = measure_agreement(generator.normal(size=200), positive, groups, 5, HOW)
    assert noise.kappa is not None and noise.kappa.low < 0 < noise.kappa.high
    assert noise.auc is not None and noise.auc.low < 0.5 < noise.auc.high


def test_ratings_that_settle_nothing_are_said() -> None:
    with pytest.raises(ValueError, match="all 3 ratings are positive"):
        measure_agreement(np.arange(3.0), np.ones(3, bool), ["a", "b", "c"], 2, HOW)
    with pytest.raises(ValueError, match="2 dialogues cannot be split into 5 folds"):
        measure_agreement(np.arange(3.0), np.array([0, 1, 1], bool), ["a", "b", "b"], 5, HOW)


def ratings(folder: Path) -> Path:
    """Forty rated replies: people like replies with many an e, mostly."""
    rows = []
    for n in range(40):
        reply = "e" * (n % 20) + "x" * (20 - n % 20)
        rating = (5 if n % 20 >= 8 else 2) if n % 10 else 2
        rows.append({"prompt": f"{n}?", "response": reply, "rating": rating})
    (folder / "ratings.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "ratings.jsonl"


def document(folder: Path, judge: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "name": "job",
        "output": str(folder / "out"),
        "domain": "tutoring",
        "objectives": [{"name": "kind", "supervision": "judged_prefix"}],
        "judges": {"kind": judge},
        "calibration": {
            "objective": "kind",
            "ratings": str(ratings(folder)),
            "label_range": [0, 6],
            "positive_from": 0.6,
            "bootstrap_resamples": 100,
        },
        **changes,
    }


PROGRAM = {"kind": "program", "function": "label_judges:share_of_es"}


def test_the_command_calibrates_and_labels_take_it(tmp_path: Path) -> None:
    config = tmp_path / "label.yaml"
    config.write_text(yaml.safe_dump(document(tmp_path, PROGRAM)))
    result = CliRunner().invoke(app, ["calibrate", str(config)])
    assert result.exit_code == 0, result.output
    assert "from 40 ratings (22 positive)" in result.output and "5-fold cross-validation" in result.output
    url = tmp_path / "out" / "calibration.json"
    found = json.loads(url.read_text())
    assert found["threshold"] == pytest.approx(7.5 / 20)
    assert found["agreement"]["kappa"]["low"] > 0.5 and found["agreement"]["auc"]["n"] == 40
    loaded = LabelConfig.model_validate(document(tmp_path, {**PROGRAM, "calibration": str(url)}))
    spec = judge_spec("kind", loaded.judges["kind"])
    assert (spec.calibrated, spec.threshold) == (True, found["threshold"])
    assert spec.label == "program judge, calibrated"
    other = {**PROGRAM, "function": "label_judges:never", "calibration": str(url)}
    with pytest.raises(ConfigError, match="made for another judge, its function differs"):
        judge_spec("kind", LabelConfig.model_validate(document(tmp_path, other)).judges["kind"])
    with pytest.raises(ConfigError, match="made for objective 'kind'"):
        judge_spec("clear", loaded.judges["kind"])
    uncalibrated = LabelConfig.model_validate(document(tmp_path, PROGRAM)).judges["kind"]
    assert judge_spec("kind", uncalibrated).label == "program judge, UNCALIBRATED"


def test_a_calibration_belongs_to_its_rubric_and_model(tmp_path: Path) -> None:
    rubric = tmp_path / "rubric.txt"
    rubric.write_text("{{ response }}")

    def script(received: Received) -> Scripted:
        return says(f"Score: {received.content.count('e') / 20}")

    with LocalEndpoint(script) as server:
        judge = {"kind": "endpoint", "endpoint": server.config().model_dump(), "rubric": str(rubric)}
        url, found = calibrate_judge(LabelConfig.model_validate(document(tmp_path, judge)))
    assert found["endpoint"]["requests"] == 40 and found["threshold"] == pytest.approx(7.5 / 20)
    there = {**judge, "calibration": url}
    config = LabelConfig.model_validate(document(tmp_path, there))
    assert judge_spec("kind", config.judges["kind"]).calibrated
    moved = {**there, "endpoint": {**judge["endpoint"], "base_url": "https://elsewhere/v1"}}  # type: ignore[dict-item]
    assert judge_spec("kind", LabelConfig.model_validate(document(tmp_path, moved)).judges["kind"]).calibrated
    larger = {**there, "endpoint": {**judge["endpoint"], "model": "larger"}}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="its endpoint differs"):
        judge_spec("kind", LabelConfig.model_validate(document(tmp_path, larger)).judges["kind"])
    rubric.write_text("Is this good? {{ response }}")
    with pytest.raises(ConfigError, match="its rubric differs"):
        judge_spec("kind", config.judges["kind"])


def test_too_many_ratings_without_a_score(tmp_path: Path) -> None:
    judge = {**PROGRAM, "function": "label_judges:nothing"}
    with pytest.raises(StageError, match=r"40 of 40 ratings got no score(.|\n)*returned None"):
        calibrate_judge(LabelConfig.model_validate(document(tmp_path, judge)))


def test_what_cannot_be_calibrated_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'calibration' is missing"):
        calibrate_judge(LabelConfig.model_validate(document(tmp_path, PROGRAM, calibration=None)))
    checked = document(
        tmp_path,
        {"kind": "checker"},
        domain="math",
        objectives=[{"name": "kind", "supervision": "rollout_value"}],
        continuations={"policy": "p"},
    )
    with pytest.raises(ConfigError, match="is a checker: it needs no calibration"):
        calibrate_judge(LabelConfig.model_validate(checked))


def test_ratings_are_read_as_traces(tmp_path: Path) -> None:
    """What the readers make of a rated reply is what the judge sees."""
    from mahalo_ray.data.step_readers import ReadTraces, read_traces

    found = ReadTraces()
    read_traces(str(ratings(tmp_path)), "rated", ["kind"], "kind", None, "r", found, label_range=(0, 6))
    first: StepTrace = found.traces[0]
    assert (first.prompt[0].content, first.steps, first.outcome) == ("0?", ["x" * 20], {"kind": 2 / 6})
