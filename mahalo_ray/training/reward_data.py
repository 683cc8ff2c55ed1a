"""Step traces and whole-response pairs as token ids with labels, and the store of a frozen backbone's head
inputs for them: what a process reward model is trained on.

A frozen backbone gives the same states in every epoch, so every sequence goes through it once. The store is a
folder of Parquet parts; its rows are keyed by token ids and step positions, so that an interrupted run, and
every other reward model on the same backbone and data, finds them again.
"""

from __future__ import annotations

import hashlib
import uuid
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mahalo_ray.config import ObjectiveConfig
from mahalo_ray.data import storage
from mahalo_ray.data.records import PreferencePair, StepTrace
from mahalo_ray.data.row_fields import RowError
from mahalo_ray.metrics import FloatArray
from mahalo_ray.models.scoring import StepEncoder, TokenTrace, TraceEncoder, pad_traces
from mahalo_ray.objectives import unknown_name
from mahalo_ray.training.batches import Indices, RowGroups
from mahalo_ray.training.pairs import TokenPairs
from mahalo_ray.training.recipe import Tensors

StepLabels = npt.NDArray[np.float32]
# Raw scores [steps, objectives] (or other values of steps) by sequence number.
StepValues = dict[int, npt.NDArray[np.float32]]
MODEL_INPUTS = ("input_ids", "attention_mask", "step_starts", "step_ends")
FEATURE_SCHEMA = pa.schema(
    [("trace", pa.string()), ("steps", pa.int32()), ("features", pa.list_(pa.float32()))]
)


@dataclass
class LabelledTraces:
    """Sequences in the order of their groups. `labels[s]` is [steps, objectives], NaN where unknown.

    A pair is a group of two sequences without labels, chosen first, of objective `pair_objective[group]` (-1
    for traces), with its weight and margin. Groups of one `prompt_keys` entry are answers to one prompt. By
    name of a trace: `outcomes` of those that were not cut, and `turns_before`, the assistant's turns in the
    prompt.
    """

    names: list[str] = field(default_factory=list)
    tokens: list[TokenTrace] = field(default_factory=list)
    labels: list[StepLabels] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)
    pair_objective: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    prompt_keys: list[str] = field(default_factory=list)
    split_keys: list[str] = field(default_factory=list)
    outcomes: dict[str, dict[str, float]] = field(default_factory=dict)
    turns_before: dict[str, int] = field(default_factory=dict)
    cut: int = 0

    @property
    def row_groups(self) -> RowGroups:
        """Rows are sequences; a pair counts as two."""
        lengths = [[len(self.tokens[row].input_ids) for row in rows] for rows in self.members]
        return RowGroups(
            np.array([len(rows) for rows in self.members], dtype=np.int64),
            np.array([max(row) for row in lengths], dtype=np.int64),
            np.array([sum(row) for row in lengths], dtype=np.int64),
        )

    def batch(
        self, groups: Indices, pad_id: int, features: StepValues | None = None
    ) -> tuple[list[int], Tensors]:
        """The sequences of the groups, and the tensors a reward model reads: token ids and step positions, or
        the head inputs [B, S, F] kept in `features`."""
        rows = [row for group in groups for row in self.members[group]]
        if features:
            stored = [torch.from_numpy(features[row]) for row in rows]
            return rows, {"features": pad_sequence(stored, batch_first=True)}
        tensors = pad_traces([self.tokens[row] for row in rows], pad_id)
        return rows, dict(zip(MODEL_INPUTS, tensors, strict=True))

    def add_group(
        self,
        names: Sequence[str],
        tokens: Sequence[TokenTrace],
        labels: Sequence[StepLabels],
        split_key: str,
        prompt_key: str,
        pair_objective: int = -1,
        weight: float = 1.0,
        margin: float = 0.0,
    ) -> None:
        """Append sequences that stay together; groups of one split key are held out together."""
        first = len(self.names)
        self.names += names
        self.tokens += tokens
        self.labels += labels
        self.members.append(list(range(first, first + len(names))))
        self.pair_objective.append(pair_objective)
        self.weights.append(weight)
        self.margins.append(margin)
        self.prompt_keys.append(prompt_key)
        self.split_keys.append(split_key)


