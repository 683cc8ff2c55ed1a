"""A kept cache must equal re-encoding the text: random forks, accepts, drops and ragged rows, four
architectures."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedModel,
    Qwen2Config,
)

from mahalo_ray.decoding import branch_attention
from mahalo_ray.decoding.cached_backbone import CachedBackbone
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.kv_cache import Branches, BranchRef, RaggedCache
from mahalo_ray.decoding.policy import CausalPolicy, MultiHeadPolicy
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.decoding.token_loop import smallest_grid
from mahalo_ray.models.multi_head import MultiHeadCausalLM
from mahalo_ray.objectives import Weights

VOCAB = 50
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
CONFIGS = {
    "qwen2": Qwen2Config(**COMMON),
    "llama": LlamaConfig(**COMMON),
    "gemma2": Gemma2Config(
        **COMMON, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128),
}


@functools.cache
def model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").eval()
    with torch.no_grad():  # sharper than the initialisation, so that wrong attention shows
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return made


@functools.cache
def policy(name: str) -> CausalPolicy:
    return CausalPolicy(model(name))


@torch.no_grad()
def reencoded(name: str, ids: list[int]) -> torch.Tensor:
    """Logits of every position, [T, V], from the text alone."""
    return model(name)(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def next_logits(engine: Engine, row: int) -> torch.Tensor:
    """Logits the engine would draw the row's next token from."""
    engine._prefill([row])
    assert engine._last_hidden is not None and isinstance(engine.policy, CausalPolicy)
    return engine.policy.logits(engine._last_hidden[int(engine._slots.slots([row])[0])])


tokens = st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=9)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=16)
@given(
    # Whether prefix and branches are attended to in one call, as on a card.
    joining=st.sampled_from([set(), {"cpu"}]),
    prompts=st.lists(tokens, min_size=1, max_size=4),
    rounds=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(0, 2**31)), min_size=1, max_size=3
    ),
)
def test_kept_cache_equals_reencoding(name, joining, prompts, rounds):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branch_attention, "_JOINING", joining)
        compare_with_reencoding(name, prompts, rounds)


