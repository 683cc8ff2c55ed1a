"""Runs on prompts of one's own: the domain `prompts`, its judges, and a whole run of a real kind of model."""

from __future__ import annotations

import json
import random
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from local_endpoint import LocalEndpoint, Received, Scripted, says
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny_run import SIZES, mahalo
from transformers import Qwen2Config, Qwen2ForCausalLM

from mahalo_ray.config import ConfigError, DomainConfig, RunConfig, load_config
from mahalo_ray.domains.judged_prompts import PromptsDomain
from mahalo_ray.domains.maths.word_problems import make_word_problem, write_solution
from mahalo_ray.domains.protocol import load_domain, outcomes, prefix_judgements
from mahalo_ray.domains.sft_text import train_tokenizer
from mahalo_ray.pipeline.run import pipeline
from mahalo_ray.pipeline.seed_blocks import (
    check_domain,
    domain_contents,
    domain_for_workers,
    fresh_students,
)

EXAMPLE = Path(__file__).parent.parent / "examples" / "gsm8k.yaml"
JUDGES = {
    "accuracy": "checker",
    "engagement": "mahalo_ray.domains.maths.explanations:judge_engagement",
}

SFT_DATA_OF_QUICKSTART = "6e085fa39b916f764f8acbbbcc19ea8ef1892aa0bdac68ea58f303bf92312670"


