"""Two Ray Train workers with DeepSpeed against one plain torch loop; and what survives what."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import training_world as world
from processes import started_here
from safetensors.torch import load_file

from mahalo_ray.config import ClusterConfig, PolicyConfig, RewardConfig, TrainingConfig
from mahalo_ray.training.deepspeed_config import optimizer_and_schedule
from mahalo_ray.training.loop import NonFiniteError
from mahalo_ray.training.policy_recipe import PolicyRecipe
from mahalo_ray.training.ray_train import TrainingResult, run_stage
from mahalo_ray.training.recipe import Recipe
from mahalo_ray.training.reference_logps import REFERENCE_STORE, read_store, write_store
from mahalo_ray.training.reward_recipe import RewardRecipe
from mahalo_ray.training.sft_recipe import SftRecipe
from mahalo_ray.training.trainer import PolicyTrainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_process")]

SEED = 5
CLUSTER = ClusterConfig(train_workers=2, cpus_per_train_worker=1, max_failures=2)
COMMON: dict[str, Any] = {
    "batch_size": 7,
    "micro_batch_size_per_device": 2,
    "epochs": 5,
    "learning_rate": 5e-3,
    "weight_decay": 0.01,
    "gradient_clipping": 0.3,
    "report_every_steps": 1,
    "checkpoint_every_steps": 4,
    "logit_chunk_size": 7,
}
# Measured every other step, with a budget that is not reached: neither may change what is trained.
POLICY = PolicyConfig(
    head_learning_rate=2e-2,
    metrics_every_steps=2,
    metrics_rows=5,
    sampled_turns=5,
    max_kl=1000.0,
    training=TrainingConfig(**COMMON, zero_stage=3),
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    start_ray()
    yield
    ray.shutdown()


def start_ray() -> None:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.make_base(tmp_path_factory.mktemp("base"))


def plain_losses(make: Callable[[], Recipe], training: TrainingConfig) -> tuple[list[float], dict[str, Any]]:
    """Loss of every step and the final weights of a plain loop: one process, whole batches, torch's own
    clipping."""
    recipe = make()
    torch.manual_seed(SEED)
    model = recipe.build_model()
    optimizer, schedule = optimizer_and_schedule(
        recipe.parameter_groups(model), training, len(recipe.batches)
    )
    losses = []
    for batch in recipe.batches:
        loss, _, _ = recipe.loss(model, **recipe.collate(batch, recipe.loss_denominators(batch), True))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clipping)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, dict(model.state_dict())


def check_same(result: TrainingResult, losses: list[float]) -> None:
    assert [entry["step"] for entry in result.history] == list(range(1, len(losses) + 1))
    assert [entry["loss"] for entry in result.history] == pytest.approx(losses, abs=1e-5)


def run_policy(
    base: str, folder: Path, progress: Any = None, policy: PolicyConfig = POLICY
) -> TrainingResult:
    pairs = world.save_pairs(folder / "pairs", world.make_pairs())
    settings = world.policy_settings(pairs, base, policy, output=f"{folder}/model")
    return run_stage(settings, cluster=CLUSTER, run_dir=f"{folder}/run", progress=progress)


@pytest.fixture(scope="module")
def unbroken(
    cluster: None, base: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainingResult, Path]:
    folder = tmp_path_factory.mktemp("unbroken")
    return run_policy(base, folder), folder


def test_policy_with_zero_3_equals_plain_torch(unbroken: tuple[TrainingResult, Path], base: str) -> None:
    result, folder = unbroken
    losses, state = plain_losses(
        lambda: PolicyRecipe(world.policy_settings(f"{folder}/pairs", base, POLICY, 0.2, world.MODEL)),
        POLICY.training,
    )
    check_same(result, losses)
    assert losses[-1] < losses[0]
    heads = load_file(folder / "model" / "heads.safetensors")
    assert set(heads) == {"base_head.weight", *(f"heads.{name}.weight" for name in world.OBJECTIVES)}
    for name, weight in heads.items():
        torch.testing.assert_close(weight, state[name], rtol=1e-4, atol=1e-5)
    assert result.metrics["held_out/pairs"] > 0
    assert not list((folder / "run").iterdir())  # checkpoints are for unfinished runs


def test_the_trainer_without_ray_makes_the_same_policy(
    unbroken: tuple[TrainingResult, Path], base: str, tmp_path: Path
) -> None:
    result, folder = unbroken
    options: dict[str, Any] = {"objectives": world.OBJECTIVES, "max_length": 64, "held_out_fraction": 0.2}
    trainer = PolicyTrainer(base, world.make_pairs(), POLICY, seed=SEED, **options)
    metrics = trainer.train()
    check_same(result, [entry["loss"] for entry in trainer.history])
    trainer.save_pretrained(tmp_path)
    expected = load_file(folder / "model" / "heads.safetensors")
    for name, weight in load_file(tmp_path / "heads.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)
    held_out = {name: value for name, value in metrics.items() if name.startswith("held_out/")}
    assert held_out == pytest.approx({name: result.metrics[name] for name in held_out}, abs=1e-4)


def test_sft_from_scratch_with_zero_2_equals_plain_torch(cluster: None, tmp_path: Path) -> None:
    base = world.make_base(tmp_path / "base", weights=False)
    examples = world.make_examples(tmp_path / "examples")
    training = TrainingConfig(**COMMON, zero_stage=2)
    seen: list[tuple[int, int]] = []
    settings = world.sft_settings(examples, base, training, world.SCRATCH, f"{tmp_path}/model")
    result = run_stage(
        settings,
        cluster=CLUSTER,
        run_dir=f"{tmp_path}/run",
        progress=lambda step, total, unit, metrics: seen.append((step, total)),
    )
    losses, state = plain_losses(lambda: SftRecipe(settings), training)
    check_same(result, losses)
    assert seen == [(step, len(losses)) for step in range(1, len(losses) + 1)]
    saved = load_file(tmp_path / "model" / "model.safetensors")
    weight = saved["model.embed_tokens.weight"]
    torch.testing.assert_close(weight, state["model.model.embed_tokens.weight"], rtol=1e-4, atol=1e-5)
    assert (tmp_path / "model" / "tokenizer.json").exists()


def test_reward_with_zero_2_equals_plain_torch(cluster: None, base: str, tmp_path: Path) -> None:
    traces = world.save_traces(tmp_path / "traces", world.make_traces())
    pairs = world.save_pairs(tmp_path / "pairs", world.make_pairs((12,), ("safety",)))
    training = TrainingConfig(**{**COMMON, "micro_batch_size_per_device": 3}, zero_stage=2)
    reward = RewardConfig(training=training, held_out_fraction=0.3, head_learning_rate=1e-2)
    settings = world.reward_settings(traces, pairs, base, reward, output=f"{tmp_path}/model")
    result = run_stage(settings, cluster=CLUSTER, run_dir=f"{tmp_path}/run")
    losses, _ = plain_losses(lambda: RewardRecipe(settings), training)
    check_same(result, losses)
    assert {"held_out/accuracy/ranking_accuracy", "held_out/safety/accuracy"} < set(result.metrics)


def end_training() -> None:
    """Without a controller the thread of `fit` ends: Ray may not be shut down while a thread is inside it."""
    for process in started_here("TrainController"):
        process.kill()
    for thread in threading.enumerate():
        if thread.name == "ray-train-fit":
            thread.join(600)


def test_a_lost_driver_and_a_killed_worker_change_nothing(
    unbroken: tuple[TrainingResult, Path], base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver is lost first, Ray with it; a worker of those who go on from its checkpoint is killed."""

    class Stop(Exception):
        pass

    def stop(step: int, total: int, unit: str, metrics: dict[str, float]) -> None:
        if step >= 6:
            raise Stop

    with pytest.raises(Stop):
        run_policy(base, tmp_path, stop)
    end_training()
    ray.shutdown()
    start_ray()
    steps: list[int] = []
    killed: list[int] = []

    def kill_once(step: int, total: int, unit: str, metrics: dict[str, float]) -> None:
        steps.append(step)
        if len(steps) > 1 and not killed:
            killed.append(train_workers()[-1])
            os.kill(killed[0], signal.SIGKILL)

    result = run_policy(base, tmp_path, kill_once)
    assert steps[0] > 4 and killed
    assert "goes on from the last checkpoint" in caplog.text
    # Bit by bit, not only within 1e-5: same workers, fp32, CPU.
    assert figures(result) == figures(unbroken[0])