def add_traces(
    data: LabelledTraces,
    traces: Iterable[StepTrace],
    objectives: Sequence[ObjectiveConfig],
    encoder: StepEncoder,
    max_length: int,
    by_group: bool,
) -> None:
    """Append traces, the candidates of a prompt as one group if `by_group`, else each alone.

    Steps beyond `max_length` tokens are cut off, and a trace without any label left is left out (both count
    as `cut`). Raises ValueError naming the trace whose labels do not fit its steps or its objective's
    supervision.
    """
    groups: dict[tuple[str, str, int], list[tuple[str, TokenTrace, StepLabels]]] = {}
    for number, trace in enumerate(traces):
        labels, tokens = _label_matrix(trace, objectives), token_trace(trace, encoder)
        steps = sum(end < max_length for end in tokens.ends)
        ids = array("i", tokens.input_ids[:max_length])  # 4 bytes a token
        short = TokenTrace(ids, tokens.starts[:steps], tokens.ends[:steps])
        labelled = not np.isnan(labels[:steps]).all()
        data.cut += steps < len(tokens.ends) or not labelled
        if labelled:
            group = (trace.dialogue or trace.group, trace.group, 0 if by_group else number)
            groups.setdefault(group, []).append((trace.id, short, labels[:steps]))
            data.turns_before[trace.id] = sum(message.role == "assistant" for message in trace.prompt)
            if trace.outcome and steps == len(tokens.ends):
                data.outcomes[trace.id] = trace.outcome
    for (split_key, prompt_key, _), rows in groups.items():
        names, tokens_of, labels_of = (list(column) for column in zip(*rows, strict=True))
        data.add_group(names, tokens_of, labels_of, split_key, prompt_key)


def check_readable(trace: StepTrace, encoder: StepEncoder, max_length: int) -> None:
    """RowError for a trace that the chat template refuses, or that cannot be cut at a step boundary: prompt
    and first step alone exceed `max_length` tokens."""
    ends: Sequence[int] | None = trace.step_ends
    if not ends:
        try:
            ends = encoder.encode(trace.prompt, trace.steps[:1]).ends
        except (ValueError, TemplateError) as error:
            raise RowError(str(error)) from error
    if ends[0] >= max_length:
        raise RowError(f"prompt and first step have {ends[0] + 1} tokens: 'model.max_length' is {max_length}")


