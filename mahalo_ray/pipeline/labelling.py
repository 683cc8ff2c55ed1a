"""`mahalo label`: read traces and prompts, label them on actors, say what it came to. Run again, it goes on
where it stopped."""

from __future__ import annotations

import math
from array import array
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from mahalo_ray.config import ConfigError, EndpointJudgeConfig, LabelConfig
from mahalo_ray.data import storage
from mahalo_ray.data.prompts import PromptRow, ReadPrompts, read_prompts
from mahalo_ray.data.records import RecordTable, StepTrace
from mahalo_ray.data.row_fields import digest
from mahalo_ray.data.row_files import QUARANTINE, data_files
from mahalo_ray.data.rows import ReadReport, quarantine
from mahalo_ray.data.step_readers import ReadTraces, read_traces
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.errors import StageError
from mahalo_ray.pipeline.artifacts import place_model
from mahalo_ray.pipeline.judging import judge_identity, judge_spec
from mahalo_ray.pipeline.progress import RunProgress
from mahalo_ray.pipeline.stages import Context, Manifest, Pipeline, Session, Stage, StageResult
from mahalo_ray.rollouts.judges import JudgeSpec
from mahalo_ray.rollouts.pool import share_limits
from mahalo_ray.rollouts.step_labels import (
    TRACES,
    UNJUDGED,
    LabelChunk,
    LabelReport,
    LabelSpec,
    run_labelling,
)

INPUT = "input"
CHUNKS = "chunks.json"


def make_labels(config: LabelConfig, session: Session, progress: RunProgress) -> Manifest:
    """Bring the output up to date; finished chunks are kept. ValueError if the output holds labels of other
    settings."""
    if config.input is None:
        raise ConfigError("'input' is missing: say what is to be labelled")
    judges = {name: judge_spec(name, judge) for name, judge in config.judges.items()}
    read = Stage("input", "Read traces", _read_input, _input_settings, uses_ray=False)
    label = Stage[LabelConfig](
        "label",
        "Label",
        lambda context: _label(context, judges),
        lambda config: _settings(config, judges),
        needs=("input",),
        in_output=True,
    )
    return Pipeline([read, label], holds="labels").run(config, session=session, progress=progress)["label"]


def _label(context: Context[LabelConfig], judges: dict[str, JudgeSpec]) -> StageResult:
    config = context.config
    chunks = [LabelChunk(**chunk) for chunk in storage.read_json(context.input("input", "chunks"))]
    context.progress.start(sum(chunk.rows for chunk in chunks), "rows")
    spec = _spec(context, judges, len(chunks))
    report = run_labelling(
        spec, chunks, config.cluster, context.progress.update, config.max_unjudged_fraction
    )
    if report.traces == 0:
        raise StageError(f"no trace has a label; the last reason: {report.example}")
    outputs = {"traces": TRACES, "unjudged": UNJUDGED, "quarantine": QUARANTINE}
    data = context.metrics_of("input")["data"]
    return StageResult({**_metrics(config, judges, report), "data": data}, outputs)


def _metrics(config: LabelConfig, judges: dict[str, JudgeSpec], report: LabelReport) -> dict[str, Any]:
    """The report as plain numbers; and who judged, calibrated or not."""
    sampling: dict[str, float] = dict(report.sampling)
    if sampling:
        sampling["samples_saved"] = 1 - sampling["samples"] / max(1, sampling["samples_full"])
    return {
        "rows": report.rows,
        "traces": report.traces,
        "labels": dict(report.labels),
        "unjudged": dict(report.unjudged),
        "sampling": sampling,
        "endpoints": report.endpoints,
        "judges": {
            name: {
                "supervision": next(o.supervision for o in config.objectives if o.name == name),
                "judge": judge_identity(spec),
                "threshold": spec.threshold,
                "calibrated": spec.calibrated,
            }
            for name, spec in judges.items()
        },
    }


def _settings(config: LabelConfig, judges: dict[str, JudgeSpec]) -> dict[str, Any]:
    """What the labels depend on: not where they are made, nor how hard endpoints may be asked."""
    excluded = {"output", "cluster", "max_unjudged_fraction", "judges", "calibration", "seed", "input"}
    settings = config.model_dump(mode="json", exclude=excluded)
    if config.continuations is not None:
        settings["continuations"] = config.continuations.shaping()
    settings["judges"] = {
        name: {**judge_identity(spec), "threshold": spec.threshold} for name, spec in judges.items()
    }
    policy = None if config.continuations is None else config.continuations.policy
    if policy is not None and storage.exists(policy):
        settings["policy"] = [storage.fingerprint(file) for file in storage.list_files(policy)]
    return settings


