"""Which part of the reward model matters: head inputs and the ranking loss, on the miniature.

    python benchmarks/reward_ablation.py runs/quickstart runs/seed1 runs/seed2 --output reward_ablation.json

Every variant is trained on the labelled traces of every run, from that run's SFT model and with its seed, in
one process; a quarter of the dialogues is held out, the same for all variants. Figures are of the objective
`accuracy` among held-out candidates of one prompt: how often a turn whose arithmetic is right scores above
one whose arithmetic is wrong, how often the truly best candidate scores above the truly worst, and the mean
rank correlation. Results are written after every training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from measuring import machine, write_results
from torch import Tensor

from mahalo_ray.config import ModelConfig, RewardConfig, TrainingConfig, load_config
from mahalo_ray.data.records import StepTrace
from mahalo_ray.domains.tutoring.moves import Move, parse_turn
from mahalo_ray.evaluation.statistics import bootstrap_means, percentile_interval
from mahalo_ray.metrics import best_against_worst_accuracy, within_group_rank_correlation
from mahalo_ray.training.batches import accumulation_steps, split_batch
from mahalo_ray.training.deepspeed_config import optimizer_and_schedule
from mahalo_ray.training.reward_recipe import RewardRecipe
from mahalo_ray.training.settings import RewardSettings

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.yaml"
INPUTS = (("last",), ("last", "pooled"), ("last", "reference_logps"), ("last", "pooled", "reference_logps"))
OBJECTIVE = "accuracy"
FIGURES = ("correct_against_wrong", "best_against_worst", "rank_correlation")


@dataclass(frozen=True)
class Variant:
    """What is compared."""

    inputs: tuple[str, ...]
    ranking_weight: float

    @property
    def name(self) -> str:
        return " + ".join(self.inputs) + (", ranking" if self.ranking_weight else "")


VARIANTS = tuple(itertools.starmap(Variant, itertools.product(INPUTS, (0.0, 1.0))))


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    results: dict[str, Any] = {"benchmark": "reward_ablation", "machine": machine(), "epochs": options.epochs}
    results["held_out_fraction"], results["runs"] = options.held_out, []
    try:
        for variant, folder in itertools.product(VARIANTS, options.runs):
            started = time.perf_counter()
            figures = measure(Path(folder), variant, options.epochs, options.held_out)
            figures |= {"variant": variant.name, "run": Path(folder).name}
            figures["seconds"] = round(time.perf_counter() - started, 1)
            results["runs"].append(figures)
            print(f"{Path(folder).name}: {variant.name}: {figures['seconds']} s", file=sys.stderr, flush=True)
            if options.output is not None:
                write_results(options.output, results)
    finally:
        dist.destroy_process_group()
    print(report(results["runs"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", help="outputs of finished quickstarts")
    parser.add_argument("--epochs", type=float, default=2.0, help="of training; the quickstart has 2")
    parser.add_argument("--held-out", type=float, default=0.25, help="share of the dialogues")
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: its own choice")
    parser.add_argument("--output", type=Path, default=None, help="results as JSON")
    return parser


def measure(folder: Path, variant: Variant, epochs: float, held_out: float) -> dict[str, Any]:
    """Train one variant on one run's traces; its figures on held-out dialogues."""
    config = load_config(QUICKSTART)
    training = config.reward.training.model_copy(update={"epochs": epochs})
    reward = RewardConfig(
        inputs=list(variant.inputs),
        ranking_weight=variant.ranking_weight,
        held_out_fraction=held_out,
        training=training,
    )
    traces, model = folder / "reward_rollouts" / "traces", ModelConfig(base="the run's own", max_length=512)
    seed = int(yaml.safe_load((folder / "config.yaml").read_text())["seed"])
    recipe = RewardRecipe(
        RewardSettings(
            model_url=str(folder / "sft" / "model"),
            output_url="not written",
            model=model,
            seed=seed,
            traces_url=str(traces),
            objectives=config.objectives,
            reward=reward,
        )
    )
    return held_out_figures(recipe, train(recipe, training, seed), StepTrace.load(str(traces)), training)


