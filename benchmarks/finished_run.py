"""A finished run, as benchmarks read it: its settings, its models played against fresh problems, and policies
trained on its SFT model in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mahalo_ray.config import PolicyConfig, RunConfig
from mahalo_ray.data.records import PreferencePair
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.evaluation.methods import MethodPlayer
from mahalo_ray.pipeline.artifacts import run_model
from mahalo_ray.pipeline.seed_blocks import fresh_students
from mahalo_ray.training.trainer import PolicyTrainer


def read_config(run: Path | str) -> RunConfig:
    """The settings of the run in this folder; `output` is the folder, wherever it was made."""
    document = yaml.safe_load(Path(run, "config.yaml").read_text())
    return RunConfig.model_validate(document).model_copy(update={"output": str(run)})


def fresh_player(
    config: RunConfig, students: int, policy: str | None = None, *, of_report: bool = False
) -> MethodPlayer:
    """Plays the run's models, or another policy in place of its own, against so many students (in other
    domains: problems) whom no stage of the run has met; with `of_report` against those of its own table."""
    own = config.evaluation.dialogues
    seeds = fresh_students(config) if of_report else fresh_students(config, more=students)[own:]
    return MethodPlayer(
        run_model(config.output, "sft"),
        run_model(config.output, "policy") if policy is None else policy,
        run_model(config.output, "reward"),
        DeviceConfig(),
        config.evaluation,
        seeds,
        config.domain,
        config.objective_names,
    )


def train_policy(
    config: RunConfig,
    pairs: Sequence[PreferencePair],
    objectives: Sequence[str],
    folder: str,
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a policy with a head for each of `objectives`, and write it to `folder`; `given` are settings
    over the run's `policy`. Returns its metrics and their history."""
    given = {} if given is None else given
    training = {**config.policy.training.model_dump(), "zero_stage": 0, **given.get("training", {})}
    settings = PolicyConfig.model_validate({**config.policy.model_dump(), **given, "training": training})
    trainer = PolicyTrainer(
        run_model(config.output, "sft"),
        pairs,
        settings,
        objectives=objectives,
        max_length=config.model.max_length,
        held_out_fraction=config.pairs.held_out_fraction,
        seed=config.seed,
    )
    metrics = trainer.train()
    trainer.save_pretrained(folder)
    return {"metrics": metrics, "history": trainer.history}
