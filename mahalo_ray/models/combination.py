"""A multi-head policy of existing single-objective models, without training: what each differs in from the
base becomes the head, and the adapters, of its objective.

Shapes: W [out, in] of a linear layer, r the rank. The difference D_i = W_i - W_0 of objective i becomes
B_i A_i with B_i [out, r], A_i [r, in]: its best approximation of rank r in the Frobenius norm, by singular
value decomposition (Eckart and Young, 1936). At full rank every objective by itself is the model it came
from, and a mixture is the soup of the models (Ramé et al. 2023, arXiv 2306.04488).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mahalo_ray.config import AdaptersConfig
from mahalo_ray.models.adapters import ADAPTER_PARAMETERS, AdaptedLinear, upper_blocks
from mahalo_ray.models.backbone import load_causal_lm, load_tokenizer, split_causal_lm
from mahalo_ray.models.folder import tokenizer_difference
from mahalo_ray.models.heads import FullHead
from mahalo_ray.models.multi_head import MultiHeadCausalLM
from mahalo_ray.models.soup import single_model

Rank = int | Literal["full"]
# A decomposition of the whole matrix takes time in the third power of its size. Of much smaller ranks the
# randomised one (Halko et al. 2011) finds the same to several digits.
_WHOLE_UP_TO, _OVERSAMPLING, _POWER_ITERATIONS = 512, 16, 4


@dataclass(frozen=True)
class SquaredNorms:
    """Of what a model differs in from the base, and of what of it is lost."""

    difference: float
    lost: float

    def __add__(self, other: SquaredNorms) -> SquaredNorms:
        return SquaredNorms(self.difference + other.difference, self.lost + other.lost)

    @property
    def relative_error(self) -> float:
        """||lost|| / ||difference||; 0 where nothing differs."""
        return math.sqrt(self.lost / self.difference) if self.difference > 0 else 0.0


NOTHING = SquaredNorms(0.0, 0.0)


@dataclass(frozen=True)
class Combination:
    """The policy, and how well it holds its models.

    `rank` None: the models differ in their output layers alone, so there are no adapters and nothing is lost.
    `layers`: objective -> adapted layer -> norms. `rest`: objective -> norms over the parameters of the
    backbone that have no adapter (embedding, norms, biases), where all share the models' mean.
    """

    policy: MultiHeadCausalLM
    rank: int | None
    layers: dict[str, dict[str, SquaredNorms]] = field(default_factory=dict)
    rest: dict[str, SquaredNorms] = field(default_factory=dict)

    def by_block(self) -> dict[str, dict[str, float]]:
        """Relative error of the adapted layers of each block: block -> objective -> error."""
        sums: dict[str, dict[str, SquaredNorms]] = {}
        for objective, layers in self.layers.items():
            for layer, norms in layers.items():
                block = sums.setdefault(_block_of(layer), {})
                block[objective] = block.get(objective, NOTHING) + norms
        return {
            block: {name: norms.relative_error for name, norms in of_objectives.items()}
            for block, of_objectives in sums.items()
        }

    def overall(self) -> dict[str, float]:
        """Relative error over all adapted layers, per objective."""
        return {name: sum(own.values(), NOTHING).relative_error for name, own in self.layers.items()}

    def as_json(self) -> dict[str, Any]:
        """Rank, and every layer's relative error."""
        overall = self.overall()
        return {
            "rank": self.rank,
            "relative_error": {
                name: {
                    "adapted_layers": overall[name],
                    "other_parameters": self.rest[name].relative_error,
                    "layers": {layer: norms.relative_error for layer, norms in layers.items()},
                }
                for name, layers in self.layers.items()
            },
        }


def _block_of(layer: str) -> str:
    """`layers.2` of `layers.2.mlp.up_proj`: up to the block's number."""
    parts = layer.split(".")
    number = next(index for index, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: number + 1])