def test_two_workers_stop_at_a_kl_budget(
    unbroken: tuple[TrainingResult, Path], base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights kept are those of the last measurement within it, and the driver says so."""
    measured = {
        int(entry["step"]): max(value for name, value in entry.items() if name.endswith("/kl"))
        for entry in unbroken[0].history
        if "even/kl" in entry
    }
    first, second, third = sorted(measured)[:3]
    budget = (max(measured[first], measured[second]) + measured[third]) / 2
    assert measured[third] > budget
    result = run_policy(base, tmp_path, policy=POLICY.model_copy(update={"max_kl": budget}))
    assert (result.metrics["kept_step"], result.metrics["stopped_at_step"]) == (second, third)
    assert figures(result) == figures(unbroken[0])[:third]
    assert f"was reached at step {third}" in caplog.text
    assert (tmp_path / "model" / "heads.safetensors").exists()


def test_a_loss_that_is_not_finite_ends_the_run_at_once(
    unbroken: tuple[TrainingResult, Path], base: str, tmp_path: Path
) -> None:
    (store,) = (unbroken[1] / "pairs" / REFERENCE_STORE).glob("*.parquet")
    known = read_store(str(store))
    recipe = PolicyRecipe(world.policy_settings(f"{unbroken[1]}/pairs", base, POLICY))
    row_hash = recipe._pairs.row_hash(recipe._pairs.ids.index("e3"))
    known[row_hash] = (float("nan"), known[row_hash][1])
    write_store(f"{tmp_path}/pairs/{REFERENCE_STORE}/{store.name}", known)
    reports: list[int] = []
    message = r"the loss is not finite .* for engagement pair e3; nothing was"
    with pytest.raises(NonFiniteError, match=message):
        run_policy(base, tmp_path, lambda step, total, unit, metrics: reports.append(step))
    assert len(reports) == len(set(reports))  # no second attempt
    assert not (tmp_path / "model").exists()


def figures(result: TrainingResult) -> list[dict[str, float]]:
    """The history without its clock."""
    return [{k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in result.history]


def train_workers() -> list[int]:
    """Process ids of the policy stage's workers, the oldest first: descendants of this process that work in
    the run's own folder (workers of a finished run may still be on their way out, other clusters may run on
    this machine)."""
    parents, folders, began = {}, {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                folders[int(entry.name)] = (entry / "cwd").readlink().name
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            fields = stat.rpartition(")")[2].split()
            parents[int(entry.name)], began[int(entry.name)] = int(fields[1]), int(fields[19])
    mine = {os.getpid()}
    while found := {child for child, parent in parents.items() if parent in mine} - mine:
        mine |= found
    # By their ids they would not be in order: these begin again at 1.
    return sorted((pid for pid in mine if folders[pid].startswith("policy-")), key=began.__getitem__)
