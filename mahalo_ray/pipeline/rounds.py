"""The names of a run's rounds: `policy` is a stage of round 1, `round_2/policy` of round 2."""

from __future__ import annotations

from mahalo_ray.config import RunConfig
from mahalo_ray.pipeline.stages import Context

# What every round has of its own; everything before is shared, everything after uses the last round's.
ROUND_STAGES = ("pair_rollouts", "pairs", "policy")


def round_stage(stage: str, number: int) -> str:
    """The stage's name in this round, which is also its folder."""
    return stage if number == 1 else f"round_{number}/{stage}"


def last_stage(config: RunConfig, stage: str) -> str:
    """The name of this stage in the run's last round: whose policy is evaluated, served and exported."""
    return round_stage(stage, config.rounds) if stage in ROUND_STAGES else stage


def all_rounds(config: RunConfig, stage: str) -> list[str]:
    """The stage's names in all rounds, the first round's first."""
    return [round_stage(stage, number) for number in range(1, config.rounds + 1)]


def last_output(context: Context[RunConfig], stage: str, output: str) -> str:
    """Path or URL of an output of the last round's stage."""
    return context.input(last_stage(context.config, stage), output)
