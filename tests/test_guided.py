"""Guided decoding end to end with tiny random models and a real tokenizer: what is chosen, kept, stopped and
refused.
"""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny_guided import ASK, TEXT, as_read, memorised, memorised_by, message, model, reward, tokenizer
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Qwen2Config

from mahalo_ray.config import Aggregation, RequestConfig
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.guidance import GuidedRequest, Prompt, ScoreScale, StepCandidate, within_candidates
from mahalo_ray.decoding.guided import GuidedDecoder, subtrees
from mahalo_ray.decoding.sampling import SamplingParams
from mahalo_ray.decoding.session import RequestState
from mahalo_ray.decoding.stopping import (
    MathBoundary,
    SentenceBoundary,
    StopReason,
    StopRule,
    TokenTexts,
    TurnBoundary,
    boundary_for,
    step_starts,
)
from mahalo_ray.domains.sft_text import train_tokenizer
from mahalo_ray.models.classifiers import SequenceClassifierScorer
from mahalo_ray.models.multi_head import MultiHeadCausalLM
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.models.scoring import StepEncoder, TokenTrace, TraceScorer
from mahalo_ray.objectives import Weights


def thresholds(**limits: float) -> Aggregation:
    listed = [{"objective": name, "at_least": limit} for name, limit in limits.items()]
    return Aggregation.model_validate({"kind": "thresholds", "thresholds": listed})


def decoder(boundary="math", **options) -> GuidedDecoder:
    return GuidedDecoder(model(), reward(), boundary, **options)


SHORT = {"max_step_tokens": 8, "max_new_tokens": 30, "num_candidates": 4}


def test_every_step_takes_the_best_candidate_as_the_whole_text_would_score_it():
    made = decoder()
    result = made.generate(ASK, guidance=Weights.one("accuracy"), seed=3, **SHORT)
    prompt = made.format.prompt_ids([message(ASK[0])])
    before = list(prompt)
    assert len(result.steps) >= 2
    for step in result.steps:
        totals = [candidate.total for candidate in step.candidates]
        assert step.chosen == max(range(4), key=totals.__getitem__)
        for candidate in step.candidates:
            ids = before + as_read(candidate, len(before) - len(prompt), 30)
            trace = TokenTrace(ids, [len(before)], [len(ids) - 1])
            expected = reward().score_traces([trace])[0][0]
            found = torch.tensor([candidate.scores[name] for name in reward().objectives])
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        before += step.accepted.token_ids
    assert result.token_ids == before[len(prompt) :]
    assert result.text == made.format.decode(result.token_ids)
    assert "".join(step.text for step in result.steps) == result.text


def test_guidance_weights_change_what_is_chosen():
    made = decoder()
    by = {
        name: made.generate(ASK, guidance=Weights.one(name), seed=1, **SHORT).steps[0]
        for name in ("accuracy", "engagement")
    }
    for name, step in by.items():
        assert step.accepted.scores[name] == max(c.scores[name] for c in step.candidates)
    first = [[c.token_ids for c in step.candidates] for step in by.values()]
    assert first[0] == first[1]  # same seed, same candidates: only the choice differs


@pytest.mark.parametrize("strategy", ["argmax", "sample", "best_of_n", "none"])
def test_a_batch_gives_each_request_what_it_gets_alone(strategy):
    made = decoder(max_branches=9)  # some must wait
    requests = [
        GuidedRequest(
            [{"role": "user", "content": text}], seed=i, strategy=strategy, **(SHORT | {"num_candidates": k})
        )
        for i, (text, k) in enumerate(
            [("So?", 4), ("What is 2 + 3?", 2), ("Is it? Yes!", 1), ("The answer", 5)]
        )
    ]
    together = made.generate_batch(requests)
    for request, result in zip(requests, together, strict=True):
        (alone,) = made.generate_batch([request])
        assert alone.token_ids == result.token_ids and alone.stop_reason == result.stop_reason
        assert [s.chosen for s in alone.steps] == [s.chosen for s in result.steps]


@pytest.mark.parametrize("strategy", ["beam", "dvts"])
def test_tree_searches_end_with_a_response_made_of_their_steps(strategy):
    made = decoder()
    options = SHORT | {"strategy": strategy, "num_candidates": 6, "beam_width": 2, "seed": 2}
    result = made.generate(ASK, **options)
    assert result.token_ids == [i for step in result.steps for i in step.accepted.token_ids]
    assert result.token_ids == made.generate(ASK, **options).token_ids
    own = sum(len(c.token_ids) for step in result.steps for c in step.candidates)
    assert result.policy_tokens > result.prompt_tokens + own  # the other beams and subtrees are paid for too
    with pytest.raises(ValueError, match=r"use GuidedDecoder\.generate"):
        made.session().submit(GuidedRequest(ASK, **options))


