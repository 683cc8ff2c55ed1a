"""Labels for the steps of traces, per objective as it is supervised. No Ray here."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import ray
import torch
from scipy.stats import beta

from mahalo_ray.config import (
    ROLLOUT_SUPERVISION,
    ActorsConfig,
    AdaptiveConfig,
    ContinuationsConfig,
    ObjectiveConfig,
)
from mahalo_ray.data import storage
from mahalo_ray.data.records import StepTrace
from mahalo_ray.data.rows import SCHEMA, BadRow
from mahalo_ray.decoding.policy import DeviceConfig, load_policy
from mahalo_ray.decoding.stopping import boundary_for
from mahalo_ray.rollouts.continuations import Continuer, Key, Prefix, prefix_key
from mahalo_ray.rollouts.judges import Judge, Judged, JudgeSpec, Score, Unjudged, load_function
from mahalo_ray.rollouts.pool import ActorPool, RolloutError


def value_target(verdicts: Sequence[float], steps_after: Sequence[int], reward: float, gamma: float) -> float:
    """`rollout_value`: the mean over M completed responses of r_t + gamma^(n-t) * z.

    verdicts: z of each; steps_after: n - t of each, the steps it took from step t to its end.
    """
    assert verdicts and len(verdicts) == len(steps_after)
    returns = [reward + gamma**after * z for z, after in zip(verdicts, steps_after, strict=True)]
    return sum(returns) / len(returns)


def majority_target(verdicts: Sequence[float]) -> float:
    """`judged_rollouts`: 1 if more than half of the completed responses are positive."""
    assert verdicts
    return float(sum(verdicts) > len(verdicts) / 2)


def is_decided(verdicts: Sequence[float], settings: AdaptiveConfig) -> bool:
    """Whether more verdicts (0 or 1 each) are worth drawing, by the Beta(1, 1) prior's posterior of their
    mean."""
    positives = sum(verdicts)
    posterior = beta(1 + positives, 1 + len(verdicts) - positives)
    if settings.threshold is not None:
        below = posterior.cdf(settings.threshold)
        if max(below, 1 - below) >= settings.confidence:
            return True
    if settings.max_width is None:
        return False
    low, high = posterior.interval(settings.confidence)
    return bool(high - low < settings.max_width)


Verdict = float | Unjudged  # 1 positive, 0 not


@dataclass(frozen=True)
class ObjectiveJudge:
    """One objective: how it is supervised, who judges, and from which score on that is positive."""

    objective: ObjectiveConfig
    judge: Judge
    threshold: float

    def verdicts(self, items: Sequence[Judged]) -> list[Verdict]:
        """Equal items are judged once."""
        distinct = list(dict.fromkeys(items))
        scores = dict(zip(distinct, self.judge.score(distinct), strict=True))
        return [self._verdict(scores[item]) for item in items]

    def _verdict(self, score: Score) -> Verdict:
        return score if isinstance(score, Unjudged) else float(score >= self.threshold)


@dataclass
class Labelled:
    """What a chunk comes to. `labels` counts labels made per objective, `unjudged` those without a verdict
    (each with its reason in `bad`)."""

    traces: list[StepTrace] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)
    unjudged: Counter[str] = field(default_factory=Counter)


@dataclass
class _Continued:
    """Verdicts on the continuations of one prefix so far, and how many steps each one took."""

    steps_after: list[int] = field(default_factory=list)
    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)

    def known(self, name: str) -> tuple[list[float], list[int]]:
        pairs = zip(self.verdicts[name], self.steps_after, strict=True)
        judged = [(z, after) for z, after in pairs if not isinstance(z, Unjudged)]
        return [z for z, _ in judged], [after for _, after in judged]

    def reason(self, name: str) -> str:
        return next(z.reason for z in self.verdicts[name] if isinstance(z, Unjudged))


class Labeller:
    """Labels traces. `continuer` is needed where an objective is labelled by rollouts; `source` is written
    into every trace."""

    def __init__(
        self,
        judges: Sequence[ObjectiveJudge],
        continuer: Continuer | None,
        settings: ContinuationsConfig | None,
        step_separator: str | None,
        source: str,
    ) -> None:
        self._rollouts = [j for j in judges if j.objective.supervision in ROLLOUT_SUPERVISION]
        self._by_prefix = [j for j in judges if j.objective.supervision == "judged_prefix"]
        self._continuer, self._settings = continuer, settings
        self._separator, self._source = step_separator, source
        reward = None if settings is None else settings.step_reward
        self._step_reward = None if reward is None else load_function(reward)

    def label(self, traces: Sequence[StepTrace]) -> Labelled:
        """Traces with labels, in their order; one that has no label at all is left out, with its reasons."""
        result = Labelled()
        labels: list[dict[str, list[Verdict]]] = [{} for _ in traces]
        outcomes: list[dict[str, float]] = [{} for _ in traces]
        for own in self._by_prefix:
            self._judge_prefixes(own, traces, labels)
        if self._rollouts:
            self._judge_rollouts(traces, labels, outcomes)
        for trace, found, outcome in zip(traces, labels, outcomes, strict=True):
            self._add(result, trace, found, outcome)
        return result

    def _judge_prefixes(
        self, own: ObjectiveJudge, traces: Sequence[StepTrace], labels: list[dict[str, list[Verdict]]]
    ) -> None:
        items = [self._judged(t, t.steps[:n]) for t in traces for n in range(1, len(t.steps) + 1)]
        verdicts = iter(own.verdicts(items))
        for trace, found in zip(traces, labels, strict=True):
            found[own.objective.name] = [next(verdicts) for _ in trace.steps]

    def _judge_rollouts(
        self,
        traces: Sequence[StepTrace],
        labels: list[dict[str, list[Verdict]]],
        outcomes: list[dict[str, float]],
    ) -> None:
        assert self._continuer is not None
        errors = [self._continuer.context_error(trace) for trace in traces]
        fitting = [trace for trace, error in zip(traces, errors, strict=True) if error is None]
        continued: dict[Key, _Continued] = {}
        self._continuer.sample(fitting, lambda prefixes: self._decide(prefixes, continued))
        for own in self._rollouts:
            name = own.objective.name
            ends = iter(own.verdicts([self._judged(trace, trace.steps) for trace in fitting]))
            for trace, error, found, outcome in zip(traces, errors, labels, outcomes, strict=True):
                if error is not None:
                    found[name] = [Unjudged(error)] * len(trace.steps)
                    continue
                end = next(ends)
                inner = [
                    self._target(own, trace, n, continued[prefix_key(trace, n)])
                    for n in range(1, len(trace.steps))
                ]
                found[name] = [*inner, self._end_target(own, trace, end)]
                if not isinstance(end, Unjudged):
                    outcome[name] = end

    def _decide(self, prefixes: list[Prefix], continued: dict[Key, _Continued]) -> list[Prefix]:
        """Judge the new continuations; the prefixes that need more of them."""
        new: list[tuple[_Continued, Judged]] = []
        for prefix in prefixes:
            state = continued.setdefault(prefix.key, _Continued())
            for steps in prefix.samples[len(state.steps_after) :]:
                state.steps_after.append(len(steps))
                new.append((state, self._judged(prefix.trace, prefix.steps, steps)))
        for own in self._rollouts:
            verdicts = own.verdicts([item for _, item in new])
            for (state, _), verdict in zip(new, verdicts, strict=True):
                state.verdicts.setdefault(own.objective.name, []).append(verdict)
        return [prefix for prefix in prefixes if not self._is_decided(continued[prefix.key])]

    def _is_decided(self, state: _Continued) -> bool:
        assert self._settings is not None
        adaptive = self._settings.adaptive
        if adaptive is None:
            return True  # all M were drawn in one round
        known = (state.known(own.objective.name)[0] for own in self._rollouts)
        return all(bool(verdicts) and is_decided(verdicts, adaptive) for verdicts in known)

    def _target(self, own: ObjectiveJudge, trace: StepTrace, count: int, state: _Continued) -> Verdict:
        verdicts, after = state.known(own.objective.name)
        if not verdicts:
            return Unjudged(state.reason(own.objective.name))
        if own.objective.supervision == "judged_rollouts":
            return majority_target(verdicts)
        assert self._settings is not None
        return value_target(verdicts, after, self._reward(trace, count), self._settings.gamma)

    def _end_target(self, own: ObjectiveJudge, trace: StepTrace, end: Verdict) -> Verdict:
        """The last step ends the response: there is nothing to continue, its outcome is its own verdict."""
        if isinstance(end, Unjudged) or own.objective.supervision == "judged_rollouts":
            return end
        assert self._settings is not None
        return value_target([end], [0], self._reward(trace, len(trace.steps)), self._settings.gamma)

    def _reward(self, trace: StepTrace, count: int) -> float:
        if self._step_reward is None:
            return 0.0
        prompt = [message.model_dump() for message in trace.prompt]
        return float(self._step_reward(prompt, list(trace.steps[:count])))

    def _judged(self, trace: StepTrace, steps: Sequence[str], sampled: Sequence[str] = ()) -> Judged:
        """Given steps, and sampled ones behind them as they were written."""
        response = joined(steps, self._separator) + "".join(sampled)
        return Judged(tuple(trace.prompt), (*steps, *sampled), trace.answer, response.strip())

    def _add(
        self,
        result: Labelled,
        trace: StepTrace,
        found: Mapping[str, Sequence[Verdict]],
        outcome: dict[str, float],
    ) -> None:
        for name, verdicts in found.items():
            for number, verdict in enumerate(verdicts, start=1):
                if isinstance(verdict, Unjudged):
                    result.unjudged[name] += 1
                    reason = f"trace '{trace.id}', step {number}, {name}: {verdict.reason}"
                    result.bad.append(BadRow.of(trace.source, number, reason, trace.steps[number - 1]))
                else:
                    result.labels[name] += 1
        labels = {
            name: [None if isinstance(verdict, Unjudged) else verdict for verdict in verdicts]
            for name, verdicts in found.items()
        }
        if any(value is not None for values in labels.values() for value in values):
            update = {"labels": labels, "outcome": outcome or None, "source": self._source}
            result.traces.append(trace.model_copy(update=update))


def joined(steps: Sequence[str], separator: str | None) -> str:
    """Steps as one response, the separator after each, as a policy writes it."""
    end = separator or ""
    return "".join(step if step.endswith(end) else step + end for step in steps)


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
    placement: DeviceConfig
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
