"""What is measured while a policy trains: its KL to the reference at several mixtures of the heads, the
metrics of held-out pairs, and how far the objectives' gradients pull against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.stopping import Boundary
from mahalo_ray.logprobs import IGNORE_INDEX
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.models.pair_attention import packed_arguments
from mahalo_ray.training.batches import Indices, shard
from mahalo_ray.training.deepspeed_engine import to_device, training_device
from mahalo_ray.training.pairs import PairInputs, TokenIds, pair_inputs
from mahalo_ray.training.recipe import PAD_ID, Inference, Tensors

PairMetrics = Callable[[Inference], dict[str, float]]
ObjectiveLosses = Callable[[nn.Module, Tensors], Tensor]
# Name of the mixture of all heads at equal weights, and of the one half-way between it and a head.
EVEN, MOSTLY = "even", "mostly_{}"
KL = "/kl"
MALFORMED, MALFORMED_AT_START = "malformed_turns", "malformed_turns_at_start"
TurnCheck = Callable[[str], bool]
ReferenceStates = Callable[[Sequence[Tensors]], list[Tensor]]


def mixture_names(heads: Sequence[str]) -> tuple[str, ...]:
    """The mixtures at which a policy's KL is measured: every head alone, all at equal weights, and half-way
    between the two for every head. A single head is all there is.

    >>> mixture_names(["accuracy", "engagement"])
    ('accuracy', 'engagement', 'even', 'mostly_accuracy', 'mostly_engagement')
    """
    between = (EVEN, *(MOSTLY.format(head) for head in heads)) if len(heads) > 1 else ()
    return (*heads, *between)


class PolicyProbe:
    """What the training loop asks every `every_steps` steps; every worker takes part."""

    def __init__(
        self,
        every_steps: int,
        kl: HeldOutKl,
        conflict: GradientConflict | None,
        pairs: PairMetrics,
        turns: SampledTurns | None = None,
        max_kl: float | None = None,
    ) -> None:
        self.every_steps, self._kl, self._conflict, self._pairs = every_steps, kl, conflict, pairs
        self._turns, self._max_kl = turns, max_kl

    @property
    def may_stop(self) -> bool:
        """Whether there is a KL budget."""
        return self._max_kl is not None

    def prepare(self, infer: Inference) -> None:
        """Called once with the model as it was built, before a checkpoint is loaded."""
        self._kl.prepare(infer)
        if self._turns is not None:
            self._turns.prepare(infer)

    def metrics(self, infer: Inference, model: nn.Module) -> dict[str, float]:
        """All metrics, the same on every worker."""
        metrics = self._kl.metrics(infer) | self._pairs(infer)
        if self._turns is not None:
            metrics |= self._turns.metrics(infer)
        return metrics if self._conflict is None else metrics | self._conflict.metrics(model)

    def excess(self, metrics: Mapping[str, float]) -> str | None:
        """What of a measurement is beyond the KL budget, in words; None where nothing is."""
        if self._max_kl is None:
            return None
        mixture = max(self._kl.mixtures, key=lambda name: metrics[name + KL])
        value = metrics[mixture + KL]
        if value <= self._max_kl:
            return None
        return f"KL to the reference of {value:.3g} nats per token at '{mixture}', above {self._max_kl:g}"


class HeldOutKl:
    """KL to the reference of every mixture of `mixture_names`, at the tokens of held-out chosen answers.

    Heads that stay near the reference alone may be far from it when they are mixed: each has moved in its own
    direction, and the shared backbone with both. A mixture is measured where it is likely to come: the KL at
    the answers chosen for each objective, weighted as the mixture weighs the objective. (A head at answers
    that were chosen for another objective, which it was taught to avoid, says nothing about what it will
    write.) A single head is measured at all answers alike.

    The backbone starts as the reference's, so its states [tokens, D] at the start are kept and only the
    frozen base head is needed to have the reference's distribution later. (Where the backbone is that of a
    trained policy, the states come from the reference itself.) Logits exist for `chunk_size` tokens at a
    time, of one head, the even mixture and the reference.
    """

    def __init__(
        self,
        inputs: PairInputs,
        rows: Indices,
        heads: Sequence[str],
        micro_rows: int,
        chunk_size: int,
        reference_states: ReferenceStates | None = None,
    ) -> None:
        """Of the given heads of a policy. `reference_states`: of each micro-batch, the states [tokens, D] of
        a reference whose backbone the policy does not start with."""
        if len(rows) == 0:
            raise ValueError(
                "'policy.metrics_every_steps' needs held-out pairs, and there are none: set "
                "'pairs.held_out_fraction' (higher), or 'policy.metrics_every_steps' to 0"
            )
        self.mixtures, self._heads, self._chunk_size = mixture_names(heads), tuple(heads), chunk_size
        # [mixtures, objectives]: how much the answers of an objective count for a mixture.
        objectives = inputs.pairs.objective
        self._shares = mixture_weights(len(heads)) if len(heads) > 1 else torch.ones(1, 1)
        groups = objectives if len(heads) > 1 else np.zeros_like(objectives)
        parts = shard(rows, inputs.row_groups, micro_rows, dist.get_rank(), dist.get_world_size())
        self._counted = [counted for _, counted in parts]
        self._parts = [inputs.chosen_tensors(part) for part, _ in parts]
        lengths = inputs.pairs.chosen.lengths
        # The objective of every counted token, in the order in which the states come.
        self._groups = [torch.from_numpy(np.repeat(groups[part], lengths[part])) for part, _ in parts]
        tokens = [int((part["labels"] != IGNORE_INDEX).sum()) for part in self._parts]
        # Under ZeRO-3 a call of a head is a collective operation: every worker makes as many calls.
        chunks = torch.tensor([-(-count // chunk_size) for count in tokens], device=training_device())
        dist.all_reduce(chunks, dist.ReduceOp.MAX)
        self._chunks: list[int] = chunks.tolist()
        self._reference = [] if reference_states is None else reference_states(self._parts)

    def prepare(self, infer: Inference) -> None:
        """Keep the reference's states at the counted positions."""
        if not self._reference:
            self._reference = [infer(_answer_states, part).cpu() for part in self._parts]

    def metrics(self, infer: Inference) -> dict[str, float]:
        """`{mixture}/kl` of every mixture, exact over the vocabulary, in nats per token."""
        shape = (len(self.mixtures) + 1, self._shares.shape[1])
        sums = torch.zeros(shape, dtype=torch.float64, device=training_device())
        for part, reference, groups, chunks, counted in zip(
            self._parts, self._reference, self._groups, self._chunks, self._counted, strict=True
        ):
            function = partial(_kl_sums, names=self._heads, chunks=chunks, chunk_size=self._chunk_size)
            tensors = {**part, "reference": reference, "groups": groups}
            sums += infer(function, tensors) * float(counted)
        dist.all_reduce(sums)
        totals, tokens = sums[:-1].cpu(), sums[-1].cpu()
        # An objective without a measured answer takes no share.
        shares = self._shares.double() * (tokens > 0)
        kl = (shares * totals / tokens.clamp(min=1)).sum(1) / shares.sum(1)
        return {name + KL: value for name, value in zip(self.mixtures, kl.tolist(), strict=True)}