def as_steps(pair: PreferencePair, encoder: StepEncoder) -> PreferencePair:
    """The pair with its answers' token ids as those of one step each, as they will be scored."""
    if pair.chosen_ids is not None:
        return pair
    chosen, rejected = encoder.step_ids(pair.chosen), encoder.step_ids(pair.rejected)
    prompt = encoder.format.prompt_ids(pair.prompt)
    return pair.model_copy(update={"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})


def add_pairs(data: LabelledTraces, pairs: TokenPairs, keys: Sequence[str], objectives: int) -> None:
    """Append pairs: every response is one step."""
    none = np.full((1, objectives), np.nan, dtype=np.float32)
    for row, name in enumerate(pairs.ids):
        prompt = pairs.prompts[row]
        tokens = [
            TokenTrace(array("i", prompt + answer), [len(prompt)], [len(prompt) + len(answer) - 1])
            for answer in (pairs.chosen[row], pairs.rejected[row])
        ]
        loss = (int(pairs.objective[row]), float(pairs.weights[row]), float(pairs.margins[row]))
        data.add_group([name, name], tokens, [none, none], keys[row], name, *loss)
    data.cut += pairs.cut


def padded_labels(labels: Sequence[StepLabels]) -> Tensor:
    """Labels [B, S, H] of sequences, NaN where one has fewer steps."""
    rows = [torch.from_numpy(values) for values in labels]
    return pad_sequence(rows, batch_first=True, padding_value=torch.nan)


def ordered_pairs(labels: Sequence[StepLabels], gap: float) -> npt.NDArray[np.int64]:
    """Per objective [H]: pairs of sequences whose labels of the same step differ by more than `gap`."""
    table = padded_labels(labels).numpy()
    return np.sum(table[:, None] - table[None, :] > np.float32(gap), axis=(0, 1, 2))


def _label_matrix(trace: StepTrace, objectives: Sequence[ObjectiveConfig]) -> StepLabels:
    supervised = {objective.name: objective for objective in objectives}
    matrix = np.full((len(trace.steps), len(objectives)), np.nan, dtype=np.float32)
    for column, name in enumerate(supervised):
        matrix[:, column] = _column(trace, trace.labels.get(name), len(trace.steps))
    for name in trace.labels:
        if name not in supervised:
            raise ValueError(f"trace '{trace.id}': {unknown_name('objective', name, supervised)}")
        kind = supervised[name].supervision
        values = matrix[:, list(supervised).index(name)]
        if kind == "pairwise" and not np.isnan(values).all():
            raise ValueError(f"trace '{trace.id}' labels '{name}', which is supervised by pairs")
        if kind.startswith("judged") and ((values < 0) | (values > 1)).any():
            raise ValueError(f"trace '{trace.id}': labels of '{name}' are judgements and must lie in 0..1")
        if np.isinf(values).any():
            raise ValueError(f"trace '{trace.id}': a label of '{name}' is infinite")
    return matrix


def _column(trace: StepTrace, values: list[float | None] | None, steps: int) -> Any:
    if values is None:
        return np.nan
    if len(values) != steps:
        raise ValueError(f"trace '{trace.id}' has {steps} steps, but {len(values)} labels of an objective")
    return [np.nan if value is None else value for value in values]


def token_trace(trace: StepTrace, encoder: TraceEncoder) -> TokenTrace:
    """The trace's own token ids, or, where it carries none, those of its text."""
    if trace.token_ids is None or trace.step_starts is None or trace.step_ends is None:
        return encoder.encode(trace.prompt, trace.steps)
    if not len(trace.step_starts) == len(trace.step_ends) == len(trace.steps):
        raise ValueError(f"trace '{trace.id}' has {len(trace.steps)} steps and other numbers of positions")
    return TokenTrace(trace.token_ids, trace.step_starts, trace.step_ends)


def count_labels(
    data: LabelledTraces, objectives: int, ranking_gap: float | None
) -> tuple[FloatArray, FloatArray]:
    """Per group and objective, both [groups, objectives]: labels (of a pair, its weight), and pairs of
    candidates to be ranked (none without `ranking_gap`)."""
    labels, ranked = np.zeros((len(data.members), objectives)), np.zeros((len(data.members), objectives))
    for group, rows in enumerate(data.members):
        objective = data.pair_objective[group]
        if objective >= 0:
            labels[group, objective] = data.weights[group]
            continue
        of_rows = [data.labels[row] for row in rows]
        labels[group] = sum((~np.isnan(values)).sum(axis=0) for values in of_rows)
        if ranking_gap is not None:
            ranked[group] = ordered_pairs(of_rows, ranking_gap)
    return labels, ranked


def check_labels(labels: FloatArray, names: Sequence[str], purpose: str) -> None:
    """ValueError for an objective without any in [groups, objectives], which are needed for a purpose."""
    for name, count in zip(names, labels.sum(axis=0), strict=True):
        if count == 0:
            raise ValueError(f"objective '{name}' has no labels (or pairs) {purpose}")


def value_scale(
    data: LabelledTraces, trained: Indices, objectives: Sequence[ObjectiveConfig]
) -> tuple[FloatArray, FloatArray]:
    """Per objective: variance of all value labels, and their spread within a prompt; 1 for judgements and
    pairs."""
    variance, spread = np.ones(len(objectives)), np.ones(len(objectives))
    groups = [[data.labels[row] for row in data.members[group]] for group in trained]
    for column, objective in enumerate(objectives):
        if objective.supervision != "rollout_value":
            continue
        values = [np.concatenate([labels[:, column] for labels in group]) for group in groups]
        present = [of_prompt[~np.isnan(of_prompt)] for of_prompt in values]
        within = [of_prompt - of_prompt.mean() for of_prompt in present if len(of_prompt) > 1]
        variance[column] = np.concatenate(present).var() or 1.0
        spread[column] = (np.concatenate(within).std() if within else 0.0) or 1.0
    return variance, spread


def trace_key(tokens: TokenTrace) -> str:
    """What features depend on besides the model: token ids and step positions."""
    parts = (list(tokens.input_ids), list(tokens.starts), list(tokens.ends))
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def read_features(files: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
    """Features [S, F] by trace key, of the store's parts."""
    known = {}
    for file in files:
        table = storage.read_file(file).cast(FEATURE_SCHEMA)
        for number, (key, steps) in enumerate(
            zip(table["trace"].to_pylist(), table["steps"].to_pylist(), strict=True)
        ):
            values = table["features"][number].values.to_numpy()
            known[key] = values.reshape(steps, -1).copy()
    return known


def write_features(url: str, features: dict[str, npt.NDArray[np.float32]]) -> None:
    """Add one file to the store."""
    columns = [
        pa.array(list(features), pa.string()),
        pa.array([len(values) for values in features.values()], pa.int32()),
        pa.array([values.reshape(-1) for values in features.values()], FEATURE_SCHEMA.field("features").type),
    ]
    table = pa.Table.from_arrays(columns, schema=FEATURE_SCHEMA)
    storage.write_table(storage.join(url, f"{uuid.uuid4().hex}.parquet"), table)
