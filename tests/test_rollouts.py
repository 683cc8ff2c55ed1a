"""Dialogues in play, candidate sets, traces, pairs, and the actors that make them."""

from __future__ import annotations

import copy
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from tiny_reward_models import CONFIG, byte_tokenizer
from tiny_tutor import CHAT, SAMPLING, TOKENIZER, TUTOR, model
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from mahalo_ray.config import (
    ClusterConfig,
    MiniatureStudentConfig,
    ModelTutorConfig,
    PlayConfig,
    SamplingConfig,
    Supervision,
)
from mahalo_ray.data.records import CandidateSet, Dialogue
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.guidance import Guidance, Prompt
from mahalo_ray.decoding.policy import CausalPolicy, DeviceConfig
from mahalo_ray.decoding.scorers import RewardModels
from mahalo_ray.decoding.stopping import TurnBoundary
from mahalo_ray.domains.tutoring.moves import is_malformed
from mahalo_ray.domains.tutoring.student import TutoringEpisode
from mahalo_ray.models.classifiers import SequenceClassifierScorer
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.models.scoring import StepScorer, TokenTrace
from mahalo_ray.objectives import Weights
from mahalo_ray.rollouts.dialogue_job import (
    CANDIDATES,
    DIALOGUES,
    DialogueChunk,
    DialogueChunks,
    DialogueSummary,
    RolloutJob,
    RolloutReport,
    RolloutSpec,
    RolloutWorker,
    run_rollouts,
)
from mahalo_ray.rollouts.dialogues import Collector, DialogueBatch, TurnSelection
from mahalo_ray.rollouts.pool import RolloutError
from mahalo_ray.rollouts.students import TutorTurn
from mahalo_ray.rollouts.tutors import Conversation, PolicyTutor, Proposal

LABELS: dict[str, Supervision] = {"accuracy": "rollout_value", "engagement": "judged_prefix"}


def opened(
    seeds: range | list[int], sampling: SamplingConfig = SAMPLING
) -> tuple[DialogueBatch, list[Conversation]]:
    batch = DialogueBatch(PolicyTutor(Engine(CausalPolicy(TUTOR)), CHAT, sampling, is_malformed=is_malformed))
    episodes = [TutoringEpisode.from_seed(seed) for seed in seeds]
    return batch, batch.open(episodes, [f"d{seed}" for seed in seeds], "test")


def engine_of(batch: DialogueBatch) -> Engine:
    assert isinstance(batch.tutor, PolicyTutor)
    return batch.tutor.engine


def reward_model(
    step_separator: str | None = None, tokenizer: PreTrainedTokenizerBase = TOKENIZER
) -> ProcessRewardModel:
    kinds = {"accuracy": "value", "engagement": "probability"}
    reward = ProcessRewardModel.from_base(
        model(seed=1), kinds, head_hidden_size=8, tokenizer=tokenizer, step_separator=step_separator
    )
    torch.manual_seed(2)
    for parameter in reward.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    scores = {"accuracy": [0.1, 0.4, 0.2, 0.9], "engagement": [0.3, 0.5, 0.1, 0.6]}
    reward.fit_calibration(scores, {name: ["a", "a", "b", "b"] for name in scores})
    return reward.eval()


def small_classifier(context: int = 4096) -> PreTrainedModel:
    torch.manual_seed(3)
    settings = CONFIG | {"max_position_embeddings": context}
    return AutoModelForSequenceClassification.from_config(Qwen2Config(**settings, num_labels=1)).eval()


def test_a_dialogue_is_the_same_alone_and_in_company() -> None:
    batch, together = opened(range(100, 106))
    batch.play()
    for conversation in together:
        alone_batch, (alone,) = opened([conversation.student.seed])
        alone_batch.play()
        assert alone.turns == conversation.turns
        assert alone.student.outcome() == conversation.student.outcome()


