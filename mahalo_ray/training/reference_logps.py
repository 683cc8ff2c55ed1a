"""Reference log-probs of preference pairs: computed once by all workers and stored beside the data.

The store is addressed by content: a file per reference (a hash over its folder: weights, config, tokenizer,
template), a row per sequence of token ids. A row that fits is the right one, so nothing in it can be stale.
The reference of a policy with LoRA is its base with the adapter off, which is this same model.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mahalo_ray.config import ModelConfig, TrainingConfig
from mahalo_ray.data import storage
from mahalo_ray.logprobs import sum_rows
from mahalo_ray.models import ChunkedCausalLM, MultiHeadCausalLM
from mahalo_ray.models.backbone import completion_states, load_causal_lm
from mahalo_ray.training.batches import Indices, shard
from mahalo_ray.training.deepspeed_config import deepspeed_config
from mahalo_ray.training.deepspeed_engine import loaded_in_turn, sharded_loading, to_device
from mahalo_ray.training.pairs import PackedPairs, PairInputs, pair_inputs, pair_logps

SCHEMA = pa.schema(
    [("id", pa.string()), ("row_hash", pa.string()), ("chosen", pa.float64()), ("rejected", pa.float64())]
)
Logps = npt.NDArray[np.float64]
REFERENCE_STORE = ".reference"  # in the folder of the pairs: who reads them passes over names with a dot


def reference_logps(
    inputs: PairInputs,
    rows: Indices,
    store_url: str,
    load: Callable[[], nn.Module],
    key: Callable[[], str],
    training: TrainingConfig,
    device: torch.device,
) -> Logps:
    """Summed completion log-probs [N, 2] (chosen, rejected) under the reference: of the pairs numbered by
    `rows`, NaN for all others.

    Rows that the store lacks are computed, shared among the workers, by the module that `load` makes; `key`
    names the reference. Every worker must call this. Rank 0 alone reads the store and says what it holds:
    workers that looked for themselves while another run writes could disagree.
    """
    pairs, logps = inputs.pairs, np.full((len(inputs.pairs), 2), np.nan)
    file, known = "", {}
    message: list[Any] = [None]
    if dist.get_rank() == 0:
        file = storage.join(store_url, f"{key()}.parquet")
        known = read_store(file) if storage.exists(file) else {}
        hashes = {int(row): pairs.row_hash(row) for row in rows}
        held = [row for row in hashes if hashes[row] in known]
        message = [(held, [known[hashes[row]] for row in held])]
    dist.broadcast_object_list(message)
    held, values = message[0]
    logps[held] = np.array(values, dtype=np.float64).reshape(-1, 2)
    lacking = np.setdiff1d(rows, held)
    if len(lacking) == 0:
        return logps
    computed = compute_logps(inputs, lacking, load(), training, device)
    for row, both in computed.items():
        logps[row] = both
    if dist.get_rank() == 0:
        names = dict.fromkeys(known, "") | {hashes[row]: pairs.ids[row] for row in hashes}
        known |= {hashes[row]: both for row, both in computed.items()}
        write_store(file, known, names)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return logps


def reference_key(folder: Path, model: ModelConfig) -> str:
    """Hash of every file of the model's folder and of the dtype it computes in."""
    digest = hashlib.sha256(f"{model.dtype} {model.attn_implementation}".encode())
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(file.relative_to(folder)).encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def compute_logps(
    inputs: PairInputs, rows: Indices, reference: nn.Module, training: TrainingConfig, device: torch.device
) -> dict[int, tuple[float, float]]:
    """Log-probs of the given rows by row number, on every worker; each worker computes a part of them."""
    by_row: dict[int, tuple[float, float]] = {}
    micro_rows = training.micro_batch_size_per_device
    for part, counted in shard(rows, inputs.row_groups, micro_rows, dist.get_rank(), dist.get_world_size()):
        tensors = to_device(inputs.tensors(part), device)
        with torch.no_grad():
            logps: Tensor = reference(**pair_inputs(tensors), chunk_size=training.logit_chunk_size)
        chosen, rejected = (half.tolist() for half in pair_logps(logps))
        if counted:
            by_row |= dict(zip(part.tolist(), zip(chosen, rejected, strict=True), strict=True))
    of_workers: list[dict[int, tuple[float, float]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_workers, by_row)
    return {row: logps for part in of_workers for row, logps in part.items()}


class AnswerStates(nn.Module):
    """A reference read for its states instead of its log-probs."""

    def __init__(self, reference: ChunkedCausalLM) -> None:
        super().__init__()
        self.reference = reference

    def forward(self, **tensors: Tensor) -> Tensor:
        """States [N, D] that predict the answers' tokens, of what `PairInputs.chosen_tensors` gives."""
        return self.reference.completion_states(**pair_inputs(tensors)).hidden


def load_reference(
    folder: Path,
    model: ModelConfig,
    training: TrainingConfig,
    device: torch.device,
    inputs: PairInputs,
    read_as: Callable[[ChunkedCausalLM], nn.Module] = lambda reference: reference,
) -> Any:
    """The causal LM in a folder, frozen: whole on every worker or, with ZeRO-3, sharded. `read_as` wraps
    it."""
    dtype = getattr(torch, model.dtype)
    config = deepspeed_config(training, dtype, accumulation=1)

    def load() -> nn.Module:
        with sharded_loading(config):
            module = ChunkedCausalLM(load_causal_lm(folder, dtype, model.attn_implementation))
        if isinstance(inputs, PackedPairs):
            module.enable_pair_packing()
        return read_as(module).requires_grad_(False).eval()

    if training.zero_stage < 3:
        return loaded_in_turn(load, device)
    engine = deepspeed.initialize(model=load(), config=config)[0]
    engine.eval()
    return engine


class BaseHeadLogps(nn.Module):
    """A policy read as the model it was made from: adapter off, base head. ValueError without a base head."""

    def __init__(self, policy: MultiHeadCausalLM) -> None:
        super().__init__()
        if policy.base_head is None:
            raise ValueError(
                "the reference of a model in memory is its base head, and this one has none: make it by "
                "`MultiHeadCausalLM.from_base(..., keep_base_head=True)`, or pass the folder of the base"
            )
        self._policy, self._head = policy.eval(), policy.base_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        pair_lengths: Tensor | None,
        chunk_size: int,
    ) -> Tensor:
        """Summed log-probs of every sequence, as `MultiHeadCausalLM.completion_logps` takes them."""
        with self._policy.disable_adapter() if self._policy.has_lora else nullcontext():
            states = completion_states(
                self._policy.hidden_states, input_ids, attention_mask, labels, pair_lengths
            )
        logps = self._head(states.hidden, states.labels, chunk_size)
        return sum_rows(logps, states.sequences, states.completions, average=False)


def read_store(file: str) -> dict[str, tuple[float, float]]:
    """(chosen, rejected) by row hash of a stored file."""
    columns = storage.read_file(file).cast(SCHEMA).to_pydict()
    names = ("row_hash", "chosen", "rejected")
    return {
        row_hash: (chosen, rejected)
        for row_hash, chosen, rejected in zip(*(columns[name] for name in names), strict=True)
    }


def write_store(
    file: str, rows: Mapping[str, tuple[float, float]], names: Mapping[str, str] | None = None
) -> None:
    """Write all rows as one Parquet file. `names`: pair ids by row hash, for people who read the file."""
    columns = {
        "id": [(names or {}).get(row_hash, "") for row_hash in rows],
        "row_hash": list(rows),
        "chosen": [chosen for chosen, _ in rows.values()],
        "rejected": [rejected for _, rejected in rows.values()],
    }
    storage.write_table(file, pa.table(columns, schema=SCHEMA))
