"""Recipes on their own, in one process: their losses by hand, and that splitting a batch changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training_world as world
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mahalo_ray.config import PolicyConfig, RewardConfig, TrainingConfig
from mahalo_ray.data.records import Message
from mahalo_ray.training.batches import split_batch
from mahalo_ray.training.deepspeed_engine import check_shards_finite
from mahalo_ray.training.loop import NonFiniteError, WorkerSplit, restore_random_states, stop_unless_finite
from mahalo_ray.training.pairs import pair_inputs, split_key
from mahalo_ray.training.policy_recipe import PolicyRecipe
from mahalo_ray.training.recipe import Recipe
from mahalo_ray.training.reference_logps import read_store, write_store
from mahalo_ray.training.reward_data import LabelledTraces, add_traces
from mahalo_ray.training.reward_recipe import RewardRecipe
from mahalo_ray.training.sft_recipe import SftRecipe

pytestmark = pytest.mark.usefixtures("one_process")


TRAINING = TrainingConfig(
    batch_size=8, micro_batch_size_per_device=8, logit_chunk_size=5, epochs=2, zero_stage=2
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.make_base(tmp_path_factory.mktemp("base"))


def make_recipe(kind: str, base: str, folder: Path, **policy: float) -> Any:
    if kind == "sft":
        return SftRecipe(world.sft_settings(world.make_examples(folder), base, TRAINING))
    if kind == "policy":
        pairs = world.save_pairs(folder, world.make_pairs())
        settings = PolicyConfig(alpha={"engagement": 2.0}, head_noise=0.5, training=TRAINING, **policy)
        return PolicyRecipe(world.policy_settings(pairs, base, settings, 0.2, world.MODEL))
    traces = world.save_traces(folder / "traces", world.make_traces())
    pairs = world.save_pairs(folder / "pairs", world.make_pairs((12,), ("safety",)))
    reward = RewardConfig(training=TRAINING, held_out_fraction=0.2)
    return RewardRecipe(world.reward_settings(traces, pairs, base, reward))


@pytest.fixture(scope="module", params=["sft", "policy", "reward"])
def recipe(request: pytest.FixtureRequest, base: str, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_recipe(request.param, base, tmp_path_factory.mktemp(request.param))  # type: ignore[no-any-return]


def built(recipe: Recipe) -> nn.Module:
    torch.manual_seed(0)
    return recipe.build_model()


def step(
    recipe: Recipe, model: nn.Module, batch: Any, workers: int, rows: int, accumulation: int
) -> list[Tensor]:
    """Loss, metric sums and gradients of one global batch, split in the given way."""
    model.zero_grad()
    loss_denominators = recipe.loss_denominators(batch)
    loss, sums = torch.zeros(()), torch.zeros(len(recipe.metric_names))
    for shares in split_batch(batch, recipe.row_groups, rows, workers, accumulation):
        for units in shares:
            real = len(units) > 0
            part, row_losses, metrics = recipe.loss(
                model, **recipe.collate(units if real else batch[:1], loss_denominators, real)
            )
            part.backward()
            assert len(row_losses) == len(recipe.row_names(units if real else batch[:1]))
            loss, sums = loss + part.detach(), sums + metrics
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss, sums, *gradients]


@pytest.mark.parametrize(("workers", "rows", "accumulation"), [(1, 3, 4), (2, 4, 2), (3, 8, 1), (4, 3, 3)])
def test_splitting_a_batch_changes_nothing(
    recipe: Recipe, workers: int, rows: int, accumulation: int
) -> None:
    model, batch = built(recipe), recipe.batches[0]
    whole = step(recipe, model, batch, 1, 64, 1)
    whole = [tensor.clone() for tensor in whole]
    parts = step(recipe, model, batch, workers, rows, accumulation)
    for one, many in zip(whole, parts, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-4, atol=1e-6)


def test_sft_loss_is_the_mean_over_all_counted_tokens(base: str, tmp_path: Path) -> None:
    recipe = make_recipe("sft", base, tmp_path)
    batch = recipe.batches[0]
    reference, total, count = AutoModelForCausalLM.from_pretrained(base), torch.zeros(()), 0
    for unit in batch:
        ids, mask = torch.tensor(recipe._inputs[unit]), torch.tensor(recipe._masks[unit])
        logps = reference(ids[None]).logits[0, :-1].log_softmax(-1)
        total = total - logps.gather(1, ids[1:, None])[mask[1:]].sum()
        count += int(mask[1:].sum())
    loss = step(recipe, built(recipe), batch, 2, 3, 2)[0]
    torch.testing.assert_close(loss, (total / count).detach())


def test_sft_loads_the_weights_of_a_base_without_safetensors(tmp_path: Path) -> None:
    base = Path(world.make_base(tmp_path / "base"))
    settings = world.sft_settings(world.make_examples(tmp_path / "examples"), str(base), TRAINING)
    expected = AutoModelForCausalLM.from_pretrained(base).state_dict()
    (base / "model.safetensors").unlink()
    # Nothing to load: never random weights, unless they are asked for.
    with pytest.raises(ValueError, match=rf"the model in '{base}' cannot be loaded"):
        SftRecipe(settings).build_model()
    torch.save(expected, base / "pytorch_model.bin")
    loaded: Any = SftRecipe(settings).build_model()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, expected[name])
    # Cut short: transformers would fill in random numbers and log it.
    norm = expected.pop("model.norm.weight")
    torch.save(expected, base / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"the weights in '{base}' lack model\.norm\.weight"):
        SftRecipe(settings).build_model()
    # A NaN is found before the first step.
    torch.save(expected | {"model.norm.weight": norm * torch.nan}, base / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=rf"'model\.norm\.weight' of the model in '{base}' holds values that are not finite"
    ):
        check_shards_finite(SftRecipe(settings).build_model())
    (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n")
    with pytest.raises(ValueError, match=rf"{base}/model\.safetensors is a git-LFS pointer"):
        SftRecipe(settings).build_model()
    scratch = world.sft_settings(settings.examples_url, str(base), TRAINING, world.SCRATCH)
    made: Any = SftRecipe(scratch).build_model()
    weight = "model.embed_tokens.weight"
    assert not torch.equal(made.model.state_dict()[weight], expected[weight])


def test_policy_loss_with_weights_margins_and_a_beta_per_objective(base: str, tmp_path: Path) -> None:
    """Per objective sum w loss / sum w, with its own beta and every pair's margin within the sigmoid."""
    rng = np.random.default_rng(8)
    pairs = [
        pair.model_copy(update={"weight": float(rng.uniform(0.2, 3)), "margin": float(rng.normal())})
        for pair in world.make_pairs()
    ]
    beta = {"accuracy": 0.4, "engagement": 1.5}
    policy = PolicyConfig(alpha={"engagement": 2.0}, beta=beta, head_noise=0.5, training=TRAINING)
    plain = make_recipe("policy", base, tmp_path / "plain")
    recipe = PolicyRecipe(
        world.policy_settings(world.save_pairs(tmp_path, pairs), base, policy, 0.2, world.MODEL)
    )
    assert recipe._settings.identity() != plain._settings.identity()
    model, batch = built(recipe), recipe.batches[0]
    tensors = recipe.collate(batch, recipe.loss_denominators(batch), True)
    heads = tensors["objective"].repeat(2)
    with torch.no_grad():
        own = model.completion_logps(**pair_inputs(tensors), head_index=heads)
    gains = own.view(2, -1).T - recipe._reference[batch]
    expected, losses = 0.0, {}
    for number, (name, alpha) in enumerate(zip(world.OBJECTIVES, (1.0, 2.0), strict=True)):
        total, weights = 0.0, 0.0
        for row, unit in enumerate(batch):
            pair = pairs[unit]
            if recipe._pairs.objective[unit] == number:
                x = beta[name] * (gains[row, 0] - gains[row, 1]).item() - pair.margin
                total += pair.weight * math.log1p(math.exp(-x))
                weights += pair.weight
        losses[name] = total / weights
        expected += alpha * losses[name]
    for split in ((1, 64, 1), (2, 3, 3)):
        found = step(recipe, model, batch, *split)
        assert found[0].item() == pytest.approx(expected, rel=1e-4)
        figures = recipe.summarise(dict(zip(recipe.metric_names, found[1].tolist(), strict=True)))
        assert {name: figures[f"{name}/loss"] for name in losses} == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize(("anchor", "penalty"), [(0.0, 0.0), (0.3, 0.0), (0.0, 4.0), (0.3, 4.0)])
