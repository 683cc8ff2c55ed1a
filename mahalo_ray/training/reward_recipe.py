"""The process reward model: labelled steps by squared error or cross entropy, candidates of one prompt ranked
against each other, whole responses by Bradley-Terry; all objectives at once.

L = sum over objectives of [mean over the batch's labelled steps of the pointwise loss
                            + ranking_weight * mean over its within-prompt pairs of the ranking loss],
and for objectives supervised by pairs the mean Bradley-Terry loss. Squared errors are divided by the variance
of the labels (1 = as good as their mean), and ranked values by their spread within a prompt, so that
objectives of any scale weigh alike.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mahalo_ray import metrics
from mahalo_ray.config import ObjectiveConfig
from mahalo_ray.data import storage
from mahalo_ray.data.records import (
    HELD_OUT_PAIRS,
    HELD_OUT_TRACES,
    PreferencePair,
    ScoredPair,
    ScoredTrace,
    StepTrace,
)
from mahalo_ray.decoding.cpu_matmul import OneDNNRewardModel
from mahalo_ray.losses import bradley_terry, labelled, step_bce, value_mse, within_prompt_ranking
from mahalo_ray.models import ProcessRewardModel
from mahalo_ray.models.backbone import check_trained_length, load_config, load_tokenizer
from mahalo_ray.models.folder import keeps_backbone, model_folder
from mahalo_ray.models.reward_heads import OUTPUT_KIND_OF
from mahalo_ray.models.scoring import StepEncoder
from mahalo_ray.training.batches import Indices, RowGroups, hash_split, plan_batches, shard
from mahalo_ray.training.deepspeed_config import parameter_group
from mahalo_ray.training.pairs import PairEncoder, split_key
from mahalo_ray.training.recipe import PAD_ID, Inference, LossOutput, PreparationProgress, Probe, Tensors
from mahalo_ray.training.reference_logps import reference_key
from mahalo_ray.training.reward_data import (
    MODEL_INPUTS,
    LabelledTraces,
    StepValues,
    add_pairs,
    add_traces,
    as_steps,
    check_labels,
    count_labels,
    padded_labels,
    read_features,
    trace_key,
    value_scale,
    write_features,
)
from mahalo_ray.training.settings import RewardSettings

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


_METRICS = ("count", "loss", "correct", "ranked", "ranking_loss", "ranked_right")


class RewardRecipe:
    """Metrics per objective: loss (pointwise or Bradley-Terry), accuracy (of judgements or pairs), ranking
    loss and ranking accuracy (share of within-prompt pairs in the right order)."""

    probe: Probe | None = None

    def __init__(self, settings: RewardSettings) -> None:
        """Reads StepTrace and PreferencePair records; an objective without any is an error."""
        self._settings, self._reward, self._model = settings, settings.reward, settings.model
        self.objectives = list(settings.objectives)
        self._names = [objective.name for objective in self.objectives]
        self._training, self._folder = settings.training, model_folder(settings.model_url)
        self._tokenizer = load_tokenizer(self._folder)
        self.data = self._read()
        self.row_groups = self.data.row_groups
        aside = hash_split(self.data.split_keys, self._reward.held_out_fraction, settings.seed)
        self.held_out, trained = np.flatnonzero(aside), np.flatnonzero(~aside)
        gap = self._reward.ranking_min_gap if self._reward.ranking_weight > 0 else None
        self._labels, self._ranked = count_labels(self.data, len(self._names), gap)
        check_labels(self._labels[trained], self._names, "to train the reward model on")
        if len(self.held_out):
            check_labels(
                self._labels[self.held_out], self._names, "held out: raise 'reward.held_out_fraction'"
            )
        self._variance, self._spread = value_scale(self.data, trained, self.objectives)
        rows, size, steps = self.row_groups.rows[trained], self._training.batch_size, self._training.max_steps
        batches = plan_batches(rows, size, self._training.epochs, steps, settings.seed)
        self.batches = [trained[batch] for batch in batches]
        self._features: StepValues = {}
        self.metric_names = tuple(f"{name}/{metric}" for name in self._names for metric in _METRICS)

    def _read(self) -> LabelledTraces:
        settings, length = self._settings, self._model.max_length
        data, encoder = LabelledTraces(), StepEncoder(self._tokenizer, settings.step_separator)
        if settings.traces_url is not None:
            ranked = self._reward.ranking_weight > 0
            traces = StepTrace.stream(settings.traces_url)
            add_traces(data, traces, self.objectives, encoder, length, by_group=ranked)
        if settings.pairs_url is not None:
            by_pairs = {o.name for o in self.objectives if o.supervision == "pairwise"}
            token_pairs, split_keys = PairEncoder(self._names, encoder.format, length), list[str]()
            for pair in PreferencePair.stream(settings.pairs_url):
                if pair.objective in by_pairs:
                    token_pairs.add(as_steps(pair, encoder))
                    split_keys.append(split_key(pair))
            add_pairs(data, token_pairs.pairs(), split_keys, len(self._names))
        return data

    def build_model(self) -> nn.Module:
        check_trained_length(load_config(self._folder), self._model.max_length)
        return ProcessRewardModel.from_base(
            self._folder,
            {objective.name: OUTPUT_KIND_OF[objective.supervision] for objective in self.objectives},
            inputs=self._reward.inputs,
            head_hidden_size=self._reward.head_hidden_size,
            tuning=self._reward.backbone,
            lora_settings=self._reward.lora,
            tokenizer=self._tokenizer,
            step_separator=self._settings.step_separator,
            seed=self._settings.seed,
            dtype=getattr(torch, self._model.dtype),
            attn_implementation=self._model.attn_implementation,
        )

    def enable_gradient_checkpointing(self, model: nn.Module) -> None:
        cast(ProcessRewardModel, model).gradient_checkpointing_enable()

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        reward, decay, rate = (
            cast(ProcessRewardModel, model),
            self._training.weight_decay,
            self._training.learning_rate,
        )
        backbone, heads = list(reward.backbone_parameters()), list(reward.head_parameters())
        groups = parameter_group("backbone", backbone, rate, decay) if backbone else []
        return groups + parameter_group("heads", heads, self._reward.head_learning_rate or rate, decay)

    def loss_denominators(self, batch: Indices) -> dict[str, float]:
        counts = {
            f"{name}/labels": c for name, c in zip(self._names, self._labels[batch].sum(axis=0), strict=True)
        }
        ranked = zip(self._names, self._ranked[batch].sum(axis=0), strict=True)
        return counts | {f"{name}/ranked": count for name, count in ranked}

    def prepare(self, infer: Inference, rank: int, workers: int, progress: PreparationProgress) -> None:
        """A frozen backbone reads every sequence here, once; after that only its head inputs are used."""
        if self._reward.backbone != "frozen" or not self._reward.cache_features:
            return
        url = self._settings.features_url
        if url is not None:
            key = f"{reference_key(self._folder, self._model)}-{'-'.join(self._reward.inputs)}"
            url = storage.join(url, key)
        self._features = cached_features(self.evaluator(infer), url, progress)

    def evaluator(self, infer: Inference) -> StepEvaluator:
        """Values of all steps of some groups, under the model behind `infer`."""
        micro_rows = self._training.micro_batch_size_per_device
        return StepEvaluator(self.data, self.row_groups, PAD_ID, micro_rows, infer)

    def scoring_batch(self, groups: Indices) -> tuple[list[int], Tensors]:
        """The sequences of the groups, and the tensors `scores` reads: token ids, or kept head inputs."""
        return self.data.batch(groups, PAD_ID, self._features)

    def collate(self, groups: Indices, loss_denominators: Mapping[str, float], counted: bool) -> Tensors:
        rows, tensors = self.scoring_batch(groups)
        number = np.repeat(np.arange(len(groups)), self.row_groups.rows[groups])
        of_pairs = [
            (self.data.pair_objective[group], self.data.weights[group], self.data.margins[group])
            for group in groups
        ]
        pair, weight, margin = np.repeat(np.array(of_pairs), self.row_groups.rows[groups], axis=0).T
        scale = [
            [counted / (loss_denominators[f"{name}/{kind}"] or 1.0) for name in self._names]
            for kind in ("labels", "ranked")
        ]
        return {
            **tensors,
            "labels": padded_labels([self.data.labels[row] for row in rows]),
            "group": torch.from_numpy(number),
            "pair_objective": torch.from_numpy(pair.astype(np.int64)),
            "pair_weight": torch.from_numpy(weight.astype(np.float32)),
            "pair_margin": torch.from_numpy(margin.astype(np.float32)),
            "loss_weight": torch.tensor(scale, dtype=torch.float32),
            "present": torch.tensor(float(counted)),
        }

    def scores(self, model: nn.Module, **tensors: Tensor) -> Tensor:
        """Raw scores [B, S, H] of what `scoring_batch` gives."""
        if "features" in tensors:
            return cast(ProcessRewardModel, model).heads(tensors["features"])
        result: Tensor = model(
            *(tensors[name] for name in MODEL_INPUTS), chunk_size=self._training.logit_chunk_size
        )
        return result

    def loss(self, model: nn.Module, **tensors: Tensor) -> LossOutput:
        scores = self.scores(model, **tensors)
        total, rows, sums = scores.sum() * 0.0, [], []
        for column, objective in enumerate(self.objectives):
            if objective.supervision == "pairwise":
                pointwise, metrics = self._pair_loss(scores[..., column], column, tensors)
                ranking = scores.new_zeros(0)
            else:
                pointwise, metrics = self._step_loss(scores[..., column], column, tensors)
                ranking = self._ranking_loss(scores[..., column], column, tensors)
            by_label, by_pair = tensors["loss_weight"][:, column]
            total = total + pointwise.sum() * by_label + self._reward.ranking_weight * ranking.sum() * by_pair
            rows.append(pointwise.detach())
            right = (ranking.detach() < np.log(2.0)).sum()
            sums += [*metrics, ranking.new_tensor(len(ranking)), ranking.detach().sum(), right]
        return total, torch.cat(rows), torch.stack([value.float() for value in sums]) * tensors["present"]

    def _step_loss(self, scores: Tensor, column: int, tensors: Tensors) -> tuple[Tensor, list[Tensor]]:
        """Pointwise loss of every row [B]; count, sum, and judgements that are right."""
        targets = tensors["labels"][..., column]
        known = labelled(targets)
        if OUTPUT_KIND_OF[self.objectives[column].supervision] == "value":
            losses, right = value_mse(scores, targets) / self._variance[column], known & False
        else:
            losses, right = step_bce(scores, targets), known & ((scores > 0) == (targets > 0.5))
        rows = losses.sum(dim=1)
        return rows, [known.sum(), rows.detach().sum(), right.sum()]

    def _pair_loss(self, scores: Tensor, column: int, tensors: Tensors) -> tuple[Tensor, list[Tensor]]:
        """Weighted Bradley-Terry loss of every pair, in the row of its chosen response [B]; sum of weights,
        of losses, and of the weights of pairs in the right order."""
        chosen_rows = (tensors["pair_objective"] == column).nonzero()[0::2, 0]
        first, second = scores[chosen_rows, 0], scores[chosen_rows + 1, 0]
        weight = tensors["pair_weight"][chosen_rows]
        losses = weight * bradley_terry(first, second, tensors["pair_margin"][chosen_rows])
        rows = scores.new_zeros(len(scores)).index_add(0, chosen_rows, losses)
        return rows, [weight.sum(), losses.detach().sum(), weight[first > second].sum()]

    def _ranking_loss(self, scores: Tensor, column: int, tensors: Tensors) -> Tensor:
        """Ranking loss [P] of all pairs of one prompt and step."""
        if self._reward.ranking_weight == 0:
            return scores.new_zeros(0)
        steps = torch.arange(scores.shape[1], device=scores.device)
        prompt_and_step = tensors["group"][:, None] * scores.shape[1] + steps
        targets, gap = tensors["labels"][..., column], self._reward.ranking_min_gap
        return within_prompt_ranking(scores / self._spread[column], targets, prompt_and_step, gap)

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        metrics = {}
        for objective in self.objectives:
            name = objective.name
            count, ranked = sums[f"{name}/count"], sums[f"{name}/ranked"]
            if count > 0:
                metrics[f"{name}/loss"] = sums[f"{name}/loss"] / count
                if objective.supervision != "rollout_value":
                    metrics[f"{name}/accuracy"] = sums[f"{name}/correct"] / count
            if ranked > 0:
                metrics[f"{name}/ranking_loss"] = sums[f"{name}/ranking_loss"] / ranked
                metrics[f"{name}/ranking_accuracy"] = sums[f"{name}/ranked_right"] / ranked
        return metrics

    def row_names(self, groups: Indices) -> list[str]:
        rows = [row for group in groups for row in self.data.members[group]]
        return [f"{name} trace {self.data.names[row]}" for name in self._names for row in rows]

    def finish(self, infer: Inference, rank: int, workers: int) -> dict[str, float]:
        """Held-out metrics, and the calibration stored with the model (on training rows if none are held
        out)."""
        groups = self.held_out if len(self.held_out) else np.arange(len(self.row_groups))
        self._scores = self.evaluator(infer).values(groups, self.scores, self._features)
        counts = {"held_out/rows": float(self.row_groups.rows[self.held_out].sum())}
        counts |= {"rows": float(self.row_groups.rows.sum()), "rows_cut": float(self.data.cut)}
        where, gap = "held_out" if len(self.held_out) else "training", self._reward.ranking_min_gap
        measured = held_out_metrics(self.data, groups, self._scores, self.objectives, gap)
        self._metrics = counts | {f"{where}/{name}": value for name, value in measured.items()}
        self._calibrated = groups
        return self._metrics

    def save(self, model: nn.Module, state_dict: Mapping[str, Tensor], folder: Path) -> None:
        """The model's folder, and its scores of the held-out rows."""
        reward = cast(ProcessRewardModel, model)
        calibrate_model(reward, self.data, self._calibrated, self._scores)
        reward.save_pretrained(
            folder,
            metrics=self._metrics,
            state_dict=state_dict,
            with_backbone=keeps_backbone(self._settings.model_url),
        )
        traces, pairs = scored_rows(reward, self.data, self.held_out, self._scores)
        ScoredTrace.save(traces, str(folder / HELD_OUT_TRACES))
        ScoredPair.save(pairs, str(folder / HELD_OUT_PAIRS))