def write_prompts(path: Path, count: int, first: int = 0) -> Path:
    """Word problems with worked solutions, as GSM8K writes its rows."""
    rows = []
    for number in range(first, first + count):
        problem = make_word_problem(random.Random(number))
        answer = "\n".join(write_solution(problem, random.Random(number)))
        rows.append({"question": problem.question, "answer": answer.replace("= ", "= <<1+1=2>>")})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def tiny_base(prompts: Path, folder: Path) -> Path:
    """A random model of the kind that people have, with a tokenizer for these prompts."""
    texts = [str(value) for line in prompts.read_text().splitlines() for value in json.loads(line).values()]
    tokenizer = train_tokenizer(texts, 400)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, **shape)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    Qwen2ForCausalLM(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def domain_of(path: Path, **settings: Any) -> DomainConfig:
    given = {"path": str(path), "judges": JUDGES, "boundary": "lines", **settings}
    return DomainConfig.model_validate({"name": "prompts", "prompts": given})


def run_config(path: Path, *overrides: str) -> RunConfig:
    config = load_config(EXAMPLE, [f"domain.prompts.path={path}", f"model.base={path.parent}", *overrides])
    assert isinstance(config, RunConfig)
    return config


def test_answers_to_own_prompts_are_judged_step_by_step(tmp_path: Path) -> None:
    row = {"question": "What is 2 + 3?", "answer": "It is <<2+3=5>>5.\n#### 5"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    domain = load_domain(domain_of(tmp_path / "a.jsonl", instruction="End with ####."))
    assert isinstance(domain, PromptsDomain) and domain.boundary == "lines"
    episode = domain.episode(7)
    assert [m.content for m in episode.opening_messages] == ["What is 2 + 3?\n\nEnd with ####."]
    episode.take_step("Can you add? 2 + 3 = 5.\n")
    assert episode.judge_prefix() == {"engagement": pytest.approx(0.15 + 0.35 + 0.1)}
    other = episode.fork(1)
    episode.hear("#### 5")
    other.hear("#### 6")
    assert episode.outcome()["accuracy"] == 1.0 and other.outcome()["accuracy"] == 0.0
    assert episode.outcome()["engagement"] == pytest.approx(0.6 / 2)
    told = domain.sft_dialogue(7)
    assert told.turns[1].content == "It is 5.\n#### 5" and (told.outcome or {})["accuracy"] == 1.0
    assert domain.objectives["accuracy"].supervision[0] == "rollout_value"
    assert domain.objectives["engagement"].supervision[0] == "judged_prefix"


def test_rows_and_judges_that_cannot_be_used_are_said(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "What is 1 + 1?", "answer": "2"},
        {"question": "Which way?"},
        {"prompt": [{"role": "user", "content": "a"}] * 2, "answer": "b"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    domain = load_domain(domain_of(path))
    assert isinstance(domain, PromptsDomain)
    count, bad_rows = domain.left_out()
    assert count == 3
    assert [(bad.line, bad.reason.partition(":")[0]) for bad in bad_rows] == [
        (2, "there is no reference answer, which SFT and the checker need"),
        (3, "the prompt has 2 messages"),
    ]
    with pytest.raises(ValueError, match="there is no function 'math:nowhere'"):
        load_domain(domain_of(path, judges={"accuracy": "math:nowhere"}))
    with pytest.raises(ValueError, match="'accuracy': 'math:pi' is not a function"):
        load_domain(domain_of(path, judges={"accuracy": "math:pi"}))
    with pytest.raises(ValidationError, match="go together"):
        DomainConfig(name="prompts")
    (tmp_path / "b.jsonl").write_text(json.dumps(rows[1]))
    with pytest.raises(ValueError, match=r"no row of .* can be used; the first: there is no reference"):
        load_domain(domain_of(tmp_path / "b.jsonl")).episode(1)


def test_prompts_are_evaluated_once_each_and_never_those_that_were_trained_on(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "a.jsonl", 60)
    small = ("domain.sft_dialogues=6", "reward_rollouts.dialogues=5", "pair_rollouts.dialogues=5")
    config = run_config(path, *small, "evaluation.dialogues=20")
    check_domain(config)
    domain = load_domain(config.domain)
    questions = [domain.episode(seed).problem_key for seed in fresh_students(config)]
    assert len(set(questions)) == 20
    with pytest.raises(ConfigError, match=r"'evaluation\.dialogues' is 59: only \d+ prompts are there"):
        fresh_students(run_config(path, *small, "evaluation.dialogues=59"))
    apart = write_prompts(tmp_path / "b.jsonl", 10, first=55)  # the first five are among those of a.jsonl
    config = run_config(path, *small, "evaluation.dialogues=5", f"domain.prompts.evaluation_path={apart}")
    seeds = fresh_students(config)
    assert len(seeds) == 5 and all(seed < 0 for seed in seeds)
    with pytest.raises(ConfigError, match=r"'objectives\.0': unknown objective 'accuracy'"):
        check_domain(run_config(path, "domain.prompts.judges={engagement: checker}"))


def test_workers_get_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "a.jsonl", 2)
    placed = domain_for_workers(domain_of(Path("a.jsonl"), evaluation_path="hub:openai/gsm8k/main:test"))
    assert placed.prompts is not None and placed.prompts.path == str(tmp_path / "a.jsonl")
    assert placed.prompts.evaluation_path == "hub:openai/gsm8k/main:test"
    assert domain_for_workers(DomainConfig()) == DomainConfig()


def endpoint_judge(folder: Path, server: LocalEndpoint, **settings: Any) -> dict[str, Any]:
    """A language model that gives 0 to 10."""
    (folder / "rubric.txt").write_text("Judge this: {{ response }}")
    endpoint = server.config(max_retries=0, concurrency=4).model_dump()
    return {"endpoint": endpoint, "rubric": str(folder / "rubric.txt"), "scale": [0, 10], **settings}


def test_a_language_model_judges_answers_side_by_side_and_each_once(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "a.jsonl", 4)
    all_three = [threading.Event() for _ in range(3)]

    def script(asked: Received) -> Scripted:
        number = len(server.received) - 1
        if number % 3 == 2:
            all_three[number // 3].set()  # nobody is answered before three have asked
        said = "No idea." if "nothing" in asked.content else f"Score: {len(asked.content.split())}"
        return replace(says(said), after=all_three[number // 3])

    with LocalEndpoint(script) as server:
        judges = {"accuracy": "checker", "kind": endpoint_judge(tmp_path, server, parse_retries=0)}
        domain = load_domain(domain_of(path, judges=judges))
        assert domain.objectives["kind"].supervision[0] == "judged_prefix"
        episodes = [domain.episode(number) for number in range(3)]
        for number, episode in enumerate(episodes):
            episode.take_step("well " * number)
        assert prefix_judgements(episodes, ["kind"]) == [{"kind": v} for v in (0.2, 0.3, 0.4)]
        for episode in episodes:
            episode.hear("good")
        assert [found["kind"] for found in outcomes(episodes, ["kind"])] == [0.3, 0.4, 0.5]
        assert episodes[0].judge_prefix() == {"kind": 0.3} and len(server.received) == 6
        copies = [episode.fork(1) for episode in episodes]
        for copy in copies:
            copy.hear("nothing")
        with pytest.raises(ValueError, match=r"the judge of 'kind' gave no verdict: no score to read .*idea"):
            outcomes(copies, ["kind"])


def test_of_a_language_model_that_judges_model_and_rubric_count(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "a.jsonl", 4)
    with LocalEndpoint([says("Score: 5")]) as server:
        judge = endpoint_judge(tmp_path, server)

    def contents(**changes: Any) -> list[Any]:
        domain = domain_of(path, judges={"kind": {**judge, **changes}})
        return [domain.shaping(), domain_contents(domain)]

    known = contents()
    elsewhere = {**judge["endpoint"], "base_url": "http://other:1/v1", "concurrency": 9, "timeout_s": 1.0}
    assert contents(endpoint=elsewhere, parse_retries=7) == known
    assert contents(endpoint={**judge["endpoint"], "model": "another"}) != known
    assert contents(scale=[0, 5]) != known
    Path(judge["rubric"]).write_text("{{ response }}")
    assert contents() != known and contents()[0] == known[0]
    objectives = "objectives=[{name: kind, supervision: judged_prefix}]"
    weights = [f"{key}={{kind: 1}}" for key in ("guided.weights", "guided.guidance")]
    given = json.dumps({"kind": {**judge, "rubric": "nowhere.txt"}})
    settings = [objectives, *weights, "sweep.weights=[{kind: 1}]", f"domain.prompts.judges={given}"]
    with pytest.raises(ConfigError, match=r"judges\.kind\.rubric': there is no file 'nowhere.txt'"):
        check_domain(run_config(path, *settings))
    with pytest.raises(ValidationError, match="threshold"):
        contents(threshold=0.5)


def test_other_prompts_and_other_code_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path, judge = write_prompts(tmp_path / "a.jsonl", 3), tmp_path / "judges_of_a_user.py"
    judge.write_text("def praise(prompt, steps, answer):\n    return 1\n")
    override = "domain.prompts.judges={accuracy: checker, engagement: 'judges_of_a_user:praise'}"

    def fingerprints() -> dict[str, str]:
        config = run_config(path, override)
        return pipeline(config).fingerprints(config)

    first, again = fingerprints(), fingerprints()
    judge.write_text("def praise(prompt, steps, answer):\n    return 0\n")
    of_code = fingerprints()
    write_prompts(path, 4)
    of_both = fingerprints()
    assert first == again
    for name in first:
        assert len({first[name], of_code[name], of_both[name]}) == 3


def test_without_sft_the_base_takes_its_place(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "a.jsonl", 60)
    base = tiny_base(prompts, tmp_path / "base")
    none = ("domain.sft_dialogues=0", f"output={tmp_path / 'run'}", f"model.base={base}")
    with pytest.raises(ConfigError, match="there is no SFT: leave one out"):
        run_config(prompts, *none)
    config = run_config(prompts, *none, "sft={}")
    pipeline(config).run(config, ["sft"], session=nullcontext)  # needs no Ray
    made = load_file(tmp_path / "run" / "sft" / "model" / "model.safetensors")
    assert made.keys() == load_file(base / "model.safetensors").keys()
    assert all(
        torch.equal(made[name], value) for name, value in load_file(base / "model.safetensors").items()
    )
    scratch = "model={scratch: {hidden_size: 32}}"
    with pytest.raises(ConfigError, match="made from scratch can say nothing before SFT"):
        run_config(prompts, *none, "sft={}", scratch)


def test_code_counts_in_a_domain_of_ones_own_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = EXAMPLE.with_name("brevity.py").read_text()
    module = tmp_path / "brevity_of_a_user.py"
    module.write_text(source)
    own = DomainConfig(name="brevity_of_a_user:DOMAIN")
    before = domain_contents(own)
    module.write_text(source + "\n")
    assert before != domain_contents(own) != {}
    assert domain_contents(DomainConfig()) == domain_contents(DomainConfig(name="maths_miniature")) == {}
    # Known since runs have fingerprints: a run finished by an earlier version is not begun again.
    config = load_config(EXAMPLE.with_name("quickstart.yaml"))
    assert pipeline(config).fingerprints(config)["sft_data"] == SFT_DATA_OF_QUICKSTART


@pytest.mark.slow
def test_a_whole_run_of_a_base_model_on_own_prompts(tmp_path: Path) -> None:
    """From prompts to the report in one document, over a random model of the kind that people have."""
    prompts = write_prompts(tmp_path / "a.jsonl", 200)
    base = tiny_base(prompts, tmp_path / "base")
    settings = [
        *(setting for setting in SIZES if not setting.startswith("model.scratch")),
        *(f"model.base={base}", f"domain.prompts.path={prompts}"),
        *("domain.sft_dialogues=64", "sft.training.learning_rate=0.004"),
    ]
    said = mahalo("run", str(EXAMPLE), output=tmp_path / "run", settings=settings)
    assert "Report: " in said
    results = json.loads((tmp_path / "run" / "report" / "results.json").read_text())
    assert {"sft", "guided", "head"} <= {row["kind"] for row in results["rows"]}
    assert set(results["methods"][0]["values"]) == {"accuracy", "engagement"}
    assert (tmp_path / "run" / "reward_rollouts" / "traces").is_dir()
    assert (tmp_path / "run" / "sft_data" / "quarantine.parquet").is_file()
