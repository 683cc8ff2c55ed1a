"""The process reward model: one pass over a trace, its pieces, its folder, its calibration."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_reward_models import PROMPT, STEPS, TOKENIZER, base
from torch import Tensor

from mahalo_ray import losses
from mahalo_ray.config import LoraConfig
from mahalo_ray.models import ProcessRewardModel, TokenTrace
from mahalo_ray.models.reward_heads import step_features
from mahalo_ray.models.scoring import StepEncoder, pad_traces

KINDS = {"accuracy": "value", "honest": "probability", "helpful": "preference"}
ALL_INPUTS = ["last", "pooled", "reference_logps"]


def reward(
    tuning: Any = "full", inputs: Any = ALL_INPUTS, tied: bool = True, **kwargs: Any
) -> ProcessRewardModel:
    kwargs.setdefault("head_hidden_size", 8)
    model = ProcessRewardModel.from_base(
        base(tied=tied), KINDS, inputs, tuning=tuning, tokenizer=TOKENIZER, **kwargs
    )
    return model.eval()


def disturb(model: ProcessRewardModel) -> None:
    """Move everything trainable, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)) * 0.1)


def batch() -> tuple[Tensor, ...]:
    encoder = StepEncoder(TOKENIZER, "\n\n")
    other = [{"role": "system", "content": "Be brief."}, *PROMPT]
    return pad_traces([encoder.encode(PROMPT, STEPS), encoder.encode(other, STEPS[:1])], 0)


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
@pytest.mark.parametrize("inputs", [["last"], ["pooled", "last"], ["reference_logps"], ALL_INPUTS])
def test_one_pass_equals_prefix_by_prefix(tuning: Any, inputs: list[str]) -> None:
    model = reward(tuning, inputs)
    disturb(model)
    whole = model.score(PROMPT, STEPS)
    assert list(whole) == list(KINDS) and all(len(scores) == 3 for scores in whole.values())
    for cut in (1, 2):
        part = model.score(PROMPT, STEPS[:cut])
        for name in KINDS:
            assert part[name] == pytest.approx(whole[name][:cut], abs=1e-5)
    assert len({round(score, 6) for score in whole["accuracy"]}) == 3, "the steps must get different scores"


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
def test_batches_score_like_single_traces_in_their_order(tuning: Any) -> None:
    model = reward(tuning)
    traces = [(PROMPT, STEPS), (PROMPT, STEPS[2:]), (PROMPT, STEPS[:2]), (PROMPT, ["No."])]
    together = model.score_batch(traces, batch_size=3)
    for (prompt, steps), scores in zip(traces, together, strict=True):
        alone = model.score(prompt, steps)
        for name in KINDS:
            assert scores[name] == pytest.approx(alone[name], abs=1e-5)