def train(recipe: RewardRecipe, training: TrainingConfig, seed: int) -> torch.nn.Module:
    """The recipe's own batches, loss and schedule in a plain loop."""
    torch.manual_seed(seed)
    model = recipe.build_model().train()
    optimizer, schedule = optimizer_and_schedule(
        recipe.parameter_groups(model), training, len(recipe.batches)
    )
    rows = training.micro_batch_size_per_device
    accumulation = accumulation_steps(recipe.batches, recipe.row_groups, rows, 1)
    for batch in recipe.batches:
        loss_denominators = recipe.loss_denominators(batch)
        for (units,) in split_batch(batch, recipe.row_groups, rows, 1, accumulation):
            if len(units):
                recipe.loss(model, **recipe.collate(units, loss_denominators, True))[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clipping)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def held_out_figures(
    recipe: RewardRecipe, model: torch.nn.Module, traces: Sequence[StepTrace], training: TrainingConfig
) -> dict[str, Any]:
    """Per figure: the value of every held-out prompt that has one."""

    @torch.no_grad()
    def infer(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> Tensor:
        return function(model, **tensors)

    units, data = recipe.held_out, recipe.data
    column = next(i for i, o in enumerate(recipe.objectives) if o.name == OBJECTIVE)
    scored = recipe.evaluator(infer).values(units, recipe.scores)
    by_id = {trace.id: trace for trace in traces}
    found: dict[str, list[float]] = {name: [] for name in FIGURES}
    candidates: dict[str, list[int]] = {}  # without ranking every candidate is a unit of its own
    for unit in units:
        candidates.setdefault(data.prompt_keys[unit], []).extend(data.members[unit])
    for rows in candidates.values():
        scores = [float(scored[row][0, column]) for row in rows]
        own = [by_id[data.names[row]] for row in rows]
        truth = [float(trace.labels[OBJECTIVE][0] or 0.0) for trace in own]
        right = [states_right_arithmetic(trace.steps[0]) for trace in own]
        wins = [
            float(np.sign(scores[i] - scores[j]) + 1) / 2
            for i, j in itertools.product(range(len(own)), repeat=2)
            if right[i] is True and right[j] is False
        ]
        found["correct_against_wrong"] += [float(np.mean(wins))] if wins else []
        if np.ptp(truth) > 0:
            same = [0] * len(own)
            found["best_against_worst"].append(best_against_worst_accuracy(scores, truth, same))
            found["rank_correlation"].append(within_group_rank_correlation(scores, truth, same))
    return {"steps": len(recipe.batches), **found}


def states_right_arithmetic(turn: str) -> bool | None:
    """Whether all results that a tutor turn states are right; None where it states none."""
    steps = [sentence for sentence in parse_turn(turn) if sentence.move is Move.STEP]
    if not steps:
        return None
    return all(s.operation is not None and s.operation.result == s.stated for s in steps)


def report(runs: Sequence[dict[str, Any]]) -> str:
    """Two Markdown tables, each cell the mean over runs of each run's mean, with its 95 % bootstrap interval
    over prompts (every run's own): the figures, with those of each run, and the paired difference to all
    inputs with ranking."""
    folders = list(dict.fromkeys(run["run"] for run in runs))
    by_variant = {variant: [run for run in runs if run["variant"] == variant] for variant in _variants(runs)}
    default = by_variant[VARIANTS[-1].name]
    prompts = {name: sum(len(run[name]) for run in default) for name in FIGURES}
    head = "| variant | " + " | ".join(f"{name} (n = {prompts[name]})" for name in FIGURES) + " |"
    rule = "|---|" + "---|" * len(FIGURES)
    values, differences = [head, rule], [head, rule]
    for variant, own in by_variant.items():
        cells = [_cell([run[name] for run in own], each=True) for name in FIGURES]
        values.append(f"| {variant} | " + " | ".join(cells) + " |")
        if own is not default:
            cells = [_cell(_paired(own, default, name), each=False) for name in FIGURES]
            differences.append(f"| {variant} | " + " | ".join(cells) + " |")
    prompts_of = f"Prompts of {len(folders)} runs ({', '.join(folders)}), the same for every variant."
    return "\n".join([*values, prompts_of, "", f"Minus {VARIANTS[-1].name}:", *differences])


def _variants(runs: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(run["variant"] for run in runs))


def _paired(own: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], name: str) -> list[list[float]]:
    """Differences prompt by prompt: every variant lists the same prompts in the same order."""
    return [
        [a - b for a, b in zip(one[name], two[name], strict=True)]
        for one, two in zip(own, other, strict=True)
    ]


def _cell(per_run: Sequence[Sequence[float]], each: bool) -> str:
    means = [
        bootstrap_means(np.array(values)[:, None], 2000, seed)[:, 0] for seed, values in enumerate(per_run)
    ]
    low, high = percentile_interval(np.mean(means, axis=0), 0.95)
    sign = "" if each else "+"
    cell = f"{np.mean([np.mean(values) for values in per_run]):{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
    return cell + (f" ({', '.join(f'{np.mean(values):.3f}' for values in per_run)})" if each else "")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--show":
        print(report(json.loads(Path(sys.argv[2]).read_text())["runs"]))
    else:
        main()
