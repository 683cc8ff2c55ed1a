"""Students and tutors of every kind behind their protocols, and what each side is shown."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from local_endpoint import LocalEndpoint, Received, Scripted, fails, says
from pydantic import ValidationError
from tiny_tutor import CHAT, SAMPLING, TOKENIZER, TUTOR, model

from mahalo_ray.config import (
    BranchingConfig,
    DialoguesConfig,
    EndpointStudentConfig,
    EndpointTutorConfig,
    GridCases,
    GridProblem,
    ModelStudentConfig,
    ModelTutorConfig,
    PersonasConfig,
    PlayConfig,
    PolicyTutorConfig,
)
from mahalo_ray.data.records import CandidateSet, Dialogue
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.engine import Engine
from mahalo_ray.decoding.policy import CausalPolicy, DeviceConfig
from mahalo_ray.domains.tutoring.personas import PersonaSampler, load_cases
from mahalo_ray.models.multi_head import MultiHeadCausalLM
from mahalo_ray.models.reward import ProcessRewardModel
from mahalo_ray.models.scoring import TokenTrace
from mahalo_ray.rollouts.dialogue_job import (
    CANDIDATES,
    CASES,
    DIALOGUES,
    DialogueChunk,
    RolloutSpec,
    RolloutWorker,
)
from mahalo_ray.rollouts.dialogues import DialogueBatch
from mahalo_ray.rollouts.pool import share_limits
from mahalo_ray.rollouts.students import ModelStudents, PersonaStudent
from mahalo_ray.rollouts.tutors import Conversation, DrawnWeights, PolicyTutor

KEY = "98765"
GRID = GridCases(
    problems=[GridProblem(topic=f"t{n}", problem=f"What is {n} + 98000?", answer=KEY) for n in range(3)],
    misconceptions=["counts from one"],
)
STUDENT = ModelStudentConfig(path="unused", max_new_tokens=10)


def persona_students(count: int) -> list[PersonaStudent]:
    sampler = PersonaSampler(load_cases(GRID)[0], PersonasConfig(), seed=1)
    drawn = (sampler.draw(number) for number in range(count))
    return [PersonaStudent(case.task, persona, number) for number, (case, persona) in enumerate(drawn)]


def two_models(numbers: Sequence[int], turns: int = 3) -> tuple[DialogueBatch, list[Conversation]]:
    """A tutor and a student model, both tiny."""
    tutor = PolicyTutor(Engine(CausalPolicy(TUTOR)), CHAT, SAMPLING)
    students = ModelStudents(CausalPolicy(model(seed=3)), CHAT, STUDENT)
    batch = DialogueBatch(tutor, students, turns, instruction="You tutor.")
    everybody = persona_students(max(numbers, default=-1) + 1)
    return batch, batch.open([everybody[n] for n in numbers], [f"d{n}" for n in numbers], "test")


def test_dialogues_of_two_models_are_the_same_alone_and_in_company() -> None:
    batch, together = two_models(range(5))
    batch.play(2)
    for number, conversation in enumerate(together):
        alone_batch, (alone,) = two_models([number])
        alone_batch.play(2)
        assert alone.turns == conversation.turns
        assert (conversation.ended, conversation.tutor_turns) == ("turns", 3)


def test_a_student_model_reads_its_own_side_token_by_token() -> None:
    batch, conversations = two_models(range(3), turns=2)
    batch.commit(batch.propose(conversations, 1), [[0], [0], [0]])
    students = batch.students
    assert isinstance(students, ModelStudents)
    for conversation in conversations:
        student = conversation.student
        ids = students.engine.token_ids(students._rows[student])
        assert [message.role for message in student.heard] == ["system", "assistant", "user", "assistant"]
        prompt = CHAT.prompt_ids(student.heard[:-1])
        assert ids[: len(prompt)] == prompt
        assert CHAT.decode(ids[len(prompt) :]).strip() == student.heard[-1].content
    batch.play()
    assert len(students.engine) == 0


def test_a_student_whose_context_is_full_fails_alone() -> None:
    batch, conversations = two_models(range(3))
    students = batch.students
    assert isinstance(students, ModelStudents)
    students.engine.max_context = max(len(CHAT.prompt_ids(c.student.heard)) for c in conversations) + 8
    conversations[1].student.heard[0] = (
        conversations[1].student.heard[0].model_copy(update={"content": "long " * 200})
    )
    batch.commit(batch.propose(conversations, 1), [[0], [0], [0]])
    failed = conversations[1].failure
    assert failed is not None and failed.kind == "student_context"


def test_a_template_that_rewrites_history_fails_dialogues_with_its_name() -> None:
    """Before the tutor says a word; the student's, at its second reply."""
    rewriting = copy.deepcopy(TOKENIZER)
    rewriting.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if loop.last %}!{% endif %}{{ m.content }}<|end|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    for side in ("tutor", "student"):
        batch, _ = two_models([], turns=3)
        assert isinstance(batch.tutor, PolicyTutor) and isinstance(batch.students, ModelStudents)
        (batch.tutor if side == "tutor" else batch.students).chat = ChatFormat(rewriting)
        conversations = batch.open(persona_students(2), ["a", "b"], "test")
        batch.play()
        for conversation in conversations:
            assert conversation.failure is not None and conversation.failure.kind == "template"
            assert "changes what was rendered" in conversation.failure.message
            assert conversation.tutor_turns == (0 if side == "tutor" else 1)
        assert len(batch.tutor.engine) == len(batch.students.engine) == 0


