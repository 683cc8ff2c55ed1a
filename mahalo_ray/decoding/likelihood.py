"""How likely given tokens are under the policy itself: temperature 1, nothing cut off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mahalo_ray.decoding.kv_cache import RaggedCache, SlotTable, pad_right
from mahalo_ray.decoding.policy import HeadMix, Policy

_POSITIONS_AT_ONCE = 512  # whose [positions, vocabulary] logits exist at one time


@dataclass(frozen=True)
class RankedToken:
    """A token and its log-probability."""

    token_id: int
    logp: float


@dataclass(frozen=True)
class TokenLogps:
    """A sequence's tokens with their log-probabilities in nats, each given all before it.

    logps[0] is None: nothing predicts the first token. top[i]: the likeliest tokens at that place, best
    first.
    """

    token_ids: list[int]
    logps: list[float | None]
    top: list[list[RankedToken]]

    def after(self, start: int) -> TokenLogps:
        """Those of the tokens from `start` on."""
        return TokenLogps(self.token_ids[start:], self.logps[start:], self.top[start:])


@torch.no_grad()
def token_logps(
    policy: Policy, sequences: Sequence[Sequence[int]], mixes: Sequence[HeadMix], top: int
) -> list[TokenLogps]:
    """Log-probabilities of all tokens of these sequences, and the `top` likeliest at every place.

    One forward over all of them; `mixes[i]`: of the policy's heads, for the i-th sequence. Sequences must not
    be empty and must fit the policy's context.
    """
    slots = SlotTable()
    cache = RaggedCache()
    numbers = slots.slots(slots.add(len(sequences)))
    cache.add(len(sequences))
    ids, counts = pad_right(sequences)
    view = cache.append(numbers, counts, ids.shape[1])
    device = policy.device
    every = torch.arange(len(sequences), device=device)
    hidden = policy.reader(mixes)(ids.to(device), view.positions(ids.shape[1], device), view, every)
    # Of every sequence all places but the last, which predict its tokens but the first.
    places = [(row, place) for row, count in enumerate(counts.tolist()) for place in range(count - 1)]
    rows, columns = (torch.tensor([pair[i] for pair in places], device=device) for i in (0, 1))
    results = [TokenLogps(list(sequence), [None], [[]]) for sequence in sequences]
    if not places:
        return results
    logits_of = policy.head(mixes)
    targets = ids.to(device)[rows.long(), columns.long() + 1]
    for begin in range(0, len(places), _POSITIONS_AT_ONCE):
        chunk = slice(begin, begin + _POSITIONS_AT_ONCE)
        logits = logits_of(hidden[rows[chunk], columns[chunk]], rows[chunk]).float()
        logps = torch.log_softmax(logits, dim=-1)
        chosen = logps.gather(1, targets[chunk, None])[:, 0].tolist()
        best, best_ids = logps.topk(min(top, logps.shape[-1]), dim=-1)
        ranked = zip(rows[chunk].tolist(), chosen, best_ids.tolist(), best.tolist(), strict=True)
        for row, logp, candidates, values in ranked:
            results[row].logps.append(logp)
            results[row].top.append(
                [RankedToken(token, value) for token, value in zip(candidates, values, strict=True)]
            )
    return results
