"""An endpoint of two replicas under load while things go wrong: what clients see.

- a replica is killed (SIGKILL) under 16 clients that ask for whole answers, then under 16 that stream;
- the models of a replica are broken under 16 clients (the weights of its embeddings are cut off, so every
  forward raises), then the thread that drives them ends: how long until another replica is there;
- 300 clients send the head of a request and one byte of its body, over and over, beside 8 that ask;
- 150 clients ask for a stream and never read it, beside 8 that ask.

    python benchmarks/serving_faults.py runs/quickstart --output faults.json     # three minutes
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import endpoint_client
import psutil
import ray
from endpoint_client import CHAT, Outcome, ask, percentiles
from finished_run import read_config
from measuring import machine, table, write_results
from ray import serve
from ray.exceptions import RayActorError
from serving import body_of, endpoint, questions

from mahalo_ray.serving.launch import APP_NAME

_REPLICAS = 2
_REPLACED_WITHIN_S = 240.0


def replicas() -> list[psutil.Process]:
    """The processes that hold the models."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "ServeReplica" in " ".join(process.cmdline()):
                found.append(process)
    return found


async def load(
    url: str, bodies: Sequence[bytes], clients: int, seconds: float, event: Callable[[], Any] | None = None
) -> list[tuple[int, Outcome]]:
    """Clients that ask without a pause and come back when they are told to; `event` after a quarter of the
    time. The number of the question and what came of it, for every request."""
    address, prefix = endpoint_client.address_of(url)
    found: list[tuple[int, Outcome]] = []
    started = time.perf_counter()

    async def client(number: int) -> None:
        while time.perf_counter() - started < seconds:
            outcome = await ask(address, prefix, bodies[number % len(bodies)])
            found.append((number % len(bodies), outcome))
            number += clients
            if outcome.status != 200:
                await asyncio.sleep(min(2.0, outcome.retry_after_s or 1.0))

    async def strike() -> None:
        await asyncio.sleep(seconds / 4)
        if event is not None:
            event()

    await asyncio.gather(strike(), *(client(number) for number in range(clients)))
    return found


def head_of(prefix: str, size: int) -> bytes:
    return (
        f"POST {prefix}{CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {size}\r\n\r\n"
    ).encode()


async def send_slowly(url: str) -> None:
    """The beginning of a request, and another when the server gives up."""
    address, prefix = endpoint_client.address_of(url)
    while True:
        try:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(head_of(prefix, 500) + b"{")
            await reader.read(100)
            writer.close()
        except OSError:
            await asyncio.sleep(0.1)


async def read_nothing(url: str, body: bytes) -> None:
    """Ask for a stream and leave it where it is."""
    address, prefix = endpoint_client.address_of(url)
    _, writer = await asyncio.open_connection(*address, limit=1)
    writer.write(head_of(prefix, len(body)) + body)
    await asyncio.sleep(3600)


async def besieged(
    url: str, bodies: Sequence[bytes], crowd: Sequence[Any], seconds: float
) -> list[tuple[int, Outcome]]:
    """Eight ordinary clients beside a crowd of others."""
    tasks = [asyncio.create_task(each) for each in crowd]
    await asyncio.sleep(3)
    found = await load(url, bodies, 8, seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return found


def summarise(found: Sequence[tuple[int, Outcome]], right: dict[int, str] | None) -> dict[str, Any]:
    """`right`: the texts of the questions, None where the answers are not streams."""
    outcomes = [outcome for _, outcome in found]
    good = [(number, o) for number, o in found if o.status == 200 and (right is None or o.is_whole)]
    return {
        "requests": len(found),
        "good": len(good),
        "refused_in_openai_form": sum(o.status != 200 and o.is_whole for o in outcomes),
        "broken_streams": sum(o.status == 200 and right is not None and not o.is_whole for o in outcomes),
        "nothing_or_plain_text": sum(o.status != 200 and not o.is_whole for o in outcomes),
        "wrong": 0 if right is None else sum(right.get(number, o.text) != o.text for number, o in good),
        "whole_s": percentiles([o.whole_s for _, o in good]),
    }


def kill_one() -> None:
    """One of the replicas, once all are there."""
    replicas()[0].kill()


def in_one_replica(work: Callable[[Any], Any]) -> None:
    """Do this in the process of one replica; RuntimeError if there is none."""
    for found in ray.util.list_named_actors(all_namespaces=True):
        if found["name"].startswith(f"SERVE_REPLICA::{APP_NAME}#{APP_NAME}#"):
            with contextlib.suppress(RayActorError, ValueError):  # it has just ended
                actor = ray.get_actor(found["name"], found["namespace"])
                ray.get(actor.__ray_call__.remote(work), timeout=30)
                return
    raise RuntimeError("there is no replica")


def break_models() -> None:
    """Every forward of one replica raises from now on."""

    def work(_replica: Any) -> None:
        import gc

        import torch

        gc.unfreeze()  # Serve freezes what a replica holds when it is ready
        for module in gc.get_objects():
            if isinstance(module, torch.nn.Embedding):
                module.weight.data = module.weight.data[:0]

    in_one_replica(work)


def end_thread() -> None:
    """The thread that drives the models of one replica ends at its next instruction."""

    def work(_replica: Any) -> None:
        import ctypes
        import threading

        (thread,) = (each for each in threading.enumerate() if each.name == "mahalo-model")
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))

    in_one_replica(work)


