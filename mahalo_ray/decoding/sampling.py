"""Drawing tokens: temperature, top-k, top-p, min-p, with randomness that belongs to the request alone.

Every draw is a pure function of (request seed, step, candidate, position in the sequence): a counter-based
generator instead of a stateful one, so the batch a request runs in, its order and its neighbours change
nothing. The step counts the choices among several candidates made so far. Without it, the next step would
draw with the numbers of the candidates rejected before, where those were longer than the accepted one, and
say the same again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mahalo_ray.config import SamplingParams as SamplingParams


@dataclass(frozen=True)
class SamplingBatch:
    """The parameters of B rows: table [B, 4] (temperature, top_k, top_p, min_p); which of them matter is
    decided once."""

    table: Tensor
    some_greedy: bool
    all_greedy: bool
    plain_temperature: bool  # 1 everywhere
    top_k: bool
    top_p: bool
    min_p: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> SamplingBatch:
        rows = [(p.temperature, p.top_k, p.top_p, p.min_p) for p in params]
        greedy = [p.temperature == 0 for p in params]
        return cls(
            torch.tensor(rows, dtype=torch.float32, device=device),
            some_greedy=any(greedy),
            all_greedy=all(greedy),
            plain_temperature=all(p.temperature == 1 for p in params),
            top_k=any(p.top_k for p in params),
            top_p=any(p.top_p < 1 for p in params),
            min_p=any(p.min_p > 0 for p in params),
        )

    @property
    def truncates(self) -> bool:
        return self.top_k or self.top_p or self.min_p

    def take(self, rows: Tensor) -> SamplingBatch:
        """The parameters of these rows, in this order."""
        return replace(self, table=self.table[rows])


@dataclass(frozen=True)
class DrawLimits:
    """What a request's draws are bound to. No end token is drawn among its first `min_tokens`;
    `repetition_penalty` divides the positive logits of tokens that occurred, in the prompt or the answer, and
    multiplies their negative ones (CTRL, arXiv 1909.05858, section 4.1)."""

    min_tokens: int = 0
    repetition_penalty: float = 1.0


UNBOUND = DrawLimits()


def penalised(logits: Tensor, occurred: Tensor, penalty: Tensor) -> Tensor:
    """logits [B, V] with the tokens that occurred [B, V] made less likely, penalty [B, 1]."""
    return torch.where(occurred, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


_MOST_LOGITS = 1 << 26
_MOST_LOGITS_ON_CPU = 1 << 19


def draw(
    logits: Tensor, params: SamplingBatch, uniform: Tensor, with_logps: bool
) -> tuple[Tensor, Tensor | None]:
    """One token per row: logits [B, V], uniform [B] in [0, 1) -> tokens [B] and, if wanted, the tokens'
    log-probs [B] under the policy itself (temperature 1, nothing cut off)."""
    # Softmax, sorting and running sums take several times the logits' memory: of many branches over a large
    # vocabulary, for some rows at a time. On a CPU few enough to stay in its cache: what is larger is fresh
    # memory at every token, and asking for its pages takes longer than the arithmetic.
    most = _MOST_LOGITS_ON_CPU if logits.device.type == "cpu" else _MOST_LOGITS
    rows = max(1, most // logits.shape[1])
    if len(logits) <= rows:
        return _draw(logits, params, uniform, with_logps)
    parts = [
        _draw(logits[part], replace(params, table=params.table[part]), uniform[part], with_logps)
        for part in (slice(start, start + rows) for start in range(0, len(logits), rows))
    ]
    tokens, logps = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(logps) if with_logps else None


def _draw(
    logits: Tensor, params: SamplingBatch, uniform: Tensor, with_logps: bool
) -> tuple[Tensor, Tensor | None]:
    logits = logits.float()
    if params.all_greedy:
        tokens = logits.argmax(dim=-1)
    else:
        scaled = logits
        temperature = params.table[:, :1]
        if not params.plain_temperature:
            scaled = logits / torch.where(temperature == 0, 1.0, temperature)
        if params.truncates:
            scaled = truncated(scaled, params)
        tokens = _drawn(torch.softmax(scaled, dim=-1), uniform)
        if params.some_greedy:
            tokens = torch.where(temperature[:, 0] == 0, logits.argmax(dim=-1), tokens)
    if not with_logps:
        return tokens, None
    # not chosen logit - logsumexp, which takes many times as long on the CPU
    return tokens, torch.log_softmax(logits, dim=-1).gather(1, tokens[:, None])[:, 0]


_BLOCK = 256  # tokens


def _drawn(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [B]: the first whose cumulative mass exceeds uniform [B] of the whole, probabilities [B, V].

    A token of probability 0 is never that. Blocks of the vocabulary are added up first, and only the block
    that holds the token is looked at one by one: running sums in double precision over all of it cost more
    than the softmax.
    """
    rows, vocab_size = probabilities.shape
    blocks = F.pad(probabilities, (0, -vocab_size % _BLOCK)).view(rows, -1, _BLOCK)
    until = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    threshold = uniform[:, None] * until[:, -1:]
    block = torch.searchsorted(until, threshold, right=True).clamp_(max=until.shape[1] - 1)  # NaN: the last
    within = blocks[torch.arange(rows, device=block.device), block[:, 0]].cumsum(-1, dtype=torch.float64)
    before = F.pad(until, (1, 0)).gather(1, block)
    # Sums in another order differ in the last digits: the block found must hold the token.
    last = torch.nextafter(within[:, -1:], within.new_zeros(1))
    inside = torch.searchsorted(within, torch.minimum(threshold - before, last), right=True)
    return (block * _BLOCK + inside)[:, 0].clamp_(max=vocab_size - 1)


