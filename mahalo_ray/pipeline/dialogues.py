"""`mahalo dialogues`: play, make pairs, write the summary. Run again, it goes on where it stopped."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from mahalo_ray.config import (
    DialoguesConfig,
    EndpointTutorConfig,
    GridCases,
    MiniatureStudentConfig,
    ModelStudentConfig,
)
from mahalo_ray.data import storage
from mahalo_ray.data.records import PreferencePair
from mahalo_ray.data.rows import QUARANTINE, data_files, quarantine
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.domains.tutoring.personas import load_cases
from mahalo_ray.errors import StageError
from mahalo_ray.evaluation.dialogue_report import write_dialogue_report
from mahalo_ray.models.folder import METADATA_FILE
from mahalo_ray.pipeline.progress import RunProgress
from mahalo_ray.pipeline.seed_blocks import first_seed
from mahalo_ray.pipeline.stages import Manifest, claim_output, fingerprint, run_lock
from mahalo_ray.rollouts.dialogue_job import (
    CANDIDATES,
    CASES,
    DIALOGUES,
    DialogueChunks,
    RolloutSpec,
    run_rollouts,
    shared,
)
from mahalo_ray.rollouts.pairs import CandidateShards, build_pairs

PAIRS = "pairs"
CASES_FILE = "cases.json"
REPORT = "dialogues.html"
PAIRS_PER_SHARD = 5000
MAX_BAD_CASES = 0.01  # share of rows that cannot be used before they are an error

Session = Callable[[], contextlib.AbstractContextManager[None]]


def make_dialogues(config: DialoguesConfig, session: Session, progress: RunProgress) -> Manifest:
    """Bring the output up to date; finished chunks are kept, failed dialogues are played again.

    ValueError if the output holds dialogues of other settings.
    """
    began, output = time.monotonic(), storage.absolute(config.output)
    with run_lock(output), progress as display, contextlib.ExitStack() as ray:
        mine = _fingerprint(config)
        claim_output(output, config, mine, "dialogues")
        cases_url = _write_cases(config, output)
        with display.stage("[1/3] Play dialogues") as bar:
            ray.enter_context(session())
            bar.start(config.play.dialogues, "dialogues")
            metrics = run_rollouts(
                _spec(config, output, cases_url),
                _chunks(config),
                config.cluster,
                bar.update,
                config.max_failed_fraction,
            ).as_json()
        ray.close()
        with display.stage("[2/3] Build preference pairs"):
            metrics[PAIRS] = _write_pairs(config, output)
        with display.stage("[3/3] Write the summary"):
            write_dialogue_report(output, config.name, metrics, storage.join(output, REPORT))
        outputs = {"candidates": CANDIDATES, "dialogues": DIALOGUES, "report": REPORT}
        if metrics[PAIRS]:
            outputs[PAIRS] = PAIRS
        seconds = round(time.monotonic() - began, 3)
        manifest = Manifest("dialogues", mine, outputs, metrics, seconds)
        manifest.write(output)
        return manifest


def check_sources(config: DialoguesConfig) -> None:
    """ValueError for models that are not there or of the wrong kind, and for endpoints too small for the
    actors: before anything starts."""
    actors = min(config.cluster.rollout_actors, len(_chunks(config)))
    for side in (config.tutor, config.student):
        if side.kind == "endpoint":
            shared(side.endpoint, actors)
        elif side.kind != "miniature":
            _check_model(side.path, side.kind == "policy")
    if config.reward is not None and not storage.exists(config.reward):
        raise ValueError(f"'reward': there is no model folder '{config.reward}'")


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


def _fingerprint(config: DialoguesConfig) -> str:
    """What the dialogues depend on: not where they are played, nor how hard endpoints may be asked."""
    settings = config.model_dump(
        mode="json", exclude={"output", "cluster", "max_failed_fraction", "pairs", "seed"}
    )
    for side in ("tutor", "student"):
        if "endpoint" in settings[side]:
            settings[side]["endpoint"] = settings[side]["endpoint"]["model"]
    files = []
    if config.cases is not None and not isinstance(config.cases, GridCases):
        files = [storage.fingerprint(file) for file in data_files(config.cases.path)]
    return fingerprint("dialogues", 1, config.seed, {**settings, "files": files}, {})


def _write_cases(config: DialoguesConfig, output: str) -> str | None:
    """Where every actor reads the cases: beside the output, which all nodes reach."""
    if config.cases is None:
        return None
    cases, bad = load_cases(config.cases)
    quarantine(bad, len(cases) + len(bad), MAX_BAD_CASES, storage.join(output, QUARANTINE))
    url = storage.join(output, CASES_FILE)
    storage.write_bytes(url, CASES.dump_json(cases))
    return url


def _chunks(config: DialoguesConfig) -> DialogueChunks:
    miniature = isinstance(config.student, MiniatureStudentConfig)
    first = first_seed(config.seed, "dialogues") if miniature else 0
    return DialogueChunks(first, config.play.dialogues, config.play.batch_size_per_actor)


def _spec(config: DialoguesConfig, output: str, cases_url: str | None) -> RolloutSpec:
    tutor, student = config.tutor, config.student
    if not isinstance(tutor, EndpointTutorConfig):
        tutor = tutor.model_copy(update={"path": _reachable(tutor.path)})
    if isinstance(student, ModelStudentConfig):
        student = student.model_copy(update={"path": _reachable(student.path)})
    return RolloutSpec(
        tutor=tutor,
        student=student,
        play=config.play,
        output_url=output,
        purpose=config.name,
        placement=DeviceConfig(config.cluster.device, config.dtype),
        threads=max(1, math.floor(config.cluster.cpus_per_rollout_actor)),
        reward_url=None if config.reward is None else storage.absolute(config.reward),
        cases_url=cases_url,
        personas=config.personas,
        seed=config.seed,
    )


def _reachable(path: str) -> str:
    """A path that means the same in every actor's folder; a hub id stays one."""
    return storage.absolute(path) if storage.exists(path) else path


def _write_pairs(config: DialoguesConfig, output: str) -> dict[str, Any]:
    """Pairs of every objective the reward model scores, and what became of the candidates."""
    folder = storage.join(output, PAIRS)
    storage.remove(folder)
    if config.reward is None:
        return {}
    sets = CandidateShards(storage.join(output, CANDIDATES))
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