def test_features_by_hand() -> None:
    hidden = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    logps = torch.tensor([[-9.0, -1.0, -2.0, -4.0, -0.5]])
    starts, ends = torch.tensor([[1, 4, 0]]), torch.tensor([[3, 4, -1]])
    found = step_features(("last", "pooled", "reference_logps"), hidden, logps, starts, ends)
    assert found.shape == (1, 3, 8 + 8 + 3)

    def normal(x: Tensor) -> Tensor:
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()

    torch.testing.assert_close(found[0, 0, :8], normal(hidden[0, 3]))
    torch.testing.assert_close(found[0, 0, 8:16], normal(hidden[0, 1:4].mean(0)))
    expected = [-math.log1p(7 / 3), -math.log1p(4), -math.log1p(7)]
    assert found[0, 0, 16:].tolist() == pytest.approx(expected, rel=1e-5)
    assert found[0, 1, 16:].tolist() == pytest.approx([-math.log1p(0.5)] * 3, rel=1e-5)
    assert not found[0, 2].any()


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
def test_the_reference_is_the_base_as_it_was_whatever_is_trained(tuning: Any) -> None:
    """Feature values come from the untouched base model; only what is tuned has gradients."""
    model, (ids, mask, starts, ends) = reward(tuning), batch()
    with torch.no_grad():
        logits = base()(ids, attention_mask=mask).logits.log_softmax(-1)
    expected = logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    disturb(model)
    hidden = model.hidden_states(ids, mask)
    states = model.reference_hidden_states(ids, mask, hidden)
    found = model.reference_logps(states[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).view_as(expected)
    torch.testing.assert_close(found[mask[:, 1:] == 1], expected[mask[:, 1:] == 1], rtol=1e-4, atol=1e-4)
    assert model.reference_is_backbone is (tuning == "frozen")

    model.train()(ids, mask, starts, ends).sum().backward()
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == ({"heads"} if tuning == "frozen" else {"heads", "backbone"})
    if tuning == "lora":
        assert all("lora" in n for n, p in model.backbone.named_parameters() if p.grad is not None)


def test_frozen_parts_stay_in_evaluation_mode() -> None:
    model, data = reward("frozen"), batch()
    model.train()
    assert torch.equal(model(*data), model(*data)), "dropout of the frozen backbone must be off"
    lora = reward("lora", lora_settings=LoraConfig(rank=2, dropout=0.5)).train()
    ids, mask = data[:2]
    first, second = (lora.reference_hidden_states(ids, mask) for _ in range(2))
    assert torch.equal(first, second)
    assert lora.backbone.training, "the mode must be put back"


def test_pieces_called_step_by_step_equal_the_whole() -> None:
    """What a decoder with its own caches does: the new tokens' states and the last prefix state."""
    model, encoder = reward("frozen"), StepEncoder(TOKENIZER, "\n\n")
    trace = encoder.encode(PROMPT, STEPS)
    ids = torch.tensor([trace.input_ids])
    with torch.no_grad():
        expected = model.step_scores(ids, None, torch.tensor([trace.starts]), torch.tensor([trace.ends]))
        hidden = model.hidden_states(ids)
        for step, (start, end) in enumerate(zip(trace.starts, trace.ends, strict=True)):
            new = hidden[:, start : end + 1]
            logps = model.reference_logps(hidden[0, start - 1 : end], ids[0, start : end + 1])
            features = model.step_features(
                new, logps[None], torch.tensor([[0]]), torch.tensor([[end - start]])
            )
            # A preference between whole answers reads the answer from its beginning.
            first = trace.starts[0]
            logps = model.reference_logps(hidden[0, first - 1 : end], ids[0, first : end + 1])
            answer = model.step_features(
                hidden[:, first : end + 1], logps[None], torch.tensor([[0]]), torch.tensor([[end - first]])
            )
            torch.testing.assert_close(model.heads(features, answer)[0, 0], expected[0, step])


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tuning: Any, tied: bool, tmp_path: Path) -> None:
    model, data = reward(tuning, tied=tied), batch()
    disturb(model)
    model.fit_calibration({"accuracy": [0.1, 0.4, 0.9], "honest": [0.2, 0.1, 0.7]})
    model.save_pretrained(tmp_path, metrics={"AUC": 0.8})
    loaded = ProcessRewardModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded.step_scores(*data), model.step_scores(*data))
    assert loaded.calibration == model.calibration and loaded.output_kinds == KINDS
    assert loaded.score(PROMPT, STEPS) == model.score(PROMPT, STEPS)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    card = (tmp_path / "README.md").read_text()
    assert "| helpful | preference, not calibrated |" in card and "| AUC | 0.8 |" in card
    document = json.loads((tmp_path / "mahalo.json").read_text())
    (tmp_path / "mahalo.json").write_text(json.dumps({**document, "kind": "multi_head_causal_lm"}))
    with pytest.raises(ValueError, match="not a 'process_reward_model'"):
        ProcessRewardModel.from_pretrained(tmp_path)


def test_another_model_can_be_the_reference(tmp_path: Path) -> None:
    other = base(seed=5, tied=False)
    model, data = reward("full", reference=copy.deepcopy(other)), batch()
    ids, mask = data[:2]
    with torch.no_grad():
        expected = other(ids, attention_mask=mask).logits.log_softmax(-1)[0, 4, ids[0, 5]]
        states = model.reference_hidden_states(ids, mask)
        found = model.reference_logps(states[0, 4:5], ids[0, 5:6])[0]
    torch.testing.assert_close(found, expected)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = ProcessRewardModel.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded.step_scores(*data), model.step_scores(*data))