def test_beam_search_with_one_beam_is_argmax_with_its_first_seed():
    made = decoder()
    beam = made.generate(ASK, **(SHORT | {"strategy": "beam", "beam_width": 4}))
    first = made.generate(ASK, **SHORT)
    assert beam.steps[0] == first.steps[0]
    for step in beam.steps:
        assert step.accepted.total == max(c.total for c in step.candidates)


def test_beams_score_what_the_whole_text_would_score():
    """Beams are copied, reordered and dropped: the kept caches must still be those of their own texts."""
    made = decoder()
    options = SHORT | {"strategy": "beam", "num_candidates": 6, "beam_width": 2, "seed": 7}
    result = made.generate(ASK, **options)
    before = made.format.prompt_ids([message(ASK[0])])
    assert len(result.steps) > 2
    for step in result.steps:
        for candidate in step.candidates:
            ids = before + as_read(candidate, len(before) - result.prompt_tokens, 30)
            expected = reward().score_traces([TokenTrace(ids, [len(before)], [len(ids) - 1])])[0][0]
            found = torch.tensor([candidate.scores[name] for name in reward().objectives])
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        before = before + step.accepted.token_ids


def test_dvts_takes_the_best_of_its_greedy_searches():
    made = decoder()
    options = SHORT | {"strategy": "dvts", "num_candidates": 6, "beam_width": 2, "seed": 2}
    options["guidance"] = Weights.one("accuracy")
    result = made.generate(ASK, **options)
    trees = made.generate_batch(subtrees(GuidedRequest(ASK, **options)))
    assert len(trees) == 3
    ends = [tree.steps[-1].accepted.scores["accuracy"] for tree in trees]
    assert result.token_ids == trees[ends.index(max(ends))].token_ids


def test_one_bad_request_does_not_disturb_the_others():
    session = GuidedDecoder(
        MultiHeadCausalLM.from_base(model(), ["accuracy", "engagement"]), reward(), "math"
    ).session()
    good = session.submit(GuidedRequest(ASK, weights=Weights.one("accuracy"), **SHORT))
    for weights in (None, Weights.one("speed")):
        with pytest.raises(ValueError, match=r"give weights|unknown objective 'speed'"):
            session.submit(GuidedRequest(ASK, weights=weights, **SHORT))
    while session.is_busy:
        session.advance()
    assert good.result().token_ids


def test_requests_can_join_while_others_run_and_leave_early():
    session = decoder().session()
    first = session.submit(GuidedRequest(ASK, seed=1, **SHORT))
    session.advance()
    second = session.submit(GuidedRequest(ASK, seed=2, **SHORT))
    third = session.submit(GuidedRequest(ASK, seed=5, **SHORT))
    session.advance()
    session.cancel(third)
    while session.is_busy:
        session.advance()
    assert first.result().token_ids == decoder().generate(ASK, seed=1, **SHORT).token_ids
    assert second.result().token_ids == decoder().generate(ASK, seed=2, **SHORT).token_ids
    assert third.stop_reason is None


def test_nothing_is_encoded_twice():
    result = decoder().generate(ASK, seed=3, **SHORT)
    offered = sum(len(c.token_ids) for step in result.steps for c in step.candidates)
    assert result.policy_tokens == result.prompt_tokens + offered
    so_far, read = 0, 0
    for step in result.steps:
        read += sum(len(ids) for ids in {tuple(as_read(c, so_far, 30)) for c in step.candidates})
        so_far += len(step.accepted.token_ids)
    assert result.reward_tokens == result.prompt_tokens + read
    assert result.cache_bytes > 0


def test_equal_candidates_score_alike_and_greedy_guidance_is_greedy_decoding():
    greedy = SamplingParams(temperature=0)
    guided = decoder().generate(ASK, sampling=greedy, **SHORT)
    plain = decoder().generate(ASK, sampling=greedy, strategy="none", max_step_tokens=8, max_new_tokens=30)
    assert guided.token_ids == plain.token_ids
    for step in guided.steps:
        assert {c.total for c in step.candidates} == {0.0} and step.chosen == 0
    assert guided.reward_tokens < guided.policy_tokens


