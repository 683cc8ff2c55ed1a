"""The programs around guided decoding at tiny sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_runs import results_of

pytestmark = pytest.mark.slow


def test_growth_measures_every_direction_and_draws(tmp_path: Path) -> None:
    options = ("--model", "tiny", "--steps", "2", "--step-tokens", "3", "--largest", "100")
    results = results_of(
        "decoding_growth", tmp_path / "r.json", *options, "--picture", str(tmp_path / "p.png")
    )
    assert {cell["grows"] for cell in results["cells"]} == {"candidates", "requests", "prompt"}
    cells = {(cell["grows"], cell[cell["grows"]]): cell for cell in results["cells"]}
    assert cells["candidates", 32]["policy_cache_bytes"] > cells["candidates", 2]["policy_cache_bytes"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_continuous_batching_samples_as_many_tokens_as_ours(tmp_path: Path) -> None:
    options = ("--model", "tiny", "--prompt", "40", "--candidates", "3", "--steps", "3", "--step-tokens", "4")
    results = results_of("continuous_batching", tmp_path / "r.json", *options)
    for name in ("ours", "transformers"):
        assert results[name]["sampled"] == 3 * 3 * 4 and len(results[name]["seconds"]) == 3


def test_requests_at_their_own_steps_give_the_same_answers(tmp_path: Path) -> None:
    options = ("--model", "tiny", "--requests", "4", "--at-once", "3", "--candidates", "2", "--prompt", "20")
    command = [*options, "--answer", "16", "--step-tokens", "4", "--rounds", "1"]
    results = results_of("ragged_steps", tmp_path / "r.json", *command)
    assert results["same_answers"] == 4
