"""Scoring candidates over the reward model's kept caches equals scoring whole texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from mahalo_ray.decoding.cached_scorer import RewardConversations
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.models.scoring import TokenTrace

VOCAB = 40
OBJECTIVES = {"accuracy": "value", "engagement": "probability"}


def base(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def reward_model(kind: str) -> ProcessRewardModel:
    if kind == "last state only":
        return ProcessRewardModel.from_base(base(), OBJECTIVES, inputs=["last"])
    if kind == "own reference":
        return ProcessRewardModel.from_base(base(), OBJECTIVES, reference=base(1))
    model = ProcessRewardModel.from_base(base(), OBJECTIVES, tuning=kind)
    if kind == "lora":  # adapters start as zero: make them matter
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def expected(model: ProcessRewardModel, prefix: list[int], step: list[int], start: int = 0) -> torch.Tensor:
    trace = TokenTrace([*prefix, *step], [len(prefix) + start], [len(prefix) + len(step) - 1])
    return model.score_traces([trace])[0][0]


@pytest.mark.parametrize("kind", ["frozen", "full", "lora", "own reference", "last state only"])
def test_scores_over_the_kept_cache_equal_scores_of_the_whole_text(kind):
    model = reward_model(kind)
    session = RewardConversations(model, forward_tokens=40)  # several forwards per call
    rng = np.random.default_rng(0)

    def some(n: int) -> list[int]:
        return rng.integers(0, VOCAB, n).tolist()

    rows = session.add(4)
    texts = {row: some(int(rng.integers(2, 9))) for row in rows}
    session.append(rows, [texts[row] for row in rows])
    for turn in range(4):
        asked = [int(row) for row in rng.permutation(rows)[:3]]
        candidates = [[some(int(rng.integers(1, 7))) for _ in range(3)] for _ in asked]
        candidates[0] = [candidates[0][0]] * 3
        scores = session.score_candidates(asked, candidates)
        for i, row in enumerate(asked):
            for k, step in enumerate(candidates[i]):
                torch.testing.assert_close(
                    scores[i, k], expected(model, texts[row], step), atol=1e-4, rtol=1e-4
                )
        chosen = [own[turn % 3] for own in candidates]
        session.accept(asked, chosen)
        for row, step in zip(asked, chosen, strict=True):
            texts[row] += step
        reply = some(3)
        session.append(asked[:1], [reply])
        texts[asked[0]] += reply
        if turn == 1:
            session.drop([rows.pop(0)])


def test_equal_candidates_are_encoded_once_and_accepted_ones_never_again():
    session = RewardConversations(reward_model("frozen"))
    (row,) = session.add(1)
    session.append([row], [[1, 2, 3]])
    scores = session.score_candidates([row], [[[4, 5], [6], [4, 5], [4, 5]]])
    assert session.tokens_forwarded == 3 + 2 + 1
    assert (scores[0, 0] == scores[0, 2]).all() and (scores[0, 0] != scores[0, 1]).all()
    session.accept([row], [[4, 5]])
    session.score_candidates([row], [[[7]]])
    assert session.tokens_forwarded == 3 + 2 + 1 + 1
    session.accept([row], [[8, 9]])  # was not scored: encoded when next needed
    torch.testing.assert_close(
        session.score_candidates([row], [[[7]]])[0, 0],
        expected(session.model, [1, 2, 3, 4, 5, 8, 9], [7]),
        atol=1e-4,
        rtol=1e-4,
    )


def test_last_step_of_a_longer_candidate_and_uneven_numbers():
    model = reward_model("frozen")
    session = RewardConversations(model)
    rows = session.add(2)
    session.append(rows, [[1, 2, 3], [4]])
    scores = session.score_candidates(rows, [[[5, 6, 7]], [[8, 9], [10, 11, 12, 13]]], [[1], [0, 2]])
    assert scores.shape == (2, 2, 2) and scores[0, 1].isnan().all()
    torch.testing.assert_close(scores[0, 0], expected(model, [1, 2, 3], [5, 6, 7], 1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores[1, 1], expected(model, [4], [10, 11, 12, 13], 2), atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_refused_before_anything_is_computed():
    session = RewardConversations(reward_model("frozen"))
    (row,) = session.add(1)
    session.append([row], [[1] * 60])
    with pytest.raises(ValueError, match="60 tokens and 5 new ones exceed its context of 64"):
        session.score_candidates([row], [[[2] * 5]])
    with pytest.raises(ValueError, match="without tokens"):
        session.score_candidates([row], [[[], [1]]])
    assert session.score_candidates([row], [[[2] * 4]]).shape == (1, 1, 2)
