"""Training from Python: one process, no Ray, the loop of `mahalo run`; and where its metrics go."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_world as world
from datasets import Dataset
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event
from transformers import AutoTokenizer

from mahalo_ray.config import PolicyConfig, TrainingConfig
from mahalo_ray.data.records import PreferencePair
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.training.loop import train
from mahalo_ray.training.pairs import PaddedPairs, encode_pairs, pair_inputs, pair_logps
from mahalo_ray.training.policy_recipe import PolicyRecipe
from mahalo_ray.training.settings import PolicySettings
from mahalo_ray.training.trainer import LocalSession, PolicyTrainer, one_process

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("deepspeed_alone")]

TRAINING: dict[str, Any] = {
    "batch_size": 8,
    "micro_batch_size_per_device": 4,
    "max_steps": 3,
    "report_every_steps": 1,
    "learning_rate": 1e-2,
}


def config(stage: int = 2, **training: Any) -> PolicyConfig:
    return PolicyConfig(
        head_noise=0.3, training=TrainingConfig(**{**TRAINING, "zero_stage": stage, **training})
    )


def rows() -> list[dict[str, Any]]:
    """What a TRL user has: prompt, chosen, rejected, and which objective a row is of."""
    return [
        {
            "prompt": pair.prompt[0].content,
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "objective": pair.objective,
        }
        for pair in world.make_pairs()
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.make_base(tmp_path_factory.mktemp("base"))


def make(model: Any, pairs: Any, settings: PolicyConfig, **options: Any) -> PolicyTrainer:
    options = {
        "max_length": 64,
        "objectives": world.OBJECTIVES,
        "held_out_fraction": 0.2,
        "seed": 5,
        **options,
    }
    return PolicyTrainer(model, pairs, settings, **options)


def test_rows_files_data_sets_and_records_train_the_same_policy(base: str, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    trainer = make(base, rows(), config(), output_dir=tmp_path / "first")
    metrics = trainer.train(lambda done, of, unit, _: told.append((done, of, unit)))
    assert told == [(1, 3, "steps"), (2, 3, "steps"), (3, 3, "steps")]
    assert [entry["step"] for entry in trainer.history] == [1, 2, 3]
    assert metrics["loss"] == trainer.history[-1]["loss"] and metrics["held_out/pairs"] > 0
    expected = trainer.model.state_dict()
    records = PreferencePair.load(str(tmp_path / "first" / "pairs"))
    Dataset.from_list(rows()).to_json(str(tmp_path / "rows.jsonl"))
    for pairs in (Dataset.from_list(rows()), tmp_path / "rows.jsonl", records):
        again = make(base, pairs, config())
        again.train()
        for name, tensor in again.model.state_dict().items():
            assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("stage", [0, 3])
def test_a_policy_in_memory_is_trained_itself_against_its_base_head(base: str, stage: int) -> None:
    """Made as the trainer makes one from a folder, it becomes the same policy."""
    expected = make(base, rows(), config(stage))
    expected.train()
    policy = MultiHeadCausalLM.from_base(
        base, world.OBJECTIVES, noise=0.3, seed=5, dtype=torch.float32, keep_base_head=True
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = make(policy, rows(), config(stage), objectives=None, tokenizer=tokenizer)
    trainer.train()
    assert [entry["loss"] for entry in trainer.history] == pytest.approx(
        [entry["loss"] for entry in expected.history], abs=1e-6
    )
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(tensor, expected.model.state_dict()[name])


def test_nothing_held_out_is_said(base: str, caplog: pytest.LogCaptureFixture) -> None:
    """All pairs share one prompt, which is on one side of the split as a whole."""
    make(base, [{**row, "prompt": "abc"} for row in rows()], config()).train()
    assert "nothing was held out although 'pairs.held_out_fraction' is 0.2" in caplog.text
    caplog.clear()
    make(base, rows(), config(), held_out_fraction=0.0).train()
    assert "held out" not in caplog.text


def test_what_cannot_be_trained_is_refused_at_once(base: str, tmp_path: Path) -> None:
    wrong = rows()
    del wrong[3]["rejected"]
    other = [{**row, "objective": "speed"} for row in rows()]
    for arguments, message in (
        ({"pairs": wrong}, r"1 of 23 rows are no pairs: row 4: .*rejected"),
        (
            {"pairs": other},
            "not among accuracy, engagement: speed",
        ),
        ({"objectives": None}, "name the objectives"),
        ({"model": MultiHeadCausalLM.from_base(base, ["accuracy"])}, "has no tokenizer"),
        ({"settings": config(report_to=["tensorboard"])}, "pass output_dir"),
    ):
        options: dict[str, Any] = {"model": base, "pairs": rows(), "settings": config(), **arguments}
        with pytest.raises(ValueError, match=message):
            make(**options)
    policy = MultiHeadCausalLM.from_base(base, world.OBJECTIVES)
    with pytest.raises(ValueError, match="keep_base_head=True"):
        make(policy, rows(), config(), tokenizer=AutoTokenizer.from_pretrained(base)).train()
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="give another output_dir"):
        make(base, rows(), config(), output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"call train\(\) first"):
        make(base, rows(), config()).save_pretrained(tmp_path)


def test_metrics_reach_tensorboard(base: str, tmp_path: Path) -> None:
    trainer = make(base, rows(), config(report_to=["tensorboard"]), output_dir=tmp_path / "demo")
    metrics = trainer.train()
    (file,) = (tmp_path / "demo" / "tracking").glob("events.out.tfevents.*")
    written = read_events(file)
    assert [written["loss", step] for step in (1, 2, 3)] == pytest.approx(
        [entry["loss"] for entry in trainer.history]
    )
    assert written["held_out/pairs", 3] == metrics["held_out/pairs"]
    assert written["learning_rate/heads", 1] > 0


def test_metrics_reach_mlflow(base: str, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    trainer = make(base, rows(), config(report_to=["mlflow"]), output_dir=tmp_path / "demo")
    trainer.train()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/demo/tracking/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("mahalo_ray").experiment_id])
    losses = [metric.value for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert losses == pytest.approx([entry["loss"] for entry in trainer.history])
    assert run.data.params["batch_size"] == "8"


def read_events(file: Path) -> dict[tuple[str, int], float]:
    """Scalars by (name, step). A record: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    data, found, position = file.read_bytes(), {}, 0
    while position < len(data):
        length = int.from_bytes(data[position : position + 8], "little")
        event = Event.FromString(data[position + 12 : position + 12 + length])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        position += 16 + length
    return found