def reward_folder(folder: Path) -> str:
    kinds = {"accuracy": "value", "engagement": "probability"}
    reward = ProcessRewardModel.from_base(
        model(seed=1), kinds, head_hidden_size=8, tokenizer=TOKENIZER, step_separator=None
    )
    torch.manual_seed(2)
    for parameter in reward.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    reward.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("models")
    for name, made in (("tutor", TUTOR), ("student", model(seed=3))):
        made.save_pretrained(base / name)
        TOKENIZER.save_pretrained(base / name)
    heads = MultiHeadCausalLM.from_base(model(), ["accuracy", "engagement"])
    heads.save_pretrained(base / "policy")
    TOKENIZER.save_pretrained(base / "policy")
    reward_folder(base / "reward")
    (base / "cases.json").write_bytes(CASES.dump_json(load_cases(GRID)[0]))
    return {name: str(base / name) for name in ("tutor", "student", "policy", "reward", "cases.json")}


def spec_of(folders: dict[str, str], output: Path, **settings: Any) -> RolloutSpec:
    made = RolloutSpec(
        tutor=ModelTutorConfig(path=folders["tutor"], instruction="You tutor."),
        student=ModelStudentConfig(path=folders["student"], max_new_tokens=10),
        play=PlayConfig(turns=2, candidates=3, sampling=SAMPLING),
        output_url=str(output),
        purpose="test",
        placement=DeviceConfig(),
        threads=1,
        cases_url=folders["cases.json"],
    )
    return replace(made, **settings)


def played(spec: RolloutSpec, numbers: Sequence[int] = (0, 1)) -> tuple[list[CandidateSet], list[Dialogue]]:
    RolloutWorker(spec).play(DialogueChunk(0, tuple(numbers)))
    return (
        CandidateSet.load(f"{spec.output_url}/{CANDIDATES}"),
        Dialogue.load(f"{spec.output_url}/{DIALOGUES}"),
    )


def test_a_multi_head_policy_tutors_at_its_weights(folders: dict[str, str], tmp_path: Path) -> None:
    tutor = PolicyTutorConfig(path=folders["policy"], weights={"accuracy": 1, "engagement": 3})
    sets, dialogues = played(spec_of(folders, tmp_path, tutor=tutor))
    assert len(sets) == 4 and [d.ended for d in dialogues] == ["turns", "turns"]
    assert all(d.persona is not None and d.checks is not None for d in dialogues)


