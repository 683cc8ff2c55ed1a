"""Guided decoding three ways, and unguided: the same models, prompt, random draws and, so, the same answer.

Every way samples with mahalo_ray's own draws, which depend on (seed, candidate, position) only; what differs
is which state is kept and what is computed again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from decoding_task import Models, Outcome, Task, without
from torch import Tensor
from transformers import DynamicCache

from mahalo_ray.decoding.guidance import within_candidates
from mahalo_ray.decoding.sampling import SamplingBatch, SamplingParams, draw, draw_keys, uniforms
from mahalo_ray.decoding.session import GuidedSession
from mahalo_ray.models import TokenTrace


class _Baseline:
    """The policy over a transformers cache and the reward model over whole texts; counts what it does."""

    def __init__(self, models: Models, task: Task) -> None:
        self.models, self.task = models, task
        self.device = models.policy.device
        self.done = Outcome()

    def forward(self, input_ids: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [B, V] behind the last of input_ids [B, T]; the cache grows by T."""
        self.done.policy_tokens += input_ids.numel()
        out = self.models.policy(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return without(out.logits[:, -1], self.models.shape.end_id)

    @property
    def keys(self) -> Tensor:
        """Keys [K] of the next step's draws, as the engine's: the step counts where there is a choice."""
        step = len(self.done.choices) if self.task.candidates > 1 else 0
        return draw_keys([self.task.seed], self.task.candidates, self.device, [step])[0]

    def decode(self, logits: Tensor, cache: DynamicCache, keys: Tensor, position: int) -> list[list[int]]:
        """A step of every row. The last token has not gone through the model yet."""
        sampling = SamplingParams(temperature=self.task.temperature)
        params = SamplingBatch.of([sampling] * len(keys), self.device)
        drawn: list[Tensor] = []
        for at in range(self.task.step_tokens):
            if drawn:
                logits = self.forward(drawn[-1][:, None], cache)
            uniform = uniforms(keys, torch.full_like(keys, position + at))
            drawn.append(draw(logits, params, uniform, with_logps=False)[0])
        return torch.stack(drawn, dim=1).tolist()

    def score(self, ids: list[int], candidates: list[list[int]]) -> Tensor:
        """Scores [n, H] of candidates as the next step after `ids`; the whole texts are encoded, as one
        batch. The last step is read with the end of the turn behind it, as in training."""
        is_last = len(self.done.choices) == self.task.steps - 1
        steps = [[*own, self.models.shape.end_id] if is_last else own for own in candidates]
        traces = [TokenTrace(ids + step, [len(ids)], [len(ids) + len(step) - 1]) for step in steps]
        self.done.reward_tokens += sum(len(trace.input_ids) for trace in traces)
        return torch.cat(self.models.reward.score_traces(traces, batch_size=len(traces)))

    def choose(self, scores: Tensor | None) -> int:
        """The best candidate by scores [K, H]; None where there is only one."""
        if scores is None:
            self.done.scores.append([])
            chosen = 0
        else:
            self.done.scores.append(scores.tolist())
            chosen = int(within_candidates(scores.double()).mean(dim=1).argmax())
        self.done.choices.append(chosen)
        return chosen

    def tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self.device)


