"""The stages of a run: what each needs, which settings it depends on, and which package does the work."""

from __future__ import annotations

import itertools
import math
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerFast, Qwen2Config

from mahalo_ray.config import (
    MiniatureStudentConfig,
    ModelTutorConfig,
    PlayConfig,
    PolicyConfig,
    PolicyTutorConfig,
    RolloutConfig,
    RunConfig,
    ScratchModelConfig,
)
from mahalo_ray.config.section import Section
from mahalo_ray.data import storage
from mahalo_ray.data.records import EXAMPLE_SCHEMA, CandidateSet, Dialogue, PreferencePair, StepTrace
from mahalo_ray.data.row_files import QUARANTINE
from mahalo_ray.data.rows import quarantine
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.data.temporary import temporary_folder
from mahalo_ray.decoding.policy import DeviceConfig
from mahalo_ray.domains.judged_prompts import PromptsDomain
from mahalo_ray.domains.protocol import WHOLE_TURNS, Domain, load_domain
from mahalo_ray.domains.sft_text import encode_example, train_tokenizer
from mahalo_ray.models.backbone import load_tokenizer
from mahalo_ray.pipeline.artifacts import find_model, place_model
from mahalo_ray.pipeline.evaluating import evaluate, report
from mahalo_ray.pipeline.rounds import all_rounds, last_stage, round_stage
from mahalo_ray.pipeline.seed_blocks import (
    domain_contents,
    domain_for_workers,
    first_seed,
    round_seed,
)
from mahalo_ray.pipeline.serve import try_serving
from mahalo_ray.pipeline.stages import Context, Pipeline, Stage, StageResult
from mahalo_ray.pipeline.sweeping import (
    leave_sweep,
    methods_progress,
    play_spec,
    rounds_of,
    sweep,
    sweep_fronts,
    sweep_stage,
    unguided_vectors,
)
from mahalo_ray.rollouts.dialogue_job import CANDIDATES, DialogueChunks, RolloutSpec, run_rollouts
from mahalo_ray.rollouts.pair_building import build_pairs, judged_pairs, labelled_traces
from mahalo_ray.sweeps.training_trials import TrainingSpec, train_rounds
from mahalo_ray.training.policy_methods import METHOD_VERSIONS, new_objectives, of_objectives
from mahalo_ray.training.ray_train import TrainingResult, run_stage
from mahalo_ray.training.settings import PolicySettings, RewardSettings, SftSettings, StageSettings

# Enough text to learn the vocabulary from; miniatures have few words.
TOKENIZER_DIALOGUES = 2000
REPORT_EVERY = 200
START_MODEL = "start_model"


def make_sft_data(context: Context[RunConfig]) -> StageResult:
    """Write the SFT examples (EXAMPLE_SCHEMA) and the folder of the model that training starts from."""
    config = context.config
    domain, count = load_domain(config.domain), config.domain.sft_dialogues
    first = first_seed(config.seed, "sft")
    metrics, outputs = _left_out(context, domain)
    if not count:
        _start_model(context, [])
        return StageResult(metrics, outputs)
    context.progress.start(2 * count, "dialogues")
    made = (domain.sft_dialogue(first + number) for number in range(count))
    dialogues = list(_counted(context, made, "made"))
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
            **metrics,
        },
        {"examples": "examples", "dialogues": "dialogues", **outputs},
    )


def _left_out(context: Context[RunConfig], domain: Domain) -> tuple[dict[str, int], dict[str, str]]:
    """Write the rows of the run's own prompts that cannot be used; counts, and where they are."""
    prompts = context.config.domain.prompts
    if prompts is None or not isinstance(domain, PromptsDomain):
        return {}, {}
    url, share = context.path(QUARANTINE), prompts.max_bad_fraction
    rows, bad = domain.left_out()
    quarantine(bad, rows, share, url, "domain.prompts.max_bad_fraction")
    return {"prompts": rows, "quarantined": len(bad)}, {"quarantine": QUARANTINE}


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
        with temporary_folder("model") as folder:
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


def train_heads(context: Context[RunConfig], base_url: str, pairs_stage: str = "pairs") -> StageResult:
    """MAH-DPO (or a baseline) on the pairs of this stage; the base is the reference too."""
    return train(context, policy_training(context, base_url, pairs_stage))


