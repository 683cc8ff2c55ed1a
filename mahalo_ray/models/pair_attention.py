"""Preference pairs with the prompt read once: packed as [prompt, chosen, rejected], one pair behind another.

Chosen and rejected answers share their prompt, so a pair costs P + C + R tokens instead of 2 P + C + R, and
nothing is padded. The tokens lie in one sequence [1, N]; this attention, a transformers attention
implementation, lets the chosen answer see its prompt and itself, and the rejected one the same prompt and
itself. Everything else in a transformer works on single tokens and needs only their positions.

The last token of the prompt, which predicts the first token of both answers, is the first of each answer's
own span, and the last token of an answer, which predicts nothing that counts, is left out. So every state
predicts one token, as in an ordinary sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mahalo_ray.models.attention import (
    SCORES_AT_ONCE,
    prefix_attention,
    register_attention,
    repeat_heads,
)
from mahalo_ray.models.sharding import whole_modules

IMPLEMENTATION = "mahalo_pairs"
_IN_ONE_CALL = {"cuda"}  # devices on which calls cost more than padding


@dataclass(frozen=True)
class PairLayout:
    """Where R pairs lie in their packed sequence of N tokens, and what each token attends to (a View).

    `lengths` [R][3]: tokens of prompt, chosen and rejected as packed (the prompt's last token is counted with
    each answer, an answer's last one not at all); each may be 0.
    """

    lengths: list[list[int]]

    @property
    def context(self) -> int:
        """Tokens of the longest prompt with one answer."""
        return max(prompt + max(chosen, rejected) for prompt, chosen, rejected in self.lengths)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        """query [1, Hq, N, D]; key, value [1, Hkv, N, D] -> [1, N, Hq, D]."""
        one_call = query.device.type in _IN_ONE_CALL and softcap is None
        if one_call and len(self.lengths) * self._widest**2 <= SCORES_AT_ONCE:
            return self._attend_padded(query, key, value, scaling)
        # Two small attentions per pair instead of one over the whole sequence. [prompt, chosen] is plain
        # causal attention; the R' rejected queries look at P prompt keys and R' of their own, and begin at
        # position P of these. One causal attention over all N tokens would show the rejected answer the
        # chosen one, and each pair those before it; a mask against that would cost N^2 scores.
        # `split` has one gradient, a concatenation; a slice for each would be a tensor of N tokens for each.
        cuts = [count for prompt, chosen, rejected in self.lengths for count in (prompt + chosen, rejected)]
        queries, keys, values = (states.split(cuts, dim=2) for states in (query, key, value))
        outputs = []
        for pair, (prompt, _, rejected) in enumerate(self.lengths):
            first, second = 2 * pair, 2 * pair + 1
            outputs.append(
                prefix_attention(queries[first], keys[first], values[first], None, scaling, softcap)
            )
            if rejected > 0:
                k, v = (torch.cat([s[first][:, :, :prompt], s[second]], dim=2) for s in (keys, values))
                starts = torch.tensor([prompt], device=query.device)
                outputs.append(prefix_attention(queries[second], k, v, starts, scaling, softcap))
        return torch.cat(outputs, dim=1)

    def _attend_padded(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """The same in one call over all pairs, each padded to the widest, under a mask."""
        # Copies into and out of the padded layout are by distinct indices, so that the gradients of both are
        # copies too and no two additions meet.
        place, bias = self._padding(query)
        rows, width = bias.shape[0], bias.shape[-1]
        heads, dim = [states.shape[1] for states in (query, key, value)], query.shape[-1]
        tokens = torch.cat([query[0], key[0], value[0]]).transpose(0, 1)  # [N, all heads, D]
        blank = tokens.new_zeros(rows * width, sum(heads), dim)
        padded = blank.index_copy(0, place, tokens).unflatten(0, (rows, width)).transpose(1, 2)
        queries, keys, values = padded.split(heads, dim=1)
        groups = heads[0] // heads[1]
        out = F.scaled_dot_product_attention(
            queries,
            repeat_heads(keys, groups),
            repeat_heads(values, groups),
            attn_mask=bias,
            scale=scaling,
        )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, place)[None]

    @cached_property
    def _widest(self) -> int:
        """Tokens of the longest pair, rounded up to what attention kernels want of a mask."""
        return -(-max(map(sum, self.lengths)) // 16) * 16

    def _padding(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """For the pairs padded to `_widest` tokens T: the place of every packed token [N], and a bias
        [R, 1, T, T] of 0 or -inf, in the dtype and on the device of `like`. Made once for all layers."""
        key = (like.device, like.dtype)
        if key not in self._paddings:
            count, width = len(self.lengths), self._widest
            lengths = torch.tensor(self.lengths, device=like.device)
            at = torch.arange(width, device=like.device)
            place = (torch.arange(count, device=like.device)[:, None] * width + at)[
                at < lengths.sum(1)[:, None]
            ]
            chosen, rejected = (lengths[:, :n].sum(1)[:, None] for n in (1, 2))  # where they begin
            is_chosen, is_later = (at >= chosen) & (at < rejected), at >= rejected
            # A padding token looks at something too: a row without any key would be NaN, in the gradients of
            # keys and values as well.
            hidden = (at > at[:, None]) | (is_later[:, :, None] & is_chosen[:, None])
            bias = torch.zeros(count, 1, width, width, dtype=like.dtype, device=like.device)
            self._paddings[key] = (place, bias.masked_fill_(hidden[:, None], float("-inf")))
        return self._paddings[key]

    @cached_property
    def _paddings(self) -> dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]]:
        return {}

    def positions(self, device: torch.device) -> Tensor:
        """Position ids [1, N]: both answers begin where their prompt ends. Counted through the packed
        sequence, a rejected answer would stand behind the chosen one and be encoded for other positions.
        """
        parts = []
        for prompt, chosen, rejected in self.lengths:
            parts += [torch.arange(prompt + chosen), torch.arange(prompt, prompt + rejected)]
        return torch.cat(parts)[None].to(device)

    def rows(self, device: torch.device) -> Tensor:
        """The sequence [1, N] that every token belongs to: pair i's chosen answer is number i, its rejected
        one R + i. A prompt's tokens count for the chosen one; they predict nothing that counts."""
        count = len(self.lengths)
        numbers = torch.arange(count)
        columns = torch.stack([numbers, numbers, numbers + count], dim=1).flatten()
        return torch.repeat_interleave(columns, torch.tensor(self.lengths).flatten())[None].to(device)


def packed_arguments(pair_lengths: Tensor | None) -> dict[str, Any]:
    """Keyword arguments of a backbone that reads packed pairs of lengths [R, 3]; none for ordinary rows
    (None)."""
    if pair_lengths is None:
        return {}
    layout = PairLayout(pair_lengths.tolist())
    return {"position_ids": layout.positions(pair_lengths.device), "pair_layout": layout}


def sequence_numbers(labels: Tensor, pair_lengths: Tensor | None) -> Tensor:
    """The number of the sequence that every token belongs to, shaped as the labels [B, T] or [1, N]: its row,
    or for packed pairs `PairLayout.rows`."""
    if pair_lengths is None:
        return torch.arange(labels.shape[0], device=labels.device)[:, None].expand_as(labels)
    return PairLayout(pair_lengths.tolist()).rows(labels.device)


register_attention(IMPLEMENTATION, "pair_layout", "attention over packed pairs")


def packing_unsupported_reason(
    config: PretrainedConfig, attn_implementation: str, max_length: int
) -> str | None:
    """Why a model of this config cannot read packed pairs of `max_length` tokens; None if it can."""
    values = config.get_text_config().to_dict()
    kinds = set(values.get("layer_types") or ())
    window = values.get("sliding_window")
    windowed = "sliding_attention" in kinds if kinds else values.get("use_sliding_window", True)
    if attn_implementation != "sdpa":
        return f"its attention implementation is '{attn_implementation}', not 'sdpa'"
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        return f"it has {', '.join(other)} layers"
    if windowed and window and window < max_length:
        return f"it attends to a sliding window of {window} tokens, fewer than {max_length}"
    if any(values.get(name) for name in ("attention_dropout", "attn_pdrop")):
        return "it trains with attention dropout"
    return None


def enable_pair_packing(backbone: PreTrainedModel) -> None:
    """Give a backbone the attention of packed pairs. ValueError if its states of one small pair then differ
    from those of two ordinary sequences, by more than 1e-3 of the largest (5 % in half precision)."""
    with whole_modules(backbone):
        expected = _states_of_a_pair(backbone, packed=False)
        backbone.set_attn_implementation(IMPLEMENTATION)
        packed = _states_of_a_pair(backbone, packed=True)
    tolerance = 1e-3 if backbone.dtype == torch.float32 else 0.05
    if (packed - expected).abs().max() > tolerance * expected.abs().max():
        raise ValueError(f"{type(backbone).__name__} computes something else when pairs share their prompt")


@torch.no_grad()
def _states_of_a_pair(backbone: PreTrainedModel, packed: bool) -> Tensor:
    """States [7, D] of a prompt of 2 tokens and answers of 3 and 2, packed or as two ordinary sequences."""
    training, device = backbone.training, next(backbone.parameters()).device
    ids = torch.tensor([[5, 3, 7, 2, 11, 13, 17]], device=device)
    ids %= backbone.config.get_text_config().vocab_size
    backbone.eval()
    if packed:
        arguments = packed_arguments(torch.tensor([[2, 3, 2]], device=device))
        states = backbone(input_ids=ids, use_cache=False, **arguments).last_hidden_state[0]
    else:
        chosen, rejected = ids[:, :5], torch.cat([ids[:, :2], ids[:, 5:]], dim=1)
        halves = [
            backbone(input_ids=half, use_cache=False).last_hidden_state[0] for half in (chosen, rejected)
        ]
        states = torch.cat([halves[0], halves[1][2:]])
    backbone.train(training)
    return states.float()
