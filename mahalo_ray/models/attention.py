"""The base of this package's attention implementations for transformers: how they are called, what they
refuse, and causal attention behind a prefix.

Shapes: B rows, Hq query heads, Hkv key/value heads, S new tokens, L keys, D size of a head.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

SCORES_AT_ONCE = 2**26  # numbers of masks or scores held at a time: 256 MiB in fp32

# Arguments some architectures pass to their attention that change its result: ignoring one would be silently
# wrong.
_UNSUPPORTED = ("s_aux", "position_bias", "head_mask", "encoder_hidden_states")


class View(Protocol):
    """What the queries of one forward may look at: packed pairs, or a prefix in the decoding cache."""

    @property
    def context(self) -> int:
        """Longest sequence in tokens, the new ones included: compared with a layer's sliding window."""
        ...

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        """query [B, Hq, S, D]; key, value [B, Hkv, S, D], new tokens only -> [B, S, Hq, D]."""
        ...


def register_attention(implementation: str, argument: str, by: str) -> None:
    """Register an attention implementation that leaves everything to the View a model is called with.

    `argument` names it among the model's keyword arguments; `by` names the implementation in errors. No mask
    is built by transformers: the view decides what may be seen. ValueError, when a model is called, for a
    module that does not pass the view on, or that asks for something which would change the result.
    """

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> tuple[Tensor, None]:
        name = type(module).__name__
        view: View | None = options.get(argument)
        if view is None:
            raise ValueError(
                f"{name} did not receive {argument}: this architecture does not pass it on to its attention"
            )
        for option in _UNSUPPORTED:
            if options.get(option) is not None:
                raise ValueError(f"{name} passes '{option}' to its attention, which {by} does not support")
        if dropout:
            raise ValueError(
                f"{name} applies attention dropout, which {by} does not: call model.eval() or set it to 0"
            )
        if sliding_window is not None and view.context > sliding_window:
            raise ValueError(
                f"{name} attends to a sliding window of {sliding_window} tokens and the context has "
                f"{view.context}: {by} knows whole contexts only; shorten the prompt or use a full-attention "
                "model"
            )
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        layer = module.layer_idx
        assert isinstance(layer, int)
        return view.attend(layer, query, key, value, scaling, softcap), None

    AttentionInterface.register(implementation, forward)


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
    if starts is None and softcap is None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2)
    if starts is None:
        starts = torch.zeros(1, dtype=torch.long, device=query.device)
    # With a prefix, every query needs its row of a mask [B, 1, S, L]; with a soft cap, of scores
    # [B, Hq, S, L]. Queries do not see each other's rows, so long ones are taken a part at a time; for
    # gradients, what a part computed is computed again.
    held = query.shape[0] * key.shape[2] * (1 if softcap is None else query.shape[1])
    size = max(1, SCORES_AT_ONCE // held)
    is_cut = size < query.shape[2]
    parts = []
    for first in range(0, query.shape[2], size):
        part = (query[:, :, first : first + size], key, value, starts + first, scaling, softcap)
        if is_cut and torch.is_grad_enabled():
            parts.append(checkpoint(_attend_rows, *part, use_reentrant=False))
        else:
            parts.append(_attend_rows(*part))
    out = torch.cat(parts, dim=2) if is_cut else parts[0]
    return out.transpose(1, 2)


def _attend_rows(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """`prefix_attention` of a few queries at once, [B, Hq, S, D]; key and value have all heads."""
    # Query i of row b sees keys 0 .. starts[b] + i. SDPA's `is_causal` lines query 0 up with key 0, whatever
    # L is, so it is right only without a prefix; with one it would hide most of it. The mask also hides what
    # stands behind a shorter row's tokens, which other sequences left in the buffer.
    mask = _visible(starts, query.shape[2], key.shape[2])
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    # SDPA has no soft cap, so the scores are formed. The cap comes before the mask: tanh would turn a masked
    # -inf into -softcap, and hidden keys would keep some weight. The softmax sums in fp32, as transformers'
    # own attention does.
    scores = softcapped(query @ key.transpose(-1, -2) * scaling, softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value


def _visible(starts: Tensor, width: int, length: int) -> Tensor:
    """[B, 1, width, length], True where query i of row b may look: keys 0 .. starts[b] + i."""
    last = starts[:, None] + torch.arange(width, device=starts.device)
    return (torch.arange(length, device=starts.device) <= last[..., None])[:, None]


def softcapped(scores: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(scores / softcap), which lies within +-softcap (Gemma 2, arXiv 2408.00118); None: as
    they are.
    """
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