def combine_models(
    base: str | Path,
    models: Mapping[str, str | Path],
    rank: Rank = 16,
    dtype: torch.dtype | None = None,
) -> Combination:
    """A policy with one head per objective, from one model per objective and the base they were made from.

    `models`: objective -> its model's folder, a policy with one head or an ordinary causal LM. Heads are the
    models' output layers, exactly. If the models share one backbone (the base's or another), it becomes the
    policy's; else the linear layers of the blocks from the first that differs get adapters of this rank
    ("full": of as many as lose nothing), and the other parameters of the backbone are the models' mean. Sums
    are in fp32; besides the base one model is loaded at a time, twice. ValueError where the models do not
    fit together.

    >>> from mahalo_ray.models import combine_models
    >>> made = combine_models("model", {"accuracy": "model", "warmth": "model"})
    >>> (made.policy.objectives, made.rank)
    (('accuracy', 'warmth'), None)
    """
    _check_tokenizers(base, models)
    start = load_causal_lm(base, dtype)
    names = list(models)
    of_base = {key: _digest(value) for key, value in _backbone_of(start).items()}
    digests: dict[str, dict[str, str]] = {}
    changed: set[str] = set()
    model: PreTrainedModel | None = None
    for name, folder in models.items():
        model = _fitting_model(name, folder, start, dtype)
        digests[name] = {key: _digest(value) for key, value in _backbone_of(model).items()}
        changed |= {key for key, digest in of_base.items() if digest != digests[name][key]}
    assert model is not None, "models are not empty"
    if all(own == digests[names[0]] for own in digests.values()):
        return Combination(_heads_alone(start, model, models, dtype), None)
    del model
    adapted, depth = _adapted_layers(start, changed)
    size = max(min(weight.shape) for weight in adapted.values()) if rank == "full" else rank
    settings = AdaptersConfig(depth=depth, rank=size, alpha=size)  # alpha / rank: what is added has factor 1
    policy = MultiHeadCausalLM.from_base(start, names, noise=0.0, keep_base_head=True, adapters=settings)
    return _fill(policy, models, size, changed, dtype)


def _check_tokenizers(base: str | Path, models: Mapping[str, str | Path]) -> None:
    first: str | None = None
    for name, folder in models.items():
        tokenizer = load_tokenizer(folder)
        if tokenizer.get_vocab() != load_tokenizer(base).get_vocab():
            raise ValueError(f"the model of '{name}' has another vocabulary than the base in '{base}'")
        first = first or name
        difference = tokenizer_difference(tokenizer, load_tokenizer(models[first]))
        if difference is not None:
            raise ValueError(f"the models of '{first}' and '{name}' differ in the {difference}")


def _fitting_model(
    name: str, folder: str | Path, start: PreTrainedModel, dtype: torch.dtype | None
) -> PreTrainedModel:
    """The model of one objective. ValueError unless it has the base's architecture."""
    model = single_model(folder, dtype)
    (_, output, transform), (_, base_output, base_transform) = map(split_causal_lm, (model, start))
    shapes, base_shapes = (
        {key: tensor.shape for key, tensor in {**_backbone_of(m), "output layer": head.weight}.items()}
        for m, head in ((model, output), (start, base_output))
    )
    different = sorted(
        key for key in shapes.keys() | base_shapes.keys() if shapes.get(key) != base_shapes.get(key)
    )
    if different or transform != base_transform or (output.bias is None) != (base_output.bias is None):
        what = (
            f"'{different[0]}' is not in both with one shape" if different else "their output layers differ"
        )
        raise ValueError(
            f"the model of '{name}' in '{folder}' does not fit the base in '{start.config._name_or_path}': "
            f"{what}; give the model that it was made from"
        )
    return model


