"""The stages of a run: what each needs, which settings it depends on, and which package does the work."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerFast, Qwen2Config

from mahalo_ray.config import (
    MiniatureStudentConfig,
    ModelTutorConfig,
    PlayConfig,
    PolicyConfig,
    RolloutConfig,
    RunConfig,
    ScratchModelConfig,
)
from mahalo_ray.config.section import Section
from mahalo_ray.data import storage
from mahalo_ray.data.records import EXAMPLE_SCHEMA, CandidateSet, Dialogue, PreferencePair, StepTrace
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.domains.tutoring.scripted import encode_example, scripted_dialogues, train_tokenizer
from mahalo_ray.models.backbone import load_tokenizer
from mahalo_ray.pipeline.artifacts import place_model
from mahalo_ray.pipeline.evaluating import evaluate, report, sweep
from mahalo_ray.pipeline.seed_blocks import first_seed
from mahalo_ray.pipeline.serve import try_serving
from mahalo_ray.pipeline.stages import Context, Pipeline, Stage, StageResult
from mahalo_ray.rollouts.dialogue_job import CANDIDATES, DialogueChunks, RolloutSpec, run_rollouts
from mahalo_ray.rollouts.pair_building import build_pairs, labelled_traces
from mahalo_ray.training.policy_methods import METHOD_VERSIONS
from mahalo_ray.training.ray_train import TrainingResult, run_stage
from mahalo_ray.training.settings import PolicySettings, RewardSettings, SftSettings, StageSettings

# Enough text to learn the vocabulary from; the miniature has few words.
TOKENIZER_DIALOGUES = 2000
REPORT_EVERY = 200
START_MODEL = "start_model"


def make_sft_data(context: Context[RunConfig]) -> StageResult:
    """Write the SFT examples (EXAMPLE_SCHEMA) and the folder of the model that training starts from."""
    config = context.config
    context.progress.start(2 * config.domain.sft_dialogues, "dialogues")
    dialogues = list(_counted(context, scripted_dialogues(config.domain.sft_dialogues, config.seed), "made"))
    Dialogue.save(dialogues, context.path("dialogues", "part-000000.parquet"))
    chat = _start_model(context, dialogues)
    rows = [encode_example(d, chat, config.sft.loss_on) for d in _counted(context, dialogues, "encoded")]
    table = pa.Table.from_pylist(rows, schema=EXAMPLE_SCHEMA)
    storage.write_table(context.path("examples", "part-000000.parquet"), table)
    return StageResult(
        {
            "dialogues": len(rows),
            "tokens": len(table["input_ids"].combine_chunks().flatten()),
            "vocabulary": len(chat.tokenizer),
        },
        {"examples": "examples", "dialogues": "dialogues"},
    )


def _counted(
    context: Context[RunConfig], items: Iterator[Dialogue] | Sequence[Dialogue], note: str
) -> Iterator[Dialogue]:
    for number, item in enumerate(items, start=1):
        yield item
        if number % REPORT_EVERY == 0:
            context.progress.advance(REPORT_EVERY, note)


def start_model_url(config: RunConfig, sft_data_folder: str) -> str:
    """The model that SFT starts from: a base with a path stays there, all else is in the stage's folder."""
    base = config.model.base
    if base is not None and storage.exists(base):
        return storage.absolute(base)
    return storage.join(sft_data_folder, START_MODEL)


