"""Plans against what a real run of the same model holds in memory and on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import training_world as world
import yaml
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config
from typer.testing import CliRunner

from mahalo_ray.cli import app
from mahalo_ray.config import LoraConfig, ModelConfig, PolicyConfig, TrainingConfig, load_document
from mahalo_ray.config.describe import DOCUMENTS, kind_of
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.planning import Memory, Plan, make_plan

EXAMPLE = Path(__file__).parents[1] / "examples" / "quickstart.yaml"
IDS = torch.tensor([[7, 9, 11, 5, 30], [8, 8, 12, 29, 6]])
KINDS: dict[str, dict[str, Any]] = {
    "full heads": {},
    "low-rank heads": {"head_kind": "low_rank", "head_rank": 3},
    "LoRA": {"lora": LoraConfig(rank=3)},
}


def real_policy(base: str, policy: PolicyConfig) -> MultiHeadCausalLM:
    model = MultiHeadCausalLM.from_base(
        base, world.OBJECTIVES, head_kind=policy.head_kind, rank=policy.head_rank, keep_base_head=True
    )
    if policy.lora is not None:
        model.add_lora(policy.lora)
    return model


def plan_of(base: str, policy: PolicyConfig, gpus: int = 1, dtype: str = "float32") -> Plan:
    return make_plan(ModelConfig(base=base, dtype=dtype), policy, 2, gpus)  # type: ignore[arg-type]


def way(plan: Plan, stage: int, optimizer: bool = False, parameters: bool = False) -> Memory:
    wanted = (stage, optimizer, parameters)
    return next(m for m in plan.memory if (m.zero_stage, m.offload_optimizer, m.offload_parameters) == wanted)


def bytes_of(tensors: Any) -> int:
    """Of the storages, each once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def loss_of(model: MultiHeadCausalLM) -> Tensor:
    logps = model.completion_logps(IDS, None, torch.roll(IDS, -1, 1), torch.tensor([0, 1]), 4)
    return -logps.sum()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.make_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_run_holds_what_the_plan_says(kind: str, base: str, tmp_path: Path) -> None:
    settings = PolicyConfig(**KINDS[kind])
    planned, model = plan_of(base, settings), real_policy(base, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    loss_of(model).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.dim() > 0]
    plain = way(planned, 0)
    assert plain.parameters == pytest.approx(bytes_of(model.parameters()), rel=0.05)
    assert plain.gradients == pytest.approx(bytes_of(gradients), rel=0.05)
    assert plain.optimizer == pytest.approx(bytes_of(states), rel=0.05)
    model.save_pretrained(tmp_path)
    saved = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert planned.model == pytest.approx(saved, abs=20_000)  # names and shapes weigh something too


def test_arithmetic_of_stages_in_bfloat16(base: str) -> None:
    whole, sharded = (plan_of(base, PolicyConfig(), gpus, "bfloat16") for gpus in (1, 4))
    n, trained = whole.counts.total, whole.counts.trained
    assert trained == n - whole.counts.base_head < n
    one = way(whole, 0)
    assert (one.parameters, one.gradients, one.optimizer) == (2 * n, 2 * trained, 12 * trained)
    first, second, third = (way(sharded, stage) for stage in (1, 2, 3))
    assert (first.parameters, first.gradients) == (2 * n, 2 * trained)
    assert first.optimizer == pytest.approx(3 * trained, abs=48)
    assert (second.parameters, third.parameters) == (2 * n, pytest.approx(n / 2, abs=8))
    assert second.gradients == third.gradients == pytest.approx(trained / 2, abs=8)
    away = way(sharded, 3, True, True)
    assert away.parameters == away.gradients == away.optimizer == 0
    assert away.host_per_gpu == third.parameters + third.gradients + third.optimizer
    budget = plan_of(base, PolicyConfig(max_kl=0.2, metrics_every_steps=5), 4, "bfloat16")
    assert budget.kept_weights == 2 * trained
    assert budget.checkpoint == sharded.checkpoint + 2 * trained
    assert sharded.kept_weights == 0


