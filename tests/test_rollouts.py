"""Dialogues in play, candidate sets, traces, pairs, and the actors that make them."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from tiny_tutor import CHAT, SAMPLING, TOKENIZER, TUTOR, model

from mahalo_ray.config import (
    ClusterConfig,
    MiniatureStudentConfig,
    ModelTutorConfig,
    PlayConfig,
    SamplingConfig,
)
from mahalo_ray.data.records import CandidateSet, Dialogue
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.policy import CausalPolicy, DeviceConfig
from mahalo_ray.domains.tutoring.student import Episode
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.models.scoring import TokenTrace
from mahalo_ray.objectives import Weights
from mahalo_ray.rollouts.collect import Collector
from mahalo_ray.rollouts.dialogue_job import (
    CANDIDATES,
    DIALOGUES,
    DialogueChunks,
    RolloutJob,
    RolloutReport,
    RolloutSpec,
    RolloutWorker,
    run_rollouts,
)
from mahalo_ray.rollouts.dialogues import Conversation, DialogueBatch, first_candidate, play
from mahalo_ray.rollouts.pool import RolloutError
from mahalo_ray.rollouts.scoring import CachedScorer, GuidedChoice, TextScorer
from mahalo_ray.rollouts.tutors import PolicyTutor, TutorTurn


def opened(
    seeds: range | list[int], sampling: SamplingConfig = SAMPLING
) -> tuple[DialogueBatch, list[Conversation]]:
    batch = DialogueBatch(PolicyTutor(Engine(CausalPolicy(TUTOR)), CHAT, sampling))
    episodes = [Episode.from_seed(seed) for seed in seeds]
    return batch, batch.open(episodes, [f"d{seed}" for seed in seeds], "test")


def engine_of(batch: DialogueBatch) -> Engine:
    assert isinstance(batch.tutor, PolicyTutor)
    return batch.tutor.engine


def reward_model(step_separator: str | None = None) -> ProcessRewardModel:
    kinds = {"accuracy": "value", "engagement": "probability"}
    reward = ProcessRewardModel.from_base(
        model(seed=1), kinds, head_hidden_size=8, tokenizer=TOKENIZER, step_separator=step_separator
    )
    torch.manual_seed(2)
    for parameter in reward.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    scores = {"accuracy": [0.1, 0.4, 0.2, 0.9], "engagement": [0.3, 0.5, 0.1, 0.6]}
    reward.fit_calibration(scores, {name: ["a", "a", "b", "b"] for name in scores})
    return reward.eval()


def test_a_dialogue_is_the_same_alone_and_in_company() -> None:
    batch, together = opened(range(100, 106))
    play(batch, 1, first_candidate)
    for conversation in together:
        alone_batch, (alone,) = opened([conversation.student.seed])
        play(alone_batch, 1, first_candidate)
        assert alone.turns == conversation.turns
        assert alone.student.outcome() == conversation.student.outcome()


def test_what_was_read_and_sampled_is_the_token_exact_conversation() -> None:
    batch, conversations = opened(range(4))
    while waiting := batch.active:
        batch.accept(batch.sample(waiting, 2), [1] * len(waiting))
        for conversation in batch.active:
            ids = [token for turn in conversation.turns for token in turn.token_ids or []]
            assert engine_of(batch).token_ids(conversation.row) == ids
    assert len(engine_of(batch)) == 0
    for conversation in conversations:
        tutor = [turn for turn in conversation.turns if turn.speaker == "tutor"]
        assert [CHAT.decode(turn.token_ids or []) for turn in tutor] == [turn.content for turn in tutor]


def test_a_turn_cut_off_at_the_limit_is_closed_and_malformed() -> None:
    batch, conversations = opened(range(3), SamplingConfig(max_new_tokens=1, temperature=0))
    play(batch, 1, first_candidate)
    for conversation in conversations:
        assert conversation.malformed == conversation.tutor_turns
        reply = conversation.turns[2]
        assert reply.token_ids is not None and reply.token_ids[0] == CHAT.end_id


def test_branches_leave_their_origin_alone() -> None:
    batch, conversations = opened(range(3))
    candidates = batch.sample(conversations, 2)
    before = [engine_of(batch).token_ids(c.row) for c in conversations]
    branches = batch.branch(conversations, candidates.turns, copies=3)
    batch.play_out([c for own in branches for copies in own for c in copies])
    assert [engine_of(batch).token_ids(c.row) for c in conversations] == before
    assert all(c.tutor_turns == 0 for c in conversations)
    for own, turns in zip(branches, candidates.turns, strict=True):
        for copies, said in zip(own, turns, strict=True):
            assert [copy.turns[1].token_ids for copy in copies] == [list(said.token_ids)] * 3
    batch.accept(candidates, [0, 1, 0])
    assert all(c.tutor_turns == 1 for c in conversations)


def test_labels_are_means_over_continuations_and_equal_turns_share_them() -> None:
    batch, _ = opened(range(4))
    sets = Collector(batch, num_candidates=4, continuations=2).run()
    for one in sets:
        by_turn = {tuple(c.token_ids): c.labels for c in one.candidates}
        for candidate in one.candidates:
            assert candidate.labels == by_turn[tuple(candidate.token_ids)]
            assert candidate.labels is not None
            assert 0 < candidate.labels["accuracy"] < 1
    for one in (s for s in sets if s.turn > 0):
        previous = next(s for s in sets if s.dialogue == one.dialogue and s.turn == one.turn - 1)
        said = previous.candidates[previous.chosen].token_ids
        start = len(previous.prompt_ids)
        assert one.prompt_ids[start : start + len(said)] == said


def test_labels_do_not_depend_on_the_dialogues_played_beside() -> None:
    def labels(seeds: list[int]) -> list[list[dict[str, float] | None]]:
        batch, conversations = opened(seeds)
        sets = Collector(batch, num_candidates=3, continuations=2).run()
        last = [one for one in sets if one.dialogue == conversations[-1].id]
        return [[candidate.labels for candidate in one.candidates] for one in last]

    alone, last_of_three = labels([2]), labels([0, 1, 2])
    assert alone == last_of_three and len(alone) > 1


def test_values_are_discounted_by_the_turns_that_follow() -> None:
    def values(gamma: float) -> list[tuple[CandidateSet, list[float]]]:
        batch, _ = opened(range(3))
        sets = Collector(batch, num_candidates=2, continuations=1, gamma=gamma).run()
        return [(one, [(c.labels or {})["accuracy"] for c in one.candidates]) for one in sets]

    limits = {f"d{seed}": Episode.from_seed(seed).problem.turn_limit for seed in range(3)}
    for (one, plain), (_, discounted) in zip(values(1.0), values(0.5), strict=True):
        for full, value in zip(plain, discounted, strict=True):
            following = round(math.log2(full / value))
            assert value == pytest.approx(full * 0.5**following)
            assert 0 <= following <= limits[one.dialogue] - one.turn - 1


@pytest.mark.parametrize("separator", [None, "\n\n"])
def test_scores_over_the_kept_cache_equal_scores_of_the_whole_text(separator: str | None) -> None:
    """A model whose steps end with a separator reads a candidate's text closed with it, the said turns as
    they were sampled."""
    reward = reward_model(separator)
    batch, conversations = opened(range(3))
    scorer = CachedScorer(reward, conversations)
    sets = Collector(batch, num_candidates=3, scorer=scorer).run()
    assert len(sets) > 3
    for one in sets:
        start = len(one.prompt_ids)
        read = [
            c.token_ids if separator is None else reward.encoder.step_ids(c.content) for c in one.candidates
        ]
        traces = [TokenTrace(one.prompt_ids + ids, [start], [start + len(ids) - 1]) for ids in read]
        whole = reward.score_traces(traces)
        for number, candidate in enumerate(one.candidates):
            expected = dict(zip(reward.objectives, whole[number][0].tolist(), strict=True))
            assert candidate.scores == pytest.approx(expected, abs=1e-4)


def test_a_turn_without_words_is_as_bad_as_its_worst_rival() -> None:
    reward = reward_model("\n\n")
    batch, conversations = opened(range(2))
    offered = batch.sample(conversations, 3)
    silent = TutorTurn(" ", (CHAT.end_id,))
    offered.turns[0][1] = silent
    offered.turns[1][:] = [silent] * 3
    some, none = TextScorer(reward).score(offered)
    spoken = [reward.score(conversations[0].messages, [offered.turns[0][k].text]) for k in (0, 2)]
    for name in reward.objectives:
        values = [own[name][0] for own in spoken]
        assert [some[0][name], some[2][name]] == pytest.approx(values, abs=1e-5)
        assert some[1][name] == min(some[0][name], some[2][name])
        assert [own[name] for own in none] == [0.0] * 3


def test_guidance_takes_the_best_standardised_sum() -> None:
    reward = reward_model()
    batch, conversations = opened(range(3))
    guidance = Weights({"accuracy": 0.3, "engagement": 0.7})
    candidates = batch.sample(conversations, 4)
    choice = GuidedChoice(CachedScorer(reward, conversations), guidance)(candidates)
    raw = CachedScorer(reward, conversations).tensor(candidates)
    for i, chosen in enumerate(choice):
        sums = [
            sum(
                guidance[name] * float(raw[i, k, h]) / (reward.calibration[name]["within_prompt_std"] or 0)
                for h, name in enumerate(reward.objectives)
            )
            for k in range(4)
        ]
        assert sums[chosen] == pytest.approx(max(sums))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> RolloutSpec:
    folder = tmp_path_factory.mktemp("tutor")
    TUTOR.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return RolloutSpec(
        tutor=ModelTutorConfig(path=str(folder)),
        student=MiniatureStudentConfig(),
        play=PlayConfig(candidates=3, sampling=SAMPLING),
        output_url="",
        purpose="test",
        placement=DeviceConfig(),
        threads=1,
        continuations=1,
    )


def output(folder: Path) -> tuple[list[CandidateSet], list[Dialogue]]:
    return CandidateSet.load(str(folder / CANDIDATES)), Dialogue.load(str(folder / DIALOGUES))


def quiet(done: int, total: int, note: str) -> None:
    """No progress shown."""


@pytest.mark.slow
def test_the_output_does_not_depend_on_actors_or_deaths(
    cluster: None, spec: RolloutSpec, tmp_path: Path
) -> None:
    chunks = DialogueChunks(50, dialogues=12, size=3)
    one, two, killed = (replace(spec, output_url=str(tmp_path / name)) for name in ("one", "two", "killed"))
    run_rollouts(one, chunks, ClusterConfig(rollout_actors=1), quiet)
    run_rollouts(two, chunks, ClusterConfig(rollout_actors=2), quiet)

    victims = []

    def kill_once(done: int, total: int, note: str) -> None:
        if 0 < done < total and not victims:
            found = [p for p in _workers() if b"RolloutWorker" in p[1]]
            victims.append(found[0][0])
            os.kill(found[0][0], signal.SIGKILL)

    report = run_rollouts(killed, chunks, ClusterConfig(rollout_actors=2), kill_once)
    assert victims and report.actor_deaths == 1
    assert output(tmp_path / "one") == output(tmp_path / "two") == output(tmp_path / "killed")
    assert len(output(tmp_path / "killed")[1]) == 12

    finished = run_rollouts(killed, chunks, ClusterConfig(rollout_actors=2), quiet)
    assert (finished.resumed, finished.chunks, finished.dialogues) == (4, 0, 12)


class Dies(RolloutWorker):
    """A worker that takes its process with it."""

    def __init__(self, spec: RolloutSpec) -> None:
        os._exit(1)


class DyingJob(RolloutJob):
    worker_class = Dies


@pytest.mark.slow
def test_too_many_deaths_end_the_stage_and_a_missing_model_ends_it_at_once(
    cluster: None, spec: RolloutSpec, tmp_path: Path
) -> None:
    chunks, few = DialogueChunks(0, 4, 2), ClusterConfig(rollout_actors=1, max_failures=1)
    dying = DyingJob(str(tmp_path), spec, chunks, 4, few, quiet, RolloutReport())
    with pytest.raises(RolloutError, match="2 actors died while starting"):
        dying.run()
    missing = ModelTutorConfig(path=str(tmp_path / "missing"))
    broken = replace(spec, tutor=missing, output_url=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="missing") as caught:
        run_rollouts(broken, chunks, few, quiet)
    assert not isinstance(caught.value, RolloutError) and "Traceback" not in str(caught.value)


def _workers() -> list[tuple[int, bytes]]:
    """(pid, command line) of this test's Ray workers."""
    import psutil

    return [
        (process.pid, " ".join(process.cmdline()).encode())
        for process in psutil.Process().children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE
    ]
