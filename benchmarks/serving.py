"""The endpoint of a finished run under load, over raw sockets from a process of its own.

Three measurements, one after the other, on one endpoint:

- levels: 1, 4, 16 and 64 guided requests at a time; throughput, and median, 95th and 99th percentile of the
  time to the first step and to the whole answer. The same questions are then answered by the same decoder in
  one process, as many at a time, without Serve and HTTP.
- overload: requests arrive at random times (open loop) at `--overload` times the throughput of 16 at a time;
  good answers a second, and how fast and in what form the others are refused.
- health: how long GET /health takes meanwhile.

`RUN` is the output folder of a finished run; with `--url` an endpoint that runs already is measured.

    python benchmarks/serving.py runs/quickstart --requests 96 --output serving.json
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import yaml
from measuring import machine, table, write_results

from mahalo_ray.config import RunConfig, SamplingParams

CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Outcome:
    """One request: seconds to the first step's bytes and to the end, status, and whether what came was whole
    and, where it was an error, in OpenAI's form."""

    status: int
    first_s: float
    whole_s: float
    text: str
    is_whole: bool


def questions(config: RunConfig, count: int) -> list[str]:
    """What students of the run's world ask first."""
    from mahalo_ray.domains.tutoring.student import TutoringEpisode
    from mahalo_ray.pipeline.seed_blocks import first_seed

    start = first_seed(config.seed, "evaluation")
    return [TutoringEpisode.from_seed(start + number).opening for number in range(count)]


def body_of(question: str, number: int, stream: bool) -> bytes:
    """A guided request with the run's own defaults."""
    messages = [{"role": "user", "content": question}]
    return json.dumps({"model": "mahalo", "messages": messages, "seed": number, "stream": stream}).encode()


async def ask(address: tuple[str, int], prefix: str, body: bytes) -> Outcome:
    """One streamed request over a socket of its own."""
    started = time.perf_counter()
    first = 0.0
    reader, writer = await asyncio.open_connection(*address)
    try:
        head = (
            f"POST {prefix}{CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        received = bytearray()
        while part := await reader.read(65536):
            received += part
            # The first event comes before any step; a step is the first with text in it.
            if not first and b'"mahalo":' in received:
                first = time.perf_counter() - started
    finally:
        writer.close()
    whole = time.perf_counter() - started
    head_bytes, _, answer = bytes(received).partition(b"\r\n\r\n")
    status = int(head_bytes.split(b" ", 2)[1]) if head_bytes else 0
    if status == 200:
        return Outcome(200, first, whole, _text_of(answer), b"data: [DONE]" in answer)
    return Outcome(status, whole, whole, "", b'"error":' in answer.replace(b'"error" :', b'"error":'))


def _text_of(answer: bytes) -> str:
    text = ""
    for line in answer.decode(errors="replace").splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: ")).get("choices", ()):
                text += choice["delta"].get("content") or ""
    return text


async def closed_loop(url: str, bodies: Sequence[bytes], at_once: int) -> tuple[list[Outcome], float]:
    """All bodies, so many at a time; outcomes in their order and the seconds it took."""
    address, prefix = _address(url)
    outcomes: list[Outcome | None] = [None] * len(bodies)
    numbers = itertools.count()

    async def client() -> None:
        while (number := next(numbers)) < len(bodies):
            outcomes[number] = await ask(address, prefix, bodies[number])

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(at_once)))
    return [outcome for outcome in outcomes if outcome is not None], time.perf_counter() - started


