"""The stages of a run: what each depends on, what the miniature refuses, and a whole run of tiny size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_run import EXAMPLE
from transformers import AutoConfig, AutoTokenizer

from mahalo_ray.config import ConfigError, RunConfig, load_config
from mahalo_ray.data import storage
from mahalo_ray.data.records import Dialogue
from mahalo_ray.domains.tutoring.scripted import scripted_dialogue
from mahalo_ray.domains.tutoring.student import TutoringEpisode
from mahalo_ray.pipeline.evaluating import other_methods
from mahalo_ray.pipeline.progress import RunProgress
from mahalo_ray.pipeline.run import make_sft_data, pipeline
from mahalo_ray.pipeline.seed_blocks import BLOCKS, check_domain, first_seed, fresh_students, round_seed
from mahalo_ray.pipeline.stages import Context
from mahalo_ray.pipeline.sweeping import sweep_methods
from mahalo_ray.rollouts.dialogue_job import DialogueChunks
from mahalo_ray.training.policy_methods import METHOD_VERSIONS


def example(*overrides: str) -> RunConfig:
    return load_config(EXAMPLE, list(overrides))


PIPELINE = pipeline(example())
ALL = set(PIPELINE.stages)
AFTER_REWARD = {"reward", "pair_rollouts", "pairs", "policy", "sweep", "evaluate", "serve", "report"}
AFTER_POLICY = {"policy", "sweep", "evaluate", "serve", "report"}


@pytest.mark.parametrize(
    ("override", "rerun"),
    [
        ("seed=99", ALL),
        ("domain.sft_dialogues=77", ALL),
        ("model.scratch.hidden_size=64", ALL),
        ("sft.training.epochs=0.5", ALL - {"sft_data"}),
        ("reward_rollouts.continuations=9", AFTER_REWARD | {"reward_rollouts"}),
        ("objectives.0.supervision=judged_rollouts", AFTER_REWARD | {"reward_rollouts"}),
        ("reward.ranking_weight=0.5", AFTER_REWARD),
        ("pair_rollouts.dialogues=77", AFTER_REWARD - {"reward"}),
        ("pairs.min_gap_std=0.25", AFTER_POLICY | {"pairs"}),
        ("pairs.held_out_fraction=0.35", AFTER_POLICY),
        ("policy.beta=0.77", AFTER_POLICY),
        ("evaluation.dialogues=77", {"sweep", "evaluate", "report"}),
        ("guided.num_candidates=9", {"evaluate", "serve", "report"}),
        ("serve.replicas=2", {"serve"}),
        ("name=other", {"report"}),
        ("objectives.0.description=other", AFTER_REWARD),
        ("cluster.train_workers=1", set()),
        ("output=elsewhere", set()),
    ],
)
def test_a_setting_reruns_the_stages_that_depend_on_it(override: str, rerun: set[str]) -> None:
    before, after = PIPELINE.fingerprints(example()), PIPELINE.fingerprints(example(override))
    assert {name for name in before if before[name] != after[name]} == rerun


def test_rounds_begin_with_the_stages_of_a_run_of_one_round() -> None:
    one, two = example(), example("rounds=2")
    before, after = pipeline(one).fingerprints(one), pipeline(two).fingerprints(two)
    # Raising `rounds` keeps all that is trained: what comes after the last policy is done again.
    same = {name for name in before if before[name] == after[name]}
    assert same == ALL - {"sweep", "evaluate", "serve", "report"}
    assert set(after) - ALL == {"round_2/pair_rollouts", "round_2/pairs", "round_2/policy"}
    stages = pipeline(two).stages
    assert all("round_2/policy" in stages[name].needs for name in ("sweep", "evaluate", "serve", "report"))
    other = example("rounds=2", "round_concentration=0.5")
    changed = pipeline(other).fingerprints(other)
    assert changed["policy"] == after["policy"] and changed["round_2/pairs"] != after["round_2/pairs"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["round_concentration=2"], "'round_concentration' is for rounds after the first"),
        (["rounds=2", "policy={method: dpo, objective: accuracy}"], "'policy.method: dpo' has one head"),
        (["rounds=0"], "greater than or equal to 1"),
    ],
)
def test_rounds_that_cannot_be_played(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        example(*overrides)


def test_every_round_meets_other_students() -> None:
    config = example("rounds=3", "domain.sft_dialogues=3000", "evaluation.dialogues=40")
    dialogues = config.pair_rollouts.dialogues
    firsts = [round_seed(config, number) for number in (1, 2, 3)]
    assert firsts == [first_seed(config.seed, "pair_rollouts") + n * dialogues for n in range(3)]
    seen = {TutoringEpisode.from_seed(firsts[0] + n).problem.operations for n in range(3 * dialogues)}
    assert not seen & {TutoringEpisode.from_seed(seed).problem.operations for seed in fresh_students(config)}
    with pytest.raises(ConfigError, match=r"'rounds' times 'pair_rollouts.dialogues' is 120000"):
        check_domain(example("rounds=3", "pair_rollouts.dialogues=40000"))


MODPO = "policy={method: modpo, objective: accuracy, mixture: {accuracy: 1, engagement: 1}}"


def test_a_policy_of_a_method_that_has_changed_is_trained_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_version(number: int, *overrides: str) -> dict[str, str]:
        monkeypatch.setitem(METHOD_VERSIONS, "modpo", number)
        return PIPELINE.fingerprints(example(*overrides))

    def rerun(before: int, after: int, *overrides: str) -> set[str]:
        old, new = at_version(before, *overrides), at_version(after, *overrides)
        return {name for name in old if old[name] != new[name]}

    assert METHOD_VERSIONS["modpo"] == 2  # since its margin is made of standardised rewards
    assert rerun(1, 2, MODPO) == AFTER_POLICY
    assert rerun(1, 2) == set()  # policies of other methods stay


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objectives.1.supervision=pairwise", "labels engagement as 'judged_prefix'"),
        ("reward_rollouts.continuations=0", "'reward_rollouts.continuations' is 0"),
        ("pair_rollouts.candidates=1", "comparing needs at least 2"),
        ("evaluation.dialogues=100001", "has 100000 students for it"),
    ],
)
def test_what_the_miniature_cannot_do_is_said(override: str, message: str) -> None:
    check_domain(example())
    with pytest.raises(ConfigError, match=message):
        check_domain(example(override))


def test_no_two_stages_meet_the_same_students() -> None:
    config = example()
    sizes = {
        "sft": config.domain.sft_dialogues,
        "reward_rollouts": config.reward_rollouts.dialogues,
        "pair_rollouts": config.pair_rollouts.dialogues,
        "evaluation": config.evaluation.dialogues,
        "dialogues": 1000,
    }
    met = [
        chunk_seed
        for seed in (17, 18)
        for purpose in BLOCKS
        for chunk in DialogueChunks(first_seed(seed, purpose), sizes[purpose], 64)
        for chunk_seed in chunk.seeds
    ]
    assert len(met) == len(set(met)) == 2 * sum(sizes.values())


def test_reported_students_bring_problems_that_no_training_dialogue_has() -> None:
    config = example("domain.sft_dialogues=3000")
    first = first_seed(config.seed, "sft")
    dialogues = [scripted_dialogue(first + number) for number in range(3000)]
    texts = {numbers_and_operators(dialogue.turns[0].content) for dialogue in dialogues}
    seeds = fresh_students(config)
    assert len(set(seeds)) == config.evaluation.dialogues
    assert not texts & {numbers_and_operators(TutoringEpisode.from_seed(seed).opening) for seed in seeds}
    drawn = [TutoringEpisode.from_seed(first_seed(config.seed, "evaluation") + n).opening for n in range(240)]
    assert texts & {numbers_and_operators(opening) for opening in drawn}  # many are met again
    with pytest.raises(ConfigError, match=r"'evaluation\.dialogues' is 99000: only \d+ of the domain's"):
        fresh_students(example("evaluation.dialogues=99000"))


def numbers_and_operators(opening: str) -> tuple[str, ...]:
    """The start and every change of a problem, whoever has how many of what."""
    kinds = {"get": "+", "find": "+", "lose": "-", "give": "-", "make": "x"}
    return tuple(kinds.get(word, word) for word in re.findall(r"\d+|get|find|lose|give|make", opening))


def test_every_row_of_the_table_is_played_once() -> None:
    config = example()
    methods = other_methods(config) + sweep_methods(config)
    assert len({method.name for method in methods}) == len(methods) == 10
    assert [m.kind for m in methods].count("weights") == 5
    # A guided policy off the sweep's points needs its own unguided row to be compared with.
    alone = other_methods(example("guided.weights={accuracy: 0.6, engagement: 0.4}"))
    assert [(m.name, m.sweep) for m in alone if m.kind == "weights"] == [("weights 0.6 / 0.4", False)]


def test_sft_data_is_readable_and_made_from_the_seed(tmp_path: Path) -> None:
    config = example("domain.sft_dialogues=40", "model.scratch.vocab_size=300")
    folders = [str(tmp_path / name) for name in ("one", "two")]
    with RunProgress() as run, run.stage("data") as progress:
        for folder in folders:
            result = make_sft_data(Context(config, folder, progress, {}))
    assert result.metrics["dialogues"] == 40
    tables = [storage.read_table(storage.join(folder, "examples")) for folder in folders]
    assert tables[0].equals(tables[1])
    assert len(Dialogue.load(storage.join(folders[0], "dialogues"))) == 40
    tokenizer = AutoTokenizer.from_pretrained(storage.join(folders[0], "start_model"))
    model = AutoConfig.from_pretrained(storage.join(folders[0], "start_model"))
    assert model.vocab_size == len(tokenizer) and model.hidden_size == 96
    assert max(max(ids) for ids in tables[0]["input_ids"].to_pylist()) < model.vocab_size
    assert model.eos_token_id == tokenizer.eos_token_id