def test_policy_loss_by_hand(base: str, tmp_path: Path, anchor: float, penalty: float) -> None:
    """sum_i alpha_i mean_i -log sigmoid(beta (gain of chosen - gain of rejected)), every pair under its own
    head; with the anchor, and DPO-Positive's penalty for a chosen answer that lost likelihood."""
    recipe = make_recipe("policy", base, tmp_path, chosen_anchor=anchor, chosen_penalty=penalty)
    model, batch = built(recipe), recipe.batches[0]
    reference: Any = AutoModelForCausalLM.from_pretrained(base)
    losses: dict[int, list[Tensor]] = {0: [], 1: []}
    frozen_chosen, lost_some = torch.zeros(()), 0
    for unit in batch:
        objective, pairs = int(recipe._pairs.objective[unit]), recipe._pairs
        gains = []
        for completion in (pairs.chosen[unit], pairs.rejected[unit]):
            ids = torch.tensor([pairs.prompts[unit] + completion])
            start = len(pairs.prompts[unit]) - 1
            target = ids[0, start + 1 :, None]
            head = model.heads[world.OBJECTIVES[objective]].weight
            with world.ordinary_attention(model):
                hidden = model.hidden_states(ids)
            own = F.linear(hidden, head)[0, start:-1].log_softmax(-1).gather(1, target).sum()
            frozen = reference(ids).logits[0, start:-1].log_softmax(-1).gather(1, target).sum()
            gains.append(own - frozen)
            frozen_chosen = frozen if len(gains) == 1 else frozen_chosen
        lost = max(0.0, -gains[0].item())
        lost_some += lost > 0
        anchored = anchor * -(gains[0] + frozen_chosen) / len(pairs.chosen[unit])
        losses[objective].append(-F.logsigmoid(0.1 * (gains[0] - gains[1] - penalty * lost)) + anchored)
    assert lost_some > 0
    expected = 1.0 * torch.stack(losses[0]).mean() + 2.0 * torch.stack(losses[1]).mean()
    found = step(recipe, model, batch, 1, 64, 1)
    torch.testing.assert_close(found[0], expected.detach(), rtol=1e-4, atol=1e-5)
    figures = recipe.summarise(dict(zip(recipe.metric_names, found[1].tolist(), strict=True)))
    assert figures["engagement/loss"] == pytest.approx(torch.stack(losses[1]).mean().item(), rel=1e-4)


