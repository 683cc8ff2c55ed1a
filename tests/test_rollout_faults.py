"""Whatever dies while dialogues are played: the output is that of a quiet run.

Every test compares with shards that one process wrote undisturbed. An actor killed: see test_rollouts.py.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from local_endpoint import GARBAGE, HANGS, LocalEndpoint, Received, Scripted, TimeRunsOut, fails, says
from processes import started_here
from ray.cluster_utils import Cluster
from tiny_tutor import SAMPLING, TOKENIZER, TUTOR

from mahalo_ray.config import (
    ClusterConfig,
    EndpointConfig,
    EndpointStudentConfig,
    GridCases,
    GridProblem,
    ModelTutorConfig,
    PlayConfig,
)
from mahalo_ray.data import storage
from mahalo_ray.data.records import Dialogue
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.domains.tutoring.personas import load_cases
from mahalo_ray.rollouts.dialogue_job import (
    CANDIDATES,
    CASES,
    DIALOGUES,
    DialogueChunks,
    RolloutSpec,
    RolloutWorker,
    run_rollouts,
)
from mahalo_ray.rollouts.pool import IN_FLIGHT_PER_ACTOR, RolloutError

pytestmark = pytest.mark.slow

LONG_S = 600  # longer than a slow machine takes: no verdict depends on it
CHUNKS = DialogueChunks(0, dialogues=18, size=3)
PLAY = PlayConfig(dialogues=18, turns=2, candidates=2, batch_size_per_actor=3, sampling=SAMPLING)
GRID = GridCases(
    problems=[GridProblem(topic=f"t{n}", problem=f"What is {n} + 3?", answer=str(n + 3)) for n in range(18)],
    misconceptions=["counts from one"],
)


def answer(received: Received) -> Scripted:
    """A student whose words depend on the seed it is asked with: what is asked twice is answered alike."""
    return says(f"I think {received.body['seed'] % 1000}.")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tutor, the cases, and what a quiet run makes of them."""
    folder = tmp_path_factory.mktemp("faults")
    TUTOR.save_pretrained(folder / "tutor")
    TOKENIZER.save_pretrained(folder / "tutor")
    (folder / "cases.json").write_bytes(CASES.dump_json(load_cases(GRID)[0]))
    with LocalEndpoint(answer) as server:
        worker = RolloutWorker(spec_of(folder, server.config(), folder / "quiet"))
        for chunk in CHUNKS:
            worker.play(chunk)
    return folder


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """Two nodes on this machine: an actor fits on the first, two on the second."""
    head = {"num_cpus": 1, "include_dashboard": False, "dashboard_agent_listen_port": 0}
    made = Cluster(initialize_head=True, head_node_args={**head, "wait": False})
    made.wait_for_nodes(LONG_S)
    yield made
    made.shutdown()


@pytest.fixture
def cluster(nodes: Cluster) -> Iterator[Cluster]:
    """The nodes, with this process as their driver."""
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()


def spec_of(base: Path, endpoint: EndpointConfig, output: Path) -> RolloutSpec:
    return RolloutSpec(
        tutor=ModelTutorConfig(path=str(base / "tutor")),
        student=EndpointStudentConfig(endpoint=endpoint, max_new_tokens=8),
        play=PLAY,
        output_url=str(output),
        purpose="test",
        placement=DeviceConfig(),
        threads=1,
        cases_url=str(base / "cases.json"),
    )


def shards(folder: Path) -> dict[str, bytes]:
    return {
        f"{kind}/{file.name}": file.read_bytes()
        for kind in (CANDIDATES, DIALOGUES)
        for file in sorted((folder / kind).glob("*.parquet"))  # a killed process may leave one begun
    }


def quiet(done: int, total: int, note: str) -> None:
    """No progress shown."""


def test_a_node_killed(base: Path, cluster: Cluster, tmp_path: Path) -> None:
    """The node goes when all three actors are at work, two of them on it: no student answers before that."""
    node = cluster.add_node(num_cpus=2, wait=False)
    cluster.wait_for_nodes(LONG_S)
    asked: set[str] = set()
    gone = threading.Event()

    def pull_the_plug() -> None:
        cluster.remove_node(node, allow_graceful=False)
        gone.set()

    def held_back(received: Received) -> Scripted:
        before = len(asked)
        asked.add(json.dumps(received.body))
        if before < len(asked) == 3:  # one request at a time from each actor
            threading.Thread(target=pull_the_plug).start()
        return replace(answer(received), after=gone)

    with LocalEndpoint(held_back) as server:
        spec = spec_of(base, server.config(concurrency=3, timeout_s=600), tmp_path / "out")
        report = run_rollouts(spec, CHUNKS, ClusterConfig(rollout_actors=3), quiet)
    assert gone.is_set() and report.actor_deaths >= 1
    assert (report.dialogues, sum(report.failed.values())) == (18, 0)
    assert shards(tmp_path / "out") == shards(base / "quiet")


