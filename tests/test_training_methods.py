"""MAH-DPO's baselines: each loss against a hand calculation, a short training of each, and the soup."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_world as world
from transformers import AutoModelForCausalLM, AutoTokenizer

from mahalo_ray.config import PolicyConfig, TrainingConfig, load_config
from mahalo_ray.data.records import PreferencePair
from mahalo_ray.losses import modpo_loss
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.models.soup import average_models
from mahalo_ray.objectives import Weights
from mahalo_ray.pipeline.sweeping import check_heads
from mahalo_ray.training.pairs import pair_inputs
from mahalo_ray.training.policy_methods import modpo_margins
from mahalo_ray.training.policy_recipe import PolicyRecipe

pytestmark = pytest.mark.usefixtures("one_process")


TRAINING = TrainingConfig(batch_size=8, micro_batch_size_per_device=8, epochs=4, zero_stage=2)
METHODS: dict[str, dict[str, Any]] = {
    "mah_dpo": {"alpha": {"engagement": 2.0}, "beta": {"accuracy": 0.4, "engagement": 0.7}},
    "dpo": {"objective": "engagement", "beta": 0.7},
    "scalarised": {"mixture": {"accuracy": 1.0, "engagement": 3.0}, "beta": 0.4},
    "modpo": {"objective": "accuracy", "mixture": {"accuracy": 1.0, "engagement": 3.0}, "beta": 0.4},
}
HEADS = {
    "mah_dpo": ("accuracy", "engagement"),
    "dpo": ("engagement",),
    "scalarised": ("scalarised",),
    "modpo": ("modpo",),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.make_base(tmp_path_factory.mktemp("base"))


def scored_pairs() -> list[PreferencePair]:
    rng = np.random.default_rng(4)
    return [
        pair.model_copy(
            update={
                "weight": float(rng.uniform(0.5, 2)),
                "margin": float(rng.normal() / 4),
                "chosen_scores": dict(zip(world.OBJECTIVES, rng.normal(size=2).tolist(), strict=True)),
                "rejected_scores": dict(zip(world.OBJECTIVES, rng.normal(size=2).tolist(), strict=True)),
            }
        )
        for pair in world.make_pairs()
    ]


def make_recipe(method: str, base: str, folder: Path, pairs: list[PreferencePair]) -> PolicyRecipe:
    settings = {"head_noise": 0.3, "head_learning_rate": 2e-2, "training": TRAINING, **METHODS[method]}
    policy = PolicyConfig(method=method, **settings)  # type: ignore[arg-type]
    url = world.save_pairs(folder, pairs)
    return PolicyRecipe(world.policy_settings(url, base, policy, 0.2, world.MODEL))


def engagement_gap(pair: PreferencePair) -> float:
    assert pair.chosen_scores is not None and pair.rejected_scores is not None
    return pair.chosen_scores["engagement"] - pair.rejected_scores["engagement"]


def engagement_spread() -> float:
    """Of the rewards within a prompt, as MODPO on the accuracy pairs sees it."""
    gaps = [engagement_gap(pair) for pair in scored_pairs() if pair.objective == "accuracy"]
    return math.sqrt(sum(gap**2 for gap in gaps) / len(gaps) / 2)


def by_hand(method: str, pair: PreferencePair, gain: float) -> tuple[float, float]:
    """(factor of the objective's mean, loss of the pair) from what chosen gained over rejected."""
    if method == "mah_dpo":
        alpha, beta, margin = {"accuracy": (1.0, 0.4, 0.0), "engagement": (2.0, 0.7, 0.0)}[pair.objective]
    elif method == "dpo":
        alpha, beta, margin = 1.0, 0.7, 0.0
    elif method == "scalarised":
        alpha, beta, margin = {"accuracy": 0.25, "engagement": 0.75}[pair.objective], 0.4, 0.0
    else:  # (1 / w_own) (beta gain - w_other (r_other(chosen) - r_other(rejected))), r_other standardised
        gap = engagement_gap(pair) / engagement_spread()
        alpha, beta, margin = 1.0, 0.4 / 0.25, 0.75 * gap / 0.25
    return alpha, math.log1p(math.exp(-(beta * gain - margin - pair.margin)))


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_every_method_by_hand(base: str, tmp_path: Path, method: str) -> None:
    pairs = {pair.id: pair for pair in scored_pairs()}
    recipe = make_recipe(method, base, tmp_path, list(pairs.values()))
    model: Any = recipe.build_model()
    assert tuple(model.heads) == HEADS[method]
    batch = recipe.batches[0]
    tensors = recipe.collate(batch, recipe.loss_denominators(batch), True)
    expected: dict[str, list[tuple[float, float, float]]] = {}
    for unit in batch:
        pair = pairs[recipe._pairs.ids[unit]]
        if method in ("dpo", "modpo"):
            assert pair.objective == METHODS[method]["objective"]
        head = pair.objective if pair.objective in model.heads else method
        gains = []
        for column, completions in enumerate((recipe._pairs.chosen, recipe._pairs.rejected)):
            prompt, completion = recipe._pairs.prompts[unit], completions[unit]
            with world.ordinary_attention(model):
                states = model.hidden_states(torch.tensor([prompt + completion]))[0]
            logps = model.heads[head](states[len(prompt) - 1 : -1]).log_softmax(-1)
            found = logps.gather(1, torch.tensor(completion)[:, None]).sum().item()
            gains.append(found - recipe._reference[unit, column].item())
        alpha, loss = by_hand(method, pair, gains[0] - gains[1])
        expected.setdefault(pair.objective, []).append((alpha, pair.weight, loss))
    total = sum(
        rows[0][0] * sum(w * loss for _, w, loss in rows) / sum(w for _, w, _ in rows)
        for rows in expected.values()
    )
    assert set(expected) == set(recipe._objectives)
    assert recipe.loss(model, **tensors)[0].item() == pytest.approx(total, rel=1e-4)


def test_modpo_is_the_published_loss(base: str, tmp_path: Path) -> None:
    pairs = [pair.model_copy(update={"margin": 0.0}) for pair in scored_pairs()]
    recipe = make_recipe("modpo", base, tmp_path, pairs)
    model: Any = recipe.build_model()
    batch = recipe.batches[0]
    tensors = recipe.collate(batch, recipe.loss_denominators(batch), True)
    with torch.no_grad():
        own = model.completion_logps(**pair_inputs(tensors), head_index=tensors["head"].repeat(2))
        losses = recipe._losses(model, **tensors)[0]
    reference = recipe._reference[batch]
    rows = {pair.id: pair for pair in pairs}
    scores = [
        [rows[recipe._pairs.ids[unit]].chosen_scores, rows[recipe._pairs.ids[unit]].rejected_scores]
        for unit in batch
    ]
    chosen, rejected = (
        torch.tensor([[both[side][name] for name in world.OBJECTIVES] for both in scores])
        for side in (0, 1)  # type: ignore[index]
    )
    chosen, rejected = (scores / torch.tensor([1.0, engagement_spread()]) for scores in (chosen, rejected))
    wanted = modpo_loss(
        *own.chunk(2), reference[:, 0], reference[:, 1], chosen, rejected, (0.25, 0.75), 0, 0.4
    )
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-5)


