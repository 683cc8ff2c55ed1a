"""The attention behind the shared-trunk cache, as a transformers attention implementation.

A model called inside `cached_attention(model)` with `kv_cache=view` hands every layer's NEW queries, keys and
values to `view.attend`, which stores the keys and values and attends to everything the view can see. No mask
is built by transformers and no `past_key_values` exists: positions and causality belong to the view.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mahalo_ray.models.attention import register_attention, softcapped

IMPLEMENTATION = "mahalo_cached"

register_attention(IMPLEMENTATION, "kv_cache", "the decoding cache")


@contextlib.contextmanager
def cached_attention(config: Any) -> Iterator[None]:
    """Switch the models that share this transformers config to the cached attention, and back afterwards.

    The model stays usable for training in between; do not call the same model from another thread meanwhile.
    """
    before = config._attn_implementation_internal
    config._attn_implementation_internal = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def shared_prefix_attention(
    query: Tensor,
    trunk: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    trunk_bias: Tensor | None,
    own_bias: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Attention of K branches per row over their row's trunk, stored once, and over their own keys: one
    softmax.

    query [N * K, Hq, S, D]; trunk keys, values [N, Hkv, L, D]; own keys, values [N, Hkv, K, T, D] (this
    call's S included); trunk_bias [N, 1, 1, L] and own_bias [.., S, T] hold 0 or -inf (None: everything is
    visible). Returns [N * K, S, Hq, D].
    """
    rows, kv_heads, branches, own_length, dim = own[0].shape
    width, groups = query.shape[2], query.shape[1] // kv_heads
    # The K branches become K*G*S query rows of ONE matmul against the trunk they share.
    query = query.view(rows, branches, kv_heads, groups, width, dim).permute(0, 2, 1, 3, 4, 5) * scaling
    query = query.reshape(rows, kv_heads, branches * groups * width, dim)
    to_trunk = query @ trunk[0].transpose(-1, -2)
    to_own = query.view(rows, kv_heads, branches, groups * width, dim) @ own[0].transpose(-1, -2)
    to_trunk, to_own = softcapped(to_trunk, softcap), softcapped(to_own, softcap)
    if trunk_bias is not None:
        to_trunk = to_trunk + trunk_bias
    if own_bias is not None:
        to_own = to_own.view(rows, kv_heads, branches, groups, width, own_length) + own_bias
    to_own = to_own.reshape(rows, kv_heads, branches * groups * width, own_length)
    scores = torch.cat([to_trunk, to_own], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    length = trunk[0].shape[2]
    out = weights[..., :length] @ trunk[1]
    own_weights = weights[..., length:].view(rows, kv_heads, branches, groups * width, own_length)
    out = out.view(rows, kv_heads, branches, groups * width, dim) + own_weights @ own[1]
    out = out.view(rows, kv_heads, branches, groups, width, dim).permute(0, 2, 4, 1, 3, 5)
    return out.reshape(rows * branches, width, kv_heads * groups, dim)
