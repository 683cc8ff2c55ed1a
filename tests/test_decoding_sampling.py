"""Sampling: the distribution, the filters, and randomness that belongs to the request alone."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from mahalo_ray.decoding import sampling
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.sampling import (
    SamplingBatch,
    SamplingParams,
    draw,
    draw_keys,
    mixed,
    truncated,
    uniforms,
)

LOGITS = torch.log(torch.tensor([[0.05, 0.4, 0.1, 0.25, 0.2]]))


def engine() -> Engine:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return Engine(AutoModelForCausalLM.from_config(config).eval())


def frequencies(params: SamplingParams, draws: int = 20000) -> torch.Tensor:
    keys = draw_keys([7], draws, torch.device("cpu")).view(-1)
    batch = SamplingBatch.of([params] * draws, torch.device("cpu"))
    tokens, _ = draw(LOGITS.expand(draws, -1), batch, uniforms(keys, torch.tensor(0)), with_logps=False)
    return torch.bincount(tokens, minlength=5) / draws


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), [0.05, 0.4, 0.1, 0.25, 0.2]),
        (SamplingParams(temperature=0), [0, 1, 0, 0, 0]),
        (SamplingParams(temperature=0.5), [0.0025, 0.16, 0.01, 0.0625, 0.04]),
        (SamplingParams(top_k=2), [0, 0.4, 0, 0.25, 0]),
        (SamplingParams(top_p=0.6), [0, 0.4, 0, 0.25, 0]),
        (SamplingParams(top_p=0.7), [0, 0.4, 0, 0.25, 0.2]),
        (SamplingParams(min_p=0.3), [0, 0.4, 0, 0.25, 0.2]),
        (SamplingParams(top_k=3, top_p=0.6, min_p=0.1), [0, 0.4, 0, 0.25, 0]),
    ],
)
def test_draws_follow_the_filtered_distribution(params, expected):
    wanted = torch.tensor(expected, dtype=torch.float)
    found = frequencies(params)
    assert (found - wanted / wanted.sum()).abs().max() < 0.015
    assert ((found == 0) == (wanted == 0)).all()


def test_every_row_has_its_own_parameters():
    params = [SamplingParams(), SamplingParams(top_k=1), SamplingParams(top_p=0.6), SamplingParams(min_p=0.9)]
    kept = truncated(LOGITS.expand(4, -1), SamplingBatch.of(params, torch.device("cpu"))).isfinite()
    assert kept.sum(1).tolist() == [5, 1, 2, 1]


def test_log_prob_is_the_policys_own_whatever_the_filters():
    batch = SamplingBatch.of([SamplingParams(temperature=0.3, top_k=2)], torch.device("cpu"))
    token, logp = draw(LOGITS, batch, torch.tensor([0.2], dtype=torch.float64), with_logps=True)
    assert logp is not None
    torch.testing.assert_close(logp, LOGITS[0, token])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "temperature\n  Input should be greater than or equal to 0"),
        ({"temperature": 1e-39}, "temperature\n .* too small .* take 0 .greedy. or at least 0.000001"),
        ({"temperature": float("inf")}, "temperature\n  Input should be a finite number"),
        ({"temperature": float("nan")}, "temperature\n  Input should be a finite number"),
        ({"top_k": -1}, "top_k\n  Input should be greater than or equal to 0"),
        ({"top_p": 0}, "top_p\n  Input should be greater than or equal to"),
        ({"top_p": 1e-50}, "top_p\n  Input should be greater than or equal to"),
        ({"min_p": 2}, "min_p\n  Input should be less than or equal to 1"),
    ],
)
def test_bad_parameters_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)


def test_the_generator_is_the_published_one_and_looks_uniform():
    # SplitMix64 with seed 0: first outputs of the reference implementation
    first = [int(mixed(torch.tensor(0), i)) % 2**64 for i in range(3)]
    assert first == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    keys = draw_keys([1, 2], 5000, torch.device("cpu"))
    numbers = uniforms(keys, torch.tensor(3))
    assert numbers.min() >= 0 and numbers.max() < 1
    assert (numbers.mean(1) - 0.5).abs().max() < 0.02
    pairs = torch.stack([numbers[0], numbers[1], uniforms(keys, torch.tensor(4))[0]])
    assert (torch.corrcoef(pairs) - torch.eye(3)).abs().max() < 0.05
    assert len(set(keys.view(-1).tolist())) == 10000


PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [8], [9, 10], [11, 12, 13]]


def sampled(order: list[int], branches: int = 3) -> dict[int, list[list[int]]]:
    batch = engine()
    rows = dict(zip(order, batch.add(len(order)), strict=True))
    batch.append(list(rows.values()), [PROMPTS[i] for i in order])
    asked = list(reversed(order))
    found = {i: [] for i in order}
    for _ in range(2):
        got = batch.sample(
            [rows[i] for i in asked], branches, SamplingParams(), [100 + i for i in asked], 10, [0, 5]
        )
        batch.accept(got, [i % branches for i in asked])
        for at, i in enumerate(asked):
            found[i] += got.token_ids[at]
    return found


def test_a_request_samples_the_same_whatever_else_is_in_the_batch():
    together = sampled([0, 1, 2, 3, 4])
    assert sampled([3, 0, 4]) == {i: together[i] for i in (3, 0, 4)}
    assert sampled([2]) == {2: together[2]}
    more = sampled([1], branches=5)[1]
    assert more[:3] == together[1][:3]  # more candidates do not change the first ones


def test_requests_with_equal_prompts_and_other_seeds_differ_and_candidates_too():
    batch = engine()
    rows = batch.add(2)
    batch.append(rows, [[1, 2, 3]] * 2)
    got = batch.sample(rows, 3, SamplingParams(), [0, 1], 10, [])
    assert len({tuple(ids) for row in got.token_ids for ids in row}) == 6


def test_one_token_at_a_time_draws_the_same_as_all_at_once():
    batch = engine()
    whole, single = batch.add(2)
    batch.append([whole, single], [[1, 2, 3]] * 2)
    batch.accept(batch.sample([whole], 1, SamplingParams(), [5], 8, []), [0])
    for _ in range(8):
        batch.accept(batch.sample([single], 1, SamplingParams(), [5], 1, []), [0])
    assert batch.token_ids(whole) == batch.token_ids(single)


def test_a_step_does_not_say_again_what_was_rejected_in_the_step_before():
    """One token is accepted of candidates of twelve: the next step stands where eleven of each were drawn.

    A flat distribution makes the tokens a picture of the random numbers.
    """
    flat = engine()
    with torch.no_grad():
        flat.policy._head.weight.zero_()
    sequences = flat.add(40)
    flat.append(sequences, [[1, 2, 3]] * 40)
    seeds = list(range(40))
    long = flat.sample(sequences, 3, SamplingParams(), seeds, 12, [])
    short = flat.sample(sequences, 3, SamplingParams(), seeds, 1, [])
    assert [[ids[:1] for ids in row] for row in long.token_ids] == short.token_ids
    flat.accept(short, [0] * 40)
    following = flat.sample(sequences, 3, SamplingParams(), seeds, 11, [])
    pairs = [
        (before, after)
        for rejected, row in zip(long.token_ids, following.token_ids, strict=True)
        for ids, next_ids in zip(rejected, row, strict=True)
        for before, after in zip(ids[1:], next_ids, strict=True)
    ]
    assert len(pairs) == 40 * 3 * 11
    repeated = sum(before == after for before, after in pairs) / len(pairs)
    assert repeated < 0.05  # by chance 1/40; all of them with draws keyed by the position alone


def test_rows_may_want_different_numbers_of_candidates():
    batch = engine()
    rows = batch.add(3)
    batch.append(rows, PROMPTS[:3])
    uneven = batch.sample(rows, [1, 5, 2], SamplingParams(), [1, 2, 3], 8, [5])
    even = batch.sample(rows, 5, SamplingParams(), [1, 2, 3], 8, [5])
    assert [len(found) for found in uneven.token_ids] == [1, 5, 2]
    assert uneven.token_ids == [found[:n] for found, n in zip(even.token_ids, (1, 5, 2), strict=True)]
    batch.accept(uneven, [0, 4, 1])
    assert batch.token_ids(rows[1]) == PROMPTS[1] + even.token_ids[1][4]


def test_stop_tokens_and_limits_per_row():
    batch = engine()
    rows = batch.add(3)
    batch.append(rows, PROMPTS[:3])
    got = batch.sample(rows, 8, SamplingParams(), [0, 1, 2], [3, 12, 30], [5, 6])
    for row, limit in enumerate((3, 12, 30)):
        for ids, reason in zip(got.token_ids[row], got.reasons[row], strict=True):
            assert len(ids) <= limit and not {5, 6} & set(ids[:-1])
            assert reason == ("stop_token" if ids[-1] in (5, 6) else "length")
            assert reason == "stop_token" or len(ids) == limit


class HostReads(TorchDispatchMode):
    """Counts the operations for whose result a host would wait for its device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero")
        by_mask = func.overloadpacket.__name__ == "index" and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        self.count += by_mask or func.overloadpacket.__name__ in names
        return func(*args, **(kwargs or {}))