def test_modpo_margins_do_not_depend_on_the_rewards_unit() -> None:
    policy = PolicyConfig(method="modpo", objective="accuracy", mixture={"accuracy": 1, "engagement": 3})

    def margins(unit: float) -> list[float]:
        scores = unit * np.array([(0.0, 2.0), (1.0, 1.0), (3.0, 1.0), (0.0, 0.0)])  # chosen, rejected
        pairs = [
            pair.model_copy(update={"chosen_scores": {"engagement": c}, "rejected_scores": {"engagement": r}})
            for pair, (c, r) in zip(world.make_pairs((4,), ("accuracy",)), scores.tolist(), strict=True)
        ]
        return modpo_margins(policy, pairs).tolist()

    # Differences -2, 0, 2, 0: variance of a reward (4 + 4) / 4 / 2 = 1. Margin: 0.75 / 0.25 of a difference.
    assert margins(1.0) == pytest.approx([-6.0, 0.0, 6.0, 0.0])
    assert margins(0.01) == pytest.approx(margins(1.0))
    with pytest.raises(ValueError, match="'engagement' rewards of chosen and rejected are the same"):
        margins(0.0)


def test_modpo_names_a_pair_without_the_other_rewards(base: str, tmp_path: Path) -> None:
    pairs = scored_pairs()
    pairs[2] = pairs[2].model_copy(update={"rejected_scores": {"accuracy": 1.0}})
    with pytest.raises(ValueError, match=r"pair 'a2' has no 'engagement' reward .* scored candidates"):
        make_recipe("modpo", base, tmp_path, pairs)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_saves_its_heads(base: str, tmp_path: Path, method: str) -> None:
    recipe = make_recipe(method, base, tmp_path / "pairs", scored_pairs())
    model: Any = recipe.build_model()
    optimizer = torch.optim.AdamW(recipe.parameter_groups(model))
    whole = np.unique(np.concatenate(recipe.batches))
    tensors = recipe.collate(whole, recipe.loss_denominators(whole), True)
    before = recipe.loss(model, **tensors)[0].item()
    for batch in recipe.batches:
        optimizer.zero_grad()
        recipe.loss(model, **recipe.collate(batch, recipe.loss_denominators(batch), True))[0].backward()
        optimizer.step()
    assert recipe.loss(model, **tensors)[0].item() < 0.8 * before
    recipe._metrics = {}
    recipe.save(model, model.state_dict(), tmp_path / "model")
    assert MultiHeadCausalLM.from_pretrained(tmp_path / "model").objectives == HEADS[method]


