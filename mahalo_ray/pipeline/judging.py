"""Judges as a configuration means them, and calibrations that belong to exactly one judge."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mahalo_ray.config import (
    DEFAULT_THRESHOLD,
    CalibrationConfig,
    CheckerJudgeConfig,
    ConfigError,
    EndpointJudgeConfig,
    JudgeConfig,
    LabelConfig,
    ModelJudgeConfig,
    ProgramJudgeConfig,
    RubricJudgeConfig,
)
from mahalo_ray.data import storage
from mahalo_ray.data.records import StepTrace
from mahalo_ray.data.row_files import QUARANTINE
from mahalo_ray.data.rows import quarantine
from mahalo_ray.data.step_readers import ReadTraces, read_traces
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.domains.verdicts import Judged, Score, Unjudged, load_function, rubric_template
from mahalo_ray.errors import StageError
from mahalo_ray.evaluation.agreement import measure_agreement
from mahalo_ray.evaluation.statistics import Bootstrap
from mahalo_ray.pipeline.outputs import check_output, sign_output
from mahalo_ray.rollouts.judges import JudgeSpec
from mahalo_ray.rollouts.step_labels import joined


def judge_spec(name: str, config: JudgeConfig) -> JudgeSpec:
    """The judge of objective `name` with its rubric read and its threshold settled; ConfigError if the
    rubric cannot be used or the calibration is another judge's."""
    rubric = read_rubric(f"judges.{name}.rubric", config) if isinstance(config, EndpointJudgeConfig) else ""
    if isinstance(config, CheckerJudgeConfig):
        return JudgeSpec(config, DEFAULT_THRESHOLD, calibrated=True)
    if isinstance(config, ProgramJudgeConfig):
        load_function(config.function)  # said now, not by every actor
    if config.calibration is not None:
        threshold = _calibrated_threshold(name, config, config.calibration)
        return JudgeSpec(config, threshold, calibrated=True, rubric=rubric)
    threshold = DEFAULT_THRESHOLD if config.threshold is None else config.threshold
    return JudgeSpec(config, threshold, calibrated=False, rubric=rubric)


def judge_identity(spec: JudgeSpec) -> dict[str, Any]:
    """What makes two judges the same: all that its scores depend on, and nothing else."""
    config = spec.config
    kept = config.model_dump(mode="json", exclude={"threshold", "calibration", "batch_size"})
    if isinstance(config, EndpointJudgeConfig):
        del kept["parse_retries"]
        kept["endpoint"] = config.endpoint.model
        kept["rubric"] = hashlib.sha256(spec.rubric.encode()).hexdigest()
    if isinstance(config, ModelJudgeConfig) and storage.exists(config.path):
        files = "\n".join(storage.fingerprint(file) for file in storage.list_files(config.path))
        kept["path"] = hashlib.sha256(files.encode()).hexdigest()
    return kept


def read_rubric(where: str, config: RubricJudgeConfig) -> str:
    """The text of a judge's rubric; ConfigError, which names the key `where`, if it cannot be used."""
    if not storage.exists(config.rubric):
        raise ConfigError(f"'{where}': there is no file '{config.rubric}'")
    text = storage.read_bytes(config.rubric).decode()
    try:
        rubric_template(text)
    except ValueError as error:
        raise ConfigError(f"'{where}': {config.rubric}: {error}") from error
    return text


def _calibrated_threshold(name: str, config: Any, url: str) -> float:
    if not storage.exists(url):
        raise ConfigError(
            f"'judges.{name}.calibration': there is no file '{url}'; `mahalo calibrate` writes it"
        )
    stored = storage.read_json(url)
    rubric = read_rubric(f"judges.{name}.rubric", config) if isinstance(config, EndpointJudgeConfig) else ""
    mine = judge_identity(JudgeSpec(config, DEFAULT_THRESHOLD, calibrated=False, rubric=rubric))
    theirs = stored["judge"]
    differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
    if differing:
        raise ConfigError(
            f"'judges.{name}.calibration': '{url}' was made for another judge, its {', '.join(differing)} "
            f"{'differs' if len(differing) == 1 else 'differ'}: run `mahalo calibrate` for this one"
        )
    if stored["objective"] != name:
        raise ConfigError(
            f"'judges.{name}.calibration': '{url}' was made for objective '{stored['objective']}'"
        )
    return float(stored["threshold"])


