"""Heads of new objectives on a trained policy: trained alone, against the base, and nothing else moves."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_world as world
from tiny_policies import OBJECTIVES, V, policy
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from mahalo_ray.cli import app
from mahalo_ray.config import (
    AdaptersConfig,
    ConfigError,
    LoraConfig,
    ModelConfig,
    PolicyConfig,
    TrainingConfig,
    load_config,
)
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.objectives import Weights
from mahalo_ray.planning import make_plan
from mahalo_ray.training.policy_recipe import PolicyRecipe
from mahalo_ray.training.settings import PolicySettings
from mahalo_ray.training.trainer import PolicyTrainer

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.yaml"
IDS = torch.tensor([[5, 9, 11, 4, 7], [8, 3, 12, 6, 10]])
OLD = Weights.parse("accuracy=0.5,engagement=0.2,brevity=0.3")
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "low_rank": {"head_kind": "low_rank", "rank": 3},
    "lora": {"lora": LoraConfig(rank=2, dropout=0.5)},
    "adapters": {"adapters": AdaptersConfig(depth=1, rank=2)},
}


def trained(kind: str) -> MultiHeadCausalLM:
    """A policy of three heads, all of whose parameters have moved."""
    settings = dict(KINDS[kind])
    lora = settings.pop("lora", None)
    model = policy(keep_base_head=True, **settings)
    if lora is not None:
        model.add_lora(lora)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_leaves_all_others_as_they_are(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    rows = torch.tensor([[0.5, 0.2, 0.3], [0.0, 1.0, 0.0]])
    with torch.no_grad():
        before = [model(IDS, weights=weights, strength=1.3).logits for weights in (OLD, rows)]
        merged = model.merge(OLD)(IDS).logits
        states = model.hidden_states(IDS)
    model.add_heads(["honesty", "warmth"], noise=0.1, seed=42)
    assert model.objectives == (*OBJECTIVES, "honesty", "warmth")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(name.startswith(("heads.honesty", "heads.warmth")) for name in trainable)
    model.train()  # as an engine does; a frozen backbone drops nothing out
    model.save_pretrained(tmp_path, with_backbone=True)
    for one in (model, MultiHeadCausalLM.from_pretrained(tmp_path).eval()):
        wider = torch.cat([rows, torch.zeros(2, 2)], dim=1)
        with torch.no_grad():
            after = [one(IDS, weights=weights, strength=1.3).logits for weights in (OLD, wider)]
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
            assert torch.equal(one.merge(OLD)(IDS).logits, merged)
            new = one(IDS, weights=Weights.one("warmth")).logits
            assert torch.equal(new, one.head("warmth")(states)) and new.shape[-1] == V
            # A new objective has no adapters, so its share of a mixture is the backbone by itself.
            half = Weights({**{name: 0.5 * w for name, w in OLD.items()}, "honesty": 0.5})
            torch.testing.assert_close(one(IDS, weights=half).logits, one.merge(half)(IDS).logits)
    # It starts as every head does: joint training would begin with the same one.
    fresh = policy(keep_base_head=True, **{k: v for k, v in KINDS[kind].items() if k != "lora"})
    assert fresh.base_head is not None and model.base_head is not None
    assert torch.equal(fresh.base_head.weight, model.base_head.weight)
    noise = model.head("warmth").weight - model.base_head.weight
    assert 0.05 < float(noise.detach().std()) < 0.2
    with pytest.raises(ValueError, match="has a head for honesty already"):
        model.add_heads(["speed", "honesty"])
    with pytest.raises(ValueError, match=r"set_base_head\(SFT_MODEL\)"):
        policy().add_heads(["speed"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.make_base(tmp_path_factory.mktemp("base"))


def save_policy(base: str, folder: Path, **options: Any) -> str:
    """A policy with a head for accuracy, whose backbone is no longer the base's."""
    options = {"keep_base_head": True, **options}
    model = MultiHeadCausalLM.from_base(base, ["accuracy"], noise=0.3, **options)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.backbone_parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, AutoTokenizer.from_pretrained(base))
    return str(folder)


