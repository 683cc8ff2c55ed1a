"""The training stages, one function each: what a recipe is given, and where its model goes."""

from __future__ import annotations

from collections.abc import Sequence

from mahalo_ray.config import (
    ClusterConfig,
    ModelConfig,
    ObjectiveConfig,
    PolicyConfig,
    RewardConfig,
    SftConfig,
)
from mahalo_ray.data import storage
from mahalo_ray.training.progress import ProgressFunction
from mahalo_ray.training.ray_train import Stage, TrainingResult, run_stage


def train_sft(
    examples_url: str,
    output_url: str,
    model_url: str,
    sft: SftConfig,
    model: ModelConfig,
    cluster: ClusterConfig,
    seed: int,
    run_dir: str,
    progress: ProgressFunction | None = None,
) -> TrainingResult:
    """Fine-tune (or train from scratch) on Parquet examples (id, input_ids, loss_mask); a transformers folder
    results.

    `model_url`: folder with config and tokenizer; without weights the model starts from scratch. `run_dir`:
    folder or URL for checkpoints; calling again with the same arguments after an interruption goes on from
    the latest.
    """
    arguments = (storage.absolute(examples_url), storage.absolute(model_url), model, sft.training, seed)
    stage = Stage("sft", sft.training, model, cluster, seed, storage.absolute(output_url), arguments)
    return run_stage(stage, run_dir, [examples_url, model_url], progress)


def train_reward(
    traces_url: str | None,
    pairs_url: str | None,
    output_url: str,
    model_url: str,
    objectives: Sequence[ObjectiveConfig],
    reward: RewardConfig,
    model: ModelConfig,
    cluster: ClusterConfig,
    step_separator: str | None,
    seed: int,
    run_dir: str,
    progress: ProgressFunction | None = None,
    features_url: str | None = None,
) -> TrainingResult:
    """A process reward model from StepTrace records and, for objectives supervised by pairs, PreferencePair
    records.

    `step_separator` ends every step of a trace that carries no token ids (None: a step is a whole assistant
    turn).
    `reward.held_out_fraction` of the prompts is kept for figures and calibration. `features_url`: folder for
    the head inputs of a frozen backbone, shared by all runs that name it.
    """
    urls = [url for url in (traces_url, pairs_url) if url is not None]
    arguments = (
        traces_url and storage.absolute(traces_url),
        pairs_url and storage.absolute(pairs_url),
        storage.absolute(model_url),
        tuple(objectives),
        reward,
        model,
        step_separator,
        seed,
        features_url and storage.absolute(features_url),
    )
    stage = Stage("reward", reward.training, model, cluster, seed, storage.absolute(output_url), arguments)
    return run_stage(stage, run_dir, [*urls, model_url], progress)


def train_policy(
    pairs_url: str,
    output_url: str,
    model_url: str,
    objectives: Sequence[str],
    policy: PolicyConfig,
    model: ModelConfig,
    cluster: ClusterConfig,
    held_out_fraction: float,
    seed: int,
    run_dir: str,
    progress: ProgressFunction | None = None,
) -> TrainingResult:
    """The method `policy.method` (MAH-DPO: one head per objective) on a folder of PreferencePair records; a
    MultiHeadCausalLM folder results.

    `model_url` is both start and reference; its log-probs are stored in `pairs_url`/reference.
    `held_out_fraction` of the prompts is kept for the final figures.
    """
    url, start = storage.absolute(pairs_url), storage.absolute(model_url)
    arguments = (url, start, tuple(objectives), policy, model, held_out_fraction, seed)
    stage = Stage("policy", policy.training, model, cluster, seed, storage.absolute(output_url), arguments)
    return run_stage(stage, run_dir, [pairs_url, model_url], progress)
