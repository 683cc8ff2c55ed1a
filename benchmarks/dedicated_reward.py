"""One process reward model of all objectives against one model of its own for each, on a run's labels.

    python benchmarks/dedicated_reward.py runs/maths --output dedicated.json
    python benchmarks/dedicated_reward.py runs/maths --play runs/dedicated_reward

Every model begins at the run's SFT model and is trained in this process with the run's settings and as many
passes over the same traces; a quarter of the dialogues is held out, the same for all. Figures are those of
candidates of one held-out prompt: how often the truly best scores above the truly worst, and the mean rank
correlation; intervals and differences resample prompts. A run whose objectives are supervised by pairs has no
traces, and is refused.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from finished_run import fresh_player, read_config
from measuring import machine, table, write_results
from reward_ablation import train

from mahalo_ray.config import ObjectiveConfig, RunConfig
from mahalo_ray.data.records import StepTrace
from mahalo_ray.decoding.policy import DeviceConfig, load_reward_model
from mahalo_ray.decoding.scorers import RewardModels
from mahalo_ray.decoding.stopping import boundary_for
from mahalo_ray.evaluation.methods import Method
from mahalo_ray.evaluation.results import MethodResult
from mahalo_ray.evaluation.statistics import mean_interval
from mahalo_ray.metrics import best_against_worst_accuracy, within_group_rank_correlation
from mahalo_ray.objectives import Weights
from mahalo_ray.pipeline.artifacts import run_model
from mahalo_ray.training.reward_recipe import RewardRecipe
from mahalo_ray.training.settings import RewardSettings

FIGURES = {
    "best above worst": best_against_worst_accuracy,
    "rank correlation": within_group_rank_correlation,
}
ByPrompt = dict[str, dict[str, float]]  # figure -> prompt -> value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run, which is only read")
    parser.add_argument("--epochs", type=float, help="default: the run's")
    parser.add_argument("--play", type=Path, help="output of `mahalo reward` with `reward.dedicated`")
    parser.add_argument("--students", type=int, default=240, help="problems played with --play")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = read_config(arguments.run)
    if arguments.play is not None:
        results = play(config, str(arguments.play), arguments.students)
        if arguments.output is not None:
            write_results(arguments.output, {"machine": machine(), "results": results})
        return
    if any(objective.supervision == "pairwise" for objective in config.objectives):
        raise SystemExit("the run's reward model learns from pairs: it has no traces to compare models on")
    if arguments.epochs is not None:
        training = config.reward.training.model_copy(update={"epochs": arguments.epochs})
        config = config.model_copy(update={"reward": config.reward.model_copy(update={"training": training})})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        unified, seconds = measure(config, arguments.run, config.objectives)
        rows, results = [], []
        for objective in config.objectives:
            dedicated, more = measure(config, arguments.run, [objective])
            for figure in FIGURES:
                ours, theirs = unified[objective.name][figure], dedicated[objective.name][figure]
                prompts = sorted(ours)
                values = [[one[prompt] for prompt in prompts] for one in (ours, theirs)]
                values.append([a - b for a, b in zip(*values, strict=True)])
                shown = [f"{m.value:.3f} [{m.low:.3f}, {m.high:.3f}]" for m in map(mean_interval, values)]
                rows.append([f"{objective.name}: {figure}", *shown, str(len(prompts))])
                results.append({"objective": objective.name, "figure": figure, "by_prompt": values})
            print(f"{objective.name}: {more:.0f} s, unified {seconds:.0f} s", flush=True)
    finally:
        dist.destroy_process_group()
    print(table(["", "unified", "dedicated", "unified − dedicated", "prompts"], rows))
    if arguments.output is not None:
        write_results(arguments.output, {"machine": machine(), "results": results})


def measure(
    config: RunConfig, run: Path, objectives: Sequence[ObjectiveConfig]
) -> tuple[dict[str, ByPrompt], float]:
    """A model of these objectives; its figures by objective, and how long it was trained."""
    names = [objective.name for objective in objectives]
    traces = [
        trace.model_copy(update={"labels": {name: trace.labels[name] for name in names}})
        for trace in StepTrace.load(str(run / "reward_rollouts" / "traces"))
    ]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        StepTrace.save(traces, f"{folder}/part-000000.parquet")
        reward = config.reward.model_copy(update={"held_out_fraction": 0.25})
        recipe = RewardRecipe(
            RewardSettings(
                model_url=run_model(str(run), "sft"),
                output_url="not written",
                model=config.model,
                seed=config.seed,
                traces_url=folder,
                objectives=objectives,
                reward=reward,
            )
        )
        model = train(recipe, reward.training, config.seed)
    seconds = time.monotonic() - began
    return {name: held_out(recipe, model, traces, name) for name in names}, seconds


def held_out(
    recipe: RewardRecipe, model: torch.nn.Module, traces: Sequence[StepTrace], objective: str
) -> ByPrompt:
    """Every figure of one objective, of the held-out prompts whose candidates differ in it."""
    column = [o.name for o in recipe.objectives].index(objective)
    with torch.no_grad():
        scored = recipe.evaluator(lambda function, tensors: function(model, **tensors)).values(
            recipe.held_out, recipe.scores
        )
    label_of = {trace.id: float(trace.labels[objective][0] or 0.0) for trace in traces}
    candidates: dict[str, list[int]] = {}
    for unit in recipe.held_out:
        candidates.setdefault(recipe.data.prompt_keys[unit], []).extend(recipe.data.members[unit])
    figures: ByPrompt = {figure: {} for figure in FIGURES}
    for prompt, rows in candidates.items():
        scores = [float(scored[row][0, column]) for row in rows]
        truth = [label_of[recipe.data.names[row]] for row in rows]
        if np.ptp(truth) > 0:
            for figure, measured in FIGURES.items():
                figures[figure][str(prompt)] = measured(scores, truth, [0] * len(rows))
    return figures


def play(config: RunConfig, rewards: str, students: int) -> list[dict[str, object]]:
    """The run's SFT model guided by the unified model and by the dedicated ones; prints the outcomes."""
    trained = read_config(rewards)
    groups = range(len(trained.reward.dedicated))
    urls = {
        "unified": [run_model(rewards, "reward")],
        "dedicated": [f"{rewards}/reward_dedicated/{number}/model" for number in groups],
    }
    player = fresh_player(config, students)
    names = config.objective_names
    guides = {**{name: Weights.one(name) for name in names}, "the sum": Weights.balanced(names)}
    outcomes: dict[str, dict[str, MethodResult]] = {}
    count = config.guided.num_candidates
    for guided_by, models in urls.items():
        loaded = [load_reward_model(url, DeviceConfig()) for url in models]
        boundary = boundary_for(player.domain.boundary)
        player.reward_models = RewardModels(loaded, boundary, player.chat.tokenizer, player.sft.end_ids)
        outcomes[guided_by] = {}
        for guide, weights in guides.items():
            method = Method(guide, "guided_sft", guidance=weights, num_candidates=count)
            outcomes[guided_by][guide] = player.run(method).result
    rows, results = [], list[dict[str, object]]()
    for guide in guides:
        for name in names:
            values = [outcomes[guided_by][guide].values[name] for guided_by in urls]
            values.append([a - b for a, b in zip(*values, strict=True)])
            shown = [f"{m.value:.3f} [{m.low:.3f}, {m.high:.3f}]" for m in map(mean_interval, values)]
            rows.append([f"by {guide}: {name}", *shown, str(students)])
            results.append({"guide": guide, "objective": name, "by_problem": values})
    print(table(["", *urls, "unified − dedicated", "problems"], rows))
    return results


if __name__ == "__main__":
    main()