class PlanRecipe:
    """A policy with both heads under DeepSpeed, as the engine wants it."""

    batches = (IDS,) * 4

    def __init__(self, base: str) -> None:
        self.base = base

    def build_model(self) -> nn.Module:
        return real_policy(self.base, PolicyConfig())

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [{"name": "all", "params": trained, "lr": 1e-3, "weight_decay": 0.0}]

    def loss(self, model: nn.Module, **tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = loss_of(model)  # type: ignore[arg-type]
        return loss, loss.detach(), torch.zeros(0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_holds_what_the_plan_says(
    stage: int, dtype: torch.dtype, base: str, deepspeed_alone: None
) -> None:
    from mahalo_ray.training.deepspeed_engine import build_engine

    training = TrainingConfig(zero_stage=stage, gradient_clipping=0.0, warmup_fraction=0.0)  # type: ignore[arg-type]
    engine = build_engine(PlanRecipe(base), training, dtype, seed=0, accumulation=1)  # type: ignore[arg-type]
    engine.backward(engine()[0])
    held = engine.optimizer
    if stage == 3:
        gradients = bytes_of([held.grad_partitions_flat_buffer])
    else:
        gradients = bytes_of(g for group in held.averaged_gradients.values() for g in group)
    engine.step()
    if stage == 3:
        masters, shards = held.fp32_partitioned_groups_flat, held.fp16_partitioned_groups_flat
    else:
        masters, shards = held.single_partition_of_fp32_groups, held.bit16_groups_flat
    states = [t for state in held.state.values() for t in state.values() if t.dim() > 0]
    of_shards = {shard.untyped_storage().data_ptr() for shard in shards}
    own = [t for t in masters if t.untyped_storage().data_ptr() not in of_shards]
    planned = way(plan_of(base, PolicyConfig(), 1, str(dtype).removeprefix("torch.")), stage)
    assert planned.optimizer == pytest.approx(bytes_of([*own, *states]), rel=0.05)
    # Frozen parameters (the base head) are no part of the optimizer's shards; ZeRO-3 partitions them too.
    frozen = [p.ds_tensor if stage == 3 else p for p in engine.module.parameters() if not p.requires_grad]
    assert planned.parameters == pytest.approx(bytes_of([*shards, *frozen]), rel=0.05)
    assert planned.gradients == pytest.approx(gradients, rel=0.05)


def test_command_prints_tables_and_json(base: str) -> None:
    shown = CliRunner().invoke(app, ["plan", str(EXAMPLE), "--gpus", "2"])
    assert shown.exit_code == 0 and "2 x 80 GiB, float32" in shown.output and "backbone" in shown.output
    small = CliRunner().invoke(app, ["plan", str(EXAMPLE), "--json", "--gpu-memory-gb", "0.1"])
    document = json.loads(small.output)
    assert document["gpus"] == 2 and document["counts"]["total"] > 0
    assert {m["zero_stage"]: m["fits"] for m in document["memory"] if not m["offload_optimizer"]} == {
        0: True,
        1: False,
        2: False,
        3: False,
    }


def test_a_base_without_config_is_said(tmp_path: Path) -> None:
    arguments = ["plan", str(EXAMPLE), "--set", "model.scratch=null", "--set", f"model.base={tmp_path}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "no config of a model can be read" in result.output


# The SFT models of the maths miniature and of two domains, which other examples start from.
MINIATURE = LlamaConfig(
    vocab_size=640, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256
)
# The public shapes of the models that the large examples name, for tests without a hub.
SHAPES: dict[str, PretrainedConfig] = {
    "Qwen/Qwen2.5-7B-Instruct": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        tie_word_embeddings=False,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        tie_word_embeddings=False,
    ),
    "runs/smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        tie_word_embeddings=True,
    ),
    "runs/maths/sft/model": MINIATURE,
    "runs/two_domains/sft/model": MINIATURE,
}


@pytest.mark.parametrize("example", sorted(EXAMPLE.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_of_a_run_is_valid_and_can_be_planned(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(example.parent)  # where the domain of brevity.yaml is
    document = yaml.safe_load(example.read_text(encoding="utf-8"))
    kind = kind_of(document)
    load_document(example, DOCUMENTS[kind].schema)
    if kind not in ("run", "dataset"):
        return  # trains nothing
    base = document["model"].get("base")
    chosen = [] if base is None else ["--set", f"model.base={tmp_path}"]
    if base is not None:
        SHAPES[base].save_pretrained(str(tmp_path))
    checked = CliRunner().invoke(app, ["validate", str(example), *chosen])
    assert checked.exit_code == 0, checked.output
    done = CliRunner().invoke(app, ["plan", str(example), "--json", *chosen])
    assert done.exit_code == 0, done.output
    counts = json.loads(done.stdout)["counts"]
    if example.stem == "math_7b":
        heads = 2 * 152064 * 3584
        assert counts["heads"] == heads and counts["trained"] > 6.5e9 + heads