def test_a_policy_with_one_head_is_not_swept() -> None:
    example = Path(__file__).parent.parent / "examples" / "quickstart.yaml"
    check_heads(load_config(example))
    config = load_config(example, ["policy.method=dpo", "policy.objective=accuracy"])
    with pytest.raises(ValueError, match=r"'policy\.method' is 'dpo': that policy has one head"):
        check_heads(config)


def single(base: str, folder: Path, objective: str, seed: int) -> Path:
    policy = MultiHeadCausalLM.from_base(base, [objective], noise=0.3, seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.backbone_parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    policy.save_pretrained(folder, AutoTokenizer.from_pretrained(base))
    return folder


def test_a_soup_is_the_weighted_average_of_all_parameters(base: str, tmp_path: Path) -> None:
    folders = {name: single(base, tmp_path / name, name, i) for i, name in enumerate(world.OBJECTIVES)}
    average_models(folders, Weights({"accuracy": 1, "engagement": 3}), tmp_path / "soup")
    soup: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "soup")
    parts = [
        MultiHeadCausalLM.from_pretrained(folder).merge(Weights.one(name)).state_dict()
        for name, folder in folders.items()
    ]
    state = soup.state_dict()
    assert set(state) == set(parts[0])
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, 0.25 * parts[0][key] + 0.75 * parts[1][key])
    assert not torch.equal(soup.lm_head.weight, soup.model.embed_tokens.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "soup").chat_template == world.TEMPLATE


def test_a_soup_refuses_models_that_do_not_fit(base: str, tmp_path: Path) -> None:
    one = single(base, tmp_path / "one", "accuracy", 0)
    two_heads = tmp_path / "two"
    MultiHeadCausalLM.from_base(base, world.OBJECTIVES).save_pretrained(two_heads)
    even = Weights.balanced(world.OBJECTIVES)
    with pytest.raises(ValueError, match="heads for accuracy, engagement"):
        average_models({"accuracy": one, "engagement": two_heads}, even, tmp_path / "soup")
    with pytest.raises(ValueError, match="only one ties its embeddings"):
        average_models({"accuracy": one, "engagement": base}, even, tmp_path / "soup")
    with pytest.raises(ValueError, match="unknown objective 'speed'"):
        average_models({"accuracy": one}, Weights.one("speed"), tmp_path / "soup")
