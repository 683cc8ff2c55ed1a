"""The benchmark of rollouts at tiny sizes: what it compares must be the same words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.slow
def test_the_parts_without_actors(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    command = [sys.executable, str(FOLDER / "rollouts.py"), "--quick", "--output", str(output)]
    done = subprocess.run(
        [*command, "--parts", "in_flight", "kept_cache", "shards"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(output.read_text())
    assert [line["in_flight"] for line in results["in_flight"]] == [1, 8]
    assert results["kept_cache"]["same_words"]
    kept, again = (results["kept_cache"][way]["tokens_encoded"] for way in ("kept", "encoded_again"))
    assert again > 1.5 * kept
    assert results["shards"]["pairs"] > 0