def test_policy_holds_whole_prompts_out(base: str, tmp_path: Path) -> None:
    recipe = make_recipe("policy", base, tmp_path)
    trained = set(np.concatenate(recipe.batches).tolist())
    aside = set(recipe._held_out.tolist())
    assert aside and not trained & aside and len(trained | aside) == len(recipe.row_groups)
    prompts = [tuple(ids) for ids in recipe._pairs.prompts]
    assert not {prompts[row] for row in trained} & {prompts[row] for row in aside}


def test_a_dialogue_falls_on_one_side_of_a_split() -> None:
    first, second = world.make_pairs((1, 1))
    together = [pair.model_copy(update={"dialogue": "d1"}) for pair in (first, second)]
    apart = second.model_copy(update={"prompt": [*second.prompt, *second.prompt]})
    assert split_key(together[0]) == split_key(together[1].model_copy(update={"prompt": apart.prompt}))
    assert split_key(first) == split_key(second)  # the same prompt
    assert split_key(first) != split_key(apart)


def test_reward_loss_by_hand(base: str, tmp_path: Path) -> None:
    recipe = make_recipe("reward", base, tmp_path)
    model, batch, data = built(recipe), recipe.batches[0], recipe.data
    values: dict[str, list[Tensor]] = {kind: [] for kind in ("mse", "bce", "bt", "rank0", "rank1")}
    for unit in batch:
        scores = [model.step_scores(*scoring(recipe, row))[0] for row in data.members[unit]]
        labels = [torch.from_numpy(data.labels[row]) for row in data.members[unit]]
        if data.pair_objective[unit] >= 0:
            values["bt"].append(-F.logsigmoid(scores[0][0, 2] - scores[1][0, 2]))
            continue
        for own, known in zip(scores, labels, strict=True):
            values["mse"] += [(own[1, 0] - known[1, 0]) ** 2 / recipe._variance[0]]
            values["bce"] += [
                F.binary_cross_entropy_with_logits(own[t, 1], known[t, 1]) for t in (0, 1) if known[t, 1] >= 0
            ]
        for column, scale in ((0, recipe._spread[0]), (1, 1.0)):
            for t in (0, 1):
                for i in range(len(scores)):
                    for j in range(len(scores)):
                        if labels[i][t, column] - labels[j][t, column] > 0.02:
                            gap = (scores[i][t, column] - scores[j][t, column]) / scale
                            values[f"rank{column}"].append(-F.logsigmoid(gap))
    expected = torch.stack([torch.stack(v).mean() for v in values.values() if v]).sum()
    found = step(recipe, model, batch, 1, 64, 1)[0]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


