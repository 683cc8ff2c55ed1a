"""The stages of a run: what each needs, which settings it depends on, and which room does the work."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel

from mahalo_ray.config import RolloutConfig, RunConfig
from mahalo_ray.config.rollouts import MiniatureStudentConfig, ModelTutorConfig, PlayConfig
from mahalo_ray.data.records import CandidateSet, PreferencePair, StepTrace
from mahalo_ray.decoding.loading import Placement
from mahalo_ray.pipeline.corpus import make_sft_data, start_model_url
from mahalo_ray.pipeline.evaluating import evaluate, report, sweep
from mahalo_ray.pipeline.heads import method_version, train_heads, trained
from mahalo_ray.pipeline.serve import try_serving
from mahalo_ray.pipeline.stages import Context, Pipeline, Stage, StageResult
from mahalo_ray.pipeline.students import first_seed
from mahalo_ray.rollouts.actors import CANDIDATES
from mahalo_ray.rollouts.driver import DialogueChunks, run_rollouts
from mahalo_ray.rollouts.pairs import build_pairs, labelled_traces
from mahalo_ray.rollouts.parties import RolloutSpec
from mahalo_ray.training.launch import train_reward, train_sft


def sft(context: Context) -> StageResult:
    """Supervised fine-tuning on the tutors' turns."""
    config = context.config
    result = train_sft(
        context.input("sft_data", "examples"),
        context.path("model"),
        start_model_url(config, context.upstream["sft_data"][0]),
        config.sft,
        config.model,
        config.cluster,
        config.seed,
        context.path("checkpoints"),
        context.progress.training,
    )
    return trained(context, result)


def reward_rollouts(context: Context) -> StageResult:
    """Dialogues whose candidate turns are labelled by Monte-Carlo continuations and the judge."""
    config = context.config
    metrics = _play(context, config.reward_rollouts, None, "reward_rollouts")
    sets = CandidateSet.load(context.path(CANDIDATES))
    traces = labelled_traces(sets, config.objective_names)
    StepTrace.save(traces, context.path("traces", "part-000000.parquet"))
    return StageResult({**metrics, "traces": len(traces)}, {"candidates": CANDIDATES, "traces": "traces"})


def reward(context: Context) -> StageResult:
    """The process reward model, with its figures and calibration on held-out prompts."""
    config = context.config
    result = train_reward(
        context.input("reward_rollouts", "traces"),
        None,
        context.path("model"),
        context.input("sft", "model"),
        config.objectives,
        config.reward,
        config.model,
        config.cluster,
        None,
        config.seed,
        context.path("checkpoints"),
        context.progress.training,
    )
    return trained(context, result)


def pair_rollouts(context: Context) -> StageResult:
    """Fresh dialogues whose candidate turns are scored by the reward model."""
    metrics = _play(context, context.config.pair_rollouts, context.input("reward", "model"), "pair_rollouts")
    return StageResult(metrics, {"candidates": CANDIDATES})


def pairs(context: Context) -> StageResult:
    """Preference pairs: per objective, best against worst candidate of a prompt."""
    config = context.config
    sets = CandidateSet.load(context.input("pair_rollouts", "candidates"))
    context.progress.start(len(config.objectives), "objectives")
    found: list[PreferencePair] = []
    metrics: dict[str, Any] = {}
    for objective in config.objective_names:
        made, figures = build_pairs(sets, objective, config.pairs)
        if not figures.pairs:
            raise ValueError(
                f"no candidates of objective '{objective}' are far enough apart to make pairs: lower "
                f"'pairs.min_gap_std' (now {config.pairs.min_gap_std}) or play more 'pair_rollouts.dialogues'"
            )
        found += made
        metrics[objective] = asdict(figures)
        context.progress.advance()
    PreferencePair.save(found, context.path("pairs", "part-000000.parquet"))
    return StageResult(metrics, {"pairs": "pairs"})


def policy(context: Context) -> StageResult:
    """MAH-DPO: one head per objective over a shared backbone."""
    return train_heads(context, context.input("sft", "model"))