def _backbone_of(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    return dict(model.base_model.named_parameters())


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(content.data).hexdigest()


def _adapted_layers(start: PreTrainedModel, changed: set[str]) -> tuple[dict[str, Tensor], int]:
    """Weights of the linear layers from the first block with a difference on, and how many blocks these are
    (at least one)."""
    blocks = upper_blocks(start.base_model, AdaptersConfig(depth="all"))
    linear = {
        block: {
            f"{block}.{path}": layer.weight
            for path, layer in module.named_modules()
            if type(layer) is nn.Linear
        }
        for block, module in blocks.items()
    }
    if not any(linear.values()):
        raise ValueError(
            f"the models' backbones differ, and the blocks of {type(start).__name__} have no linear layers "
            "whose adapters could hold the difference"
        )
    differing = [any(f"{layer}.weight" in changed for layer in linear[block]) for block in blocks]
    first = differing.index(True) if any(differing) else len(differing) - 1
    upper = list(blocks)[first:]
    return {layer: weight for block in upper for layer, weight in linear[block].items()}, len(upper)


def _heads_alone(
    start: PreTrainedModel,
    shared: PreTrainedModel,
    models: Mapping[str, str | Path],
    dtype: torch.dtype | None,
) -> MultiHeadCausalLM:
    """All models have the backbone of `shared`."""
    base_output = split_causal_lm(start)[1]
    policy = MultiHeadCausalLM.from_base(shared, list(models), noise=0.0, keep_base_head=True)
    assert policy.base_head is not None
    _copy_head(policy.base_head, base_output)
    for name, folder in models.items():
        _copy_head(policy.head(name), split_causal_lm(single_model(folder, dtype))[1])
    return policy.eval()


@torch.no_grad()
def _copy_head(head: nn.Module, output: nn.Module) -> None:
    assert isinstance(head, FullHead)
    head.weight.copy_(cast(Tensor, output.weight))
    if head.bias is not None:
        head.bias.copy_(cast(Tensor, output.bias))


@torch.no_grad()
def _fill(
    policy: MultiHeadCausalLM,
    models: Mapping[str, str | Path],
    rank: int,
    changed: set[str],
    dtype: torch.dtype | None,
) -> Combination:
    """Put the models' differences into a policy made of the base."""
    assert policy.adapters is not None
    made = Combination(policy, rank)
    parameters = dict(policy.backbone.named_parameters())
    layers = policy.adapters.layers
    held = {f"{layer}.weight" for layer in layers}
    rest = [key for key in parameters if key in changed - held and not key.endswith(ADAPTER_PARAMETERS)]
    others: dict[str, dict[str, Tensor]] = {}
    for number, (name, folder) in enumerate(models.items()):
        model = single_model(folder, dtype)
        _copy_head(policy.head(name), split_causal_lm(model)[1])
        values = _backbone_of(model)
        made.layers[name] = {
            path: _adapt(layer, number, rank, values[f"{path}.weight"]) for path, layer in layers.items()
        }
        others[name] = {key: values[key].detach() for key in rest}
        del model, values
    for name in models:
        made.rest[name] = sum((_norms_of_mean(parameters[k], others, k, name) for k in rest), NOTHING)
    for key in rest:
        parameters[key].copy_(_mean([own[key] for own in others.values()]))
    policy.eval()
    return made


def _adapt(layer: AdaptedLinear, number: int, rank: int, weight: Tensor) -> SquaredNorms:
    """Make the adapter of objective `number` what its model's weight [out, in] differs in."""
    difference = weight.float() - layer.weight.float()
    up, down = low_rank(difference, rank)
    columns = slice(number * rank, (number + 1) * rank)
    layer.adapter_up[:, columns].copy_(up)
    layer.adapter_down[columns].copy_(down)
    held = layer.adapter_up[:, columns].float() @ layer.adapter_down[columns].float()  # as it is stored
    return SquaredNorms(_squared(difference), _squared(difference - held))


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation B A of a matrix [out, in], as B [out, rank] and A [rank, in] of about equal
    size; zeros fill up what a smaller matrix does not need."""
    size = min(matrix.shape)
    if size > _WHOLE_UP_TO and 4 * (rank + _OVERSAMPLING) < size:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, rank + _OVERSAMPLING, niter=_POWER_ITERATIONS)
        vh = v.T
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = min(rank, size)
    root = s[:kept].sqrt()
    up, down = matrix.new_zeros(matrix.shape[0], rank), matrix.new_zeros(rank, matrix.shape[1])
    up[:, :kept], down[:kept] = u[:, :kept] * root, root[:, None] * vh[:kept]
    return up, down


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    if all(torch.equal(first, other) for other in tensors):
        return first
    return (sum(_floats(tensors), torch.zeros_like(first, dtype=torch.float32)) / len(tensors)).to(
        first.dtype
    )


def _floats(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    return (tensor.float() for tensor in tensors)


def _norms_of_mean(
    base: Tensor, others: Mapping[str, Mapping[str, Tensor]], key: str, name: str
) -> SquaredNorms:
    own = others[name][key].float()
    mean = _mean([values[key] for values in others.values()]).float()
    return SquaredNorms(_squared(own - base.float()), _squared(own - mean))


def _squared(tensor: Tensor) -> float:
    return float((tensor.double() ** 2).sum())
