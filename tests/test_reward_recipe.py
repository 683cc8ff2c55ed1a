"""The reward recipe: weights and margins of pairs by hand, mixed supervision, and head inputs kept once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import training_world as world
from torch import Tensor, nn

from mahalo_ray.config import ConfigError, ObjectiveConfig, RewardConfig, TrainingConfig
from mahalo_ray.data import storage
from mahalo_ray.evaluation.reward_report import score_rows
from mahalo_ray.models.scoring import StepEncoder
from mahalo_ray.training import reward_recipe
from mahalo_ray.training.reward_recipe import RewardRecipe

pytestmark = pytest.mark.usefixtures("one_process")

TRAINING = TrainingConfig(batch_size=64, micro_batch_size_per_device=8, max_steps=3)
MIXED = (*world.SUPERVISION, ObjectiveConfig(name="honest", supervision="judged_rollouts"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.make_base(tmp_path_factory.mktemp("base"))


def make_recipe(
    base: str, folder: Path, objectives: Any = MIXED, features: str | None = None, **settings: Any
) -> RewardRecipe:
    """Every kind of supervision in one run: values, judgements of prefixes and rollouts, and pairs."""
    traces = world.make_traces()
    for number, trace in enumerate(traces):
        trace.labels["honest"] = [float(number % 2), None]
    pairs = [
        pair.model_copy(update={"weight": 0.1 + number % 3, "margin": 0.3 * number - 1})
        for number, pair in enumerate(world.make_pairs((12,), ("safety",)))
    ]
    return RewardRecipe(
        world.reward_settings(
            world.save_traces(folder / "traces", traces),
            world.save_pairs(folder / "pairs", pairs),
            base,
            RewardConfig(training=TRAINING, held_out_fraction=0.2, **settings),
            objectives,
            features,
        )
    )


def build(recipe: RewardRecipe) -> tuple[nn.Module, Callable[..., Tensor]]:
    torch.manual_seed(0)
    model = recipe.build_model()

    @torch.no_grad()
    def infer(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> Tensor:
        return function(model.eval(), **tensors)

    return model, infer


def losses(recipe: RewardRecipe, model: nn.Module) -> list[Tensor]:
    """Loss, row losses and figures of the first batch, and the gradient of the heads."""
    model.zero_grad()
    batch = recipe.batches[0]
    output = recipe.loss(model, **recipe.collate(batch, recipe.loss_denominators(batch), True))
    output[0].backward()
    return [*output, *(p.grad for p in model.parameters() if p.grad is not None)]


def test_weights_and_margins_of_pairs_by_hand(base: str, tmp_path: Path) -> None:
    """sum w * log(1 + exp(-(chosen - rejected - margin))) / sum w."""
    recipe = make_recipe(base, tmp_path, world.SUPERVISION[2:] + MIXED[:2] + MIXED[3:])
    model, _ = build(recipe)
    batch, data = recipe.batches[0], recipe.data
    total = weights = right = 0.0
    for unit in batch:
        if data.pair_objective[unit] != 0:
            continue
        chosen, rejected = (
            model(
                torch.tensor([data.tokens[row].input_ids]),
                None,
                torch.tensor([data.tokens[row].starts]),
                torch.tensor([data.tokens[row].ends]),
            )[0, 0, 0].item()
            for row in data.members[unit]
        )
        weight, margin = data.weights[unit], data.margins[unit]
        total += weight * math.log1p(math.exp(-(chosen - rejected - margin)))
        weights += weight
        right += weight * (chosen > rejected)
    assert len({round(w, 6) for w in data.weights}) > 2
    _, _, sums, *_ = losses(recipe, model)
    figures = recipe.summarise(dict(zip(recipe.metric_names, sums.tolist(), strict=True)))
    assert figures["safety/loss"] == pytest.approx(total / weights, rel=1e-4)
    assert figures["safety/accuracy"] == pytest.approx(right / weights, rel=1e-4)
    other = [pair.model_copy(update={"weight": 7.0}) for pair in world.make_pairs((12,), ("safety",))]
    url = world.save_pairs(tmp_path / "other", other)
    changed = world.reward_settings(None, url, base, RewardConfig(training=TRAINING), world.SUPERVISION[2:])
    assert changed.identity() != recipe._settings.identity()


def test_all_kinds_of_supervision_train_together(base: str, tmp_path: Path) -> None:
    recipe = make_recipe(base, tmp_path)
    model, _ = build(recipe)
    before = losses(recipe, model)[2]
    figures = recipe.summarise(dict(zip(recipe.metric_names, before.tolist(), strict=True)))
    assert {f"{o.name}/loss" for o in MIXED} <= set(figures)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        losses(recipe, model)
        optimizer.step()
    after = losses(recipe, model)[2]
    trained = recipe.summarise(dict(zip(recipe.metric_names, after.tolist(), strict=True)))
    for objective in MIXED:
        assert trained[f"{objective.name}/loss"] < 0.7 * figures[f"{objective.name}/loss"]


def untold(done: int, of: int) -> None:
    """Nobody asks how far it has come."""


def test_kept_features_give_the_same_loss_gradient_and_scores(base: str, tmp_path: Path) -> None:
    plain = make_recipe(base, tmp_path, backbone="frozen", cache_features=False)
    kept = make_recipe(base, tmp_path, backbone="frozen")
    model, infer = build(plain)
    plain.prepare(infer, 0, 1, untold)
    kept.prepare(infer, 0, 1, untold)
    assert set(kept.scoring_batch(kept.batches[0])[1]) == {"features"}
    assert "input_ids" in plain.scoring_batch(plain.batches[0])[1]
    for one, other in zip(losses(plain, model), losses(kept, model), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    assert kept.finish(infer, 0, 1) == pytest.approx(plain.finish(infer, 0, 1), rel=1e-5)


def test_features_are_stored_part_by_part_and_told(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_recipe, "_PART_TOKENS", 100)
    store = tmp_path / "features"
    recipe = make_recipe(base, tmp_path, features=str(store), backbone="frozen")
    _, infer = build(recipe)
    told: list[tuple[int, int]] = []
    recipe.prepare(infer, 0, 1, lambda done, of: told.append((done, of)))
    tokens = int(recipe.row_groups.tokens.sum())
    assert len(told) == len(list(store.glob("*/*.parquet"))) > 2
    assert told[-1] == (tokens, tokens) and {of for _, of in told} == {tokens}
    steps = np.diff([0, *(done for done, _ in told)])
    assert steps.min() > 0 and steps.max() <= 100 + int(recipe.row_groups.tokens.max())


def test_a_store_is_read_instead_of_computed_again(base: str, tmp_path: Path) -> None:
    store = str(tmp_path / "features")
    first = make_recipe(base, tmp_path, features=store, backbone="frozen")
    model, infer = build(first)
    first.prepare(infer, 0, 1, untold)
    expected = losses(first, model)[0]

    def never(function: Any, tensors: Any) -> Tensor:
        raise AssertionError("a stored sequence was computed again")

    again = make_recipe(base, tmp_path, features=store, backbone="frozen")
    again.prepare(never, 0, 1, untold)
    torch.testing.assert_close(losses(again, model)[0], expected, rtol=0, atol=0)
    # Another model on the same data and backbone finds them too; one with other inputs does not.
    part = make_recipe(base, tmp_path, MIXED[::-1], store, backbone="frozen")
    part.prepare(never, 0, 1, untold)
    other = make_recipe(base, tmp_path, features=store, backbone="frozen", inputs=["last"])
    with pytest.raises(AssertionError, match="computed again"):
        other.prepare(never, 0, 1, untold)
    # What is missing is computed, and only that.
    (folder,) = (tmp_path / "features").iterdir()
    (file,) = folder.iterdir()
    storage.write_table(str(file), storage.read_file(str(file)).slice(0, 5))
    seen: list[int] = []

    def count(function: Any, tensors: dict[str, Tensor]) -> Tensor:
        seen.append(len(tensors["input_ids"]))
        return infer(function, tensors)

    rest = make_recipe(base, tmp_path, features=store, backbone="frozen")
    rest.prepare(count, 0, 1, untold)
    assert 0 < sum(seen) < len(rest.data.tokens)
    torch.testing.assert_close(losses(rest, model)[0], expected, rtol=1e-5, atol=1e-6)


def two_workers(rank: int, base: str, folder: str, meeting: str) -> None:
    """One of two workers; the second looks into the store at a moment at which it shows nothing."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    url = world.save_pairs(Path(folder) / f"pairs{rank}", world.make_pairs((12,), ("safety",)))
    reward = RewardConfig(training=TRAINING, held_out_fraction=0.2, backbone="frozen")
    features = f"{folder}/features"
    recipe = RewardRecipe(world.reward_settings(None, url, base, reward, world.SUPERVISION[2:], features))

    def never(function: Any, tensors: Any) -> Tensor:
        raise AssertionError("a stored sequence was computed again")

    if rank == 1:
        storage.list_files = lambda *_: []  # type: ignore[assignment]
    recipe.prepare(never, rank, 2, untold)
    assert len(recipe._features) == len(recipe.data.tokens)
    dist.destroy_process_group()


