"""Losses as pure functions: tensors in, one loss per row (or step, or pair) out; the caller weighs and
averages.

Nothing here averages over a batch: a mean over micro-batches of different sizes is not the mean over the
batch, so the training loop sums these values and divides by the count of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mahalo_ray.logprobs import (
    DEFAULT_CHUNK_SIZE,
    IGNORE_INDEX,
    completion_logps,
    shift_labels,
    sum_rows,
    token_logps,
)

__all__ = [
    "DEFAULT_CHUNK_SIZE",
    "IGNORE_INDEX",
    "bradley_terry",
    "completion_logps",
    "dpo_loss",
    "labelled",
    "modpo_loss",
    "modpo_margin",
    "sft_loss",
    "shift_labels",
    "step_bce",
    "sum_rows",
    "token_logps",
    "value_mse",
    "within_prompt_ranking",
]

DPOKind = Literal["sigmoid", "ipo", "regression"]


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float | Tensor,
    kind: DPOKind = "sigmoid",
    label_smoothing: float = 0.0,
    margin: Tensor | None = None,
    chosen_penalty: float = 0.0,
) -> Tensor:
    """Direct preference optimisation on per-row log-probs, [B].

    Log-probs are summed over an answer's tokens, in nats, [B] each: of the policy pi and of the frozen
    reference ref, for the chosen answer c and the rejected answer r of one prompt. With
    h = (log pi(c) - log ref(c)) - (log pi(r) - log ref(r)) and x = beta h - margin:
    `sigmoid` (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) is -log sigmoid(x); `ipo` (Azar et al. 2023,
    arXiv 2310.12036, eq. 17) is (x / beta - 1 / (2 beta))^2. `regression` (REBEL, Gao et al. 2024,
    arXiv 2404.16767) is (h - margin / beta)^2 with a difference of rewards as the margin: where it is 0, pi
    is proportional to ref exp(reward / beta), and no pair is pushed further. MAH-DPO (MAHALO,
    arXiv 2510.01167) takes this loss under the head of each pair's objective.

    `label_smoothing` e (Mitchell 2023, conservative DPO) is the assumed share of swapped pairs:
    (1 - e) loss(x) + e loss(-x) for the first two kinds; for `regression` the second loss has the margin
    negated. beta is a number or one per row [B]; margin [B] is in units
    of beta h. Length-normalised variants take averaged log-probs.

    `chosen_penalty` l (DPO-Positive, Pal et al. 2024, arXiv 2402.13228, eq. 3) takes
    l max(0, log ref(c) - log pi(c)) off h: a pair cannot be learned by making its chosen answer less likely
    than the reference has it, only less so than the rejected one.

    ValueError for an unknown kind, a beta not above 0, a smoothing outside [0, 0.5), or a negative penalty.

    >>> import torch
    >>> same = torch.tensor([-10.0])
    >>> dpo_loss(same, same, same, same, beta=0.1)  # nothing learned yet: log 2
    tensor([0.6931])
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}: the share of swapped pairs lies in [0, 0.5)")
    if isinstance(beta, float | int) and beta <= 0:
        raise ValueError(f"beta is {beta}: it must be above 0")
    if chosen_penalty < 0:
        raise ValueError(f"chosen_penalty is {chosen_penalty}: it cannot be below 0")
    logits = beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))
    if chosen_penalty > 0:
        logits = logits - beta * chosen_penalty * F.relu(reference_chosen - policy_chosen)
    if margin is not None:
        logits = logits - margin
    if kind == "sigmoid":
        right, swapped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    elif kind == "ipo":
        right, swapped = ((logits - 0.5) / beta) ** 2, ((logits + 0.5) / beta) ** 2
    elif kind == "regression":
        if margin is None:
            raise ValueError("the loss 'regression' regresses on a margin: give one")
        right, swapped = (logits / beta) ** 2, ((logits + 2 * margin) / beta) ** 2
    else:
        raise ValueError(f"unknown DPO loss '{kind}'. Known: sigmoid, ipo, regression.")
    if label_smoothing == 0.0:
        return right
    return (1 - label_smoothing) * right + label_smoothing * swapped


