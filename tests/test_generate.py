"""`mahalo generate`: prompts in, answers out; the same whatever the actors, resumable, bad rows kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
import transformers as tf
from ray._raylet import get_authentication_mode
from rich.console import Console
from tiny_guided import ASK, model, reward, tokenizer
from tiny_reward_models import CONFIG, byte_tokenizer
from typer.testing import CliRunner

from mahalo_ray.cli import app
from mahalo_ray.config import ConfigError, Draft, GenerateConfig, RewardSource
from mahalo_ray.data import storage
from mahalo_ray.data.prompts import PromptRow, ReadPrompts, read_prompts
from mahalo_ray.data.records import RecordTable
from mahalo_ray.decoding.guided import GuidedDecoder
from mahalo_ray.models.multi_head import MultiHeadCausalLM
from mahalo_ray.objectives import Weights
from mahalo_ray.pipeline.cluster import ray_session
from mahalo_ray.pipeline.generate import generate
from mahalo_ray.pipeline.progress import RunProgress
from mahalo_ray.rollouts.answers import GenerateWorker, Generation, before_stop, cut_into_chunks, request_of

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "What is 2 + 3?", "answer": "left alone"},
    {"id": "b", "messages": ASK, "weights": {"accuracy": 1}, "guidance": {"engagement": 1}},
    {"prompt": ASK, "seed": 5},
    {"id": "long", "prompt": "2 + 3 " * 200},
    {"id": "e", "prompt": "So?"},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-headed policy, our reward model and a classifier of another maker."""
    folder = tmp_path_factory.mktemp("models")
    policy = MultiHeadCausalLM.from_base(model(), ["accuracy", "engagement"], noise=0.5)
    policy.save_pretrained(folder / "policy")
    tokenizer().save_pretrained(folder / "policy")
    reward().save_pretrained(folder / "reward")
    torch.manual_seed(0)
    config = tf.Qwen2Config(**CONFIG, num_labels=1)
    tf.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "classifier")
    byte_tokenizer().save_pretrained(folder / "classifier")
    return folder


def job(folders: Path, prompts: str, output: Path, **fields: Any) -> GenerateConfig:
    request = {"num_candidates": 3, "max_new_tokens": 16, "max_step_tokens": 8}
    request |= {"weights": {"accuracy": 1, "engagement": 1}} | fields.pop("request", {})
    document = {
        "prompts": prompts,
        "output": str(output),
        "domain": "math",
        "policy": str(folders / "policy"),
        "rewards": [{"model": str(folders / "reward")}],
        "request": request,
        "chunk_rows": 2,
        "max_bad_fraction": 0.5,
    }
    return Draft("test", document | fields).validate(GenerateConfig)


def answers(output: Path) -> list[Generation]:
    return Generation.load(str(output / "answers"))


def play(config: GenerateConfig) -> None:
    """All chunks, without Ray."""
    rows = read_prompts(config.prompts).prompts
    worker = GenerateWorker(config)
    for chunk in cut_into_chunks(rows, config.chunk_rows):
        worker.play(chunk)


def test_answers_are_those_of_the_decoder_with_all_that_was_offered(folders: Path, tmp_path: Path) -> None:
    config = job(folders, write_rows(tmp_path / "p.jsonl", ROWS), tmp_path / "out")
    play(config)
    rows = read_prompts(config.prompts).prompts
    found = {answer.id: answer for answer in answers(tmp_path / "out")}
    assert list(found) == ["a", "b", "p.jsonl:3", "e"]
    policy = MultiHeadCausalLM.from_pretrained(folders / "policy").eval()
    decoder = GuidedDecoder(policy, reward(), "math", tokenizer())
    for row in rows:
        if row.id == "long":
            continue
        request = request_of(row, config)
        expected, answer = decoder.generate_batch([request])[0], found[row.id]
        assert (answer.text, answer.stop_reason) == (expected.text, expected.stop_reason)
        assert (answer.policy_tokens, answer.reward_tokens) == (
            expected.policy_tokens,
            expected.reward_tokens,
        )
        assert answer.response_tokens == len(expected.token_ids) and answer.cache_bytes > 0
        for step, known in zip(answer.steps, expected.steps, strict=True):
            assert step.chosen == known.chosen
            assert [c.text for c in step.candidates] == [c.text for c in known.candidates]
            for candidate, other in zip(step.candidates, known.candidates, strict=True):
                assert candidate.scores == pytest.approx(other.scores, abs=1e-5)
    assert found["b"].weights == {"accuracy": 1.0} and found["b"].guidance == {"engagement": 1.0}
    assert found["a"].weights == {"accuracy": 0.5, "engagement": 0.5} and found["p.jsonl:3"].seed == 5
    rejected = storage.read_file(str(tmp_path / "out" / "rejected" / "part-000001.parquet")).to_pylist()
    assert rejected[0]["line"] == 4 and "there is no room for an answer" in rejected[0]["reason"]


