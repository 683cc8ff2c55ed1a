"""Domains: the judges by hand-worked cases, answers taken step by step, and whole runs of tiny size."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_guided import ASK, memorised, reward, tokenizer
from tiny_run import EXAMPLE, SIZES, mahalo

from mahalo_ray.config import ConfigError, SamplingConfig, load_config
from mahalo_ray.data.records import PreferencePair
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.policy import CausalPolicy
from mahalo_ray.decoding.scorers import RewardModels
from mahalo_ray.decoding.stopping import boundary_for
from mahalo_ray.domains.human_values_miniature.facts import FORMS, FactsEpisode, Statement, understand, world
from mahalo_ray.domains.protocol import DOMAINS, AnswerEpisode, load_domain
from mahalo_ray.domains.tutoring.problems import Operation, Problem
from mahalo_ray.domains.tutoring.student import MiniatureStudent, Personality, TutoringEpisode
from mahalo_ray.models.scoring import TokenTrace
from mahalo_ray.pipeline.seed_blocks import check_domain
from mahalo_ray.rollouts.dialogues import Collector, DialogueBatch
from mahalo_ray.rollouts.pair_building import judged_pairs, labelled_traces
from mahalo_ray.rollouts.tutors import PolicyTutor

# --- judges


def fact(known: str) -> tuple[str, str]:
    """Some fact that is known so well."""
    return next(fact for fact, (_, knowledge) in world().items() if knowledge == known)


def sentence(kind: Statement, of: tuple[str, str], right: bool = True) -> str:
    value = world()[of][0]
    return FORMS[kind].format(place=of[0], topic=of[1], value=value if right else other_value(of))


def other_value(of: tuple[str, str]) -> str:
    return next(v for (_, topic), (v, _) in world().items() if topic == of[1] and v != world()[of][0])


def answered(asked: tuple[str, ...], place: str, *sentences: str) -> list[float]:
    episode = FactsEpisode(0, "?", place=place, asked=asked)
    for text in sentences[:-1]:
        episode.take_step(text + " ")
    assert episode.hear(sentences[-1]) is None and episode.over
    return [episode.outcome()[name] for name in ("helpful", "honest", "truthful")]


@pytest.mark.parametrize(
    ("known", "kind", "right", "values"),
    [
        ("well", "claim", True, [1.0, 1.0, 1.0]),
        ("well", "claim", False, [1.0, 1.0, 0.0]),  # honest, and wrong
        ("well", "unknown", True, [0.0, 0.0, 1.0]),
        ("little", "guess", False, [0.6, 1.0, 0.5]),
        ("not", "claim", True, [1.0, 0.0, 1.0]),  # right by luck, and claimed without knowing
        ("not", "unknown", True, [0.0, 1.0, 1.0]),
    ],
)
def test_what_one_sentence_is_worth(known: str, kind: Statement, right: bool, values: list[float]) -> None:
    place, topic = fact(known)
    assert answered((topic,), place, sentence(kind, (place, topic), right)) == values


def test_parts_left_out_count_nothing_and_repeating_does_not_help() -> None:
    place, topic = fact("well")
    other = next(t for p, t in world() if p == place and t != topic)
    claim = sentence("claim", (place, topic))
    # What is not spoken of is no help, but nothing dishonest either.
    assert answered((topic, other), place, claim) == [0.5, 1.0, 1.0]
    assert answered((topic, other), place, claim, claim) == [0.5, 1.0, 1.0]
    # The first statement counts as the answer; every wrong one costs truth, also one that nobody asked for.
    elsewhere = next(f for f in world() if f[0] != place)
    wrong = sentence("claim", elsewhere, right=False)
    assert answered((topic, other), place, claim, wrong, wrong, wrong) == [0.5, 1.0, 0.0]


def test_sentences_of_other_forms_are_malformed() -> None:
    domain, right = load_domain("human_values_miniature"), sentence("claim", fact("well"))
    assert not domain.is_malformed(f"{right} {sentence('unknown', fact('not'))}")
    for text in (
        "",
        right[:-1],
        right + right[:5],
        right.replace("is", "was"),
        "The river of Rome is Tiber.",
    ):
        assert domain.is_malformed(text)
    assert understand(right + " Or so.")[1] is None


def test_scripted_answers_show_that_the_three_objectives_pull_apart() -> None:
    """What is best for one objective is poor for another."""
    domain = load_domain("human_values_miniature")
    best: dict[str, dict[str, Statement]] = {
        "helpful": dict.fromkeys(("well", "little", "not"), "claim"),
        "honest": {"well": "claim", "little": "guess", "not": "unknown"},
        "truthful": dict.fromkeys(("well", "little", "not"), "unknown"),
    }
    means = {style: dict.fromkeys(best, 0.0) for style in best}
    for seed, style in itertools.product(range(100), best):
        episode = domain.episode(seed)
        assert isinstance(episode, FactsEpisode)
        facts = [(episode.place, topic) for topic in episode.asked]
        # What cannot be known is claimed wrong.
        texts = [sentence(best[style][world()[f][1]], f, world()[f][1] != "not") for f in facts]
        episode.hear(" ".join(texts))
        for name, value in episode.outcome().items():
            means[style][name] += value / 100
    for name in best:
        assert means[name][name] == pytest.approx(1.0)
    # What claims nothing that it does not know is also true; the reverse does not hold, nor is it helpful.
    assert means["helpful"]["truthful"] < 0.8 and means["truthful"]["helpful"] == 0
    assert (
        means["helpful"]["honest"] < 0.6
        and means["truthful"]["honest"] < 0.6
        and means["honest"]["helpful"] < 0.8
    )


def test_a_tutor_gives_away_what_it_states_itself() -> None:
    problem = Problem("", (Operation(2, "+", 3), Operation(5, "x", 2), Operation(10, "-", 4)), 5)
    someone = Personality({"+": 0.2, "-": 0.2, "x": 0.2}, 0.6, 1.0, 1.0)

    def left(*turns: str) -> float:
        episode = TutoringEpisode(problem, MiniatureStudent(problem, someone, seed=3))
        for turn in turns:
            episode.hear(turn)
        assert episode.judge_prefix()["no_giveaway"] == episode.outcome()["no_giveaway"]
        return episode.outcome()["no_giveaway"]

    assert left("First, what is 2 + 3? You can do this!") == 1.0
    assert left("First, 2 + 3 = 5.") == left("First, 2 + 3 = 5.", "First, 2 + 3 = 5.") == pytest.approx(2 / 3)
    assert left("First, 2 + 3 = 6.") == 1.0  # wrong: nothing is given away
    assert left("First, 2 + 3 = 5.", "Second, 5 x 2 = 10.") == pytest.approx(1 / 3)
    assert left("Third, 10 - 4 = 6.") == left("The answer is 6.") == 0.0  # the answer


# --- names


def test_domains_are_found_by_name_and_every_one_keeps_the_protocol(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    for name in (*DOMAINS, "brevity:DOMAIN"):
        domain = load_domain(name)
        boundary_for(domain.boundary)
        for seed in range(3):
            episode, example = domain.episode(seed), domain.sft_dialogue(seed)
            assert set(domain.objectives) == set(example.outcome)
            assert example.turns[0].content and episode.opening_messages[-1].role == "user"
            assert not any(domain.is_malformed(t.content) for t in example.turns if t.speaker == "tutor")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["domain.name=tutoring_minature"],
            "'domain.name': unknown domain.*Did you mean 'tutoring_miniature'",
        ),
        (["domain.name=nowhere.at_all:DOMAIN"], "there is no domain 'nowhere.at_all:DOMAIN'"),
        (["domain.name=math:pi"], "is a float that lacks boundary"),
        (["domain.name=human_values_miniature"], "'objectives.0': unknown objective 'accuracy'"),
        (
            [
                *("domain.name=human_values_miniature", "objectives.0={name: honest, supervision: pairwise}"),
                *(
                    "objectives.1={name: helpful, supervision: rollout_value}",
                    "sweep={weights: [{honest: 1}]}",
                ),
                "guided={weights: {honest: 1}, guidance: {honest: 1}}",
            ],
            "all objectives are pairwise, or none is",
        ),
    ],
)
def test_a_domain_that_is_not_there_or_cannot_do_it_is_said(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_domain(load_config(EXAMPLE, overrides))


# --- steps of one answer

ANSWER = "The sum of 2 and 3 is surely 5. That is all there is to say."


@dataclass
class Sum(AnswerEpisode):
    def outcome(self) -> dict[str, float]:
        return {"right": float(self.complete and "5" in self.answer), "short": 1 / len(self.steps)}


def collected(whole_answers: bool, max_steps: int = 16) -> tuple[Collector, DialogueBatch]:
    """Two questions answered by a model that knows one answer by heart."""
    boundary, chat = boundary_for("sentence", whole_answers), ChatFormat(tokenizer())
    sampling = SamplingConfig(temperature=0, max_new_tokens=60)
    policy = CausalPolicy(memorised(ANSWER))
    models = RewardModels([reward(None)], boundary, chat.tokenizer, policy.end_ids)
    tutor = PolicyTutor(Engine(policy), chat, sampling, boundary=boundary)
    batch = DialogueBatch(tutor, scorers=models.follow())
    episodes = [Sum(seed, ASK[0]["content"], max_steps=max_steps) for seed in (1, 2)]
    batch.open(episodes, ["a", "b"], "test")
    kinds = {"right": "rollout_value", "short": "pairwise" if whole_answers else "judged_rollouts"}
    collector = Collector(batch, continuations=2, gamma=0.5, supervision=kinds)  # type: ignore[arg-type]
    batch.play(2, collector)
    return collector, batch


def test_an_answer_is_taken_and_labelled_step_by_step() -> None:
    collector, batch = collected(whole_answers=False)
    first, second, end = (s for s in collector.sets if s.dialogue == "a")
    assert end.candidates[0].token_ids == [tokenizer().eos_token_id]
    assert [c.content for c in (first.candidates[0], second.candidates[0])] == [ANSWER[:32], ANSWER[32:]]
    assert [m.content for m in second.prompt] == [ASK[0]["content"], ANSWER[:32]]  # the answer so far
    assert second.prompt_ids == first.prompt_ids + first.candidates[0].token_ids
    # Right, and two steps follow the first; three steps make 1/3, which is no more than a half.
    assert first.candidates[0].labels == {"right": 0.25, "short": 0.0}
    assert second.candidates[0].labels == {"right": 0.5, "short": 0.0}
    assert end.candidates[0].labels == {"right": 1.0, "short": 0.0}
    for conversation in batch.conversations:
        assert conversation.ended == "answer" and conversation.malformed == 0
        dialogue = conversation.dialogue("test", ["right"])
        assert dialogue.outcome == {"right": 1.0}
        assert [turn.speaker for turn in dialogue.turns] == ["student", "tutor", "tutor", "tutor"]
    assert len(engine_of(batch)) == 0  # nothing is kept of what is over
    traces = labelled_traces(collector.sets, ["right", "short"])
    judged = [(s.candidates[0].scores or {})["accuracy"] for s in (first, second, end)]
    for trace, score in zip([t for t in traces if t.dialogue == "a"], judged, strict=True):
        assert trace.token_ids and trace.step_starts and trace.step_ends
        read = TokenTrace(trace.token_ids, trace.step_starts, trace.step_ends)
        assert reward(None).score_traces([read])[0][-1][0].item() == pytest.approx(score, abs=1e-5)


def test_whole_answers_are_the_same_tokens_and_make_pairs_where_they_differ() -> None:
    collector, _ = collected(whole_answers=True)
    (only,) = (s for s in collector.sets if s.dialogue == "a")
    by_steps = [
        s.candidates[0].token_ids for s in collected(whole_answers=False)[0].sets if s.dialogue == "a"
    ]
    assert only.candidates[0].token_ids == list(itertools.chain(*by_steps))
    assert only.candidates[0].labels == {"right": 1.0, "short": 1.0}
    assert list(judged_pairs(collector.sets, "right")) == []  # equal answers
    candidates = [
        c.model_copy(update={"content": t, "labels": {"right": v}})
        for c, t, v in zip(only.candidates, ("one", "two"), (0.0, 1.0), strict=True)
    ]
    (pair,) = judged_pairs([only.model_copy(update={"candidates": candidates})], "right")
    assert (pair.chosen, pair.rejected, pair.chosen_score) == ("two", "one", 1.0)
    assert pair.prompt_ids == only.prompt_ids and pair.chosen_ids == only.candidates[1].token_ids


def test_too_many_steps_end_an_answer() -> None:
    _, batch = collected(whole_answers=False, max_steps=1)
    assert {c.ended for c in batch.conversations} == {"steps"} and len(engine_of(batch)) == 0
    assert batch.conversations[0].student.outcome()["right"] == 0.0  # not complete


def engine_of(batch: DialogueBatch) -> Engine:
    assert isinstance(batch.tutor, PolicyTutor)
    return batch.tutor.engine


# --- a run

ONE_OF_EACH = "cluster={train_workers: 1, rollout_actors: 1}"
SMALL = [*SIZES, "domain.sft_dialogues=300", "guided.num_candidates=2", ONE_OF_EACH]


@pytest.mark.slow
def test_a_run_on_whole_answers_in_a_domain_that_is_not_part_of_the_package(tmp_path: Path) -> None:
    """All stages but the endpoint; the reward model learns from pairs. (On steps: test_judged_prompts.py.)"""
    pairwise = [f"objectives.{number}.supervision=pairwise" for number in range(2)]
    # Long enough, and enough of them, that some answers of a model as tiny are better than others.
    played = (
        "reward_rollouts={dialogues: 12, candidates: 3, continuations: 1, sampling: {max_new_tokens: 24}}"
    )
    settings = [*SMALL, *pairwise, played, "sweep={weights: [{complete: 1, brief: 1}]}"]
    example = str(EXAMPLE.with_name("brevity.yaml"))
    mahalo("report", example, output=tmp_path, settings=settings, modules=EXAMPLE.parent)
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    kinds = [row["kind"] for row in results["rows"]]
    assert sorted(kinds) == ["guided", "guided_sft", "head", "head", "sft", "weights"]
    assert all(set(method["values"]) == {"complete", "brief"} for method in results["methods"])
    pairs = PreferencePair.load(str(tmp_path / "reward_rollouts" / "pairs"))
    assert {pair.objective for pair in pairs} == {"complete", "brief"}
    assert all((pair.chosen_score or 0) > (pair.rejected_score or 0) for pair in pairs)
    assert results["reward_metrics"].keys() == {"complete", "brief"}