async def open_loop(
    url: str, bodies: Sequence[bytes], per_second: float, seconds: float
) -> tuple[list[Outcome], list[float], float]:
    """Requests at random times, whatever becomes of those before: outcomes, seconds of GET /health, and how
    long it all took."""
    address, prefix = _address(url)
    rng = random.Random(0)
    asked: list[asyncio.Task[Outcome]] = []
    health: list[float] = []
    over = asyncio.Event()

    async def look() -> None:
        while not over.is_set():
            began = time.perf_counter()
            reader, writer = await asyncio.open_connection(*address)
            writer.write(f"GET {prefix}/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            await reader.read()
            writer.close()
            health.append(time.perf_counter() - began)
            await asyncio.sleep(0.25)

    looking = asyncio.create_task(look())
    started = time.perf_counter()
    due = started
    for number in itertools.count():
        due += rng.expovariate(per_second)
        if due - started > seconds:
            break
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        asked.append(asyncio.create_task(ask(address, prefix, bodies[number % len(bodies)])))
    outcomes = await asyncio.gather(*asked)
    took = time.perf_counter() - started
    over.set()
    await looking
    return list(outcomes), health, took


def _address(url: str) -> tuple[tuple[str, int], str]:
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    return (parts.hostname, parts.port), parts.path.rstrip("/")


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and the largest."""
    if not values:
        return {}
    found = np.percentile(values, (50, 95, 99, 100))
    return dict(zip(("p50", "p95", "p99", "max"), (round(float(value), 4) for value in found), strict=True))


def measure_level(url: str, bodies: Sequence[bytes], at_once: int) -> dict[str, Any]:
    """One level, in the client's process."""
    outcomes, seconds = asyncio.run(closed_loop(url, bodies, at_once))
    good = [outcome for outcome in outcomes if outcome.status == 200]
    return {
        "at_once": at_once,
        "requests": len(outcomes),
        "answers_per_s": len(good) / seconds,
        "not_200": len(outcomes) - len(good),
        "not_whole": sum(not outcome.is_whole for outcome in outcomes),
        "first_step_s": percentiles([outcome.first_s for outcome in good]),
        "whole_s": percentiles([outcome.whole_s for outcome in good]),
        "texts": [outcome.text for outcome in outcomes],
    }


def measure_overload(url: str, bodies: Sequence[bytes], per_second: float, seconds: float) -> dict[str, Any]:
    """Overload, in the client's process."""
    outcomes, health, took = asyncio.run(open_loop(url, bodies, per_second, seconds))
    good = [outcome for outcome in outcomes if outcome.status == 200]
    refused = [outcome for outcome in outcomes if outcome.status != 200]
    statuses = {str(s): sum(o.status == s for o in outcomes) for s in sorted({o.status for o in outcomes})}
    return {
        "arrivals_per_s": per_second,
        "requests": len(outcomes),
        "statuses": statuses,
        "good_answers_per_s": len(good) / took,
        "not_in_openai_form": sum(not outcome.is_whole for outcome in outcomes),
        "refusal_s": percentiles([outcome.whole_s for outcome in refused]),
        "good_whole_s": percentiles([outcome.whole_s for outcome in good]),
        "health_s": percentiles(health),
    }


def in_process(run: str, config: RunConfig, asked: Sequence[str], at_once: int) -> dict[str, Any]:
    """The same questions by the same decoder, without Serve and HTTP, so many in flight at a time."""
    from mahalo_ray.decoding import GuidedDecoder
    from mahalo_ray.decoding.guidance import GuidedRequest
    from mahalo_ray.decoding.policy import DeviceConfig, load_policy, load_step_scorer
    from mahalo_ray.pipeline.artifacts import run_model

    placement = DeviceConfig(config.cluster.device, config.model.dtype)
    policy, chat = load_policy(run_model(run, "policy"), placement)
    reward = load_step_scorer(run_model(run, "reward"), placement)
    candidates = config.guided.num_candidates
    decoder = GuidedDecoder(policy, reward, "tutoring", chat.tokenizer, at_once * candidates)
    weights, guidance = config.guided.point
    sampling = config.evaluation.sampling
    requests = [
        GuidedRequest(
            [{"role": "user", "content": question}],
            weights=weights,
            guidance=guidance,
            num_candidates=candidates,
            seed=number,
            sampling=SamplingParams(**sampling.model_dump(include=set(SamplingParams.model_fields))),
            max_new_tokens=sampling.max_new_tokens,
            max_step_tokens=sampling.max_new_tokens,
            standardisation="calibrated" if decoder.scale.is_calibrated else "within_candidates",
        )
        for number, question in enumerate(asked)
    ]
    decoder.generate_each(requests[: 2 * at_once])  # merged heads and kernels are made at the first call
    started = time.perf_counter()
    results = decoder.generate_each(requests)
    seconds = time.perf_counter() - started
    texts = ["" if isinstance(result, ValueError) else result.text for result in results]
    return {"at_once": at_once, "answers_per_s": len(requests) / seconds, "texts": texts}


@contextmanager
def endpoint(run: str, config: RunConfig) -> Iterator[str]:
    """The run's endpoint on a free port of a private Ray."""
    from mahalo_ray.cli.common import open_session
    from mahalo_ray.pipeline.artifacts import run_model
    from mahalo_ray.serving.launch import start
    from mahalo_ray.serving.service import Defaults

    weights, guidance = config.guided.point
    settings = config.serve.model_copy(update={"port": 0, "api_key_env": None, "api_key_file": None})
    defaults = Defaults(weights, guidance, config.guided.num_candidates, config.evaluation.sampling)
    models = (run_model(run, stage) for stage in ("policy", "reward"))
    with (
        open_session(config),
        start(settings, *models, defaults=defaults, dtype=config.model.dtype) as serving,
    ):
        yield serving.url


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="output folder of a finished run")
    parser.add_argument("--url", default=None, help="an endpoint of this run that is up already")
    parser.add_argument("--levels", default="1,4,16,64", help="requests at a time")
    parser.add_argument("--requests", type=int, default=96, help="of each level, at least 3 for each client")
    parser.add_argument("--overload", type=float, default=4.0, help="times the throughput of 16 at a time")
    parser.add_argument("--seconds", type=float, default=20.0, help="of overload; 0: none")
    parser.add_argument("--threads", type=int, default=None, help="of torch, in this process")
    parser.add_argument("--output", type=Path, default=None, help="results as JSON")
    options = parser.parse_args()
    config = RunConfig.model_validate(yaml.safe_load((Path(options.run) / "config.yaml").read_text()))
    levels = [int(level) for level in options.levels.split(",")]
    results: dict[str, Any] = {"machine": machine(), "levels": [], "in_process": []}
    if options.url is not None:
        measure(options, config, options.url, levels, results)
    else:
        with endpoint(options.run, config) as url:
            measure(options, config, url, levels, results)
    compare_in_process(options, config, levels, results)
    show(results)
    if options.output is not None:
        write_results(options.output, results)