def test_the_host_waits_at_most_once_for_a_token_that_ends_nothing():
    batch = engine()
    sequences = batch.add(3)
    batch.append(sequences, PROMPTS[:3])
    params = SamplingParams(temperature=0.7, top_k=30, top_p=0.9, min_p=0.01)
    batch.start(sequences, [4, 1, 2], [params] * 3, [0, 1, 2], [20] * 3, [None] * 3)
    for _ in range(3):
        assert batch.step() == []
    for _ in range(5):
        with HostReads() as reads:
            assert batch.step() == []
        assert reads.count <= 1


def test_duplicates_go_on_independently_and_nothing_is_left_after_drop():
    batch = engine()
    (row,) = batch.add(1)
    batch.append([row], [[1, 2, 3]])
    got = batch.sample([row], 2, SamplingParams(), [3], 6, [])
    batch.accept(got, [1])
    copies = batch.duplicate([row, row])
    assert batch.duplicate([]) == []
    batch.append(copies[:1], [[7, 7]])
    again = batch.sample([row, copies[1]], 1, SamplingParams(), [9, 9], 6, [])
    assert again.token_ids[0] == again.token_ids[1]
    batch.drop(copies)  # the fork of `row` is still open
    batch.accept(again.only([0]), [0])
    assert batch.length(row) == 3 + 6 + 6
    batch.drop([row])
    assert len(batch) == 0