def scoring(recipe: Any, row: int) -> tuple[Tensor, None, Tensor, Tensor]:
    tokens = recipe.data.tokens[row]
    return (
        torch.tensor([tokens.input_ids]),
        None,
        torch.tensor([tokens.starts]),
        torch.tensor([tokens.ends]),
    )


def test_a_loss_that_is_not_finite_names_objective_and_row(base: str, tmp_path: Path) -> None:
    recipe = make_recipe("policy", base, tmp_path)
    model, batch = built(recipe), recipe.batches[0]
    bad = int(batch[2])
    recipe._reference[bad, 0] = torch.nan
    output = recipe.loss(model, **recipe.collate(batch, recipe.loss_denominators(batch), True))
    with pytest.raises(NonFiniteError) as caught:
        stop_unless_finite(recipe, [(batch, output)], step=6)
    name = recipe.row_names(np.array([bad]))[0]
    assert name.split()[0] in world.OBJECTIVES
    assert f"step 7: the loss is not finite (NaN or infinity) for {name};" in str(caught.value)


def test_reference_log_probs_are_computed_once_and_checked_row_by_row(base: str, tmp_path: Path) -> None:
    recipe = make_recipe("policy", base, tmp_path)
    (file,) = (tmp_path / ".reference").glob("*.parquet")
    written = file.stat().st_mtime_ns
    pairs = recipe._pairs
    make_recipe("policy", base, tmp_path)
    # make_recipe wrote the same pairs again; their log-probs were found.
    assert file.stat().st_mtime_ns == written
    known = read_store(str(file))
    number = {name: row for row, name in enumerate(pairs.ids)}
    stored = {name: known[pairs.row_hash(number[name])] for name in ("a3", "a4")}
    assert stored["a3"] == pytest.approx(recipe._reference[number["a3"]].tolist())
    # A row that the store lacks is computed again, the others stay as they are there.
    del known[pairs.row_hash(number["a3"])]
    write_store(str(file), {**known, pairs.row_hash(number["a4"]): (-7.0, -8.0)})
    again = make_recipe("policy", base, tmp_path)
    assert again._reference[number["a3"]].tolist() == recipe._reference[number["a3"]].tolist()
    assert again._reference[number["a4"]].tolist() == [-7.0, -8.0]
    assert read_store(str(file))[pairs.row_hash(number["a3"])] == pytest.approx(stored["a3"])


