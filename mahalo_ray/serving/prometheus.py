"""The figures of GET /metrics, in Prometheus' text format.

They are one replica's own: with several replicas a scrape meets one of them, which the label `replica` names.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mahalo_ray.decoding.guidance import GuidedResult
from mahalo_ray.serving.answer_job import Answer, ModelLoad
from mahalo_ray.serving.model_thread import Job, ModelThread

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_UNKNOWN_PATH = "other"  # a label for each address that somebody tries would never end


class ReplicaMetrics:
    """One replica's figures of one of its models. `worker` and `usage` are looked at when somebody asks for
    the figures."""

    def __init__(
        self, worker: ModelThread, usage: Callable[[], ModelLoad], objectives: Sequence[str], model: str
    ) -> None:
        self.registry = CollectorRegistry()
        self._replica, self._model = f"{socket.gethostname()}-{os.getpid()}", model
        place = self._replica, self._model
        labels: dict[str, Any] = {"registry": self.registry, "labelnames": ["replica", "model"]}
        self.requests = Counter(
            "mahalo_requests",
            "Requests, by address and status",
            ["path", "status", "replica"],
            registry=self.registry,
        )
        self._first_step = Histogram(
            "mahalo_first_step_seconds",
            "From a request's arrival to its first accepted step (a token where nothing is chosen)",
            buckets=_SECONDS,
            **labels,
        ).labels(*place)
        self._step = Histogram(
            "mahalo_step_seconds",
            "From one accepted step of a request to the next",
            buckets=_SECONDS,
            **labels,
        ).labels(*place)
        self._queue = Histogram(
            "mahalo_queue_seconds", "From a request's arrival to its start", buckets=_SECONDS, **labels
        ).labels(*place)
        self._answer = Histogram(
            "mahalo_answer_seconds",
            "From a request's arrival to the end of its answers",
            buckets=_SECONDS,
            **labels,
        ).labels(*place)
        self._prompt_tokens = Counter("mahalo_prompt_tokens", "Tokens of prompts", **labels).labels(*place)
        self._answer_tokens = Counter("mahalo_answer_tokens", "Tokens of answers", **labels).labels(*place)
        self._sampled_tokens = Counter(
            "mahalo_sampled_tokens", "Tokens of all candidates, chosen or not", **labels
        ).labels(*place)
        self._lift = Summary(
            "mahalo_guidance_lift",
            "The chosen candidate's score above the mean of its step's candidates, by objective",
            ["objective", "replica", "model"],
            registry=self.registry,
        )
        for objective in objectives:
            self._lift.labels(objective, self._replica, self._model)
        self.registry.register(_LoadCollector(worker, usage, place))

    def observe_answers(self, job: Job, answers: Sequence[Answer]) -> None:
        """Count a request that was answered."""
        now = time.monotonic()
        self._queue.observe(job.admitted_at - job.arrived_at)
        self._answer.observe(now - job.arrived_at)
        for before, after in zip(job.steps_at, job.steps_at[1:], strict=False):
            self._step.observe(after - before)
        if job.steps_at:
            self._first_step.observe(job.steps_at[0] - job.arrived_at)
        for answer in answers:
            self._observe_result(answer.result)

    def _observe_result(self, result: GuidedResult) -> None:
        self._prompt_tokens.inc(result.prompt_tokens)
        self._answer_tokens.inc(len(result.token_ids))
        for step in result.steps:
            self._sampled_tokens.inc(sum(len(candidate.token_ids) for candidate in step.candidates))
            for objective, score in step.accepted.scores.items():
                mean = sum(c.scores[objective] for c in step.candidates) / len(step.candidates)
                self._lift.labels(objective, self._replica, self._model).observe(score - mean)

    def count_request(self, path: str, status: int) -> None:
        """Count a request by its address and the status of its answer."""
        self.requests.labels(path, str(status), self._replica).inc()


class _JoinedFigures(Collector):
    """The figures of several models of one replica: families of one name are one family."""

    def __init__(self, each: Sequence[ReplicaMetrics]) -> None:
        self._each = each

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for metric in (family for metrics in self._each for family in metrics.registry.collect()):
            if metric.name in families:
                families[metric.name].samples += metric.samples
            else:
                families[metric.name] = metric
        return families.values()


def exposition(each: Sequence[ReplicaMetrics]) -> bytes:
    """All figures of a replica's models, as Prometheus reads them."""
    registry = CollectorRegistry()
    registry.register(_JoinedFigures(each))
    return generate_latest(registry)


class _LoadCollector(Collector):
    """What the models are at now."""

    def __init__(self, worker: ModelThread, usage: Callable[[], ModelLoad], place: tuple[str, str]) -> None:
        self._worker, self._usage, self._place = worker, usage, place

    def collect(self) -> Iterator[GaugeMetricFamily]:
        load = self._usage()
        running, waiting = self._worker.count_running_and_waiting()
        for name, text, value in (
            ("mahalo_requests_running", "Requests that are being answered", running),
            ("mahalo_requests_waiting", "Requests that wait for a place", waiting),
            ("mahalo_rows", "Candidates that are being decoded", load.rows),
            ("mahalo_cache_bytes", "Keys and values of the policy", load.cache_bytes),
        ):
            family = GaugeMetricFamily(name, text, labels=["replica", "model"])
            family.add_metric(self._place, value)
            yield family


class CountRequests:
    """ASGI middleware: counts every request in `metrics`."""

    def __init__(self, app: ASGIApp, metrics: ReplicaMetrics, paths: frozenset[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if path not in self._paths:
            path = _UNKNOWN_PATH
        status = 500

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        finally:
            self._metrics.count_request(path, status)
