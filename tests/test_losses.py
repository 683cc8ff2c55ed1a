"""Losses against hand calculations, and chunked log-probs against the textbook way."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mahalo_ray import losses

V, D, N = 37, 12, 23


def tensors(seed: int = 0, dtype: torch.dtype = torch.float64, rank: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    return {
        "hidden": normal(N, D),
        "weight": normal(V, D),
        "bias": normal(V),
        "a": normal(V, rank),
        "b": normal(rank, D),
        "labels": torch.randint(0, V, (N,), generator=g),
        "upstream": torch.randn(N, generator=g, dtype=torch.float64).to(dtype),
    }


def naive(t: dict[str, Tensor], bias: bool, low_rank: bool, scale: float, softcap: float | None) -> Tensor:
    weight = t["weight"] + t["a"] @ t["b"] if low_rank else t["weight"]
    logits = scale * F.linear(t["hidden"], weight, t["bias"] if bias else None)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, t["labels"][:, None])[:, 0]


def chunked(
    t: dict[str, Tensor], chunk: int, bias: bool, low_rank: bool, scale: float, softcap: float | None
) -> Tensor:
    return losses.token_logps(
        t["hidden"],
        t["weight"],
        t["labels"],
        chunk,
        logit_softcap=softcap,
        bias=t["bias"] if bias else None,
        logit_scale=scale,
        low_rank=(t["a"], t["b"]) if low_rank else None,
    )


@settings(max_examples=30)
@given(
    st.integers(1, N + 5),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1.0, 0.3]),
    st.sampled_from([None, 2.0, 30.0]),
    st.integers(0, 1000),
)
def test_token_logps_and_gradients_equal_the_textbook(
    chunk: int, bias: bool, low_rank: bool, scale: float, softcap: float | None, seed: int
) -> None:
    names = ["hidden", "weight"] + ["bias"] * bias + ["a", "b"] * low_rank
    results = []
    for way in (naive, chunked):
        t = tensors(seed, torch.float32)
        args = (bias, low_rank, scale, softcap)
        logps = way(t, *args) if way is naive else chunked(t, chunk, *args)
        grads = torch.autograd.grad(logps, [t[n] for n in names], t["upstream"])
        results.append((logps, *grads))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_only_wanted_gradients_are_computed() -> None:
    t = tensors()
    t["weight"].requires_grad_(False)
    logps = chunked(t, 4, True, True, 1.0, None)
    grads = torch.autograd.grad(logps.sum(), [t["hidden"], t["a"], t["b"], t["bias"]])
    t2 = tensors()
    expected = torch.autograd.grad(
        naive(t2, True, True, 1.0, None).sum(), [t2["hidden"], t2["a"], t2["b"], t2["bias"]]
    )
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    t["hidden"].requires_grad_(False)
    t["a"].requires_grad_(False)
    t["b"].requires_grad_(False)
    t["bias"].requires_grad_(False)
    assert not chunked(t, 4, True, True, 1.0, None).requires_grad


def test_nothing_of_size_tokens_times_vocabulary_is_kept_or_made() -> None:
    """No tensor with more than chunk x V (or V x D) elements is saved for backward, nor ever allocated."""
    tokens, vocab, chunk = 64, 501, 8
    limit = max(chunk * vocab, vocab * D)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            made = out if isinstance(out, tuple) else (out,)
            sizes.extend(o.numel() for o in made if isinstance(o, Tensor))
            return out

    hidden = torch.randn(tokens, D, requires_grad=True)
    weight = torch.randn(vocab, D, requires_grad=True)
    labels = torch.randint(0, vocab, (tokens,))
    saved: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t)
    with hooks, Watch():
        losses.token_logps(hidden, weight, labels, chunk).sum().backward()
    assert saved and max(saved) <= vocab * D
    assert sizes and max(sizes) <= limit < tokens * vocab


def test_no_tokens_are_legal_and_give_zero_gradients() -> None:
    t = tensors(dtype=torch.float32)
    logps = losses.token_logps(
        t["hidden"][:0], t["weight"], t["labels"][:0], 4, bias=t["bias"], low_rank=(t["a"], t["b"])
    )
    assert logps.shape == (0,)
    logps.sum().backward()
    for name in ("weight", "bias", "a", "b", "hidden"):
        assert t[name].grad is not None and not t[name].grad.any(), name


def test_bf16_weights_are_softmaxed_in_fp32_and_autocast_is_followed_into_backward() -> None:
    t = tensors(dtype=torch.bfloat16)
    logps = losses.token_logps(t["hidden"], t["weight"], t["labels"], 5)
    assert logps.dtype == torch.float32
    logits = (t["hidden"] @ t["weight"].T).float()
    torch.testing.assert_close(logps, logits.log_softmax(-1).gather(1, t["labels"][:, None])[:, 0])
    logps.sum().backward()
    assert t["weight"].grad is not None and t["weight"].grad.dtype == torch.bfloat16
    t32 = tensors(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = losses.token_logps(t32["hidden"], t32["weight"], t32["labels"], 5)
    torch.testing.assert_close(cast, logps)
    cast.sum().backward()
    assert t32["weight"].grad is not None and t32["weight"].grad.dtype == torch.float32
    torch.testing.assert_close(t32["weight"].grad, t["weight"].grad.float(), rtol=2e-2, atol=2e-2)


def test_completion_logps_counts_only_labelled_tokens() -> None:
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 6, D, generator=g)
    weight = torch.randn(V, D, generator=g)
    labels = torch.randint(0, V, (3, 6), generator=g)
    labels[0, :4] = -100
    labels[1] = -100
    logps = (hidden @ weight.T).log_softmax(-1)
    picked = logps.gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    for chunk in (1, 4, 100):
        found = losses.completion_logps(hidden, weight, labels, chunk)
        torch.testing.assert_close(found, picked.sum(1))
        mean = losses.completion_logps(hidden, weight, labels, chunk, average=True)
        torch.testing.assert_close(mean, picked.sum(1) / torch.tensor([2, 1, 6]))
    assert found[1] == 0


def test_shift_labels() -> None:
    ids = torch.tensor([[5, 6, 7]])
    assert losses.shift_labels(ids).tolist() == [[6, 7, -100]]


def test_bad_arguments_are_refused() -> None:
    t = tensors()
    with pytest.raises(ValueError, match="chunk_size is 0"):
        losses.token_logps(t["hidden"], t["weight"], t["labels"], 0)
    with pytest.raises(ValueError, match=r"got \[23, 12\]"):
        losses.token_logps(t["hidden"], t["weight"][:, :3], t["labels"])
    row = torch.zeros(2)
    with pytest.raises(ValueError, match="label_smoothing"):
        losses.dpo_loss(row, row, row, row, 0.1, label_smoothing=0.5)
    with pytest.raises(ValueError, match="beta is 0"):
        losses.dpo_loss(row, row, row, row, 0)
    with pytest.raises(ValueError, match="unknown DPO loss 'hinge'"):
        losses.dpo_loss(row, row, row, row, 0.1, kind="hinge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one shape"):
        losses.value_mse(torch.zeros(2, 3), torch.zeros(2))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Two pairs: h = (-1 + 2) - (-3 + 2.5) = 1.5 and (-4 + 3) - (-2 + 2) = -1.
PAIR = tuple(torch.tensor(v) for v in ([-1.0, -4.0], [-3.0, -2.0], [-2.0, -3.0], [-2.5, -2.0]))


def test_dpo_by_hand() -> None:
    for h, found in zip((1.5, -1.0), losses.dpo_loss(*PAIR, beta=0.2).tolist(), strict=True):
        assert found == pytest.approx(-math.log(sigmoid(0.2 * h)), rel=1e-6)
    smooth = losses.dpo_loss(*PAIR, beta=0.2, label_smoothing=0.1)
    expected = -0.9 * math.log(sigmoid(0.3)) - 0.1 * math.log(sigmoid(-0.3))
    assert smooth[0].item() == pytest.approx(expected, rel=1e-6)


def test_a_chosen_answer_that_lost_likelihood_counts_against_its_pair() -> None:
    """DPO-Positive: the second pair's chosen answer lost 1 nat, the first one's gained 1."""
    found = losses.dpo_loss(*PAIR, beta=0.2, chosen_penalty=5.0).tolist()
    expected = [-math.log(sigmoid(0.2 * 1.5)), -math.log(sigmoid(0.2 * (-1.0 - 5.0 * 1.0)))]
    assert found == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="chosen_penalty is -1"):
        losses.dpo_loss(*PAIR, beta=0.2, chosen_penalty=-1.0)


def test_ipo_by_hand() -> None:
    found = losses.dpo_loss(*PAIR, beta=0.5, kind="ipo")
    assert found.tolist() == pytest.approx([(1.5 - 1.0) ** 2, (-1.0 - 1.0) ** 2])
    smooth = losses.dpo_loss(*PAIR, beta=0.5, kind="ipo", label_smoothing=0.25)
    assert smooth[0].item() == pytest.approx(0.75 * 0.25 + 0.25 * (-1.5 - 1.0) ** 2)


def test_regression_on_the_margin_by_hand() -> None:
    """h is 1.5 and -1; the margins ask for 1 / 0.5 = 2 and for -1."""
    margin = torch.tensor([1.0, -0.5])
    found = losses.dpo_loss(*PAIR, beta=0.5, kind="regression", margin=margin)
    assert found.tolist() == pytest.approx([(1.5 - 2.0) ** 2, 0.0])
    smooth = losses.dpo_loss(*PAIR, beta=0.5, kind="regression", margin=margin, label_smoothing=0.25)
    assert smooth.tolist() == pytest.approx([0.75 * 0.5**2 + 0.25 * 3.5**2, 0.25 * 2.0**2])
    with pytest.raises(ValueError, match="regresses on a margin"):
        losses.dpo_loss(*PAIR, beta=0.5, kind="regression")


def test_beta_and_margin_per_row() -> None:
    beta, margin = torch.tensor([0.2, 0.5]), torch.tensor([0.1, -0.3])
    found = losses.dpo_loss(*PAIR, beta=beta, margin=margin)
    assert found[0].item() == pytest.approx(-math.log(sigmoid(0.3 - 0.1)), rel=1e-6)
    assert found[1].item() == pytest.approx(-math.log(sigmoid(-0.5 + 0.3)), rel=1e-6)
    ipo = losses.dpo_loss(*PAIR, beta=beta, margin=margin, kind="ipo")
    assert ipo[0].item() == pytest.approx((1.5 - 0.1 / 0.2 - 1 / 0.4) ** 2, rel=1e-5)


def test_dpo_is_finite_far_from_the_reference() -> None:
    far = torch.tensor([-5000.0])
    loss = losses.dpo_loss(far, -far, far * 0, far * 0, beta=1.0)
    assert loss.item() == pytest.approx(10000.0)


def test_modpo_by_hand() -> None:
    """Weights .5/.3/.2, pairs of objective 0: margin = (.3 d1 + .2 d2) / .5, beta becomes .1 / .5."""
    chosen = torch.tensor([[1.0, 0.2, 0.9], [math.nan, 1.0, 1.0]])
    rejected = torch.tensor([[0.0, 0.6, 0.4], [math.nan, 0.0, 3.0]])
    margin = losses.modpo_margin(chosen, rejected, [0.5, 0.3, 0.2], 0)
    expected = [(0.3 * -0.4 + 0.2 * 0.5) / 0.5, (0.3 * 1.0 + 0.2 * -2.0) / 0.5]
    assert margin.tolist() == pytest.approx(expected, rel=1e-5)
    loss = losses.modpo_loss(*PAIR, chosen, rejected, [0.5, 0.3, 0.2], 0, beta=0.1)
    assert loss[0].item() == pytest.approx(-math.log(sigmoid(0.2 * 1.5 - expected[0])), rel=1e-5)
    with pytest.raises(ValueError, match="divides by the weight"):
        losses.modpo_margin(chosen, rejected, [0.0, 0.5, 0.5], 0)


def test_sft_loss_sums_to_the_mean_over_tokens() -> None:
    logps, tokens = torch.tensor([-3.0, -1.0]), 4
    assert losses.sft_loss(logps, tokens).sum().item() == pytest.approx(1.0)


def test_pointwise_losses_ignore_what_has_no_label() -> None:
    values = torch.tensor([[0.5, 2.0, 0.1]], requires_grad=True)
    targets = torch.tensor([[1.0, math.nan, 0.0]])
    mask = torch.tensor([[True, True, False]])
    mse = losses.value_mse(values, targets, mask)
    assert mse.tolist() == [[0.25, 0.0, 0.0]]
    mse.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[-1.0, 0.0, 0.0]]
    bce = losses.step_bce(torch.tensor([0.3, 0.3]), torch.tensor([1.0, math.nan]))
    assert bce.tolist() == pytest.approx([-math.log(sigmoid(0.3)), 0.0], rel=1e-6)
    assert losses.labelled(targets, mask).tolist() == [[True, False, False]]


def test_bradley_terry_by_hand() -> None:
    found = losses.bradley_terry(torch.tensor([1.0, 0.0]), torch.tensor([0.2, 0.5]))
    assert found.tolist() == pytest.approx([-math.log(sigmoid(0.8)), -math.log(sigmoid(-0.5))], rel=1e-6)
    margin = losses.bradley_terry(torch.tensor([1.0]), torch.tensor([0.2]), torch.tensor([0.3]))
    assert margin.item() == pytest.approx(-math.log(sigmoid(0.5)), rel=1e-6)


def test_within_prompt_ranking_takes_exactly_the_pairs_of_one_prompt_above_the_threshold() -> None:
    scores = torch.tensor([0.1, 0.9, 0.4, 0.0, 5.0], requires_grad=True)
    targets = torch.tensor([0.0, 1.0, 0.05, 1.0, math.nan])
    groups = torch.tensor([7, 7, 7, 8, 7])
    found = losses.within_prompt_ranking(scores, targets, groups, threshold=0.1)
    # Group 7: 1.0 against 0.0 and against 0.05; 0.05 against 0.0 is too close; NaN, group 8: no partner.
    expected = sorted([-math.log(sigmoid(0.8)), -math.log(sigmoid(0.5))])
    assert sorted(found.tolist()) == pytest.approx(expected, rel=1e-6)
    found.sum().backward()
    assert scores.grad is not None and scores.grad[3] == 0 and scores.grad[4] == 0
    masked = torch.tensor([True, True, False, True, True])
    assert len(losses.within_prompt_ranking(scores, targets, groups, 0.1, masked)) == 1


def test_ranking_without_pairs_is_an_empty_loss_with_a_gradient() -> None:
    scores = torch.tensor([0.1, 0.9], requires_grad=True)
    found = losses.within_prompt_ranking(scores, torch.zeros(2), torch.zeros(2))
    assert found.shape == (0,)
    found.sum().backward()
    assert scores.grad is not None and not scores.grad.any()