def test_bad_pairs_are_named(base: str, tmp_path: Path) -> None:
    pairs = world.make_pairs()
    same = pairs[3].model_copy(update={"rejected": pairs[3].chosen})
    unknown = pairs[3].model_copy(update={"objective": "acuracy"})
    for wrong, message in (
        (same, "pair 'a3': chosen and rejected are the same"),
        (unknown, "pair 'a3': .*Did you mean 'accuracy'"),
        (pairs[4].model_copy(update={"id": "a5"}), "'a5' occurs twice"),
    ):
        folder = tmp_path / wrong.id / wrong.objective
        url = world.save_pairs(folder, [*pairs[:3], wrong, *pairs[5:]])
        with pytest.raises(ValueError, match=message):
            PolicyRecipe(world.policy_settings(url, base, PolicyConfig(), 0.0, world.MODEL))
    url = world.save_pairs(tmp_path / "one", [pair for pair in pairs if pair.objective == "accuracy"])
    with pytest.raises(ValueError, match="'engagement' has no preference pairs"):
        PolicyRecipe(world.policy_settings(url, base, PolicyConfig(training=TRAINING), 0.0, world.MODEL))


def test_a_pair_that_the_chat_template_refuses_is_named(tmp_path: Path) -> None:
    base = world.make_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    strict = "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = world.TEMPLATE.replace("<{{ m.role }}>", strict + "<{{ m.role }}>")
    tokenizer.save_pretrained(base)
    pairs = world.make_pairs()
    prompt = [Message(role="system", content="be kind"), *pairs[3].prompt]
    pairs[3] = pairs[3].model_copy(update={"prompt": prompt})
    url = world.save_pairs(tmp_path / "pairs", pairs)
    with pytest.raises(ValueError, match=r"pair 'a3': .*no system role"):
        PolicyRecipe(world.policy_settings(url, base, PolicyConfig(training=TRAINING)))