def _answer_states(model: nn.Module, mixture: Tensor | None = None, **tensors: Tensor) -> Tensor:
    """States [N, D] that predict the answers' tokens, of what `PairInputs.chosen_tensors` gives. `mixture`
    [H]: weights of the objectives' adapters, where there are any; None: the shared backbone's states."""
    inputs = pair_inputs(tensors)
    labels, packed = tensors["labels"], packed_arguments(inputs["pair_lengths"])
    hidden = cast(MultiHeadCausalLM, model).hidden_states(
        tensors["input_ids"],
        inputs["attention_mask"],
        None if mixture is None else mixture[None, None],
        **packed,
    )
    return hidden[labels != IGNORE_INDEX]


def over_all_heads(weights: Tensor, names: Sequence[str], policy: MultiHeadCausalLM) -> Tensor:
    """Weights [..., heads named] as [..., H]: the policy's other heads weigh 0."""
    columns = torch.tensor([policy.objectives.index(name) for name in names], device=weights.device)
    whole = weights.new_zeros(*weights.shape[:-1], len(policy.objectives))
    return whole.index_copy(-1, columns, weights)


def _kl_sums(
    model: nn.Module,
    reference: Tensor,
    groups: Tensor,
    names: Sequence[str],
    chunks: int,
    chunk_size: int,
    **inputs: Tensor,
) -> Tensor:
    """Sums [mixtures + 1, groups] over the tokens of each group of the KL of every mixture, in the order of
    `mixture_names`, and the tokens. groups [tokens]: the number of every token's group."""
    policy = cast(MultiHeadCausalLM, model)
    base_head, heads = policy.base_head, [policy.head(name) for name in names]
    assert base_head is not None, "the recipe keeps the base head for these metrics"
    weights = mixture_weights(len(heads)).to(reference.device)
    mixtures = len(weights)
    # With adapters every mixture has states of its own.
    mixed_by = over_all_heads(weights, names, policy)
    own_states = (
        [] if policy.adapters is None else [_answer_states(model, mixture=w, **inputs) for w in mixed_by]
    )
    states = own_states[0] if own_states else _answer_states(model, **inputs)
    sums = torch.zeros(mixtures + 1, len(heads), dtype=torch.float64, device=states.device)
    for number in range(chunks):
        chunk = slice(number * chunk_size, (number + 1) * chunk_size)
        frozen, of_group = base_head(reference[chunk]).float().log_softmax(-1), groups[chunk]

        def add(row: int, logits: Tensor, frozen: Tensor = frozen, of_group: Tensor = of_group) -> None:
            logps = policy.transform(logits).float().log_softmax(-1)
            sums[row].index_add_(0, of_group, (logps.exp() * (logps - frozen)).sum(-1).double())

        if own_states:
            for row, mixture in enumerate(weights):
                projections = [head(own_states[row][chunk], transformed=False).float() for head in heads]
                add(
                    row, sum((w * z for w, z in zip(mixture, projections, strict=True)), 0.0 * projections[0])
                )
            continue
        # Heads are mixed before scale and soft cap, as decoding does. Each is called twice, so that the
        # logits of two exist at a time and not of all: under ZeRO-3 its shards are gathered twice.
        even = torch.zeros_like(frozen)
        for index, head in enumerate(heads):
            projected = head(states[chunk], transformed=False)
            add(index, projected)
            even += projected.float() / len(heads)
        if len(heads) > 1:
            add(len(heads), even)
            for index, head in enumerate(heads, start=len(heads) + 1):
                add(index, (head(states[chunk], transformed=False).float() + even) / 2)
    sums[-1].index_add_(0, groups, torch.ones_like(groups, dtype=torch.float64))
    return sums


