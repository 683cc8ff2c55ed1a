"""Labels for the steps of traces, per objective as it is supervised, and the Ray actors that make them."""

from __future__ import annotations

import posixpath
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
from pydantic import Field

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
from mahalo_ray.domains.verdicts import Judge, Judged, Score, Unjudged, load_function
from mahalo_ray.rollouts.continuations import Continuer, Key, Prefix, prefix_key
from mahalo_ray.rollouts.judges import JudgeSpec
from mahalo_ray.rollouts.pool import (
    ChunkJob,
    ChunkSummary,
    JobReport,
    Progress,
    Tally,
    shard_url,
    start_worker,
    summary_url,
)


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
    from scipy.stats import beta  # takes a second: only adaptive labelling needs it

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


@dataclass
class _Search:
    """Where a response's first error may be: the prefix of `right` steps has none, and inner prefixes of more
    than `open_until` steps are settled."""

    right: int
    open_until: int
    unjudged: Unjudged | None = None

    @property
    def is_open(self) -> bool:
        return self.unjudged is None and self.right < self.open_until

    @property
    def middle(self) -> int:
        """Steps of the prefix that is continued next."""
        return (self.right + self.open_until + 1) // 2

    def settle(self, verdict: Verdict) -> None:
        """The middle prefix has this label."""
        if isinstance(verdict, Unjudged):
            self.unjudged = verdict
        elif verdict == 1.0:
            self.right = self.middle
        else:
            self.open_until = self.middle - 1

    def labels(self, inner: int, right: bool) -> list[Verdict]:
        """Labels of the inner steps; `right`: the whole response is."""
        if self.unjudged is not None:
            return [self.unjudged] * inner
        return [1.0 if right or step <= self.right else 0.0 for step in range(1, inner + 1)]


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
        for judge in self._by_prefix:
            self._judge_prefixes(judge, traces, labels)
        if self._rollouts:
            self._judge_rollouts(traces, labels, outcomes)
        for trace, by_objective, outcome in zip(traces, labels, outcomes, strict=True):
            self._add(result, trace, by_objective, outcome)
        return result

    def _judge_prefixes(
        self, judge: ObjectiveJudge, traces: Sequence[StepTrace], labels: list[dict[str, list[Verdict]]]
    ) -> None:
        items = [self._judged(t, t.steps[:n]) for t in traces for n in range(1, len(t.steps) + 1)]
        verdicts = iter(judge.verdicts(items))
        for trace, by_objective in zip(traces, labels, strict=True):
            by_objective[judge.objective.name] = [next(verdicts) for _ in trace.steps]

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
        self._continuer.count(fitting)
        found: dict[str, list[list[Verdict]]] = {}
        wholes = [self._judged(trace, trace.steps) for trace in fitting]
        verdicts = {judge.objective.name: judge.verdicts(wholes) for judge in self._rollouts}
        if self._settings is not None and self._settings.search_first_error:
            found = self._search_first_errors(fitting, verdicts, continued)
        else:
            self._continuer.sample(fitting, lambda prefixes: self._decide(prefixes, continued))
        for judge in self._rollouts:
            name = judge.objective.name
            ends, inner_of = iter(verdicts[name]), iter(found.get(name, ()))
            for trace, error, by_objective, outcome in zip(traces, errors, labels, outcomes, strict=True):
                if error is not None:
                    by_objective[name] = [Unjudged(error)] * len(trace.steps)
                    continue
                end = next(ends)
                if found:
                    inner = next(inner_of)
                else:
                    inner = [
                        self._target(judge, trace, n, continued[prefix_key(trace, n)])
                        for n in range(1, len(trace.steps))
                    ]
                by_objective[name] = [*inner, self._end_target(judge, trace, end)]
                if not isinstance(end, Unjudged):
                    outcome[name] = end

    def _search_first_errors(
        self,
        traces: Sequence[StepTrace],
        ends: Mapping[str, Sequence[Verdict]],
        continued: dict[Key, _Continued],
    ) -> dict[str, list[list[Verdict]]]:
        """Labels of the inner steps of every trace, per objective: 1 before its first error and 0 from there
        on, which is found by halving (OmegaPRM, Luo et al. 2024, arXiv 2406.06592).

        A prefix from which most continuations succeed has no error in it, one from which they fail has: so
        the middle of the steps in question is continued, and half of them are settled. A response that is
        right itself has none. A prefix without a verdict leaves its trace without labels.
        """
        assert self._continuer is not None
        searches = {
            name: [
                _Search(0, 0 if verdict == 1.0 else len(trace.steps) - 1)
                for trace, verdict in zip(traces, verdicts, strict=True)
            ]
            for name, verdicts in ends.items()
        }
        while True:
            # As far as they are read: a trace ends behind the prefix that is continued.
            middles = [
                trace.model_copy(update={"steps": trace.steps[: search.middle + 1]})
                for of_traces in searches.values()
                for trace, search in zip(traces, of_traces, strict=True)
                if search.is_open
            ]
            if not middles:
                break
            wanted = {prefix_key(trace, len(trace.steps) - 1) for trace in middles} - continued.keys()
            self._continuer.sample(middles, lambda prefixes: self._decide(prefixes, continued), wanted)
            for judge in self._rollouts:
                for trace, search in zip(traces, searches[judge.objective.name], strict=True):
                    if search.is_open:
                        state = continued[prefix_key(trace, search.middle)]
                        search.settle(self._target(judge, trace, search.middle, state))
        return {
            name: [
                search.labels(len(trace.steps) - 1, right=verdict == 1.0)
                for trace, search, verdict in zip(traces, of_traces, ends[name], strict=True)
            ]
            for name, of_traces in searches.items()
        }

    def _decide(self, prefixes: list[Prefix], continued: dict[Key, _Continued]) -> list[Prefix]:
        """Judge the new continuations; the prefixes that need more of them."""
        new: list[tuple[_Continued, Judged]] = []
        for prefix in prefixes:
            state = continued.setdefault(prefix.key, _Continued())
            for steps in prefix.samples[len(state.steps_after) :]:
                state.steps_after.append(len(steps))
                new.append((state, self._judged(prefix.trace, prefix.steps, steps)))
        for judge in self._rollouts:
            verdicts = judge.verdicts([item for _, item in new])
            for (state, _), verdict in zip(new, verdicts, strict=True):
                state.verdicts.setdefault(judge.objective.name, []).append(verdict)
        return [prefix for prefix in prefixes if not self._is_decided(continued[prefix.key])]

    def _is_decided(self, state: _Continued) -> bool:
        assert self._settings is not None
        adaptive = self._settings.adaptive
        if adaptive is None:
            return True  # all M were drawn in one round
        known = (state.known(judge.objective.name)[0] for judge in self._rollouts)
        return all(bool(verdicts) and is_decided(verdicts, adaptive) for verdicts in known)

    def _target(self, judge: ObjectiveJudge, trace: StepTrace, count: int, state: _Continued) -> Verdict:
        verdicts, after = state.known(judge.objective.name)
        if not verdicts:
            return Unjudged(state.reason(judge.objective.name))
        if judge.objective.supervision == "judged_rollouts":
            return majority_target(verdicts)
        assert self._settings is not None
        return value_target(verdicts, after, self._reward(trace, count), self._settings.gamma)

    def _end_target(self, judge: ObjectiveJudge, trace: StepTrace, end: Verdict) -> Verdict:
        """The last step ends the response: there is nothing to continue, its outcome is its own verdict."""
        if isinstance(end, Unjudged) or judge.objective.supervision == "judged_rollouts":
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
        by_objective: Mapping[str, Sequence[Verdict]],
        outcome: dict[str, float],
    ) -> None:
        for name, verdicts in by_objective.items():
            for number, verdict in enumerate(verdicts, start=1):
                if isinstance(verdict, Unjudged):
                    result.unjudged[name] += 1
                    reason = f"trace '{trace.id}', step {number}, {name}: {verdict.reason}"
                    result.bad.append(BadRow.of(trace.source, number, reason, trace.steps[number - 1]))
                else:
                    result.labels[name] += 1
        labels = {
            name: [None if isinstance(verdict, Unjudged) else verdict for verdict in verdicts]
            for name, verdicts in by_objective.items()
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
        labelled = [f"{o.name} by {o.supervision} ({self.judges[o.name].label})" for o in self.objectives]
        return f"{self.name}: {', '.join(labelled)}"


@dataclass(frozen=True)
class LabelChunk:
    """A file of traces (or of prompts, traces without steps, to be answered `responses` times each)."""

    url: str
    rows: int
    responses: int = 0

    @property
    def name(self) -> str:
        return posixpath.basename(self.url).removesuffix(".parquet")


class ModelCounts(Tally):
    """What models did. `sampling` has the counts of `SamplingCounts`, `endpoints` those of judges behind
    endpoints, per objective."""

    sampling: Counter[str] = Field(default_factory=Counter)
    endpoints: dict[str, dict[str, Any]] = Field(default_factory=dict)


class LabelCounts(ModelCounts):
    """What is counted of labels. `example`: why a label has no verdict."""

    traces: int = 0
    rows: int = 0
    labels: Counter[str] = Field(default_factory=Counter)
    unjudged: Counter[str] = Field(default_factory=Counter)
    example: str = ""

    @property
    def asked(self) -> int:
        """Labels asked for."""
        return sum(self.labels.values()) + sum(self.unjudged.values())


class LabelSummary(LabelCounts, ChunkSummary):
    """What one chunk came to."""

    @property
    def model_tokens(self) -> int:
        return self.sampling["tokens_sampled"] + self.sampling["tokens_encoded"]


class LabelReport(LabelCounts, JobReport):
    """What a labelling job came to."""

    @property
    def done(self) -> int:
        return self.rows

    @property
    def failures(self) -> Counter[str]:
        return self.unjudged

    @property
    def attempts(self) -> int:
        return self.asked


class LabelWorker:
    """Labels chunks; an ordinary class, which knows no Ray."""

    def __init__(self, spec: LabelSpec) -> None:
        self.name = start_worker(spec.threads)
        self.spec, settings = spec, spec.continuations
        self.judges = {
            name: judge.open(spec.placement, spec.actors, spec.seed) for name, judge in spec.judges.items()
        }
        self.continuer = None
        if settings is not None:
            policy, chat = load_policy(settings.policy, spec.placement)
            boundary = boundary_for(spec.domain)
            self.continuer = Continuer(policy, chat, boundary, spec.step_separator, settings, spec.seed)
        judges = [
            ObjectiveJudge(o, self.judges[o.name], spec.judges[o.name].threshold) for o in spec.objectives
        ]
        self.labeller = Labeller(judges, self.continuer, settings, spec.step_separator, spec.source)

    def play(self, chunk: LabelChunk) -> LabelSummary:
        """Label a chunk and write its files, the summary last."""
        began, before = time.monotonic(), self._counts()
        traces, output = StepTrace.read(chunk.url), self.spec.output_url
        unanswered: list[BadRow] = []
        if chunk.responses:
            traces, unanswered = self._respond(traces, chunk.responses)
        result = self.labeller.label(traces)
        bad = [*unanswered, *result.bad]
        rows = pa.Table.from_pylist([asdict(row) for row in bad], schema=SCHEMA)
        storage.write_table(shard_url(output, UNJUDGED, chunk.name), rows)
        StepTrace.save(result.traces, shard_url(output, TRACES, chunk.name))
        summary = LabelSummary(
            traces=len(result.traces),
            rows=chunk.rows,
            labels=result.labels,
            unjudged=result.unjudged,
            **self._counts().since(before),
            example=bad[-1].reason if bad else "",
            seconds=time.monotonic() - began,
            actor=self.name,
        )
        summary.write(summary_url(output, chunk.name))
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

    def _counts(self) -> ModelCounts:
        """What this actor's policy and endpoints have done so far."""
        sampling = {} if self.continuer is None else asdict(self.continuer.counts)
        endpoints = {name: counts for name, judge in self.judges.items() if (counts := judge.counts())}
        return ModelCounts(sampling=Counter(sampling), endpoints=endpoints)


class LabelJob(ChunkJob[LabelChunk, LabelSummary, LabelReport]):
    """Labels on actors; a finished chunk with too large a share of labels without a verdict is labelled
    again."""

    worker_class = LabelWorker
    summary_class = LabelSummary
    shards = (TRACES, UNJUDGED)
    failures_called = "labels have no verdict"

    def to_repeat(self, chunk: LabelChunk, earlier: LabelSummary) -> LabelChunk | None:
        unjudged = sum(earlier.unjudged.values())
        return chunk if unjudged > self.max_failed_fraction * earlier.asked else None


def run_labelling(
    spec: LabelSpec,
    chunks: Sequence[LabelChunk],
    cluster: ActorsConfig,
    progress: Progress,
    max_unjudged_fraction: float,
) -> LabelReport:
    """Label all chunks on Ray actors (see `ChunkJob.run`). RolloutError when more than
    `max_unjudged_fraction` of all labels have no verdict. `progress(done, total, note)` counts rows of the
    input."""
    rows = sum(chunk.rows for chunk in chunks)
    report = LabelReport()
    return LabelJob(
        spec.output_url, spec, chunks, rows, cluster, progress, report, max_unjudged_fraction
    ).run()
