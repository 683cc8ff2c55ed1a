"""`mahalo dialogues`: play, make pairs, write the summary. Run again, it goes on where it stopped."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict
from typing import Any

from mahalo_ray.config import (
    DialoguesConfig,
    EndpointTutorConfig,
    GridCases,
    MiniatureStudentConfig,
    ModelStudentConfig,
    RewardSource,
)
from mahalo_ray.data import storage
from mahalo_ray.data.records import PreferencePair
from mahalo_ray.data.row_files import QUARANTINE, data_files
from mahalo_ray.data.rows import quarantine
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.domains.tutoring.personas import load_cases
from mahalo_ray.errors import StageError
from mahalo_ray.evaluation.dialogue_report import write_dialogue_report
from mahalo_ray.models.folder import METADATA_FILE
from mahalo_ray.pipeline.artifacts import place_model
from mahalo_ray.pipeline.progress import RunProgress
from mahalo_ray.pipeline.seed_blocks import first_seed
from mahalo_ray.pipeline.stages import Context, Manifest, Pipeline, Session, Stage, StageResult
from mahalo_ray.rollouts.dialogue_job import (
    CANDIDATES,
    CASES,
    DIALOGUES,
    DialogueChunks,
    RolloutSpec,
    run_rollouts,
)
from mahalo_ray.rollouts.pair_building import CandidateShards, build_pairs
from mahalo_ray.rollouts.pool import share_limits

PAIRS = "pairs"
CASES_FILE = "cases.json"
REPORT = "dialogues.html"
PAIRS_PER_SHARD = 5000
MAX_BAD_CASES = 0.01  # share of rows that cannot be used before they are an error


def make_dialogues(config: DialoguesConfig, session: Session, progress: RunProgress) -> Manifest:
    """Bring the output up to date; finished chunks are kept, failed dialogues are played again.

    ValueError for models that are not there or of the wrong kind, endpoints too small for the actors, and an
    output that holds dialogues of other settings.
    """
    _check_sources(config)
    stages = []
    if config.cases is not None:
        stages.append(Stage("cases", "Read cases", _read_cases, _cases_settings, uses_ray=False))
    needs = tuple(stage.name for stage in stages)
    title = "Play dialogues, build preference pairs"
    stages.append(Stage("dialogues", title, _make, _settings, needs, in_output=True))
    pipeline = Pipeline(stages, holds="dialogues")
    return pipeline.run(config, session=session, progress=progress)["dialogues"]


def _make(context: Context[DialoguesConfig]) -> StageResult:
    config, output = context.config, context.folder
    context.progress.start(config.play.dialogues, "dialogues")
    report = run_rollouts(
        _spec(context),
        _chunks(config),
        config.cluster,
        context.progress.update,
        config.max_failed_fraction,
    )
    metrics = report.model_dump(mode="json")
    metrics[PAIRS] = _write_pairs(context)
    if config.cases is not None:
        metrics["data"] = context.metrics_of("cases")["data"]
    write_dialogue_report(output, config.name, metrics, storage.join(output, REPORT))
    outputs = {"candidates": CANDIDATES, "dialogues": DIALOGUES, "report": REPORT}
    if metrics[PAIRS]:
        outputs[PAIRS] = PAIRS
    return StageResult(metrics, outputs)


def _check_sources(config: DialoguesConfig) -> None:
    """ValueError for models that are not there or of the wrong kind, and for endpoints too small for the
    actors: before anything starts."""
    actors = min(config.cluster.rollout_actors, len(_chunks(config)))
    for side in (config.tutor, config.student):
        if side.kind == "endpoint":
            share_limits(side.endpoint, actors)
        elif side.kind != "miniature":
            _check_model(side.path, side.kind == "policy")
    reward = None if config.reward is None else RewardSource.parse(config.reward)
    if reward is not None and not storage.exists(reward.model):
        raise ValueError(f"'reward': there is no model folder '{reward.model}'")


def _check_model(path: str, wants_heads: bool) -> None:
    if not storage.exists(path):
        if path.count("/") != 1 or path.startswith((".", "/")):
            raise ValueError(f"there is no model folder '{path}'")
        return  # a hub id
    has_heads = storage.exists(storage.join(path, METADATA_FILE))
    if has_heads and not wants_heads:
        raise ValueError(
            f"'{path}' is a multi-head policy: use it as 'tutor' of 'kind: policy', with weights"
        )
    if wants_heads and not has_heads:
        raise ValueError(f"'{path}' is an ordinary model: use it with 'kind: model'")


def _settings(config: DialoguesConfig) -> dict[str, Any]:
    """What the dialogues depend on: not where they are played, nor how hard endpoints may be asked."""
    settings = config.model_dump(
        mode="json", exclude={"output", "cluster", "max_failed_fraction", "pairs", "seed", "cases"}
    )
    for side in ("tutor", "student"):
        if "endpoint" in settings[side]:
            settings[side]["endpoint"] = settings[side]["endpoint"]["model"]
    # An option that came later counts where it is set: dialogues played before it stay valid.
    if settings["tutor"].get("concentration") == 1.0:
        del settings["tutor"]["concentration"]
    return settings


def _cases_settings(config: DialoguesConfig) -> dict[str, Any]:
    """The cases, and what their files hold now."""
    assert config.cases is not None
    files = [] if isinstance(config.cases, GridCases) else data_files(config.cases.path)
    return {
        "cases": config.cases.model_dump(mode="json"),
        "files": [storage.fingerprint(file) for file in files],
    }


def _read_cases(context: Context[DialoguesConfig]) -> StageResult:
    """Write the cases as one file, which every actor reads."""
    assert context.config.cases is not None
    cases, report = load_cases(context.config.cases)
    account, bad = context.account(report), report.bad
    quarantine(bad, len(cases) + len(bad), MAX_BAD_CASES, context.output_path(QUARANTINE))
    storage.write_bytes(context.path(CASES_FILE), CASES.dump_json(cases))
    return StageResult(
        {"rows": len(cases) + len(bad), "quarantined": len(bad), "data": account}, {"cases": CASES_FILE}
    )


def _chunks(config: DialoguesConfig) -> DialogueChunks:
    miniature = isinstance(config.student, MiniatureStudentConfig)
    first = first_seed(config.seed, "dialogues") if miniature else 0
    return DialogueChunks(first, config.play.dialogues, config.play.batch_size_per_actor)


def _spec(context: Context[DialoguesConfig]) -> RolloutSpec:
    config = context.config
    tutor, student = config.tutor, config.student
    if not isinstance(tutor, EndpointTutorConfig):
        tutor = tutor.model_copy(update={"path": place_model(tutor.path, context.path("tutor"))})
    if isinstance(student, ModelStudentConfig):
        same = not isinstance(config.tutor, EndpointTutorConfig) and config.tutor.path == student.path
        url = context.path("tutor" if same else "student")
        student = student.model_copy(update={"path": place_model(student.path, url)})
    reward = None if config.reward is None else RewardSource.parse(config.reward)
    return RolloutSpec(
        tutor=tutor,
        student=student,
        play=config.play,
        output_url=context.folder,
        purpose=config.name,
        placement=DeviceConfig.of(config.cluster, config.dtype),
        threads=max(1, math.floor(config.cluster.cpus_per_rollout_actor)),
        reward_url=None if reward is None else storage.absolute(reward.model),
        reward_objective=None if reward is None else reward.objective,
        cases_url=None if config.cases is None else context.input("cases", "cases"),
        personas=config.personas,
        seed=config.seed,
    )


def _write_pairs(context: Context[DialoguesConfig]) -> dict[str, Any]:
    """Pairs of every objective the reward model scores, and what became of the candidates."""
    config, folder = context.config, context.path(PAIRS)
    for shard in storage.list_files(folder, ".parquet"):
        storage.remove(shard)
    if config.reward is None:
        return {}
    sets = CandidateShards(context.path(CANDIDATES))
    first = next(iter(sets), None)
    if first is None:
        raise StageError("no dialogue came to a candidate turn: there is nothing to make pairs of")
    reports = {}
    number = 0
    for objective in first.candidates[0].scores or {}:
        pairs, report = build_pairs(sets, objective, config.pairs)
        reports[objective] = asdict(report)
        while part := list(itertools.islice(pairs, PAIRS_PER_SHARD)):
            PreferencePair.save(part, storage.join(folder, f"part-{number:06d}.parquet"))
            number += 1
    return reports
