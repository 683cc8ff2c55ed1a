"""A reward model from own traces and pairs, as a user runs it: config, report, and evaluation of a folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import training_world as world
from typer.testing import CliRunner

from mahalo_ray.cli import app
from mahalo_ray.config import ConfigError, load_config
from mahalo_ray.models import ProcessRewardModel


def document(folder: Path) -> Path:
    """Step labels, solutions with verdicts, and pairs: three kinds of supervision from three files."""
    rng = np.random.default_rng(7)
    labelled, solutions = [], []
    for number in range(24):
        question = world.words(rng, 3, 6)
        steps = [world.words(rng, 2, 5) for _ in range(3)]
        labelled.append({"prompt": question, "completions": steps, "labels": [True, number % 2 == 0, True]})
        tried = {f"model{i}": (steps[: i + 1], (number + i) % 2 == 0) for i in range(2)}
        row = {name: {"solution": "\n".join(own), "is_correct": ok} for name, (own, ok) in tried.items()}
        solutions.append({"question": question, **row})
    labelled.append({"prompt": "ab", "completions": ["cd", "ef"], "labels": [True]})  # a label is missing
    pairs = [
        {"prompt": p.prompt[0].content, "chosen": p.chosen, "rejected": p.rejected}
        for p in world.make_pairs((24,), ("honest",))
    ]
    for name, rows in (("labelled", labelled), ("solutions", solutions), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "run.yaml").write_text(f"""
name: own_reward
output: {folder}/out
objectives:
  - {{name: steps, supervision: judged_prefix}}
  - {{name: outcome, supervision: rollout_value}}
  - {{name: honest, supervision: pairwise}}
data:
  max_bad_fraction: 0.1
  traces:
    - {{path: {folder}/labelled.jsonl, objective: steps}}
    - {{path: {folder}/solutions.jsonl, objective: outcome, outcome_labels: all, gamma: 0.9}}
  pairs:
    - {{path: {folder}/pairs.jsonl, objective: honest}}
model: {{base: {world.make_base(folder / "base")}, max_length: 64}}
cluster: {{train_workers: 1}}
reward:
  backbone: frozen
  head_hidden_size: 8
  held_out_fraction: 0.3
  dedicated: [[steps, outcome], [honest]]
  training: {{max_steps: 4, batch_size: 16, zero_stage: 0}}
""")
    return folder / "run.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.beta=0.5", "'policy' is set, but this run on own data"),
        ("pairs.held_out_fraction=0.5", "'pairs' is set"),
        ("data.pairs=[]", "'objectives.2.supervision' is pairwise: it needs 'data.pairs'"),
        ("data.traces.0.objective=stepps", "'data.traces.0.objective'.*Did you mean 'steps'"),
        ("data.traces.0.gamma=0.5", "goes with 'outcome_labels: all'"),
        ("data.traces.0.label_range=[1, 0]", "the first must be below the second"),
        ("data.traces.0.objective_field=x", "at most one of"),
        ("cluster.rollout_actors=1", "'cluster.rollout_actors' is set, but a run on own data"),
        ("cluster.cpus_per_rollout_actor=2", "'cluster.cpus_per_rollout_actor' is set"),
        ("reward.cache_features=false", None),
        ("reward.backbone=full", None),
    ],
)
def test_what_makes_no_sense_is_refused(override: str, message: str | None, tmp_path: Path) -> None:
    file = document(tmp_path)
    if message is None:
        assert load_config(file, [override])
        return
    with pytest.raises(ConfigError, match=message):
        load_config(file, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.max_bad_fraction=0", r"2 steps, but 1 label"),
        ("data.max_bad_fraction=0.013", r"1 of 73 traces"),  # 49 lines, but two solutions in 24 of them
        ("data.traces.0.format=trll", "Did you mean 'trl'"),
        ("data.traces.0.sample=0.0001", "holds no step with a label of objective 'steps'"),
    ],
)
def test_bad_data_is_said(override: str, message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["reward", str(document(tmp_path)), "--set", override])
    assert result.exit_code == 2, result.output
    assert re.search(message, result.output)
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_a_whole_run_reports_and_compares(tmp_path: Path) -> None:
    file = str(document(tmp_path))
    result = CliRunner().invoke(app, ["reward", file])
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    manifest = json.loads((out / "traces" / "manifest.json").read_text())
    assert manifest["metrics"]["bad_rows"] == 1
    assert manifest["metrics"]["labelled"] == {"steps": 24, "outcome": 48}
    report = json.loads((out / "reward_report" / "reward.json").read_text())
    assert {"auc", "accuracy", "brier"} <= set(report["objectives"]["steps"]["figures"])
    assert {"outcome_auc", "best_of_n_lift"} <= set(report["objectives"]["outcome"]["figures"])
    assert report["objectives"]["honest"]["figures"]["pairwise_accuracy"]["n"] > 1
    # On a frozen backbone heads do not meet: unified and dedicated are held out on the same rows.
    assert set(report["dedicated"]) == {"steps", "outcome", "honest"}
    assert "pairwise_accuracy" in report["dedicated"]["honest"]
    assert (out / "reward_report" / "reward.png").stat().st_size > 1000
    assert "pairwise accuracy" in result.output and "dedicated" in result.output
    # Every sequence went through the backbone once, for all three models.
    assert len(list((out / "features").glob("*/*.parquet"))) == 1
    model = ProcessRewardModel.from_pretrained(out / "reward" / "model")
    scores = model.score([{"role": "user", "content": "abc"}], ["de", "fg"])
    assert set(scores) == {"steps", "outcome", "honest"} and len(scores["honest"]) == 2
    again = CliRunner().invoke(app, ["run", file])
    assert again.exit_code == 0 and again.output.count("done before, skipped") == 5