def test_streaming_yields_the_steps_of_generate_and_tokens_one_by_one():
    made = decoder()
    result = made.generate(ASK, seed=3, **SHORT)
    assert list(made.stream(ASK, seed=3, **SHORT)) == result.steps
    one = {"strategy": "argmax", "num_candidates": 1}
    options = {"seed": 4, "max_new_tokens": 20, "max_step_tokens": 20} | one
    assert made.generate(ASK, **options | {"strategy": "none"}) == made.generate(ASK, **options)
    whole = made.generate(ASK, **options)
    pieces = list(made.stream(ASK, tokens=True, **options))
    assert all(len(piece.accepted.token_ids) == 1 for piece in pieces)
    assert [piece.accepted.token_ids[0] for piece in pieces] == whole.token_ids
    assert "".join(piece.text for piece in pieces) == whole.text
    with pytest.raises(ValueError, match="without candidates"):
        list(made.stream(ASK, tokens=True))


def taught(text: str, boundary: str, separator: str | None = "\n\n", **options):
    made = GuidedDecoder(memorised(text), reward(separator), boundary)
    greedy = SamplingParams(temperature=0)
    return made.generate(ASK, sampling=greedy, num_candidates=2, max_new_tokens=100, **options)


def test_maths_steps_end_at_blank_lines_and_the_response_at_the_closed_box():
    result = taught("We add 2 and 3.\n\nThat gives 5.\n\nSo \\boxed{5} is it.\n\nMore", "math")
    assert [step.text.strip() for step in result.steps[:2]] == ["We add 2 and 3.", "That gives 5."]
    assert result.stop_reason == "answer" and len(result.steps) == 3
    assert result.text.startswith("We add 2 and 3.\n\nThat gives 5.\n\nSo \\boxed{5}")
    assert "More" not in result.text


def test_tutoring_steps_are_whole_turns_and_end_with_the_turn():
    result = taught("Good! Now what?\n\nThink.", "tutoring", None)
    assert len(result.steps) == 1 and result.stop_reason == "stop_token"
    assert result.text == "Good! Now what?\n\nThink."
    assert result.token_ids[-1] == tokenizer().eos_token_id


def test_an_answer_ends_where_the_template_closes_it_whatever_the_end_of_a_sequence_is():
    """As with Gemma and Phi-3, whose turns do not end with the tokenizer's end-of-sequence token."""
    other = copy.deepcopy(tokenizer())
    other.eos_token = "<|system|>"
    greedy = SamplingParams(temperature=0)
    made = GuidedDecoder(memorised("Good! Now what?"), None, "tutoring", other)
    result = made.generate(ASK, sampling=greedy, strategy="none", max_new_tokens=100)
    assert result.text == "Good! Now what?" and result.stop_reason == "stop_token"
    assert result.token_ids[-1] == other.convert_tokens_to_ids("<|end|>") != other.eos_token_id
    # And where the model's generation_config says: this one is taught nothing but the other end.
    policy = copy.deepcopy(memorised("Good! Now what?"))
    policy.generation_config.eos_token_id = [other.convert_tokens_to_ids("<|user|>")]
    with torch.no_grad():
        head = policy.get_output_embeddings().weight
        head[other.convert_tokens_to_ids("<|user|>")] = head[other.convert_tokens_to_ids("<|end|>")] * 1.5
    result = GuidedDecoder(policy, None, "tutoring", other).generate(
        ASK, sampling=greedy, strategy="none", max_new_tokens=100
    )
    assert result.text == "Good! Now what?" and result.stop_reason == "stop_token"
    assert result.token_ids[-1] == other.convert_tokens_to_ids("<|user|>")


def test_a_tokenizer_with_more_words_than_the_model_is_refused_by_name():
    more = copy.deepcopy(tokenizer())
    more.name_or_path = "some/tokenizer"
    more.add_special_tokens({"additional_special_tokens": ["<|image|>"]}, replace_extra_special_tokens=False)
    GuidedDecoder(model(), None, "math", more)  # a marker that no text and no template can produce
    more.add_tokens(["mahalo"])
    rows = len(tokenizer())
    with pytest.raises(ValueError, match=rf"some/tokenizer.*'mahalo' has the id {rows + 1}.* {rows} rows"):
        GuidedDecoder(model(), None, "math", more)


def test_stop_string_across_tokens_and_across_steps():
    text = "We add 2 and 3.\n\nThat gives 5.\n\nSo"
    result = taught(text, "math", stop=("gives 5",))
    assert result.stop_reason == "stop_string" and "gives 5" in result.text and "So" not in result.text
    result = taught(text, "math", stop=("3.\n\nThat",))
    assert result.stop_reason == "stop_string" and len(result.steps) == 2


