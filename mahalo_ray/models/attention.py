"""Plain attention that our own attention implementations are made of, and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Arguments some architectures pass to their attention that change its result: ignoring one would be silently
# wrong.
_UNSUPPORTED = ("s_aux", "position_bias", "head_mask", "encoder_hidden_states")


def refuse_options(module: str, options: Mapping[str, Any], by: str) -> None:
    """ValueError if a module passes something to its attention that changes the result."""
    for option in _UNSUPPORTED:
        if options.get(option) is not None:
            raise ValueError(f"{module} passes '{option}' to its attention, which {by} does not support")


def repeat_heads(states: Tensor, times: int) -> Tensor:
    """[B, Hkv, T, D] -> [B, Hkv * times, T, D]: every key/value head repeated for its group of query
    heads."""
    return states if times == 1 else states.repeat_interleave(times, dim=1)


def prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    """Causal attention of S new tokens per row over that row's keys.

    query [B, Hq, S, D]; key, value [B, Hkv, L, D]; starts [B]: the position of each row's first query among
    its keys (None: 0 for every row and L = S, the plain causal case). Returns [B, S, Hq, D].
    """
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_heads(key, groups), repeat_heads(value, groups)
    mask = None if starts is None else _visible(starts, query.shape[2], key.shape[2])
    if softcap is None:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
    else:  # SDPA has no soft cap
        if mask is None:
            mask = _visible(
                torch.zeros(1, dtype=torch.long, device=query.device), query.shape[2], key.shape[2]
            )
        scores = softcapped(query @ key.transpose(-1, -2) * scaling, softcap)
        scores = scores.masked_fill(~mask, float("-inf"))
        out = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value
    return out.transpose(1, 2)


def _visible(starts: Tensor, width: int, length: int) -> Tensor:
    """[B, 1, width, length], True where query i of row b may look: keys 0 .. starts[b] + i."""
    last = starts[:, None] + torch.arange(width, device=starts.device)
    return (torch.arange(length, device=starts.device) <= last[..., None])[:, None]


def softcapped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
