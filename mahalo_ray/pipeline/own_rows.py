"""Reading own preference pairs and step traces: the first stages of a run on own data."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mahalo_ray.config import PairsSource, RunConfig
from mahalo_ray.data import storage
from mahalo_ray.data.quarantine import QUARANTINE, quarantine
from mahalo_ray.data.readers import ReadPairs, read_pairs
from mahalo_ray.data.records import PreferencePair, StepTrace
from mahalo_ray.data.row_files import data_files
from mahalo_ray.data.step_readers import ReadTraces, read_traces
from mahalo_ray.domains.human_values import read_truthfulqa
from mahalo_ray.models.backbone import load_tokenizer
from mahalo_ray.models.traces import StepEncoder
from mahalo_ray.pipeline.stages import Context, StageResult
from mahalo_ray.training.batches import held_out
from mahalo_ray.training.pairs import split_key
from mahalo_ray.training.sources import model_folder
from mahalo_ray.training.traces import refuse_long

R = TypeVar("R", PreferencePair, StepTrace)


def pairs(context: Context) -> StageResult:
    """Read the pairs of all sources; what cannot be used goes to quarantine.parquet."""
    config = context.config
    assert config.data is not None
    context.progress.start(len(config.data.pairs), "sources")
    found, kept = ReadPairs(), list[PreferencePair]()
    for number, source in enumerate(config.data.pairs):
        before = len(found.pairs)
        _read_source(source, config.objective_names, str(number), found)
        own = found.pairs[before:]
        kept += _sampled(own, [split_key(pair) for pair in own], source.sample, config.seed)
        context.progress.advance()
    quarantine(found.bad, found.rows, config.data.max_bad_fraction, context.path(QUARANTINE))
    names = [objective.name for objective in config.objectives if objective.supervision == "pairwise"]
    counts = {name: sum(p.objective == name for p in kept) for name in names}
    for name, count in counts.items():
        if count == 0:
            others = ", ".join(found.left_out) or "none"
            raise ValueError(
                f"'data.pairs' holds no pairs of objective '{name}' (objectives of rows left out: {others})"
            )
    PreferencePair.save(kept, context.path("pairs", "part-000000.parquet"))
    return StageResult(
        {"rows": found.rows, "bad_rows": len(found.bad), "pairs": counts, "left_out": found.left_out},
        {"pairs": "pairs", "quarantine": QUARANTINE},
    )


def traces(context: Context) -> StageResult:
    """Read the step traces of all sources; what cannot be used goes to quarantine.parquet."""
    config = context.config
    assert config.data is not None
    context.progress.start(len(config.data.traces), "sources")
    found, kept = ReadTraces(), list[StepTrace]()
    assert config.model.base is not None
    tokenizer = load_tokenizer(model_folder(config.model.base))
    encoder = StepEncoder(tokenizer, config.data.step_separator)
    for number, source in enumerate(config.data.traces):
        before = len(found.traces)
        read_traces(
            source.path,
            source.format,
            config.objective_names,
            source.objective,
            source.objective_field,
            str(number),
            found,
            label_range=source.label_range,
            outcome_labels=source.outcome_labels,
            gamma=source.gamma,
        )
        refuse_long(found, before, encoder, config.model.max_length)
        own = found.traces[before:]
        kept += _sampled(own, [trace.group for trace in own], source.sample, config.seed)
        context.progress.advance()
    quarantine(found.bad, found.seen, config.data.max_bad_fraction, context.path(QUARANTINE))
    counts = {
        objective.name: sum(labelled(trace, objective.name) for trace in kept)
        for objective in config.objectives
        if objective.supervision != "pairwise"
    }
    for name, count in counts.items():
        if count == 0:
            raise ValueError(f"'data.traces' holds no step with a label of objective '{name}'")
    StepTrace.save(kept, context.path("traces", "part-000000.parquet"))
    metrics = {"rows": found.rows, "bad_rows": len(found.bad), "traces": len(kept), "labelled": counts}
    return StageResult(metrics, {"traces": "traces", "quarantine": QUARANTINE})


def _read_source(source: PairsSource, objectives: Sequence[str], name: str, into: ReadPairs) -> None:
    if source.format == "truthfulqa":
        assert source.objective is not None
        read_truthfulqa(source.path, source.objective, 1, into)
        return
    read_pairs(source.path, source.format, objectives, source.objective, source.objective_field, name, into)


def _sampled(rows: Sequence[R], keys: Sequence[str], share: float, seed: int) -> list[R]:
    """The rows of a share of the keys: the draw that holds rows out, with another seed."""
    drawn = held_out(keys, share, seed + 1)
    return [row for row, chosen in zip(rows, drawn, strict=True) if chosen]


def labelled(trace: StepTrace, objective: str) -> bool:
    """Whether any step has a label of the objective."""
    return any(label is not None for label in trace.labels.get(objective, []))


def source_settings(kind: str) -> Callable[[RunConfig], dict[str, Any]]:
    """Sources of one kind, and what their files hold now."""

    def settings(config: RunConfig) -> dict[str, Any]:
        assert config.data is not None
        sources = config.data.pairs if kind == "pairs" else config.data.traces
        files = [file for source in sources for file in data_files(source.path)]
        return {
            "data": [source.model_dump(mode="json") for source in sources],
            "max_bad_fraction": config.data.max_bad_fraction,
            "objectives": [objective.model_dump(mode="json") for objective in config.objectives],
            "files": [storage.fingerprint(file) for file in files],
        }

    return settings


def traces_settings(config: RunConfig) -> dict[str, Any]:
    """The model counts too: what is too long for it is refused."""
    assert config.data is not None
    separator = {"step_separator": config.data.step_separator}
    return {**source_settings("traces")(config), **separator, **model_settings(config)}


def model_settings(config: RunConfig) -> dict[str, Any]:
    """The base model, and what its files hold now."""
    base = config.model.base
    assert base is not None
    files = storage.list_files(base) if storage.exists(base) else []
    return {
        "model": config.model.model_dump(mode="json"),
        "base": {posixpath.basename(file): storage.fingerprint(file) for file in files},
    }