def _input_settings(config: LabelConfig) -> dict[str, Any]:
    """The input, and what its files hold now."""
    assert config.input is not None
    sources = [*(s.path for s in config.input.traces), *(s.path for s in config.input.prompts)]
    return {
        "input": config.input.model_dump(mode="json"),
        "traces_per_chunk": config.traces_per_chunk,
        "files": [storage.fingerprint(file) for source in sources for file in data_files(source)],
    }


def _read_input(context: Context[LabelConfig]) -> StageResult:
    """The input as files of `traces_per_chunk` rows, traces of one prompt together."""
    config = context.config
    assert config.input is not None
    limit = math.inf if config.input.limit is None else config.input.limit
    traces, groups, numbers = RecordTable(StepTrace), array("q"), dict[str, int]()
    prompts: dict[int, RecordTable[StepTrace]] = {}  # by how many responses each gets

    def take_trace(trace: StepTrace) -> None:
        if len(traces) < limit:
            traces.append(trace)
            groups.append(numbers.setdefault(trace.group, len(numbers)))

    def take_prompt(prompt: PromptRow) -> None:
        if len(traces) + sum(map(len, prompts.values())) < limit:
            prompts.setdefault(responses, RecordTable(StepTrace)).append(_without_steps(prompt))

    read, asked = ReadTraces(take=take_trace), ReadPrompts(take=take_prompt)
    for number, source in enumerate(config.input.traces):
        read_traces(source.path, source.format, [], None, None, f"traces{number}", read, with_labels=False)
    for number, questions in enumerate(config.input.prompts):
        responses = questions.responses
        read_prompts(questions.path, f"prompts{number}", asked, with_answers=True)
    bad, seen = [*read.bad, *asked.bad], read.seen + asked.taken + len(asked.bad)
    report = ReadReport()
    report.add(read.report)
    report.add(asked.report)
    account = context.account(report)
    share, url = config.input.max_bad_fraction, context.output_path(QUARANTINE)
    quarantine(bad, seen, share, url, "input.max_bad_fraction")
    size = config.traces_per_chunk
    together = traces.table().take(np.argsort(np.asarray(groups), kind="stable"))
    chunks = _write_chunks(context, "traces", together, size, 0)
    for responses, rows in prompts.items():
        name, per_chunk = f"prompts-{responses}", max(1, size // responses)
        chunks += _write_chunks(context, name, rows.table(), per_chunk, responses)
    if not chunks:
        raise ValueError("'input' holds nothing that can be labelled")
    storage.write_json(context.path(CHUNKS), [asdict(chunk) for chunk in chunks])
    return StageResult({"rows": seen, "quarantined": len(bad), "data": account}, {"chunks": CHUNKS})


def _write_chunks(
    context: Context[LabelConfig], name: str, rows: pa.Table, size: int, responses: int
) -> list[LabelChunk]:
    """The rows in files of at most `size`."""
    chunks = []
    for first in range(0, len(rows), size):
        url, part = context.path(f"{name}-{first // size:06d}.parquet"), rows.slice(first, size)
        storage.write_table(url, part)
        chunks.append(LabelChunk(url, len(part), responses))
    return chunks


def _without_steps(prompt: PromptRow) -> StepTrace:
    """A prompt as a trace to which responses are added."""
    return StepTrace(
        id=prompt.id,
        group=digest(prompt.messages),
        prompt=list(prompt.messages),
        steps=[],
        labels={},
        source=prompt.file,
        answer=prompt.answer,
    )


def _spec(context: Context[LabelConfig], judges: dict[str, JudgeSpec], chunks: int) -> LabelSpec:
    config = context.config
    actors = min(config.cluster.rollout_actors, chunks)
    for judge in config.judges.values():
        if isinstance(judge, EndpointJudgeConfig):
            share_limits(judge.endpoint, actors)  # refuses what is too little for all
    continuations = config.continuations
    if continuations is not None:
        policy = place_model(continuations.policy, context.path("policy"))
        continuations = continuations.model_copy(update={"policy": policy})
    return LabelSpec(
        name=config.name,
        output_url=context.folder,
        objectives=tuple(config.objectives),
        judges=judges,
        domain=config.domain,
        step_separator=config.step_separator,
        continuations=continuations,
        placement=DeviceConfig.of(config.cluster, config.dtype),
        threads=max(1, math.floor(config.cluster.cpus_per_rollout_actor)),
        seed=config.seed,
        actors=actors,
    )
