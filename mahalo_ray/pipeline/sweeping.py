"""The stage `sweep`: which policies are tried along which fronts, and the table of what they reached."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

from mahalo_ray.config import RunConfig
from mahalo_ray.data import storage
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.evaluation.methods import Method, Played
from mahalo_ray.evaluation.results import ComparisonTable, MethodKind, MethodResult
from mahalo_ray.objectives import Weights
from mahalo_ray.pipeline.rounds import last_output
from mahalo_ray.pipeline.seed_blocks import domain_for_workers, fresh_students
from mahalo_ray.pipeline.stages import Context, StageResult
from mahalo_ray.sweeps import make_sampler
from mahalo_ray.sweeps.decoding import (
    FixedMethods,
    PlayedCallback,
    Rounds,
    SampledFront,
    SweepSpec,
    Swept,
    mean_and_error,
    methods_failed,
    play_rounds,
    tune_folder,
)
from mahalo_ray.sweeps.sweep_table import FILE, SWEEP, TRAINING_SWEEP, SweepPoint, SweepTable

METHODS, POINTS = "methods.json", "points.json"


@dataclass(frozen=True)
class SweepFront:
    """What stays the same along one front of a sweep, while the vectors of `sweep.kind` vary."""

    guidance: Weights | None
    num_candidates: int
    strength: float
    temperature: float | None = None  # None: that of the evaluation

    def method_at(self, config: RunConfig, weights: Weights, sampler: str | None = None) -> Method:
        """The policy at a vector; `sampler`: who asked for it."""
        vector = in_order(config, weights, 4 if sampler else 3)
        decoding, guidance, candidates = weights, self.guidance, self.num_candidates
        name = f"{sampler or 'weights'} {vector}"
        if config.sweep.kind == "training":
            name = f"trained {name.removeprefix('weights ')}"
        elif config.sweep.kind == "guidance":
            decoding, guidance = config.guided.point[0], weights
            name = f"{sampler or 'guidance'} {vector}, K {candidates}"
        elif guidance is not None:
            name += f", guided {in_order(config, guidance)}, K {candidates}"
        if self.strength != 1:
            name += f", strength {self.strength:g}"
        if self.temperature is not None:
            name += f", temperature {self.temperature:g}"
        kind: MethodKind = "weights" if guidance is None else "guided"
        return Method(
            name,
            kind,
            decoding,
            guidance,
            candidates,
            sweep=True,
            strength=self.strength,
            temperature=self.temperature,
        )


def sweep_fronts(config: RunConfig) -> list[SweepFront]:
    """Every combination of what is crossed with the vectors."""
    section = config.sweep
    candidates = section.num_candidates or [config.guided.num_candidates]
    settings: list[tuple[Weights | None, int]]
    if section.kind == "guidance":
        settings = [(None, count) for count in candidates]
    else:
        crossed = itertools.product(section.guidance, candidates)
        # With one candidate there is nothing to choose from: no guidance, whatever its weights.
        settings = [(guidance, count) if count > 1 else (None, 1) for guidance, count in crossed] or [
            (None, 1)
        ]
    usual = config.evaluation.sampling.temperature
    temperatures = [None if value == usual else value for value in section.temperature or [usual]]
    return [
        SweepFront(guidance, count, strength, temperature)
        for guidance, count in dict.fromkeys(settings)
        for strength in dict.fromkeys(section.strength or [1.0])
        for temperature in dict.fromkeys(temperatures)
    ]


def sweep_methods(config: RunConfig) -> list[Method]:
    """The policy at every vector of the sweep's list, along every front."""
    return [
        front.method_at(config, vector) for front in sweep_fronts(config) for vector in config.sweep.weights
    ]


def in_order(config: RunConfig, weights: Weights, digits: int = 3) -> str:
    """`0.7 / 0.3`, in the order of the objectives: short enough for a table."""
    return " / ".join(f"{value:.{digits}g}" for value in weights.over(config.objective_names))


