"""Judges as a configuration means them, and calibrations that belong to exactly one judge."""

from __future__ import annotations

import hashlib
from typing import Any

from mahalo_ray.config import ConfigError
from mahalo_ray.config.label import (
    DEFAULT_THRESHOLD,
    CheckerJudgeConfig,
    EndpointJudgeConfig,
    JudgeConfig,
    ModelJudgeConfig,
    ProgramJudgeConfig,
)
from mahalo_ray.data import storage
from mahalo_ray.rollouts.judges import JudgeSpec, load_function, rubric_template


def judge_spec(name: str, config: JudgeConfig) -> JudgeSpec:
    """The judge of objective `name` with its rubric read and its threshold settled; ConfigError if the
    rubric cannot be used or the calibration is another judge's."""
    rubric = _rubric(name, config) if isinstance(config, EndpointJudgeConfig) else ""
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


def _rubric(name: str, config: EndpointJudgeConfig) -> str:
    if not storage.exists(config.rubric):
        raise ConfigError(f"'judges.{name}.rubric': there is no file '{config.rubric}'")
    text = storage.read_bytes(config.rubric).decode()
    try:
        rubric_template(text)
    except ValueError as error:
        raise ConfigError(f"'judges.{name}.rubric': {config.rubric}: {error}") from error
    return text


def _calibrated_threshold(name: str, config: Any, url: str) -> float:
    if not storage.exists(url):
        raise ConfigError(
            f"'judges.{name}.calibration': there is no file '{url}'; `mahalo calibrate` writes it"
        )
    stored = storage.read_json(url)
    rubric = _rubric(name, config) if isinstance(config, EndpointJudgeConfig) else ""
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