def modpo_margin(
    chosen_scores: Tensor, rejected_scores: Tensor, weights: Sequence[float], index: int
) -> Tensor:
    """The margin [B] of multi-objective DPO (MODPO, Zhou et al. 2024, arXiv 2310.03708) for pairs of
    objective `index`.

    scores [B, H] are rewards of all objectives; weights has H entries summing to 1; the objective's own
    column is not used. margin = sum over j != index of w_j (r_j(chosen) - r_j(rejected)) / w_index.
    ValueError if w_index is not above 0.
    """
    pair_weight = weights[index]
    if pair_weight <= 0:
        raise ValueError(
            f"weight {index} is {pair_weight}: MODPO divides by the weight of the pairs' own objective"
        )
    others = torch.as_tensor(weights, dtype=chosen_scores.dtype, device=chosen_scores.device).clone()
    others[index] = 0.0
    difference = chosen_scores - rejected_scores
    # A missing score (NaN) of the pair's own objective must not reach the sum through 0 * NaN.
    difference = difference.index_fill(1, torch.tensor([index], device=difference.device), 0.0)
    return difference @ others / pair_weight


def modpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    weights: Sequence[float],
    index: int,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """MODPO (Zhou et al. 2024, arXiv 2310.03708), [B]: DPO with beta / w_index and `modpo_margin`.

    Log-probs [B] as in `dpo_loss`, scores [B, H] and errors as in `modpo_margin`.
    """
    margin = modpo_margin(chosen_scores, rejected_scores, weights, index)
    return dpo_loss(
        policy_chosen,
        policy_rejected,
        reference_chosen,
        reference_rejected,
        beta / weights[index],
        "sigmoid",
        label_smoothing,
        margin,
    )


def sft_loss(logps: Tensor, normaliser: float | Tensor) -> Tensor:
    """Cross entropy per row [B] in nats from summed completion log-probs [B].

    `normaliser` is what the whole (global) batch is divided by, normally its number of counted tokens: the
    sum of the returned rows over all micro-batches and workers is then the mean over tokens. With a row's
    own number of tokens [B] it is the mean over the tokens of that row: what the policy's `chosen_anchor`
    adds to a preference loss (Pang et al. 2024, arXiv 2404.19733, eq. 2).
    """
    return -logps / normaliser


def labelled(targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Boolean, shape of `targets`: where a label exists (target is not NaN and mask, if given, is true)."""
    present = ~targets.isnan()
    return present if mask is None else present & mask.bool()


def value_mse(values: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error, shape of `values`; 0 (and no gradient) where no label exists. ValueError if the shapes
    differ.
    """
    return _pointwise(lambda v, t: (v - t) ** 2, values, targets, mask)


def step_bce(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Binary cross entropy in nats of logits against targets in [0, 1], shape of `logits`; 0 (and no
    gradient) where no label exists. A target may be a fraction: the mean of several judgements.
    """
    return _pointwise(
        lambda x, t: F.binary_cross_entropy_with_logits(x, t, reduction="none"), logits, targets, mask
    )


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """-log sigmoid(chosen - rejected - margin), [B], of the scores [B] of both answers (Bradley and Terry
    1952; margin [B] as in Touvron et al. 2023, arXiv 2307.09288).
    """
    difference = chosen - rejected
    return -F.logsigmoid(difference if margin is None else difference - margin)


def within_prompt_ranking(
    scores: Tensor,
    targets: Tensor,
    groups: Tensor,
    threshold: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Pairwise logistic loss [P] over all pairs of one prompt whose targets differ by more than `threshold`.

    scores, targets, groups (the prompt's number), mask: same shape, flattened here. A pair (i, j) of one
    group with targets_i > targets_j + threshold costs -log sigmoid(score_i - score_j). P = 0 when there is no
    such pair; the sum of the empty result is 0 and still carries a (zero) gradient.
    """
    if threshold < 0:
        raise ValueError(f"threshold is {threshold}: a difference of targets cannot be below 0")
    present = labelled(targets, mask).flatten()
    scores, targets, groups = (tensor.flatten()[present] for tensor in (scores, targets, groups))
    # All pairs at once as [N, N] comparisons of the N labelled scores: a micro-batch holds few candidates.
    better = (groups[:, None] == groups[None, :]) & (targets[:, None] - targets[None, :] > threshold)
    high, low = better.nonzero(as_tuple=True)
    return -F.logsigmoid(scores[high] - scores[low])


def _pointwise(
    loss: Callable[[Tensor, Tensor], Tensor], predictions: Tensor, targets: Tensor, mask: Tensor | None
) -> Tensor:
    if predictions.shape != targets.shape:
        raise ValueError(
            f"predictions {list(predictions.shape)} and targets {list(targets.shape)} must have one shape"
        )
    present = labelled(targets, mask)
    # Both sides are replaced before the loss: where() after it would let a NaN target through the gradient.
    safe_targets = targets.to(predictions.dtype).masked_fill(~present, 0.0)
    return loss(predictions.masked_fill(~present, 0.0), safe_targets) * present