def test_what_was_read_and_sampled_is_the_token_exact_conversation() -> None:
    batch, conversations = opened(range(4))
    while waiting := batch.active:
        batch.commit(batch.propose(waiting, 2), [[1]] * len(waiting))
        for conversation in batch.active:
            ids = [token for turn in conversation.turns for token in turn.token_ids or []]
            assert engine_of(batch).token_ids(conversation.row) == ids
    assert len(engine_of(batch)) == 0
    for conversation in conversations:
        tutor = [turn for turn in conversation.turns if turn.speaker == "tutor"]
        assert [CHAT.decode(turn.token_ids or []) for turn in tutor] == [turn.content for turn in tutor]


def test_a_turn_cut_off_at_the_limit_is_closed_and_malformed() -> None:
    batch, conversations = opened(range(3), SamplingConfig(max_new_tokens=1, temperature=0))
    batch.play()
    for conversation in conversations:
        assert conversation.malformed == conversation.tutor_turns
        reply = conversation.turns[2]
        assert reply.token_ids is not None and reply.token_ids[0] == CHAT.end_id


def test_branches_leave_their_origin_alone() -> None:
    batch, conversations = opened(range(3))
    proposals = batch.propose(conversations, 2)
    before = [engine_of(batch).token_ids(c.row) for c in conversations]
    branches = batch.continue_copies(proposals, [[0, 1]] * 3, copies=3)
    batch.play_out([c for own in branches for copies in own for c in copies])
    assert [engine_of(batch).token_ids(c.row) for c in conversations] == before
    assert all(c.tutor_turns == 0 for c in conversations)
    for own, proposal in zip(branches, proposals, strict=True):
        for copies, said in zip(own, proposal.turns, strict=True):
            assert [copy.turns[1].token_ids for copy in copies] == [list(said.token_ids)] * 3
    batch.commit(proposals, [[0], [1], [0]])
    assert all(c.tutor_turns == 1 for c in conversations)


def test_labels_are_means_over_continuations_and_equal_turns_share_them() -> None:
    batch, _ = opened(range(4))
    collector = Collector(batch, continuations=2, supervision=LABELS)
    batch.play(4, collector)
    sets = collector.sets
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
        collector = Collector(batch, continuations=2, supervision=LABELS)
        batch.play(3, collector)
        sets = collector.sets
        last = [one for one in sets if one.dialogue == conversations[-1].id]
        return [[candidate.labels for candidate in one.candidates] for one in last]

    alone, last_of_three = labels([2]), labels([0, 1, 2])
    assert alone == last_of_three and len(alone) > 1


def test_values_are_discounted_by_the_turns_that_follow() -> None:
    def values(gamma: float) -> list[tuple[CandidateSet, list[float]]]:
        batch, _ = opened(range(3))
        collector = Collector(batch, continuations=1, gamma=gamma, supervision=LABELS)
        batch.play(2, collector)
        return [(one, [(c.labels or {})["accuracy"] for c in one.candidates]) for one in collector.sets]

    limits = {f"d{seed}": TutoringEpisode.from_seed(seed).problem.turn_limit for seed in range(3)}
    for (one, plain), (_, discounted) in zip(values(1.0), values(0.5), strict=True):
        for full, value in zip(plain, discounted, strict=True):
            following = round(math.log2(full / value))
            assert value == pytest.approx(full * 0.5**following)
            assert 0 <= following <= limits[one.dialogue] - one.turn - 1


def guided(reward: StepScorer, seeds: range, **guidance: Any) -> tuple[DialogueBatch, Guidance]:
    """Dialogues followed by a reward model, in the tutor's tokens if it can, and how turns are chosen."""
    batch, _ = opened(range(0))
    models = RewardModels(reward, TurnBoundary(), TOKENIZER)
    batch.scorers = models.follow()
    batch.open([TutoringEpisode.from_seed(seed) for seed in seeds], [f"d{seed}" for seed in seeds], "test")
    weights = Weights(guidance.pop("weights", dict.fromkeys(reward.objectives, 1.0)))
    return batch, Guidance(models.scale, weights, **guidance)


