"""Exported policies: plain transformers loads them, and their logits are the weighted sum of the heads'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training_world as world
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from mahalo_ray.cli import app
from mahalo_ray.config import LoraConfig
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.models.backbone import load_tokenizer
from mahalo_ray.objectives import Weights
from mahalo_ray.pipeline.artifacts import export
from mahalo_ray.pipeline.stages import Manifest

WEIGHTS = Weights.parse("accuracy=0.7,engagement=0.3")
IDS = torch.tensor([[7, 9, 11, 5, 30], [8, 8, 12, 29, 6]])


def make_policy(folder: Path, head_kind: str = "full", lora: bool = False) -> Path:
    """A policy whose heads (and adapter) are far from the base model; returns its folder."""
    base = world.make_base(folder / "base")
    policy = MultiHeadCausalLM.from_base(base, world.OBJECTIVES, noise=0.3, head_kind=head_kind, rank=2)  # type: ignore[arg-type]
    if lora:
        policy.add_lora(LoraConfig(rank=2))
        torch.manual_seed(3)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    policy.save_pretrained(folder / "policy", load_tokenizer(base))
    return folder / "policy"


@torch.no_grad()
def weighted_sum(folder: Path) -> Tensor:
    policy = MultiHeadCausalLM.from_pretrained(folder).eval()
    hidden = policy.hidden_states(IDS)
    return sum(w * policy.head(name)(hidden) for name, w in WEIGHTS.items())  # type: ignore[return-value]


@torch.no_grad()
def exported_logits(folder: Path) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("head_kind", "lora"), [("full", False), ("low_rank", False), ("full", True)])
def test_logits_are_the_weighted_sum_of_the_heads(tmp_path: Path, head_kind: str, lora: bool) -> None:
    folder = make_policy(tmp_path, head_kind, lora)
    export(str(folder), str(tmp_path / "out"), WEIGHTS)
    torch.testing.assert_close(exported_logits(tmp_path / "out"), weighted_sum(folder), rtol=1e-5, atol=1e-5)
    assert not (tmp_path / "out" / "adapter").exists()


def test_command_exports_the_policy_of_a_run(tmp_path: Path) -> None:
    folder = make_policy(tmp_path / "run" / "made")
    stage = tmp_path / "run" / "policy"
    stage.mkdir()
    folder.rename(stage / "model")
    Manifest("policy", "0", {"model": "model"}, {}, 1.0).write(str(stage))
    out = tmp_path / "out"
    arguments = ["export", str(tmp_path / "run"), str(out), "--weights", "accuracy=7,engagement=3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "accuracy=0.7,engagement=0.3" in result.output
    torch.testing.assert_close(exported_logits(out), weighted_sum(stage / "model"), rtol=1e-5, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(out)
    message = [{"role": "user", "content": "ab"}]
    shown = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert shown == "<user>ab<end><assistant>"
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "exists already" in again.output
    in_bfloat16 = CliRunner().invoke(
        app, [*arguments[:2], str(tmp_path / "b"), *arguments[3:], "--dtype", "bfloat16"]
    )
    assert in_bfloat16.exit_code == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="auto").dtype == torch.bfloat16


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    folder = str(make_policy(tmp_path))
    for source, weights, message in (
        (folder, "acuracy=1", "Did you mean 'accuracy'"),
        (str(tmp_path), "accuracy=1", "neither a run's output folder nor a policy's"),
        (folder, "accuracy", "accuracy"),
    ):
        result = CliRunner().invoke(app, ["export", source, str(tmp_path / "out"), "--weights", weights])
        assert result.exit_code == 2 and message in result.output
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match=r"stage 'policy' of the run at .* is not finished"):
        export(str(tmp_path), str(tmp_path / "out"), WEIGHTS)