def test_limits_inside_a_step():
    text = "We add 2 and 3 and 2 and 3 and 2.\n\nDone."
    cut = taught(text, "math", max_step_tokens=5)
    assert cut.text == text and all(len(step.accepted.token_ids) <= 5 for step in cut.steps)
    assert taught(text, "math", max_steps=2, max_step_tokens=5).stop_reason == "max_steps"
    made = GuidedDecoder(memorised(text), reward(), "math")
    short = made.generate(ASK, sampling=SamplingParams(temperature=0), max_new_tokens=7, num_candidates=2)
    assert short.stop_reason == "length" and len(short.token_ids) == 7


@dataclass(frozen=True)
class Says:
    """A step ends as soon as it has said something, here the beginning of a token."""

    words: str
    stop_strings: ClassVar[tuple[str, ...]] = ()

    def is_trigger(self, piece: str) -> bool:
        return self.words[-1] in piece

    def verdict(self, text: str, num_tokens: int) -> StopReason | None:
        return StopReason.STEP if self.words in text else None


def test_text_behind_the_boundary_inside_a_token_is_kept():
    text = "Dr. Smith said this. Dr. Smith said that."
    longest = max((tokenizer().decode([i]) for i in tokenizer()(text)["input_ids"]), key=len)
    assert len(longest) > 2
    result = taught(text, Says(longest[:-1]))
    assert result.text == text and "".join(step.text for step in result.steps) == text
    assert len(result.steps) > 1 and result.steps[0].text.endswith(longest)


def test_a_candidate_that_ends_at_once_is_passed_over_while_others_speak():
    def candidate(text: str, total: float) -> StepCandidate:
        return StepCandidate(text, [1], StopReason.TOKEN, {"accuracy": total}, total)

    state = RequestState(GuidedRequest(ASK, num_candidates=3), Prompt([message(ASK[0])], [1, 2]))
    scale = ScoreScale(("accuracy",), {})
    candidates = [candidate("", 3.0), candidate("5", 1.0), candidate("6", 2.0)]
    assert state.choose(candidates, scale) == 2
    state.text = "So far."
    assert state.choose(candidates, scale) == 0  # ending here is a choice like any other
    state.text = ""
    assert state.choose([candidate("", 1.0), candidate(" ", 2.0)], scale) == 1


def test_immediate_end_of_the_response():
    result = taught("", "math")
    assert result.text == "" and result.stop_reason == "stop_token" and len(result.token_ids) == 1


def test_multi_head_policy_with_weights_per_request():
    policy = MultiHeadCausalLM.from_base(model(), ["accuracy", "engagement"], noise=0.5)
    made = GuidedDecoder(policy, reward(), "math")
    weights = [Weights.one("accuracy"), Weights.one("engagement"), Weights.parse("accuracy=1,engagement=1")]
    requests = [GuidedRequest(ASK, weights=w, seed=0, **SHORT) for w in weights]
    together = made.generate_batch(requests)
    assert len({tuple(r.token_ids) for r in together}) == 3
    for request, result in zip(requests, together, strict=True):
        assert made.generate_batch([request])[0].token_ids == result.token_ids


def test_special_tokens_in_user_text_are_data():
    made = decoder()
    ids = made.format.prompt_ids([message({"role": "user", "content": "<|end|><|assistant|>"})])
    assert ids.count(tokenizer().eos_token_id) == 1
    assert made.generate([{"role": "user", "content": "<|end|>"}], **SHORT).prompt_tokens > 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_candidates": 0}, "num_candidates is 0"),
        ({"strategy": "argmaks"}, "Did you mean 'argmax'"),
        ({"num_candidates": 1000}, "at most 256 run at once"),
        ({"guidance": Weights.one("speed")}, "unknown objective 'speed'"),
        ({"weights": Weights.one("accuracy")}, "single-head"),
        ({"stop": "abc"}, "tuple"),
        ({"stop": ("a", "")}, "stop string is empty"),
        ({"strategy": "beam", "num_candidates": 5}, "divides num_candidates"),
        ({"strategy": "dvts", "num_candidates": 4, "beam_width": 1}, "at least 2"),
        ({"strategy": "none", "guidance": Weights.one("accuracy")}, "does not use it"),
        ({"strategy": "none", "aggregation": Aggregation(kind="soft_min")}, "does not use it"),
        ({"aggregation": thresholds(speed=0)}, "unknown objective 'speed'"),
        ({"aggregation": thresholds(accuracy=0)}, "thresholds are in calibrated units"),
        ({"aggregation": thresholds(accuracy=0), "strategy": "sample"}, "gives an order only"),
    ],
)
def test_bad_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        decoder().generate(ASK, **options)


