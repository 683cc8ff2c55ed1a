"""Stages run, are skipped, rerun and continue as they should; locks, fingerprints and expected times."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from mahalo_ray.config import RunConfig, load_config
from mahalo_ray.data import storage
from mahalo_ray.data.rows import FileReport, ReadReport
from mahalo_ray.data.storage import RunLocked, run_lock
from mahalo_ray.pipeline.progress import RunProgress, TimeEstimate, duration
from mahalo_ray.pipeline.stages import (
    Context,
    Manifest,
    Pipeline,
    RunInterrupted,
    Stage,
    StageResult,
    canonical_json,
    fingerprint,
)


def make_config(output: str, **changes: object) -> RunConfig:
    document: dict[str, object] = {
        "name": "toy",
        "output": output,
        "objectives": [{"name": "accuracy", "supervision": "rollout_value"}],
        "model": {"scratch": {}},
        "sweep": {"weights": [{"accuracy": 1}]},
        "guided": {"weights": {"accuracy": 1}, "guidance": {"accuracy": 1}},
    }
    return RunConfig.model_validate(document | changes)


class Toy:
    """make -> double -> show, and `aside`, which needs only make. Every call is recorded."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.sessions = 0
        self.fail_in: BaseException | None = None
        self.pipeline = Pipeline(
            [
                Stage("make", "Make", self.make, lambda c: c.sft.model_dump(mode="json"), uses_ray=False),
                Stage(
                    "double", "Double", self.double, lambda c: c.policy.beta, needs=("make",), resumes=True
                ),
                Stage("aside", "Aside", self.aside, lambda c: None, needs=("make",), uses_ray=False),
                Stage("show", "Show", self.show, lambda c: c.name, needs=("double",), uses_ray=False),
            ]
        )

    def make(self, context: Context) -> StageResult:
        self.calls.append("make")
        storage.write_json(context.path("number.json"), 21)
        return StageResult({"number": 21}, {"number": "number.json"})

    def double(self, context: Context) -> StageResult:
        self.calls.append("double")
        checkpoint = context.path("checkpoint.json")
        self.calls.append("from checkpoint" if storage.exists(checkpoint) else "from nothing")
        storage.write_json(checkpoint, 1)
        if self.fail_in is not None:
            raise self.fail_in
        number = storage.read_json(context.input("make", "number"))
        storage.write_json(context.path("twice.json"), 2 * number)
        return StageResult({"twice": 2 * number}, {"twice": "twice.json"})

    def aside(self, context: Context) -> StageResult:
        self.calls.append("aside")
        return StageResult()

    def show(self, context: Context) -> StageResult:
        self.calls.append("show")
        return StageResult({"seen": context.metrics_of("double")["twice"]})

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        self.sessions += 1
        self.calls.append("open")
        yield
        self.calls.append("close")

    def run(self, config: RunConfig, *targets: str) -> tuple[list[str], str]:
        """The calls made and the text shown."""
        self.calls = []
        text = io.StringIO()
        shown = RunProgress(Console(file=text, width=200))
        self.pipeline.run(config, targets or None, session=self.session, progress=shown)
        return self.calls, text.getvalue()


