"""Labels for the steps of traces, per objective as it is supervised. No Ray here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mahalo_ray.config import ObjectiveConfig
from mahalo_ray.config.label import ROLLOUTS, ContinuationsConfig
from mahalo_ray.data.quarantine import BadRow
from mahalo_ray.data.records import StepTrace
from mahalo_ray.rollouts.judges import Judge, Judged, Score, Unjudged, load_function
from mahalo_ray.rollouts.label_targets import is_decided, majority_target, value_target
from mahalo_ray.rollouts.prefixes import Continuer, Key, Prefix, prefix_key

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
        self._rollouts = [j for j in judges if j.objective.supervision in ROLLOUTS]
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