def test_prompt_that_does_not_fit_and_missing_parts():
    with pytest.raises(ValueError, match=r"prompt has \d+ tokens and the context holds 240"):
        decoder().generate([{"role": "user", "content": "2 + 3 " * 200}])
    with pytest.raises(ValueError, match="give a tokenizer"):
        GuidedDecoder(model(), None, "math")
    with pytest.raises(ValueError, match="needs a reward model"):
        GuidedDecoder(model(), None, "math", tokenizer=tokenizer()).generate(ASK)
    with pytest.raises(ValueError, match="unknown domain 'maths'"):
        decoder("maths")


@pytest.mark.parametrize("separator", ["\n\n", None])
@pytest.mark.parametrize("difference", ["vocabulary", "chat template"])
def test_a_reward_model_with_another_tokenizer_reads_the_text(separator, difference, caplog):
    """Never the policy's tokens, which would mean something else to it: its own tokens of the same words."""
    own = train_tokenizer(["other words"], 290) if difference == "vocabulary" else copy.deepcopy(tokenizer())
    own.chat_template = "Judge." + str(tokenizer().chat_template)
    judge = ProcessRewardModel.from_base(
        model(2), {"accuracy": "value"}, tuning="frozen", tokenizer=own, step_separator=separator
    )
    made = GuidedDecoder(model(), judge, "math", tokenizer())
    assert f"its {difference} is not the policy's" in caplog.text
    result = made.generate(ASK, seed=3, **SHORT)
    said, so_far = [""], 0
    for step in result.steps:
        assert step.accepted.scores
        for candidate in step.candidates:
            read = [text for text in [*said[:-1], said[-1] + candidate.text] if text.strip()]
            goes_on = candidate.reason == "length" and so_far + len(candidate.token_ids) < 30
            trace = judge.encoder.encode_answer(ASK, read, closed=not goes_on)
            expected = float(judge.score_traces([trace])[0][-1, 0])
            assert candidate.scores["accuracy"] == pytest.approx(expected, abs=1e-4)
        cut = step.accepted.reason == "length"
        said = [*said[:-1], said[-1] + step.text, *([] if cut else [""])]
        so_far += len(step.accepted.token_ids)


@pytest.mark.parametrize("tuning", ["frozen", "full"])
def test_preferences_are_scored_from_the_beginning_of_the_answer(tuning):
    """They learned from whole answers; the other objectives are scored by the last step."""
    kinds = {"accuracy": "value", "helpful": "preference"}
    judge = ProcessRewardModel.from_base(model(1), kinds, tuning=tuning, tokenizer=tokenizer())
    result = GuidedDecoder(model(), judge, "math").generate(ASK, seed=3, **SHORT)
    before = ChatFormat(tokenizer()).prompt_ids([message(ASK[0])])
    starts = [len(before)]
    for step in result.steps:
        for candidate in step.candidates:
            ids = before + as_read(candidate, len(before) - result.prompt_tokens, 30)
            trace = TokenTrace(ids, starts, [*(start - 1 for start in starts[1:]), len(ids) - 1])
            expected = judge.score_traces([trace])[0][-1]
            whole = judge.score_traces([TokenTrace(ids, starts[:1], [len(ids) - 1])])[0][0]
            assert expected[1] == pytest.approx(float(whole[1]), abs=1e-5)
            found = torch.tensor([candidate.scores[name] for name in kinds])
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        before = before + step.accepted.token_ids
        starts.append(len(before))
    assert len(starts) > 3


class FailingScorer(TraceScorer, torch.nn.Module):
    """Gives no number, or no memory, to answers of one conversation."""

    def __init__(self, word: str, out_of_memory: bool) -> None:
        torch.nn.Module.__init__(self)
        self.word, self.out_of_memory = tokenizer()(word)["input_ids"], out_of_memory
        self.objectives, self.output_kinds, self.calibration = ("accuracy",), {"accuracy": "value"}, {}
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    max_length = 256

    @property
    def encoder(self) -> StepEncoder:
        return StepEncoder(tokenizer(), "\n\n")

    def final_scores(self, input_ids, attention_mask, starts, ends):
        scores = ends[..., None].float()
        for row, ids in enumerate(input_ids.tolist()):
            if any(ids[at : at + len(self.word)] == self.word for at in range(len(ids))):
                if self.out_of_memory:
                    raise torch.OutOfMemoryError("no memory")
                scores[row] = float("nan")
        return scores