@pytest.mark.parametrize("separator", [None, "\n\n"])
@pytest.mark.parametrize("max_new_tokens", [SAMPLING.max_new_tokens, 3])
def test_scores_over_the_kept_cache_equal_scores_of_the_whole_text(
    separator: str | None, max_new_tokens: int
) -> None:
    """A candidate turn is a whole answer: cut off or not, it is read closed as the model learned to, by the
    end of the turn or by the separator; the said turns are read as they were sampled."""
    reward = reward_model(separator)
    batch, _ = guided(reward, range(3))
    assert isinstance(batch.tutor, PolicyTutor)
    batch.tutor.sampling = SAMPLING.model_copy(update={"max_new_tokens": max_new_tokens})
    collector = Collector(batch)
    batch.play(3, collector)
    assert len(collector.sets) > 3
    cut = 0
    for candidate_set in collector.sets:
        start = len(candidate_set.prompt_ids)
        read = []
        for candidate in candidate_set.candidates:
            closed = [*candidate.token_ids]
            if closed[-1] != CHAT.end_id:
                closed.append(CHAT.end_id)
                cut += 1
            read.append(closed if separator is None else reward.encoder.step_ids(candidate.content))
        traces = [TokenTrace(candidate_set.prompt_ids + ids, [start], [start + len(ids) - 1]) for ids in read]
        whole = reward.score_traces(traces)
        for number, candidate in enumerate(candidate_set.candidates):
            expected = dict(zip(reward.objectives, whole[number][0].tolist(), strict=True))
            assert candidate.scores == pytest.approx(expected, abs=1e-4)
    assert max_new_tokens > 3 or cut > 0


def silent_proposals(reward: StepScorer) -> tuple[list[Proposal], Guidance]:
    batch, guidance = guided(reward, range(2))
    proposals = batch.propose(batch.active, 3)
    silent = TutorTurn(" ", (CHAT.end_id,))
    proposals[0].turns[1] = silent
    proposals[1].turns[:] = [silent] * 3
    assert batch.scorers is not None
    for proposal, scores in zip(proposals, batch._scores(batch.scorers, proposals), strict=True):
        assert isinstance(scores, torch.Tensor)
        proposal.scores = scores
    return proposals, guidance


def with_other_template() -> PreTrainedTokenizerBase:
    other = copy.deepcopy(TOKENIZER)
    other.chat_template = "Judge." + str(TOKENIZER.chat_template)
    return other


def test_a_turn_without_words_is_as_bad_as_its_worst_rival_and_goes_on_only_among_its_like() -> None:
    reward = reward_model("\n\n", with_other_template())  # so it reads text
    (some, none), guidance = silent_proposals(reward)
    assert some.scores is not None and none.scores is not None
    spoken = [reward.score(some.conversation.messages, [some.turns[k].text]) for k in (0, 2)]
    for column, name in enumerate(reward.objectives):
        values = [own[name][0] for own in spoken]
        assert some.scores[[0, 2], column].tolist() == pytest.approx(values, abs=1e-5)
        assert some.scores[1, column] == min(some.scores[0, column], some.scores[2, column])
    assert (none.scores == 0).all()
    # Over the kept cache silence has a score of its own; that it is never preferred is the same rule.
    (cached, _), _ = silent_proposals(reward_model())
    for proposal in (some, cached):
        assert proposal.scores is not None
        proposal.scores[1] = 100.0
        for kind, temperature in (("best", None), ("sampled", 1.0)):
            order = TurnSelection(kind, replace(guidance, temperature=temperature)).order(proposal)
            assert order[-1] == 1 and sorted(order) == [0, 1, 2]