class SampledTurns:
    """How many turns, sampled at every mixture on held-out prompts, are malformed: cut off, with a special
    token inside, or (where `check` knows) with words that nobody should say.

    Losses and accuracies on pairs do not show a policy that falls apart; its own turns do. The same random
    numbers are drawn at every measurement, and the rate at the start is kept to compare with.
    """

    def __init__(
        self,
        prompts: Sequence[TokenIds],
        heads: Sequence[str],
        max_tokens: int,
        chat: ChatFormat,
        check: TurnCheck | None,
        attention: str,
        seed: int,
        boundary: Boundary | None = None,
    ) -> None:
        """One turn per prompt, of at most `max_tokens` tokens; prompt n is answered at mixture n modulo their
        number. `attention`: the attention function for whole rows, where pairs are read packed. `boundary`:
        pairs are of steps, so of a turn only its first step counts, which ends there."""
        mixtures = mixture_weights(len(heads))
        rank, workers = dist.get_rank(), dist.get_world_size()
        self._heads = tuple(heads)
        # A worker without a prompt of its own takes one that it does not count: calls are collective.
        numbers = list(range(len(prompts)))[rank::workers]
        self._counted = bool(numbers)
        numbers = numbers or [0]
        longest = max(len(prompts[number]) for number in numbers)
        rows = [[PAD_ID] * (longest - len(prompts[n])) + prompts[n] for n in numbers]
        mask = [[0] * (longest - len(prompts[n])) + [1] * len(prompts[n]) for n in numbers]
        draws = np.random.default_rng(seed).random((len(prompts), max_tokens))
        self._tensors: Tensors = {
            "input_ids": torch.tensor(rows),
            "attention_mask": torch.tensor(mask),
            "weights": mixtures[torch.tensor(numbers) % len(mixtures)],
            "draws": torch.from_numpy(draws[numbers]).float(),
            "ends": torch.tensor(sorted(chat.end_ids)),
        }
        self._chat, self._check, self._attention, self._boundary = chat, check, attention, boundary
        self._special = {*chat.tokenizer.all_special_ids, *chat.end_ids}
        self._at_start = 0.0

    def prepare(self, infer: Inference) -> None:
        """Measure the start."""
        self._at_start = self._rate(infer)

    def metrics(self, infer: Inference) -> dict[str, float]:
        """`malformed_turns`, a share, and the same at the start."""
        return {MALFORMED: self._rate(infer), MALFORMED_AT_START: self._at_start}

    def _rate(self, infer: Inference) -> float:
        function = partial(_sample_turns, names=self._heads, attention=self._attention)
        turns = infer(function, self._tensors).tolist()
        bad = sum(map(self._is_malformed, turns))
        counts = torch.tensor([bad, len(turns)], dtype=torch.float64, device=training_device())
        counts *= float(self._counted)
        dist.all_reduce(counts)
        return float(counts[0] / counts[1])

    def _is_malformed(self, sampled: list[int]) -> bool:
        ids = [token for token in sampled if token >= 0]
        if self._boundary is not None:
            if ids[0] in self._chat.end_ids:
                return False  # the step before was the last
            texts = ((n, self._chat.decode(ids[:n])) for n in range(1, len(ids) + 1))
            ends = (text for n, text in texts if self._boundary.verdict(text, n) is not None)
            if (step := next(ends, None)) is not None:
                return self._check is not None and self._check(step)
        if ids[-1] not in self._chat.end_ids or any(token in self._special for token in ids[:-1]):
            return True
        return self._check is not None and self._check(self._chat.decode(ids))