def test_a_policy_tutors_at_weights_of_each_dialogue(folders: dict[str, str], tmp_path: Path) -> None:
    """Drawn by the dialogue's seed: dialogues played together say what each says by itself."""
    tutor = PolicyTutorConfig(path=folders["policy"], concentration=0.3)
    drawn = DrawnWeights(("accuracy", "engagement"), 0.3)
    weights = [drawn.of(seed) for seed in range(200)]
    assert drawn.of(7) == weights[7] and len(set(weights)) == 200
    mean = sum(w["accuracy"] for w in weights) / 200
    extreme = sum(max(w.values()) > 0.9 for w in weights) / 200
    assert mean == pytest.approx(0.5, abs=0.1) and extreme > 0.4  # at 1 it would be 0.2
    together, _ = played(spec_of(folders, tmp_path / "together", tutor=tutor))
    alone = [
        candidate_set
        for number in (0, 1)
        for candidate_set in played(spec_of(folders, tmp_path / f"{number}", tutor=tutor), [number])[0]
    ]
    assert sorted(together, key=lambda one: one.id) == sorted(alone, key=lambda one: one.id)
    with pytest.raises(ValueError, match="'concentration' is for weights that are drawn"):
        PolicyTutorConfig(path="x", weights={"accuracy": 1}, concentration=0.5)
    with pytest.raises(ValueError, match="is an ordinary model: use it with 'kind: model'"):
        RolloutWorker(spec_of(folders, tmp_path, tutor=tutor.model_copy(update={"path": folders["tutor"]})))


def test_the_best_candidate_goes_on_and_branches_are_dialogues_of_their_own(
    folders: dict[str, str], tmp_path: Path
) -> None:
    setting = PlayConfig(
        turns=3,
        candidates=4,
        continuation="best",
        guidance={"accuracy": 1},
        branching=BranchingConfig(depth=2, width=2),
        sampling=SAMPLING,
    )
    sets, dialogues = played(spec_of(folders, tmp_path, play=setting, reward_url=folders["reward"]))
    assert len(dialogues) == 2 * 4  # two dialogues, twice branched in two
    assert len({d.id for d in dialogues}) == 8 and len({s.id for s in sets}) == len(sets) == 2 * (1 + 2 + 4)
    model_ = ProcessRewardModel.from_pretrained(folders["reward"]).eval()
    for one in sets:
        scores = [(c.scores or {})["accuracy"] for c in one.candidates]
        assert one.chosen == max(range(4), key=scores.__getitem__)
        start = len(one.prompt_ids)
        # A turn that was cut off is read closed: nothing more will follow it.
        ends = [[] if c.token_ids[-1] == CHAT.end_id else [CHAT.end_id] for c in one.candidates]
        read = [[*one.prompt_ids, *c.token_ids, *end] for c, end in zip(one.candidates, ends, strict=True)]
        traces = [TokenTrace(ids, [start], [len(ids) - 1]) for ids in read]
        whole = [float(scores[0, 0]) for scores in model_.score_traces(traces)]
        assert scores == pytest.approx(whole, abs=1e-4)
    for branch in (d for d in dialogues if "~" in d.id):
        origin, _, where = branch.id.rpartition("~")
        at, candidate = map(int, where.split("."))
        parent = next(s for s in sets if s.dialogue == origin and s.turn == at)
        spoken = [turn for turn in branch.turns if turn.speaker == "tutor"]
        assert spoken[at].token_ids == parent.candidates[candidate].token_ids
        assert candidate != parent.chosen


def test_nobody_sees_what_is_not_for_them(folders: dict[str, str], tmp_path: Path) -> None:
    """Every word that either side is sent, at real endpoints."""
    with (
        LocalEndpoint(lambda _: says("Tell me more.")) as tutor,
        LocalEndpoint(lambda _: says("Hm.")) as student,
    ):
        spec = spec_of(
            folders,
            tmp_path,
            tutor=EndpointTutorConfig(endpoint=tutor.config(), instruction="You tutor."),
            student=EndpointStudentConfig(endpoint=student.config(), post_test=True),
        )
        sets, dialogues = played(spec, range(6))
    assert len(dialogues) == 6 and len(sets) == 12
    assert all(c.token_ids == [] for s in sets for c in s.candidates)
    assert len(tutor.received) == 6 * 2 * 3 and len(student.received) == 6 * (2 + 1)
    to_tutor, to_student = (json.dumps([r.body for r in side.received]) for side in (tutor, student))
    assert KEY not in to_tutor and KEY not in to_student
    for secret in ("counts from one", "What you have wrong", "curious", "frustrated", "few words"):
        assert secret in to_student and secret not in to_tutor
    assert "You tutor." in to_tutor and "You tutor." not in to_student
    assert {r.body["messages"][0]["role"] for r in student.received} == {"system"}
    for dialogue in dialogues:
        assert KEY not in dialogue.model_dump_json()


