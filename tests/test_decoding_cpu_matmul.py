"""Other kernels for the same products: the same numbers up to rounding, and layers as they were outside."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from mahalo_ray.decoding import cpu_matmul
from mahalo_ray.decoding.cpu_matmul import OneDNNHead, OneDNNLinears, PackedWeights
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.policy import HeadMix, MultiHeadPolicy
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.models import MultiHeadCausalLM
from mahalo_ray.models.heads import FullHead, LogitTransform
from mahalo_ray.objectives import Weights


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are tried wherever torch has them, faster or not."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(cpu_matmul, "packing_is_faster", lambda: True)
    monkeypatch.setattr(cpu_matmul, "onednn_is_faster", lambda: True)


def test_layers_give_the_same_inside_and_are_untouched_outside(wanted: None) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(256, 400), nn.GELU(), nn.Linear(400, 256, bias=False))
    x = torch.randn(3, 5, 256)
    expected = module(x)
    fast = OneDNNLinears(module)
    with torch.no_grad(), fast():
        assert "forward" in module[0].__dict__
        torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(module.double()(x.double()).float(), expected, atol=1e-5, rtol=1e-4)
    assert "forward" not in module[0].__dict__ and "forward" not in module[2].__dict__
    module.float()(x).sum().backward()
    assert module[0].weight.grad is not None
    copy.deepcopy(module)(x)


def test_heads_give_the_same(wanted: None) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 256), torch.randn(50, 256), torch.randn(50)
    expected = F.linear(x, weight, bias)
    fast = OneDNNHead(256, 50)
    for _ in range(3):  # from the second use on with packed weights
        with fast():
            torch.testing.assert_close(F.linear(x, weight, bias), expected, atol=1e-4, rtol=1e-4)
    store = PackedWeights(weight.nbytes)
    assert torch.equal(store.linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))


def test_log_probs_that_are_only_read_use_the_head_s_products(
    wanted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    head = FullHead(nn.Parameter(torch.randn(50, 256) / 16), None, LogitTransform(scale=0.5, softcap=3.0))
    hidden, labels = torch.randn(7, 256), torch.randint(50, (7,))
    learnt = head(hidden, labels, 3)
    products_made = []
    linear = PackedWeights.linear
    here = threading.get_ident()  # other tests' model threads may still be at work in this process

    def counted(store: PackedWeights, x: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        if threading.get_ident() == here:
            products_made.append(x.shape)
        return linear(store, x, *rest)

    monkeypatch.setattr(PackedWeights, "linear", counted)
    with torch.no_grad(), OneDNNHead(256, 50)():
        read = head(hidden, labels, 3)
    assert products_made == [(3, 256), (3, 256), (1, 256)]
    torch.testing.assert_close(read, learnt, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["full", "low_rank"])
def test_conversations_with_weights_of_their_own_use_the_heads_packed(
    wanted: None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    base = AutoModelForCausalLM.from_config(config)
    options = {"rank": 4} if kind == "low_rank" else {}
    model = MultiHeadCausalLM.from_base(
        base, ["a", "b"], noise=0.5, keep_base_head=True, head_kind=kind, **options
    ).eval()
    policy, packed = MultiHeadPolicy(model), []
    multiply = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(
        torch.ops.mkldnn,
        "_linear_pointwise",
        lambda x, weight, *rest: (packed.append(weight.layout is torch._mkldnn), multiply(x, weight, *rest))[
            1
        ],
    )
    shares, strengths = torch.tensor([[0.2, 0.8], [1.0, 0.0]]), torch.tensor([1.5, 0.5])
    mixes = [
        HeadMix(Weights({"a": a, "b": b}), strength)
        for (a, b), strength in zip(shares.tolist(), strengths.tolist(), strict=True)
    ]
    hidden, rows = torch.randn(3, 256), torch.tensor([0, 1, 1])
    with torch.no_grad():
        expected = model.logits(hidden, shares[rows], strengths[rows])
    for _ in range(3):  # packed from the second use on
        packed.clear()
        torch.testing.assert_close(policy.head(mixes)(hidden, rows), expected, atol=1e-4, rtol=1e-4)
    assert any(packed)


@pytest.mark.parametrize("size", [0, 1 << 40])
def test_weights_that_change_are_packed_again(wanted: None, size: int) -> None:
    """A store for more bytes than it may copy gives the same numbers, from the weights as they are."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 256), nn.Parameter(torch.randn(50, 256))
    store = PackedWeights(size)
    with torch.no_grad():
        for _ in range(3):
            for _ in range(3):
                expected = F.linear(x, weight)
                torch.testing.assert_close(store.linear(x, weight), expected, atol=1e-4, rtol=1e-4)
            weight.mul_(-0.5)


