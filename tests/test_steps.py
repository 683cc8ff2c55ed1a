"""The stages of a run: what each depends on, what the miniature refuses, and a whole run of tiny size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from mahalo_ray.config import ConfigError, RunConfig, load_config
from mahalo_ray.data import storage
from mahalo_ray.data.records import Dialogue
from mahalo_ray.pipeline.corpus import make_sft_data
from mahalo_ray.pipeline.evaluating import other_methods, sweep_methods
from mahalo_ray.pipeline.fingerprint import Manifest
from mahalo_ray.pipeline.progress import RunProgress
from mahalo_ray.pipeline.stages import Context
from mahalo_ray.pipeline.steps import PIPELINE
from mahalo_ray.pipeline.students import BLOCKS, check_domain, first_seed
from mahalo_ray.rollouts.driver import chunks_of

EXAMPLE = Path(__file__).parent.parent / "examples" / "quickstart.yaml"


def example(*overrides: str) -> RunConfig:
    return load_config(EXAMPLE, list(overrides))


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
    }
    met = [
        chunk_seed
        for seed in (17, 18)
        for purpose in BLOCKS
        for chunk in chunks_of(first_seed(seed, purpose), sizes[purpose], 64)
        for chunk_seed in chunk.seeds
    ]
    assert len(met) == len(set(met)) == 2 * sum(sizes.values())


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


TINY = [
    "model.scratch={hidden_size: 32, num_layers: 1, num_attention_heads: 2, intermediate_size: 32}",
    "domain.sft_dialogues=64",
    "sft.training.epochs=1",
    "reward_rollouts={dialogues: 4, candidates: 3, continuations: 1, sampling: {max_new_tokens: 8}}",
    "pair_rollouts={dialogues: 6, candidates: 3, sampling: {max_new_tokens: 8}}",
    "pairs.min_gap_std=0",
    "policy.metrics_every_steps=0",  # so few pairs leave none held out
    "evaluation={dialogues: 4, bootstrap_resamples: 50, sampling: {max_new_tokens: 8}}",
    "sweep.weights=[{accuracy: 0.9, engagement: 0.1}, {accuracy: 0.5, engagement: 0.5}]",
    "guided.num_candidates=2",
]


def mahalo(*arguments: str, output: Path) -> str:
    command = [sys.executable, "-c", "from mahalo_ray.cli import main; main()", *arguments]
    overrides = [part for setting in [*TINY, f"output={output}"] for part in ("--set", setting)]
    done = subprocess.run(
        [*command, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_a_whole_run_and_then_nothing_left_to_do(tmp_path: Path) -> None:
    text = mahalo("run", str(EXAMPLE), output=tmp_path)
    assert "guided policy" in text and "Report: " in text and "mahalo serve" in text
    for name in PIPELINE.stages:
        manifest = Manifest.read(str(tmp_path / name))
        assert manifest is not None and manifest.seconds > 0
        assert all((tmp_path / name / path).exists() for path in manifest.outputs.values())
    document = json.loads((tmp_path / "report" / "results.json").read_text())
    assert len(document["rows"]) == 7 and document["dialogues_per_method"] == 4
    assert set(document["history"]) == {"sft", "reward", "policy"}
    assert document["reward_metrics"]["accuracy"]
    answers = json.loads((tmp_path / "serve" / "answers.json").read_text())
    assert len(answers["answers"]) == 3
    again = mahalo("run", str(EXAMPLE), output=tmp_path)
    assert again.count("done before, skipped") == len(PIPELINE.stages)
