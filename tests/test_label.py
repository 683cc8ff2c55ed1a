"""Labels for steps: targets, continuations over a shared cache, judges, and jobs that go on after a death."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from local_endpoint import GARBAGE, LocalEndpoint, Received, Scripted, says
from pydantic import ValidationError
from rich.console import Console
from tiny_reward_models import TOKENIZER, base

from mahalo_ray.config import ConfigError, ObjectiveConfig, load_document
from mahalo_ray.config.label import (
    AdaptiveConfig,
    ContinuationsConfig,
    EndpointJudgeConfig,
    LabelConfig,
    ModelJudgeConfig,
)
from mahalo_ray.config.stages import SamplingConfig
from mahalo_ray.data.records import Message, StepTrace
from mahalo_ray.data.templating import ChatFormat
from mahalo_ray.decoding.boundaries import MathBoundary
from mahalo_ray.decoding.loading import Placement
from mahalo_ray.decoding.policy import as_policy
from mahalo_ray.models import ProcessRewardModel
from mahalo_ray.pipeline.labelling import make_labels
from mahalo_ray.pipeline.progress import RunProgress, StageProgress
from mahalo_ray.rollouts.judges import (
    EndpointJudge,
    Judge,
    Judged,
    ModelJudge,
    ProgramJudge,
    Unjudged,
    rubric_template,
)
from mahalo_ray.rollouts.label_targets import is_decided, majority_target, value_target
from mahalo_ray.rollouts.labelling import Labelled, Labeller, ObjectiveJudge
from mahalo_ray.rollouts.pool import RolloutError
from mahalo_ray.rollouts.prefixes import Continuer

PROGRAMS = str(Path(__file__).parent / "programs")
sys.path.insert(0, PROGRAMS)

VALUE = ObjectiveConfig(name="accuracy", supervision="rollout_value")
VOTE = ObjectiveConfig(name="clear", supervision="judged_rollouts")
PREFIX = ObjectiveConfig(name="kind", supervision="judged_prefix")
SAMPLING = SamplingConfig(max_new_tokens=12)
POLICY = as_policy(base())


def test_targets_by_hand() -> None:
    # z = 1, 0, 1 after 1, 2, 0 more steps; r = 0.1, gamma = 0.5: (0.1 + 0.5) + (0.1 + 0) + (0.1 + 1) over 3
    assert value_target([1, 0, 1], [1, 2, 0], 0.1, 0.5) == pytest.approx(1.8 / 3)
    assert [majority_target(v) for v in ([1, 0], [1, 1, 0], [0.0])] == [0.0, 1.0, 0.0]


def test_sampling_stops_when_the_posterior_is_decided() -> None:
    by_threshold = AdaptiveConfig(threshold=0.5, confidence=0.9)
    # No positive of m: P(mean < 1/2) = 1 - 1/2^(m+1).
    assert not is_decided([0, 0], by_threshold) and is_decided([0, 0, 0], by_threshold)
    assert is_decided([1, 1, 1], by_threshold) and not is_decided([1, 0, 1, 0], by_threshold)
    by_width = AdaptiveConfig(threshold=None, max_width=0.6, confidence=0.9)
    # Central 90 % of Beta(1, 3): 1 - 0.95^(1/3) to 1 - 0.05^(1/3) = 0.017 to 0.632; of Beta(1, 4): to 0.527.
    assert not is_decided([0, 0], by_width) and is_decided([0, 0, 0], by_width)


def trace(name: str, question: str, *steps: str) -> StepTrace:
    return StepTrace(
        id=name,
        group=question,
        prompt=[Message(role="user", content=question)],
        steps=list(steps),
        labels={},
        source="a.jsonl",
        answer="5",
    )


TRACES = [
    trace("a", "2+3?", "Two.", "Three.", "So 5"),
    trace("b", "2+3?", "Two.", "Four.", "So 6"),
    trace("c", "2+3?", "Two."),
    trace("d", "1?", "One.", "One more."),
]


class Recorder(Judge):
    """A judge that keeps what it was shown."""

    def __init__(self, program: str) -> None:
        self.judge, self.seen = ProgramJudge(f"label_judges:{program}"), list[Judged]()

    def score(self, items: Sequence[Judged]) -> list[float | Unjudged]:
        self.seen += items
        return self.judge.score(items)


def labelled(
    traces: Sequence[StepTrace],
    objectives: Sequence[ObjectiveConfig] = (VALUE,),
    program: str = "coin",
    **settings: Any,
) -> tuple[Labelled, Continuer, Recorder]:
    recorder = Recorder(program)
    config = ContinuationsConfig(policy="unused here", sampling=SAMPLING, **{"samples": 4, **settings})
    continuer = Continuer(POLICY, ChatFormat(TOKENIZER), MathBoundary(), "\n\n", config, seed=3)
    judges = [ObjectiveJudge(objective, recorder, 0.5) for objective in objectives]
    return Labeller(judges, continuer, config, "\n\n", "job").label(traces), continuer, recorder


def test_values_are_those_of_the_continuations_that_were_judged() -> None:
    """The definition, from what the judge saw: mean of r_t + gamma^(n-t) z over the M of every prefix."""
    found, _, recorder = labelled(TRACES[:1], gamma=0.5, step_reward="label_judges:reward")
    (one,) = found.traces
    steps = tuple(TRACES[0].steps)
    whole = [item for item in recorder.seen if item.steps == steps]
    assert len(whole) == 1  # the response itself is the end: nothing continues it
    for t in (1, 2):
        started = [item for item in recorder.seen if item.steps[:t] == steps[:t] and item.steps != steps]
        after = [item for item in started if (len(item.steps) == t or item.steps[t] != steps[t])]
        verdicts = dict.fromkeys(after)
        own = recorder.judge.score(list(verdicts))
        returns = {
            i: 0.1 * t + 0.5 ** (len(i.steps) - t) * float(z) for i, z in zip(verdicts, own, strict=True)
        }  # type: ignore[arg-type]
        assert len(after) <= 4 and one.labels["accuracy"][t - 1] is not None
        if len(after) == 4:  # all different: each counts once
            assert one.labels["accuracy"][t - 1] == pytest.approx(sum(returns.values()) / 4)
    z = float(recorder.judge.score(whole)[0])  # type: ignore[arg-type]
    assert one.labels["accuracy"][2] == pytest.approx(0.3 + z) and one.outcome == {"accuracy": z}
    assert recorder.seen[0].response.startswith("Two.\n\n") and one.source == "job"


def test_shared_prefixes_are_sampled_once_and_labels_do_not_depend_on_company() -> None:
    together, continuer, _ = labelled(TRACES)
    counts = continuer.counts
    # Inner prefixes: Two. (twice) / Two. Three. / Two. Four. / One.
    assert (counts.steps, counts.prefixes, counts.samples) == (5, 4, 16)
    first, second, third, fourth = together.traces
    assert first.labels["accuracy"][0] == second.labels["accuracy"][0]
    assert third.labels["accuracy"][0] == third.outcome["accuracy"]  # type: ignore[index]
    alone = [labelled([one])[0].traces[0] for one in TRACES]
    assert [one.labels for one in together.traces] == [one.labels for one in alone]
    assert fourth.labels == labelled(TRACES[::-1])[0].traces[0].labels


def test_every_prompt_and_step_is_encoded_once() -> None:
    _, continuer, _ = labelled(TRACES)
    chat = ChatFormat(TOKENIZER)
    inner = ["Two.\n\n", "Three.\n\n", "Four.\n\n", "One.\n\n"]
    wanted = sum(len(chat.prompt_ids(TRACES[n].prompt)) for n in (0, 3))
    assert continuer.counts.tokens_encoded == wanted + sum(len(chat.encode_reply(s)) - 1 for s in inner)


def test_adaptive_sampling_saves_what_it_says() -> None:
    adaptive = AdaptiveConfig(round=1, confidence=0.9, threshold=0.5)
    found, continuer, recorder = labelled(TRACES[:1], program="never", samples=8, adaptive=adaptive)
    # Decided after three failures: 3 of 8 for each of the two inner prefixes.
    assert (continuer.counts.samples, continuer.counts.samples_full) == (6, 16)
    assert found.traces[0].labels == {"accuracy": [0.0, 0.0, 0.0]}
    _, full, _ = labelled(TRACES[:1], program="never", samples=8)
    assert full.counts.samples == 16 and len(recorder.seen) <= 7


def test_objectives_of_different_supervision_share_the_continuations() -> None:
    found, continuer, recorder = labelled(TRACES[:1], (VALUE, VOTE, PREFIX), gamma=1.0)
    (one,) = found.traces
    value, vote = one.labels["accuracy"], one.labels["clear"]
    assert vote == [float(v > 0.5) for v in value]  # type: ignore[operator]
    begun = [tuple(TRACES[0].steps[:n]) for n in (1, 2, 3)]
    shown = [Judged(tuple(TRACES[0].prompt), steps, "5", "") for steps in begun]
    assert one.labels["kind"] == [float(z) for z in recorder.judge.score(shown)]  # type: ignore[arg-type]
    assert continuer.counts.samples == 8
    assert one.outcome is not None and set(one.outcome) == {"accuracy", "clear"}


def test_what_does_not_fit_or_gets_no_verdict_is_named() -> None:
    long = trace("long", "2+3?", "x" * 200, "So 5")
    found, _, _ = labelled([long, TRACES[0]])
    assert [one.id for one in found.traces] == ["a"]
    assert found.unjudged == {"accuracy": 2} and found.labels == {"accuracy": 3}
    assert "trace 'long', step 1, accuracy: 2" in found.bad[0].reason
    assert "do not fit the policy's context of 160" in found.bad[0].reason
    mute, _, _ = labelled(TRACES[:1], (VALUE, PREFIX), program="nothing")
    assert mute.traces == [] and mute.unjudged == {"accuracy": 3, "kind": 3}
    assert "label_judges:nothing returned None, not a number" in mute.bad[0].reason


def test_responses_to_prompts_are_cut_into_steps() -> None:
    config = ContinuationsConfig(policy="unused here", sampling=SamplingConfig(max_new_tokens=40))
    continuer = Continuer(POLICY, ChatFormat(TOKENIZER), MathBoundary(), "\n\n", config, seed=3)
    prompts = [trace("p", "2+3?"), trace("q", "1?")]
    found = continuer.respond(prompts, 3)
    assert {one.id for one in found} <= {f"{p}/{n}" for p in "pq" for n in (1, 2, 3)} and len(found) >= 4
    assert all(step.strip() for one in found for step in one.steps)
    again = Continuer(POLICY, ChatFormat(TOKENIZER), MathBoundary(), "\n\n", config, seed=3)
    assert again.respond(prompts[1:], 3) == [one for one in found if one.id.startswith("q")]


ITEM = Judged((Message(role="user", content="2+3?"),), ("Two.", "So 5"), "5", "Two.\n\nSo 5")


def endpoint_judge(
    server: LocalEndpoint, rubric: str = "Judge: {{ response }}", **settings: Any
) -> EndpointJudge:
    config = EndpointJudgeConfig(
        endpoint=server.config(max_retries=0), rubric="unused here", scale=(0, 10), **settings
    )
    return EndpointJudge(config, rubric, actors=2, seed=0)


def test_an_endpoint_is_asked_by_the_rubric_and_its_score_is_read() -> None:
    rubric = "{{ conversation }}|{{ steps | length }}|{{ step }}|{{ answer }}|{{ messages[0].role }}"
    with LocalEndpoint([says("Score: 3? No.\nscore = 7.5")]) as server:
        judge = endpoint_judge(server, rubric)
        assert judge.score([ITEM]) == [0.75]
        judge.close()
    assert server.received[0].content == "User: 2+3?|2|So 5|5|user"


def test_replies_without_a_score_are_asked_for_again_then_given_up() -> None:
    def script(received: Received) -> Scripted:
        if received.content == "Judge: broken":
            return GARBAGE
        late = len(server.received) > 3 and received.content == "Judge: late"
        return says("Score: 10") if late else says("hm")

    items = [Judged(ITEM.prompt, (text,), None, text) for text in ("late", "never", "broken")]
    with LocalEndpoint(script) as server:
        judge = endpoint_judge(server, parse_retries=2)
        late, never, broken = judge.score(items)
        counts = judge.counts()
        judge.close()
    assert late == 1.0
    assert isinstance(never, Unjudged) and never.reason == "no score to read in the judge's reply: 'hm'"
    assert isinstance(broken, Unjudged) and broken.reason.startswith("garbage after 1 tries")
    assert counts["failures"] == {"garbage": 1} and counts["unparsed"] == {"retried": 3, "given_up": 1}
    asked = [(one.content, one.body["seed"]) for one in server.received if "never" in one.content]
    assert len(asked) == 3 and len({seed for _, seed in asked}) == 3  # the same reply would come again


@pytest.mark.parametrize("reply", ["Score: 11", "Score: -1", "5", ""])
def test_scores_outside_the_scale_are_no_scores(reply: str) -> None:
    with LocalEndpoint([says(reply)]) as server:
        judge = endpoint_judge(server, parse_retries=0)
        assert isinstance(judge.score([ITEM])[0], Unjudged)
        judge.close()


@pytest.mark.parametrize(
    ("rubric", "message"),
    [
        ("{{ response", "the rubric is no template: line 1"),
        ("{{ reponse }}", "unknown variable 'reponse'. Did you mean 'response'"),
        ("Is {{ conversation }} good?", "nothing to judge"),
    ],
)
def test_a_rubric_is_checked_before_anything_starts(rubric: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rubric_template(rubric)


def test_a_local_reward_model_reads_all_prefixes_of_a_response_at_once(tmp_path: Path) -> None:
    kinds = {"accuracy": "value", "kind": "probability"}
    model = ProcessRewardModel.from_base(base(), kinds, inputs=["last"], tokenizer=TOKENIZER).eval()
    model.save_pretrained(tmp_path)
    judge = ModelJudge(ModelJudgeConfig(path=str(tmp_path), objective="kind"), Placement())
    items = [Judged(ITEM.prompt, ITEM.steps[:n], None, "") for n in (1, 2)]
    too_long = Judged(ITEM.prompt, ("x" * 400,), None, "")
    first, second, none = judge.score([*items, too_long])
    assert [first, second] == pytest.approx(model.score(ITEM.prompt, ITEM.steps)["kind"], abs=1e-5)
    assert isinstance(none, Unjudged) and "the model reads 160" in none.reason
    with pytest.raises(ValueError, match="scores accuracy, kind: say which one"):
        ModelJudge(ModelJudgeConfig(path=str(tmp_path)), Placement())


def test_an_unknown_program_is_said() -> None:
    for name in ("label_judges:nobody", "no_such_module:f"):
        with pytest.raises(ValueError, match=f"there is no function '{name}'"):
            ProgramJudge(name)


def document(output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "job",
        "output": str(output),
        "domain": "math",
        "objectives": [{"name": "accuracy", "supervision": "rollout_value"}],
        "judges": {"accuracy": {"kind": "program", "function": "label_judges:coin"}},
        "input": {"traces": [{"path": "traces.jsonl"}]},
        "continuations": {"policy": "somewhere", "samples": 4, "sampling": {"max_new_tokens": 12}},
        "traces_per_chunk": 2,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judges": {}}, "no judge for objective 'accuracy'"),
        ({"continuations": None}, "'continuations' is missing"),
        ({"domain": "tutoring"}, "a student answers every turn"),
        ({"domain": "human_values", "judges": {"accuracy": {"kind": "checker"}}}, "has no checker"),
        ({"objectives": [{"name": "accuracy", "supervision": "pairwise"}]}, "there are no labels to make"),
        (
            {"objectives": [{"name": "accuracy", "supervision": "judged_prefix"}]},
            "'continuations' is not used",
        ),
        (
            {
                "judges": {
                    "accuracy": {
                        "kind": "program",
                        "function": "a:b",
                        "threshold": 0.3,
                        "calibration": "c.json",
                    }
                }
            },
            "leave 'threshold' out",
        ),
        ({"judges": {"accuracy": {"kind": "program", "function": "os.system"}}}, "pattern"),
        (
            {"cluster": {"cpus_per_train_worker": 1}},
            "'cpus_per_train_worker' is not used: nothing is trained",
        ),
        (
            {
                "objectives": [{"name": "accuracy", "supervision": "judged_rollouts"}],
                "continuations": {"policy": "somewhere", "gamma": 0.5},
            },
            "'continuations.gamma' belongs to 'rollout_value'",
        ),
    ],
)
def test_what_does_not_fit_together_is_said(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        LabelConfig.model_validate(document(tmp_path, **changes))


def test_the_example_is_a_labelling_job() -> None:
    found = load_document(Path(__file__).parents[1] / "examples" / "label_math.yaml", LabelConfig)
    assert found.uses_rollouts and found.objective_names == ("accuracy",)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # The cluster's own workers inherit it, whichever job they work for: the judge is the tests' own.
        patch.setenv("PYTHONPATH", os.pathsep.join([PROGRAMS, os.getcwd()]))
        ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Eight traces in four chunks, and a policy to continue them."""
    folder = tmp_path_factory.mktemp("job")
    base().save_pretrained(folder / "policy")
    TOKENIZER.save_pretrained(folder / "policy")
    rows = [{"id": f"t{n}", "question": f"{n}+3?", "steps": ["Two.", "Three.", f"So {n}"]} for n in range(8)]
    (folder / "traces.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"question": "?", "steps": []}])))
    return document(
        folder,
        input={"traces": [{"path": str(folder / "traces.jsonl")}], "max_bad_fraction": 0.2},
        continuations={"policy": str(folder / "policy"), "samples": 4, "sampling": {"max_new_tokens": 12}},
    )


def run(job: dict[str, Any], output: Path, actors: int, **changes: Any) -> dict[str, Any]:
    config = {**job, "output": str(output), "cluster": {"rollout_actors": actors}, **changes}
    loaded = LabelConfig.model_validate(config)
    quiet = RunProgress(Console(file=open(os.devnull, "w")))  # noqa: SIM115
    return make_labels(loaded, contextlib.nullcontext, quiet).metrics


def labels(output: Path) -> list[dict[str, Any]]:
    return [one.model_dump() for one in StepTrace.load(str(output / "labelled"))]


@pytest.mark.slow
def test_killed_actors_and_killed_jobs_change_nothing(
    cluster: None, job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = run(job, tmp_path / "quiet", 1)
    wanted = labels(tmp_path / "quiet")
    assert quiet["traces"] == 8 and sorted(one["id"] for one in wanted) == [f"t{n}" for n in range(8)]
    assert quiet["labels"] == {"accuracy": 24} and quiet["sampling"]["samples"] == 64
    assert pq.read_table(tmp_path / "quiet" / "quarantine.parquet")["line"].to_pylist() == [9]
    assert quiet["judges"]["accuracy"]["calibrated"] is False
    assert "UNCALIBRATED" in wanted[0]["source"]

    # The job is killed outright once a chunk is there; the same command in another process goes on.
    killed = tmp_path / "killed"
    config = tmp_path / "label.yaml"
    address = ray.get_runtime_context().gcs_address
    cluster_section = {"address": address, "rollout_actors": 1}
    config.write_text(yaml.safe_dump({**job, "output": str(killed), "cluster": cluster_section}))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([PROGRAMS, os.getcwd()])}
    command = [sys.executable, "jobs/run.py", "label", str(config)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        wait_for(killed / "labelled")
        process.send_signal(signal.SIGKILL)
    first = {file.name: file.stat().st_mtime_ns for file in (killed / "labelled").glob("*.parquet")}
    assert 0 < len(first) < 4 and not (killed / "manifest.json").exists()

    # It goes on, and loses an actor.
    victims: list[int] = []
    update = StageProgress.update

    def update_and_kill(self: StageProgress, done: float, total: float | None = None, note: str = "") -> None:
        update(self, done, total, note)
        workers = psutil.Process().children(recursive=True)
        found = [worker for worker in workers if "LabelWorker" in " ".join(cmdline(worker))]
        if found and not victims:
            victims.append(found[0].pid)
            found[0].kill()

    monkeypatch.setattr(StageProgress, "update", update_and_kill)
    metrics = run(job, killed, 2)
    assert victims and labels(killed) == wanted
    assert {key: metrics[key] for key in ("traces", "rows", "labels")} == {
        key: quiet[key] for key in ("traces", "rows", "labels")
    }
    for name, written in first.items():
        assert (killed / "labelled" / name).stat().st_mtime_ns == written  # not made again


def cmdline(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.cmdline()
    return []


def wait_for(folder: Path) -> None:
    for _ in range(1200):
        if folder.is_dir() and any(folder.glob("*.parquet")):
            return
        time.sleep(0.05)
    raise AssertionError(f"nothing came to {folder}")


@pytest.mark.slow
def test_an_endpoint_that_fails_ends_the_job_and_what_is_there_is_kept(
    cluster: None, job: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "rubric.txt").write_text("{{ response }}")
    answers = {"broken": True}

    def script(received: Received) -> Scripted:
        return says("?") if answers["broken"] and "Three" in received.content else says("Score: 1")

    with LocalEndpoint(script) as server:
        judge = {
            "kind": "endpoint",
            "endpoint": server.config(max_retries=0, input_price=1.0, output_price=1.0).model_dump(),
            "rubric": str(tmp_path / "rubric.txt"),
            "parse_retries": 0,
        }
        changes = {
            "objectives": [{"name": "kind", "supervision": "judged_prefix"}],
            "judges": {"kind": judge},
            "continuations": None,
        }
        with pytest.raises(RolloutError, match=r"16 of 24 labels have no verdict(.|\n)*no score to read"):
            run(job, tmp_path / "out", 1, **changes)
        answers["broken"] = False
        metrics = run(job, tmp_path / "out", 1, **changes)
    assert metrics["labels"] == {"kind": 24} and metrics["unjudged"] == {}
    asked = metrics["endpoints"]["kind"]
    assert (asked["requests"], asked["prompt_tokens"]) == (24, 240)
    assert asked["cost"] == pytest.approx(24 * 15e-6)
    with pytest.raises(ValueError, match="holds labels of other settings"):
        run(job, tmp_path / "out", 1)
    with pytest.raises(ConfigError, match="there is no file 'nowhere'"):
        run(job, tmp_path / "x", 1, **{**changes, "judges": {"kind": {**judge, "rubric": "nowhere"}}})
