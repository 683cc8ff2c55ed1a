"""Runs on own preference pairs: what the config allows, what reruns, and a whole run with LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import training_world as world
import yaml
from transformers import AutoTokenizer
from typer.testing import CliRunner

from mahalo_ray.cli import app
from mahalo_ray.config import ActorsConfig, ClusterConfig, ConfigError, RunConfig, dump_config, load_config
from mahalo_ray.data.records import PreferencePair
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.pipeline.cluster import needs_of
from mahalo_ray.pipeline.datasets import pipeline

EXAMPLE = Path(__file__).parents[1] / "examples" / "real_pairs.yaml"


def document(folder: Path, rows: int = 12) -> Path:
    """A run on two made files and the tiny model; one row of one file has no rejected answer."""
    pairs = world.make_pairs((rows, rows))
    for name in world.OBJECTIVES:
        own = [p for p in pairs if p.objective == name]
        lines = [
            {"prompt": p.prompt[0].content, "chosen": p.chosen, "rejected": p.rejected, "topic": name}
            for p in own
        ]
        lines += [{"prompt": "a", "chosen": "b", "topic": name}] if name == "engagement" else []
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (folder / "run.yaml").write_text(f"""
name: own
output: {folder}/out
objectives: [{{name: accuracy, supervision: pairwise}}, {{name: engagement, supervision: pairwise}}]
data:
  max_bad_fraction: 0.1
  pairs:
    - {{path: {folder}/accuracy.jsonl, objective: accuracy}}
    - {{path: {folder}/engagement.jsonl, objective_field: topic}}
