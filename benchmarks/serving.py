"""The endpoint of a finished run under load, asked over raw sockets from a process of its own.

One endpoint, one part after the other:

- levels: 1, 4, 16 and 64 guided requests at a time: answers a second, and percentiles of the time to the
  first text and to the whole answer. The same decoder answers the same questions in a process of its own, as
  many at a time, without Serve and HTTP: its throughput, and how many answers differ. The two take turns,
  since the speed of one machine changes within a minute. What the kernel counted for the thread of the models
  says whether a slow answer was computed slowly, or waited for a processor. Then one at a time once more,
  both sides answering every question in turn: what the endpoint adds.
- rates: requests at random times (open loop) at half and at four fifths of the best throughput.
- overload: the same at `--overload` times the best throughput: how fast and in what form requests are
  refused, whether every answer is the right one, and how long GET /health takes meanwhile.
- retries: 320 clients that come back when they are told to; and how long the same clients take with a server
  that refuses everything unread, which is the least that their own process needs for 320 connections.
- soak: as many requests at a time as run together, for `--soak` seconds; the memory of the replica and of
  Serve's proxy meanwhile.
- peer: the merged policy, greedy and unguided, behind this endpoint and behind `transformers serve`.

At the end stands what should be reached (16 at once at least 4 times one at a time; good answers at 320
retrying clients within a tenth of the best throughput, and refusals within 100 ms; Serve's own cost at most
5 %) and whether it was: worth something only on a machine that does nothing else.

The whole takes five to six minutes on two quiet cores with the quickstart's model; `--short` takes one and
measures little. `RUN` is the output folder of a finished run.

    python benchmarks/serving.py runs/quickstart --peer transformers --output serving.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import endpoint_client
import psutil
from finished_run import read_config
from measuring import machine, table, write_results
from same_decoder import SameDecoder, ThreadSeconds, busiest, threads_of

from mahalo_ray.config import RunConfig
from mahalo_ray.evaluation.statistics import mean_interval

RETRYING_CLIENTS = 320
PEER_TOKENS = 32
MOST_TURNS = 4
_STARTUP_S = 180.0


def questions(config: RunConfig, count: int) -> list[str]:
    """What students of the run's world ask first."""
    from mahalo_ray.domains.tutoring.student import TutoringEpisode
    from mahalo_ray.pipeline.seed_blocks import first_seed

    start = first_seed(config.seed, "evaluation")
    return [TutoringEpisode.from_seed(start + number).opening for number in range(count)]


def body_of(question: str, number: int, **fields: Any) -> bytes:
    """A streamed request, guided with the run's own defaults unless `fields` say otherwise."""
    messages = [{"role": "user", "content": question}]
    body = {"model": "mahalo", "messages": messages, "seed": number, "stream": True}
    return json.dumps(body | fields).encode()


@contextmanager
def endpoint(run: str, config: RunConfig) -> Iterator[str]:
    """The run's endpoint on a free port of a private Ray."""
    from mahalo_ray.cli.common import open_session
    from mahalo_ray.pipeline.artifacts import run_model
    from mahalo_ray.serving.launch import start
    from mahalo_ray.serving.service import Defaults

    weights, guidance = config.guided.point
    any_client = {"port": 0, "models": [], "api_key_env": None, "api_key_file": None}
    # An older run has written down another default.
    window = {"batch_window_s": type(config.serve)().batch_window_s}
    settings = config.serve.model_copy(update={**any_client, **window})
    defaults = Defaults(weights, guidance, config.guided.num_candidates, config.evaluation.sampling)
    models = (run_model(run, stage) for stage in ("policy", "reward"))
    with (
        open_session(config, serves=True),
        start(settings, *models, defaults=defaults, dtype=config.model.dtype) as serving,
    ):
        yield serving.url


