"""`mahalo generate`: answer a file of prompts by guided decoding. Run again, it goes on where it stopped."""

from __future__ import annotations

from typing import Any

from mahalo_ray.config import GenerateConfig
from mahalo_ray.data import storage
from mahalo_ray.data.prompts import PromptRow, ReadPrompts, read_prompts
from mahalo_ray.data.records import RecordTable
from mahalo_ray.data.row_files import QUARANTINE, data_files
from mahalo_ray.data.rows import BadRow, ReadReport, quarantine
from mahalo_ray.pipeline.artifacts import find_model
from mahalo_ray.pipeline.progress import RunProgress
from mahalo_ray.pipeline.stages import Context, Manifest, Pipeline, Session, Stage, StageResult
from mahalo_ray.rollouts.answers import ANSWERS, REJECTED, answer_prompts


def generate(config: GenerateConfig, session: Session, progress: RunProgress) -> Manifest:
    """Bring the output up to date: `answers/*.parquet` in the prompts' order, `quarantine.parquet`, manifest.

    ValueError for prompts or models that are not there, an output of other settings, and more rows that
    cannot be answered than `max_bad_fraction`.
    """
    config = _resolve(config)
    prompts = RecordTable(PromptRow)
    read = read_prompts(config.prompts, into=ReadPrompts(take=prompts.append))

    def answer(context: Context[GenerateConfig]) -> StageResult:
        return _answer(context, prompts, read.report)

    stage = Stage("generate", "Answer prompts", answer, _settings, in_output=True)
    return Pipeline([stage], holds="answers").run(config, session=session, progress=progress)["generate"]


def _answer(
    context: Context[GenerateConfig], prompts: RecordTable[PromptRow], read: ReadReport
) -> StageResult:
    config = context.config
    account = context.account(read)
    context.progress.start(len(prompts), "prompts")
    report = answer_prompts(config, prompts, context.progress.update)
    unusable = [*read.bad, *_rejected(config.output)]
    total, url = report.answered + len(unusable), context.path(QUARANTINE)
    quarantine(unusable, total, config.max_bad_fraction, url, "max_bad_fraction")
    metrics = {
        "answered": report.answered,
        "quarantined": len(unusable),
        "actor_deaths": report.actor_deaths,
        "data": account,
    }
    return StageResult(metrics, {"answers": ANSWERS, "quarantine": QUARANTINE})


def _resolve(config: GenerateConfig) -> GenerateConfig:
    """Models and output as every node can open them."""
    changes: dict[str, object] = {"output": storage.absolute(config.output)}
    if config.policy is not None:
        changes["policy"] = find_model(config.policy, "policy")
    changes["rewards"] = [
        source.model_copy(update={"model": find_model(source.model, "reward")}) for source in config.rewards
    ]
    if config.server is not None:
        tokenizer = storage.absolute(config.server.tokenizer)
        changes["server"] = config.server.model_copy(update={"tokenizer": tokenizer})
    return config.model_copy(update=changes)


def _settings(config: GenerateConfig) -> dict[str, Any]:
    """What the answers depend on: not where they are made, nor how hard a server may be asked."""
    settings = config.model_dump(mode="json", exclude={"output", "prompts", "cluster", "max_bad_fraction"})
    if config.server is not None:
        settings["server"]["endpoint"] = config.server.endpoint.model
    settings["files"] = [storage.fingerprint(file) for file in data_files(config.prompts)]
    models = [source.model for source in config.rewards] + ([] if config.policy is None else [config.policy])
    settings["models"] = [
        [storage.fingerprint(file) for file in storage.list_files(model)] for model in models
    ]
    return settings


def _rejected(output: str) -> list[BadRow]:
    """The rows that actors could not answer."""
    shards = storage.list_files(storage.join(output, REJECTED), ".parquet")
    return [BadRow(**row) for shard in shards for row in storage.read_file(shard).to_pylist()]