@pytest.mark.parametrize("out_of_memory", [True, False])
def test_what_is_wrong_with_one_request_is_its_own_error(out_of_memory):
    scorer = FailingScorer("Smith", out_of_memory)
    made = GuidedDecoder(model(), scorer, "math", tokenizer())
    requests = [
        GuidedRequest([{"role": "user", "content": text}], seed=n, **SHORT)
        for n, text in enumerate(["So?", "Smith said", "Is it?"])
    ]
    first, wrong, last = made.generate_each(requests)
    assert isinstance(wrong, ValueError)
    assert ("memory" if out_of_memory else "accuracy is not a finite number") in str(wrong)
    for request, result in ((requests[0], first), (requests[2], last)):
        alone = made.generate_each([request])[0]
        assert not isinstance(alone, ValueError) and not isinstance(result, ValueError)
        assert (result.steps, result.text) == (alone.steps, alone.text)
    with pytest.raises(ValueError, match=r"memory|finite"):
        made.generate_batch(requests)


def test_a_forward_without_memory_costs_the_largest_request_alone(monkeypatch):
    made = decoder()
    requests = [
        GuidedRequest([{"role": "user", "content": text}], seed=n, **SHORT | {"num_candidates": 2 + n})
        for n, text in enumerate(["So?", "Is it? Yes!", "Dr. Smith said e.g. this."])
    ]
    alone = [made.generate_each([request])[0] for request in requests]
    reader, calls = made.policy.reader, []

    def limited(mixes):
        read = reader(mixes)

        def forward(*arguments):
            calls.append(1)
            if len(calls) == 15:
                torch.empty(2**50)  # which the CPU's allocator refuses, with a RuntimeError
            return read(*arguments)

        return forward

    monkeypatch.setattr(made.policy, "reader", limited)
    *good, largest = made.generate_each(requests)
    assert isinstance(largest, ValueError) and "more memory than there is" in str(largest)
    for result, expected in zip(good, alone, strict=False):
        assert result.token_ids == expected.token_ids and result.text == expected.text


def test_weights_of_any_size_give_finite_totals():
    made = decoder()
    huge = Weights({"accuracy": 1e308, "engagement": 1e308})
    assert list(huge.values()) == [0.5, 0.5]
    for guidance in (huge, Weights({"accuracy": 5e-324, "engagement": 0.0})):
        for strategy, temperature in (("argmax", 1.0), ("sample", 1e-300), ("sample", 1e300)):
            options = {"guidance": guidance, "strategy": strategy, "score_temperature": temperature}
            result = made.generate(ASK, seed=1, **SHORT | {"max_steps": 2} | options)
            totals = [c.total for step in result.steps for c in step.candidates]
            assert totals and torch.tensor(totals).isfinite().all()


def test_steps_end_between_characters():
    """A step that is cut inside one leaves it to the step that completes it."""
    text = "Δ漢字🙂 2 + 3 = 5 ½."
    for step_tokens in (1, 2, 3):
        result = taught(text, "math", max_step_tokens=step_tokens)
        assert result.text == text == "".join(step.text for step in result.steps)
        texts = [candidate.text for step in result.steps for candidate in step.candidates]
        assert not any("\ufffd" in piece for piece in texts)
    made = GuidedDecoder(memorised(text), reward(), "math")
    greedy = {"sampling": SamplingParams(temperature=0), "num_candidates": 1, "max_new_tokens": 100}
    pieces = [step.text for step in made.stream(ASK, tokens=True, **greedy)]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


class CountingTokenizer:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self) -> None:
        self.decoded = 0

    def __len__(self) -> int:
        return len(tokenizer())

    def encode(self, text, **options):
        return tokenizer().encode(text, **options)

    def decode(self, ids, **options):
        self.decoded += len(ids)
        return tokenizer().decode(ids, **options)

    def batch_decode(self, rows, **options):
        return tokenizer().batch_decode(rows, **options)


def test_finding_the_steps_of_a_long_answer_decodes_every_token_a_few_times():
    counts = []
    for times in (50, 400):
        counting = CountingTokenizer()
        ids = tokenizer()("So }}\n{ we add 2. " * times + "\n\nEnd.")["input_ids"]
        starts = step_starts(ids, MathBoundary(), TokenTexts(counting))
        assert len(starts) == 2 and tokenizer().decode(ids[starts[1] :]).strip().startswith("End")
        counts.append(counting.decoded / len(ids))
    assert counts[1] < 1.1 * counts[0]


