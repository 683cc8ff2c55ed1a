"""A policy of single-objective models without training: what it computes, what is lost, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import training_world as world
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from mahalo_ray.cli import app
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.policy import MultiHeadPolicy
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.models import MultiHeadCausalLM, average_models, combine_models
from mahalo_ray.models.combination import low_rank
from mahalo_ray.objectives import Weights

IDS = torch.tensor([[7, 9, 11, 5, 30], [8, 8, 12, 29, 6]])
MIXTURE = Weights.parse("accuracy=0.7,warmth=0.3")
NAMES = ("accuracy", "warmth")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.make_base(tmp_path_factory.mktemp("base"), tied=False)


def models(base: str, folder: Path, change: Callable[[PreTrainedModel], None]) -> dict[str, str]:
    """A changed copy of the base for each objective, with a changed output layer."""
    made = {}
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            change(model)
            model.lm_head.weight += 0.1 * torch.randn_like(model.lm_head.weight)
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder / name)
        made[name] = str(folder / name)
    return made


def linear_layers(model: PreTrainedModel, rank: int | None = None) -> None:
    """Move the weights of all blocks' linear layers, by a matrix of this rank (None: any)."""
    for layer in model.base_model.layers.modules():
        if type(layer) is nn.Linear:
            out, inner = layer.weight.shape
            size = min(out, inner) if rank is None else rank
            layer.weight += 0.05 * torch.randn(out, size) @ torch.randn(size, inner)


def everything(model: PreTrainedModel) -> None:
    for parameter in model.base_model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)