def test_guidance_takes_the_best_standardised_sum_and_draws_by_softmax() -> None:
    reward = reward_model()
    weights = {"accuracy": 0.3, "engagement": 0.7}
    batch, guidance = guided(reward, range(3), weights=weights, standardisation="calibrated")
    proposals = batch.propose(batch.active, 4)
    for proposal in proposals:
        assert proposal.scores is not None
        sums = [
            sum(
                weights[name]
                * float(proposal.scores[k, column])
                / (reward.calibration[name]["within_prompt_std"] or 0)
                for column, name in enumerate(reward.objectives)
            )
            for k in range(4)
        ]
        (chosen,) = TurnSelection("best", guidance)([proposal])[0]
        assert sums[chosen] == pytest.approx(max(sums))
    totals = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    for temperature in (0.5, 2.0, 1e-300):
        drawn = replace(guidance, temperature=temperature)
        uniforms = torch.rand(2000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        first = torch.tensor([drawn.order(totals, [False] * 3, uniform)[0] for uniform in uniforms])
        shares = torch.bincount(first, minlength=3) / 2000
        expected = torch.softmax((totals - 2.0) / temperature, dim=0)
        assert shares.tolist() == pytest.approx(expected.tolist(), abs=0.03)


def test_a_third_party_classifier_scores_turns_as_it_scores_conversations() -> None:
    judge = SequenceClassifierScorer(small_classifier(), byte_tokenizer(), "helpful")
    batch, guidance = guided(judge, range(2))
    collector = Collector(batch, TurnSelection("best", guidance))
    batch.play(3, collector)
    assert len(collector.sets) > 2
    for candidate_set in collector.sets:
        values = []
        for candidate in candidate_set.candidates:
            expected = judge.score(candidate_set.prompt, [candidate.content])["helpful"][0]
            assert candidate.scores == pytest.approx({"helpful": expected}, abs=1e-5)
            values.append((candidate.scores or {})["helpful"])
        assert values[candidate_set.chosen] == max(values)


def test_a_dialogue_that_cannot_be_scored_fails_alone() -> None:
    judge = SequenceClassifierScorer(small_classifier(300), byte_tokenizer(), "helpful")
    batch, _ = guided(judge, range(3))
    long = batch.conversations[1].messages[-1]
    batch.conversations[1].messages[-1] = long.model_copy(update={"content": "x" * 400})
    assert batch.scorers is not None
    batch.scorers.hear(
        [batch.conversations[1].scorer_row], [Prompt(list(batch.conversations[1].messages), [])]
    )
    batch.propose(batch.active, 2)
    failures = [conversation.failure for conversation in batch.conversations]
    assert failures[0] is failures[2] is None
    assert failures[1] is not None and failures[1].kind == "scoring" and "too long" in failures[1].message


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # for the workers below
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
        supervision=LABELS,
    )


def output(folder: Path) -> tuple[list[CandidateSet], list[Dialogue]]:
    return CandidateSet.load(str(folder / CANDIDATES)), Dialogue.load(str(folder / DIALOGUES))


def quiet(done: int, total: int, note: str) -> None:
    """No progress shown."""


class Held(RolloutWorker):
    """A worker that stays within the last of four chunks until it is told to go on."""

    def play(self, chunk: DialogueChunk) -> DialogueSummary:
        held, go = (Path(self.spec.output_url, name) for name in ("held", "go"))
        if chunk.number == 3 and not go.exists():
            held.write_text(str(os.getpid()))
            while not go.exists():
                time.sleep(0.02)
        return super().play(chunk)


class HeldJob(RolloutJob):
    worker_class = Held


@pytest.mark.slow
def test_the_output_does_not_depend_on_actors_or_deaths(
    cluster: None, spec: RolloutSpec, tmp_path: Path
) -> None:
    chunks, two = DialogueChunks(50, dialogues=12, size=3), ClusterConfig(rollout_actors=2)
    one, killed = (replace(spec, output_url=str(tmp_path / name)) for name in ("one", "killed"))
    run_rollouts(one, chunks, ClusterConfig(rollout_actors=1), quiet)

    held, go = tmp_path / "killed" / "held", tmp_path / "killed" / "go"
    held.parent.mkdir()

    def kill_the_held() -> None:
        while not (held.exists() and held.read_text()):
            time.sleep(0.02)
        os.kill(int(held.read_text()), signal.SIGKILL)
        go.touch()

    killing = threading.Thread(target=kill_the_held, daemon=True)
    killing.start()
    report = HeldJob(killed.output_url, killed, chunks, 12, two, quiet, RolloutReport()).run()
    killing.join()
    assert report.actor_deaths == 1
    assert output(tmp_path / "one") == output(tmp_path / "killed")
    assert len(output(tmp_path / "killed")[1]) == 12

    finished = run_rollouts(killed, chunks, two, quiet)
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
