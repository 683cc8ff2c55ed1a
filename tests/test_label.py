"""Labels for steps: targets, and continuations over a shared cache."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_reward_models import TOKENIZER, base

from mahalo_ray.config import (
    AdaptiveConfig,
    ContinuationsConfig,
    LabelConfig,
    ObjectiveConfig,
    SamplingConfig,
)
from mahalo_ray.data.records import Message, StepTrace
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.policy import as_policy
from mahalo_ray.decoding.stopping import MathBoundary
from mahalo_ray.domains.verdicts import Judge, Judged, ProgramJudge, Unjudged
from mahalo_ray.rollouts.continuations import Continuer
from mahalo_ray.rollouts.step_labels import (
    Labelled,
    Labeller,
    ObjectiveJudge,
    is_decided,
    majority_target,
    value_target,
)

sys.path.insert(0, str(Path(__file__).parent / "programs"))

VALUE = ObjectiveConfig(name="accuracy", supervision="rollout_value")
VOTE = ObjectiveConfig(name="clear", supervision="judged_rollouts")
PREFIX = ObjectiveConfig(name="kind", supervision="judged_prefix")
SAMPLING = SamplingConfig(max_new_tokens=12)
POLICY = as_policy(base())


def test_targets_by_hand() -> None:
    # z = 1, 0, 1 after 1, 2, 0 more steps; r = 0.1, gamma = 0.5: (0.1 + 0.5) + (0.1 + 0) + (0.1 + 1) over 3
    assert value_target([1, 0, 1], [1, 2, 0], 0.1, 0.5) == pytest.approx(1.8 / 3)
    assert [majority_target(v) for v in ([1, 0], [1, 1, 0], [0.0])] == [0.0, 1.0, 0.0]


def test_sampling_stops_when_the_posterior_is_decided() -> None:
    by_threshold = AdaptiveConfig(threshold=0.5, confidence=0.9)
    # No positive of m: P(mean < 1/2) = 1 - 1/2^(m+1).
    assert not is_decided([0, 0], by_threshold) and is_decided([0, 0, 0], by_threshold)
    assert is_decided([1, 1, 1], by_threshold) and not is_decided([1, 0, 1, 0], by_threshold)
    by_width = AdaptiveConfig(threshold=None, max_width=0.6, confidence=0.9)
    # Central 90 % of Beta(1, 3): 1 - 0.95^(1/3) to 1 - 0.05^(1/3) = 0.017 to 0.632; of Beta(1, 4): to 0.527.
    assert not is_decided([0, 0], by_width) and is_decided([0, 0, 0], by_width)


def trace(name: str, question: str, *steps: str) -> StepTrace:
    return StepTrace(
        id=name,
        group=question,
        prompt=[Message(role="user", content=question)],
        steps=list(steps),
        labels={},
        source="a.jsonl",
        answer="5",
    )


TRACES = [
    trace("a", "2+3?", "Two.", "Three.", "So 5"),
    trace("b", "2+3?", "Two.", "Four.", "So 6"),
    trace("c", "2+3?", "Two."),
    trace("d", "1?", "One.", "One more."),
]


class Recorder(Judge):
    """A judge that keeps what it was shown."""

    def __init__(self, program: str) -> None:
        self.judge, self.seen = ProgramJudge(f"label_judges:{program}"), list[Judged]()

    def score(self, items: Sequence[Judged]) -> list[float | Unjudged]:
        self.seen += items
        return self.judge.score(items)


def labelled(
    traces: Sequence[StepTrace],
    objectives: Sequence[ObjectiveConfig] = (VALUE,),
    program: str = "coin",
    **settings: Any,
) -> tuple[Labelled, Continuer, Recorder]:
    recorder = Recorder(program)
    config = ContinuationsConfig(policy="unused here", sampling=SAMPLING, **{"samples": 4, **settings})
    continuer = Continuer(POLICY, ChatFormat(TOKENIZER), MathBoundary(), "\n\n", config, seed=3)
    judges = [ObjectiveJudge(objective, recorder, 0.5) for objective in objectives]
    return Labeller(judges, continuer, config, "\n\n", "job").label(traces), continuer, recorder


def test_values_are_those_of_the_continuations_that_were_judged() -> None:
    """The definition, from what the judge saw: mean of r_t + gamma^(n-t) z over the M of every prefix."""
    found, _, recorder = labelled(TRACES[:1], gamma=0.5, step_reward="label_judges:reward")
    (one,) = found.traces
    steps = tuple(TRACES[0].steps)
    whole = [item for item in recorder.seen if item.steps == steps]
    assert len(whole) == 1  # the response itself is the end: nothing continues it
    for t in (1, 2):
        started = [item for item in recorder.seen if item.steps[:t] == steps[:t] and item.steps != steps]
        after = [item for item in started if (len(item.steps) == t or item.steps[t] != steps[t])]
        verdicts = dict.fromkeys(after)
        own = recorder.judge.score(list(verdicts))
        returns = {
            i: 0.1 * t + 0.5 ** (len(i.steps) - t) * float(z) for i, z in zip(verdicts, own, strict=True)
        }  # type: ignore[arg-type]
        assert len(after) <= 4 and one.labels["accuracy"][t - 1] is not None
        if len(after) == 4:  # all different: each counts once
            assert one.labels["accuracy"][t - 1] == pytest.approx(sum(returns.values()) / 4)
    z = float(recorder.judge.score(whole)[0])  # type: ignore[arg-type]
    assert one.labels["accuracy"][2] == pytest.approx(0.3 + z) and one.outcome == {"accuracy": z}
    assert recorder.seen[0].response.startswith("Two.\n\n") and one.source == "job"


def test_shared_prefixes_are_sampled_once_and_labels_do_not_depend_on_company() -> None:
    together, continuer, _ = labelled(TRACES)
    counts = continuer.counts
    # Inner prefixes: Two. (twice) / Two. Three. / Two. Four. / One.
    assert (counts.steps, counts.prefixes, counts.samples) == (5, 4, 16)
    first, second, third, fourth = together.traces
    assert first.labels["accuracy"][0] == second.labels["accuracy"][0]
    assert third.labels["accuracy"][0] == third.outcome["accuracy"]  # type: ignore[index]
    alone = [labelled([one])[0].traces[0] for one in TRACES]
    assert [one.labels for one in together.traces] == [one.labels for one in alone]
    assert fourth.labels == labelled(TRACES[::-1])[0].traces[0].labels


def test_every_prompt_and_step_is_encoded_once() -> None:
    _, continuer, _ = labelled(TRACES)
    chat = ChatFormat(TOKENIZER)
    inner = ["Two.\n\n", "Three.\n\n", "Four.\n\n", "One.\n\n"]
    wanted = sum(len(chat.prompt_ids(TRACES[n].prompt)) for n in (0, 3))
    assert continuer.counts.tokens_encoded == wanted + sum(len(chat.encode_reply(s)) - 1 for s in inner)


def test_adaptive_sampling_saves_what_it_says() -> None:
    adaptive = AdaptiveConfig(round=1, confidence=0.9, threshold=0.5)
    found, continuer, recorder = labelled(TRACES[:1], program="never", samples=8, adaptive=adaptive)
    # Decided after three failures: 3 of 8 for each of the two inner prefixes.
    assert (continuer.counts.samples, continuer.counts.samples_full) == (6, 16)
    assert found.traces[0].labels == {"accuracy": [0.0, 0.0, 0.0]}
    _, full, _ = labelled(TRACES[:1], program="never", samples=8)
    assert full.counts.samples == 16 and len(recorder.seen) <= 7


def test_objectives_of_different_supervision_share_the_continuations() -> None:
    found, continuer, recorder = labelled(TRACES[:1], (VALUE, VOTE, PREFIX), gamma=1.0)
    (one,) = found.traces
    value, vote = one.labels["accuracy"], one.labels["clear"]
    assert vote == [float(v > 0.5) for v in value]  # type: ignore[operator]
    begun = [tuple(TRACES[0].steps[:n]) for n in (1, 2, 3)]
    shown = [Judged(tuple(TRACES[0].prompt), steps, "5", "") for steps in begun]
    assert one.labels["kind"] == [float(z) for z in recorder.judge.score(shown)]  # type: ignore[arg-type]
    assert continuer.counts.samples == 8
    assert one.outcome is not None and set(one.outcome) == {"accuracy", "clear"}


def test_what_does_not_fit_or_gets_no_verdict_is_named() -> None:
    long = trace("long", "2+3?", "x" * 200, "So 5")
    found, _, _ = labelled([long, TRACES[0]])
    assert [one.id for one in found.traces] == ["a"]
    assert found.unjudged == {"accuracy": 2} and found.labels == {"accuracy": 3}
    assert "trace 'long', step 1, accuracy: 2" in found.bad[0].reason
    assert "do not fit the policy's context of 160" in found.bad[0].reason
    mute, _, _ = labelled(TRACES[:1], (VALUE, PREFIX), program="nothing")
    assert mute.traces == [] and mute.unjudged == {"accuracy": 3, "kind": 3}
    assert "label_judges:nothing returned None, not a number" in mute.bad[0].reason


def test_responses_to_prompts_are_cut_into_steps() -> None:
    config = ContinuationsConfig(policy="unused here", sampling=SamplingConfig(max_new_tokens=40))
    continuer = Continuer(POLICY, ChatFormat(TOKENIZER), MathBoundary(), "\n\n", config, seed=3)
    prompts = [trace("p", "2+3?"), trace("q", "1?")]
    found = continuer.respond(prompts, 3)
    assert {one.id for one in found} <= {f"{p}/{n}" for p in "pq" for n in (1, 2, 3)} and len(found) >= 4
    assert all(step.strip() for one in found for step in one.steps)
    again = Continuer(POLICY, ChatFormat(TOKENIZER), MathBoundary(), "\n\n", config, seed=3)
    assert again.respond(prompts[1:], 3) == [one for one in found if one.id.startswith("q")]


class WrongFrom(Judge):
    """A response is wrong where its steps have the word: continuations mend nothing and break nothing."""

    def score(self, items: Sequence[Judged]) -> list[float | Unjudged]:
        return [0.0 if any("wrong" in step for step in item.steps) else 1.0 for item in items]


def chain(name: str, length: int, wrong: int | None) -> StepTrace:
    steps = [f"wrong {n}." if n == wrong else f"Step {n}." for n in range(1, length + 1)]
    return trace(name, f"{name}?", *steps)


def test_the_first_error_is_found_by_halving() -> None:
    """The labels of continuing every step, from the logarithm of as many continuations."""
    traces = [chain(f"t{wrong}", 9, wrong) for wrong in (None, *range(1, 10))] + [chain("one", 1, 1)]
    found = {}
    for search in (False, True):
        config = ContinuationsConfig(
            policy="unused here", sampling=SAMPLING, samples=2, search_first_error=search
        )
        continuer = Continuer(POLICY, ChatFormat(TOKENIZER), MathBoundary(), "\n\n", config, seed=3)
        judges = [ObjectiveJudge(VOTE, WrongFrom(), 0.5)]
        result = Labeller(judges, continuer, config, "\n\n", "job").label(traces)
        found[search] = [one.labels["clear"] for one in result.traces]
        counts = continuer.counts
        assert (counts.steps, counts.samples_full) == (80, 160)
        if not search:
            assert counts.prefixes == 80  # all inner prefixes differ
        else:
            # A right response needs none; the first error among 9 steps at most log2(9) prefixes.
            assert counts.samples == 2 * counts.prefixes <= 2 * 9 * 4
    assert found[True] == found[False]
    assert found[True][3] == [1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_values_are_not_searched() -> None:
    with pytest.raises(ValueError, match="or continue every step"):
        LabelConfig.model_validate(
            {
                "name": "x",
                "output": "x",
                "domain": "math",
                "objectives": [VALUE.model_dump()],
                "judges": {"accuracy": {"kind": "checker"}},
                "continuations": {"policy": "p", "search_first_error": True},
            }
        )
