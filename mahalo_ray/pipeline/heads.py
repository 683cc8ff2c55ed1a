"""Training stages' results, and the policy stage, whichever model it starts from."""

from __future__ import annotations

from mahalo_ray.data import storage
from mahalo_ray.pipeline.stages import Context, StageResult
from mahalo_ray.training.launch import TrainingResult, train_policy


def train_heads(context: Context, base_url: str) -> StageResult:
    """MAH-DPO (or a baseline) on the pairs of stage `pairs`; the base is the reference too."""
    config = context.config
    result = train_policy(
        context.input("pairs", "pairs"),
        context.path("model"),
        base_url,
        config.objective_names,
        config.policy,
        config.model,
        config.cluster,
        config.pairs.held_out_fraction,
        config.seed,
        context.path("checkpoints"),
        context.progress.training,
    )
    return trained(context, result)


def trained(context: Context, result: TrainingResult) -> StageResult:
    """What every training stage leaves: the model's folder, and its curves."""
    storage.write_json(context.path("history.json"), result.history)
    return StageResult(dict(result.metrics), {"model": "model", "history": "history.json"})