def test_a_full_disk(base: Path, cluster: Cluster, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        with pytest.raises(OSError, match="No space left"):
            storage.write_bytes(str(disk / "much"), b"x" * 200_000)
        assert list(disk.iterdir()) == []  # what was begun is not in the way
        with LocalEndpoint(answer) as server:
            spec = spec_of(base, server.config(), disk / "out")
            with pytest.raises(RolloutError, match=r"No space left on device.*make room"):
                run_rollouts(spec, CHUNKS, ClusterConfig(rollout_actors=1), quiet)
            while started_here("RolloutWorker"):  # until it is gone, it may finish what it had
                time.sleep(0.05)
            finished = len(list((disk / "out" / "chunks").iterdir()))
            assert 0 < finished < len(CHUNKS)
            subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
            report = run_rollouts(spec, CHUNKS, ClusterConfig(rollout_actors=1), quiet)
        assert (report.resumed, report.dialogues) == (finished, 18)
        assert shards(disk / "out") == shards(base / "quiet")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_share_of_failures_above_the_limit_stops_with_the_reason(
    base: Path, cluster: Cluster, tmp_path: Path
) -> None:
    def broken_for_some(received: Received) -> Scripted:
        return fails(503) if "What is 7 +" in json.dumps(received.body) else answer(received)

    one = ClusterConfig(rollout_actors=1)
    with LocalEndpoint(broken_for_some) as server:
        spec = spec_of(base, server.config(max_retries=0), tmp_path / "out")
        with pytest.raises(RolloutError, match=r"1 of 18 dialogues failed \(http_503 1\).* share of 0\.01"):
            run_rollouts(spec, CHUNKS, one, quiet, max_failed_fraction=0.01)
    with LocalEndpoint(answer) as server:
        spec = spec_of(base, server.config(), tmp_path / "out")
        report = run_rollouts(spec, CHUNKS, one, quiet)
    assert (report.resumed, report.dialogues) == (5, 18)
    assert (report.failed, report.failed_attempts) == ({}, {"http_503": 1})
    assert shards(tmp_path / "out") == shards(base / "quiet")


def test_an_endpoint_in_every_kind_of_trouble(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request meets trouble before it is answered."""
    troubles = [fails(429, retry_after="0.05"), fails(500), GARBAGE, HANGS]
    seen: Counter[str] = Counter()

    def troubled(received: Received) -> Scripted:
        key = json.dumps(received.body)
        seen[key] += 1
        return troubles[len(seen) % 4] if seen[key] == 1 else answer(received)

    with LocalEndpoint(troubled, TimeRunsOut(monkeypatch)) as server:
        config = server.config(concurrency=16, timeout_s=600)
        worker = RolloutWorker(spec_of(base, config, tmp_path / "out"))
        summaries = [worker.play(chunk) for chunk in CHUNKS]
    retries = sum((Counter(summary.retries) for summary in summaries), Counter())
    assert set(retries) == {"http_429", "http_500", "garbage", "timeout"}
    assert len(seen) == 18 * 2 and set(seen.values()) == {2}
    assert sum(retries.values()) == sum(seen.values()) - len(seen)
    assert not any(summary.failures for summary in summaries)
    assert shards(tmp_path / "out") == shards(base / "quiet")


def test_the_driver_killed_and_started_again(base: Path, tmp_path: Path) -> None:
    """Killed when one chunk is there: until then no student of the next one answers."""
    output, dead = tmp_path / "out", threading.Event()

    def held_after_a_chunk(received: Received) -> Scripted:
        return replace(answer(received), after=dead) if chunks_in(output) else answer(received)

    with LocalEndpoint(held_after_a_chunk) as server:
        document = {
            "name": "test",
            "output": str(output),
            "seed": 0,
            "tutor": {"kind": "model", "path": str(base / "tutor")},
            "student": {
                "kind": "endpoint",
                "max_new_tokens": 8,
                "endpoint": {"base_url": server.url, "model": "m"},
            },
            "cases": GRID.model_dump(),
            "play": PLAY.model_dump(),
            "cluster": {"rollout_actors": 1},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(document))
        with _dialogues(tmp_path) as first:
            deadline = time.monotonic() + LONG_S
            while not chunks_in(output):
                assert first.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
            first.send_signal(signal.SIGKILL)
        assert chunks_in(output) == 1 and not (output / "manifest.json").exists()
        dead.set()
        with _dialogues(tmp_path) as second:
            said, _ = second.communicate(timeout=LONG_S)
        assert second.returncode == 0, said
    metrics: dict[str, Any] = json.loads((output / "manifest.json").read_text())["metrics"]
    # The dead driver's actor may finish what it had in flight before it notices.
    assert metrics["dialogues"] == 18 and 1 <= metrics["resumed"] <= 1 + IN_FLIGHT_PER_ACTOR
    assert shards(output) == shards(base / "quiet")
    page = (output / "dialogues.html").read_text()
    assert "18 dialogues" in page and "knowledge: solid" in page


def chunks_in(output: Path) -> int:
    return len(list(output.glob("chunks/*.json")))


def _dialogues(folder: Path) -> subprocess.Popen[str]:
    command = (
        "import sys; from mahalo_ray.cli import main; sys.argv[1:] = ['dialogues', 'config.yaml']; main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_nothing_is_twice_in_the_output(base: Path) -> None:
    ids = [dialogue.id for dialogue in Dialogue.load(str(base / "quiet" / DIALOGUES))]
    assert len(ids) == len(set(ids)) == 18