def policy_training(context: Context[RunConfig], base_url: str, pairs_stage: str) -> PolicySettings:
    """The training of the policy that `policy` describes, on the pairs of this stage."""
    config = context.config
    policy, objectives = config.policy, trained_objectives(config)
    if policy.extends is not None:
        update = {"extends": extended_policy(policy.extends)}
        policy = of_objectives(policy, objectives).model_copy(update=update)
    return PolicySettings(
        model_url=base_url,
        output_url=context.path("model"),
        model=config.model,
        seed=config.seed,
        pairs_url=context.input(pairs_stage, "pairs"),
        objectives=objectives,
        policy=policy,
        held_out_fraction=config.pairs.held_out_fraction,
        domain=domain_for_workers(config.domain) if config.data is None else None,
        step_domain=_step_domain(config),
    )


def _step_domain(config: RunConfig) -> str | None:
    """Where the steps end that pairs are made of; None where pairs are of whole turns."""
    if config.data is not None or _compares_answers(config):
        return None
    boundary = load_domain(config.domain).boundary
    return None if boundary == WHOLE_TURNS else boundary


def extended_policy(extends: str) -> str:
    """The model folder behind `policy.extends`; ValueError where there is none."""
    try:
        return find_model(extends, "policy")
    except ValueError as error:
        raise ValueError(f"'policy.extends': {error}") from error


def trained_objectives(config: RunConfig) -> tuple[str, ...]:
    """The objectives whose heads the run trains: all, or those that the policy it extends lacks."""
    if config.policy.extends is None:
        return config.objective_names
    return new_objectives(extended_policy(config.policy.extends), config.objective_names)


