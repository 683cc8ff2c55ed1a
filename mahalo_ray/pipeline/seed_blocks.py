"""Which problems of its domain a stage meets (in tutoring: students, each with a problem): no two stages of a
run meet the same ones. And what a run asks of its domain."""

from __future__ import annotations

import itertools
from typing import Any

from mahalo_ray.config import ConfigError, DomainConfig, RubricJudgeConfig, RunConfig
from mahalo_ray.data import storage
from mahalo_ray.data.row_files import data_files
from mahalo_ray.domains.protocol import GivenProblems, load_domain, source_digest
from mahalo_ray.objectives import unknown_name
from mahalo_ray.pipeline.judging import read_rubric

# Seeds of one run are config.seed * SEEDS_PER_RUN + block + number; SFT's dialogues come first.
SEEDS_PER_RUN = 1_000_003
BLOCKS = {
    "sft": 0,
    "reward_rollouts": 600_000,
    "pair_rollouts": 700_000,
    "evaluation": 800_000,
    "dialogues": 900_000,
}
BLOCK_SIZE = 100_000


def domain_for_workers(domain: DomainConfig) -> DomainConfig:
    """The same domain for processes that run in other folders: its paths are absolute."""
    if domain.prompts is None:
        return domain
    given = domain.prompts.model_dump(include={"path", "evaluation_path"}, exclude_none=True)
    absolute: dict[str, Any] = {
        key: path if path.startswith("hub:") else storage.absolute(path) for key, path in given.items()
    }
    absolute["judges"] = {
        name: judge.model_copy(update={"rubric": storage.absolute(judge.rubric)})
        if isinstance(judge, RubricJudgeConfig)
        else judge
        for name, judge in domain.prompts.judges.items()
    }
    return domain.model_copy(update={"prompts": domain.prompts.model_copy(update=absolute)})


def domain_contents(domain: DomainConfig) -> dict[str, Any]:
    """What the fingerprint of a run's first stage is made of besides the names in `domain`: what the files of
    prompts and the rubrics of judges hold, and the source of the modules that are named (not of what those
    import). The package's own code does not count: its stages have versions."""
    if domain.prompts is None:
        return {"code": source_digest(domain.name, "domain")} if _is_foreign(domain.name) else {}
    paths = (domain.prompts.path, domain.prompts.evaluation_path)
    code, rubrics = dict[str, str](), dict[str, str]()
    for name, judge in domain.prompts.judges.items():
        if isinstance(judge, RubricJudgeConfig):
            rubrics[name] = storage.fingerprint(judge.rubric)
        elif _is_foreign(judge):
            code[name] = source_digest(judge, "function")
    return {
        "files": [[storage.fingerprint(file) for file in data_files(path)] for path in paths if path],
        "code": code,
        **({"rubrics": rubrics} if rubrics else {}),
    }


def _is_foreign(name: str) -> bool:
    """Whether it names code (`package.module:NAME`) that is not the package's own."""
    return ":" in name and not name.startswith("mahalo_ray.")


def first_seed(seed: int, purpose: str) -> int:
    """Seed of the first student of a purpose."""
    return seed * SEEDS_PER_RUN + BLOCKS[purpose]


def round_seed(config: RunConfig, number: int) -> int:
    """Seed of the first student of a round's `pair_rollouts`: every round meets others."""
    return first_seed(config.seed, "pair_rollouts") + (number - 1) * config.pair_rollouts.dialogues


