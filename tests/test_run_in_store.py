"""A whole run whose output is an object store: killed, resumed, and equal to the run on disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_run import EXAMPLE, TINY, mahalo

from mahalo_ray.data import storage
from mahalo_ray.data.records import Dialogue, PreferencePair

pytestmark = pytest.mark.slow


def test_a_run_in_a_store_equals_the_one_on_disk(whole_run: Path, s3: str) -> None:
    """Killed without warning while it plays dialogues; the next run takes its lease over and goes on."""
    output = f"{s3}/runs/tiny"
    command = [sys.executable, "-c", "from mahalo_ray.cli import main; main()", "run", str(EXAMPLE)]
    overrides = [part for setting in [*TINY, f"output={output}"] for part in ("--set", setting)]
    with subprocess.Popen(
        [*command, *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    ) as killed:
        try:
            while not storage.exists(f"{output}/sft/manifest.json"):
                assert killed.poll() is None, "the run ended by itself"
                time.sleep(0.2)
        finally:
            os.killpg(killed.pid, signal.SIGKILL)
    finished = storage.fingerprint(f"{output}/sft/manifest.json")
    said = mahalo("run", str(EXAMPLE), output=output)
    assert "done before, skipped" in said
    assert storage.fingerprint(f"{output}/sft/manifest.json") == finished
    on_disk = str(whole_run)
    results = [storage.read_json(f"{folder}/report/results.json") for folder in (output, on_disk)]
    assert without_times(results[0]) == without_times(results[1])
    assert results[0]["rows"] and results[0]["methods"]
    for kind, part in ((PreferencePair, "pairs/pairs"), (Dialogue, "reward_rollouts/dialogues")):
        assert kind.load(f"{output}/{part}") == kind.load(f"{on_disk}/{part}")


def without_times(results: Any) -> Any:
    """All of it but what measures time."""
    if isinstance(results, dict):
        timed = ("timings_s", "tokens_per_second", "pairs_per_second", "seconds")
        return {name: without_times(value) for name, value in results.items() if name not in timed}
    return [without_times(value) for value in results] if isinstance(results, list) else results