def _start_model(context: Context[RunConfig], dialogues: Sequence[Dialogue]) -> ChatFormat:
    """Make the model that SFT starts from, or fetch it from a hub; returns its chat format."""
    config = context.config
    if config.model.scratch is not None:
        some = itertools.islice(dialogues, TOKENIZER_DIALOGUES)
        texts = (turn.content for dialogue in some for turn in dialogue.turns)
        tokenizer = train_tokenizer(texts, config.model.scratch.vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            scratch_config(config, config.model.scratch, tokenizer).save_pretrained(folder)
            storage.upload_folder(folder, context.path(START_MODEL))
        return ChatFormat(tokenizer)
    assert config.model.base is not None
    url = place_model(config.model.base, context.path(START_MODEL))
    return ChatFormat(load_tokenizer(storage.local_copy(url)))


def scratch_config(
    config: RunConfig, scratch: ScratchModelConfig, tokenizer: PreTrainedTokenizerFast
) -> Qwen2Config:
    """A small Qwen2 for this tokenizer; embedding and output layer are not tied, as heads need their own."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=scratch.hidden_size,
        num_hidden_layers=scratch.num_layers,
        num_attention_heads=scratch.num_attention_heads,
        num_key_value_heads=scratch.num_attention_heads,
        intermediate_size=scratch.intermediate_size,
        max_position_embeddings=config.model.max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["Qwen2ForCausalLM"],
    )


def train_heads(context: Context[RunConfig], base_url: str) -> StageResult:
    """MAH-DPO (or a baseline) on the pairs of stage `pairs`; the base is the reference too."""
    config = context.config
    settings = PolicySettings(
        model_url=base_url,
        output_url=context.path("model"),
        model=config.model,
        seed=config.seed,
        pairs_url=context.input("pairs", "pairs"),
        objectives=config.objective_names,
        policy=config.policy,
        held_out_fraction=config.pairs.held_out_fraction,
        sentences_are_moves=config.data is None,
    )
    return train(context, settings)


def method_version(policy: PolicyConfig, since: int = 1) -> dict[str, int]:
    """What a stage's fingerprint is made of besides `policy` where the method is no longer what it was in
    version `since`, with which the stage came to be."""
    version = METHOD_VERSIONS[policy.method]
    return {"method_version": version} if version > since else {}


def train(context: Context[RunConfig], settings: StageSettings) -> StageResult:
    """Run a training stage in the stage's own folder."""
    return leave_model(context, train_in_folder(context, settings, context.folder))


def leave_model(context: Context[RunConfig], result: TrainingResult) -> StageResult:
    """The outputs of a finished training stage: the model's folder, and its curves."""
    storage.write_json(context.path("history.json"), result.history)
    return StageResult(dict(result.metrics), {"model": "model", "history": "history.json"})


def train_in_folder(context: Context[RunConfig], settings: StageSettings, folder: str) -> TrainingResult:
    """Train with the run's cluster; unfinished work is kept in `folder`."""
    return run_stage(
        settings,
        cluster=context.config.cluster,
        run_dir=storage.join(folder, "checkpoints"),
        progress=context.progress.training,
    )


def sft(context: Context[RunConfig]) -> StageResult:
    """Supervised fine-tuning on the tutors' turns."""
    config = context.config
    settings = SftSettings(
        model_url=start_model_url(config, context.upstream["sft_data"][0]),
        output_url=context.path("model"),
        model=config.model,
        seed=config.seed,
        examples_url=context.input("sft_data", "examples"),
        sft=config.sft,
    )
    return train(context, settings)


def reward_rollouts(context: Context[RunConfig]) -> StageResult:
    """Dialogues whose candidate turns are labelled by Monte-Carlo continuations and the judge."""
    config = context.config
    metrics = _play(context, config.reward_rollouts, None, "reward_rollouts")
    sets = CandidateSet.load(context.path(CANDIDATES))
    traces = labelled_traces(sets, config.objective_names)
    StepTrace.save(traces, context.path("traces", "part-000000.parquet"))
    return StageResult({**metrics, "traces": len(traces)}, {"candidates": CANDIDATES, "traces": "traces"})


def reward(context: Context[RunConfig]) -> StageResult:
    """The process reward model, with its figures and calibration on held-out prompts."""
    config = context.config
    settings = RewardSettings(
        model_url=context.input("sft", "model"),
        output_url=context.path("model"),
        model=config.model,
        seed=config.seed,
        traces_url=context.input("reward_rollouts", "traces"),
        objectives=config.objectives,
        reward=config.reward,
    )
    return train(context, settings)


def pair_rollouts(context: Context[RunConfig]) -> StageResult:
    """Fresh dialogues whose candidate turns are scored by the reward model."""
    metrics = _play(context, context.config.pair_rollouts, context.input("reward", "model"), "pair_rollouts")
    return StageResult(metrics, {"candidates": CANDIDATES})


def pairs(context: Context[RunConfig]) -> StageResult:
    """Preference pairs per objective of the candidates of one prompt."""
    config = context.config
    sets = CandidateSet.load(context.input("pair_rollouts", "candidates"))
    context.progress.start(len(config.objectives), "objectives")
    collected: list[PreferencePair] = []
    metrics: dict[str, Any] = {}
    for objective in config.objective_names:
        of_objective, figures = build_pairs(sets, objective, config.pairs)
        if not figures.pairs:
            raise ValueError(
                f"no candidates of objective '{objective}' are far enough apart to make pairs: lower "
                f"'pairs.min_gap_std' (now {config.pairs.min_gap_std}) or play more 'pair_rollouts.dialogues'"
            )
        collected += of_objective
        metrics[objective] = asdict(figures)
        context.progress.say(figures.describe())
        context.progress.advance()
    PreferencePair.save(collected, context.path("pairs", "part-000000.parquet"))
    return StageResult(metrics, {"pairs": "pairs"})


def policy(context: Context[RunConfig]) -> StageResult:
    """MAH-DPO: one head per objective over a shared backbone."""
    return train_heads(context, context.input("sft", "model"))


def _play(
    context: Context[RunConfig], settings: RolloutConfig, reward_url: str | None, purpose: str
) -> dict[str, Any]:
    config = context.config
    spec = RolloutSpec(
        tutor=ModelTutorConfig(path=context.input("sft", "model")),
        student=MiniatureStudentConfig(),
        play=PlayConfig.of(settings),
        output_url=context.folder,
        purpose=purpose,
        placement=DeviceConfig(config.cluster.device, config.model.dtype),
        threads=max(1, math.floor(config.cluster.cpus_per_rollout_actor)),
        reward_url=reward_url,
        continuations=settings.continuations,
        gamma=settings.gamma,
    )
    first = first_seed(config.seed, purpose)
    chunks = DialogueChunks(first, settings.dialogues, settings.batch_size_per_actor)
    context.progress.start(settings.dialogues, "dialogues")
    return run_rollouts(spec, chunks, config.cluster, context.progress.update).model_dump(mode="json")


def _pairs_settings(config: RunConfig) -> dict[str, Any]:
    """Options that came later count where they are set: pairs made before them stay valid."""
    later = config.pairs.model_dump(
        include={"balance_length", "split_by", "selection", "gap_margin"}, exclude_defaults=True
    )
    settings = sections("pairs.min_gap_std", "pairs.max_pairs_per_objective", "objective_names")(config)
    return {**settings, **{f"pairs.{name}": value for name, value in later.items()}}


def _policy_settings(config: RunConfig) -> dict[str, Any]:
    settings = sections("policy", "pairs.held_out_fraction", "objective_names", "model")(config)
    return {**settings, **method_version(config.policy)}


def sections(*names: str) -> Callable[[RunConfig], Any]:
    """The part of a configuration named by dotted paths, as JSON values."""

    def pick(config: RunConfig) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        for name in names:
            value: Any = config
            for part in name.split("."):
                value = getattr(value, part)
            settings[name] = _plain(value)
        return settings

    return pick


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.shaping()
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
            version=2,  # students with problems of no training dialogue
            resumes=True,
        ),
        Stage(
            "evaluate",
            "Evaluate heads and guidance",
            evaluate,
            sections("guided", "sweep", "evaluation", "objective_names", "model.dtype"),
            needs=("sft", "reward", "policy"),
            version=2,  # students with problems of no training dialogue
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
