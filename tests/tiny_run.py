"""Whole runs of the quickstart and of other examples at tiny size, by the command."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mahalo_ray.cli import main

EXAMPLE = Path(__file__).parent.parent / "examples" / "quickstart.yaml"
SIZES = [
    "model.scratch={hidden_size: 32, num_layers: 1, num_attention_heads: 2, intermediate_size: 32}",
    # Two of each are for test_training_distributed.py and test_rollouts.py.
    *("cluster.train_workers=1", "cluster.rollout_actors=1"),
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
    overrides = [part for setting in [*settings, f"output={output}"] for part in ("--set", setting)]
    return command([*arguments, *overrides], modules)


def command(arguments: Sequence[str], modules: Path | None = None) -> str:
    """What the command prints; it must not fail.

    It runs in this process, whose imports are done: in a new one they take ten seconds. What it starts, Ray
    above all, are processes of their own as always. test_cli.py starts the command itself.
    """
    with pytest.MonkeyPatch.context() as patch, all_output() as file:
        patch.setattr(sys, "argv", ["mahalo", *arguments])
        patch.setenv("OMP_NUM_THREADS", "1")
        if modules is not None:
            patch.syspath_prepend(modules)
            patch.setenv("PYTHONPATH", str(modules), prepend=os.pathsep)
        with pytest.raises(SystemExit) as ended:
            main()
        sys.stdout.flush()
        text = file.read_text(encoding="utf-8")
    assert ended.value.code in (None, 0), text
    assert "retries remaining" not in text  # what Ray says of calls that were open when Serve ended
    return text


@contextlib.contextmanager
def all_output() -> Iterator[Path]:
    """A file that takes all that this process writes while the block runs, the C++ in it too."""
    with contextlib.ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "output"
        stream = stack.enter_context(file.open("w", buffering=1, encoding="utf-8"))
        for number in (1, 2):
            before = os.dup(number)
            stack.callback(os.close, before)
            stack.callback(os.dup2, before, number)
            os.dup2(stream.fileno(), number)
        stack.enter_context(contextlib.redirect_stdout(stream))
        stack.enter_context(contextlib.redirect_stderr(stream))
        yield file