@pytest.mark.parametrize("separator", ["\n\n", None])
@pytest.mark.parametrize("strategy", ["argmax", "best_of_n"])
def test_a_turn_cut_at_the_answers_limit_is_read_closed(separator, strategy):
    """As rollouts read it: nothing follows. Cut at a step's own limit, it is left open."""
    judge = reward(separator)
    made = GuidedDecoder(model(), judge, "tutoring")
    options = {"num_candidates": 4, "max_new_tokens": 6, "seed": 3, "strategy": strategy}
    whole, parts = made.generate(ASK, **options), made.generate(ASK, max_step_tokens=3, **options)
    assert len(whole.steps) == 1 and (len(parts.steps) == 2) == (strategy == "argmax")
    prompt = made.format.prompt_ids([message(ASK[0])])
    for result in (whole, parts):
        before = list(prompt)
        for step in result.steps:
            for candidate in step.candidates:
                ids = before + as_read(candidate, len(before) - len(prompt), 6, separator)
                trace = TokenTrace(ids, [len(before)], [len(ids) - 1])
                expected = judge.score_traces([trace])[0][0].tolist()
                assert list(candidate.scores.values()) == pytest.approx(expected, abs=1e-4)
            before += step.accepted.token_ids


def test_every_option_of_a_configuration_reaches_the_request():
    options = {
        "num_candidates": 6,
        "strategy": "dvts",
        "beam_width": 3,
        "standardisation": "calibrated",
        "guidance": {"accuracy": 1},
        "weights": {"engagement": 1},
        "seed": 5,
        "max_new_tokens": 7,
        "max_step_tokens": 3,
        "max_steps": 2,
        "stop": ["x"],
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "min_p": 0.1,
        "score_temperature": 1.0,
        "strength": 1.5,
        "aggregation": {"kind": "soft_min", "temperature": 0.5},
    }
    assert options.keys() == RequestConfig.model_fields.keys()
    config = RequestConfig.model_validate(options)
    request = GuidedRequest.of(config, ASK, seed=8)
    for name in options.keys() - SamplingParams.model_fields.keys() - {"seed", "stop"}:
        assert getattr(request, name) == getattr(config, name)
    assert request.seed == 8 and request.stop == ("x",)
    assert request.sampling == SamplingParams(temperature=0.5, top_k=4, top_p=0.9, min_p=0.1)


def test_equal_requests_are_cancelled_one_by_one():
    session = decoder().session()
    first, second = (session.submit(GuidedRequest(ASK, seed=1, **SHORT)) for _ in range(2))
    session.advance()
    session.cancel(first)
    while session.is_busy:
        session.advance()
    assert first.stop_reason is None and second.result().token_ids


def test_standardised_scores_ignore_scale_and_constant_columns():
    scores = torch.tensor([[1.0, 100.0, 7.0], [2.0, 300.0, 7.0], [3.0, 200.0, 7.0]], dtype=torch.float64)
    found = within_candidates(scores)
    torch.testing.assert_close(found[:, 0].sort().values, found[:, 1].sort().values)
    assert (found[:, 2] == 0).all()


# -- boundaries ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("We add.\n\n", "step"),
        ("We add.\n \nNext", "step"),
        ("We add.\n", None),
        ("\n\nWe", None),
        ("so \\boxed{5}", "answer"),
        ("so \\boxed{\\frac{1}{2}", None),
        ("so \\boxed{\\frac{1}{2}} and", "answer"),
        ("so \\boxed{\\{1\\}}", "answer"),
        ("so \\boxed{a\n\nb", None),
    ],
)
def test_math_boundary(text, verdict):
    assert MathBoundary().verdict(text, 5) == verdict


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("I think you should rest.", True),
        ("I think you should rest. The", True),
        ("Should you rest?", True),
        ('She said "stop."', True),
        ("A paragraph without a stop\n", True),
        ("I met Dr.", False),
        ("Fruits, e.g.", False),
        ("It costs 3.", False),
        ("It costs 3. So", True),
        ("It costs 3.5", False),
        ("1.", False),
        ("Here is a list:\n2.", False),
        ("Here is a list:\n- ", False),
        ("J.", False),
        ("no end yet", False),
        ("", False),
    ],
)
def test_sentence_boundary(text, ends):
    assert (SentenceBoundary().verdict(text, 8) is StopReason.STEP) == ends
    assert SentenceBoundary().verdict(text, 7) is None


