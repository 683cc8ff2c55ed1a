"""Head inputs of a frozen backbone, computed once for all traces and kept beside the data.

A frozen backbone gives the same states in every epoch. Every sequence goes through it once; after that only
the heads are trained, on what was kept. The store is a folder of Parquet parts, keyed by the backbone (a hash
over its folder) and by head inputs; its rows are keyed by token ids and step positions, so that an
interrupted run, and every other reward model on the same backbone and data, finds them again.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from mahalo_ray.data import storage
from mahalo_ray.decoding.cpu_matmul import OneDNNRewardModel
from mahalo_ray.models import ProcessRewardModel
from mahalo_ray.models.scoring import TokenTrace
from mahalo_ray.training.recipe import Inference, Tell
from mahalo_ray.training.reward_evaluation import StepValues, step_values

if TYPE_CHECKING:
    from mahalo_ray.training.reward import RewardRecipe

SCHEMA = pa.schema([("trace", pa.string()), ("steps", pa.int32()), ("features", pa.list_(pa.float32()))])
# Tokens read between two parts of the store, by all workers: what an interruption may cost.
_PART_TOKENS = 32768


def cached_features(
    recipe: RewardRecipe,
    store_url: str | None,
    micro_rows: int,
    infer: Inference,
    rank: int,
    workers: int,
    tell: Tell,
) -> StepValues:
    """Features [S, F] of every sequence by its number, on every worker; computed are those the store lacks.

    Every worker must call this. Without `store_url` nothing is kept on disk. `tell` counts tokens.
    """
    keys = [trace_key(tokens) for tokens in recipe.data.tokens]
    known = read_store(store_url) if store_url is not None else {}
    features = {row: known[key] for row, key in enumerate(keys) if key in known}
    members = recipe.data.members
    lacking = [group for group, rows in enumerate(members) if any(row not in features for row in rows)]
    if not lacking:
        return features
    tokens = np.cumsum(recipe.row_groups.tokens[lacking])
    cuts = np.flatnonzero(np.diff(tokens // _PART_TOKENS)) + 1
    step_features = StepFeatures()
    for end, groups in zip([*cuts, len(lacking)], np.split(np.array(lacking), cuts), strict=True):
        found = step_values(recipe, groups, step_features, micro_rows, infer, rank, workers)
        if store_url is not None and rank == 0:
            write_part(store_url, {keys[row]: values for row, values in found.items()})
        features |= found
        tell(int(tokens[end - 1]), int(tokens[-1]))
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


def trace_key(tokens: TokenTrace) -> str:
    """What features depend on besides the model: token ids and step positions."""
    parts = (list(tokens.input_ids), list(tokens.starts), list(tokens.ends))
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def read_store(url: str) -> dict[str, npt.NDArray[np.float32]]:
    """Features [S, F] by trace key; empty where there is no store yet."""
    known = {}
    for file in storage.list_files(url, ".parquet"):
        table = storage.read_file(file).cast(SCHEMA)
        for number, (key, steps) in enumerate(
            zip(table["trace"].to_pylist(), table["steps"].to_pylist(), strict=True)
        ):
            values = table["features"][number].values.to_numpy()
            known[key] = values.reshape(steps, -1).copy()
    return known


def write_part(url: str, features: dict[str, npt.NDArray[np.float32]]) -> None:
    """Add one file to the store."""
    columns = [
        pa.array(list(features), pa.string()),
        pa.array([len(values) for values in features.values()], pa.int32()),
        pa.array([values.reshape(-1) for values in features.values()], SCHEMA.field("features").type),
    ]
    table = pa.Table.from_arrays(columns, schema=SCHEMA)
    storage.write_table(storage.join(url, f"{uuid.uuid4().hex}.parquet"), table)


def padded_features(rows: list[npt.NDArray[np.float32]]) -> Tensor:
    """[B, S, F], zeros where a sequence has fewer steps."""
    steps = max(len(values) for values in rows)
    padded = torch.zeros(len(rows), steps, rows[0].shape[1])
    for target, values in zip(padded, rows, strict=True):
        target[: len(values)] = torch.from_numpy(values)
    return padded