def test_weights_in_inference_mode(wanted: None) -> None:
    with torch.inference_mode():
        x, weight = torch.randn(4, 256), torch.randn(50, 256)
        store = PackedWeights(weight.nbytes)
        for _ in range(3):
            torch.testing.assert_close(store.linear(x, weight), F.linear(x, weight), atol=1e-4, rtol=1e-4)


def test_small_layers_are_left_alone(wanted: None) -> None:
    module = nn.Linear(32, 32)
    with OneDNNLinears(module)():
        assert "forward" not in module.__dict__


class Attention(nn.Module):
    """Layers named as in Llama; `other` is what the keys are made of."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(256, 512, bias), nn.Linear(256, 64, bias)
        self.v_proj = nn.Linear(256, 64, bias)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> list[torch.Tensor]:
        return [self.q_proj(x), self.k_proj(x if other is None else other), self.v_proj(x)]


@pytest.mark.parametrize("bias", [False, True])
def test_layers_that_read_one_input_are_one_product(
    wanted: None, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module, x, other = Attention(bias), torch.randn(3, 5, 256), torch.randn(3, 5, 256)
    fast, calls = OneDNNLinears(module), []
    multiply = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda *given: (calls.append(1), multiply(*given))[1]
    )
    with torch.no_grad():
        for count in (3, 1, 1):  # from the second use on together
            expected = module(x)
            calls.clear()
            with fast():
                found = module(x)
            assert len(calls) == count
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        expected = module(x, other)
        with fast():
            torch.testing.assert_close(module(x, other), expected, atol=1e-5, rtol=1e-4)
        for parameter in module.parameters():
            parameter.mul_(-0.5)
            expected = module(x)
            for _ in range(2):
                with fast():
                    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-4)
    assert not any("forward" in layer.__dict__ for layer in module.children())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_whatever_kernel_is_chosen_a_policy_says_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States and greedy tokens with every choice that the rule can make, as far as it can run here."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    ids, tokens, states = torch.arange(1, 40)[None], [], []
    for packs, onednn, bfloat16 in ((False, False, False), (True, False, False), (True, True, True)):
        if packs and not torch.backends.mkldnn.is_available():
            continue
        bfloat16 = bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        monkeypatch.setattr(cpu_matmul, "packing_is_faster", lambda packs=packs: packs)
        monkeypatch.setattr(cpu_matmul, "onednn_is_faster", lambda onednn=onednn: onednn)
        monkeypatch.setattr(cpu_matmul, "multiplies_bfloat16", lambda bfloat16=bfloat16: bfloat16)
        fast = OneDNNLinears(model.model)
        for _ in range(3):
            with fast():
                found = model.model(ids).last_hidden_state
        states.append(found.float())
        engine = Engine(model)
        engine.append(rows := engine.add(2), [ids[0].tolist(), [5, 6]])
        sampled = engine.sample(rows, 3, SamplingParams(temperature=0), [0, 1], 12, [])
        tokens.append(sampled.token_ids)
    tolerance = 1e-4 if dtype is torch.float32 else 0.06
    for other, said in zip(states[1:], tokens[1:], strict=True):
        torch.testing.assert_close(other, states[0], atol=tolerance, rtol=tolerance)
        assert said == tokens[0] or dtype is torch.bfloat16
    for said in tokens:
        assert all(candidate == of_row[0] for of_row in said for candidate in of_row)
