"""The benchmark of rollouts at tiny sizes: what it compares must be the same words."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_runs import results_of


@pytest.mark.slow
def test_the_parts_without_actors(tmp_path: Path) -> None:
    parts = ("--quick", "--parts", "in_flight", "kept_cache", "shards")
    results = results_of("rollouts", tmp_path / "results.json", *parts)
    assert [line["in_flight"] for line in results["in_flight"]] == [1, 8]
    assert results["kept_cache"]["same_words"]
    kept, again = (results["kept_cache"][way]["tokens_encoded"] for way in ("kept", "encoded_again"))
    assert again > 1.5 * kept
    assert results["shards"]["pairs"] > 0
