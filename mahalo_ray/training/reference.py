"""Reference log-probs of preference pairs: computed once by all workers, stored beside the data, checked row
by row.

The store is keyed by the reference itself (a hash over its folder: weights, config, tokenizer, template) and
by row id; every row carries a hash of its token ids. The reference of a policy with LoRA is its base with the
adapter off, which is this same model.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from mahalo_ray.config import ModelConfig, TrainingConfig
from mahalo_ray.data import storage
from mahalo_ray.models import ChunkedCausalLM
from mahalo_ray.models.backbone import load_causal_lm
from mahalo_ray.training.batches import Indices, shard
from mahalo_ray.training.deepspeed_config import deepspeed_config
from mahalo_ray.training.engine import sharded_loading, to_device
from mahalo_ray.training.pairs import TokenPairs, pair_inputs, pair_logps

SCHEMA = pa.schema(
    [("id", pa.string()), ("row_hash", pa.string()), ("chosen", pa.float64()), ("rejected", pa.float64())]
)
Logps = npt.NDArray[np.float64]


def reference_logps(
    pairs: TokenPairs,
    rows: Indices,
    store_url: str,
    folder: Path,
    model: ModelConfig,
    training: TrainingConfig,
    device: torch.device,
) -> Logps:
    """Summed completion log-probs [N, 2] (chosen, rejected) under the model in `folder`, from the store: of
    the pairs numbered by `rows`, NaN for all others.

    Rows the store lacks are computed first, shared among the workers; every worker must call this. Raises
    ValueError naming a row that is missing or stale in the store.
    """
    key = [reference_key(folder, model)] if dist.get_rank() == 0 else [""]
    dist.broadcast_object_list(key)
    file = storage.join(store_url, f"{key[0]}.parquet")
    known = read_store(file) if storage.exists(file) else {}
    hashes = pairs.row_hashes()
    lacking = [row for row in rows if known.get(pairs.ids[row], ("",))[0] != hashes[row]]
    if lacking:
        computed = compute_logps(pairs, np.array(lacking), folder, model, training, device)
        if dist.get_rank() == 0:
            known |= {pairs.ids[row]: (hashes[row], *logps) for row, logps in computed.items()}
            write_store(file, known)
        dist.barrier()
        known = read_store(file)
    logps = np.full((len(pairs), 2), np.nan)
    logps[rows] = select(known, [pairs.ids[row] for row in rows], [hashes[row] for row in rows], file)
    return logps


def select(
    known: Mapping[str, tuple[str, float, float]], ids: list[str], hashes: list[str], file: str
) -> Logps:
    """The rows' log-probs [N, 2]; ValueError naming one that is missing or belongs to other tokens."""
    for name, row_hash in zip(ids, hashes, strict=True):
        if name not in known:
            raise ValueError(f"pair '{name}' has no reference log-probs in '{file}': delete the file")
        if known[name][0] != row_hash:
            raise ValueError(
                f"the reference log-probs of pair '{name}' in '{file}' are stale: they belong to other "
                "tokens. Delete the file"
            )
    return np.array([known[name][1:] for name in ids], dtype=np.float64).reshape(-1, 2)


def reference_key(folder: Path, model: ModelConfig) -> str:
    """Hash of every file of the model's folder and of the dtype it computes in."""
    digest = hashlib.sha256(f"{model.dtype} {model.attn_implementation}".encode())
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(file.relative_to(folder)).encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def compute_logps(
    pairs: TokenPairs,
    rows: npt.NDArray[np.int64],
    folder: Path,
    model: ModelConfig,
    training: TrainingConfig,
    device: torch.device,
) -> dict[int, tuple[float, float]]:
    """Log-probs of the given rows by row number, on every worker; each worker computes a share of them."""
    reference = _load(folder, model, training, device, pairs.packed)
    own: dict[int, tuple[float, float]] = {}
    micro_rows = training.micro_batch_size_per_device
    for part, counted in shard(rows, pairs.row_groups, micro_rows, dist.get_rank(), dist.get_world_size()):
        tensors = to_device(pairs.tensors(part, pad_id=0), device)
        with torch.no_grad():
            logps: Tensor = reference(**pair_inputs(tensors), chunk_size=training.logit_chunk_size)
        chosen, rejected = (half.tolist() for half in pair_logps(logps))
        if counted:
            own |= dict(zip(part.tolist(), zip(chosen, rejected, strict=True), strict=True))
    shares: list[dict[int, tuple[float, float]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(shares, own)
    del reference
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {row: logps for share in shares for row, logps in share.items()}


def _load(
    folder: Path, model: ModelConfig, training: TrainingConfig, device: torch.device, packed: bool
) -> Any:
    """The reference, whole on every worker or, with ZeRO-3, sharded."""
    dtype = getattr(torch, model.dtype)
    config = deepspeed_config(training, dtype, accumulation=1)
    with sharded_loading(config):
        module = ChunkedCausalLM(load_causal_lm(folder, dtype, model.attn_implementation))
    if packed:
        module.read_packed_pairs()
    module.requires_grad_(False).eval()
    if training.zero_stage < 3:
        return module.to(device)
    engine = deepspeed.initialize(model=module, config=config)[0]
    engine.eval()
    return engine


def read_store(file: str) -> dict[str, tuple[str, float, float]]:
    """Rows of a stored file by id: (row hash, chosen, rejected)."""
    columns = storage.read_file(file).cast(SCHEMA).to_pydict()
    return {
        name: (row_hash, chosen, rejected)
        for name, row_hash, chosen, rejected in zip(*(columns[n] for n in SCHEMA.names), strict=True)
    }


def write_store(file: str, rows: Mapping[str, tuple[str, float, float]]) -> None:
    """Write all rows as one Parquet file."""
    columns = list(zip(*((name, *row) for name, row in rows.items()), strict=True))
    arrays = [pa.array(column, type=field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    storage.write_table(file, pa.Table.from_arrays(arrays, schema=SCHEMA))