def extended_files(config: RunConfig) -> dict[str, Any]:
    """What a stage's fingerprint is made of besides `policy.extends`: what the files of that policy hold."""
    if config.policy.extends is None:
        return {}
    files = storage.list_files(extended_policy(config.policy.extends))
    return {"extended": {posixpath.basename(file): storage.fingerprint(file) for file in files}}


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
    """Supervised fine-tuning on the tutors' turns; without dialogues a copy of the base."""
    config = context.config
    base_url = start_model_url(config, context.upstream["sft_data"][0])
    if not config.domain.sft_dialogues:
        storage.upload_folder(storage.local_copy(base_url), context.path("model"))
        return leave_model(context, TrainingResult({}, []))
    settings = SftSettings(
        model_url=base_url,
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
    tutor = ModelTutorConfig(path=context.input("sft", "model"))
    first = first_seed(config.seed, "reward_rollouts")
    metrics = _play(context, config.reward_rollouts, tutor, None, "reward_rollouts", first)
    sets = CandidateSet.load(context.path(CANDIDATES))
    if _compares_answers(config):
        judged = [pair for name in config.objective_names for pair in judged_pairs(sets, name)]
        PreferencePair.save(judged, context.path("pairs", "part-000000.parquet"))
        return StageResult({**metrics, "pairs": len(judged)}, {"candidates": CANDIDATES, "pairs": "pairs"})
    traces = labelled_traces(sets, config.objective_names)
    StepTrace.save(traces, context.path("traces", "part-000000.parquet"))
    return StageResult({**metrics, "traces": len(traces)}, {"candidates": CANDIDATES, "traces": "traces"})


def _compares_answers(config: RunConfig) -> bool:
    """Whether the reward model learns from pairs of whole answers; see `check_domain`."""
    return all(objective.supervision == "pairwise" for objective in config.objectives)


def reward(context: Context[RunConfig]) -> StageResult:
    """The process reward model, with its figures and calibration on held-out prompts."""
    config = context.config
    by_pairs = _compares_answers(config)
    settings = RewardSettings(
        model_url=context.input("sft", "model"),
        output_url=context.path("model"),
        model=config.model,
        seed=config.seed,
        traces_url=None if by_pairs else context.input("reward_rollouts", "traces"),
        pairs_url=context.input("reward_rollouts", "pairs") if by_pairs else None,
        objectives=config.objectives,
        reward=config.reward,
    )
    return train(context, settings)


def pair_rollouts(context: Context[RunConfig], number: int = 1) -> StageResult:
    """Fresh dialogues whose candidate turns are scored by the reward model: the SFT model's in round 1, the
    last round's policy's at weights drawn for each dialogue afterwards."""
    config = context.config
    tutor: ModelTutorConfig | PolicyTutorConfig = ModelTutorConfig(path=context.input("sft", "model"))
    if number > 1:
        policy_url = context.input(round_stage("policy", number - 1), "model")
        tutor = PolicyTutorConfig(path=policy_url, concentration=config.round_concentration)
    first = round_seed(config, number)
    reward_url = context.input("reward", "model")
    metrics = _play(context, config.pair_rollouts, tutor, reward_url, "pair_rollouts", first)
    return StageResult(metrics, {"candidates": CANDIDATES})


def pairs(context: Context[RunConfig], number: int = 1) -> StageResult:
    """Preference pairs per objective of the candidates of one prompt, behind those of the rounds before.

    The policy of round r is trained from the SFT model on the pairs of rounds 1 to r, with the SFT model as
    reference: what a round went wrong in is not carried on, and KL is to SFT however many rounds there are.
    """
    config = context.config
    if number > 1:
        before = context.input(round_stage("pairs", number - 1), "pairs")
        for shard in storage.list_files(before, ".parquet"):
            storage.write_bytes(context.path("pairs", shard.rpartition("/")[2]), storage.read_bytes(shard))
    sets = CandidateSet.load(context.input(round_stage("pair_rollouts", number), "candidates"))
    context.progress.start(len(trained_objectives(config)), "objectives")
    collected: list[PreferencePair] = []
    metrics: dict[str, Any] = {}
    for objective in trained_objectives(config):
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
    PreferencePair.save(collected, context.path("pairs", f"part-{number - 1:06d}.parquet"))
    return StageResult(metrics, {"pairs": "pairs"})


def policy(context: Context[RunConfig], number: int = 1) -> StageResult:
    """MAH-DPO: one head per objective over a shared backbone."""
    return train_heads(context, context.input("sft", "model"), round_stage("pairs", number))


def training_sweep(context: Context[RunConfig]) -> StageResult:
    """A policy trained for every weight vector of the sweep, each played against the same fresh students."""
    config, section = context.config, context.config.sweep
    shared = {
        field.name: getattr(spec, field.name) for spec in [play_spec(context)] for field in fields(spec)
    }
    spec = TrainingSpec(
        **shared,
        run_policy=policy_training(context, context.input("sft", "model"), last_stage(config, "pairs")),
        policy_steps=round(context.metrics_of(last_stage(config, "policy"))["step"]),
        cluster=config.cluster,
        start=section.start,
        share=section.training_share,
        at_once=section.concurrent_trainings,
    )
    (front,) = sweep_fronts(config)
    swept = train_rounds(spec, rounds_of(config, front), methods_progress(context))
    return leave_sweep(context, spec, swept)


def _play(
    context: Context[RunConfig],
    settings: RolloutConfig,
    tutor: ModelTutorConfig | PolicyTutorConfig,
    reward_url: str | None,
    purpose: str,
    first: int,
) -> dict[str, Any]:
    config = context.config
    spec = RolloutSpec(
        tutor=tutor,
        student=MiniatureStudentConfig(),
        play=PlayConfig.of(settings),
        output_url=context.folder,
        purpose=purpose,
        placement=DeviceConfig.of(config.cluster, config.model.dtype),
        threads=max(1, math.floor(config.cluster.cpus_per_rollout_actor)),
        reward_url=reward_url,
        continuations=settings.continuations,
        gamma=settings.gamma,
        domain=domain_for_workers(config.domain),
        supervision={objective.name: objective.supervision for objective in config.objectives},
    )
    chunks = DialogueChunks(first, settings.dialogues, settings.batch_size_per_actor)
    context.progress.start(settings.dialogues, "dialogues")
    return run_rollouts(spec, chunks, config.cluster, context.progress.update).model_dump(mode="json")


def _reward_rollouts_settings(config: RunConfig) -> dict[str, Any]:
    """An objective's supervision counts where it is not its domain's usual one: rollouts made before it
    counted stay valid."""
    offered = load_domain(config.domain).objectives
    unusual = {
        objective.name: objective.supervision
        for objective in config.objectives
        if objective.supervision != offered[objective.name].supervision[0]
    }
    settings = sections("reward_rollouts", "objective_names", "model.dtype")(config)
    return {**settings, **({"supervision": unusual} if unusual else {})}


def _pairs_settings(config: RunConfig) -> dict[str, Any]:
    """Options that came later count where they are set: pairs made before them stay valid."""
    later = config.pairs.model_dump(
        include={"balance_length", "split_by", "selection", "gap_margin"}, exclude_defaults=True
    )
    settings = sections("pairs.min_gap_std", "pairs.max_pairs_per_objective", "objective_names")(config)
    new = {} if config.policy.extends is None else {"trained": trained_objectives(config)}
    return {**settings, **{f"pairs.{name}": value for name, value in later.items()}, **new}


def _policy_settings(config: RunConfig) -> dict[str, Any]:
    settings = sections("policy", "pairs.held_out_fraction", "objective_names", "model")(config)
    return {**settings, **method_version(config.policy), **extended_files(config)}


def _sweep_settings(config: RunConfig) -> dict[str, Any]:
    """Where the sweep guides, `guided` gives the candidates and the heads' weights that it does not."""
    guides = config.sweep.kind == "guidance" or bool(config.sweep.guidance)
    guided = sections("guided")(config) if guides else {}
    return {**sections("sweep", "evaluation", "objective_names", "model.dtype")(config), **guided}


def _sweep_stage(config: RunConfig) -> Stage[RunConfig]:
    """The sweep that the configuration describes."""
    policy_and_judges = ("sft", "reward", last_stage(config, "policy"))
    if config.sweep.kind != "training":
        return Stage(
            sweep_stage(config),
            "Sweep the weights",
            sweep,
            _sweep_settings,
            needs=policy_and_judges,
            version=3,  # leaves the table of all points
            resumes=True,
        )
    return Stage(
        sweep_stage(config),
        "Train a policy for every weight vector",
        training_sweep,
        lambda config: {**_policy_settings(config), **sections("sweep", "evaluation")(config)},
        needs=(*policy_and_judges, last_stage(config, "pairs")),
        resumes=True,
    )


def sweep_pipeline(config: RunConfig) -> Pipeline[RunConfig]:
    """The stages up to the sweep alone. What a finished run made of its sweep over decoding weights is left
    where one over training weights is added."""
    whole = pipeline(config)
    return Pipeline(whole.needed_for([sweep_stage(config)]))


def _with_list_of_sweep(*names: str) -> Callable[[RunConfig], dict[str, Any]]:
    """`sections(*names)`, and of the sweep the decoding weights that it has without guidance."""

    def pick(config: RunConfig) -> dict[str, Any]:
        vectors = [dict(weights) for weights in unguided_vectors(config)]
        return {**sections(*names)(config), "sweep": {"weights": vectors}}

    return pick


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


_BEFORE_ROUNDS: list[Stage[RunConfig]] = [
    Stage(
        "sft_data",
        "Make training text and tokenizer",
        make_sft_data,
        lambda config: {
            **sections("domain", "sft.loss_on", "model")(config),
            **domain_contents(config.domain),
        },
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
        _reward_rollouts_settings,
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
]


def _round(number: int) -> list[Stage[RunConfig]]:
    """The stages of one round. Later ones play the last round's policy and add to its pairs."""
    this, before = partial(round_stage, number=number), partial(round_stage, number=number - 1)
    is_first, behind = number == 1, "" if number == 1 else f" (round {number})"
    rollout_keys = ["pair_rollouts", "model.dtype", *([] if is_first else ["round_concentration"])]
    return [
        Stage(
            this("pair_rollouts"),
            f"Play and score dialogues{behind}",
            partial(pair_rollouts, number=number),
            sections(*rollout_keys),
            needs=("sft", "reward") if is_first else ("sft", "reward", before("policy")),
            resumes=True,
        ),
        Stage(
            this("pairs"),
            f"Build preference pairs{behind}",
            partial(pairs, number=number),
            _pairs_settings,
            needs=(this("pair_rollouts"), *(() if is_first else (before("pairs"),))),
            version=2,
            uses_ray=False,
        ),
        Stage(
            this("policy"),
            f"Train the multi-head policy{behind}",
            partial(policy, number=number),
            _policy_settings,
            needs=("sft", this("pairs")),
            resumes=True,
        ),
    ]


def pipeline(config: RunConfig) -> Pipeline[RunConfig]:
    """The stages of a run that plays dialogues, with as many rounds as it has."""
    last = last_stage(config, "policy")
    trained = [name for stage in ("pairs", "policy") for name in all_rounds(config, stage)]
    return Pipeline(
        [
            *_BEFORE_ROUNDS,
            *itertools.chain.from_iterable(_round(number) for number in range(1, config.rounds + 1)),
            _sweep_stage(config),
            Stage(
                "evaluate",
                "Evaluate heads and guidance",
                evaluate,
                _with_list_of_sweep("guided", "evaluation", "objective_names", "model.dtype"),
                needs=("sft", "reward", last),
                version=2,  # students with problems of no training dialogue
                resumes=True,
            ),
            Stage(
                "serve",
                "Serve and ask once",
                try_serving,
                _with_list_of_sweep("serve", "guided", "evaluation.sampling", "model.dtype"),
                needs=("reward", last),
            ),
            Stage(
                "report",
                "Write the report",
                report,
                _with_list_of_sweep("name", "objectives", "evaluation", "guided"),
                needs=("sft", "reward", *trained, sweep_stage(config), "evaluate"),
                uses_ray=False,
            ),
        ]
    )