@pytest.fixture(scope="module")
def one_head(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(base, tmp_path_factory.mktemp("one_head"))


def settings_of(pairs: str, base: str, extends: str, **changes: Any) -> PolicySettings:
    training = TrainingConfig(batch_size=8, micro_batch_size_per_device=4, zero_stage=0)
    given = {"extends": extends, "head_noise": 0.3, "metrics_every_steps": 1, "training": training}
    policy = PolicyConfig.model_validate({**given, **changes})
    made = world.policy_settings(pairs, base, policy, 0.3, world.MODEL)
    return replace(made, objectives=("engagement",))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("objective", ["engagement", "accuracy"])
def test_loss_and_kl_are_against_the_base(objective: str, base: str, one_head: str, tmp_path: Path) -> None:
    """Of a new head, and where the policy itself is trained on (`start_url`)."""
    pairs = world.save_pairs(tmp_path, world.make_pairs((14,), (objective,)))
    settings = settings_of(pairs, base, one_head)
    if objective == "accuracy":
        policy = settings.policy.model_copy(update={"extends": None})
        settings = replace(settings, policy=policy, start_url=one_head, objectives=(objective,))
    recipe = PolicyRecipe(settings)
    model: Any = recipe.build_model()
    groups = recipe.parameter_groups(model)
    assert [id(p) for p in groups[-1]["params"]] == [id(model.head(objective).weight)]
    assert (len(groups) == 1) == (objective == "engagement")
    reference: Any = AutoModelForCausalLM.from_pretrained(base)

    def both(row: int, completions: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probs [T, V] under the new head and the base, and the tokens."""
        prompt, ids = recipe._pairs.prompts[row], torch.tensor(completions[row])
        whole, start = torch.tensor([[*prompt, *completions[row]]]), len(prompt) - 1
        with torch.no_grad(), world.ordinary_attention(model):
            states = model.hidden_states(whole)[0, start:-1]
            logits = reference(whole).logits[0, start:-1]
            return model.head(objective)(states).log_softmax(-1), logits.log_softmax(-1), ids

    losses = []
    for row in recipe.batches[0]:
        gains = []
        for completions in (recipe._pairs.chosen, recipe._pairs.rejected):
            new, old, ids = both(row, completions)
            gains.append(float((new - old).gather(1, ids[:, None]).sum()))
        losses.append(math.log1p(math.exp(-0.1 * (gains[0] - gains[1]))))
    tensors = recipe.collate(recipe.batches[0], recipe.loss_denominators(recipe.batches[0]), True)
    assert recipe.loss(model, **tensors)[0].item() == pytest.approx(np.mean(losses), rel=1e-4)

    def infer(function: Any, inputs: dict[str, torch.Tensor]) -> Any:
        with torch.no_grad():
            return function(model, **inputs)

    assert recipe.probe is not None
    recipe.probe.prepare(infer)
    kl, tokens = 0.0, 0
    for row in recipe._held_out:
        new, old, ids = both(row, recipe._pairs.chosen)
        kl, tokens = kl + float((new.exp() * (new - old)).sum()), tokens + len(ids)
    found = recipe.probe.metrics(infer, model)
    assert {name for name in found if name.endswith("/kl")} == {f"{objective}/kl"}
    assert found[f"{objective}/kl"] == pytest.approx(kl / tokens, rel=1e-4)


@pytest.mark.usefixtures("one_process")
def test_what_cannot_be_extended_is_said(base: str, one_head: str, tmp_path: Path) -> None:
    pairs = world.save_pairs(tmp_path / "pairs", world.make_pairs((4,), ("engagement",)))
    other = tmp_path / "other"
    world.make_base(other)
    model: Any = AutoModelForCausalLM.from_pretrained(other)
    model.lm_head.weight.data += 0.1
    model.save_pretrained(other)
    template = tmp_path / "template"
    world.make_base(template)
    tokenizer = AutoTokenizer.from_pretrained(template)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(template)
    bare = save_policy(base, tmp_path / "bare", keep_base_head=False)
    for where, extends, changes, message in (
        (str(other), one_head, {}, "made from another model than the base in"),
        (str(template), one_head, {}, "differ in the chat template of their tokenizers"),
        (base, bare, {}, r"saved without its base head.*set_base_head"),
        (base, base, {}, "holds no mahalo.json"),
        (base, one_head, {"head_kind": "low_rank"}, r"of another kind: set 'policy' to \{head_kind: full\}"),
    ):
        with pytest.raises(ValueError, match=message):
            PolicyRecipe(settings_of(pairs, where, extends, **changes))
    narrow = settings_of(pairs, base, one_head)
    model_config = narrow.model.model_copy(update={"dtype": "bfloat16"})
    with pytest.raises(ValueError, match=r"stored in float32, and .* is bfloat16"):
        PolicyRecipe(replace(narrow, model=model_config))
    rows = [{"prompt": "ab", "chosen": "cd", "rejected": "ef"}]
    extending = PolicyConfig(extends=one_head)
    with pytest.raises(ValueError, match="has a head for each of accuracy already"):
        PolicyTrainer(base, rows, extending, objective="accuracy")
    with pytest.raises(ValueError, match="not a policy in memory"):
        in_memory = MultiHeadCausalLM.from_base(base, ["engagement"], keep_base_head=True)
        PolicyTrainer(in_memory, rows, extending, tokenizer=AutoTokenizer.from_pretrained(base))
    for settings, message in (
        ({"lora": {}}, "'lora' is for training that changes the backbone"),
        ({"adapters": {"depth": 1}}, "'adapters' is for training"),
        ({"gradient_cosine": True, "metrics_every_steps": 1, "training": {"zero_stage": 0}}, "'gradient_c"),
        ({"method": "dpo", "objective": "accuracy"}, "'method: dpo' has one head"),
    ):
        with pytest.raises(ValueError, match=message):
            PolicyConfig.model_validate({"extends": "x", **settings})
    sweep = "sweep={kind: training, weights: [{accuracy: 1}]}"
    with pytest.raises(ConfigError, match="trains policies as a whole"):
        load_config(QUICKSTART, ["policy.extends=x", sweep])


@pytest.mark.parametrize("kind", ["full", "low_rank"])
def test_the_plan_is_that_of_a_head(kind: str, base: str, tmp_path: Path) -> None:
    options = {"head_kind": kind, "rank": 3}
    folder = save_policy(base, tmp_path / "policy", **options)
    head = {"head_kind": kind} if kind == "full" else {"head_kind": kind, "head_rank": 3}
    settings = PolicyConfig.model_validate({"extends": folder, **head})
    counts = make_plan(ModelConfig(base=base), settings, 1, 1).counts
    model = MultiHeadCausalLM.from_pretrained(folder)
    model.add_heads(["engagement"])
    assert counts.trained == sum(p.numel() for p in model.head_parameters())
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.heads == 2 * counts.trained


def document(folder: Path, base: str, extends: str) -> Path:
    """A run on own pairs that adds engagement to a policy."""
    pairs = world.make_pairs((12,), ("engagement",))
    lines = [{"prompt": p.prompt[0].content, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (folder / "run.yaml").write_text(f"""
name: new_head
output: {folder}/out
objectives: [{{name: accuracy, supervision: pairwise}}, {{name: engagement, supervision: pairwise}}]
data: {{pairs: [{{path: {folder}/pairs.jsonl, objective: engagement}}]}}
model: {{base: {base}, max_length: 64}}
cluster: {{train_workers: 1}}
policy:
  extends: {extends}
  beta: {{accuracy: 0.1, engagement: 0.5}}
  training: {{max_steps: 2, batch_size: 4, zero_stage: 0}}
""")
    return folder / "run.yaml"


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2 and "Traceback" not in result.output
    return " ".join(result.output.split())


def test_a_document_names_the_policy_that_is_extended(base: str, one_head: str, tmp_path: Path) -> None:
    file = str(document(tmp_path, base, one_head))
    planned = json.loads(invoke("plan", file, "--json"))["counts"]
    assert planned["trained"] == world.VOCABULARY * 16 and planned["heads"] == 2 * planned["trained"]
    assert "pairs" in invoke("pairs", file)
    manifest = json.loads((tmp_path / "out" / "pairs" / "manifest.json").read_text())
    assert manifest["metrics"]["pairs"] == {"engagement": 12}  # none of accuracy, and none are asked for
    source = "data.pairs.0.objective=accuracy"
    assert "has a head for 'accuracy' already" in refused("pairs", file, "--set", source)
    assert "has no stage 'reward" in refused("reward", file)
    assert "there is no policy model at" in refused("policy", file, "--set", "policy.extends=nowhere")
    only = "objectives=[{name: accuracy, supervision: pairwise}]"
    assert "a head for each of accuracy already" in refused(
        "policy", file, "--set", only, "--set", source, "--set", "policy.beta=0.1"
    )
    inside = shutil.copytree(one_head, tmp_path / "out" / "old")
    assert "lies in the output folder" in refused("policy", file, "--set", f"policy.extends={inside}")


@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed_alone")
def test_a_trainer_trains_the_new_head_alone(base: str, one_head: str) -> None:
    """Under ZeRO-3, where no worker has the whole of what stays."""
    training = TrainingConfig(batch_size=8, max_steps=2, report_every_steps=1, zero_stage=3)
    settings = PolicyConfig(extends=one_head, metrics_every_steps=2, training=training)
    trainer = PolicyTrainer(
        base,
        world.make_pairs((14,), ("engagement",)),
        settings,
        objectives=world.OBJECTIVES,
        max_length=64,
        held_out_fraction=0.3,
    )
    metrics = trainer.train()
    assert metrics["engagement/kl"] > 0 and "learning_rate/backbone" not in metrics
    old, new = MultiHeadCausalLM.from_pretrained(one_head), trainer.model
    assert new.objectives == world.OBJECTIVES
    state = new.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in old.state_dict().items())
    start = MultiHeadCausalLM.from_base(base, world.OBJECTIVES, seed=17).head("engagement").weight
    assert not torch.equal(new.head("engagement").weight, start)
