"""The driver's side of rollouts: memory with a long queue, and actors whose students are slow."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from measuring import PeakMemory, table
from rollout_engine import GRID, REPLY
from shapes import TINY

from mahalo_ray.config import (
    ActorsConfig,
    EndpointConfig,
    EndpointStudentConfig,
    ModelTutorConfig,
    PlayConfig,
    SamplingConfig,
)
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.domains.tutoring.personas import load_cases
from mahalo_ray.rollouts.dialogue_job import (
    CASES,
    DialogueChunk,
    DialogueChunks,
    DialogueSummary,
    RolloutJob,
    RolloutReport,
    RolloutSpec,
)
from mahalo_ray.rollouts.pool import ActorPool

LATENCY_S = 0.2


class NoWork:
    """An actor that has nothing to do: what is left is the driver's own work."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def play(self, chunk: DialogueChunk) -> DialogueSummary:
        return DialogueSummary(dialogues=len(chunk.seeds), actor="a")


class IdleJob(RolloutJob):
    """Rollouts by such actors."""

    worker_class = NoWork


def queue(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The driver's memory with a queue of n dialogues, chunks of 32, on an actor that plays nothing; and
    beside it that of a loop which does nothing but call the actor as often."""
    found = []
    with _ray(2), tempfile.TemporaryDirectory() as folder:
        spec = _spec(
            folder, EndpointConfig(base_url="http://127.0.0.1:1", model="m"), folder, PlayConfig(turns=1)
        )
        for size in [sizes[0], *sizes]:  # the first round warms up
            chunks = DialogueChunks(0, size, 32)
            grown, seconds = _grown(lambda chunks=chunks: _driver(spec, chunks))
            bare, _ = _grown(lambda chunks=chunks: _calls_alone(spec, chunks))
            found.append(
                {"queued": size, "grown_bytes": grown, "calls_alone_bytes": bare, "seconds": seconds}
            )
    found = found[1:]
    rows = [
        [
            str(f["queued"]),
            f"{f['grown_bytes'] / 2**20:.1f} MiB",
            f"{f['calls_alone_bytes'] / 2**20:.1f} MiB",
            f"{f['seconds'] / f['queued'] * 1e6:.0f}",
        ]
        for f in found
    ]
    print("\nthe driver's memory above what it had before, at its peak")
    print(table(["dialogues queued", "driver", "Ray's calls alone", "driver, us per dialogue"], rows))
    return found


def _grown(work: Callable[[], None]) -> tuple[int, float]:
    """Bytes at the peak above those before, and seconds."""
    memory = PeakMemory(torch.device("cpu"))
    before = memory.now()
    memory.reset()
    began = time.perf_counter()
    work()
    return memory.peak() - before, time.perf_counter() - began


def _driver(spec: RolloutSpec, chunks: DialogueChunks) -> None:
    one = ActorsConfig(rollout_actors=1)
    report = RolloutReport()
    IdleJob(
        spec.output_url, spec, chunks, chunks.dialogues, one, lambda done, total, note: None, report
    ).run()
    assert report.dialogues == chunks.dialogues


def _calls_alone(spec: RolloutSpec, chunks: DialogueChunks) -> None:
    actor = ray.remote(NoWork).options(num_cpus=1).remote(spec)
    for chunk in chunks:
        ray.get(actor.play.remote(chunk))
    ray.kill(actor)


def actors(counts: Sequence[int], quick: bool) -> list[dict[str, Any]]:
    """Dialogues/s of n actors whose students take 200 ms to answer; actors that still start do not count."""
    found = []
    per_chunk, turns, chunks = 2, 4, 4 if quick else 8
    with tempfile.TemporaryDirectory() as folder, _student_server() as url, _ray(max(counts)):
        model, tokenizer = TINY.build(0, torch.float32, torch.device("cpu")), TINY.tokenizer()
        model.save_pretrained(f"{folder}/tutor")
        tokenizer.save_pretrained(f"{folder}/tutor")
        Path(folder, "cases.json").write_bytes(CASES.dump_json(load_cases(GRID)[0]))
        setting = PlayConfig(turns=turns, candidates=1, sampling=SamplingConfig(max_new_tokens=4))
        for n in counts:
            endpoint = EndpointConfig(base_url=url, model="m", concurrency=per_chunk * n)
            spec = _spec(folder, endpoint, f"{folder}/out{n}", setting, actors=n)
            rate = _rate(spec, DialogueChunks(0, n * chunks * per_chunk, per_chunk), n)
            found.append({"actors": n, "dialogues_per_s": rate})
    one = found[0]["dialogues_per_s"]
    for line in found:
        line["of_linear"] = line["dialogues_per_s"] / one / line["actors"]
    print(
        f"\nstudents answer in {LATENCY_S * 1000:.0f} ms; {turns} turns, {per_chunk} dialogues in flight each"
    )
    rows = [[str(f["actors"]), f"{f['dialogues_per_s']:.1f}", f"{f['of_linear']:.2f}"] for f in found]
    print(table(["actors", "dialogues/s", "of linear"], rows))
    return found


def _rate(spec: RolloutSpec, chunks: DialogueChunks, n: int) -> float:
    """Dialogues/s from when every actor has finished a chunk until the last chunk that leaves none idle."""
    pool = ActorPool(RolloutJob.worker_class, spec, ActorsConfig(rollout_actors=n), iter(chunks))
    at_work: set[str] = set()
    times = []
    for number, summary in enumerate(pool.results()):
        at_work.add(summary.actor)
        if len(at_work) == n and number < len(chunks) - n + 1:
            times.append(time.perf_counter())
    if len(times) < 2:
        raise SystemExit(f"{n} actors: too few chunks while all were at work; run it on a quieter machine")
    return chunks.size * (len(times) - 1) / (times[-1] - times[0])


def _spec(
    folder: str, endpoint: EndpointConfig, output: str, setting: PlayConfig, actors: int = 1
) -> RolloutSpec:
    return RolloutSpec(
        tutor=ModelTutorConfig(path=f"{folder}/tutor"),
        student=EndpointStudentConfig(endpoint=endpoint),
        play=setting,
        output_url=output,
        purpose="benchmark",
        placement=DeviceConfig(),
        threads=1,
        actors=actors,
        cases_url=f"{folder}/cases.json",
    )


@contextmanager
def _ray(cpus: int) -> Iterator[None]:
    ray.init(address="local", num_cpus=cpus + 1, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _student_server() -> Iterator[str]:
    """A server that answers every chat after LATENCY_S, any number at once."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": REPLY}}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    body = json.dumps(
        {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }
    )
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    answer = (head + body).encode()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().lower().split("\r\n")
                length = next(
                    int(line.partition(":")[2]) for line in lines if line.startswith("content-length")
                )
                await reader.readexactly(length)
                await asyncio.sleep(LATENCY_S)
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(talk, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