def test_a_checkpoint_of_cpus_goes_on_on_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds no random state of a GPU; the CPU's is restored."""
    state = torch.get_rng_state()
    torch.save({"cpu": state}, tmp_path / "random_0.pt")
    torch.rand(3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    restore_random_states(tmp_path / "random_0.pt")
    assert torch.equal(torch.get_rng_state(), state)


def test_too_long_pairs_are_cut_and_counted(base: str, tmp_path: Path) -> None:
    url = world.save_pairs(tmp_path, world.make_pairs())
    short = world.MODEL.model_copy(update={"max_length": 14})
    recipe = PolicyRecipe(world.policy_settings(url, base, PolicyConfig(training=TRAINING), 0.0, short))
    pairs = recipe._pairs
    answers = [max(len(c), len(r)) for c, r in zip(pairs.chosen, pairs.rejected, strict=True)]
    assert max(len(p) + a for p, a in zip(pairs.prompts, answers, strict=True)) == 14
    assert 0 < pairs.cut < len(recipe.row_groups)


def test_sharing_prompts_changes_the_tokens_read_and_not_the_loss(base: str, tmp_path: Path) -> None:
    url, found = world.save_pairs(tmp_path, world.make_pairs()), []
    for share in ("always", "never"):
        policy = PolicyConfig(share_prompts=share, training=TRAINING)
        recipe = PolicyRecipe(world.policy_settings(url, base, policy, 0.2, world.MODEL))
        batch = recipe.batches[0]
        found.append((step(recipe, built(recipe), batch, 1, 64, 1), recipe.row_groups.tokens[batch].sum()))
    (shared, few), (padded, many) = found
    for one, other in zip(shared, padded, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert few < 0.8 * many


def test_prompts_that_cannot_be_shared_are_refused_on_demand(base: str, tmp_path: Path) -> None:
    url = world.save_pairs(tmp_path, world.make_pairs())
    eager = world.MODEL.model_copy(update={"attn_implementation": "eager"})
    policy = PolicyConfig(share_prompts="always", training=TRAINING)
    with pytest.raises(ValueError, match=r"share_prompts: always.*'eager', not 'sdpa'"):
        PolicyRecipe(world.policy_settings(url, base, policy, 0.2, eager))
    policy = PolicyConfig(training=TRAINING)
    recipe = PolicyRecipe(world.policy_settings(url, base, policy, 0.2, eager))
    assert "attention_mask" in recipe.collate(np.arange(2), {"accuracy": 1.0, "engagement": 1.0}, True)


def test_traces_are_cut_at_steps_and_bad_labels_named() -> None:
    traces = [
        trace.model_copy(update={"token_ids": list(range(20)), "step_starts": [4, 9], "step_ends": [8, 19]})
        for trace in world.make_traces(2)
    ]
    data = LabelledTraces()
    add_traces(data, traces, world.SUPERVISION, None, 15, by_group=True)  # type: ignore[arg-type]
    assert data.cut == 6 and [len(rows) for rows in data.members] == [3, 3]
    assert all(tokens.ends == [8] and len(tokens.input_ids) == 15 for tokens in data.tokens)
    for labels, message in (
        ({"accuracy": [0.5]}, "2 steps, but 1 labels"),
        ({"engagement": [0.5, 1.5]}, "must lie in 0..1"),
        ({"safety": [1.0, None]}, "supervised by pairs"),
        ({"acuracy": [1.0, None]}, "Did you mean 'accuracy'"),
    ):
        wrong = traces[0].model_copy(update={"labels": labels})
        with pytest.raises(ValueError, match=f"'t0.0'.*{message}"):
            add_traces(LabelledTraces(), [wrong], world.SUPERVISION, None, 15, by_group=True)  # type: ignore[arg-type]


def test_checkpoints_of_another_split_are_refused() -> None:
    saved = {"workers": 2, "accumulation": 1}
    WorkerSplit(2, 1).check(saved, "there")
    with pytest.raises(ValueError, match=r"written by 2 workers, this run has 3.*train_workers to 2"):
        WorkerSplit(3, 1).check(saved, "there")
    with pytest.raises(ValueError, match=r"1 micro-batches per step .* this run has 4"):
        WorkerSplit(2, 4).check(saved, "there")


def test_a_run_is_known_by_its_settings_and_data(base: str, tmp_path: Path) -> None:
    """Checkpoints lie under this name: other data, settings or seeds never meet them."""
    url = world.save_pairs(tmp_path / "pairs", world.make_pairs())
    policy = PolicyConfig(training=TRAINING)
    same = world.policy_settings(url, base, policy).identity()
    assert world.policy_settings(url, base, PolicyConfig(training=TRAINING)).identity() == same
    tracked = PolicyConfig(training=TRAINING.model_copy(update={"report_to": ["tensorboard"]}))
    assert world.policy_settings(url, base, tracked).identity() == same  # changes no result
    others = [
        world.policy_settings(url, base, PolicyConfig(training=TRAINING, beta=0.2)),
        world.policy_settings(url, base, policy, seed=6),
        world.policy_settings(url, base, policy, held_out=0.3),
        world.policy_settings(world.save_pairs(tmp_path / "fewer", world.make_pairs()[:5]), base, policy),
    ]
    assert len({same, *(other.identity() for other in others)}) == 5