def fresh_students(config: RunConfig, more: int = 0) -> tuple[int, ...]:
    """Seeds of the students behind the reported table: `evaluation.dialogues` of them, each with a problem
    (by its `problem_key`) that occurs in no dialogue that the run trains on.

    Problems are few (in tutoring two or three operations on small numbers), so students drawn without looking
    would bring many that SFT has seen worked. `more`: so many further ones behind them. ConfigError when the
    block has too few others.
    """
    domain = load_domain(config.domain)
    trained_on = {
        "sft": config.domain.sft_dialogues,
        "reward_rollouts": config.reward_rollouts.dialogues,
        "pair_rollouts": config.rounds * config.pair_rollouts.dialogues,
    }
    seen = {
        domain.episode(first_seed(config.seed, purpose) + number).problem_key
        for purpose, dialogues in trained_on.items()
        for number in range(dialogues)
    }
    first, wanted = first_seed(config.seed, "evaluation"), config.evaluation.dialogues + more
    candidates = range(first, first + BLOCK_SIZE)
    if isinstance(domain, GivenProblems):
        seeds = tuple(itertools.islice(domain.evaluation_seeds(candidates, seen), wanted))
        if len(seeds) < wanted:
            raise ConfigError(
                f"'evaluation.dialogues' is {wanted}: only {len(seeds)} prompts are there that no training "
                "stage meets; lower it or what the training stages take, or give more prompts"
            )
        return seeds
    unseen = (seed for seed in candidates if domain.episode(seed).problem_key not in seen)
    seeds = tuple(itertools.islice(unseen, wanted))
    if len(seeds) < wanted:
        raise ConfigError(
            f"'evaluation.dialogues' is {config.evaluation.dialogues}{f' and {more} more' if more else ''}: "
            f"only {len(seeds)} of the domain's {BLOCK_SIZE} students bring a problem that no training "
            "dialogue has; lower it, or 'domain.sft_dialogues'"
        )
    return seeds


def check_domain(config: RunConfig) -> None:
    """Raise ConfigError for a domain that is not there, and for what it cannot do."""
    try:
        offered = load_domain(config.domain).objectives
    except ValueError as error:
        raise ConfigError(f"'domain.name': {error}") from error
    for name, judge in config.domain.prompts.judges.items() if config.domain.prompts is not None else ():
        if isinstance(judge, RubricJudgeConfig):
            read_rubric(f"domain.prompts.judges.{name}.rubric", judge)
    for index, objective in enumerate(config.objectives):
        if objective.name not in offered:
            raise ConfigError(f"'objectives.{index}': {unknown_name('objective', objective.name, offered)}")
        kinds = offered[objective.name].supervision
        if objective.supervision not in kinds:
            raise ConfigError(
                f"'objectives.{index}.supervision' is '{objective.supervision}': {config.domain.name} "
                f"labels {objective.name} as {' or '.join(repr(kind) for kind in kinds)}"
            )
    supervision = {objective.supervision for objective in config.objectives}
    if "pairwise" in supervision and len(supervision) > 1:
        raise ConfigError(
            "'objectives': 'supervision: pairwise' compares whole answers, and the other kinds label their "
            "steps: in a run that makes its own rollouts all objectives are pairwise, or none is"
        )
    if config.reward_rollouts.continuations == 0:
        raise ConfigError("'reward_rollouts.continuations' is 0: labels need at least one continuation")
    for key, candidates in (
        ("reward_rollouts", config.reward_rollouts.candidates),
        ("pair_rollouts", config.pair_rollouts.candidates),
    ):
        if candidates < 2:
            raise ConfigError(f"'{key}.candidates' is {candidates}: comparing needs at least 2")
    sizes = {
        "domain.sft_dialogues": (config.domain.sft_dialogues, BLOCKS["reward_rollouts"]),
        "reward_rollouts.dialogues": (config.reward_rollouts.dialogues, BLOCK_SIZE),
        "pair_rollouts.dialogues": (config.pair_rollouts.dialogues, BLOCK_SIZE),
        "evaluation.dialogues": (config.evaluation.dialogues, BLOCK_SIZE),
    }
    if config.rounds > 1:
        played = config.rounds * config.pair_rollouts.dialogues
        sizes["rounds' times 'pair_rollouts.dialogues"] = (played, BLOCK_SIZE)
    for key, (wanted, most) in sizes.items():
        if wanted > most:
            raise ConfigError(f"'{key}' is {wanted}: the domain has {most} students for it")