@pytest.mark.slow
def test_workers_agree_on_what_a_shared_store_holds(base: str, tmp_path: Path) -> None:
    """Another run may be writing there: two that look for themselves would wait for each other for ever."""
    url = world.save_pairs(tmp_path / "pairs", world.make_pairs((12,), ("safety",)))
    reward = RewardConfig(training=TRAINING, held_out_fraction=0.2, backbone="frozen")
    objectives, features = world.SUPERVISION[2:], f"{tmp_path}/features"
    first = RewardRecipe(world.reward_settings(None, url, base, reward, objectives, features))
    first.prepare(build(first)[1], 0, 1, untold)
    torch.multiprocessing.spawn(two_workers, (base, str(tmp_path), f"{tmp_path}/meeting"), nprocs=2)


def test_a_backbone_that_changes_is_never_kept(base: str, tmp_path: Path) -> None:
    recipe = make_recipe(base, tmp_path)
    _, infer = build(recipe)
    recipe.prepare(infer, 0, 1, untold)
    assert "input_ids" in recipe.scoring_batch(np.array([0]))[1]
    with pytest.raises((ConfigError, ValueError), match="'cache_features' is for 'backbone: frozen'"):
        RewardConfig(cache_features=False)


def test_long_answers_are_read_alike_in_training_and_evaluation(base: str, tmp_path: Path) -> None:
    """The beginning of both answers, and the end of the prompt."""
    pair = world.make_pairs((1,), ("safety",))[0]
    long = pair.model_copy(update={"id": "long", "chosen": "ab" * 90, "rejected": "ba" * 40})
    pairs = [long, pair]
    settings = world.reward_settings(
        None,
        world.save_pairs(tmp_path, pairs),
        base,
        RewardConfig(training=TRAINING, held_out_fraction=0.0),
        world.SUPERVISION[2:],
    )
    length = 128  # the context of the model
    recipe = RewardRecipe(replace(settings, model=world.MODEL.model_copy(update={"max_length": length})))
    assert recipe.data.cut == 1
    model: Any = recipe.build_model()
    scored = score_rows(model, [], pairs)
    assert scored.cut == 1
    for row, (name, text) in enumerate((("chosen", long.chosen), ("rejected", long.rejected))):
        tokens = recipe.data.tokens[row]
        encoder = StepEncoder(recipe._tokenizer, "\n\n")
        assert len(tokens.input_ids) <= length and len(tokens.starts) == 1
        answer = list(tokens.input_ids[tokens.starts[0] :])
        assert answer == encoder.step_ids(text)[: len(answer)]
        (score,) = model.score_traces([tokens])
        assert getattr(scored.pairs[0], name) == pytest.approx(float(score[0, 0]), abs=1e-6)


def test_objectives_without_labels_are_named(base: str, tmp_path: Path) -> None:
    other = ObjectiveConfig(name="other", supervision="pairwise")
    with pytest.raises(ValueError, match=r"'other' has no labels \(or pairs\) to train the reward model on"):
        make_recipe(base, tmp_path, (*MIXED, other))
    # One pair is either trained on or held out.
    pairs = world.save_pairs(tmp_path / "one", world.make_pairs((1,), ("safety",)))
    settings = RewardConfig(training=TRAINING, held_out_fraction=0.2)
    with pytest.raises(ValueError, match=r"'safety' has no labels \(or pairs\)"):
        RewardRecipe(world.reward_settings(str(tmp_path / "traces"), pairs, base, settings, MIXED))