def sweep_stage(config: RunConfig) -> str:
    """The stage, and folder, of the sweep that the configuration describes. One over training weights has its
    own, so that both kinds of front of one run stand side by side."""
    return TRAINING_SWEEP if config.sweep.kind == "training" else SWEEP


def unguided_vectors(config: RunConfig) -> list[Weights]:
    """The decoding weights at which the sweep's list has the run's policy without guidance."""
    if config.sweep.kind == "training":
        return []
    methods = sweep_methods(config)
    plain = (m for m in methods if m.guidance is None and m.strength == 1 and m.temperature is None)
    found = [method.weights for method in plain]
    return [weights for weights in found if weights is not None]


def same_vector(config: RunConfig, left: Weights, right: Weights) -> bool:
    """Whether two weight vectors are equal up to rounding."""
    order = config.objective_names
    return all(
        math.isclose(a, b, abs_tol=1e-6) for a, b in zip(left.over(order), right.over(order), strict=True)
    )


def sweep(context: Context[RunConfig]) -> StageResult:
    """Ray Tune over the weight vectors of the sweep, every point against the same fresh students.

    Leaves the table of all points, all of them with their students' values and sample dialogues, and those
    that are rows of the report: the fixed list, or, where there is none, the last round of the samplers.
    """
    config = context.config
    spec, sources = play_spec(context), [rounds_of(config, front) for front in sweep_fronts(config)]
    swept = play_rounds(spec, sources, config.cluster, methods_progress(context))
    return leave_sweep(context, spec, swept)


def leave_sweep(context: Context[RunConfig], spec: SweepSpec, swept: list[Swept]) -> StageResult:
    """The outputs of a finished sweep. SweepError where a policy of the report is missing that another
    attempt may bring, or all are."""
    config = context.config
    failed = [one.method.name for one in swept if one.played is None]
    missing = [one for one in swept if one.played is None and one.failure is None]
    if failed and (len(failed) == len(swept) or any(_is_report_row(config, one, swept) for one in missing)):
        raise methods_failed(failed, spec)
    if failed:
        context.progress.say(
            f"left out, as their trials failed: {', '.join(failed)}; logs are in '{tune_folder(spec)}'"
        )
    for one in swept:
        if one.failure is not None:
            context.progress.say(f"'{one.method.name}' has no result: {one.failure}")
    table = sweep_table(config, swept)
    table.save(context.path(FILE))
    rows = [one for one in swept if _is_report_row(config, one, swept)]
    storage.write_json(context.path(METHODS), [document_of(one.played) for one in rows if one.played])
    storage.write_json(context.path(POINTS), [document_of(one.played) for one in swept if one.played])
    metrics: dict[str, Any] = {point.method: point.mean for point in table.played}
    if failed:
        metrics["failed"] = failed
    return StageResult(metrics, {"methods": METHODS, "points": POINTS, "front": FILE})


def rounds_of(config: RunConfig, front: SweepFront) -> Rounds:
    """The rounds along one front: the fixed list, then the sampler's."""
    section = config.sweep
    fixed = {vector: front.method_at(config, vector) for vector in section.weights}
    if section.sampler is None:
        return FixedMethods(list(fixed.values()))
    name, options = section.sampler, {}
    if name == "surf":
        options = {"relaxation": section.relaxation}
    elif name == "surface":
        options = {"rounds": section.rounds}
    return SampledFront(
        lambda: make_sampler(name, config.objective_names, section.points, **options),
        config.objective_names,
        section.rounds,
        lambda weights: front.method_at(config, weights, section.sampler),
        fixed,
    )


def _is_report_row(config: RunConfig, one: Swept, swept: list[Swept]) -> bool:
    if config.sweep.weights:
        return 0 in one.rounds
    return _is_chosen(config, one, swept)


def _is_chosen(config: RunConfig, one: Swept, swept: list[Swept]) -> bool:
    """Whether it is of the last round of its source; with `surface`, whose rounds add up, of any."""
    if config.sweep.sampler == "surface":
        return True
    return max(one.rounds) == max(n for other in swept if other.source == one.source for n in other.rounds)


