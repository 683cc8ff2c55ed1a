"""The stages of a run on own preference pairs and step traces: read them, then train a reward model or a
policy. No rollouts, no domain."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from mahalo_ray.config import ObjectiveConfig, PairsSource, RunConfig
from mahalo_ray.data import storage
from mahalo_ray.data.pair_readers import ReadPairs, read_pairs
from mahalo_ray.data.records import PreferencePair, ShardWriter, StepTrace
from mahalo_ray.data.row_files import QUARANTINE, data_files
from mahalo_ray.data.rows import RowLeftOut, quarantine
from mahalo_ray.data.step_readers import ReadTraces, read_traces
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.domains.human_values import read_truthfulqa
from mahalo_ray.evaluation.reward_metrics import ObjectiveMetrics
from mahalo_ray.evaluation.reward_report import RESULTS, held_out_report, write_report
from mahalo_ray.models.backbone import load_tokenizer
from mahalo_ray.models.folder import model_folder
from mahalo_ray.models.reward_heads import OUTPUT_KIND_OF
from mahalo_ray.models.scoring import StepEncoder
from mahalo_ray.pipeline.artifacts import place_model
from mahalo_ray.pipeline.run import (
    START_MODEL,
    extended_files,
    leave_model,
    method_version,
    train_heads,
    train_in_folder,
    trained_objectives,
)
from mahalo_ray.pipeline.stages import Context, Pipeline, Stage, StageResult
from mahalo_ray.training.batches import HashSplit
from mahalo_ray.training.pairs import RoleCheck, split_key
from mahalo_ray.training.ray_train import TrainingResult
from mahalo_ray.training.reward_data import check_readable
from mahalo_ray.training.settings import RewardSettings

NOT_SAMPLED = "not in the sample"


def pairs(context: Context[RunConfig]) -> StageResult:
    """Read the pairs of all sources; what cannot be used goes to quarantine.parquet."""
    config = context.config
    assert config.data is not None
    context.progress.start(len(config.data.pairs), "sources")
    writer = ShardWriter(PreferencePair, context.path("pairs"))
    check_roles = RoleCheck(ChatFormat(_tokenizer(config)))
    trained = trained_objectives(config)
    names = [o.name for o in config.objectives if o.supervision == "pairwise" and o.name in trained]
    counts = dict.fromkeys(names, 0)
    sample = HashSplit(1.0, 0)
    for number, source in enumerate(config.data.pairs):
        if source.objective is not None and source.objective not in trained:
            raise ValueError(
                f"'data.pairs.{number}.objective': the policy in '{config.policy.extends}' has a head for "
                f"'{source.objective}' already, which stays as it is ('policy.extends'): leave the source out"
            )

    def take(pair: PreferencePair) -> None:
        if split_key(pair) not in sample:
            raise RowLeftOut(NOT_SAMPLED)
        check_roles(pair)
        writer.add(pair)
        counts[pair.objective] = counts.get(pair.objective, 0) + 1

    read = ReadPairs(take=take)
    for number, source in enumerate(config.data.pairs):
        sample = _sample(source.sample, config.seed)
        _read_source(source, trained, str(number), read)
        context.progress.advance()
    writer.flush()
    account = context.account(read.report)
    quarantine(read.bad, read.rows, config.data.max_bad_fraction, context.path(QUARANTINE))
    for name in names:
        if counts[name] == 0:
            others = ", ".join(read.left_out) or "none"
            raise ValueError(
                f"'data.pairs' holds no pairs of objective '{name}' (objectives of rows left out: {others})"
            )
    metrics = {"rows": read.rows, "bad_rows": len(read.bad), "left_out": read.left_out, "data": account}
    return StageResult(
        {**metrics, "pairs": {name: counts[name] for name in names}},
        {"pairs": "pairs", "quarantine": QUARANTINE},
    )


def traces(context: Context[RunConfig]) -> StageResult:
    """Read the step traces of all sources; what cannot be used goes to quarantine.parquet."""
    config = context.config
    assert config.data is not None
    context.progress.start(len(config.data.traces), "sources")
    writer = ShardWriter(StepTrace, context.path("traces"))
    encoder = StepEncoder(_tokenizer(config), config.data.step_separator)
    names = [objective.name for objective in config.objectives if objective.supervision != "pairwise"]
    counts = dict.fromkeys(names, 0)
    sample = HashSplit(1.0, 0)

    def take(trace: StepTrace) -> None:
        if trace.group not in sample:
            raise RowLeftOut(NOT_SAMPLED)
        check_readable(trace, encoder, config.model.max_length)
        writer.add(trace)
        for name in names:
            counts[name] += labelled(trace, name)

    read = ReadTraces(take=take)
    for number, source in enumerate(config.data.traces):
        sample = _sample(source.sample, config.seed)
        read_traces(
            source.path,
            source.format,
            config.objective_names,
            source.objective,
            source.objective_field,
            str(number),
            read,
            label_range=source.label_range,
            outcome_labels=source.outcome_labels,
            gamma=source.gamma,
        )
        context.progress.advance()
    writer.flush()
    account = context.account(read.report)
    quarantine(read.bad, read.seen, config.data.max_bad_fraction, context.path(QUARANTINE), unit="traces")
    for name, count in counts.items():
        if count == 0:
            raise ValueError(f"'data.traces' holds no step with a label of objective '{name}'")
    metrics = {
        "rows": read.rows,
        "bad_rows": len(read.bad),
        "traces": writer.written,
        "labelled": counts,
        "data": account,
    }
    return StageResult(metrics, {"traces": "traces", "quarantine": QUARANTINE})


def _tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    assert config.model.base is not None
    return load_tokenizer(model_folder(config.model.base))


def _sample(share: float, seed: int) -> HashSplit:
    """The share of the keys that is used: the draw that holds rows out, with another seed."""
    return HashSplit(share, seed + 1)


def _read_source(source: PairsSource, objectives: Sequence[str], name: str, into: ReadPairs) -> None:
    if source.format == "truthfulqa":
        assert source.objective is not None
        read_truthfulqa(source.path, source.objective, 1, into)
        return
    read_pairs(
        source.path,
        source.format,
        objectives,
        source.objective,
        source.objective_field,
        name,
        into,
        aspect=source.aspect,
    )


def labelled(trace: StepTrace, objective: str) -> bool:
    """Whether any step has a label of the objective."""
    return any(label is not None for label in trace.labels.get(objective, []))


def source_settings(kind: str) -> Callable[[RunConfig], dict[str, Any]]:
    """Sources of one kind, and what their files hold now."""

    def settings(config: RunConfig) -> dict[str, Any]:
        assert config.data is not None
        sources = config.data.pairs if kind == "pairs" else config.data.traces
        files = [file for source in sources for file in data_files(source.path)]
        return {
            "data": [source.model_dump(mode="json") for source in sources],
            "max_bad_fraction": config.data.max_bad_fraction,
            "objectives": [objective.model_dump(mode="json") for objective in config.objectives],
            "files": [storage.fingerprint(file) for file in files],
        }

    return settings


def pairs_settings(config: RunConfig) -> dict[str, Any]:
    """The base counts too: what its chat template refuses is left out."""
    settings = model_settings(config)
    new = {} if config.policy.extends is None else {"trained": trained_objectives(config)}
    return {**source_settings("pairs")(config), "base": [config.model.base, settings["base"]], **new}


def traces_settings(config: RunConfig) -> dict[str, Any]:
    """The model counts too: what is too long for it is refused."""
    assert config.data is not None
    separator = {"step_separator": config.data.step_separator}
    return {**source_settings("traces")(config), **separator, **model_settings(config)}


def model_settings(config: RunConfig) -> dict[str, Any]:
    """The base model, and what its files hold now."""
    base = config.model.base
    assert base is not None
    files = storage.list_files(base) if storage.exists(base) else []
    return {
        "model": config.model.model_dump(mode="json"),
        "base": {posixpath.basename(file): storage.fingerprint(file) for file in files},
    }


# Head inputs of a frozen backbone, kept for all stages and reruns; may be deleted at any time.
FEATURES = "features"


def reward(context: Context[RunConfig]) -> StageResult:
    """One reward model of all objectives."""
    return leave_model(context, _train_reward(context, context.config.objectives, context.folder))


def dedicated(context: Context[RunConfig]) -> StageResult:
    """A reward model of its own for every group of objectives, from the same rows."""
    config, metrics = context.config, dict[str, Any]()
    for number, names in enumerate(config.reward.dedicated):
        own = [objective for objective in config.objectives if objective.name in names]
        metrics[", ".join(names)] = _train_reward(context, own, context.path(str(number))).metrics
    return StageResult(metrics, {str(number): str(number) for number in range(len(config.reward.dedicated))})


def _train_reward(
    context: Context[RunConfig], objectives: Sequence[ObjectiveConfig], folder: str
) -> TrainingResult:
    """A reward model of these objectives on what the stages before have read, in `folder`/model."""
    config = context.config
    assert config.data is not None
    urls = {name: context.input(name, name) for name in context.upstream}
    traces_url = urls.get("traces")
    if traces_url is not None and len(objectives) < len(config.objectives):
        traces_url = _only(traces_url, [o.name for o in objectives], storage.join(folder, "traces"))
    settings = RewardSettings(
        model_url=_base_url(context),
        output_url=storage.join(folder, "model"),
        model=config.model,
        seed=config.seed,
        traces_url=traces_url,
        pairs_url=urls.get("pairs") if any(o.supervision == "pairwise" for o in objectives) else None,
        objectives=objectives,
        reward=config.reward,
        step_separator=config.data.step_separator,
        features_url=storage.join(config.output, FEATURES),
    )
    return train_in_folder(context, settings, folder)


def _only(traces_url: str, names: Sequence[str], url: str) -> str | None:
    """The traces with labels of these objectives, without any others; None if there are none."""
    writer = ShardWriter(StepTrace, url)
    for trace in StepTrace.stream(traces_url):
        if any(labelled(trace, name) for name in names):
            labels = {name: values for name, values in trace.labels.items() if name in names}
            writer.add(trace.model_copy(update={"labels": labels}))
    writer.flush()
    return url if writer.written else None


def reward_report(context: Context[RunConfig]) -> StageResult:
    """Metrics on held-out rows, and how the dedicated models do on the same."""
    config = context.config
    kinds = {objective.name: OUTPUT_KIND_OF[objective.supervision] for objective in config.objectives}
    unified = held_out_report(context.input("reward", "model"), kinds)
    apart: dict[str, ObjectiveMetrics] = {}
    for number, names in enumerate(config.reward.dedicated):
        model = storage.join(context.input("reward_dedicated", str(number)), "model")
        apart |= held_out_report(model, {name: kinds[name] for name in kinds if name in names})
    write_report(context.folder, unified, apart)
    return StageResult({name: own.as_json()["figures"] for name, own in unified.items()}, {"report": RESULTS})


def policy(context: Context[RunConfig]) -> StageResult:
    """MAH-DPO from the base model."""
    return train_heads(context, _base_url(context))


def _base_url(context: Context[RunConfig]) -> str:
    base = context.config.model.base
    assert base is not None
    return place_model(base, context.path(START_MODEL))


def _policy_settings(config: RunConfig) -> dict[str, Any]:
    return {
        "policy": config.policy.shaping(),
        "held_out_fraction": config.pairs.held_out_fraction,
        **method_version(config.policy),
        **extended_files(config),
        **model_settings(config),
    }


def _reward_settings(config: RunConfig) -> dict[str, Any]:
    assert config.data is not None
    return {
        "reward": {k: v for k, v in config.reward.shaping().items() if k != "dedicated"},
        "step_separator": config.data.step_separator,
        **model_settings(config),
    }


def _dedicated_settings(config: RunConfig) -> dict[str, Any]:
    return {"dedicated": config.reward.dedicated, **_reward_settings(config)}


def _nothing(config: RunConfig) -> None:
    return None


_READERS = {
    "pairs": Stage("pairs", "Read preference pairs", pairs, pairs_settings, uses_ray=False),
    "traces": Stage("traces", "Read step traces", traces, traces_settings, uses_ray=False),
}


def _reward_stages(config: RunConfig, needs: tuple[str, ...]) -> list[Stage[RunConfig]]:
    title = "Train the process reward model"
    stages = [Stage("reward", title, reward, _reward_settings, needs, resumes=True)]
    if config.reward.dedicated:
        title = "Train dedicated reward models"
        stages.append(Stage("reward_dedicated", title, dedicated, _dedicated_settings, needs, resumes=True))
    trained = tuple(stage.name for stage in stages)
    title = "Metrics of the reward model"
    return [*stages, Stage("reward_report", title, reward_report, _nothing, trained, uses_ray=False)]


def pipeline(config: RunConfig) -> Pipeline[RunConfig]:
    """The stages that this run's data allow."""
    assert config.data is not None
    readers = [name for name in _READERS if getattr(config.data, name)]
    stages = [_READERS[name] for name in readers]
    needs = tuple(readers)
    if config.policy.extends is None:  # else only pairs of the new objectives are read
        stages += _reward_stages(config, needs)
    if config.trains_policy:
        title = "Train the multi-head policy"
        stages.append(Stage("policy", title, policy, _policy_settings, needs, resumes=True))
    return Pipeline(stages)


def targets(config: RunConfig, asked: Sequence[str] | None) -> tuple[str, ...]:
    """The stages behind a verb: a reward model comes with its report. `mahalo run` (None) trains the policy
    on pairs, and the reward model where there are step traces."""
    if asked is None:
        asked = ("policy",) if config.trains_policy else ("reward",)
    return tuple("reward_report" if name == "reward" else name for name in asked)
