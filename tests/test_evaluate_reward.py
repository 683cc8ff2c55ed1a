"""`mahalo evaluate reward` on tiny models: its figures are those of the scores, worked out again here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_reward_models as tiny
import torch
import transformers as tf
from typer.testing import CliRunner

from mahalo_ray.cli import app
from mahalo_ray.data.records import StepTrace
from mahalo_ray.models import ProcessRewardModel

LABELS = [[1, 1, 0], [1, 0, None], [1, 1, 1], [0, None, None]]
STEPS = [["a b.", "c d", "e"], ["fg", "hi.", "j"], ["k", "lmn", "o p"], ["q", "rs", "t"]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[ProcessRewardModel, str]:
    folder = tmp_path_factory.mktemp("reward")
    kinds = {"math": "probability", "honest": "preference"}
    made = ProcessRewardModel.from_base(tiny.base(), kinds, tokenizer=tiny.TOKENIZER, head_hidden_size=4)  # type: ignore[arg-type]
    made.save_pretrained(folder)
    return made.eval(), str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"problem": f"What? {i}", "steps": STEPS[i], "label": _first(LABELS[i])} for i in range(4)]
    pairs = [
        {"objective": "honest", "prompt": f"p{i}", "chosen": "c" * (i + 1), "rejected": f"r{i}"}
        for i in range(5)
    ]
    bad = [*rows, {"problem": "x", "steps": ["a"], "label": 4}]
    for name, content in (("bench", rows), ("pairs", pairs), ("bad", bad)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in content))
    traces = [
        StepTrace(
            id=f"t{i}",
            group="one prompt",
            prompt=[{"role": "user", "content": "Say."}],  # type: ignore[list-item]
            steps=[STEPS[i][0]],
            labels={"math": [float(i % 2)]},
            outcome={"math": float(i % 2)},
            source="test",
        )
        for i in range(4)
    ]
    StepTrace.save(traces, str(folder / "records" / "part.parquet"))
    return {
        **{name: str(folder / f"{name}.jsonl") for name in ("bench", "pairs", "bad")},
        "records": str(folder / "records"),
    }


def _first(labels: list[int | None]) -> int:
    return labels.index(0) if 0 in labels else -1


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["evaluate", "reward", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_figures_by_hand(
    model: tuple[ProcessRewardModel, str], files: dict[str, str], tmp_path: Path
) -> None:
    reward, folder = model
    scores = [reward.score([{"role": "user", "content": f"What? {i}"}], STEPS[i])["math"] for i in range(4)]
    known = [
        (s, y)
        for own, ys in zip(scores, LABELS, strict=True)
        for s, y in zip(own, ys, strict=True)
        if y is not None
    ]
    score, label = np.array(known).T
    wins = np.mean(np.sign(score[label == 1][:, None] - score[label == 0][None]) / 2 + 0.5)
    output = run(
        folder, files["bench"], files["pairs"], "--objective", "math", "--output", str(tmp_path),
        "--threshold-from", files["bench"],
    )  # fmt: skip
    assert "AUC of steps" in output and "first-error F1" in output
    report = json.loads((tmp_path / "reward.json").read_text())
    found = {name: figure["value"] for name, figure in report["objectives"]["math"]["figures"].items()}
    assert found["auc"] == pytest.approx(wins, abs=1e-6)
    assert found["brier"] == pytest.approx(np.mean((score - label) ** 2), abs=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean((score >= 0.5) == label))
    threshold = report["notes"]["thresholds"]["math"]
    said = [next((t for t, s in enumerate(own) if s < threshold), -1) for own in scores]
    right = [s == _first(own) for s, own in zip(said, LABELS, strict=True)]
    erroneous, correct = np.mean([right[0], right[1], right[3]]), float(right[2])
    expected = 2 * erroneous * correct / (erroneous + correct) if erroneous + correct else 0.0
    assert found["first_error_f1"] == pytest.approx(expected)
    assert (tmp_path / "reward.png").read_bytes()[:4] == b"\x89PNG"
    assert set(report["objectives"]) == {"math"}


def test_records_and_pairs_of_all_objectives(
    model: tuple[ProcessRewardModel, str], files: dict[str, str], tmp_path: Path
) -> None:
    reward, folder = model
    run(folder, files["records"], files["pairs"], "--output", str(tmp_path))
    objectives = json.loads((tmp_path / "reward.json").read_text())["objectives"]
    said = [reward.score([{"role": "user", "content": "Say."}], [STEPS[i][0]])["math"][0] for i in range(4)]
    assert objectives["math"]["figures"]["best_of_n_lift"]["value"] == int(np.argmax(said)) % 2 - 0.5
    assert objectives["math"]["figures"]["best_against_worst"]["n"] == 1
    won = [
        reward.score([{"role": "user", "content": f"p{i}"}], ["c" * (i + 1)])["honest"][0]
        > reward.score([{"role": "user", "content": f"p{i}"}], [f"r{i}"])["honest"][0]
        for i in range(5)
    ]
    assert objectives["honest"]["figures"]["pairwise_accuracy"]["value"] == pytest.approx(np.mean(won))


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_third_party_models(kind: str, files: dict[str, str], tmp_path: Path) -> None:
    torch.manual_seed(1)
    classes = {
        "sequence": tf.AutoModelForSequenceClassification,
        "token": tf.AutoModelForTokenClassification,
    }
    labels = {"sequence": 1, "token": 2}[kind]
    # Beside a Qwen2 config, AutoTokenizer adds that family's own end token.
    config = tf.Qwen2Config(
        **{**tiny.CONFIG, "vocab_size": len(tiny.TOKENIZER) + 1}, num_labels=labels, pad_token_id=0
    )
    classes[kind].from_config(config).save_pretrained(str(tmp_path / "model"))
    tiny.TOKENIZER.save_pretrained(str(tmp_path / "model"))
    run(str(tmp_path / "model"), files["bench"], "--objective", "math", "--output", str(tmp_path / "out"))
    figures = json.loads((tmp_path / "out" / "reward.json").read_text())["objectives"]["math"]["figures"]
    assert figures["auc"]["n"] == 9
    assert ("brier" in figures) == (kind == "token")  # one label is a Bradley-Terry score


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "{bad}", "--objective", "math"], "1 of 5 traces and pairs cannot be used"),
        (["{model}", "{bench}"], "name no objective"),
        (["{model}", "{bench}", "--objective", "mth"], "Did you mean 'math'"),
        (["{model}", "nowhere.jsonl", "--objective", "math"], "there is no file or folder"),
        (["{model}", "{pairs}", "--objective", "math", "--format", "foo"], "unknown format of steps 'foo'"),
        (["/nowhere/model", "{bench}", "--objective", "math"], "there is no model folder '/nowhere/model'"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: list[str],
    message: str,
    model: tuple[ProcessRewardModel, str],
    files: dict[str, str],
    tmp_path: Path,
) -> None:
    named = [argument.format(model=model[1], **files) for argument in arguments]
    result = CliRunner().invoke(app, ["evaluate", "reward", *named, "--output", str(tmp_path)])
    assert result.exit_code == 2 and message in result.output.replace("\n", " "), result.output
    assert "Traceback" not in result.output


def test_the_stage_verb_is_still_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "none.yaml")])
    assert result.exit_code == 2 and "none.yaml" in result.output
    assert "reward" in CliRunner().invoke(app, ["evaluate", "--help"]).output