def test_lora_on_a_named_base_saves_the_adapter_alone(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    model = ProcessRewardModel.from_base(tmp_path / "base", KINDS, tuning="lora").eval()
    disturb(model)
    model.save_pretrained(tmp_path / "reward")
    assert not (tmp_path / "reward" / "backbone").exists()
    loaded = ProcessRewardModel.from_pretrained(tmp_path / "reward").eval()
    assert loaded.score(PROMPT, STEPS) == model.score(PROMPT, STEPS)


def test_activation_and_standardisation_by_objective() -> None:
    model = reward()
    raw = torch.tensor([[0.5, 0.0, -2.0], [1.5, 2.0, 4.0]])
    assert model.activate(raw).tolist()[0] == [0.5, 0.5, -2.0]
    assert model.activate(raw)[1, 1].item() == pytest.approx(1 / (1 + math.exp(-2)))
    with pytest.raises(ValueError, match="'accuracy' are not calibrated"):
        model.standardise(raw)
    groups = {name: ["p", "p", "q", "q"] for name in KINDS}
    model.fit_calibration({name: [1.0, 3.0, 10.0, 14.0] for name in KINDS}, groups)
    own = model.calibration["honest"]
    assert own["mean"] == 7.0 and own["count"] == 4 and own["quantiles"][50] == 6.5
    assert own["within_prompt_std"] == pytest.approx(math.sqrt((2.0 + 8.0) / 2))
    std = math.sqrt((36 + 16 + 9 + 49) / 4)
    torch.testing.assert_close(model.standardise(raw), (raw - 7) / std)
    torch.testing.assert_close(model.standardise(raw, "within_prompt"), (raw - 7) / math.sqrt(5))


def test_calibration_refuses_what_says_nothing() -> None:
    model = reward()
    with pytest.raises(ValueError, match="do not vary"):
        model.fit_calibration({"accuracy": [0.5, 0.5]})
    with pytest.raises(ValueError, match="within-prompt spread cannot"):
        model.fit_calibration({"accuracy": [0.5, 0.7]}, {"accuracy": [1, 2]})
    with pytest.raises(ValueError, match="2 scores and 1 groups"):
        model.fit_calibration({"accuracy": [0.5, 0.7]}, {"accuracy": [1]})
    with pytest.raises(ValueError, match="Did you mean 'accuracy'"):
        model.fit_calibration({"acuracy": [0.5, 0.7]})
    model.fit_calibration({"accuracy": [0.5, math.nan, 0.7]})
    assert model.calibration["accuracy"]["count"] == 2
    with pytest.raises(ValueError, match="calibrated without groups"):
        model.standardise(torch.zeros(1, 3), "within_prompt")


def test_steps_are_tokenised_with_their_separator() -> None:
    encoder = StepEncoder(TOKENIZER, "\n\n")
    trace = encoder.encode(PROMPT, STEPS)
    texts = [
        TOKENIZER.decode(trace.input_ids[a : b + 1]) for a, b in zip(trace.starts, trace.ends, strict=True)
    ]
    assert texts == [step + "\n\n" for step in STEPS]
    assert TOKENIZER.convert_ids_to_tokens(trace.input_ids[trace.ends[0]]) == ".ĊĊ", "as a policy samples it"
    assert (
        encoder.encode(PROMPT, ["Two and three.\n\n"]).input_ids
        == encoder.encode(PROMPT, STEPS[:1]).input_ids
    )
    turn = StepEncoder(TOKENIZER, None).encode(PROMPT, ["Hello!"])
    assert turn.input_ids[turn.ends[0]] == TOKENIZER.eos_token_id
    for steps, complaint in (([], "at least one step"), (["a", "  "], "none may be empty")):
        with pytest.raises(ValueError, match=complaint):
            encoder.encode(PROMPT, steps)
    with pytest.raises(ValueError, match="whole turn"):
        StepEncoder(TOKENIZER, None).encode(PROMPT, STEPS)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="Did you mean 'pooled'"):
        reward(inputs=["poled"])
    with pytest.raises(ValueError, match="at most once"):
        reward(inputs=[])
    with pytest.raises(ValueError, match="unknown output kind 'score'"):
        ProcessRewardModel.from_base(base(), {"a": "score"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="not among the head inputs"):
        reward(inputs=["last"], reference=base())
    same = base()
    with pytest.raises(ValueError, match="the reference is the base itself"):
        ProcessRewardModel.from_base(same, KINDS, reference=same)
    with pytest.raises(ValueError, match="the backbone is 'full'"):
        reward(lora_settings=LoraConfig())
    with pytest.raises(ValueError, match="tuning 'half'"):
        reward("half")
    with pytest.raises(ValueError, match="trace 0 has 161 tokens, the model reads 160"):
        reward().score_traces([TokenTrace([5] * 161, [1], [160])])
    with pytest.raises(ValueError, match="no tokenizer"):
        ProcessRewardModel.from_base(base(), KINDS).score(PROMPT, STEPS)


@pytest.mark.parametrize("hidden_size", [0, 8])
@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
def test_it_learns_a_mixture_of_supervisions(hidden_size: int, tuning: Any) -> None:
    """Values, probabilities and preferences together; steps without labels are left out."""
    torch.manual_seed(0)
    model, (ids, mask, starts, ends) = reward(tuning, head_hidden_size=hidden_size), batch()
    targets = torch.tensor([[0.1, 0.9, math.nan], [0.5, math.nan, math.nan]])
    verdicts = torch.tensor([[1.0, 0.0, 1.0], [math.nan, math.nan, math.nan]])
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, lr=0.02)
    history = []
    for _ in range(40):
        adam.zero_grad()
        raw = model(ids, mask, starts, ends)
        loss = losses.value_mse(raw[..., 0], targets, ends >= 0).sum()
        loss = loss + losses.step_bce(raw[..., 1], verdicts, ends >= 0).sum()
        loss = loss + losses.bradley_terry(raw[:1, 2, 2], raw[1:, 0, 2]).sum()
        loss.backward()
        adam.step()
        history.append(loss.item())
    assert history[-1] < 0.5 * history[0]
