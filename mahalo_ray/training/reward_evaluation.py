"""Forward passes of a reward model outside training steps: head inputs of a frozen backbone, scores and
metrics of held-out rows, calibration. Every worker computes a part."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mahalo_ray import metrics
from mahalo_ray.config import ObjectiveConfig
from mahalo_ray.data import storage
from mahalo_ray.data.records import ScoredPair, ScoredTrace
from mahalo_ray.decoding.cpu_matmul import OneDNNRewardModel
from mahalo_ray.models import ProcessRewardModel
from mahalo_ray.training.batches import Indices, RowGroups, shard
from mahalo_ray.training.recipe import Inference, PreparationProgress
from mahalo_ray.training.reward_data import (
    LabelledTraces,
    StepValues,
    read_features,
    trace_key,
    write_features,
)

# Tokens read between two parts of the feature store, by all workers: what an interruption may cost.
_PART_TOKENS = 32768


class StepEvaluator:
    """Computes values of all steps of some groups, each worker a part of them."""

    def __init__(
        self, data: LabelledTraces, row_groups: RowGroups, pad_id: int, micro_rows: int, infer: Inference
    ) -> None:
        self.data, self._row_groups, self._pad_id = data, row_groups, pad_id
        self._micro_rows, self._infer = micro_rows, infer

    def values(
        self, groups: Indices, function: Callable[..., Tensor], features: StepValues | None = None
    ) -> StepValues:
        """`function`(model, **tensors of `LabelledTraces.batch`) -> [B, S, N] of all sequences of the groups,
        on every worker."""
        computed: StepValues = {}
        rank, workers = dist.get_rank(), dist.get_world_size()
        for part, counted in shard(groups, self._row_groups, self._micro_rows, rank, workers):
            rows, tensors = self.data.batch(part, self._pad_id, features)
            values = self._infer(function, tensors).float().cpu().numpy()
            if counted:
                steps = [len(self.data.tokens[row].ends) for row in rows]
                computed |= {row: values[i, : steps[i]].copy() for i, row in enumerate(rows)}
        of_workers: list[StepValues] = [{}] * workers
        dist.all_gather_object(of_workers, computed)
        return {row: values for part in of_workers for row, values in part.items()}


def cached_features(
    evaluator: StepEvaluator, store_url: str | None, progress: PreparationProgress
) -> StepValues:
    """Features [S, F] of every sequence by its number, on every worker; computed are those the store lacks.

    Without `store_url` nothing is kept on disk. `progress` counts tokens. Rank 0 lists the store for all:
    workers that looked for themselves while another run writes could disagree about what is missing, and wait
    for each other for ever.
    """
    data = evaluator.data
    keys = [trace_key(tokens) for tokens in data.tokens]
    files: list[list[str]] = [[]]
    if store_url is not None and dist.get_rank() == 0:
        files = [storage.list_files(store_url, ".parquet")]
    dist.broadcast_object_list(files)
    known = read_features(files[0])
    features = {row: known[key] for row, key in enumerate(keys) if key in known}
    lacking = [group for group, rows in enumerate(data.members) if any(row not in features for row in rows)]
    if not lacking:
        return features
    tokens = np.cumsum(data.row_groups.tokens[lacking])
    cuts = np.flatnonzero(np.diff(tokens // _PART_TOKENS)) + 1
    step_features = StepFeatures()
    for end, groups in zip([*cuts, len(lacking)], np.split(np.array(lacking), cuts), strict=True):
        computed = evaluator.values(groups, step_features)
        if store_url is not None and dist.get_rank() == 0:
            write_features(store_url, {keys[row]: values for row, values in computed.items()})
        features |= computed
        progress(int(tokens[end - 1]), int(tokens[-1]))
    return features


class StepFeatures:
    """Head inputs [B, S, F] of one batch after another, all of one model."""

    def __init__(self) -> None:
        self._fast: OneDNNRewardModel | None = None

    def __call__(self, model: nn.Module, **tensors: Tensor) -> Tensor:
        reward = cast(ProcessRewardModel, model)
        self._fast = self._fast or OneDNNRewardModel(reward)
        features: Callable[..., Tensor] = reward.features
        with self._fast():
            return features(**tensors).float()


def held_out_metrics(
    data: LabelledTraces,
    groups: Indices,
    scores: StepValues,
    objectives: Sequence[ObjectiveConfig],
    gap: float,
) -> dict[str, float]:
    """Per objective: `correlation` of score and label, and `ranking_accuracy`: share of pairs of one prompt
    and step with labels more than `gap` apart that the scores order rightly; of pairs: `accuracy`. Equal
    scores count half. A metric that the data leave undefined is left out."""
    measured: dict[str, float] = {}
    for column, objective in enumerate(objectives):
        if objective.supervision == "pairwise":
            members = [data.members[group] for group in groups if data.pair_objective[group] == column]
            if members:
                chosen, rejected = (
                    [float(scores[rows[side]][0, column]) for rows in members] for side in (0, 1)
                )
                measured[f"{objective.name}/accuracy"] = metrics.pair_accuracy(chosen, rejected)
            continue
        prompts_and_steps, values, labels = labelled_scores(data, groups, scores, column)
        if not values:
            continue
        measured[f"{objective.name}/correlation"] = metrics.pearson(values, labels)
        measured[f"{objective.name}/ranking_accuracy"] = metrics.within_group_pair_accuracy(
            values, labels, prompts_and_steps, gap
        )
    return {name: value for name, value in measured.items() if not np.isnan(value)}


def labelled_scores(
    data: LabelledTraces, groups: Indices, scores: StepValues, column: int
) -> tuple[list[int], list[float], list[float]]:
    """Of every labelled step of one objective: a number for its prompt and step, its raw score, its label."""
    numbers: dict[Hashable, int] = {}
    prompts_and_steps: list[int] = []
    values: list[float] = []
    targets: list[float] = []
    for group in groups:
        for row in data.members[group]:
            labels = data.labels[row][:, column]
            for step in np.flatnonzero(~np.isnan(labels)):
                key = (data.prompt_keys[group], int(step))
                prompts_and_steps.append(numbers.setdefault(key, len(numbers)))
                values.append(float(scores[row][step, column]))
                targets.append(float(labels[step]))
    return prompts_and_steps, values, targets


def calibrate_model(
    model: ProcessRewardModel, data: LabelledTraces, groups: Indices, scores: StepValues
) -> None:
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
            of_steps = model.activate(torch.from_numpy(scores[row]))[:, column].tolist()
            values += of_steps
            prompts_and_steps += [(data.prompt_keys[group], step) for step in range(len(of_steps))]
        repeated = len(set(prompts_and_steps)) < len(prompts_and_steps)
        model.fit_calibration({name: values}, {name: prompts_and_steps} if repeated else None)


def scored_rows(
    model: ProcessRewardModel, data: LabelledTraces, groups: Indices, scores: StepValues
) -> tuple[list[ScoredTrace], list[ScoredPair]]:
    """The scored sequences of the groups as records, for metrics of any kind."""
    traces, pairs = [], []
    for group in groups:
        objective = data.pair_objective[group]
        of_rows = [model.activate(torch.from_numpy(scores[row])) for row in data.members[group]]
        if objective >= 0:
            chosen, rejected = (float(steps[0, objective]) for steps in of_rows)
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
        for row, steps in zip(data.members[group], of_rows, strict=True):
            traces.append(_scored_trace(model.objectives, data, group, row, steps))
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
            name: [None if np.isnan(value) else float(value) for value in values]
            for name, values in columns.items()
            if not np.isnan(values).all()
        },
        outcome=data.outcomes.get(data.names[row]),
    )