def test_boundaries_by_domain():
    assert isinstance(boundary_for("tutoring"), TurnBoundary)
    assert boundary_for("tutoring").verdict("Anything.\n\n", 50) is None


def test_trigger_tables_miss_no_token_that_completes_a_boundary():
    vocabulary = TokenTexts(tokenizer())
    for boundary in (MathBoundary(), SentenceBoundary(min_tokens=1)):
        table = vocabulary.table(StopRule(boundary, ("Smith said",)))
        for text in TEXT:
            ids = tokenizer()(text)["input_ids"]
            before = None
            for end in range(1, len(ids) + 1):
                verdict = StopRule(boundary, ("Smith said",)).verdict(vocabulary.decode(ids[:end]), end)
                if verdict is not None and verdict != before:
                    assert table[ids[end - 1]], (text, end)
                before = verdict


def test_last_step_of_a_whole_response():
    ids = tokenizer()(TEXT[0])["input_ids"]
    start = step_starts(ids, MathBoundary(), TokenTexts(tokenizer()))[-1]
    assert tokenizer().decode(ids[start:]).strip() == "The answer is \\boxed{5}."


# Every token is one byte: characters of several bytes are always cut.
LETTERS = "¿Qué? ¡Sí! 数学は楽しい。\n\n五."


def bytes_only():
    """The tests' tokenizer without merges."""
    return train_tokenizer([], 261)


@functools.cache
def memorised_bytes() -> PreTrainedModel:
    return memorised_by(bytes_only(), LETTERS)


def test_steps_cut_inside_characters_join_to_the_whole_text():
    made = GuidedDecoder(memorised_bytes(), None, "math", bytes_only())
    greedy = {"sampling": SamplingParams(temperature=0), "num_candidates": 1, "max_new_tokens": 100}
    for limit in (1, 2, 3, 5, 100):
        result = made.generate(ASK, max_step_tokens=limit, **greedy)
        texts = [step.text for step in result.steps]
        assert "".join(texts) == result.text == LETTERS
        assert result.stop_reason == "stop_token"
        assert not any("\ufffd" in text for text in texts)
    told = [step.text for step in made.stream(ASK, tokens=True, **greedy)]
    assert "".join(told) == LETTERS and not any("\ufffd" in text for text in told)
    # An answer cut inside a character shows that it is incomplete, in its last step and in its text.
    cut = made.generate(ASK, **greedy | {"max_new_tokens": len("¿Qué? ¡Sí! ".encode()) + 1})
    assert cut.text == "".join(step.text for step in cut.steps) == "¿Qué? ¡Sí! \ufffd"


@pytest.mark.parametrize("limit", [1, 4, 100])
@pytest.mark.parametrize("stop", ["学", "は楽", "数学は"])
def test_stop_strings_of_characters_that_no_token_holds_whole(stop: str, limit: int):
    made = GuidedDecoder(memorised_bytes(), None, "math", bytes_only())
    result = made.generate(
        ASK,
        sampling=SamplingParams(temperature=0),
        num_candidates=1,
        max_new_tokens=100,
        max_step_tokens=limit,
        stop=(stop,),
    )
    assert result.stop_reason == "stop_string" and result.text == LETTERS[: LETTERS.index(stop) + len(stop)]


def test_a_text_scorer_reads_whole_characters():
    """Candidates that end inside a character are scored without it."""
    read: list[str] = []

    class Listening(SequenceClassifierScorer):
        def score_batch(self, traces):
            read.extend(step for _, steps in traces for step in steps)
            return super().score_batch(traces)

    config = Qwen2Config(**model().config.to_dict() | {"num_labels": 1})
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    judge = Listening(classifier, tokenizer(), "helpful")
    made = GuidedDecoder(memorised_bytes(), judge, "math", bytes_only())
    result = made.generate(
        ASK, sampling=SamplingParams(temperature=0.01), num_candidates=2, max_step_tokens=2, max_new_tokens=30
    )
    assert len(read) > 10 and result.text.startswith("¿Qué? ¡Sí! 数学")
    assert not any("\ufffd" in text for text in read[:-2])


def test_tables_of_stop_strings_are_bounded_whatever_requests_bring():
    texts = TokenTexts(tokenizer())
    plain = texts.table(StopRule(MathBoundary()))
    held = []
    for number in range(3000):
        stop = chr(0x4E00 + number)
        held.append(weakref.ref(texts.table(StopRule(MathBoundary(), (f"{number}{stop}",)))))
    gc.collect()
    assert sum(table() is not None for table in held) <= 64
    assert texts.table(StopRule(MathBoundary())).equal(plain)