def test_several_reward_models_and_a_classifier_guide_together(folders: Path, tmp_path: Path) -> None:
    rewards = [
        {"model": str(folders / "reward")},
        RewardSource.parse(f"helpful={folders / 'classifier'}").model_dump(),
    ]
    config = job(folders, write_rows(tmp_path / "p.jsonl", ROWS[:1]), tmp_path / "out", rewards=rewards)
    play(config)
    (answer,) = answers(tmp_path / "out")
    assert answer.guidance == pytest.approx({"accuracy": 1 / 3, "engagement": 1 / 3, "helpful": 1 / 3})
    for step in answer.steps:
        assert all(set(c.scores or {}) == {"accuracy", "engagement", "helpful"} for c in step.candidates)


def test_text_ends_before_a_stop_string(folders: Path, tmp_path: Path) -> None:
    assert before_stop("one STOP two", ("STOP", "two")) == "one "
    prompts = write_rows(tmp_path / "p.jsonl", ROWS[:1])
    greedy = {"strategy": "none", "num_candidates": 1, "temperature": 0}
    play(job(folders, prompts, tmp_path / "free", request=greedy, rewards=[]))
    (free,) = answers(tmp_path / "free")
    stop = next(letter for letter in free.text[1:] if letter.isascii() and letter.isalnum())
    play(job(folders, prompts, tmp_path / "cut", request=greedy | {"stop": [stop]}, rewards=[]))
    (cut,) = answers(tmp_path / "cut")
    assert cut.text == free.text[: free.text.index(stop)] and cut.stop_reason == "stop_string"


def test_prompts_of_every_format_and_rows_that_are_none(tmp_path: Path) -> None:
    bad: list[dict[str, Any]] = [
        {"id": "both", "prompt": "x", "messages": ASK},
        {"id": "a", "prompt": "again"},
        {"id": "s", "prompt": "x", "seed": -1},
        {"id": "w", "prompt": "x", "weigths": {"accuracy": 1}},
        {"id": "n", "prompt": "x", "weights": {"accuracy": -1}},
        {"id": "t", "messages": [*ASK, {"role": "assistant", "content": "5"}]},
        {"id": "r", "messages": [{"role": "tutor", "content": "5"}]},
        {"id": "empty", "prompt": "  "},
    ]
    read = read_prompts(write_rows(tmp_path / "p.jsonl", [*ROWS[:3], *bad]))
    prompts, refused = read.prompts, read.bad
    assert [row.id for row in prompts] == ["a", "b", "p.jsonl:3"]
    reasons = [
        "either 'prompt'",
        "has the id 'a'",
        "'seed' is -1",
        "Did you mean 'weights'",
        "must be finite",
    ]
    reasons += ["nothing to answer", "role", "prompt is empty"]
    for row, reason, line in zip(refused, reasons, range(4, 12), strict=True):
        assert row.line == line and reason in row.reason
    folder = tmp_path / "several"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(ROWS[:1]))
    table = pa.Table.from_pylist(
        [{"id": "p", "prompt": "x", "weights": {"accuracy": 2.0, "engagement": None}}]
    )
    pq.write_table(table, folder / "b.parquet")
    prompts = read_prompts(str(folder)).prompts
    assert [row.id for row in prompts] == ["a", "p"] and prompts[1].weights == Weights.one("accuracy")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": None}, "either a policy or a completion server"),
        ({"rewards": []}, "needs a reward model"),
        ({"request": {"strategy": "none"}}, "strategy: none' decodes one candidate"),
        ({"request": {"strategy": "none", "num_candidates": 1}}, "'rewards' are not used by strategy 'none'"),
        ({"request": {"beam_width": 2}}, "'beam_width' is not used by 'strategy: argmax'"),
        ({"request": {"score_temperature": 2}}, "'score_temperature' is not used by 'strategy: argmax'"),
        ({"cluster": {"train_workers": 1}}, "'train_workers' is not used: nothing is trained here"),
        ({"request": {"strateggy": "argmax"}}, "Did you mean 'strategy'"),
        ({"request": {"weights": {"accuracy": -1}}}, "greater than or equal to 0"),
    ],
)
def test_wrong_options_are_named(folders: Path, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(folders, "p.jsonl", tmp_path / "out", **fields)


def test_the_command_names_what_is_missing(folders: Path, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "p.jsonl", ROWS)
    command = ["generate", prompts, "-o", str(tmp_path / "out"), "--policy"]
    for arguments, message in (
        ([str(tmp_path / "nowhere"), "--strategy", "none"], "there is no policy model at"),
        ([str(folders / "policy")], "needs a reward model"),
        ([str(folders / "policy"), "--set", "request.topk=3", "--strategy", "none"], "Did you mean 'top_k'"),
    ):
        result = CliRunner().invoke(app, [*command, *arguments])
        assert result.exit_code == 2 and message in result.output.replace("\n", " ")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("answers"))


