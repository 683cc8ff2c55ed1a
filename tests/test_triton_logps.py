"""Triton's kernels for log-probs compute what torch does: here under Triton's interpreter, which multiplies
fp32 and fp16, not bf16; in `test_cuda.py` on a card."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mahalo_ray.config import TrainingConfig
from mahalo_ray.logprobs import token_logps
from mahalo_ray.training.loop import logps_kernel

CPU = torch.device("cpu")
Kind = tuple[bool, bool, float | None, float]  # with a bias, low-rank, soft cap, scale
HEADS: list[Kind] = [
    (False, False, None, 1.0),
    (True, False, None, 0.5),
    (False, True, None, 1.0),
    (True, True, 3.0, 2.0),
]


def logps_and_gradients(
    kernel: AbstractContextManager[None],
    dtype: torch.dtype,
    head: Kind,
    device: torch.device = CPU,
) -> list[Tensor]:
    """More tokens and words than a tile has, in chunks that do not fill one."""
    with_bias, low_rank, softcap, scale = head
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias, outer, inner = (
        torch.randn(size, generator=g).mul_(0.5).to(device, dtype).requires_grad_()
        for size in ((90, 40), (150, 40), (150,), (150, 5), (5, 40))
    )
    labels = torch.randint(150, (90,), generator=g).to(device)
    with kernel:
        logps = token_logps(
            hidden,
            weight,
            labels,
            70,
            softcap,
            bias if with_bias else None,
            logit_scale=scale,
            low_rank=(outer, inner) if low_rank else None,
        )
        (logps * torch.randn(90, generator=g).to(device)).sum().backward()
    leaves = [hidden, weight, bias, outer, inner]
    return [logps.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def compare(dtype: torch.dtype, head: Kind, device: torch.device) -> None:
    training = TrainingConfig(logps_kernel="triton")
    expected = logps_and_gradients(nullcontext(), dtype, head, device)
    by_triton = logps_and_gradients(logps_kernel(training, device), dtype, head, device)
    tolerance = 2e-6 if dtype == torch.float32 else 0.02
    assert len(by_triton) == len(expected)
    for one, other in zip(by_triton, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one.float() - other.float()).abs().max() <= tolerance * other.float().abs().max()


def compare_all() -> None:
    for dtype in (torch.float32, torch.float16):
        for head in HEADS:
            compare(dtype, head, CPU)
    weight = torch.randn(9, 4, requires_grad=True)
    with logps_kernel(TrainingConfig(logps_kernel="triton"), CPU):
        logps = token_logps(torch.zeros(0, 4), weight, torch.zeros(0, dtype=torch.long))
    logps.sum().backward()
    assert logps.shape == (0,) and weight.grad is not None and not weight.grad.any()


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_log_probs_and_gradients_are_those_of_torch() -> None:
    # In a process of its own: triton reads this variable when it is imported.
    subprocess.run(
        [sys.executable, "-c", "import test_triton_logps; test_triton_logps.compare_all()"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent,
        check=True,
    )


def test_where_the_kernels_cannot_run_training_says_so() -> None:
    with pytest.raises(ValueError, match=r"logps_kernel: triton' (needs the package|runs on CUDA)"):
        logps_kernel(TrainingConfig(logps_kernel="triton"), CPU)
