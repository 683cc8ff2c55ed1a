"""`mahalo label`: read traces and prompts, label them on actors, say what it came to. Run again, it goes on
where it stopped."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

from mahalo_ray.config import ConfigError, ContinuationsConfig, EndpointJudgeConfig, LabelConfig
from mahalo_ray.data import storage
from mahalo_ray.data.records import StepTrace
from mahalo_ray.data.rows import QUARANTINE, data_files, quarantine
from mahalo_ray.data.step_readers import ReadTraces, read_prompts, read_traces
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.errors import StageError
from mahalo_ray.models.folder import local_folder
from mahalo_ray.pipeline.judging import judge_identity, judge_spec
from mahalo_ray.pipeline.progress import RunProgress
from mahalo_ray.pipeline.stages import Manifest, claim_output, fingerprint, run_lock
from mahalo_ray.rollouts.dialogue_job import shared
from mahalo_ray.rollouts.judges import JudgeSpec
from mahalo_ray.rollouts.labelling import (
    TRACES,
    UNJUDGED,
    LabelChunk,
    LabelSpec,
    LabelSummary,
    run_labelling,
)

INPUT = "input"

Session = Callable[[], contextlib.AbstractContextManager[None]]


def make_labels(config: LabelConfig, session: Session, progress: RunProgress) -> Manifest:
    """Bring the output up to date; finished chunks are kept. ValueError if the output holds labels of other
    settings."""
    if config.input is None:
        raise ConfigError("'input' is missing: say what is to be labelled")
    judges = {name: judge_spec(name, judge) for name, judge in config.judges.items()}
    began, output = time.monotonic(), storage.absolute(config.output)
    with run_lock(output), progress as display, contextlib.ExitStack() as ray:
        mine = _fingerprint(config, judges)
        claim_output(output, config, mine, "labels")
        with display.stage("[1/2] Read traces"):
            chunks = _write_chunks(config, output)
        with display.stage("[2/2] Label") as bar:
            ray.enter_context(session())
            bar.start(sum(chunk.size for chunk in chunks), "rows")
            spec = _spec(config, judges, output, len(chunks))
            limit = config.max_unjudged_fraction
            summary = run_labelling(spec, chunks, config.cluster, bar.update, limit)
        if summary.traces == 0:
            raise StageError(f"no trace has a label; the last reason: {summary.example}")
        outputs = {"traces": TRACES, "unjudged": UNJUDGED, "quarantine": QUARANTINE}
        seconds = round(time.monotonic() - began, 3)
        manifest = Manifest("label", mine, outputs, _metrics(config, judges, summary), seconds)
        manifest.write(output)
        return manifest


def _metrics(config: LabelConfig, judges: dict[str, JudgeSpec], summary: LabelSummary) -> dict[str, Any]:
    """What it came to, as plain numbers; and who judged, calibrated or not."""
    sampling: dict[str, float] = dict(summary.sampling)
    if sampling:
        sampling["samples_saved"] = 1 - sampling["samples"] / max(1, sampling["samples_full"])
    return {
        "rows": summary.rows,
        "traces": summary.traces,
        "labels": dict(summary.labels),
        "unjudged": dict(summary.unjudged),
        "sampling": sampling,
        "endpoints": summary.endpoints,
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


def _fingerprint(config: LabelConfig, judges: dict[str, JudgeSpec]) -> str:
    """What the labels depend on: not where they are made, nor how hard endpoints may be asked."""
    excluded = {"output", "cluster", "max_unjudged_fraction", "judges", "calibration", "seed"}
    settings = config.model_dump(mode="json", exclude=excluded)
    settings["judges"] = {
        name: {**judge_identity(spec), "threshold": spec.threshold} for name, spec in judges.items()
    }
    assert config.input is not None
    sources = [*(s.path for s in config.input.traces), *(s.path for s in config.input.prompts)]
    settings["files"] = [storage.fingerprint(file) for source in sources for file in data_files(source)]
    policy = None if config.continuations is None else config.continuations.policy
    if policy is not None and storage.exists(policy):
        settings["policy"] = [storage.fingerprint(file) for file in storage.list_files(policy)]
    return fingerprint("label", 1, config.seed, settings, {})


def _write_chunks(config: LabelConfig, output: str) -> list[LabelChunk]:
    """The input as files of `traces_per_chunk` rows, traces of one prompt together."""
    assert config.input is not None
    found, prompts = ReadTraces(), ReadTraces()
    for number, source in enumerate(config.input.traces):
        read_traces(source.path, source.format, [], None, None, f"traces{number}", found, with_labels=False)
    answers: list[int] = []
    for number, asked in enumerate(config.input.prompts):
        read_prompts(asked.path, f"prompts{number}", prompts)
        answers += [asked.responses] * (len(prompts.traces) - len(answers))
    bad, seen = [*found.bad, *prompts.bad], found.seen + prompts.seen
    share, url = config.input.max_bad_fraction, storage.join(output, QUARANTINE)
    quarantine(bad, seen, share, url, "input.max_bad_fraction")
    limit = config.input.limit
    traces = found.traces[:limit]
    left = None if limit is None else limit - len(traces)
    size, chunks = config.traces_per_chunk, []
    place: dict[str, int] = {}
    for trace in traces:
        place.setdefault(trace.group, len(place))
    traces = sorted(traces, key=lambda trace: place[trace.group])
    for at in range(0, len(traces), size):
        chunks.append(_chunk(output, f"traces-{at // size:06d}", traces[at : at + size], 0))
    for responses in dict.fromkeys(answers):
        own = [t for t, count in zip(prompts.traces[:left], answers, strict=False) if count == responses]
        per_chunk = max(1, size // responses)
        for at in range(0, len(own), per_chunk):
            name = f"prompts-{responses}-{at // per_chunk:06d}"
            chunks.append(_chunk(output, name, own[at : at + per_chunk], responses))
    if not chunks:
        raise ValueError("'input' holds nothing that can be labelled")
    return chunks


def _chunk(output: str, name: str, rows: list[StepTrace], responses: int) -> LabelChunk:
    url = storage.join(output, INPUT, f"{name}.parquet")
    if not storage.exists(url):
        StepTrace.save(rows, url)
    return LabelChunk(url, len(rows), responses)


def _spec(config: LabelConfig, judges: dict[str, JudgeSpec], output: str, chunks: int) -> LabelSpec:
    actors = min(config.cluster.rollout_actors, chunks)
    for judge in config.judges.values():
        if isinstance(judge, EndpointJudgeConfig):
            shared(judge.endpoint, actors)  # refuses what is too little for all
    return LabelSpec(
        name=config.name,
        output_url=output,
        objectives=tuple(config.objectives),
        judges=judges,
        domain=config.domain,
        step_separator=config.step_separator,
        continuations=None if config.continuations is None else _reachable(config.continuations, output),
        placement=DeviceConfig(config.cluster.device, config.dtype),
        threads=max(1, math.floor(config.cluster.cpus_per_rollout_actor)),
        seed=config.seed,
        actors=actors,
    )


def _reachable(settings: ContinuationsConfig, output: str) -> ContinuationsConfig:
    """The policy where every node can read it; one from a hub is put beside the output."""
    if storage.exists(settings.policy):
        return settings.model_copy(update={"policy": storage.absolute(settings.policy)})
    url = storage.join(output, "policy")
    if not storage.exists(url):
        storage.upload_folder(local_folder(settings.policy), url)
    return settings.model_copy(update={"policy": url})