def mixture_weights(heads: int) -> Tensor:
    """Weights [mixtures, heads] of `mixture_names`."""
    alone = torch.eye(heads)
    if heads == 1:
        return alone
    even = torch.full((1, heads), 1 / heads)
    return torch.cat([alone, even, (alone + even) / 2])


def _sample_turns(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    weights: Tensor,
    draws: Tensor,
    ends: Tensor,
    names: Sequence[str],
    attention: str,
) -> Tensor:
    """Tokens [B, T] at temperature 1 behind the left-padded prompts [B, P], -1 behind a row's end.

    weights [B, heads] over the heads named; draws [B, T] in [0, 1): a row's next token is where the cumulated
    probabilities pass its draw. Stops when every row of every worker has ended.
    """
    policy = cast(MultiHeadCausalLM, model)
    heads = [policy.head(name) for name in names]
    before = policy.plain_backbone.config._attn_implementation
    policy.set_attn_implementation(attention)
    policy.mix(over_all_heads(weights, names, policy))
    cache, tokens = None, []
    running = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for draw in draws.unbind(1):
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = policy.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache, states = output.past_key_values, output.last_hidden_state[:, -1]
        mixed = sum(
            w[:, None] * head(states, transformed=False) for w, head in zip(weights.T, heads, strict=True)
        )
        cumulated = policy.transform(mixed).softmax(-1).cumsum(-1)
        token = (cumulated <= draw[:, None]).sum(-1).clamp(max=cumulated.shape[1] - 1)
        tokens.append(token.where(running, -1))
        running = running & ~torch.isin(token, ends)
        still = running.any().int()
        dist.all_reduce(still, op=dist.ReduceOp.MAX)
        if not still.item():
            break
        input_ids = token[:, None]
        attention_mask = torch.cat([attention_mask, torch.ones_like(input_ids)], dim=1)
    policy.set_attn_implementation(before)
    return torch.stack(tokens, dim=1)


class GradientConflict:
    """Cosines between the objectives' gradients on the backbone. Not with ZeRO-3, where no worker has whole
    parameters outside the engine. Holds one fp32 gradient of the backbone per objective while it runs, and
    the whole activations of a micro-batch (evaluation mode, so no recomputation)."""

    def __init__(self, objectives: Sequence[str], parts: Sequence[Tensors], losses: ObjectiveLosses) -> None:
        """`parts`: this worker's micro-batches of the fixed batch. `losses(model, tensors)` -> [H]: their
        contributions to every objective's loss."""
        self._objectives, self._parts, self._losses = tuple(objectives), list(parts), losses

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """A cosine per pair of objectives; one whose gradient is zero has none."""
        was_training = model.training
        model.eval()
        gradients = self._gradients(cast(MultiHeadCausalLM, model))
        model.train(was_training)
        return cosines(dict(zip(self._objectives, gradients, strict=True)))

    def _gradients(self, policy: MultiHeadCausalLM) -> list[list[Tensor]]:
        parameters = list(policy.backbone_parameters())
        totals = [[torch.zeros_like(p, dtype=torch.float32) for p in parameters] for _ in self._objectives]
        for part in self._parts:
            losses = self._losses(policy, to_device(part, policy.device))
            for number, total in enumerate(totals):
                # autograd.grad leaves .grad alone, and DeepSpeed's hooks on it do not run.
                keep = number < len(totals) - 1
                gradients = torch.autograd.grad(
                    losses[number], parameters, retain_graph=keep, materialize_grads=True
                )
                for summed, gradient in zip(total, gradients, strict=True):
                    summed += gradient
        for total in totals:
            for gradient in total:
                dist.all_reduce(gradient)
        return totals


def cosines(gradients: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """`gradient_cosine/{a}/{b}` of every two objectives whose gradients are not zero."""
    norms = {name: _dot(gradient, gradient) ** 0.5 for name, gradient in gradients.items()}
    return {
        f"gradient_cosine/{a}/{b}": _dot(gradients[a], gradients[b]) / (norms[a] * norms[b])
        for a, b in combinations(gradients, 2)
        if norms[a] > 0 and norms[b] > 0
    }


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return float(sum((a.double() * b.double()).sum() for a, b in zip(left, right, strict=True)))
