"""Model soups: one ordinary model whose parameters are the weighted average of several models'."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mahalo_ray.models.backbone import load_causal_lm, load_tokenizer
from mahalo_ray.models.folder import METADATA_FILE
from mahalo_ray.models.multi_head import MultiHeadCausalLM
from mahalo_ray.objectives import Weights


def average_models(
    folders: Mapping[str, str | Path],
    weights: Weights,
    output: str | Path,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Average single-objective models (DPO soup; rewarded soups, Ramé et al. 2023, arXiv 2306.04488) and save
    the result: theta = sum_i w_i theta_i over whole models, heads included.

    `folders`: objective -> its model's folder, a policy with one head or an ordinary causal LM. `output`
    becomes an ordinary transformers folder with the first model's tokenizer. Sums are in fp32; one model is
    loaded at a time; one of weight 0 is not read. Raises ValueError where the models do not fit together.
    """
    shares = {name: w for name, w in zip(folders, weights.over(folders), strict=True) if w > 0}
    result: PreTrainedModel | None = None
    total: dict[str, Tensor] = {}
    for name, share in shares.items():
        model = single_model(folders[name], dtype)
        state = model.state_dict()
        if result is None:
            result = model
            total = {key: torch.zeros_like(tensor, dtype=torch.float32) for key, tensor in state.items()}
        else:
            _check_fits(name, model, next(iter(shares)), result)
        for key, tensor in state.items():
            total[key].add_(tensor, alpha=share)
    assert result is not None, "weights on the simplex are not all zero"
    result.load_state_dict({key: total[key].to(t.dtype) for key, t in result.state_dict().items()})
    result.save_pretrained(str(output))
    load_tokenizer(folders[next(iter(shares))]).save_pretrained(str(output))
    return result


def single_model(folder: str | Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The ordinary model in a folder, which a policy with one head becomes too. ValueError for a policy with
    several."""
    if not (Path(folder) / METADATA_FILE).is_file():
        return load_causal_lm(folder, dtype)
    policy = MultiHeadCausalLM.from_pretrained(folder, dtype)
    if len(policy.objectives) > 1:
        raise ValueError(
            f"{folder} has heads for {', '.join(policy.objectives)}: give models with one head each; heads "
            "of one policy are mixed by `MultiHeadCausalLM.merge`"
        )
    return policy.merge(Weights.one(policy.objectives[0]), copied=False)


def _check_fits(name: str, model: PreTrainedModel, first_name: str, first: PreTrainedModel) -> None:
    shapes, first_shapes = ({key: t.shape for key, t in m.state_dict().items()} for m in (model, first))
    different = sorted(
        key for key in shapes.keys() | first_shapes.keys() if shapes.get(key) != first_shapes.get(key)
    )
    if different:
        raise ValueError(
            f"the models of '{name}' and '{first_name}' cannot be averaged: '{different[0]}' is not in both "
            "with one shape"
        )
    if model.config.tie_word_embeddings != first.config.tie_word_embeddings:
        raise ValueError(
            f"the models of '{name}' and '{first_name}' cannot be averaged: only one ties its embeddings"
        )
