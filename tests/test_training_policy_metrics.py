"""KL to the reference and gradient cosines against the textbook, and under DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_world as world
from torch import Tensor
from transformers import AutoModelForCausalLM

from mahalo_ray.config import LoraConfig, PolicyConfig, TrainingConfig
from mahalo_ray.models.pair_attention import packed_arguments
from mahalo_ray.models.sharding import gathered
from mahalo_ray.training.policy_metrics import cosines
from mahalo_ray.training.policy_recipe import PolicyRecipe

pytestmark = pytest.mark.usefixtures("deepspeed_alone")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.make_base(tmp_path_factory.mktemp("base"))


def make_recipe(base: str, folder: Path, stage: int = 2, **settings: Any) -> PolicyRecipe:
    training = TrainingConfig(
        batch_size=8, micro_batch_size_per_device=3, logit_chunk_size=5, zero_stage=stage, learning_rate=1e-2
    )
    policy = PolicyConfig(
        head_noise=0.3,
        training=training,
        metrics_every_steps=1,
        metrics_rows=7,
        gradient_cosine=stage < 3,
        **settings,
    )
    pairs = world.save_pairs(folder, world.make_pairs())
    return PolicyRecipe(world.policy_settings(pairs, base, policy, 0.3, world.MODEL))


def one_sequence(length: int) -> Tensor:
    """A packed pair that is one ordinary sequence: nothing but a chosen answer."""
    return torch.tensor([[0, length, 0]])


def textbook_kl(model: Any, base: str, recipe: PolicyRecipe) -> dict[str, float]:
    reference: Any = AutoModelForCausalLM.from_pretrained(base)
    rows = np.random.default_rng(5).permutation(recipe._held_out)[:7]
    mixtures = {"accuracy": (1.0, 0.0), "engagement": (0.0, 1.0), "even": (0.5, 0.5)}
    mixtures |= {"mostly_accuracy": (0.75, 0.25), "mostly_engagement": (0.25, 0.75)}
    totals = {name: [0.0, 0.0] for name in mixtures}  # at the answers chosen for each objective
    tokens = [0, 0]
    for row in rows:
        prompt, chosen = recipe._pairs.prompts[row], recipe._pairs.chosen[row]
        ids, start = torch.tensor([prompt + chosen]), len(prompt) - 1
        q = reference(ids).logits[0, start:-1].log_softmax(-1)
        hidden = model.hidden_states(ids, **packed_arguments(one_sequence(len(ids[0]))))[0, start:-1]
        for name, weights in mixtures.items():
            logits = [w * model.heads[o](hidden) for o, w in zip(world.OBJECTIVES, weights, strict=True)]
            p = sum(logits, torch.zeros(())).log_softmax(-1)
            totals[name][recipe._pairs.objective[row]] += float((p.exp() * (p - q)).sum())
        tokens[recipe._pairs.objective[row]] += len(chosen)
    assert min(tokens) > 0
    means = {
        name: [total / count for total, count in zip(sums, tokens, strict=True)]
        for name, sums in totals.items()
    }
    return {
        f"{name}/kl": sum(w * mean for w, mean in zip(weights, means[name], strict=True))
        for name, weights in mixtures.items()
    }


@pytest.mark.parametrize("kind", ["full", "low_rank", "lora"])
def test_kl_equals_the_textbook(base: str, tmp_path: Path, kind: str) -> None:
    lora = LoraConfig(rank=2, alpha=4) if kind == "lora" else None
    recipe = make_recipe(base, tmp_path, head_kind="low_rank" if kind == "low_rank" else "full", lora=lora)
    model: Any = recipe.build_model()
    assert recipe.probe is not None and len(recipe._held_out) > 3

    def infer(function: Any, tensors: dict[str, Tensor]) -> Any:
        with torch.no_grad():
            return function(model, **tensors)

    recipe.probe.prepare(infer)
    with torch.no_grad():
        for parameter in (*model.backbone_parameters(), *model.head_parameters()):
            parameter += 0.05 * torch.randn_like(parameter)
        expected = textbook_kl(model, base, recipe)
    found = recipe.probe.metrics(infer, model)
    assert min(expected.values()) > 1e-3
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_the_cosine_is_that_of_the_objectives_own_gradients(base: str, tmp_path: Path) -> None:
    recipe = make_recipe(base, tmp_path)
    model: Any = recipe.build_model()
    conflict: Any = recipe.probe._conflict  # type: ignore[union-attr]
    gradients: list[Tensor] = []
    for number in range(2):
        model.zero_grad()
        for part in conflict._parts:
            losses = recipe._losses(model, **part)[0] * part["loss_weight"]
            losses[part["objective"] == number].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.backbone_parameters()]))
        model.zero_grad()
    expected = torch.cosine_similarity(*gradients, dim=0).item()
    assert sum(len(part["objective"]) for part in conflict._parts) == 7
    assert conflict.metrics(model) == pytest.approx(
        {"gradient_cosine/accuracy/engagement": expected}, rel=1e-4
    )
    assert all(parameter.grad is None for parameter in model.parameters()) and model.training


def test_cosines_by_hand() -> None:
    a, b, c = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])], [torch.zeros(2), torch.ones(1)], torch.zeros(2)
    found = cosines({"a": a, "b": b, "c": [c, torch.zeros(1)], "d": [-x for x in b]})
    assert found == pytest.approx(
        {"gradient_cosine/a/b": 0.8, "gradient_cosine/a/d": -0.8, "gradient_cosine/b/d": -1.0}
    )


def test_without_held_out_pairs_the_figures_are_refused(base: str, tmp_path: Path) -> None:
    pairs = world.save_pairs(tmp_path, world.make_pairs())
    policy = PolicyConfig(metrics_every_steps=1)
    with pytest.raises(ValueError, match="needs held-out pairs"):
        PolicyRecipe(world.policy_settings(pairs, base, policy, 0.0, world.MODEL))


def test_the_saved_model_keeps_the_base_head(base: str, tmp_path: Path) -> None:
    recipe = make_recipe(base, tmp_path / "pairs")
    model: Any = recipe.build_model()
    recipe._metrics = {}
    recipe.save(model, model.state_dict(), tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    assert tuple(again.heads) == world.OBJECTIVES and again.base_head is not None
    base_model = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(again.base_head.weight, base_model.get_output_embeddings().weight)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_figures_under_deepspeed(base: str, tmp_path: Path, stage: int) -> None:
    """Between steps, at the values of the plain model, and without touching training."""
    from mahalo_ray.training.deepspeed_engine import build_engine, infer, optimizer_step

    runs: list[list[dict[str, float]]] = []
    for measured in (True, False):
        recipe = make_recipe(base, tmp_path, stage)
        probe: Any = recipe.probe
        engine = build_engine(recipe, recipe._training, torch.float32, 5, 1)
        ask = lambda function, tensors, engine=engine: infer(engine, function, tensors)  # noqa: E731
        probe.prepare(ask)
        losses = []
        for batch in recipe.batches[:3]:
            loss = engine(**recipe.collate(batch, recipe.loss_denominators(batch), True))[0]
            engine.backward(loss)
            assert optimizer_step(engine) is not None
            figures = probe.metrics(ask, engine.module.model) if measured else {}
            losses.append({"loss": loss.item(), **figures})
        runs.append(losses)
        if measured and stage < 3:
            with torch.no_grad():
                expected = textbook_kl(engine.module.model, base, recipe)
            assert {name: losses[-1][name] for name in expected} == pytest.approx(expected, rel=1e-3)
            assert -1 <= losses[-1]["gradient_cosine/accuracy/engagement"] <= 1
        if measured:
            engine.save_checkpoint(str(tmp_path / "checkpoint"), "now")
            expected = figures
    assert [entry["loss"] for entry in runs[0]] == [entry["loss"] for entry in runs[1]]
    # A resumed run measures against the reference, not against where it went on.
    resumed: Any = make_recipe(base, tmp_path, stage)
    engine = build_engine(resumed, resumed._training, torch.float32, 5, 1)
    ask = lambda function, tensors: infer(engine, function, tensors)  # noqa: E731
    resumed.probe.prepare(ask)
    engine.load_checkpoint(str(tmp_path / "checkpoint"), "now")
    assert resumed.probe.metrics(ask, engine.module.model) == pytest.approx(expected, rel=1e-5)
    assert expected["accuracy/kl"] > 0


@pytest.mark.parametrize("stage", [2, 3])
def test_malformed_turns_are_those_sampled_at_the_mixtures(base: str, tmp_path: Path, stage: int) -> None:
    """Turns drawn with a cache from left-padded rows equal those drawn one by one from the mixed logits."""
    from mahalo_ray.training.deepspeed_engine import build_engine, infer

    recipe: Any = make_recipe(base, tmp_path, stage, sampled_turns=6)
    turns: Any = recipe.probe._turns
    engine = build_engine(recipe, recipe._training, torch.float32, 5, 1)
    ask = lambda function, tensors: infer(engine, function, tensors)  # noqa: E731
    seen: list[Tensor] = []

    def remembered(function: Any, tensors: dict[str, Tensor]) -> Any:
        seen.append(ask(function, tensors))
        return seen[-1]

    turns.prepare(ask)
    state = torch.random.get_rng_state()
    rate = turns.metrics(remembered)
    assert torch.equal(state, torch.random.get_rng_state())  # training draws what it would have drawn
    assert rate["malformed_turns"] == rate["malformed_turns_at_start"]
    expected = [sampled_alone(engine.module.model, turns, row) for row in range(6)]
    assert [[token for token in row if token >= 0] for row in seen[0].tolist()] == expected
    ended = [row[-1] in turns._chat.end_ids for row in expected]
    special = [any(token < 5 for token in row[:-1]) for row in expected]
    bad = [not end or inside for end, inside in zip(ended, special, strict=True)]
    assert rate["malformed_turns"] == sum(bad) / 6 and sum(bad) > 0
    assert len({tuple(row) for row in turns._tensors["weights"].tolist()}) == 5


def sampled_alone(model: Any, turns: Any, row: int) -> list[int]:
    """One turn by whole forwards of one unpadded sequence."""
    tensors = turns._tensors
    ids = tensors["input_ids"][row][tensors["attention_mask"][row] == 1].tolist()
    start = len(ids)
    with world.ordinary_attention(model), torch.no_grad(), gathered(list(model.parameters())):
        for draw in tensors["draws"][row]:
            hidden = model.eval().hidden_states(torch.tensor([ids]))[:, -1]
            logits = model.logits(hidden, tensors["weights"][row][None])
            cumulated = logits.float().softmax(-1).cumsum(-1)[0]
            ids.append(min(int((cumulated <= draw).sum()), world.VOCABULARY - 1))
            if ids[-1] in turns._chat.end_ids:
                break
    return ids[start:]


def test_the_alarm_says_what_is_wrong_and_what_to_do() -> None:
    policy = PolicyConfig(metrics_every_steps=20, sampled_turns=40)
    settings = world.policy_settings("pairs", "base", policy)
    few = world.policy_settings("pairs", "base", policy.model_copy(update={"sampled_turns": 5}))
    calm = {"step": 40.0, "accuracy/kl": 0.1, "even/kl": 0.2, "malformed_turns": 0.1}
    calm |= {"malformed_turns_at_start": 0.05, "loss": 9.0}
    assert settings.alarm(calm) is None and settings.alarm({}) is None
    assert "step 40: the KL to the reference is 0.70 nats per token ('even/kl')" in (
        settings.alarm(calm | {"even/kl": 0.7}) or ""
    )
    alarm = settings.alarm(calm | {"malformed_turns": 0.3}) or ""
    assert few.alarm(calm | {"malformed_turns": 0.3}) is None  # one turn or two
    assert "30% of sampled turns are malformed (5% at the start)" in alarm and "policy.max_kl" in alarm