@contextmanager
def transformers_server(command: str, folder: str, threads: int) -> Iterator[str]:
    """`transformers serve` with the model of a folder, on the CPU with so many threads."""
    from mahalo_ray.serving.launch import free_port

    port = free_port("127.0.0.1", 0)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--log-level", "warning"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [command, "serve", folder, *options], env=environment, stdout=log, stderr=log
        )
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_for(url, process)
            yield url
        except TimeoutError as error:
            log.seek(0)
            raise RuntimeError(f"{command} serve did not start:\n{log.read().decode()[-2000:]}") from error
        finally:
            process.terminate()
            process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _STARTUP_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.3)
    raise TimeoutError


class MemoryWatch:
    """Resident memory of the processes of this name, every half second, MiB."""

    def __init__(self, name: str) -> None:
        self.seen: list[float] = []
        self._processes = processes_of(name)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(0.5):
            self.seen.append(sum(process.memory_info().rss for process in self._processes) / 2**20)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def summary(self) -> dict[str, float]:
        """Means of the first and the last quarter of the time, and the most."""
        quarter = max(1, len(self.seen) // 4)
        return {
            "first_quarter": round(sum(self.seen[:quarter]) / quarter, 1),
            "last_quarter": round(sum(self.seen[-quarter:]) / quarter, 1),
            "most": round(max(self.seen), 1),
        }


def processes_of(name: str) -> list[psutil.Process]:
    """What this process has started and is called so: `ServeReplica` holds the models, `ProxyActor` is
    Serve's proxy."""
    started = psutil.Process().children(recursive=True)
    return [process for process in started if name in " ".join(process.cmdline())]


class Client:
    """The process that asks."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def __call__(self, measure: Any, *arguments: Any) -> Any:
        return self._pool.submit(measure, self.url, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="output folder of a finished run")
    parser.add_argument("--levels", default="1,4,16,64", help="requests at a time")
    parser.add_argument("--requests", type=int, default=96, help="of each level, at least 3 for each client")
    parser.add_argument("--overload", type=float, default=4.0, help="times the best throughput")
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="of each part but the levels; 0: levels only"
    )
    parser.add_argument("--soak", type=float, default=60.0, help="seconds; 0: none")
    parser.add_argument("--peer", default=None, help="the command `transformers` with its serving extra")
    parser.add_argument("--peer-requests", type=int, default=32, help="of each level of the peer")
    parser.add_argument("--short", action="store_true", help="a minute that shows that everything works")
    parser.add_argument("--output", type=Path, default=None, help="results as JSON")
    options = parser.parse_args()
    if options.short:
        options.levels, options.requests, options.seconds, options.soak = "1,16", 8, 3.0, 5.0
        options.peer_requests = 8
    config = read_config(options.run)
    results: dict[str, Any] = {"machine": machine()}
    with endpoint(options.run, config) as url:
        measure(options, config, Client(url), results)
        if options.peer is not None:
            compare_with_peer(options, config, Client(url), results)
    show(results)
    if options.output is not None:
        write_results(options.output, results)


def _levels(options: argparse.Namespace) -> dict[int, int]:
    """Requests of every level."""
    levels = [int(level) for level in options.levels.split(",")]
    return {level: max(options.requests, 3 * level) if level > 1 else options.requests for level in levels}


def measure(options: argparse.Namespace, config: RunConfig, client: Client, results: dict[str, Any]) -> None:
    """Levels, rates, overload, retries and the soak."""
    levels = _levels(options)
    asked = questions(config, max(levels.values()))
    bodies = [body_of(question, number) for number, question in enumerate(asked)]
    client(endpoint_client.at_once, bodies[:8], 4)  # warm
    results["levels"] = []
    right: list[str] = []
    decoder = SameDecoder(options.run, config)
    for clients, count in levels.items():
        found, texts = measure_level(client, decoder, asked[:count], clients)
        results["levels"].append(found)
        right = max(right, texts, key=len)
    results["own_cost"] = measure_own_cost(client, decoder, asked[: options.requests])
    decoder.close()
    best = max(found["answers_per_s"] for found in results["levels"])
    if options.seconds:
        parts = {"half": 0.5, "four_fifths": 0.8, "overload": options.overload}
        for name, share in parts.items():
            results[name] = client(endpoint_client.at_rate, bodies, right, share * best, options.seconds)
        results["retries"] = client(
            endpoint_client.with_retries, bodies, right, RETRYING_CLIENTS, options.seconds
        )
        results["retries"]["bare_refusal_s"] = bare_refusals(bodies[0])
    if options.soak:
        clients = config.serve.max_ongoing_requests
        with MemoryWatch("ServeReplica") as replica, MemoryWatch("ProxyActor") as proxy:
            soak = client(endpoint_client.with_retries, bodies, right, clients, options.soak)
        results["soak"] = {**soak, "replica_mib": replica.summary, "proxy_mib": proxy.summary}


def measure_own_cost(client: Client, decoder: SameDecoder, asked: Sequence[str]) -> dict[str, float]:
    """What the endpoint adds to an answer alone, with its 95 % interval, and a whole answer: milliseconds.

    Both sides answer every question before the next one, so that neither finds warmer caches than the other.
    """

    def ask(number: int) -> float:
        seconds: float = client(endpoint_client.at_once, [body_of(asked[number], number)], 1)[1]
        return seconds

    ours, alone = [], []
    for number, question in enumerate(asked):
        if number % 2:  # either is the first as often
            ours.append(ask(number))
        alone.append(decoder.answer([question], number, 1).seconds)
        if not number % 2:
            ours.append(ask(number))
    added = mean_interval([1000 * (a - b) for a, b in zip(ours, alone, strict=True)])
    return {
        "added_ms": added.value,
        "low_ms": added.low,
        "high_ms": added.high,
        "whole_ms": 1000 * sum(ours) / len(ours),
    }


def bare_refusals(body: bytes) -> dict[str, float]:
    """Seconds until as many requests in one instant are refused by a server that does nothing else."""
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    server = context.Process(target=endpoint_client.refuse_everything, args=(told,), daemon=True)
    server.start()
    try:
        client = Client(f"http://127.0.0.1:{told.get(timeout=_STARTUP_S)}")
        found: dict[str, float] = client(endpoint_client.in_one_instant, body, RETRYING_CLIENTS)
        return found
    finally:
        server.terminate()
        server.join()


def measure_level(
    client: Client, decoder: SameDecoder, asked: Sequence[str], clients: int
) -> tuple[dict[str, Any], list[str]]:
    """The endpoint and the decoder alone in turns, so many requests at a time: figures, and the endpoint's
    texts."""
    count = len(asked)
    turns = max(1, min(MOST_TURNS, count // (3 * clients)))
    (replica,) = processes_of("ServeReplica")
    outcomes: list[endpoint_client.Outcome] = []
    texts: list[str] = []
    seconds, alone_seconds = 0.0, 0.0
    threads: dict[str, list[ThreadSeconds]] = {"endpoint": [], "in_process": []}
    for turn in range(turns):
        part = range(turn * count // turns, (turn + 1) * count // turns)
        bodies = [body_of(asked[number], number) for number in part]
        before = threads_of(replica.pid)
        answered, took = client(endpoint_client.at_once, bodies, clients)
        if (thread := busiest(before, threads_of(replica.pid))) is not None:
            threads["endpoint"].append(thread)
        alone = decoder.answer([asked[number] for number in part], part.start, clients)
        if alone.thread is not None:
            threads["in_process"].append(alone.thread)
        outcomes += answered
        texts += alone.texts
        seconds, alone_seconds = seconds + took, alone_seconds + alone.seconds
    pairs = zip(outcomes, texts, strict=True)
    found = {
        "clients": clients,
        **endpoint_client.summary(outcomes, seconds, [None] * count),
        "in_process_per_s": count / alone_seconds,
        "different_from_in_process": sum(outcome.text != text for outcome, text in pairs),
        "models_thread_ms": {
            side: {
                "computing": 1000 * sum(thread.computing for thread in parts) / count,
                "waiting": 1000 * sum(thread.waiting for thread in parts) / count,
            }
            for side, parts in threads.items()
            if parts
        },
    }
    return found, [outcome.text for outcome in outcomes]


def compare_with_peer(
    options: argparse.Namespace, config: RunConfig, client: Client, results: dict[str, Any]
) -> None:
    """The merged policy, greedy and unguided, here and behind `transformers serve`."""
    from mahalo_ray.models.backbone import load_tokenizer
    from mahalo_ray.pipeline.artifacts import export

    weights = config.guided.point[0]
    asked = questions(config, options.peer_requests)
    greedy = {"temperature": 0, "max_tokens": PEER_TOKENS}
    ours = [
        body_of(question, number, strategy="none", objectives=dict(weights), **greedy)
        for number, question in enumerate(asked)
    ]
    results["peer"] = []
    with tempfile.TemporaryDirectory() as parent:
        folder = str(Path(parent) / "merged")
        export(options.run, folder, weights)
        end = load_tokenizer(folder).eos_token
        theirs = [body_of(question, number, model=folder, **greedy) for number, question in enumerate(asked)]
        threads = max(1, int(config.serve.cpus_per_replica))
        right = [None] * len(asked)
        here = {clients: client(endpoint_client.at_once, ours, clients) for clients in _levels(options)}
        with transformers_server(options.peer, folder, threads) as url:
            peer = Client(url)
            peer(endpoint_client.at_once, theirs[:2], 1)  # warm
            for clients, own in here.items():
                other = peer(endpoint_client.at_once, theirs, clients)
                # Its streams begin with the prompt and show the end token.
                pairs = zip(own[0], other[0], strict=True)
                differ = sum(not its.text.removesuffix(end).endswith(mine.text) for mine, its in pairs)
                sides = (endpoint_client.summary(*side, right) for side in (own, other))
                results["peer"].append(
                    {"clients": clients, **dict(zip(("ours", "peer"), sides, strict=True)), "differ": differ}
                )


def show(results: dict[str, Any]) -> None:
    """The results as tables."""

    def times(found: dict[str, Any], *keys: str) -> list[str]:
        return [f"{found[key].get(p, float('nan')):.3f}" for key in keys for p in ("p50", "p95", "p99")]

    percent = ["p50", "p95", "p99"]
    header = [
        "at a time",
        "answers/s",
        "in process",
        "first text p50",
        *percent[1:],
        "whole p50",
        *percent[1:],
        "differ",
    ]
    rows = [
        [
            str(level["clients"]),
            f"{level['answers_per_s']:.1f}",
            f"{level['in_process_per_s']:.1f}",
            *times(level, "first_text_s", "whole_s"),
            str(level["different_from_in_process"]),
        ]
        for level in results["levels"]
    ]
    print("Guided, closed loop\n" + table(header, rows))
    header = ["at a time", "endpoint: computing", "waiting", "in process: computing", "waiting"]
    rows = [
        [
            str(level["clients"]),
            *(
                f"{level['models_thread_ms'][side][key]:.1f}"
                for side in ("endpoint", "in_process")
                for key in ("computing", "waiting")
            ),
        ]
        for level in results["levels"]
        if level["models_thread_ms"]
    ]
    if rows:
        print("\nThe thread of the models, ms for each answer\n" + table(header, rows))
    loads = [name for name in ("half", "four_fifths", "overload", "retries", "soak") if name in results]
    header = ["load", "requests", "answers/s", "first text p50", *percent[1:], "whole p50", *percent[1:]]
    header += ["refused", "refusal p50", *percent[1:], "max", "wrong", "not whole"]
    rows = []
    for name in loads:
        found = results[name]
        load = f"{found['per_second']:.1f}/s" if "per_second" in found else f"{found['clients']} clients"
        refused = sum(count for status, count in found["statuses"].items() if status != "200")
        rows.append(
            [
                f"{name} ({load})",
                str(found["requests"]),
                f"{found['answers_per_s']:.1f}",
                *times(found, "first_text_s", "whole_s"),
                str(refused),
                *times(found, "refusal_s"),
                f"{found['refusal_s'].get('max', float('nan')):.3f}",
                str(found["wrong"]),
                str(found["not_whole"]),
            ]
        )
    if rows:
        print("\nUnder load\n" + table(header, rows))
    if "retries" in results:
        bare = results["retries"]["bare_refusal_s"]
        print(f"\n{RETRYING_CLIENTS} refusals of a server that does nothing else: {bare}")
    if "overload" in results:
        print(f"GET /health during the overload: {results['overload']['health_s']}")
    if "soak" in results:
        for name in ("replica", "proxy"):
            print(f"Memory of the {name} during the soak, MiB: {results['soak'][f'{name}_mib']}")
    if results.get("peer"):
        header = ["at a time", "ours, answers/s", "whole p50", "p95", "theirs", "whole p50", "p95", "differ"]
        rows = [
            [
                str(level["clients"]),
                *(
                    cell
                    for side in (level["ours"], level["peer"])
                    for cell in (
                        f"{side['answers_per_s']:.1f}",
                        *(f"{side['whole_s'].get(p, float('nan')):.3f}" for p in ("p50", "p95")),
                    )
                ),
                str(level["differ"]),
            ]
            for level in results["peer"]
        ]
        print("\nUnguided and greedy, against `transformers serve`\n" + table(header, rows))
    cost = results["own_cost"]
    added = (
        f"{cost['added_ms']:.1f} [{cost['low_ms']:.1f}, {cost['high_ms']:.1f}] of {cost['whole_ms']:.1f} ms"
    )
    print(f"\nOne at a time, both sides in turns, answer by answer: the endpoint adds {added}")
    print("\nGoals\n" + table(["", "found", "goal", ""], goals(results)))


def goals(results: dict[str, Any]) -> list[list[str]]:
    """What the endpoint should reach, and whether it did in this run: name, figure, goal, verdict."""
    rows = []

    def judge(name: str, value: float | None, limit: float, at_least: bool = False, unit: str = "") -> None:
        if value is None:
            return
        reached = value >= limit if at_least else value <= limit
        sign = "at least" if at_least else "at most"
        rows.append(
            [name, f"{value:.3g}{unit}", f"{sign} {limit:g}{unit}", "reached" if reached else "missed"]
        )

    levels = {level["clients"]: level for level in results["levels"]}
    best = max(level["answers_per_s"] for level in levels.values())
    if 1 in levels:
        one = levels[1]
        if 16 in levels:
            ratio = levels[16]["answers_per_s"] / one["answers_per_s"]
            judge("16 at once / one at a time", ratio, 4, at_least=True)
    cost = results["own_cost"]
    judge("Serve's own cost, one at a time", 100 * cost["added_ms"] / cost["whole_ms"], 5, unit=" %")
    for name, shown in (("retries", f"{RETRYING_CLIENTS} retrying clients"), ("overload", "overload")):
        if name not in results:
            continue
        found = results[name]
        judge(f"{shown}: good answers / best throughput", found["answers_per_s"] / best, 0.9, at_least=True)
        for percentile in ("p99", "max"):
            judge(f"{shown}: refusals, {percentile}", found["refusal_s"].get(percentile), 0.1, unit=" s")
    measured = [
        results[name] for name in ("half", "four_fifths", "overload", "retries", "soak") if name in results
    ]
    different = sum(level["different_from_in_process"] for level in levels.values())
    judge(
        "answers that are not those of the decoder", different + sum(found["wrong"] for found in measured), 0
    )
    judge("answers and refusals that are not whole", sum(found["not_whole"] for found in measured), 0)
    if "soak" in results:
        for name in ("replica", "proxy"):
            memory = results["soak"][f"{name}_mib"]
            grown = memory["last_quarter"] - memory["first_quarter"]
            judge(f"memory of the {name} over the soak", grown, 2, unit=" MiB")
    return rows


if __name__ == "__main__":
    main()