model: {{base: {world.make_base(folder / "base")}, max_length: 64}}
cluster: {{train_workers: 1}}
pairs: {{held_out_fraction: 0.2}}
policy: {{lora: {{rank: 2}}, training: {{max_steps: 2, batch_size: 4, zero_stage: 0}}}}
""")
    return folder / "run.yaml"


def load(file: Path, *overrides: str) -> RunConfig:
    return load_config(file, list(overrides))


def test_the_example_is_valid_and_writes_itself() -> None:
    config = load_config(EXAMPLE)
    assert config.data is not None and config.policy.lora is not None
    assert RunConfig.model_validate(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data=null", "'sweep.weights' is missing"),
        ("sweep.weights=[{accuracy: 1}]", "'sweep' is set"),
        ("pairs.min_gap_std=0.5", "'held_out_fraction' alone"),
        (
            "objectives.0.supervision=judged_prefix",
            "is judged_prefix: it needs 'data.traces'",
        ),
        ("data.pairs.0.objective=acuracy", "Did you mean 'accuracy'"),
        ("data.pairs.0.objective_field=x", "exactly one of 'objective'"),
        ("model={scratch: {}}", "needs 'model.base'"),
        ("data.pairs=[]", "give 'pairs', 'traces' or both"),
        ("reward.dedicated=[[accuracy], [truthful, acuracy]]", "'reward.dedicated'.*Did you mean 'accuracy'"),
        ("reward.dedicated=[[accuracy], [accuracy]]", "names 'accuracy' twice"),
    ],
)
def test_what_makes_no_sense_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(EXAMPLE, [override])


def test_other_stages_are_refused() -> None:
    for verb in ("sweep", "serve", "evaluate"):
        result = CliRunner().invoke(app, [verb, str(EXAMPLE)])
        assert result.exit_code == 2 and "run on own data ('data') has no stage" in result.output


def test_training_on_own_data_needs_no_room_for_rollouts() -> None:
    cluster = ClusterConfig(train_workers=1, rollout_actors=6)
    assert needs_of(cluster, rollouts=False).cpus == 1 + 1  # one steers
    assert needs_of(cluster).cpus == needs_of(ActorsConfig(rollout_actors=6)).cpus == 6 + 1
    assert needs_of(cluster, serve_cpus=8).cpus == 8 + 1


def test_changed_files_rerun_the_stages(tmp_path: Path) -> None:
    config = load(document(tmp_path))
    stages = pipeline(config)
    before = stages.fingerprints(config)
    assert stages.fingerprints(config) == before
    (tmp_path / "accuracy.jsonl").write_text((tmp_path / "accuracy.jsonl").read_text() + "\n")
    changed = stages.fingerprints(config)
    assert all(before[name] != changed[name] for name in ("pairs", "policy", "reward"))
    other = stages.fingerprints(load(tmp_path / "run.yaml", "policy.beta=0.5"))
    assert other["pairs"] == changed["pairs"] and other["policy"] != changed["policy"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.max_bad_fraction=0", "1 of 25 rows cannot be used"),
        ("data.pairs.1.path=nowhere.jsonl", "there is no file or folder 'nowhere.jsonl'"),
        ("data.pairs.1.objective_field=nothing", "'nothing' is missing"),
    ],
)
def test_bad_data_is_said_before_training(override: str, message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["pairs", str(document(tmp_path)), "--set", override])
    assert result.exit_code == 2 and message in result.output
    assert "Traceback" not in result.output


def test_a_row_that_the_chat_template_refuses_is_left_out_with_its_place(tmp_path: Path) -> None:
    file = document(tmp_path)
    strict = "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.chat_template = world.TEMPLATE.replace("<{{ m.role }}>", strict + "<{{ m.role }}>")
    tokenizer.save_pretrained(tmp_path / "base")
    prompt = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    with (tmp_path / "accuracy.jsonl").open("a") as lines:
        lines.write("\n" + json.dumps({"prompt": prompt, "chosen": "yes", "rejected": "no"}))
    result = CliRunner().invoke(app, ["pairs", str(file)])
    assert result.exit_code == 0, result.output
    refused = pq.read_table(tmp_path / "out" / "pairs" / "quarantine.parquet").to_pylist()[0]
    assert refused["file"] == str(tmp_path / "accuracy.jsonl") and refused["line"] == 13
    assert refused["reason"].startswith("roles system, user: the chat template of tokenizer")
    assert "refuses a conversation of these roles (no system role)" in refused["reason"]
    pairs = PreferencePair.load(str(tmp_path / "out" / "pairs" / "pairs"))
    assert len(pairs) == 24 and all(pair.prompt[0].role == "user" for pair in pairs)
    # A base with another template may take what this one refuses.
    before = pipeline(load(file)).fingerprints(load(file))["pairs"]
    tokenizer.chat_template = world.TEMPLATE
    tokenizer.save_pretrained(tmp_path / "base")
    assert pipeline(load(file)).fingerprints(load(file))["pairs"] != before


def test_what_a_sample_leaves_out_is_counted(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["pairs", str(document(tmp_path)), "--set", "data.pairs.0.sample=0.5"])
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "out" / "pairs" / "manifest.json").read_text())["metrics"]
    counts = metrics["data"]["files"][str(tmp_path / "accuracy.jsonl")]
    assert 0 < counts["read"] == metrics["pairs"]["accuracy"] < 12
    assert counts["left_out"] == {"not in the sample": 12 - counts["read"]}


def test_an_objective_without_pairs_is_said(tmp_path: Path) -> None:
    file = document(tmp_path)
    lines = (tmp_path / "engagement.jsonl").read_text().replace('"topic": "engagement"', '"topic": "other"')
    (tmp_path / "engagement.jsonl").write_text(lines)
    result = CliRunner().invoke(app, ["pairs", str(file)])
    assert result.exit_code == 2 and "no pairs of objective 'engagement'" in result.output
    assert "left out: other" in result.output


@pytest.mark.slow
def test_a_whole_run_trains_exports_and_skips_what_is_done(tmp_path: Path) -> None:
    file = str(document(tmp_path))
    result = CliRunner().invoke(app, ["policy", file])
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    assert pq.read_table(out / "pairs" / "quarantine.parquet")["line"].to_pylist() == [13]
    manifest = json.loads((out / "policy" / "manifest.json").read_text())
    assert manifest["metrics"]["step"] == 2 and manifest["metrics"]["held_out/pairs"] > 0
    assert MultiHeadCausalLM.from_pretrained(out / "policy" / "model").has_lora
    result = CliRunner().invoke(app, ["export", str(out), str(tmp_path / "x"), "--weights", "accuracy=1"])
    assert result.exit_code == 0, result.output
    again = CliRunner().invoke(app, ["run", file])
    assert again.exit_code == 0 and again.output.count("done before, skipped") == 2
    # The pairs that it was trained on can be read by another run, reference log-probs beside them.
    source = f"data.pairs=[{{path: {out}/pairs/pairs, objective_field: objective}}]"
    read = CliRunner().invoke(app, ["pairs", file, "--set", f"output={tmp_path}/again", "--set", source])
    assert read.exit_code == 0, read.output
    assert f"{out}/pairs/pairs/.reference: not read" in read.output
    assert "rows: 24 = 24 read + 0 quarantined + 0 left out; files not read: 1 of 2" in read.output
    # A third objective on that policy, its adapter and two heads as they are.
    changes = {
        "output": f"{tmp_path}/more",
        "objectives.1.name": "honesty",
        "data.pairs": f"[{{path: {tmp_path}/engagement.jsonl, objective: honesty}}]",
        "policy.lora": "null",
        "policy.extends": str(out),
    }
    overrides = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(app, ["run", file, *overrides])
    assert result.exit_code == 0, result.output
    old, new = (MultiHeadCausalLM.from_pretrained(f / "policy" / "model") for f in (out, tmp_path / "more"))
    assert new.objectives == ("accuracy", "engagement", "honesty") and new.has_lora
    state = new.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in old.state_dict().items())