def sweep_table(config: RunConfig, swept: list[Swept]) -> SweepTable:
    """The sweep's table; its intervals are those of the report."""
    played = [one.played.result for one in swept if one.played is not None]
    rows = {row.name: row for row in comparison_table(config, played).rows}
    fixed_rounds = 1 if config.sweep.weights else 0
    points = []
    for one in swept:
        method, objectives = one.method, config.objective_names
        figures: dict[str, Any] = {"n": 0, "tokens": 0, "seconds": 0.0}
        if one.played is not None:
            row = rows[method.name]
            errors = dict(zip(objectives, mean_and_error(one.played, objectives)[1].tolist(), strict=True))
            figures = {
                "mean": {name: row.means[name].value for name in objectives},
                "standard_error": {name: errors[name] for name in objectives},
                "low": {name: row.means[name].low for name in objectives},
                "high": {name: row.means[name].high for name in objectives},
                "n": len(one.played.result.student_ids),
                "tokens": row.tokens,
                "seconds": one.played.seconds,
                "kl_to_reference": row.kl_to_reference,
                "malformed_rate": row.malformed_rate,
            }
            if one.played.training is not None:
                training = asdict(one.played.training)
                figures |= {
                    "training_steps": training.pop("steps"),
                    "training_seconds": training.pop("seconds"),
                    **training,
                }
        asked = one.rounds[-1] >= fixed_rounds
        points.append(
            SweepPoint(
                method=method.name,
                kind=config.sweep.kind,
                weights=dict(method.weights or {}),
                guidance=None if method.guidance is None else dict(method.guidance),
                num_candidates=method.num_candidates,
                strength=method.strength,
                temperature=method.temperature,
                sampler=config.sweep.sampler if asked else None,
                round=one.rounds[0] + 1 - fixed_rounds,
                last_round=asked and _is_chosen(config, one, swept),
                seed=config.seed,
                **figures,
            )
        )
    return SweepTable(config.objective_names, points)


def check_heads(config: RunConfig) -> None:
    """ValueError unless the policy has a head per objective, whose decoding weights can be varied."""
    method = config.policy.method
    if method != "mah_dpo":
        raise ValueError(
            f"'policy.method' is '{method}': that policy has one head, so there are no decoding weights to "
            "sweep and compare. It is trained and can be exported ('mahalo policy', 'mahalo export'); the "
            "stages after it need 'policy.method: mah_dpo'"
        )


def play_spec(context: Context[RunConfig]) -> SweepSpec:
    """What every trial of this stage needs; its models are those of the stages sft, policy and reward."""
    config = context.config
    check_heads(config)
    return SweepSpec(
        sft_url=context.input("sft", "model"),
        policy_url=last_output(context, "policy", "model"),
        reward_url=context.input("reward", "model"),
        output_url=context.folder,
        placement=DeviceConfig.of(config.cluster, config.model.dtype),
        threads=max(1, math.floor(config.cluster.cpus_per_rollout_actor)),
        config=config.evaluation,
        seeds=fresh_students(config),
        domain=domain_for_workers(config.domain),
        objectives=config.objective_names,
    )


def methods_progress(context: Context[RunConfig]) -> PlayedCallback:
    """Shows methods played, of those that are known to be played."""
    context.progress.start(0, "methods")
    return lambda done, total, name: context.progress.update(done, total, name)


def document_of(played: Played) -> dict[str, Any]:
    """What is kept of a method that was played."""
    return {
        "result": played.result.model_dump(mode="json"),
        "samples": [dialogue.model_dump(mode="json") for dialogue in played.samples],
    }


def comparison_table(config: RunConfig, results: list[MethodResult]) -> ComparisonTable:
    """The table over results, with the run's intervals."""
    return ComparisonTable(
        results,
        config.objective_names,
        confidence=config.evaluation.confidence,
        resamples=config.evaluation.bootstrap_resamples,
        seed=config.seed,
    )
