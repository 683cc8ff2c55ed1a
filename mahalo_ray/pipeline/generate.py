"""`mahalo generate`: answer a file of prompts by guided decoding. Run again, it goes on where it stopped."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from mahalo_ray.config import GenerateConfig
from mahalo_ray.data import storage
from mahalo_ray.data.prompts import read_prompts
from mahalo_ray.data.rows import QUARANTINE, BadRow, data_files, quarantine
from mahalo_ray.models.folder import METADATA_FILE
from mahalo_ray.pipeline.progress import RunProgress
from mahalo_ray.pipeline.stages import Manifest, claim_output, fingerprint, run_lock
from mahalo_ray.rollouts.generate import ANSWERS, REJECTED, PromptChunks, generate_chunks

Session = Callable[[], contextlib.AbstractContextManager[None]]


def generate(config: GenerateConfig, session: Session, progress: RunProgress) -> Manifest:
    """Bring the output up to date: `answers/*.parquet` in the prompts' order, `quarantine.parquet`, manifest.

    ValueError for prompts or models that are not there, an output of other settings, and more rows that
    cannot be answered than `max_bad_fraction`.
    """
    began = time.monotonic()
    config = _resolved(config)
    output = config.output
    rows, bad = read_prompts(config.prompts)
    with run_lock(output), progress as display, contextlib.ExitStack() as ray:
        mine = _fingerprint(config)
        claim_output(output, config, mine, "answers")
        with display.stage("Answer prompts") as bar:
            ray.enter_context(session())
            bar.start(len(rows), "prompts")
            deaths = generate_chunks(config, PromptChunks(rows, config.chunk_rows), bar.update)
        ray.close()
        bad += _rejected(output)
        total = len(bad) + sum(
            storage.read_file(shard).num_rows for shard in storage.list_files(storage.join(output, ANSWERS))
        )
        quarantine(bad, total, config.max_bad_fraction, storage.join(output, QUARANTINE), "max_bad_fraction")
        figures = {"answered": total - len(bad), "quarantined": len(bad), "actor_deaths": deaths}
        outputs = {"answers": ANSWERS, "quarantine": QUARANTINE}
        manifest = Manifest("generate", mine, outputs, figures, round(time.monotonic() - began, 3))
        manifest.write(output)
        return manifest


def _resolved(config: GenerateConfig) -> GenerateConfig:
    """Models and output as every node can open them."""
    changes: dict[str, object] = {"output": storage.absolute(config.output)}
    if config.policy is not None:
        changes["policy"] = _model(config.policy, "policy")
    changes["rewards"] = [
        source.model_copy(update={"model": _model(source.model, "reward")}) for source in config.rewards
    ]
    if config.server is not None:
        tokenizer = storage.absolute(config.server.tokenizer)
        changes["server"] = config.server.model_copy(update={"tokenizer": tokenizer})
    return config.model_copy(update=changes)


def _model(source: str, stage: str) -> str:
    """A model folder: `source` itself, or what the finished stage of the run in `source` made."""
    source = storage.absolute(source)
    if not storage.exists(source):
        raise ValueError(f"there is no {stage} model at '{source}'")
    if storage.exists(storage.join(source, METADATA_FILE)) or not storage.exists(
        storage.join(source, "config.yaml")
    ):
        return source
    manifest = Manifest.read(storage.join(source, stage))
    if manifest is None:
        raise ValueError(f"stage '{stage}' of the run in '{source}' is not finished")
    return storage.join(source, stage, manifest.outputs["model"])


def _fingerprint(config: GenerateConfig) -> str:
    """What the answers depend on: not where they are made, nor how hard a server may be asked."""
    settings = config.model_dump(mode="json", exclude={"output", "prompts", "cluster", "max_bad_fraction"})
    if config.server is not None:
        settings["server"]["endpoint"] = config.server.endpoint.model
    settings["files"] = [storage.fingerprint(file) for file in data_files(config.prompts)]
    models = [source.model for source in config.rewards] + ([] if config.policy is None else [config.policy])
    settings["models"] = [
        [storage.fingerprint(file) for file in storage.list_files(model)] for model in models
    ]
    return fingerprint("generate", 1, config.request.seed, settings, {})


def _rejected(output: str) -> list[BadRow]:
    """The rows that actors could not answer."""
    shards = storage.list_files(storage.join(output, REJECTED), ".parquet")
    return [BadRow(**row) for shard in shards for row in storage.read_file(shard).to_pylist()]