def compare_with_reencoding(name, prompts, rounds):
    engine = Engine(policy(name), prefill_tokens=24)
    rows = engine.add(len(prompts))
    engine.append(rows, prompts)
    for branches, length, seed in rounds:
        rng = np.random.default_rng(seed)
        asked = [int(row) for row in rng.permutation(rows)[: rng.integers(1, len(rows) + 1)]]
        stops = rng.integers(0, VOCAB, 6).tolist()
        got = engine.sample(
            asked, branches, SamplingParams(), [seed] * len(asked), length, stops, with_logps=True
        )
        choice = rng.integers(-1, branches, len(asked)).tolist()
        for row, candidates, logps in zip(asked, got.token_ids, got.logps, strict=True):
            before = engine.token_ids(row)
            for ids, values in zip(candidates, logps, strict=True):
                expected = torch.log_softmax(reencoded(name, before + ids), -1)[len(before) - 1 : -1]
                expected = expected.gather(1, torch.tensor(ids)[:, None])[:, 0]
                torch.testing.assert_close(torch.tensor(values), expected, atol=1e-4, rtol=1e-4)
        engine.accept(got, choice)
        for at, chosen in enumerate(choice):
            if chosen >= 0:
                assert (
                    engine.token_ids(asked[at])[-len(got.token_ids[at][chosen]) :]
                    == got.token_ids[at][chosen]
                )
        if rng.random() < 0.5:
            some = [row for row in rows if rng.random() < 0.5]
            engine.append(some, [rng.integers(1, VOCAB, rng.integers(1, 5)).tolist() for _ in some])
        if rng.random() < 0.3 and len(rows) > 1:
            engine.drop([rows.pop(int(rng.integers(len(rows))))])
            rows += (added := engine.add(1))
            engine.append(added, [[3, 4, 5]])
        for row in rows:
            torch.testing.assert_close(
                next_logits(engine, row), reencoded(name, engine.token_ids(row))[-1], atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("name", CONFIGS)
def test_branches_extended_by_several_tokens_at_once(name):
    """What the reward model does: K candidates of different lengths in one forward over a kept prefix."""
    cache, backbone = RaggedCache(initial_capacity=2), CachedBackbone(model(name).base_model)
    prefixes, candidates = [[5, 6, 7, 8], [9]], [[[1, 2, 3], [4]], [[2, 2], [3, 1, 4]]]
    slots = cache.add(2)
    view = cache.append(slots, np.array([4, 1]), 4)
    backbone(torch.tensor([[5, 6, 7, 8], [9, 0, 0, 0]]), view.positions(4, torch.device("cpu")), view)
    view.commit()
    branches = Branches(cache, slots, 2)
    padded = torch.tensor([ids + [0] * (3 - len(ids)) for row in candidates for ids in row])
    found = backbone(padded, branches.positions(3, torch.device("cpu")), branches)
    branches.advance(3)
    for row in range(2):
        for k, ids in enumerate(candidates[row]):
            whole = torch.tensor([prefixes[row] + ids])
            with torch.no_grad():
                expected = model(name).base_model(input_ids=whole, use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(
                found[2 * row + k, : len(ids)], expected[len(prefixes[row]) :], atol=1e-4, rtol=1e-4
            )
    places = [BranchRef(branches.block(), 0, 0), BranchRef(branches.block(), 1, 1)]
    cache.accept(slots, places, np.array([3, 3]))
    assert cache.lengths.tolist() == [7, 4]


def test_attention_in_parts_is_attention_at_once(monkeypatch: pytest.MonkeyPatch):
    """Rows, branches and queries are halved until few scores are held at once: the same numbers."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows, columns, heads, width, length, own = 3, 4, 2, 5, 7, 6
    query, prefix = normal(rows * columns, 2 * heads, width, 8), normal(rows, heads, length, 8)
    branch = normal(rows, heads, columns, own, 8)
    hidden = torch.zeros(rows, 1, 1, length).masked_fill(torch.rand(rows, 1, 1, length) > 0.7, float("-inf"))
    behind = torch.arange(own) > torch.arange(own - width, own)[:, None]
    own_bias = torch.zeros(width, own).masked_fill(behind, float("-inf")).expand(rows, 1, 1, 1, width, own)
    arguments = (query, (prefix, prefix + 1), (branch, branch - 1), hidden, own_bias, 0.3, 20.0)
    whole = branch_attention.shared_prefix_attention(*arguments)
    largest: list[int] = []
    softmax = torch.softmax

    def counted(scores: torch.Tensor, **options: Any) -> torch.Tensor:
        largest.append(scores.numel())
        return softmax(scores, **options)

    monkeypatch.setattr(torch, "softmax", counted)
    for most in (1000, 200, 60, 1):
        monkeypatch.setattr(branch_attention, "_MOST_SCORES", most)
        largest.clear()
        torch.testing.assert_close(branch_attention.shared_prefix_attention(*arguments), whole)
        # One query of one branch, for all heads, is the smallest part there is.
        assert max(largest) <= max(most, 2 * heads * (length + own)) and len(largest) > 1


def test_prefix_and_branches_in_one_call_are_two_products(monkeypatch: pytest.MonkeyPatch):
    """Rows whose prefixes and whose branches have different lengths, as when requests join in flight."""
    monkeypatch.setattr(branch_attention, "_JOINING", {"cpu"})
    generator = torch.Generator().manual_seed(0)
    rows, columns, heads, groups, length, own = 3, 4, 2, 2, 7, 6
    query = torch.randn(rows * columns, groups * heads, 1, 8, generator=generator)
    prefix = torch.randn(2, rows, heads, length, 8, generator=generator).unbind()
    branches = torch.randn(2, rows, heads, columns, own, 8, generator=generator).unbind()

    def behind(width: int, lengths: list[int]) -> torch.Tensor:
        hidden = torch.arange(width) >= torch.tensor(lengths)[:, None]
        return torch.zeros(rows, width).masked_fill(hidden, float("-inf"))

    prefix_bias = behind(length, [7, 2, 5])[:, None, None]
    own_bias = behind(own, [1, 6, 3])[:, None, None, None, None]
    for biases in ((None, None), (prefix_bias, None), (prefix_bias, own_bias)):
        joined = branch_attention.JoinedKeys.of(query, prefix[0], branches[0], biases, softcap=None)
        assert joined is not None
        expected = branch_attention.shared_prefix_attention(query, prefix, branches, *biases, 0.3, None)
        torch.testing.assert_close(joined.attend(query, prefix, branches, 0.3), expected)
    assert branch_attention.JoinedKeys.of(query, prefix[0], branches[0], (None, None), softcap=2.0) is None


def test_memory_is_given_back_while_others_go_on():
    """Forty long conversations leave a short one behind: it goes on as if they had not been there."""
    alone, engine = Engine(policy("llama")), Engine(policy("llama"))
    (expected,) = alone.add(1)
    alone.append([expected], [[3, 4, 5]])
    sequences = engine.add(41)
    engine.append(sequences, [[7] * 60] * 40 + [[3, 4, 5]])
    full, kept = engine.cache.nbytes, sequences[-1]
    settings = ([2] * 41, [SamplingParams()] * 41, [9] * 41, [12] * 41, [None] * 41)
    engine.start(sequences, *settings)
    for _ in range(4):
        engine.step()
    engine.drop(sequences[:-1])  # in the middle of everybody's candidates
    assert engine.cache.nbytes < full / 20
    while engine.is_busy:
        done = engine.step()
    found = engine.collect(done)
    assert found.token_ids == alone.sample([expected], 2, SamplingParams(), [9], 12, []).token_ids
    engine.accept(found, [1])
    assert engine.length(kept) == 15
    engine.drop([kept])
    assert engine.cache.nbytes == 0 and len(engine) == 0
    again = engine.add(1)
    engine.append(again, [[3, 4, 5]])
    assert engine.sample(again, 2, SamplingParams(), [9], 12, []).token_ids == found.token_ids


def test_prefix_is_stored_once_however_many_branches():
    def bytes_after(branches: int) -> int:
        engine = Engine(policy("qwen2"))
        rows = engine.add(2)
        engine.append(rows, [[1] * 60, [2] * 50])
        engine.sample(rows, branches, SamplingParams(), [0, 1], 8, [])
        return engine.peak_bytes - engine.cache.nbytes

    prefix = 2 * 2 * 2 * 2 * 60 * 8 * 4  # layers, k and v, rows, kv heads, tokens, head size, bytes
    assert bytes_after(16) < prefix * 16 / 3
    assert bytes_after(16) <= 16 * bytes_after(1)


def test_multi_head_rows_with_their_own_weights_match_the_merged_models():
    multi = MultiHeadCausalLM.from_base(model("llama"), ["accuracy", "engagement"], noise=0.5, seed=1)
    weights = [Weights.parse("accuracy=0.8,engagement=0.2"), Weights.one("engagement")]
    for each in (weights, [weights[0]] * 2):
        engine = Engine(MultiHeadPolicy(multi))
        rows = engine.add(2, each)
        engine.append(rows, [[1, 2, 3], [4, 5]])
        got = engine.sample(rows, 2, SamplingParams(), [0, 1], 4, [], with_logps=True)
        for row, prompt, w in zip(range(2), ([1, 2, 3], [4, 5]), each, strict=True):
            merged = multi.merge(w)
            for ids, logps in zip(got.token_ids[row], got.logps[row], strict=True):
                with torch.no_grad():
                    logits = merged(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
                expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
                torch.testing.assert_close(torch.tensor(logps), expected, atol=1e-4, rtol=1e-4)


def test_weights_must_fit_the_policy():
    multi = MultiHeadPolicy(MultiHeadCausalLM.from_base(model("llama"), ["accuracy", "engagement"]))
    for engine, weights, message in (
        (Engine(multi), None, "give weights"),
        (Engine(multi), Weights.one("accurracy"), "Did you mean 'accuracy'"),
        (Engine(policy("llama")), Weights.one("accuracy"), "single-head"),
    ):
        rows = engine.add(1, weights)
        engine.append(rows, [[1, 2]])
        with pytest.raises(ValueError, match=message):
            engine.sample(rows, 1, SamplingParams(), [0], 4, [])


def test_training_attention_is_untouched_after_decoding():
    policy("llama")
    assert model("llama").config._attn_implementation == "eager"
    model("llama")(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    model("llama").zero_grad()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4), "Mamba"),
        (BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4), "Bloom"),
    ],
)
def test_architectures_the_cache_would_get_wrong_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        CausalPolicy(AutoModelForCausalLM.from_config(config).eval())


def test_models_with_a_sliding_window_are_decoded_as_far_as_it_reaches():
    config = Gemma2Config(**COMMON, head_dim=8, sliding_window=8)
    torch.manual_seed(0)
    windowed = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    engine = Engine(CausalPolicy(windowed))
    rows = engine.add(1)
    with pytest.raises(ValueError, match="context of 8"):
        engine.append(rows, [[1] * 9])
    engine.append(rows, [[1, 2, 3, 4, 5]])
    got = engine.sample(rows, 2, SamplingParams(), [0], 6, [])
    assert set(got.reasons[0]) == {"context"}
    assert [len(ids) for ids in got.token_ids[0]] == [3, 3]


def test_attention_beyond_a_sliding_window_is_refused_by_name():
    config = Gemma2Config(**COMMON, head_dim=8, sliding_window=8)
    backbone = CachedBackbone(AutoModelForCausalLM.from_config(config).eval().base_model)
    cache = RaggedCache()
    view = cache.append(cache.add(1), np.array([9]), 9)
    with pytest.raises(ValueError, match="Gemma2Attention attends to a sliding window of 8 tokens"):
        backbone(torch.ones(1, 9, dtype=torch.long), view.positions(9, torch.device("cpu")), view)


def test_context_limit():
    engine = Engine(policy("llama"), max_context=10)
    rows = engine.add(2)
    with pytest.raises(ValueError, match="does not fit: 0 tokens and 11 new ones exceed the context of 10"):
        engine.append(rows, [[1] * 11, [1]])
    engine.append(rows, [[1] * 10, [1] * 7])
    got = engine.sample(rows, 2, SamplingParams(), [0, 0], 5, [])
    assert [[len(ids) for ids in row] for row in got.token_ids] == [[0, 0], [3, 3]]
    assert {reason for row in got.reasons for reason in row} == {"context"}
    engine.accept(got, [0, 0])
    assert [engine.length(row) for row in rows] == [10, 10]


def test_changed_conversation_cannot_accept_old_candidates():
    engine = Engine(policy("llama"))
    rows = engine.add(1)
    engine.append(rows, [[1, 2]])
    got = engine.sample(rows, 2, SamplingParams(), [0], 3, [])
    engine.append(rows, [[3]])
    with pytest.raises(ValueError, match="changed since"):
        engine.accept(got, [0])


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=12))
def test_smallest_grid_keeps_every_live_branch_once_under_its_own_row(alive):
    flat = np.array(alive).reshape(-1)
    if not flat.any():
        return
    rows, grid = smallest_grid(flat, 4, len(alive))
    kept = grid[grid >= 0]
    assert sorted(kept.tolist()) == np.nonzero(flat)[0].tolist()
    assert all(
        place // 4 == row for row, line in zip(rows, grid, strict=True) for place in line if place >= 0
    )
    assert grid.size <= flat.size