def failing_for(word: str, answer: Scripted) -> Any:
    """A server that fails for conversations with a word in them."""

    def script(received: Received) -> Scripted:
        return answer if word in json.dumps(received.body) else says("Tell me more.")

    return script


def test_a_failure_is_one_dialogues_own_and_mended_later(folders: dict[str, str], tmp_path: Path) -> None:
    def run(output: Path, answer: Scripted | None, chunk: DialogueChunk) -> Any:
        script = (lambda _: says("Tell me more.")) if answer is None else failing_for("What is 1 +", answer)
        with LocalEndpoint(script) as server:
            student = EndpointStudentConfig(endpoint=server.config(max_retries=0))
            return RolloutWorker(spec_of(folders, output, student=student)).play(chunk)

    chunk = DialogueChunk(0, tuple(range(6)))
    quiet = run(tmp_path / "quiet", None, chunk)
    broken = run(tmp_path / "broken", fails(500), chunk)
    assert (quiet.dialogues, quiet.failures) == (6, {})
    assert broken.dialogues == 4 and {kind for kind, _ in broken.failures.values()} == {"http_500"}
    assert len(Dialogue.load(str(tmp_path / "broken" / DIALOGUES))) == 4
    mended = run(tmp_path / "broken", None, replace(chunk, again=tuple(broken.failures)))
    assert (mended.dialogues, mended.failures, mended.failed_attempts) == (6, {}, {"http_500": 2})
    for kind in (CANDIDATES, DIALOGUES):
        shards = [
            (tmp_path / name / kind / "part-000000.parquet").read_bytes() for name in ("quiet", "broken")
        ]
        assert shards[0] == shards[1]


def test_endpoints_are_shared_among_actors() -> None:
    with LocalEndpoint([says("x")]) as server:
        config = server.config(concurrency=9, requests_per_minute=100)
        part = share_limits(config, 4)
        assert (part.concurrency, part.requests_per_minute) == (2, 25)
        with pytest.raises(ValueError, match=r"'endpoint.concurrency' is 9 for 10 actors"):
            share_limits(config, 10)


DOCUMENT: dict[str, Any] = {
    "name": "x",
    "output": "runs/x",
    "tutor": {"kind": "model", "path": "m"},
    "student": {"kind": "model", "path": "m"},
    "cases": {"kind": "prefixes", "path": "p.jsonl"},
    "play": {"turns": 1},
}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"student": {"kind": "miniature"}}, "'cases' and 'personas' are not used"),
        ({"cases": None}, "'cases' is missing"),
        ({"play": {}}, "'play.turns' is missing"),
        ({"play": {"turns": 1, "continuation": "best"}}, "needs a 'reward' model"),
        ({"play": {"turns": 1, "guidance": {"a": 1}}}, "'guidance' is not used"),
        ({"pairs": {"min_gap_std": 2}}, "'pairs' are made from scores"),
        ({"student": {"kind": "model", "path": "m", "post_test": True}}, "needs answer keys"),
        ({"student": {"kind": "endpoint"}}, "endpoint"),
        ({"student": {"kind": "modle", "path": "m"}}, "modle"),
        ({"play": {"turns": 1, "branching": {"width": 9}}}, "'branching.width' is 9"),
        ({"cluster": {"train_workers": 1}}, "'train_workers' is not used: nothing is trained here"),
    ],
)
def test_what_does_not_go_together_is_said(change: dict[str, Any], complaint: str) -> None:
    DialoguesConfig.model_validate(DOCUMENT)
    with pytest.raises(ValidationError, match=complaint):
        DialoguesConfig.model_validate({**DOCUMENT, **change})


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
