"""Third-party sequence and token classifiers as scorers, asked through `score`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tiny_reward_models import CONFIG, PROMPT, STEPS, TOKENIZER, base, byte_tokenizer

from mahalo_ray.models import (
    ProcessRewardModel,
    SequenceClassifierScorer,
    TokenClassifierScorer,
    load_scorer,
)

TRACES = [(PROMPT, STEPS), (PROMPT, STEPS[:1]), (PROMPT, STEPS[1:])]


def qwen(head: Any, **kwargs: Any) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return head.from_config(tf.Qwen2Config(**CONFIG, **kwargs)).eval()


def bert(labels: int) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        num_labels=labels,
        pad_token_id=0,
    )
    return tf.AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("padding", [None, 3])
def test_a_causal_sequence_classifier_judges_every_prefix(labels: int, padding: int | None) -> None:
    """Each score is the classifier's own verdict on the templated conversation, batched or not."""
    model = qwen(tf.AutoModelForSequenceClassification, num_labels=labels, pad_token_id=padding)
    tokenizer = byte_tokenizer()
    if padding is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    scorer = SequenceClassifierScorer(model, tokenizer, "helpful")
    found = scorer.score_batch(TRACES, batch_size=4)
    for (prompt, steps), scores in zip(TRACES, found, strict=True):
        for count in range(1, len(steps) + 1):
            answer = "\n\n".join(steps[:count])
            text = tokenizer.apply_chat_template(
                [*prompt, {"role": "assistant", "content": answer}], tokenize=False
            )
            ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                logits = model(ids).logits[0]
            expected = logits[0] if labels == 1 else logits.softmax(-1)[1]
            assert scores["helpful"][count - 1] == pytest.approx(expected.item(), abs=1e-5)
    assert len(set(found[0]["helpful"])) == 3


def test_an_encoder_classifier_gets_a_text_pair() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    model = bert(2)
    scorer = SequenceClassifierScorer(model, tokenizer, "helpful", positive_label=0)
    with torch.no_grad():
        expected = model(**tokenizer(PROMPT[0]["content"], STEPS[0], return_tensors="pt")).logits.softmax(-1)[
            0, 0
        ]
    assert scorer.score(PROMPT, STEPS)["helpful"][0] == pytest.approx(expected.item(), abs=1e-5)
    with pytest.raises(ValueError, match="the model reads 128"):
        scorer.score(PROMPT, ["long " * 60])


def test_a_token_classifier_is_read_at_the_separators() -> None:
    model = qwen(tf.AutoModelForTokenClassification, num_labels=2)
    scorer = TokenClassifierScorer(model, TOKENIZER, "correct", step_separator="\n")
    trace = scorer.encoder.encode(PROMPT, STEPS)
    assert TOKENIZER.decode(trace.input_ids) == PROMPT[0]["content"] + "".join(step + "\n" for step in STEPS)
    assert all(trace.input_ids[end] == TOKENIZER.convert_tokens_to_ids("Ċ") for end in trace.ends)
    with torch.no_grad():
        expected = model(torch.tensor([trace.input_ids])).logits.softmax(-1)[0, trace.ends, 1]
    for scores in (scorer.score(PROMPT, STEPS), scorer.score_batch(TRACES)[0]):
        torch.testing.assert_close(torch.tensor(scores["correct"]), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="one user message"):
        scorer.score([*PROMPT, {"role": "assistant", "content": "Hm."}], STEPS)


def test_load_scorer_recognises_what_it_is_given(tmp_path: Path) -> None:
    for name, head, kind in (
        ("sequence", tf.AutoModelForSequenceClassification, SequenceClassifierScorer),
        ("token", tf.AutoModelForTokenClassification, TokenClassifierScorer),
    ):
        model = qwen(head, num_labels=2)
        model.save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
        scorer = load_scorer(tmp_path / name, "correct")
        assert isinstance(scorer, kind)
        direct = kind(model, TOKENIZER, "correct")  # type: ignore[operator]
        assert scorer.score(PROMPT, STEPS)["correct"] == pytest.approx(direct.score(PROMPT, STEPS)["correct"])
        scorer.fit_calibration({"correct": [0.1, 0.5]})
        assert scorer.standardise(torch.tensor([0.3])).item() == pytest.approx(0.0, abs=1e-6)
    own = ProcessRewardModel.from_base(base(), {"a": "value"}, tokenizer=TOKENIZER).eval()
    own.save_pretrained(tmp_path / "own")
    assert load_scorer(tmp_path / "own").score(PROMPT, STEPS) == own.score(PROMPT, STEPS)
    with pytest.raises(ValueError, match="knows its own objectives"):
        load_scorer(tmp_path / "own", "a")
    with pytest.raises(ValueError, match="say which objective"):
        load_scorer(tmp_path / "token")
    with pytest.raises(ValueError, match="there is no model folder"):
        load_scorer(tmp_path / "nowhere", "a")
    with pytest.raises(ValueError, match="the device 'tpu' cannot be used here"):
        load_scorer(tmp_path / "own", device="tpu")
    base().save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="is a Qwen2ForCausalLM: a scorer is"):
        load_scorer(tmp_path / "lm", "a")


def test_a_wrong_number_of_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="has 3 labels"):
        SequenceClassifierScorer(bert(3), TOKENIZER, "a")
    with pytest.raises(ValueError, match="has 3 labels"):
        TokenClassifierScorer(qwen(tf.AutoModelForTokenClassification, num_labels=3), TOKENIZER, "a")
