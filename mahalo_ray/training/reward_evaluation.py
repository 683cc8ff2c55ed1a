"""A trained reward model on rows it has not seen: how well it orders candidates of one prompt, and its
calibration."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from mahalo_ray.config import ObjectiveConfig
from mahalo_ray.data.records import ScoredPair, ScoredTrace
from mahalo_ray.models import ProcessRewardModel
from mahalo_ray.training.batches import Indices, shard
from mahalo_ray.training.recipe import Inference
from mahalo_ray.training.reward_data import LabelledTraces

if TYPE_CHECKING:
    from mahalo_ray.training.reward import RewardRecipe

# Raw scores [steps, objectives] (or other values of steps) by sequence number.
StepValues = dict[int, npt.NDArray[np.float32]]


def step_values(
    recipe: RewardRecipe,
    groups: Indices,
    function: Callable[..., Tensor],
    micro_rows: int,
    infer: Inference,
    rank: int,
    workers: int,
) -> StepValues:
    """`function`(model, **tensors) -> [B, S, N] of all sequences of the groups, on every worker; each worker
    computes a share."""
    own: StepValues = {}
    for part, counted in shard(groups, recipe.row_groups, micro_rows, rank, workers):
        rows, tensors = recipe.scoring_batch(part)
        values = infer(function, tensors).float().cpu().numpy()
        if counted:
            own |= {row: values[i, : len(recipe.data.tokens[row].ends)].copy() for i, row in enumerate(rows)}
    shares: list[StepValues] = [{}] * workers
    dist.all_gather_object(shares, own)
    return {row: values for share in shares for row, values in share.items()}


def held_out_figures(
    data: LabelledTraces,
    groups: Indices,
    scores: StepValues,
    objectives: Sequence[ObjectiveConfig],
    gap: float,
) -> dict[str, float]:
    """Per objective: correlation of score and label; `ranking_accuracy`: share of pairs of one prompt and
    step with labels more than `gap` apart that the scores order rightly; for pairs: `accuracy`."""
    figures: dict[str, float] = {}
    for column, objective in enumerate(objectives):
        if objective.supervision == "pairwise":
            right = [
                bool(scores[data.members[u][0]][0, column] > scores[data.members[u][1]][0, column])
                for u in groups
                if data.pair_objective[u] == column
            ]
            if right:
                figures[f"{objective.name}/accuracy"] = float(np.mean(right))
            continue
        found = labelled_scores(data, groups, scores, column)
        values, targets = (np.array([row[i] for row in found], dtype=np.float64) for i in (1, 2))
        if len(found) > 1 and values.std() > 0 and targets.std() > 0:
            figures[f"{objective.name}/correlation"] = float(np.corrcoef(values, targets)[0, 1])
        order = _ordering([row[0] for row in found], values, targets, gap)
        if order:
            figures[f"{objective.name}/ranking_accuracy"] = float(np.mean(order))
    return figures


def labelled_scores(
    data: LabelledTraces, groups: Indices, scores: StepValues, column: int
) -> list[tuple[Hashable, float, float]]:
    """(prompt and step, raw score, label) of every labelled step of one objective."""
    found: list[tuple[Hashable, float, float]] = []
    for group in groups:
        for row in data.members[group]:
            labels = data.labels[row][:, column]
            for step in np.flatnonzero(~np.isnan(labels)):
                found.append(
                    (
                        (data.prompt_keys[group], int(step)),
                        float(scores[row][step, column]),
                        float(labels[step]),
                    )
                )
    return found


def _ordering(
    groups: Sequence[Hashable],
    values: npt.NDArray[np.float64],
    targets: npt.NDArray[np.float64],
    gap: float,
) -> list[bool]:
    members: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    return [
        bool(values[i] > values[j])
        for own in members.values()
        for i in own
        for j in own
        if targets[i] - targets[j] > gap
    ]


def calibrate(model: ProcessRewardModel, data: LabelledTraces, groups: Indices, scores: StepValues) -> None:
    """Store mean, spread and quantiles of every objective's scores with the model: of all steps of the
    sequences that are labelled (or paired) for it; within-prompt spread included where prompts have several
    candidates. Scores that do not vary cannot be calibrated: ValueError."""
    rows = [(row, group) for group in groups for row in data.members[group]]
    for column, name in enumerate(model.objectives):
        values: list[float] = []
        prompts_and_steps: list[Hashable] = []
        for row, group in rows:
            if not (data.pair_objective[group] == column or (~np.isnan(data.labels[row][:, column])).any()):
                continue
            own = model.activate(torch.from_numpy(scores[row]))[:, column].tolist()
            values += own
            prompts_and_steps += [(data.prompt_keys[group], step) for step in range(len(own))]
        repeated = len(set(prompts_and_steps)) < len(prompts_and_steps)
        model.fit_calibration({name: values}, {name: prompts_and_steps} if repeated else None)


def scored_rows(
    model: ProcessRewardModel, data: LabelledTraces, groups: Indices, scores: StepValues
) -> tuple[list[ScoredTrace], list[ScoredPair]]:
    """The scored sequences of the groups as records, for figures of any kind."""
    traces, pairs = [], []
    for group in groups:
        objective = data.pair_objective[group]
        values = [model.activate(torch.from_numpy(scores[row])) for row in data.members[group]]
        if objective >= 0:
            chosen, rejected = (float(own[0, objective]) for own in values)
            name = model.objectives[objective]
            pairs.append(
                ScoredPair(
                    id=data.prompt_keys[group],
                    dialogue=data.split_keys[group],
                    objective=name,
                    chosen=chosen,
                    rejected=rejected,
                )
            )
            continue
        for row, own in zip(data.members[group], values, strict=True):
            traces.append(_scored_trace(model.objectives, data, group, row, own))
    return traces, pairs


def _scored_trace(
    objectives: Sequence[str], data: LabelledTraces, group: int, row: int, scores: Tensor
) -> ScoredTrace:
    tokens, labels = data.tokens[row], data.labels[row]
    columns = {name: labels[:, column] for column, name in enumerate(objectives)}
    return ScoredTrace(
        id=data.names[row],
        group=data.prompt_keys[group],
        dialogue=data.split_keys[group],
        turns_before=data.turns_before[data.names[row]],
        tokens=[end - start + 1 for start, end in zip(tokens.starts, tokens.ends, strict=True)],
        scores={name: scores[:, column].tolist() for column, name in enumerate(objectives)},
        labels={
            name: [None if np.isnan(value) else float(value) for value in own]
            for name, own in columns.items()
            if not np.isnan(own).all()
        },
        outcome=data.outcomes.get(data.names[row]),
    )
