"""One training step of a process reward model: all steps of a trace in one pass, one sequence per prefix of
steps, and a token classifier under transformers' Trainer, on the same traces.

    python benchmarks/reward_training.py --output reward_training.json

Every measurement runs in a process of its own, so that its peak memory is its own; the variants take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from measuring import PeakMemory, machine, mib, options_of, table, write_results
from shapes import ABOUT_30M, SMOLLM2_135M, TINY, Shape
from torch import Tensor, nn
from transformers import (
    DataCollatorForTokenClassification,
    LlamaForTokenClassification,
    Trainer,
    TrainingArguments,
)

from mahalo_ray.losses import step_bce
from mahalo_ray.models import ProcessRewardModel
from mahalo_ray.models.scoring import TokenTrace, pad_traces

VARIANTS = ("one_pass", "prefixes", "token_classifier")
_NAMES = {
    "one_pass": "ours, one pass per trace",
    "prefixes": "one sequence per prefix of steps",
    "token_classifier": "token classifier, transformers' Trainer",
}


@dataclass(frozen=True)
class Preset:
    """A model, and traces of `steps` steps whose lengths vary by half around `step_tokens`."""

    shape: Shape
    traces: int
    prompt_tokens: int
    steps: int
    step_tokens: int


PRESETS = {
    "tiny": Preset(TINY, traces=3, prompt_tokens=12, steps=4, step_tokens=8),
    "30m": Preset(ABOUT_30M, traces=4, prompt_tokens=100, steps=8, step_tokens=32),
    "smollm2-135m": Preset(SMOLLM2_135M, traces=4, prompt_tokens=100, steps=8, step_tokens=32),
}


@dataclass
class Step:
    """A way to take a training step: `backward` computes loss and gradients and returns the loss; `tokens`,
    padding included, go through the backbone each time."""

    model: nn.Module
    backward: Callable[[], float]
    tokens: int


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.measure is not None:
        print(json.dumps(measure(options)))
        return
    preset = PRESETS[options.preset]
    results: dict[str, Any] = {
        "benchmark": "reward_training",
        "machine": machine(),
        "preset": options.preset,
        "rounds": options.rounds,
        "traces": preset.traces,
        "steps": preset.steps,
        "tokens_of_traces": [len(trace.input_ids) for trace, _ in make_traces(preset)],
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for number in range(options.rounds):
        for name in VARIANTS:
            runs[name].append(_run(options, name))
            print(
                f"round {number + 1}: {name}: {runs[name][-1]['seconds']:.3f} s", file=sys.stderr, flush=True
            )
    results["variants"] = {name: summary(each, preset.traces) for name, each in runs.items()}
    results["checks"] = checks(results["variants"])
    if options.output is not None:
        write_results(options.output, results)
    print(report(results))


def _parser() -> argparse.ArgumentParser:
    parser = options_of(__doc__, PRESETS, "30m")
    parser.add_argument("--measure", choices=VARIANTS, default=None, help=argparse.SUPPRESS)
    return parser


def _run(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--measure", name, "--preset", options.preset]
    command += [] if options.threads is None else ["--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(runs: Sequence[dict[str, Any]], traces: int) -> dict[str, Any]:
    """Medians over processes."""
    names = ("seconds", "base", "peak", "weights", "tokens", "loss")
    found = {name: statistics.median(run[name] for run in runs) for name in names}
    found["seconds_per_trace"] = found["seconds"] / traces
    found["above_weights"] = found["peak"] - found["base"]
    return found


def checks(variants: dict[str, Any]) -> dict[str, float]:
    """What must be equal, and what is compared."""
    ours = variants["one_pass"]
    found = {"loss of prefixes against one pass": abs(variants["prefixes"]["loss"] - ours["loss"])}
    for name in ("prefixes", "token_classifier"):
        found[f"times as fast as {name}"] = variants[name]["seconds"] / ours["seconds"]
        found[f"times fewer tokens than {name}"] = variants[name]["tokens"] / ours["tokens"]
    return found


def report(results: dict[str, Any]) -> str:
    """The table and the comparisons."""
    rows = [
        [_NAMES[name], f"{one['seconds_per_trace']:.3f}", f"{one['tokens']:.0f}", mib(one["above_weights"])]
        for name, one in results["variants"].items()
    ]
    lines = [table(["variant", "s per trace", "tokens through the backbone", "above weights"], rows), ""]
    return "\n".join([*lines, *(f"{name}: {value:.4g}" for name, value in results["checks"].items())])


# -- in the measured process ---------------------------------------------------------------------------------


def make_traces(preset: Preset) -> list[tuple[TokenTrace, list[float]]]:
    """Traces with a label per step, the same in every process."""
    rng = np.random.default_rng(5)
    found = []
    for _ in range(preset.traces):
        ids = rng.integers(0, preset.shape.end_id, preset.prompt_tokens).tolist()
        starts, ends = [], []
        for _ in range(preset.steps):
            starts.append(len(ids))
            length = int(rng.integers(preset.step_tokens // 2, preset.step_tokens * 3 // 2 + 1))
            ids += rng.integers(0, preset.shape.end_id, length).tolist()
            ends.append(len(ids) - 1)
        found.append((TokenTrace(ids, starts, ends), rng.integers(0, 2, preset.steps).astype(float).tolist()))
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One warm-up and one timed step: forward, backward and AdamW at learning rate 0."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    preset = PRESETS[options.preset]
    step = {"one_pass": one_pass, "prefixes": prefixes, "token_classifier": token_classifier}[
        options.measure
    ](preset)
    trained = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    memory = PeakMemory(torch.device("cpu"))
    base = memory.now()
    _take(step, optimizer)
    memory.now()
    memory.reset()
    started = time.perf_counter()
    loss = _take(step, optimizer)
    seconds = time.perf_counter() - started
    weights = sum(parameter.numel() * parameter.element_size() for parameter in step.model.parameters())
    return {
        "seconds": seconds,
        "base": base,
        "peak": memory.peak(),
        "weights": weights,
        "tokens": step.tokens,
        "loss": loss,
    }


def _take(step: Step, optimizer: torch.optim.Optimizer) -> float:
    loss = step.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def _reward_model(preset: Preset) -> ProcessRewardModel:
    base = preset.shape.build(1, torch.float32, torch.device("cpu"))
    return ProcessRewardModel.from_base(
        base, {"x": "probability"}, inputs=["last"], head_hidden_size=0, tuning="full"
    ).train()


def one_pass(preset: Preset) -> Step:
    """All steps of a trace in one forward."""
    model, traces = _reward_model(preset), make_traces(preset)
    batch = pad_traces([trace for trace, _ in traces], preset.shape.end_id)
    labels = torch.tensor([own for _, own in traces])

    def backward() -> float:
        loss: Tensor = step_bce(model(*batch)[..., 0], labels).mean()
        loss.backward()
        return loss.item()

    return Step(model, backward, batch[0].numel())


def prefixes(preset: Preset) -> Step:
    """Every prefix of steps is a sequence of its own, scored at its last token; as many rows at once as the
    other variants have."""
    model, traces = _reward_model(preset), make_traces(preset)
    rows = [
        (TokenTrace(trace.input_ids[: end + 1], [start], [end]), label)
        for trace, labels in traces
        for start, end, label in zip(trace.starts, trace.ends, labels, strict=True)
    ]
    rows.sort(key=lambda row: len(row[0].input_ids))
    batches = [rows[at : at + preset.traces] for at in range(0, len(rows), preset.traces)]
    padded = [pad_traces([trace for trace, _ in own], preset.shape.end_id) for own in batches]
    targets = [torch.tensor([[label] for _, label in own]) for own in batches]

    def backward() -> float:
        total = 0.0
        for batch, labels in zip(padded, targets, strict=True):
            loss: Tensor = step_bce(model(*batch)[..., 0], labels).sum() / len(rows)
            loss.backward()
            total += loss.item()
        return total

    return Step(model, backward, sum(batch[0].numel() for batch in padded))


def token_classifier(preset: Preset) -> Step:
    """Labels at the last token of every step, -100 elsewhere: format and loss of TRL's former PRM trainer,
    with the collator and loss of transformers' Trainer."""
    base = preset.shape.build(1, torch.float32, torch.device("cpu"))
    base.config.num_labels = 2
    model = LlamaForTokenClassification(base.config)
    model.model.load_state_dict(base.model.state_dict())
    rows = []
    for trace, labels in make_traces(preset):
        targets = [-100] * len(trace.input_ids)
        for end, label in zip(trace.ends, labels, strict=True):
            targets[end] = int(label)
        rows.append({"input_ids": list(trace.input_ids), "labels": targets})
    folder = tempfile.mkdtemp()
    settings = TrainingArguments(
        folder, per_device_train_batch_size=len(rows), use_cpu=True, report_to=[], max_grad_norm=0
    )
    collator = DataCollatorForTokenClassification(preset.shape.tokenizer())
    trainer = Trainer(model, settings, collator, train_dataset=rows)  # type: ignore[arg-type]
    batch = next(iter(trainer.get_train_dataloader()))

    def backward() -> float:
        loss: Tensor = trainer.compute_loss(model, dict(batch))
        loss.backward()
        return loss.item()

    return Step(model, backward, batch["input_ids"].numel())


if __name__ == "__main__":
    main()
