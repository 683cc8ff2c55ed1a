"""An endpoint's decoder in a process of its own, without Serve and HTTP: what `serving.py` compares with."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mahalo_ray.config import RunConfig, SamplingParams


class ThreadSeconds(NamedTuple):
    """What a thread did: `computing`, and `waiting` for a processor that another thread had."""

    computing: float
    waiting: float

    def since(self, before: ThreadSeconds) -> ThreadSeconds:
        """The difference to an earlier reading."""
        return ThreadSeconds(self.computing - before.computing, self.waiting - before.waiting)


def threads_of(pid: int) -> dict[int, ThreadSeconds]:
    """All threads of a process as the kernel has counted them; empty where it does not tell (not Linux)."""
    found = {}
    for folder in Path(f"/proc/{pid}/task").glob("*"):
        try:
            computing, waiting, _ = map(int, (folder / "schedstat").read_text().split())
        except OSError:  # the thread has ended
            continue
        found[int(folder.name)] = ThreadSeconds(computing / 1e9, waiting / 1e9)
    return found


def busiest(before: dict[int, ThreadSeconds], after: dict[int, ThreadSeconds]) -> ThreadSeconds | None:
    """What the thread did between two readings that computed most; None where the kernel does not tell."""
    none = ThreadSeconds(0.0, 0.0)
    spent = [seconds.since(before.get(thread, none)) for thread, seconds in after.items()]
    return max(spent, default=None)


@dataclass(frozen=True)
class Answered:
    """Texts, the seconds until all were there, and what the thread of the models did meanwhile."""

    texts: list[str]
    seconds: float
    thread: ThreadSeconds | None


class SameDecoder:
    """A process that answers questions as the endpoint's replica does, with as many threads."""

    def __init__(self, run: str, config: RunConfig) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._pool.submit(_load, run, config).result()

    def answer(self, questions: Sequence[str], first_seed: int, num_at_once: int) -> Answered:
        """These questions with successive seeds, so many in flight at a time."""
        return self._pool.submit(_answer, list(questions), first_seed, num_at_once).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


_loaded: dict[str, Any] = {}  # in that process


def _load(run: str, config: RunConfig) -> None:
    import torch

    from mahalo_ray.decoding.policy import DeviceConfig, load_policy, load_step_scorer
    from mahalo_ray.pipeline.artifacts import run_model

    torch.set_num_threads(max(1, int(config.serve.cpus_per_replica)))  # as Ray gives a replica
    placement = DeviceConfig.of(config.cluster, config.model.dtype)
    policy, chat = load_policy(run_model(run, "policy"), placement)
    reward = load_step_scorer(run_model(run, "reward"), placement)
    _loaded.update(config=config, policy=policy, reward=reward, tokenizer=chat.tokenizer, decoders={})


def _answer(questions: list[str], first_seed: int, num_at_once: int) -> Answered:
    from mahalo_ray.decoding import GuidedDecoder
    from mahalo_ray.decoding.guidance import GuidedRequest

    config: RunConfig = _loaded["config"]
    candidates, decoders = config.guided.num_candidates, _loaded["decoders"]
    is_new = num_at_once not in decoders
    if is_new:
        models = _loaded["policy"], _loaded["reward"], "tutoring", _loaded["tokenizer"]
        decoders[num_at_once] = GuidedDecoder(*models, num_at_once * candidates)
    decoder: GuidedDecoder = decoders[num_at_once]
    weights, guidance = config.guided.point
    sampling = config.evaluation.sampling
    requests = [
        GuidedRequest(
            [{"role": "user", "content": question}],
            weights=weights,
            guidance=guidance,
            num_candidates=candidates,
            seed=seed,
            sampling=SamplingParams(**sampling.model_dump(include=set(SamplingParams.model_fields))),
            max_new_tokens=sampling.max_new_tokens,
            max_step_tokens=sampling.max_new_tokens,
            standardisation="calibrated" if decoder.scale.is_calibrated else "within_candidates",
        )
        for seed, question in enumerate(questions, start=first_seed)
    ]
    if is_new:
        decoder.generate_each(requests[: 2 * num_at_once])  # heads are merged and kernels made at first
    before, started = threads_of(os.getpid()), time.perf_counter()
    results = decoder.generate_each(requests)
    seconds = time.perf_counter() - started
    thread = busiest(before, threads_of(os.getpid()))
    texts = ["" if isinstance(result, ValueError) else result.text for result in results]
    return Answered(texts, seconds, thread)