@pytest.fixture(params=["disk", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path / "run")
        return
    url = f"memory://{tmp_path.name}"
    yield url
    storage.remove(url)


def test_finished_stages_are_skipped_and_ray_is_not_started_for_them(output: str) -> None:
    toy = Toy()
    calls, _ = toy.run(make_config(output))
    assert calls == ["make", "open", "double", "from nothing", "aside", "show", "close"]
    calls, text = toy.run(make_config(output))
    assert calls == [] and toy.sessions == 1
    assert text.count("done before, skipped") == 4
    manifest = Manifest.read(storage.join(output, "show"))
    assert manifest is not None and manifest.metrics == {"seen": 42}


def test_what_was_read_is_accounted_for_in_every_run(output: str) -> None:
    """Also in a run that finds the rows read: for people, and in the manifest."""

    def read(context: Context[RunConfig]) -> StageResult:
        report = ReadReport({"a.jsonl": FileReport(rows=3, read=1, quarantined=2)})
        return StageResult({"data": context.account(report)})

    pipeline = Pipeline([Stage("read", "Read", read, lambda c: None, uses_ray=False)])
    for _ in range(2):
        text = io.StringIO()
        shown = RunProgress(Console(file=text, width=200))
        manifests = pipeline.run(make_config(output), session=contextlib.nullcontext, progress=shown)
        assert "rows: 3 = 1 read + 2 quarantined + 0 left out" in text.getvalue()
        assert manifests["read"].metrics["data"]["quarantined"] == 2
    assert "done before, skipped" in text.getvalue()


def test_a_changed_stage_reruns_with_what_follows_it_and_nothing_else(output: str) -> None:
    toy = Toy()
    toy.run(make_config(output))
    calls, text = toy.run(make_config(output, policy={"beta": 0.5}))
    assert calls == ["open", "double", "from nothing", "show", "close"]
    assert "its settings or inputs have changed" in text
    calls, _ = toy.run(make_config(output, policy={"beta": 0.5}, cluster={"train_workers": 4}))
    assert calls == []
    calls, _ = toy.run(make_config(output, policy={"beta": 0.5}, seed=3))
    assert calls == ["make", "open", "double", "from nothing", "aside", "show", "close"]


def test_a_rerun_discards_what_was_made_from_the_old_result(output: str) -> None:
    toy = Toy()
    toy.run(make_config(output))
    calls, text = toy.run(make_config(output, sft={"loss_on": "all"}), "make")
    assert calls == ["make"]
    assert "removed what was made from it: double, aside, show" in text
    assert not storage.exists(storage.join(output, "double"))
    # Back to the first settings: nothing that was made from other inputs may count as finished.
    assert toy.run(make_config(output))[0][0] == "make"


def test_an_interrupted_stage_resumes_only_when_it_can_and_nothing_changed(output: str) -> None:
    toy = Toy()
    toy.fail_in = ValueError("broken")
    with pytest.raises(ValueError, match="broken") as caught:
        toy.run(make_config(output))
    assert caught.value.__notes__ == ["in stage 'double' (Double)"]
    toy.fail_in = None
    calls, text = toy.run(make_config(output), "double")
    assert calls == ["open", "double", "from checkpoint", "close"]
    assert "continues an interrupted attempt" in text

    toy.fail_in = ValueError("broken again")
    with pytest.raises(ValueError):
        toy.run(make_config(output, policy={"beta": 0.3}))
    toy.fail_in = None
    calls, _ = toy.run(make_config(output, policy={"beta": 0.7}), "double")
    assert "from nothing" in calls


def test_a_stop_from_outside_says_what_the_next_run_does(output: str) -> None:
    toy = Toy()
    toy.fail_in = KeyboardInterrupt()
    with pytest.raises(RunInterrupted, match=r"Stopped in stage 'double'.* last checkpoint; 1 finished"):
        toy.run(make_config(output))
    toy.fail_in = SystemExit(143)
    with pytest.raises(RunInterrupted) as caught:
        toy.run(make_config(output))
    assert caught.value.exit_code == 143


def test_a_lost_output_reruns_its_stage(output: str) -> None:
    toy = Toy()
    toy.run(make_config(output))
    storage.remove(storage.join(output, "double", "twice.json"))
    assert toy.run(make_config(output), "double")[0] == ["open", "double", "from nothing", "close"]


def test_targets_run_what_they_need_and_only_that(output: str) -> None:
    toy = Toy()
    assert toy.run(make_config(output), "aside")[0] == ["make", "aside"]
    with pytest.raises(ValueError, match=r"unknown stage 'doubel'. Did you mean 'double'"):
        toy.run(make_config(output), "doubel")


def test_the_resolved_config_is_written(output: str) -> None:
    config = make_config(output)
    Toy().run(config, "make")
    written = yaml.safe_load(storage.read_bytes(storage.join(output, "config.yaml")))
    assert RunConfig.model_validate(written) == config
    assert written["policy"]["beta"] == 0.1


def test_a_damaged_manifest_is_named(output: str) -> None:
    toy = Toy()
    toy.run(make_config(output), "make")
    storage.write_bytes(storage.join(output, "make", "manifest.json"), b"{")
    with pytest.raises(ValueError, match=r"make/manifest.json is damaged .* delete it"):
        toy.run(make_config(output), "make")


def test_a_stage_may_not_need_a_later_one() -> None:
    first = Stage("a", "A", Toy().aside, lambda c: None, needs=("b",))
    second = Stage("b", "B", Toy().aside, lambda c: None)
    with pytest.raises(AssertionError):
        Pipeline([first, second])


def test_fingerprints_ignore_order_and_see_every_part() -> None:
    base = fingerprint("sft", 1, 17, {"a": 1, "b": [1, 2]}, {"x": "1", "y": "2"})
    assert base == fingerprint("sft", 1, 17, {"b": [1, 2], "a": 1}, {"y": "2", "x": "1"})
    others = [
        fingerprint("sf", 1, 17, {"a": 1, "b": [1, 2]}, {"x": "1", "y": "2"}),
        fingerprint("sft", 2, 17, {"a": 1, "b": [1, 2]}, {"x": "1", "y": "2"}),
        fingerprint("sft", 1, 18, {"a": 1, "b": [1, 2]}, {"x": "1", "y": "2"}),
        fingerprint("sft", 1, 17, {"a": 1, "b": [2, 1]}, {"x": "1", "y": "2"}),
        fingerprint("sft", 1, 17, {"a": 1, "b": [1, 2]}, {"x": "1", "y": "3"}),
    ]
    assert len({base, *others}) == 6
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


def test_two_runs_may_not_share_an_output(output: str) -> None:
    toy = Toy()
    with run_lock(output), pytest.raises(RunLocked, match=rf"in use by another run \(process {os.getpid()} "):
        toy.run(make_config(output))
    assert toy.calls == []
    assert toy.run(make_config(output), "make")[0] == ["make"]


def test_the_expected_time_moves_from_last_time_to_the_own_pace() -> None:
    now = 0.0
    estimate = TimeEstimate(last_time=100.0, clock=lambda: now)
    assert estimate.total() == 100.0
    now = 10.0  # ten seconds until the first sign of progress, then 1 % a second
    estimate.observe(0.1)
    now = 50.0
    estimate.observe(0.5)
    own = 10.0 + 40.0 / 0.4 * 0.9
    assert estimate.total() == pytest.approx(0.5 * 100 + 0.5 * own)
    now = 1000.0
    assert estimate.total() is None  # longer than expected: nothing is known any more
    assert TimeEstimate(None).total() is None


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    with RunProgress(Console(file=text, width=200)) as run, run.stage("[1/2] Train", 30.0) as stage:
        monkeypatch.setattr("mahalo_ray.pipeline.progress.PLAIN_INTERVAL_S", 0.0)
        stage.training(5, 10, "steps", {"loss": 0.25})
        stage.start(4, "dialogues")
        stage.advance(2)
    lines = text.getvalue().splitlines()
    assert lines[0] == "[1/2] Train ... about 30 s"
    assert "[1/2] Train: 5/10 steps  loss 0.2500" in lines[1] and "left" in lines[1]
    assert "2/4 dialogues" in lines[-1]


def test_on_a_terminal_there_is_a_bar() -> None:
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True)
    with RunProgress(console) as run, run.stage("[1/2] Train", 30.0) as stage:
        stage.update(3, 10, "loss 0.5")
        assert run._bars is not None
        run._bars.refresh()
    assert "of ~30 s" in text.getvalue()
    assert "3/10" in text.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_shipped_example_loads() -> None:
    example = Path(__file__).parent.parent / "examples" / "quickstart.yaml"
    config = load_config(example)
    assert config.objective_names == ("accuracy", "engagement")
    assert len(config.sweep.weights) == 5
