"""Packed pairs: one reading of the prompt gives the log-probs and gradients of two ordinary sequences."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_policies import FAMILIES, OBJECTIVES, V, policy, tiny
from torch import Tensor

from mahalo_ray.config import LoraConfig
from mahalo_ray.models import ChunkedCausalLM, MultiHeadCausalLM, attention, pair_attention
from mahalo_ray.models.pair_attention import packing_unsupported_reason
from mahalo_ray.training.pairs import PackedPairs, PaddedPairs, PairInputs, TokenPairs, TokenRows, pair_inputs

# Dropout in training and a window of 4 tokens: the two that must be refused, by name.
REFUSED = {"gpt2": "attention dropout", "mistral": "sliding window of 4"}


def pairs(sizes: list[tuple[int, int, int]], seed: int = 0) -> TokenPairs:
    """Random pairs with (prompt, chosen, rejected) tokens."""
    g = np.random.default_rng(seed)
    ids = [[g.integers(3, V, n).tolist() for n in lengths] for lengths in sizes]
    columns = [TokenRows(column) for column in zip(*ids, strict=True)]
    names = [str(number) for number in range(len(sizes))]
    ones = np.ones(len(sizes))
    return TokenPairs(names, np.arange(len(sizes)) % 3, *columns, ones, ones, 0)


def padded(sizes: list[tuple[int, int, int]]) -> PaddedPairs:
    return PaddedPairs(pairs(sizes), pad_id=0)


def logps(model: torch.nn.Module, data: PairInputs, **options: Any) -> Tensor:
    forward = model.completion_logps if isinstance(model, MultiHeadCausalLM) else model
    return forward(**pair_inputs(data.tensors(np.arange(len(data.pairs)))), **options)


def heads_of(data: PairInputs) -> Tensor:
    return torch.from_numpy(data.pairs.objective).repeat(2)


SIZES = [(5, 3, 6), (1, 2, 1), (9, 4, 4)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same_or_is_refused(family: str) -> None:
    reason = packing_unsupported_reason(FAMILIES[family], "sdpa", max_length=64)
    if family in REFUSED:
        assert reason is not None and REFUSED[family] in reason
        return
    assert reason is None
    compare_with_ordinary_sequences(family)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2-softcap"])
def test_one_call_for_all_pairs_computes_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA card does, on the CPU (a soft cap keeps the other way)."""
    monkeypatch.setattr(pair_attention, "_IN_ONE_CALL", {"cpu"})
    compare_with_ordinary_sequences(family)


def compare_with_ordinary_sequences(family: str) -> None:
    model, data = policy(family), padded(SIZES)
    expected = logps(model, data, head_index=heads_of(data))
    expected.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.enable_pair_packing()
    found = logps(model, PackedPairs(data.pairs), head_index=heads_of(data))
    found.sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-4, msg=name)


@settings(max_examples=20)
@given(
    sizes=st.lists(st.tuples(*[st.integers(1, 7)] * 3), min_size=1, max_size=4),
    average=st.booleans(),
    chunk=st.integers(1, 9),
)
def test_any_lengths(sizes: list[tuple[int, int, int]], average: bool, chunk: int) -> None:
    model, data = policy("qwen3"), PaddedPairs(pairs(sizes, seed=len(sizes)), pad_id=0)
    options = {"head_index": heads_of(data), "average": average, "chunk_size": chunk}
    expected = logps(model, data, **options)
    model.enable_pair_packing()
    torch.testing.assert_close(
        logps(model, PackedPairs(data.pairs), **options), expected, atol=1e-4, rtol=1e-5
    )


def test_a_pair_costs_its_prompt_once_and_no_padding() -> None:
    data = PackedPairs(pairs([(5, 3, 6), (9, 4, 1)]))
    tensors = data.tensors(np.arange(2))
    # An answer's last token predicts nothing that counts, and a copy of the prompt's last its first.
    assert tensors["input_ids"].shape == (1, (4 + 3 + 6) + (8 + 4 + 1))
    assert data.row_groups.tokens.tolist() == [13, 13]
    assert (tensors["labels"] != -100).sum() == 3 + 6 + 4 + 1


def test_the_chosen_halves_alone() -> None:
    model, data = policy("llama"), padded(SIZES)
    count = len(data.pairs)
    rows, first = np.arange(count), heads_of(data)[:count]
    expected = model.completion_logps(**pair_inputs(data.chosen_tensors(rows)), head_index=first)
    model.enable_pair_packing()
    packed = pair_inputs(PackedPairs(data.pairs).chosen_tensors(rows))
    found = model.completion_logps(**packed, head_index=heads_of(data))
    torch.testing.assert_close(found[:count], expected, atol=1e-4, rtol=1e-5)
    assert found[count:].tolist() == [0.0] * count


@pytest.mark.parametrize("family", ["qwen2-tied", "gemma2-softcap"])
def test_an_ordinary_causal_lm_reads_packed_pairs(family: str) -> None:
    model, data = ChunkedCausalLM(tiny(family)), padded(SIZES)
    expected = logps(model, data)
    model.enable_pair_packing()
    torch.testing.assert_close(logps(model, PackedPairs(data.pairs)), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2-tied", "gemma2-softcap"])
def test_attention_in_parts_gives_the_same_log_probs_and_gradients(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for scores_at_once in (attention.SCORES_AT_ONCE, 40):
        monkeypatch.setattr(attention, "SCORES_AT_ONCE", scores_at_once)
        model = ChunkedCausalLM(tiny(family))
        model.enable_pair_packing()
        result = logps(model, PackedPairs(padded(SIZES).pairs))
        result.sum().backward()
        found.append([result, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 5
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)


def test_with_an_adapter_and_recomputed_activations() -> None:
    data = padded(SIZES)
    found = []
    for recompute in (False, True):
        torch.manual_seed(3)
        model = policy("qwen2-tied")
        model.enable_pair_packing()
        model.add_lora(LoraConfig(rank=2, alpha=4))
        if recompute:
            model.gradient_checkpointing_enable()
        model.train()
        logps(model, PackedPairs(data.pairs), head_index=heads_of(data)).sum().backward()
        found.append([p.grad for p in model.backbone_parameters()])
    assert any(gradient.abs().sum() > 0 for gradient in found[0])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_saved_policy_forgets_how_it_was_trained(tmp_path: Path) -> None:
    model = policy("qwen3")
    model.enable_pair_packing()
    model.save_pretrained(tmp_path)
    loaded = MultiHeadCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert loaded.hidden_states(torch.tensor([[3, 4, 5]])).shape == (1, 3, 16)


def test_a_family_that_reads_positions_otherwise_is_refused() -> None:
    class NextDoor(tf.LlamaForCausalLM):
        """Counts positions by itself, whatever it is told."""

    base = NextDoor(copy.deepcopy(FAMILIES["llama"])).eval()
    inner = base.model.forward
    base.model.forward = lambda *args, position_ids=None, **kwargs: inner(*args, **kwargs)
    model = MultiHeadCausalLM.from_base(base, OBJECTIVES)
    with pytest.raises(ValueError, match="computes something else when pairs share their prompt"):
        model.enable_pair_packing()


def test_ordinary_rows_under_the_attention_of_pairs_are_refused() -> None:
    model = policy("llama")
    model.enable_pair_packing()
    with pytest.raises(ValueError, match="did not receive pair_layout"):
        model.hidden_states(torch.tensor([[3, 4, 5]]))