def count_running() -> int:
    """Replicas that Serve counts as ready: their models are loaded."""
    deployment = serve.status().applications[APP_NAME].deployments[APP_NAME]
    return int(deployment.replica_states.get("RUNNING", 0))


class Replacement:
    """Watches the replicas: how long after the event a process was gone, and its successor ready."""

    def __init__(self) -> None:
        self.before = {process.pid for process in replicas()}
        self.struck_at = 0.0
        self.gone_s: float | None = None
        self.there_s: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def strike(self, event: Callable[[], Any]) -> None:
        """The event happens now."""
        self.struck_at = time.monotonic()
        event()

    def _look(self) -> None:
        while not self._over.wait(0.1):
            if not self.struck_at:
                continue
            now, since = {process.pid for process in replicas()}, time.monotonic() - self.struck_at
            if self.gone_s is None and not self.before <= now:
                self.gone_s = round(since, 1)
            if self.gone_s is not None and len(now) >= _REPLICAS and count_running() >= _REPLICAS:
                self.there_s = round(since, 1)
                return

    def wait(self) -> None:
        """Until the lost replica has been replaced; RuntimeError if it is not."""
        self._thread.join(_REPLACED_WITHIN_S)
        self._over.set()
        if self.there_s is None:
            raise RuntimeError("the lost replica was not replaced")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="output folder of a finished run")
    parser.add_argument("--seconds", type=float, default=16.0, help="of each part")
    parser.add_argument("--output", type=Path, default=None, help="results as JSON")
    options = parser.parse_args()
    config = read_config(options.run)
    settings = config.serve.model_copy(update={"replicas": _REPLICAS})
    results: dict[str, Any] = {"machine": machine()}
    asked = questions(config, 24)
    streams = [body_of(question, number) for number, question in enumerate(asked)]
    whole = [body_of(question, number, stream=False) for number, question in enumerate(asked)]
    with endpoint(options.run, config.model_copy(update={"serve": settings})) as url:
        calm = asyncio.run(load(url, streams, 8, options.seconds / 2))
        right = {number: outcome.text for number, outcome in calm if outcome.is_whole}
        results["calm, streams"] = summarise(calm, right)
        for name, event, bodies in (
            ("a replica killed, whole answers", kill_one, whole),
            ("a replica killed, streams", kill_one, streams),
            ("its models broken, whole answers", break_models, whole),
            ("its models broken, streams", break_models, streams),
            ("its thread ended, whole answers", end_thread, whole),
        ):
            watch = Replacement()
            strike = functools.partial(watch.strike, event)
            found = asyncio.run(load(url, bodies, 16, options.seconds, strike))
            watch.wait()
            results[name] = summarise(found, right if bodies is streams else None)
            results[name] |= {"gone_s": watch.gone_s, "replaced_s": watch.there_s}
            print(f"{name}: {results[name]}", flush=True)
        slow = [send_slowly(url) for _ in range(300)]
        results["300 slow bodies"] = summarise(
            asyncio.run(besieged(url, streams, slow, options.seconds / 2)), right
        )
        deaf = [read_nothing(url, streams[number % len(streams)]) for number in range(150)]
        results["150 that do not read"] = summarise(
            asyncio.run(besieged(url, streams, deaf, options.seconds / 2)), right
        )
    rows = [
        [
            name,
            *(str(value) for key, value in found.items() if isinstance(value, int)),
            str(found["whole_s"].get("max")),
            *(str(found.get(key, "")) for key in ("gone_s", "replaced_s")),
        ]
        for name, found in results.items()
        if name != "machine"
    ]
    counts = ["requests", "good", "refused", "broken", "plain or nothing", "wrong"]
    print(table(["", *counts, "longest s", "gone after s", "successor after s"], rows))
    if options.output is not None:
        write_results(options.output, results)


if __name__ == "__main__":
    main()