def cache_size(cache: DynamicCache) -> int:
    """Bytes of keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def published(models: Models, task: Task) -> Outcome:
    """One candidate at a time over a deep copy of the kept cache; the reward model reads each whole text."""
    base = _Baseline(models, task)
    ids = task.prompt(models)
    cache = DynamicCache(config=models.policy.config)
    logits = base.forward(base.tensor(ids), cache)
    for _ in range(task.steps):
        offered, caches, scores = [], [], []
        for candidate in range(task.candidates):
            own = copy.deepcopy(cache)
            base.done.cache_bytes_copied += cache_size(own)
            caches.append(own)
            offered += base.decode(logits.clone(), own, base.keys[candidate : candidate + 1], len(ids))
            if task.candidates > 1:
                scores.append(base.score(ids, offered[-1:]))
        held = sum(map(cache_size, [cache, *caches]))
        base.done.policy_cache_bytes = max(base.done.policy_cache_bytes, held)
        chosen = base.choose(torch.cat(scores) if scores else None)
        ids = ids + offered[chosen]
        base.done.token_ids += offered[chosen]
        cache = caches[chosen]
        if len(base.done.choices) < task.steps:
            logits = base.forward(base.tensor(ids[-1:]), cache)
    return base.done


@torch.no_grad()
def reencoded(models: Models, task: Task) -> Outcome:
    """Candidates as one batch, but both models read the whole text again at every step."""
    base = _Baseline(models, task)
    ids = task.prompt(models)
    for _ in range(task.steps):
        cache = DynamicCache(config=models.policy.config)
        logits = base.forward(base.tensor(ids).expand(task.candidates, -1), cache)
        offered = base.decode(logits, cache, base.keys, len(ids))
        base.done.policy_cache_bytes = max(base.done.policy_cache_bytes, cache_size(cache))
        chosen = base.choose(base.score(ids, offered) if task.candidates > 1 else None)
        ids = ids + offered[chosen]
        base.done.token_ids += offered[chosen]
    return base.done


@torch.no_grad()
def plain(models: Models, task: Task) -> Outcome:
    """transformers' own `generate`, no guidance."""
    ids = torch.tensor([task.prompt(models)], device=models.policy.device)
    torch.manual_seed(task.seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if task.temperature > 0:
        sampling = {"do_sample": True, "temperature": task.temperature, "top_k": 0}
    out = models.policy.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=task.steps * task.step_tokens,
        pad_token_id=models.shape.end_id,
        suppress_tokens=[models.shape.end_id],
        **sampling,
    )
    answer = out[0, ids.shape[1] :].tolist()
    return Outcome(token_ids=answer, policy_tokens=ids.shape[1] + len(answer) - 1)


def ours(models: Models, task: Task) -> Outcome:
    """mahalo_ray: both models keep their state, candidates share the prefix."""
    return ours_at_once(models, [task])


def ours_at_once(models: Models, tasks: Sequence[Task]) -> Outcome:
    """Many requests in one session; the answer reported is the first one's."""
    session = models.decoder.session()
    phases = _timed_phases(session, models.clock)
    running = [session.submit(task.request(models.shape)) for task in tasks]
    while session.is_busy:
        session.advance()
    first = running[0].result()
    return Outcome(
        token_ids=first.token_ids,
        choices=[step.chosen for step in first.steps],
        scores=[[list(c.scores.values()) for c in step.candidates if c.scores] for step in first.steps],
        policy_tokens=session.engine.tokens_forwarded,
        reward_tokens=session.scorers.tokens_forwarded,
        policy_cache_bytes=session.engine.peak_bytes,
        reward_cache_bytes=session.scorers.peak_bytes,
        # Accepting copies a step of each request behind both prefixes; nothing else is copied.
        cache_bytes_copied=sum(_accepted_bytes(models, task) for task in tasks),
        phases=phases,
    )


def _accepted_bytes(models: Models, task: Task) -> int:
    read_by = 2 if task.candidates > 1 else 1
    return task.steps * task.step_tokens * models.cache_bytes_per_token() * read_by


def _timed_phases(session: GuidedSession, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds per phase, filled while the session runs. The session's public parts are timed from outside.

    `prefill`: the policy reads prompts; `decode`: candidates, token by token; `score_first`: the reward model
    scores a first step, for which it reads the prompt; `score`: all other steps; `fork_accept`: beginning
    forks and taking the chosen candidates' keys and values over.
    """
    phases = dict.fromkeys(("prefill", "decode", "score_first", "score", "fork_accept"), 0.0)
    scorers = session.scorers
    scored = 0

    def timed(owner: object, name: str, phase: Callable[[], str]) -> None:
        call = getattr(owner, name)

        def clocked(*arguments: Any, **options: Any) -> Any:
            started = clock()
            try:
                return call(*arguments, **options)
            finally:
                phases[phase()] += clock() - started

        setattr(owner, name, clocked)

    def score_phase() -> str:
        nonlocal scored
        scored += 1
        return "score_first" if scored == 1 else "score"

    timed(session.engine, "append", lambda: "prefill")
    timed(session.engine, "step", lambda: "decode")
    timed(session.engine, "start", lambda: "fork_accept")
    timed(session.engine, "collect", lambda: "fork_accept")
    timed(session.engine, "accept", lambda: "fork_accept")
    timed(scorers, "score", score_phase)
    timed(scorers, "accept", lambda: "fork_accept")
    return phases