CALIBRATION = "calibration.json"


def calibrate_judge(config: LabelConfig) -> tuple[str, dict[str, Any]]:
    """Score all human ratings, fit and cross-validate the threshold; where it was written, and what.

    ConfigError without `calibration`, or for a judge that needs none; ValueError for ratings that cannot
    settle a threshold; StageError if too many of them get no score.
    """
    settings = config.calibration
    if settings is None:
        raise ConfigError("'calibration' is missing: say where the human ratings are")
    judge = config.judges[settings.objective]
    if isinstance(judge, CheckerJudgeConfig):
        raise ConfigError(f"the judge of '{settings.objective}' is a checker: it needs no calibration")
    check_output(config.output)
    sign_output(config.output)
    spec = judge_spec(settings.objective, judge.model_copy(update={"calibration": None}))
    rated, account = _rated(config, settings)
    scores, asked = _scores(config, spec, rated.items)
    kept = [at for at, score in enumerate(scores) if not isinstance(score, Unjudged)]
    agreement = measure_agreement(
        np.array([scores[at] for at in kept], dtype=np.float64),
        np.array([rated.ratings[at] >= settings.positive_from for at in kept]),
        [rated.groups[at] for at in kept],
        settings.folds,
        Bootstrap(settings.bootstrap_resamples, settings.confidence, config.seed),
    )
    figures = {name: getattr(agreement, name) for name in ("accuracy", "kappa", "auc")}
    found = {
        "objective": settings.objective,
        "judge": judge_identity(spec),
        "threshold": agreement.threshold,
        "positive_from": settings.positive_from,
        "label_range": list(settings.label_range),
        "ratings": agreement.n,
        "positive": agreement.positive,
        "dialogues": agreement.groups,
        "unjudged": len(scores) - len(kept),
        "method": f"{settings.folds}-fold cross-validation, dialogues kept together; percentile bootstrap "
        f"over dialogues, {settings.bootstrap_resamples} resamples, confidence {settings.confidence:g}",
        "agreement": {name: None if f is None else f.as_json() for name, f in figures.items()},
        "endpoint": asked,
        "data": account,
    }
    url = storage.join(storage.absolute(config.output), CALIBRATION)
    storage.write_json(url, found)
    return url, found


class _Rated(NamedTuple):
    """Responses that people rated: each with its rating in 0..1 and what is not independent of it."""

    items: list[Judged]
    ratings: list[float]
    groups: list[str]


def _rated(config: LabelConfig, settings: CalibrationConfig) -> tuple[_Rated, dict[str, Any]]:
    """What people rated, and the account of the rows."""
    name, rated = settings.objective, _Rated([], [], [])

    def take(trace: StepTrace) -> None:
        if trace.outcome is not None and name in trace.outcome:
            response = joined(trace.steps, config.step_separator).strip()
            rated.items.append(Judged(tuple(trace.prompt), tuple(trace.steps), trace.answer, response))
            rated.ratings.append(trace.outcome[name])
            rated.groups.append(trace.dialogue or trace.group)

    read = ReadTraces(take=take)
    source, scale = settings.ratings, settings.label_range
    read_traces(source, settings.format, [name], name, None, "ratings", read, label_range=scale)
    url, share = storage.join(config.output, QUARANTINE), settings.max_bad_fraction
    quarantine(read.bad, read.seen, share, url, "calibration.max_bad_fraction", "traces")
    return rated, read.report.as_json()


def _scores(
    config: LabelConfig, spec: JudgeSpec, items: Sequence[Judged]
) -> tuple[list[Score], dict[str, Any]]:
    """The judge's score of every rated response, and what it was asked."""
    judge = spec.open(DeviceConfig.of(config.cluster, config.dtype), 1, config.seed)
    try:
        scores, asked = judge.score(items), judge.counts()
    finally:
        judge.close()
    without = [score for score in scores if isinstance(score, Unjudged)]
    if len(without) > config.max_unjudged_fraction * len(scores):
        raise StageError(
            f"{len(without)} of {len(scores)} ratings got no score, more than the allowed share of "
            f"{config.max_unjudged_fraction:g}. The last reason: {without[-1].reason}"
        )
    return scores, asked
