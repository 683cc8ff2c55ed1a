"""Ray actors that label chunks of traces, and the driver that hands chunks out.

A chunk is one Parquet file of unlabelled traces; it ends as a file of labelled ones, which is written last
and marks the chunk as done. Which actor labels a chunk, and when, changes nothing in it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import ray
import torch

from mahalo_ray.config import ActorsConfig, ObjectiveConfig
from mahalo_ray.config.label import ContinuationsConfig
from mahalo_ray.data import storage
from mahalo_ray.data.quarantine import SCHEMA, BadRow
from mahalo_ray.data.records import StepTrace
from mahalo_ray.decoding.boundaries import boundary_for
from mahalo_ray.decoding.loading import Placement, load_policy
from mahalo_ray.rollouts.judges import JudgeSpec
from mahalo_ray.rollouts.labelling import Labeller, ObjectiveJudge
from mahalo_ray.rollouts.pool import ActorPool, RolloutError
from mahalo_ray.rollouts.prefixes import Continuer

TRACES = "labelled"
UNJUDGED = "unjudged"
SUMMARIES = "summaries"
JUDGED_FROM = 50  # labels asked for before a share without verdict says anything

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LabelSpec:
    """What every actor of a labelling job needs."""

    name: str
    output_url: str
    objectives: tuple[ObjectiveConfig, ...]
    judges: dict[str, JudgeSpec]
    domain: str
    step_separator: str | None
    continuations: ContinuationsConfig | None
    placement: Placement
    threads: int
    seed: int
    actors: int

    @property
    def source(self) -> str:
        """Who made the labels, for every trace."""
        made = [f"{o.name} by {o.supervision} ({self.judges[o.name].label})" for o in self.objectives]
        return f"{self.name}: {', '.join(made)}"


@dataclass(frozen=True)
class LabelChunk:
    """A file of traces (or of prompts, traces without steps, to be answered `responses` times each)."""

    url: str
    size: int
    responses: int = 0

    def output(self, output_url: str, kind: str, suffix: str = ".parquet") -> str:
        """URL of this chunk's output of a kind."""
        name = self.url.rsplit("/", 1)[-1].removesuffix(".parquet")
        return storage.join(output_url, kind, name + suffix)


@dataclass
class LabelSummary:
    """What one chunk, or all of them, came to. `sampling` has the counts of `SamplingCounts`, `endpoints`
    those of judges behind endpoints, per objective."""

    traces: int = 0
    rows: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    unjudged: Counter[str] = field(default_factory=Counter)
    sampling: Counter[str] = field(default_factory=Counter)
    endpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    example: str = ""  # of a label without verdict

    def add(self, other: LabelSummary) -> None:
        """Sum up."""
        self.traces += other.traces
        self.rows += other.rows
        self.labels.update(other.labels)
        self.unjudged.update(other.unjudged)
        self.sampling.update(other.sampling)
        for name, counts in other.endpoints.items():
            self.endpoints[name] = summed(self.endpoints.get(name, {}), counts)
        self.example = other.example or self.example

    @property
    def unjudged_share(self) -> float:
        """Of the labels asked for, those without a verdict."""
        unjudged = sum(self.unjudged.values())
        return unjudged / max(1, unjudged + sum(self.labels.values()))

    @classmethod
    def read(cls, url: str) -> LabelSummary:
        found = storage.read_json(url)
        counters = {name: Counter(found[name]) for name in ("labels", "unjudged", "sampling")}
        return cls(**{**found, **counters})


def summed(left: dict[str, Any], right: dict[str, Any], sign: int = 1) -> dict[str, Any]:
    """Numbers added name by name, through dictionaries; None (no price) stays None."""
    total = dict(left)
    for name, value in right.items():
        if isinstance(value, dict):
            total[name] = summed(left.get(name, {}), value, sign)
        else:
            total[name] = None if value is None else (left.get(name) or 0) + sign * value
    return total


