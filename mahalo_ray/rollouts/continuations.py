"""Monte-Carlo continuations of step prefixes: equal prefixes are sampled once, and the cache of a prefix is
shared by its samples and by the prefixes that go on from it. No Ray here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from mahalo_ray.config import ContinuationsConfig
from mahalo_ray.data.records import StepTrace
from mahalo_ray.data.row_fields import digest
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.candidates import Candidates
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.policy import HeadMix, Policy
from mahalo_ray.decoding.stopping import (
    AnswerOnly,
    Boundary,
    StopReason,
    StopRule,
    TextStop,
    TokenTexts,
    step_starts,
)
from mahalo_ray.models.scoring import StepEncoder
from mahalo_ray.seeding import derived_seed

Key = tuple[str, str | None, tuple[str, ...]]  # prompt, reference answer, steps


@dataclass
class Prefix:
    """The first steps of one or more traces; `trace` is one of them. `samples`: the steps each continuation
    added."""

    trace: StepTrace
    steps: tuple[str, ...]
    row: int = -1
    samples: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def key(self) -> Key:
        return prefix_key(self.trace, len(self.steps))


@dataclass
class SamplingCounts:
    """What sampling came to. `steps`: inner prefixes of all traces, `prefixes` the distinct ones that were
    continued; `samples_full`: M samples for each distinct inner prefix; `cut`: samples that
    ended at a limit; `tokens_encoded`: those of prompts and steps that went through the policy."""

    steps: int = 0
    prefixes: int = 0
    samples: int = 0
    samples_full: int = 0
    cut: int = 0
    tokens_sampled: int = 0
    tokens_encoded: int = 0


def prefix_key(trace: StepTrace, count: int) -> Key:
    """The same for equal prefixes of equal problems."""
    return digest(trace.prompt), trace.answer, tuple(trace.steps[:count])


class Continuer:
    """A policy that completes responses. Draws depend on `seed` and the prefix alone."""

    def __init__(
        self,
        policy: Policy,
        chat: ChatFormat,
        boundary: Boundary,
        step_separator: str | None,
        settings: ContinuationsConfig,
        seed: int,
    ) -> None:
        self._policy, self._chat, self._boundary = policy, chat, boundary
        self._settings, self._seed = settings, seed
        self._vocabulary = TokenTexts(chat.tokenizer)
        self._encoder = StepEncoder(chat.tokenizer, step_separator)
        self._weights = settings.weights
        policy.check_mix(HeadMix(self._weights))
        self.counts = SamplingCounts()

    def respond(self, prompts: Sequence[StepTrace], responses: int) -> list[StepTrace]:
        """`responses` sampled responses to every prompt, as traces; ValueError if a prompt does not fit."""
        engine = Engine(self._policy)
        rows = engine.add(len(prompts), self._weights)
        engine.append(rows, [self._chat.prompt_ids(trace.prompt) for trace in prompts])
        seeds = [derived_seed(self._seed, "respond", trace.id) for trace in prompts]
        candidates = self._drawn(engine, rows, seeds, responses)
        return [
            trace.model_copy(update={"id": f"{trace.id}/{number}", "steps": list(steps)})
            for trace, responses_ids in zip(prompts, candidates.token_ids, strict=True)
            for number, ids in enumerate(responses_ids, start=1)
            if (steps := self._steps(ids))
        ]

    def context_error(self, trace: StepTrace) -> str | None:
        """Why nothing can be sampled behind the trace's prompt and inner prefixes; None if it can."""
        needed = len(self._chat.prompt_ids(trace.prompt))
        needed += sum(len(self._encoder.step_ids(step)) for step in trace.steps[:-1])
        room = self._policy.max_context
        return None if needed < room else f"{needed} tokens do not fit the policy's context of {room}"

    def sample(
        self,
        traces: Sequence[StepTrace],
        decide: Callable[[list[Prefix]], list[Prefix]],
        wanted: Collection[Key] | None = None,
    ) -> None:
        """Continue every inner prefix of the traces, those of one number of steps at once, M times at most.

        After every round `decide` is given the prefixes with new samples, and says which of them go on.
        `wanted`: only these prefixes are continued; the others are only read on the way.
        """
        engine = Engine(self._policy)
        level = self._prompts(engine, traces)
        depth = 0
        while level:
            depth += 1
            level = self._next_level(engine, level, traces, depth)
            going_on = [p for key, p in level.items() if wanted is None or key in wanted]
            self.counts.prefixes += len(going_on)
            while going_on:
                self._round(engine, going_on)
                going_on = [p for p in decide(going_on) if len(p.samples) < self._settings.samples]

    def count(self, traces: Sequence[StepTrace]) -> None:
        """What continuing every inner prefix of these traces would be."""
        inner = [prefix_key(trace, n) for trace in traces for n in range(1, len(trace.steps))]
        self.counts.steps += len(inner)
        self.counts.samples_full += len(set(inner)) * self._settings.samples

    def _prompts(self, engine: Engine, traces: Sequence[StepTrace]) -> dict[Key, Prefix]:
        prefixes = {prefix_key(trace, 0): Prefix(trace, ()) for trace in traces}
        for prefix, row in zip(prefixes.values(), engine.add(len(prefixes), self._weights), strict=True):
            prefix.row = row
        self._append(engine, [(p, self._chat.prompt_ids(p.trace.prompt)) for p in prefixes.values()])
        return prefixes

    def _next_level(
        self, engine: Engine, level: dict[Key, Prefix], traces: Sequence[StepTrace], depth: int
    ) -> dict[Key, Prefix]:
        """The inner prefixes one step longer, in the engine; rows that nothing goes on from are dropped."""
        children: dict[Key, Prefix] = {}
        grown: dict[Key, list[Prefix]] = {key: [] for key in level}
        for trace in traces:
            if depth >= len(trace.steps):
                continue
            key = prefix_key(trace, depth)
            if key not in children:
                children[key] = Prefix(trace, tuple(trace.steps[:depth]))
                grown[prefix_key(trace, depth - 1)].append(children[key])
        self._take_rows(engine, level, grown)
        steps = [(child, self._encoder.step_ids(child.steps[-1])) for child in children.values()]
        self._append(engine, steps)
        return children

    def _take_rows(self, engine: Engine, level: dict[Key, Prefix], grown: dict[Key, list[Prefix]]) -> None:
        """The first child goes on in its parent's row, the others in copies."""
        others = [(key, child) for key, children in grown.items() for child in children[1:]]
        copies = engine.duplicate([level[key].row for key, _ in others]) if others else []
        for (_, child), row in zip(others, copies, strict=True):
            child.row = row
        for key, children in grown.items():
            if children:
                children[0].row = level[key].row
        engine.drop([level[key].row for key, children in grown.items() if not children])

    def _append(self, engine: Engine, texts: Sequence[tuple[Prefix, list[int]]]) -> None:
        if not texts:
            return
        engine.append([prefix.row for prefix, _ in texts], [ids for _, ids in texts])
        self.counts.tokens_encoded += sum(len(ids) for _, ids in texts)

    def _round(self, engine: Engine, prefixes: Sequence[Prefix]) -> None:
        adaptive = self._settings.adaptive
        count = self._settings.samples if adaptive is None else adaptive.round
        drawn = [min(count, self._settings.samples - len(prefix.samples)) for prefix in prefixes]
        seeds = [derived_seed(self._seed, "continue", *p.key, len(p.samples)) for p in prefixes]
        candidates = self._drawn(engine, [prefix.row for prefix in prefixes], seeds, drawn)
        for prefix, sampled in zip(prefixes, candidates.token_ids, strict=True):
            prefix.samples += [self._steps(ids) for ids in sampled]
        self.counts.samples += sum(drawn)

    def _drawn(
        self, engine: Engine, rows: Sequence[int], seeds: Sequence[int], drawn: int | list[int]
    ) -> Candidates:
        rule = StopRule(AnswerOnly(self._boundary))
        candidates = engine.sample(
            rows,
            drawn,
            self._settings.sampling,
            seeds,
            self._settings.sampling.max_new_tokens,
            self._chat.end_ids,
            TextStop(self._vocabulary, [rule] * len(rows)),
        )
        cut = (StopReason.LENGTH, StopReason.CONTEXT)
        self.counts.cut += sum(reason in cut for reasons in candidates.reasons for reason in reasons)
        self.counts.tokens_sampled += candidates.num_tokens
        return candidates

    def _steps(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """The texts of the steps in sampled tokens, without special tokens; blank ones do not count."""
        starts = step_starts(token_ids, self._boundary, self._vocabulary)
        parts = [token_ids[a:b] for a, b in zip(starts, [*starts[1:], len(token_ids)], strict=True)]
        return tuple(text for text in map(self._chat.decode, parts) if text.strip())