@pytest.mark.slow
def test_the_answers_do_not_depend_on_actors_and_a_job_goes_on(folders: Path, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "p.jsonl", ROWS)
    quiet = Console(file=(tmp_path / "log").open("w"))
    outputs = []
    alone = job(folders, prompts, tmp_path / "alone", cluster={"rollout_actors": 1})
    authentication = get_authentication_mode()
    with ray_session(alone.cluster):
        for name, actors in (("alone", 1), ("three", 3)):
            config = job(folders, prompts, tmp_path / name, cluster={"rollout_actors": actors})
            manifest = generate(config, _open, RunProgress(quiet))
            data = manifest.metrics.pop("data")  # the long prompt is read, and quarantined by its actor
            assert manifest.metrics == {"answered": 4, "quarantined": 1, "actor_deaths": 0}
            assert (data["rows"], data["read"], data["quarantined"], data["left_out"]) == (5, 5, 0, 0)
            outputs.append(answers(tmp_path / name))
        assert outputs[0] == outputs[1]
        lost = tmp_path / "three" / "answers" / "part-000001.parquet"
        kept = (tmp_path / "three" / "answers" / "part-000000.parquet").stat().st_mtime_ns
        lost.unlink()
        generate(job(folders, prompts, tmp_path / "three"), _open, RunProgress(quiet))
        assert answers(tmp_path / "three") == outputs[0]
        assert (tmp_path / "three" / "answers" / "part-000000.parquet").stat().st_mtime_ns == kept
        with pytest.raises(ValueError, match="holds answers of other settings"):
            generate(job(folders, prompts, tmp_path / "three", chunk_rows=3), _open, RunProgress(quiet))
        with pytest.raises(ValueError, match=r"1 of 5 rows cannot be used.*'max_bad_fraction'"):
            strict = job(folders, prompts, tmp_path / "strict", max_bad_fraction=0.1)
            generate(strict, _open, RunProgress(quiet))
    quarantined = storage.read_file(str(tmp_path / "alone" / "quarantine.parquet")).to_pylist()
    assert [row["line"] for row in quarantined] == [4]
    # What a private Ray asks of its callers holds for no other cluster that this process joins.
    assert get_authentication_mode() == authentication


def _open() -> Any:
    import contextlib

    assert ray.is_initialized()
    return contextlib.nullcontext()


def test_prompts_kept_as_tables_are_the_rows_that_were_read(tmp_path: Path) -> None:
    """A file of a million prompts is held as Arrow tables, and cut into the same chunks."""
    options = {"weights": {"accuracy": 1, "engagement": 3}, "guidance": {"accuracy": 1}, "seed": 2**63 - 1}
    rows = [{"prompt": f"What is {n}?", **(options if n % 3 == 0 else {})} for n in range(1100)]
    file = write_rows(tmp_path / "p.jsonl", rows)
    table = RecordTable(PromptRow)
    read_prompts(file, into=ReadPrompts(take=table.append))
    rows_read = read_prompts(file).prompts
    assert list(table) == rows_read
    assert list(cut_into_chunks(table, 3)) == list(cut_into_chunks(rows_read, 3))
    assert len(list(cut_into_chunks(table, 3))) == 367
