"""The stages of a run on own preference pairs: read them, then train the policy. No rollouts, no domain."""

from __future__ import annotations

import posixpath
from typing import Any

from mahalo_ray.config import RunConfig
from mahalo_ray.data import storage
from mahalo_ray.data.quarantine import QUARANTINE, quarantine
from mahalo_ray.data.readers import ReadPairs, read_pairs
from mahalo_ray.data.records import PreferencePair
from mahalo_ray.data.row_files import data_files
from mahalo_ray.models.folder import local_folder
from mahalo_ray.pipeline.corpus import START_MODEL
from mahalo_ray.pipeline.heads import train_heads
from mahalo_ray.pipeline.stages import Context, Pipeline, Stage, StageResult
from mahalo_ray.training.launch import file_fingerprint


def pairs(context: Context) -> StageResult:
    """Read the pairs of all sources; what cannot be used goes to quarantine.parquet."""
    config = context.config
    assert config.data is not None
    context.progress.start(len(config.data.pairs), "sources")
    found = ReadPairs()
    for number, source in enumerate(config.data.pairs):
        read_pairs(
            source.path,
            source.format,
            config.objective_names,
            source.objective,
            source.objective_field,
            str(number),
            found,
        )
        context.progress.advance()
    quarantine(found.bad, found.rows, config.data.max_bad_fraction, context.path(QUARANTINE))
    counts = {name: sum(p.objective == name for p in found.pairs) for name in config.objective_names}
    for name, count in counts.items():
        if count == 0:
            others = ", ".join(found.left_out) or "none"
            raise ValueError(
                f"'data.pairs' holds no pairs of objective '{name}' (objectives of rows left out: {others})"
            )
    PreferencePair.save(found.pairs, context.path("pairs", "part-000000.parquet"))
    return StageResult(
        {"rows": found.rows, "bad_rows": len(found.bad), "pairs": counts, "left_out": found.left_out},
        {"pairs": "pairs", "quarantine": QUARANTINE},
    )


def policy(context: Context) -> StageResult:
    """MAH-DPO from the base model."""
    return train_heads(context, _base_url(context))


def _base_url(context: Context) -> str:
    """The base where it lies; one from a hub is put where every node can reach it."""
    base = context.config.model.base
    assert base is not None
    if storage.exists(base):
        return storage.absolute(base)
    url = context.path(START_MODEL)
    if not storage.exists(url):
        storage.upload_folder(local_folder(base), url)
    return url


def _pairs_settings(config: RunConfig) -> dict[str, Any]:
    """Sources, and what their files hold now."""
    assert config.data is not None
    files = [file for source in config.data.pairs for file in data_files(source.path)]
    return {
        "data": config.data.model_dump(mode="json"),
        "objectives": list(config.objective_names),
        "files": [file_fingerprint(file) for file in files],
    }


def _policy_settings(config: RunConfig) -> dict[str, Any]:
    base = config.model.base
    assert base is not None
    files = storage.list_files(base) if storage.exists(base) else []
    return {
        "policy": config.policy.model_dump(mode="json"),
        "model": config.model.model_dump(mode="json"),
        "held_out_fraction": config.pairs.held_out_fraction,
        "base": {posixpath.basename(file): file_fingerprint(file) for file in files},
    }


PIPELINE = Pipeline(
    [
        Stage("pairs", "Read preference pairs", pairs, _pairs_settings, uses_ray=False),
        Stage(
            "policy",
            "Train the multi-head policy",
            policy,
            _policy_settings,
            needs=("pairs",),
            resumes=True,
        ),
    ]
)