def _play(context: Context, settings: RolloutConfig, reward_url: str | None, purpose: str) -> dict[str, Any]:
    config = context.config
    spec = RolloutSpec(
        tutor=ModelTutorConfig(path=context.input("sft", "model")),
        student=MiniatureStudentConfig(),
        play=PlayConfig(
            candidates=settings.candidates,
            batch_size_per_actor=settings.batch_size_per_actor,
            sampling=settings.sampling,
        ),
        output_url=context.folder,
        purpose=purpose,
        placement=Placement(config.cluster.device, config.model.dtype),
        threads=max(1, math.floor(config.cluster.cpus_per_rollout_actor)),
        reward_url=reward_url,
        continuations=settings.continuations,
        gamma=settings.gamma,
    )
    first = first_seed(config.seed, purpose)
    chunks = DialogueChunks(first, settings.dialogues, settings.batch_size_per_actor)
    context.progress.start(settings.dialogues, "dialogues")
    return run_rollouts(spec, chunks, config.cluster, context.progress.update).as_json()


def _pairs_settings(config: RunConfig) -> dict[str, Any]:
    """Options that came later count where they are set: pairs made before them stay valid."""
    later = config.pairs.model_dump(include={"balance_length", "split_by"}, exclude_defaults=True)
    settings = sections("pairs.min_gap_std", "pairs.max_pairs_per_objective", "objective_names")(config)
    return {**settings, **{f"pairs.{name}": value for name, value in later.items()}}


def _policy_settings(config: RunConfig) -> dict[str, Any]:
    settings = sections("policy", "pairs.held_out_fraction", "objective_names", "model")(config)
    return {**settings, **method_version(config.policy)}


def sections(*names: str) -> Callable[[RunConfig], Any]:
    """The part of a configuration named by dotted paths, as JSON values."""

    def pick(config: RunConfig) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in names:
            value: Any = config
            for part in name.split("."):
                value = getattr(value, part)
            found[name] = _plain(value)
        return found

    return pick


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


PIPELINE = Pipeline(
    [
        Stage(
            "sft_data",
            "Make training text and tokenizer",
            make_sft_data,
            sections("domain", "sft.loss_on", "model"),
            uses_ray=False,
        ),
        Stage(
            "sft",
            "Train the SFT model",
            sft,
            sections("sft.training", "model"),
            needs=("sft_data",),
            resumes=True,
        ),
        Stage(
            "reward_rollouts",
            "Play and label dialogues",
            reward_rollouts,
            sections("reward_rollouts", "objective_names", "model.dtype"),
            needs=("sft",),
            resumes=True,
        ),
        Stage(
            "reward",
            "Train the process reward model",
            reward,
            sections("reward", "objectives", "model"),
            needs=("sft", "reward_rollouts"),
            resumes=True,
        ),
        Stage(
            "pair_rollouts",
            "Play and score dialogues",
            pair_rollouts,
            sections("pair_rollouts", "model.dtype"),
            needs=("sft", "reward"),
            resumes=True,
        ),
        Stage(
            "pairs",
            "Build preference pairs",
            pairs,
            _pairs_settings,
            needs=("pair_rollouts",),
            version=2,
            uses_ray=False,
        ),
        Stage(
            "policy",
            "Train the multi-head policy",
            policy,
            _policy_settings,
            needs=("sft", "pairs"),
            resumes=True,
        ),
        Stage(
            "sweep",
            "Sweep the decoding weights",
            sweep,
            sections("sweep", "evaluation", "objective_names", "model.dtype"),
            needs=("sft", "reward", "policy"),
            resumes=True,
        ),
        Stage(
            "evaluate",
            "Evaluate heads and guidance",
            evaluate,
            sections("guided", "sweep", "evaluation", "objective_names", "model.dtype"),
            needs=("sft", "reward", "policy"),
            resumes=True,
        ),
        Stage(
            "serve",
            "Serve and ask once",
            try_serving,
            sections("serve", "guided", "sweep", "evaluation.sampling", "model.dtype"),
            needs=("reward", "policy"),
        ),
        Stage(
            "report",
            "Write the report",
            report,
            sections("name", "objectives", "evaluation", "sweep", "guided"),
            needs=("sft", "reward", "pairs", "policy", "sweep", "evaluate"),
            uses_ray=False,
        ),
    ]
)
