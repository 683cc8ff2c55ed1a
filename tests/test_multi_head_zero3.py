"""ZeRO-3 on two processes trains the policy as one plain process does, whatever heads a rank has rows for."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import transformers as tf

from mahalo_ray.config import LoraConfig
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.objectives import Weights
from mahalo_ray.training.recipe import LossModule

STEPS = 4
OBJECTIVES = ["a", "b", "c"]
# Rank 0 has rows of `a` only, rank 1 of `c` only, nobody of `b`.
INDEX = torch.tensor([0, 0, 2, 2])
MIX = Weights.parse("a=1,b=2,c=1")


def build(base: Path, kind: Any, lora: bool) -> MultiHeadCausalLM:
    model = MultiHeadCausalLM.from_base(base, OBJECTIVES, noise=0.1, head_kind=kind, rank=2)
    torch.manual_seed(3)
    if lora:
        model.add_lora(LoraConfig(rank=2))
        model.gradient_checkpointing_enable()
    return model.train()


def rows() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.roll(ids, -1, 1)}


def loss_of(model: MultiHeadCausalLM, head_index: torch.Tensor, **tensors: torch.Tensor) -> Any:
    """Nats per token of the rows under their own heads, and under mixtures of all heads."""
    own = model.completion_logps(**tensors, head_index=head_index, chunk_size=3)
    shares = torch.eye(3)[head_index] * 0.4 + 0.2
    mixed = model.mixture_logps(**tensors, weights=shares, chunk_size=3)
    return -(own + mixed).mean() / tensors["labels"].shape[1]


def logits_of(model: MultiHeadCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids, weights=MIX).logits


def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def zero3_worker(rank: int, base: Path, kind: str, lora: bool, out: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its compilation takes a minute
    # A file to meet at: a port that was free may be another's by the time it is used.
    store = torch.distributed.FileStore(str(out / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    os.environ["MASTER_PORT"] = "0"  # DeepSpeed wants one, and uses the group that is there
    deepspeed.init_distributed("gloo")
    config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    alive = HfDeepSpeedConfig(config)
    model = build(base, kind, lora)
    assert all(p.numel() == 0 for p in model.heads.parameters()), "heads must be created sharded"
    engine = deepspeed.initialize(
        model=LossModule(model, loss_of), optimizer=optimizer(model), config=config
    )[0]
    mine = slice(2 * rank, 2 * rank + 2)
    losses = []
    for _ in range(STEPS):
        loss = engine(**{k: v[mine] for k, v in rows().items()}, head_index=INDEX[mine])
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / 2)
    logits = engine(logits_of, input_ids=rows()["input_ids"][mine]).detach()
    state = engine._zero3_consolidated_16bit_state_dict()
    if rank == 0:
        model.save_pretrained(
            out / "policy", state_dict={n.removeprefix("model."): t for n, t in state.items()}
        )
        torch.save(logits, out / "logits.pt")
        (out / "losses.json").write_text(json.dumps(losses))
    torch.distributed.barrier()
    del alive


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "lora"), [("full", False), ("low_rank", True)])
def test_zero3_on_two_processes_equals_plain_training(
    kind: str, lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = tf.Qwen2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = build(tmp_path / "base", kind, lora)
    adam, expected = optimizer(model), []
    for _ in range(STEPS):
        adam.zero_grad()
        loss = loss_of(model, **rows(), head_index=INDEX)
        loss.backward()
        adam.step()
        expected.append(loss.item())

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    mp.spawn(zero3_worker, (tmp_path / "base", kind, lora, tmp_path), nprocs=2)

    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(expected, abs=1e-5)
    trained = MultiHeadCausalLM.from_pretrained(
        tmp_path / "policy", backbone=tmp_path / "base" if lora else None
    )
    with torch.no_grad():
        logits = torch.load(tmp_path / "logits.pt", weights_only=True)
        torch.testing.assert_close(logits_of(trained, rows()["input_ids"][:2]), logits, atol=1e-4, rtol=0)
        found = trained.completion_logps(**rows(), head_index=INDEX)
        torch.testing.assert_close(
            found, model.completion_logps(**rows(), head_index=INDEX), atol=1e-3, rtol=0
        )
