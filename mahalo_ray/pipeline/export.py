"""A policy at fixed weights as an ordinary transformers folder, for engines that know nothing of heads."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from mahalo_ray.data import storage
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.models.backbone import load_tokenizer
from mahalo_ray.models.folder import METADATA_FILE
from mahalo_ray.objectives import Weights
from mahalo_ray.pipeline.stages import Manifest


def export(source: str, output: str, weights: Weights, dtype: torch.dtype | None = None) -> None:
    """Merge the heads of a policy (a run's output folder, or a model folder) into `output`.

    LoRA is folded in; dtype None keeps the stored one. `output` must not exist or be empty. ValueError for an
    objective the policy lacks, a run without a finished policy, or an output that would be overwritten.
    """
    if storage.exists(output) and (storage.list_files(output) or not _is_folder(output)):
        raise ValueError(f"'{output}' exists already: give a new folder")
    folder = Path(storage.local_copy(policy_folder(source)))
    policy = MultiHeadCausalLM.from_pretrained(folder, dtype=dtype)
    model = policy.merge(weights, copied=False)
    # Written here first: half an export must not pass for a whole one.
    with tempfile.TemporaryDirectory(prefix="mahalo-export-") as temporary:
        model.save_pretrained(temporary)
        load_tokenizer(folder).save_pretrained(temporary)
        storage.remove(output)
        storage.upload_folder(temporary, output)


def policy_folder(source: str) -> str:
    """The policy's own folder: `source` itself, or that of the finished policy of the run in `source`."""
    if storage.exists(storage.join(source, METADATA_FILE)):
        return source
    manifest = Manifest.read(storage.join(source, "policy"))
    if manifest is not None:
        return storage.join(source, "policy", manifest.outputs["model"])
    if storage.exists(storage.join(source, "config.yaml")):
        raise ValueError(f"the run in '{source}' has no finished policy: run `mahalo policy` first")
    raise ValueError(f"'{source}' is neither a run's output folder nor a policy's model folder")


def _is_folder(url: str) -> bool:
    fs, path = storage.filesystem(url)
    return bool(fs.isdir(path))