@torch.no_grad()
def logits_of(folder: str | Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits  # type: ignore[no-any-return]


def test_at_full_rank_each_head_is_its_model_and_a_mixture_their_soup(base: str, tmp_path: Path) -> None:
    folders = models(base, tmp_path, linear_layers)
    made = combine_models(base, folders, "full")
    assert made.rank == 16 and max(made.overall().values()) < 1e-5
    assert all(norms.difference == 0 for norms in made.rest.values())
    made.policy.save_pretrained(tmp_path / "policy")
    policy = MultiHeadCausalLM.from_pretrained(tmp_path / "policy").eval()
    average_models(folders, MIXTURE, tmp_path / "soup")
    wanted = {Weights.one(name): folder for name, folder in folders.items()}
    with torch.no_grad():
        for weights, folder in {**wanted, MIXTURE: str(tmp_path / "soup")}.items():
            expected = logits_of(folder)
            torch.testing.assert_close(policy(IDS, weights=weights).logits, expected, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(logits_of(base), expected, atol=1e-2)
        # Without the heads and the adapters it is the base.
        torch.testing.assert_close(policy(IDS, weights=MIXTURE, strength=0.0).logits, logits_of(base))
    # In the decoder, where conversations of different weights share a batch: as the models by themselves.
    engine = Engine(MultiHeadPolicy(policy))
    sequences = engine.add(2, [Weights.one(name) for name in NAMES])
    engine.append(sequences, IDS.tolist())
    sampled = engine.sample(sequences, 1, SamplingParams(temperature=0), [1, 1], 6, ())
    for row, folder in enumerate(folders.values()):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        alone = model.generate(IDS[row : row + 1], max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert sampled.token_ids[row][0] == alone[0, 5:].tolist()


def test_a_model_of_low_rank_loses_nothing_at_that_rank(base: str, tmp_path: Path) -> None:
    """Merged LoRA, say. Below that rank the error is what the singular values left out say."""
    folders = models(base, tmp_path, lambda model: linear_layers(model, rank=3))
    assert max(combine_models(base, folders, 3).overall().values()) < 1e-5
    short = combine_models(base, folders, 2)
    for name, layers in short.layers.items():
        own, start = (
            dict(AutoModelForCausalLM.from_pretrained(f).named_parameters()) for f in (folders[name], base)
        )
        for layer, norms in layers.items():
            key = f"model.{layer}.weight"
            values = torch.linalg.svdvals(own[key].detach() - start[key].detach())
            assert norms.relative_error == pytest.approx(float(values[2] / values.norm()), rel=1e-3)
        blocks = short.by_block()
        assert blocks.keys() == {"layers.0", "layers.1"} and 0 < blocks["layers.0"][name] < 1


def test_where_only_heads_differ_there_are_no_adapters(base: str, tmp_path: Path) -> None:
    def same(model: PreTrainedModel) -> None:
        torch.manual_seed(9)
        everything(model)

    # The models' backbone need not be the base's: a soup's or an extended policy's, say.
    made = combine_models(base, models(base, tmp_path, same))
    assert made.rank is None and made.policy.adapters is None
    with torch.no_grad():
        for name in NAMES:
            assert torch.equal(made.policy(IDS, weights=Weights.one(name)).logits, logits_of(tmp_path / name))
    assert made.policy.base_head is not None
    start: Any = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(made.policy.base_head.weight, start.lm_head.weight)


def test_adapters_begin_at_the_first_block_that_differs(base: str, tmp_path: Path) -> None:
    def last_block(model: PreTrainedModel) -> None:
        model.base_model.layers[1].mlp.up_proj.weight += 0.1 * torch.randn(24, 16)

    made = combine_models(base, models(base, tmp_path, last_block), 4)
    assert made.policy.adapters is not None and made.policy.adapters.depth == 1
    assert all(layer.startswith("layers.1.") for layer in made.layers["accuracy"])
    assert made.layers["accuracy"]["layers.1.mlp.down_proj"].relative_error == 0.0


def test_the_command_says_what_is_lost(base: str, tmp_path: Path) -> None:
    """Embedding, norms and biases have no adapters: they are the models' mean, and that is said too."""
    folders = models(base, tmp_path, everything)
    arguments = ["combine", base, *(f"{name}={folder}" for name, folder in folders.items())]
    out = tmp_path / "out"
    result = CliRunner().invoke(app, [*arguments, "--rank", "full", "--output", str(out)])
    assert result.exit_code == 0, result.output
    assert "all blocks" in result.output and "layers.1" in result.output
    written = json.loads((out / "combination.json").read_text())
    errors = written["relative_error"]["accuracy"]
    assert written["rank"] == 16 and errors["adapted_layers"] < 1e-5 < 0.5 < errors["other_parameters"] < 1
    policy = MultiHeadCausalLM.from_pretrained(out)
    embeddings = [
        AutoModelForCausalLM.from_pretrained(f).get_input_embeddings().weight for f in folders.values()
    ]
    torch.testing.assert_close(
        policy.backbone.get_input_embeddings().weight, (embeddings[0] + embeddings[1]) / 2
    )
    assert AutoTokenizer.from_pretrained(out).chat_template == world.TEMPLATE
    again = CliRunner().invoke(app, [*arguments, "--output", str(out)])
    assert again.exit_code == 2 and "exists already" in again.output


def test_what_cannot_be_combined_is_said(base: str, tmp_path: Path) -> None:
    folders = models(base, tmp_path, linear_layers)
    tied = world.make_base(tmp_path / "tied")
    (tmp_path / "two").mkdir()
    two = MultiHeadCausalLM.from_base(base, NAMES)
    two.save_pretrained(tmp_path / "two", AutoTokenizer.from_pretrained(base))
    larger = AutoTokenizer.from_pretrained(base)
    larger.add_tokens(["more"])
    (tmp_path / "larger").mkdir()
    larger.save_pretrained(tmp_path / "larger")
    wide: Any = AutoModelForCausalLM.from_pretrained(base)
    wide.resize_token_embeddings(40)
    wide.save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "wide")
    good = folders["accuracy"]
    for arguments, message in (
        (["accuracy"], "'accuracy' names no model: write objective=FOLDER"),
        ([f"accuracy={good}", f"accuracy={good}"], "objective 'accuracy' is given twice"),
        ([f"accuracy={good}", "--rank", "0"], "give a number above 0, or full"),
        ([f"accuracy={tmp_path / 'nowhere'}"], "there is no model folder"),
        ([f"accuracy={tmp_path / 'two'}"], "give models with one head each"),
        ([f"accuracy={tmp_path / 'larger'}"], "has another vocabulary than the base"),
        ([f"accuracy={tmp_path / 'wide'}"], "does not fit the base in"),
    ):
        result = CliRunner().invoke(app, ["combine", base, *arguments, "--output", str(tmp_path / "out")])
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    # A tied base has an output layer of its own in the policy, as in training.
    made = combine_models(tied, {"accuracy": tied})
    with torch.no_grad():
        torch.testing.assert_close(made.policy(IDS).logits, logits_of(tied))


def test_of_a_large_matrix_a_small_rank_is_found_as_well() -> None:
    """By the randomised decomposition: the error is that of the singular values left out."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(600, 600, generator=generator))[0] for _ in range(2))
    values = 0.8 ** torch.arange(600)
    up, down = low_rank(left * values @ right, 8)
    assert up.shape == (600, 8) and down.shape == (8, 600)
    error = (left * values @ right - up @ down).norm() / values.norm()
    assert float(error) == pytest.approx(float(values[8:].norm() / values.norm()), rel=1e-3)