class LabelWorker:
    """Labels chunks; an ordinary class, made a Ray actor by the driver."""

    def __init__(self, spec: LabelSpec) -> None:
        torch.set_num_threads(spec.threads)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self.spec, settings = spec, spec.continuations
        self.judges = {
            name: judge.open(spec.placement, spec.actors, spec.seed) for name, judge in spec.judges.items()
        }
        self.continuer = None
        if settings is not None:
            policy, chat = load_policy(settings.policy, spec.placement)
            boundary = boundary_for(spec.domain)
            self.continuer = Continuer(policy, chat, boundary, spec.step_separator, settings, spec.seed)
        own = [ObjectiveJudge(o, self.judges[o.name], spec.judges[o.name].threshold) for o in spec.objectives]
        self.labeller = Labeller(own, self.continuer, settings, spec.step_separator, spec.source)

    def play(self, chunk: LabelChunk) -> LabelSummary:
        """Label a chunk and write its files; that of the labelled traces comes last."""
        before = self._counts()
        traces, output = StepTrace.read(chunk.url), self.spec.output_url
        unanswered: list[BadRow] = []
        if chunk.responses:
            traces, unanswered = self._respond(traces, chunk.responses)
        found = self.labeller.label(traces)
        summary = LabelSummary(len(found.traces), chunk.size, found.labels, found.unjudged)
        counts = summed(self._counts(), before, -1)
        summary.sampling, summary.endpoints = Counter(counts["sampling"]), counts["endpoints"]
        bad = [*unanswered, *found.bad]
        summary.example = bad[-1].reason if bad else ""
        rows = pa.Table.from_pylist([asdict(row) for row in bad], schema=SCHEMA)
        storage.write_table(chunk.output(output, UNJUDGED), rows)
        storage.write_json(chunk.output(output, SUMMARIES, ".json"), vars(summary))
        StepTrace.save(found.traces, chunk.output(output, TRACES))
        return summary

    def _respond(self, prompts: Sequence[StepTrace], responses: int) -> tuple[list[StepTrace], list[BadRow]]:
        assert self.continuer is not None
        errors = {prompt.id: self.continuer.context_error(prompt) for prompt in prompts}
        bad = [
            BadRow.of(prompt.source, 0, f"prompt '{prompt.id}': {errors[prompt.id]}", prompt.prompt)
            for prompt in prompts
            if errors[prompt.id]
        ]
        fitting = [prompt for prompt in prompts if errors[prompt.id] is None]
        return (self.continuer.respond(fitting, responses) if fitting else []), bad

    def _counts(self) -> dict[str, Any]:
        sampling = {} if self.continuer is None else asdict(self.continuer.counts)
        endpoints = {name: counts for name, judge in self.judges.items() if (counts := judge.counts())}
        return {"sampling": sampling, "endpoints": endpoints}


LabelActor = ray.remote(LabelWorker)


def run_labelling(
    spec: LabelSpec,
    chunks: Sequence[LabelChunk],
    cluster: ActorsConfig,
    progress: Progress,
    max_unjudged_fraction: float,
) -> LabelSummary:
    """Label all chunks on `cluster.rollout_actors` Ray actors; ray.init must have been called.

    Finished chunks are skipped, unless too many of their labels have no verdict. RolloutError when more than
    `max_unjudged_fraction` of all labels have none. `progress(done, total, note)` counts rows of the input.
    """
    total = LabelSummary()
    rows = sum(chunk.size for chunk in chunks)

    def take(summary: LabelSummary) -> None:
        total.add(summary)
        unjudged = sum(total.unjudged.values())
        progress(total.rows, rows, f"{unjudged} labels without verdict" if unjudged else "")

    def unfinished() -> Iterator[LabelChunk]:
        done = set(storage.list_files(storage.join(spec.output_url, TRACES), ".parquet"))
        for chunk in chunks:
            if chunk.output(spec.output_url, TRACES) in done:
                summary = LabelSummary.read(chunk.output(spec.output_url, SUMMARIES, ".json"))
                if summary.unjudged_share <= max_unjudged_fraction:
                    take(summary)
                    continue
            yield chunk

    for summary in ActorPool(LabelActor, spec, cluster, unfinished()).results():
        take(summary)
        _check(total, max_unjudged_fraction, JUDGED_FROM)
    _check(total, max_unjudged_fraction, 0)
    return total


def _check(total: LabelSummary, limit: float, judged_from: int) -> None:
    asked = sum(total.labels.values()) + sum(total.unjudged.values())
    if asked >= judged_from and total.unjudged_share > limit:
        raise RolloutError(
            f"{sum(total.unjudged.values())} of {asked} labels have no verdict, more than the allowed share "
            f"of {limit:g} ('max_unjudged_fraction'); the others are kept, and the same command tries these "
            f"again. The last reason: {total.example}"
        )