class StoppingSession(LocalSession):
    """Keeps the latest checkpoint in a folder, and is lost after a step."""

    def __init__(self, settings: PolicySettings, folder: Path, lost_after: int | None) -> None:
        super().__init__(None, settings)
        self.folder, self.lost_after = folder, lost_after

    def report(self, news: dict[str, Any], checkpoint: Path | None = None) -> None:
        if checkpoint is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.copytree(checkpoint, self.folder)
        if news["unit"] == "steps" and news["done"] == self.lost_after:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def latest_checkpoint(self) -> Iterator[tuple[Path, str] | None]:
        yield (self.folder, "here") if self.folder.exists() else None


@pytest.mark.parametrize("stage", [2, 3])
def test_a_kl_budget_ends_training_with_the_weights_within_it(base: str, tmp_path: Path, stage: int) -> None:
    """The kept weights are, to the last bit, those of a run of as many steps, also when training was lost
    in between; and the metrics are theirs."""
    pairs = world.save_pairs(tmp_path / "pairs", world.make_pairs())
    training = {"schedule": "constant", "warmup_fraction": 0.0, "checkpoint_every_steps": 4}

    def run(name: str, steps: int, max_kl: float | None, lost_after: int | None = None) -> dict[str, Any]:
        policy = PolicyConfig(
            metrics_every_steps=2,
            max_kl=max_kl,
            training=TrainingConfig(**{**TRAINING, "zero_stage": stage, "max_steps": steps, **training}),
        )
        settings = world.policy_settings(pairs, base, policy, 0.3, world.MODEL, str(tmp_path / name))
        session = StoppingSession(settings, tmp_path / f"{name}-checkpoint", lost_after)
        with one_process(), torch.random.fork_rng():
            return train(partial(PolicyRecipe, settings), settings, session)

    def weights(name: str) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / name / "heads.safetensors")

    measured = run("unbounded", 9, None)["history"]
    largest = [max(v for k, v in entry.items() if k.endswith("/kl")) for entry in measured[1::2]]
    assert largest == sorted(largest) and set(measured[1]) >= {"even/kl", "mostly_accuracy/kl"}
    budget = (largest[1] + largest[2]) / 2  # between steps 4 and 6
    expected = run("four", 4, None)
    stopped = run("stopped", 9, budget)
    assert stopped["history"][-1]["step"] == stopped["metrics"]["stopped_at_step"] == 6
    assert stopped["metrics"]["kept_step"] == 4 and stopped["metrics"]["even/kl"] == measured[3]["even/kl"]
    assert {k: v for k, v in stopped["metrics"].items() if k.startswith("held_out")} == {
        k: v for k, v in expected["metrics"].items() if k.startswith("held_out")
    }
    with pytest.raises(KeyboardInterrupt):
        run("lost", 9, budget, lost_after=5)
    again = run("lost", 9, budget)
    assert again["metrics"]["kept_step"] == 4 and len(again["history"]) == 6
    for name, weight in weights("four").items():
        assert torch.equal(weights("stopped")[name], weight) and torch.equal(weights("lost")[name], weight)
    note = world.policy_settings(pairs, base, PolicyConfig(metrics_every_steps=2, max_kl=budget)).notes(
        stopped["metrics"]
    )
    assert "reached at step 6" in note[0] and "weights of step 4" in note[0]
    if stage == 2:
        with pytest.raises(ValueError, match=r"first measurement, after step 2, found a KL .* above 1e-09"):
            run("none", 9, 1e-9)
        assert "stopped_at_step" not in run("ample", 9, 2 * largest[-1] + 1)["metrics"]


