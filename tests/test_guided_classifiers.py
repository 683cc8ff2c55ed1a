"""Third-party classifiers as guides, alone and beside a process reward model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from tiny_guided import ASK, model, reward, tokenizer
from tiny_reward_models import CONFIG, byte_tokenizer

from mahalo_ray.decoding.guidance import GuidedRequest
from mahalo_ray.decoding.guided import GuidedDecoder
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.models.classifiers import SequenceClassifierScorer, TokenClassifierScorer
from mahalo_ray.models.scoring import StepScorer
from mahalo_ray.objectives import Weights

SHORT: dict[str, Any] = {"max_step_tokens": 8, "max_new_tokens": 30, "num_candidates": 4}


def sequence_classifier(context: int = 512, objective: str = "helpful") -> SequenceClassifierScorer:
    torch.manual_seed(3)
    settings = CONFIG | {"max_position_embeddings": context}
    made = tf.AutoModelForSequenceClassification.from_config(tf.Qwen2Config(**settings, num_labels=1))
    return SequenceClassifierScorer(made, byte_tokenizer(), objective)


def token_classifier() -> TokenClassifierScorer:
    torch.manual_seed(4)
    settings = CONFIG | {"max_position_embeddings": 512}
    made = tf.AutoModelForTokenClassification.from_config(tf.Qwen2Config(**settings, num_labels=2))
    return TokenClassifierScorer(made.eval(), byte_tokenizer(), "helpful")


def decoder(*guides: StepScorer, **options: Any) -> GuidedDecoder:
    return GuidedDecoder(model(), guides, "math", tokenizer(), **options)


@pytest.mark.parametrize("strategy", ["argmax", "best_of_n", "beam", "dvts"])
def test_a_sequence_classifier_scores_the_response_as_it_would_then_be(strategy: str) -> None:
    guide = sequence_classifier()
    result = decoder(guide).generate(ASK, **SHORT | {"strategy": strategy, "beam_width": 2, "seed": 1})
    before = ""
    for step in result.steps:
        for candidate in step.candidates:
            if (before + candidate.text).strip():
                expected = guide.score(ASK, [before + candidate.text])["helpful"][0]
                assert candidate.scores["helpful"] == pytest.approx(expected, abs=1e-5)
        before += step.text
    assert before == result.text and result.reward_tokens > 0


def test_a_token_classifier_reads_steps_and_a_cut_step_goes_on_in_the_next() -> None:
    guide = token_classifier()
    result = decoder(guide).generate(ASK, **SHORT | {"seed": 1})
    steps: list[str] = []
    for step in result.steps:
        for candidate in step.candidates:
            if read := [text.strip() for text in [*steps[:-1], "".join([*steps[-1:], candidate.text])]]:
                expected = guide.score(ASK, read)["helpful"][-1] if all(read) else None
                assert expected is None or candidate.scores["helpful"] == pytest.approx(expected, abs=1e-5)
        assert step.accepted.reason != "step"  # so every step continues the first
        steps = ["".join([*steps, step.text])]


def test_guides_side_by_side_are_added_by_their_spread() -> None:
    own_reward_model, classifier = reward(), sequence_classifier()
    guidance = Weights.parse("accuracy=1,helpful=1")
    result = decoder(own_reward_model, classifier).generate(ASK, guidance=guidance, seed=2, **SHORT)
    for step in result.steps:
        columns = {
            name: torch.tensor([c.scores[name] for c in step.candidates], dtype=torch.float64)
            for name in ("accuracy", "engagement", "helpful")
        }
        standard = {n: (x - x.mean()) / x.std(correction=0) for n, x in columns.items()}
        expected = (standard["accuracy"] + standard["helpful"]) / 2
        found = torch.tensor([c.total for c in step.candidates], dtype=torch.float64)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
        assert step.chosen == int(expected.argmax())
    alone = decoder(own_reward_model).generate(ASK, guidance=Weights.one("accuracy"), seed=2, **SHORT)
    assert alone.steps[0].candidates[0].scores.items() <= result.steps[0].candidates[0].scores.items()


def test_equal_candidates_are_read_once() -> None:
    guide = sequence_classifier()
    greedy = SamplingParams(temperature=0)
    one = decoder(guide).generate(ASK, sampling=greedy, **SHORT | {"max_steps": 1, "num_candidates": 2})
    many = decoder(guide).generate(ASK, sampling=greedy, **SHORT | {"max_steps": 1, "num_candidates": 9})
    assert one.reward_tokens == many.reward_tokens > 0
    assert {candidate.total for candidate in many.steps[0].candidates} == {0.0}


def test_a_batch_gives_each_request_what_it_gets_alone() -> None:
    made = decoder(reward(), sequence_classifier())
    requests = [GuidedRequest(ASK, seed=seed, **SHORT | {"num_candidates": seed + 2}) for seed in range(3)]
    for request, result in zip(requests, made.generate_batch(requests), strict=True):
        (alone,) = made.generate_batch([request])
        assert (alone.token_ids, alone.reward_tokens) == (result.token_ids, result.reward_tokens)


def test_a_text_that_outgrows_a_classifier_ends_there_and_disturbs_no_other() -> None:
    short = len(byte_tokenizer().apply_chat_template(ASK, tokenize=True)["input_ids"]) + 40
    made = decoder(sequence_classifier(context=short))
    options = SHORT | {"max_new_tokens": 100}
    grown, fits = made.generate_batch(
        [GuidedRequest(ASK, seed=1, **options), GuidedRequest(ASK, seed=2, **options | {"max_steps": 1})]
    )
    assert grown.stop_reason == "context" and len(grown.token_ids) < 100
    assert "".join(step.text for step in grown.steps) == grown.text
    assert fits.stop_reason == "max_steps" and fits.steps
    tree = options | {"strategy": "dvts", "beam_width": 2}
    assert made.generate(ASK, **tree).stop_reason == "context"
    beam, fine = made.generate_each(
        [GuidedRequest(ASK, **tree | {"strategy": "beam"}), GuidedRequest(ASK, **options | {"max_steps": 1})]
    )
    assert isinstance(beam, ValueError) and "too long for a reward model" in str(beam)
    assert not isinstance(fine, ValueError) and fine.stop_reason == "max_steps"
    with pytest.raises(ValueError, match="tokens for the reward model of helpful, which reads"):
        made.generate([{"role": "user", "content": "2 + 3 " * 30}], **SHORT)


def test_a_prompt_that_a_judges_template_refuses_fails_alone() -> None:
    judge = sequence_classifier()
    judge.tokenizer.chat_template = (
        "{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    talk = [*ASK, {"role": "assistant", "content": "5"}, {"role": "user", "content": "So?"}]
    options = SHORT | {"max_steps": 1}
    refused, fine = decoder(judge).generate_each(
        [GuidedRequest(talk, **options), GuidedRequest(ASK, **options)]
    )
    assert isinstance(refused, ValueError) and "one question only" in str(refused)
    assert not isinstance(fine, ValueError) and fine.steps


def test_what_cannot_guide_together_is_refused() -> None:
    with pytest.raises(ValueError, match="two reward models score 'accuracy'"):
        decoder(reward(), sequence_classifier(objective="accuracy"))
    with pytest.raises(ValueError, match="'calibrated' needs the within-prompt spread"):
        decoder(sequence_classifier()).generate(ASK, standardisation="calibrated", **SHORT)
    with pytest.raises(ValueError, match="give a tokenizer"):
        GuidedDecoder(model(), sequence_classifier(), "math")
    with pytest.raises(ValueError, match="takes one user message"):
        decoder(token_classifier()).generate([{"role": "system", "content": "Be kind."}, *ASK], **SHORT)