def test_empty_conversation_and_bad_counts_are_refused():
    batch = engine()
    rows = batch.add(1)
    with pytest.raises(ValueError, match="empty"):
        batch.sample(rows, 1, SamplingParams(), [0], 4, [])
    with pytest.raises(ValueError, match="num_candidates is 0"):
        batch.sample(rows, 0, SamplingParams(), [0], 4, [])
    with pytest.raises(ValueError, match=r"token id 40 is not one of the model's 40: .* another model"):
        batch.append(rows, [[1, 40]])
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        batch.sample(rows, 1, SamplingParams(), [0], 0, [])


@pytest.mark.parametrize("vocab_size", [5, 256, 257, 1000, 49152])
def test_draws_are_those_of_the_running_sum_over_the_whole_vocabulary(vocab_size):
    torch.manual_seed(vocab_size)
    rows = 400
    logits = torch.randn(rows, vocab_size).mul(3)
    logits[torch.rand(rows, vocab_size) < 0.6] = float("-inf")  # some blocks and most tokens have no mass
    logits[:, -1] = 0
    uniform = torch.rand(rows, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1 - 2.0**-52], dtype=torch.float64)
    batch = SamplingBatch.of([SamplingParams()] * rows, torch.device("cpu"))
    tokens, logps = draw(logits, batch, uniform, with_logps=True)
    mass = torch.softmax(logits, -1).cumsum(-1, dtype=torch.float64)
    assert (
        tokens.tolist()
        == torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)[:, 0].tolist()
    )
    assert torch.isfinite(logps).all()


def test_many_branches_over_a_large_vocabulary_are_drawn_a_few_rows_at_a_time(monkeypatch):
    torch.manual_seed(3)
    kinds = [SamplingParams(temperature=0), SamplingParams(top_k=5), SamplingParams(top_p=0.7, min_p=0.01)]
    batch = SamplingBatch.of([kinds[row % 3] for row in range(50)], torch.device("cpu"))
    logits, uniform = torch.randn(50, 300).mul(3), torch.rand(50, dtype=torch.float64)
    for with_logps in (True, False):
        whole = draw(logits, batch, uniform, with_logps)
        with monkeypatch.context() as limits:
            limits.setattr(sampling, "_MOST_LOGITS_ON_CPU", 7 * 300)
            parts = draw(logits, batch, uniform, with_logps)
        assert torch.equal(parts[0], whole[0])
        assert torch.equal(parts[1], whole[1]) if with_logps else parts[1] is None