def truncated(logits: Tensor, params: SamplingBatch) -> Tensor:
    """logits [B, V] with -inf where a row's filters cut a token off; the likeliest token always stays."""
    _, top_k, top_p, min_p = params.table.unbind(dim=1)
    cut = float("-inf")
    if params.top_k or params.top_p:
        ordered, order = logits.sort(dim=-1, descending=True)
        if params.top_k:
            rank = torch.arange(logits.shape[-1], device=logits.device)
            ordered = ordered.masked_fill((rank >= top_k[:, None]) & (top_k[:, None] > 0), cut)
        if params.top_p:
            probabilities = torch.softmax(ordered, dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities
            ordered = ordered.masked_fill((before >= top_p[:, None]) & (top_p[:, None] < 1), cut)
        logits = torch.empty_like(logits).scatter_(1, order, ordered)
    if params.min_p:
        floor = logits.amax(dim=-1, keepdim=True) + torch.log(min_p)[:, None]  # log 0 = -inf cuts nothing
        logits = logits.masked_fill(logits < floor, cut)
    return logits


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical, not arithmetic, shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mixed(key: Tensor, counter: Tensor | int) -> Tensor:
    """A 64-bit hash of (key, counter), elementwise in int64: the SplitMix64 finaliser (Steele, Lea and Flood,
    2014)."""
    x = (
        key + (counter + 1) * _GOLDEN
        if isinstance(counter, Tensor)
        else key + _wrapped((counter + 1) * _GOLDEN)
    )
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def _wrapped(value: int) -> int:
    """A Python integer as the int64 that the same arithmetic would leave in a register."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def draw_keys(
    seeds: Sequence[int], num_candidates: int, device: torch.device, steps: Sequence[int] | None = None
) -> Tensor:
    """Keys [N, K]: one per (request seed, step, candidate). `steps` [N]: 0 for all of them if left out."""
    seed = torch.tensor([_wrapped(int(s)) for s in seeds], dtype=torch.int64, device=device)
    step = 0 if steps is None else torch.tensor(steps, dtype=torch.int64, device=device)
    return mixed(mixed(seed, step)[:, None], torch.arange(num_candidates, device=device)[None])


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """Numbers in [0, 1), float64, one per key and token position: the top 52 bits of the hash."""
    return _shift_right(mixed(keys, positions), 12).to(torch.float64) * 2.0**-52
