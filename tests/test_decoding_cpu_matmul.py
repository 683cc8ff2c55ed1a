"""Other kernels for the same cpu_matmul: the same numbers up to rounding, and layers as they were outside."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mahalo_ray.decoding import cpu_matmul
from mahalo_ray.decoding.cpu_matmul import OneDNNHead, OneDNNLinears, PackedWeights
from mahalo_ray.models.heads import FullHead, LogitTransform


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are tried wherever torch has them, faster or not."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
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