def counts(options: argparse.Namespace, levels: Sequence[int]) -> dict[int, int]:
    """Requests of every level."""
    return {level: max(options.requests, 3 * level) if level > 1 else options.requests for level in levels}


def measure(
    options: argparse.Namespace, config: RunConfig, url: str, levels: Sequence[int], results: dict[str, Any]
) -> None:
    """Levels and overload, by a client in a process of its own."""
    wanted = counts(options, levels)
    asked = questions(config, max(wanted.values()))
    bodies = [body_of(question, number, stream=True) for number, question in enumerate(asked)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as client:
        client.submit(measure_level, url, bodies[:8], 4).result()  # warm
        for level in levels:
            results["levels"].append(
                client.submit(measure_level, url, bodies[: wanted[level]], level).result()
            )
        best = max(found["answers_per_s"] for found in results["levels"])
        if options.seconds:
            rate = options.overload * best
            results["overload"] = client.submit(measure_overload, url, bodies, rate, options.seconds).result()


def compare_in_process(
    options: argparse.Namespace, config: RunConfig, levels: Sequence[int], results: dict[str, Any]
) -> None:
    """The same without the endpoint, and whether the answers are the same."""
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    wanted = counts(options, levels)
    asked = questions(config, max(wanted.values()))
    for level in levels:
        results["in_process"].append(in_process(options.run, config, asked[: wanted[level]], level))
    for served, alone in zip(results["levels"], results["in_process"], strict=True):
        pairs = zip(served.pop("texts"), alone.pop("texts"), strict=True)
        served["different_from_in_process"] = sum(one != other for one, other in pairs)


def show(results: dict[str, Any]) -> None:
    """The results as tables."""
    header = [
        "at a time",
        "answers/s",
        "in process",
        "first step p50",
        "p95",
        "p99",
        "whole p50",
        "p95",
        "p99",
        "differ",
    ]
    rows = [
        [
            str(level["at_once"]),
            f"{level['answers_per_s']:.1f}",
            f"{alone['answers_per_s']:.1f}",
            *(
                f"{level[key].get(p, float('nan')):.3f}"
                for key in ("first_step_s", "whole_s")
                for p in ("p50", "p95", "p99")
            ),
            str(level["different_from_in_process"]),
        ]
        for level, alone in zip(results["levels"], results["in_process"], strict=True)
    ]
    print(table(header, rows))
    if "overload" in results:
        print("\noverload: " + json.dumps(results["overload"]))


if __name__ == "__main__":
    main()
