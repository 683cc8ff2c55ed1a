"""Whole runs of the quickstart and of other examples at tiny size, by the command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "quickstart.yaml"
SIZES = [
    "model.scratch={hidden_size: 32, num_layers: 1, num_attention_heads: 2, intermediate_size: 32}",
    "cluster.train_workers=1",  # two are for test_training_distributed.py
    "domain.sft_dialogues=64",
    "sft.training.epochs=1",
    "reward_rollouts={dialogues: 4, candidates: 3, continuations: 1, sampling: {max_new_tokens: 8}}",
    "pair_rollouts={dialogues: 6, candidates: 3, sampling: {max_new_tokens: 8}}",
    "pairs.min_gap_std=0",
    # so few pairs leave none held out
    *("policy.metrics_every_steps=0", "policy.max_kl=null", "policy.sampled_turns=0"),
    "evaluation={dialogues: 4, bootstrap_resamples: 50, sampling: {max_new_tokens: 8}}",
]
TINY = [
    *SIZES,
    "sweep={weights: [{accuracy: 0.9, engagement: 0.1}, {accuracy: 0.5, engagement: 0.5}],"
    " sampler: surf, points: 4, rounds: 1}",
    "guided.num_candidates=2",
]


def mahalo(
    *arguments: str, output: Path | str, settings: Sequence[str] = TINY, modules: Path | None = None
) -> str:
    """What `mahalo ARGUMENTS` prints with these settings; it must not fail. `modules`: a folder of Python
    modules that it finds."""
    command = [sys.executable, "-c", "from mahalo_ray.cli import main; main()", *arguments]
    overrides = [part for setting in [*settings, f"output={output}"] for part in ("--set", setting)]
    known = os.environ.get("PYTHONPATH", "")
    path = {} if modules is None else {"PYTHONPATH": f"{modules}{os.pathsep}{known}"}
    done = subprocess.run(
        [*command, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
        env={**os.environ, "OMP_NUM_THREADS": "1", **path},
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "retries remaining" not in done.stdout  # what Ray says of calls that were open when Serve ended
    return done.stdout
