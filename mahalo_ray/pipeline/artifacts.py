"""Where a finished run's models lie, how models get to where every node reaches them, and the export of a
policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import yaml

from mahalo_ray.data import storage
from mahalo_ray.data.temporary import temporary_folder
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.models.backbone import load_tokenizer
from mahalo_ray.models.combination import Combination, Rank, combine_models
from mahalo_ray.models.folder import METADATA_FILE, local_folder
from mahalo_ray.objectives import Weights
from mahalo_ray.pipeline.outputs import check_new
from mahalo_ray.pipeline.rounds import ROUND_STAGES, round_stage
from mahalo_ray.pipeline.stages import MANIFEST, Manifest


def run_model(run: str, stage: str) -> str:
    """The model folder that a finished stage (`sft`, `reward`, `policy`) of the run in `run` has made; the
    policy of its last round.

    ValueError where `run` holds no run, or its stage is not finished.
    """
    stage = _in_last_round(run, stage)
    folder = storage.join(storage.absolute(run), stage)
    manifest = Manifest.read(folder)
    if manifest is not None:
        return storage.join(folder, manifest.outputs["model"])
    if not storage.exists(storage.join(run, "config.yaml")):
        raise ValueError(f"there is no run at '{run}': it holds no config.yaml")
    verb = stage.rpartition("/")[2]
    raise ValueError(f"stage '{stage}' of the run at '{run}' is not finished: run `mahalo {verb}` first")


def _in_last_round(run: str, stage: str) -> str:
    """The stage's name in the last of the run's rounds, by its configuration."""
    url = storage.join(run, "config.yaml")
    if stage not in ROUND_STAGES or not storage.exists(url):
        return stage
    document = yaml.safe_load(storage.read_bytes(url))
    rounds = document.get("rounds", 1) if isinstance(document, dict) else 1
    return round_stage(stage, rounds if isinstance(rounds, int) else 1)


def find_model(source: str, stage: str) -> str:
    """A model folder: `source` itself, or what the finished stage of the run in `source` has made.

    ValueError where `source` is not there, or is a run whose stage is not finished.
    """
    source = storage.absolute(source)
    if not storage.exists(source):
        raise ValueError(f"there is no {stage} model at '{source}'")
    if storage.exists(storage.join(source, METADATA_FILE)):
        return source
    signs = (storage.join(source, "config.yaml"), storage.join(source, stage, MANIFEST))
    is_run = any(storage.exists(sign) for sign in signs)
    return run_model(source, stage) if is_run else source


def place_model(source: str, url: str) -> str:
    """A model where every node reaches it: a folder or URL where it lies, a hub model downloaded once to
    `url`."""
    if storage.exists(source):
        return storage.absolute(source)
    if not storage.exists(url):
        storage.upload_folder(local_folder(source), url)
    return url


def export(
    source: str, output: str, weights: Weights, dtype: torch.dtype | None = None, strength: float = 1.0
) -> None:
    """Merge the heads of a policy (a run's output folder, or a model folder) at this strength into `output`.

    LoRA is folded in; dtype None keeps the stored one. `output` must not exist or be empty. ValueError for an
    objective the policy lacks, a strength other than 1 of a policy saved without its base head, a run without
    a finished policy, or an output that would be overwritten.
    """
    check_new(output)
    folder = Path(storage.local_copy(_policy_folder(source)))
    policy = MultiHeadCausalLM.from_pretrained(folder, dtype=dtype)
    model = policy.merge(weights, copied=False, strength=strength)
    # Written here first: half an export must not pass for a whole one.
    with temporary_folder("export") as temporary:
        model.save_pretrained(temporary)
        load_tokenizer(folder).save_pretrained(temporary)
        storage.remove(output)
        storage.upload_folder(temporary, output)


def combine(
    base: str, models: Mapping[str, str], output: str, rank: Rank = 16, dtype: torch.dtype | None = None
) -> Combination:
    """A policy of one model per objective (see `models.combination`), saved in `output` with
    `combination.json`, the errors of the approximation.

    `base` and models: folders, hub ids, or runs' outputs, of which the SFT model and the policy are taken.
    `output` must not exist or be empty. ValueError for models that do not fit together.
    """
    check_new(output)
    folders = {name: _model_of(source, "policy") for name, source in models.items()}
    made = combine_models(_model_of(base, "sft"), folders, rank, dtype)
    with temporary_folder("combination") as temporary:
        made.policy.save_pretrained(temporary, load_tokenizer(next(iter(folders.values()))))
        storage.write_json(storage.join(temporary, "combination.json"), made.as_json())
        storage.remove(output)
        storage.upload_folder(temporary, output)
    return made


def _model_of(source: str, stage: str) -> Path:
    """A local copy of the model in a folder, in a run's output, or in a hub."""
    return (
        Path(storage.local_copy(find_model(source, stage)))
        if storage.exists(source)
        else local_folder(source)
    )


def _policy_folder(source: str) -> str:
    folder = find_model(source, "policy")
    if not storage.exists(storage.join(folder, METADATA_FILE)):
        raise ValueError(f"'{source}' is neither a run's output folder nor a policy's model folder")
    return folder