def test_at_sampled_balances_mixtures_are_regressed_on_the_weighted_scores(base: str) -> None:
    """Two answers, one better for each objective, apart by sqrt(2) standard deviations: at the balance w of
    accuracy the first gains (w - (1 - w)) sqrt(2) / beta nats on the second, against the reference."""
    answers = [("yes", {"accuracy": 1.0, "engagement": 0.0}), ("no", {"accuracy": 0.0, "engagement": 2.0})]
    pairs = []
    for number in range(6):
        for objective, ordered in zip(world.OBJECTIVES, (answers, answers[::-1]), strict=True):
            (chosen, chosen_scores), (rejected, rejected_scores) = ordered
            pair = {
                "id": f"{number}-{objective}",
                "source": "by hand",
                "objective": objective,
                "prompt": [{"role": "user", "content": f"{number} + 1 ="}],
                "chosen": chosen,
                "rejected": rejected,
                "chosen_scores": chosen_scores,
                "rejected_scores": rejected_scores,
            }
            pairs.append(PreferencePair.model_validate(pair))
    policy = PolicyConfig(
        loss="regression",
        balance="sampled",
        beta=0.5,
        head_learning_rate=1e-2,
        training=TrainingConfig(**{**TRAINING, "batch_size": 12, "max_steps": 80, "zero_stage": 0}),
    )
    trainer = make(base, pairs, policy, held_out_fraction=0.0)
    trainer.train()
    encoded = encode_pairs(pairs[::2], world.OBJECTIVES, ChatFormat(AutoTokenizer.from_pretrained(base)), 64)
    inputs = pair_inputs(PaddedPairs(encoded, 0).tensors(np.arange(6)))
    with torch.no_grad():
        reference = MultiHeadCausalLM.from_base(base, ["any"], noise=0.0).eval()
        chosen, rejected = pair_logps(reference.mixture_logps(**inputs, weights=torch.ones(12, 1)))
        for share in (1.0, 0.75, 0.5, 0.25, 0.0):
            weights = torch.tensor([[share, 1 - share]]).expand(12, -1)
            for_it, against = pair_logps(trainer.model.eval().mixture_logps(**inputs, weights=weights))
            lead = (for_it - against) - (chosen - rejected)
            assert lead.tolist() == pytest.approx([(2 * share - 1) * 2**0.5 / 0.5] * 6, abs=0.5)


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_are_trained_for_each_objective(base: str, stage: int) -> None:
    """With a frozen backbone nothing is shared: what one objective's pairs change, the other's do not see."""
    settings = {"adapters": {"depth": 1, "rank": 2, "freeze_backbone": True}, "metrics_every_steps": 2}
    training = {**TRAINING, "zero_stage": stage, "gradient_checkpointing": True}
    training["gradient_clipping"] = (
        0.0  # the norm is over all parameters: it would tie the objectives together
    )
    pairs = rows()
    trained = []
    for objectives in (world.OBJECTIVES, world.OBJECTIVES[:1]):
        # The last objective's pairs turned round, the second time.
        turned = [
            row
            if row["objective"] in objectives
            else {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
            for row in pairs
        ]
        policy = PolicyConfig.model_validate({**settings, "training": training})
        trainer = make(base, turned, policy)
        metrics = trainer.train()
        trained.append(trainer.model)
        assert any("/kl" in name for entry in trainer.history for name in entry)
        assert metrics["held_out/pairs"] > 0
    (first, second), start = trained, MultiHeadCausalLM.from_base(base, world.OBJECTIVES)
    assert first.adapters is not None and second.adapters is not None
    for name, parameter in first.adapters.parameters().items():
        other = second.adapters.parameters()[name]
        if name.endswith("adapter_up"):  # [out, objectives * rank]
            assert parameter.abs().max() > 0
            assert torch.equal(parameter[:, :2], other[:, :2]) and not torch.equal(parameter, other)
    for name, parameter in start.backbone.named_parameters():
        assert torch.equal(parameter, dict(first.backbone.named_parameters())[name])
