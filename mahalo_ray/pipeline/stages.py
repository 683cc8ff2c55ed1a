"""The stage framework: what runs, what is skipped because it is finished, and what continues."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar, cast

from mahalo_ray.config import Section, dump_config
from mahalo_ray.data import storage
from mahalo_ray.data.rows import ReadReport, describe_account
from mahalo_ray.data.storage import run_lock
from mahalo_ray.objectives import unknown_name
from mahalo_ray.pipeline.outputs import check_inputs, check_output, sign_output
from mahalo_ray.pipeline.progress import RunProgress, StageProgress, duration

MANIFEST = "manifest.json"
STARTED = "started.json"


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. NaN is a ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def fingerprint(name: str, version: int, seed: int, config: Any, upstream: Mapping[str, str]) -> str:
    """sha256 (hex) over everything a stage's result depends on.

    `version` is the stage's own format version: raised when its code makes something else of the same input.
    `config` is the part of the configuration that matters to it, `upstream` the fingerprints it builds on.
    """
    parts = {"stage": name, "version": version, "seed": seed, "config": config, "upstream": dict(upstream)}
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """Written last, so that a stage with a manifest is a finished one.

    `outputs` maps a name to a path inside the stage's folder; `seconds` is the wall time of the whole stage.
    """

    stage: str
    fingerprint: str
    outputs: dict[str, str]
    metrics: dict[str, Any]
    seconds: float

    def write(self, folder: str) -> None:
        """Write it into the stage's folder (atomic)."""
        storage.write_json(storage.join(folder, MANIFEST), asdict(self))

    @classmethod
    def read(cls, folder: str) -> Manifest | None:
        """The folder's manifest, None when there is none. Raises ValueError when it cannot be understood."""
        url = storage.join(folder, MANIFEST)
        if not storage.exists(url):
            return None
        try:
            return cls(**storage.read_json(url))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{url} is damaged ({error}): delete it to run the stage again") from error


def write_started(folder: str, value: str) -> None:
    """Record the fingerprint of the attempt that is about to work in this folder."""
    storage.write_json(storage.join(folder, STARTED), {"fingerprint": value})


def read_started(folder: str) -> str | None:
    """The fingerprint of the last attempt begun in this folder, None when there was none."""
    url = storage.join(folder, STARTED)
    return str(storage.read_json(url)["fingerprint"]) if storage.exists(url) else None


TIMINGS = "timings.json"

Session = Callable[[], contextlib.AbstractContextManager[None]]


class PipelineConfig(Protocol):
    """A configuration that stages are run for: a Section with these two."""

    @property
    def output(self) -> str: ...

    @property
    def seed(self) -> int: ...


ConfigT = TypeVar("ConfigT", bound=PipelineConfig)


@dataclass(frozen=True)
class StageResult:
    """What a stage hands on: numbers for people, and names for paths inside its folder."""

    metrics: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Context(Generic[ConfigT]):
    """What a stage may look at while it runs."""

    config: ConfigT
    folder: str
    progress: StageProgress
    upstream: Mapping[str, tuple[str, Manifest]]

    def path(self, *parts: str) -> str:
        """A path or URL inside this stage's own folder."""
        return storage.join(self.folder, *parts)

    def output_path(self, *parts: str) -> str:
        """A path or URL in the output folder, for what users look for there."""
        return storage.join(storage.absolute(self.config.output), *parts)

    def input(self, stage: str, output: str) -> str:
        """Path or URL of an output of a stage that this one needs."""
        folder, manifest = self.upstream[stage]
        return storage.join(folder, manifest.outputs[output])

    def account(self, report: ReadReport) -> dict[str, Any]:
        """Print what became of every file and row that was read; returns the same as numbers."""
        for line in report.describe():
            self.progress.say(line)
        return report.as_json()

    def metrics_of(self, stage: str) -> dict[str, Any]:
        """Metrics of a stage that this one needs."""
        return self.upstream[stage][1].metrics


@dataclass(frozen=True)
class Stage(Generic[ConfigT]):
    """One step of a pipeline.

    `config_of` returns the part of the configuration (JSON values) that the result depends on; `needs` names
    the stages whose outputs it reads. Raise `version` when its code makes something else of the same input.
    With `resumes` an unfinished attempt of the same fingerprint keeps its files; otherwise the stage begins
    with an empty folder. With `in_output` its folder is the output itself, which nothing may clear: the stage
    always runs, and finds out by itself what is finished (see `ChunkJob`).
    """

    name: str
    title: str
    run: Callable[[Context[ConfigT]], StageResult]
    config_of: Callable[[ConfigT], Any]
    needs: tuple[str, ...] = ()
    version: int = 1
    uses_ray: bool = True
    resumes: bool = False
    in_output: bool = False


class RunInterrupted(KeyboardInterrupt):
    """The run was stopped from outside (Ctrl-C, SIGTERM); the message says what the next run does."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM raises SystemExit(143) in the main thread while the block runs, as Ctrl-C raises
    KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Pipeline(Generic[ConfigT]):
    """Stages in the order they run in; each may need only stages before it.

    `holds`, for a pipeline whose last stage is `in_output`, says what the output holds. It was expensive to
    make: an output of other settings or input is refused, where other pipelines run the changed stages again.
    """

    def __init__(self, stages: Sequence[Stage[ConfigT]], holds: str | None = None) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self.holds = holds
        assert len(self.stages) == len(stages), "two stages have the same name"
        assert not any(stage.in_output for stage in stages[:-1]), "only the last stage may have the output"
        seen: set[str] = set()
        for stage in stages:
            assert seen.issuperset(stage.needs), f"{stage.name} needs a later stage"
            seen.add(stage.name)

    def fingerprints(self, config: ConfigT) -> dict[str, str]:
        """Every stage's fingerprint under this configuration."""
        made: dict[str, str] = {}
        for stage in self.stages.values():
            upstream = {name: made[name] for name in stage.needs}
            section = stage.config_of(config)
            made[stage.name] = fingerprint(stage.name, stage.version, config.seed, section, upstream)
        return made

    def needed_for(self, targets: Iterable[str]) -> list[Stage[ConfigT]]:
        """The targets and everything they need, in running order. An unknown target is a ValueError."""
        wanted: set[str] = set()
        waiting = list(targets)
        while waiting:
            name = waiting.pop()
            if name not in self.stages:
                raise ValueError(unknown_name("stage", name, self.stages))
            wanted.add(name)
            waiting.extend(self.stages[name].needs)
        return [stage for stage in self.stages.values() if stage.name in wanted]

    def followers_of(self, name: str) -> list[Stage[ConfigT]]:
        """The stages that need this one, directly or through others."""
        return [
            s
            for s in self.stages.values()
            if s.name != name and self.stages[name] in self.needed_for([s.name])
        ]

    def run(
        self,
        config: ConfigT,
        targets: Iterable[str] | None = None,
        *,
        session: Session,
        progress: RunProgress | None = None,
    ) -> dict[str, Manifest]:
        """Bring the targets (default: all stages) up to date; returns the manifests of all that they need.

        `session` opens Ray; it is entered before the first stage that uses Ray and has to run. Raises
        RunLocked when another run works in the same output, ConfigError when the output holds files that
        mahalo did not make, or something that is read (see `check_output`), ValueError when it holds what
        other settings made and that is kept, RunInterrupted when stopped from outside; errors of a stage come
        through with a note that names it.
        """
        todo = self.needed_for(self.stages if targets is None else targets)
        check_output(config.output, [stage.name for stage in self.stages.values() if not stage.in_output])
        check_inputs(cast("Section", config), config.output)
        output = storage.absolute(config.output)
        with run_lock(output), progress or RunProgress() as display, contextlib.ExitStack() as ray:
            runner = StageRunner(self, config, output, display, session, ray)
            sign_output(output)
            if self.holds is not None:
                claim_output(output, runner.fingerprints[list(self.stages)[-1]], self.holds)
            resolved = dump_config(cast("Section", config))
            storage.write_bytes(storage.join(output, "config.yaml"), resolved.encode())
            return runner.bring_up_to_date(todo)


class StageRunner(Generic[ConfigT]):
    """One call of `Pipeline.run`."""

    def __init__(
        self,
        pipeline: Pipeline[ConfigT],
        config: ConfigT,
        output: str,
        display: RunProgress,
        session: Session,
        ray: contextlib.ExitStack,
    ) -> None:
        self.pipeline, self.config, self.output, self.display = pipeline, config, output, display
        self.session, self.ray, self.ray_is_open = session, ray, False
        self.fingerprints = pipeline.fingerprints(config)
        self.manifests: dict[str, Manifest] = {}

    def bring_up_to_date(self, todo: list[Stage[ConfigT]]) -> dict[str, Manifest]:
        for number, stage in enumerate(todo, start=1):
            title = f"[{number}/{len(todo)}] {stage.title}"
            finished = self._finished(stage)
            if finished is not None:
                self.display.say(f"{title}: done before, skipped")
                for line in describe_account(finished.metrics["data"]) if "data" in finished.metrics else ():
                    self.display.say(line)
                self.manifests[stage.name] = finished
                continue
            try:
                self.manifests[stage.name] = self._execute(stage, title)
            except (KeyboardInterrupt, SystemExit) as stop:
                raise self._interrupted(stage, stop) from stop
            except Exception as error:
                error.add_note(f"in stage '{stage.name}' ({stage.title})")
                raise
        return self.manifests

    def _folder(self, stage: Stage[ConfigT]) -> str:
        return self.output if stage.in_output else storage.join(self.output, stage.name)

    def _finished(self, stage: Stage[ConfigT]) -> Manifest | None:
        """The stage's manifest if it was made from the same inputs and its outputs are all there."""
        folder = self._folder(stage)
        manifest = None if stage.in_output else Manifest.read(folder)
        if manifest is None or manifest.fingerprint != self.fingerprints[stage.name]:
            return None
        there = all(storage.exists(storage.join(folder, path)) for path in manifest.outputs.values())
        return manifest if there else None

    def _execute(self, stage: Stage[ConfigT], title: str) -> Manifest:
        self._prepare_folder(stage, title)
        began = time.monotonic()
        timings = self._timings()
        with self.display.stage(title, timings.get(stage.name)) as progress:
            if stage.uses_ray and not self.ray_is_open:
                self.ray.enter_context(self.session())
                self.ray_is_open = True
            upstream = {
                name: (self._folder(self.pipeline.stages[name]), self.manifests[name]) for name in stage.needs
            }
            context = Context(self.config, self._folder(stage), progress, upstream)
            result = _in_thread(stage.run, context)
        seconds = round(time.monotonic() - began, 3)
        manifest = Manifest(
            stage.name, self.fingerprints[stage.name], result.outputs, result.metrics, seconds
        )
        manifest.write(context.folder)
        storage.write_json(storage.join(self.output, TIMINGS), {**timings, stage.name: seconds})
        self.display.say(f"{title}: done in {duration(seconds)}")
        return manifest

    def _prepare_folder(self, stage: Stage[ConfigT], title: str) -> None:
        """Clear what may not be reused: this stage's old files and everything that was made from them."""
        if stage.in_output:
            return
        folder, mine = self._folder(stage), self.fingerprints[stage.name]
        unfinished = Manifest.read(folder) is None and read_started(folder) == mine
        if unfinished and stage.resumes:
            self.display.say(f"{title}: continues an interrupted attempt")
        elif unfinished:
            self.display.say(f"{title}: was interrupted, starts again")
        elif storage.exists(folder):
            self.display.say(f"{title}: its settings or inputs have changed, runs again")
        if not (unfinished and stage.resumes):
            storage.remove(folder)
        followers = [s for s in self.pipeline.followers_of(stage.name) if not s.in_output]
        stale = [s for s in followers if storage.exists(self._folder(s))]
        for follower in stale:
            storage.remove(self._folder(follower))
        if stale:
            self.display.say(f"  removed what was made from it: {', '.join(s.name for s in stale)}")
        write_started(folder, mine)

    def _timings(self) -> dict[str, float]:
        url = storage.join(self.output, TIMINGS)
        return dict(storage.read_json(url)) if storage.exists(url) else {}

    def _interrupted(self, stage: Stage[ConfigT], stop: BaseException) -> RunInterrupted:
        self.display.say("Stopping ...")
        how = "from its last checkpoint" if stage.resumes else "from its beginning"
        code = stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else 130
        return RunInterrupted(
            f"Stopped in stage '{stage.name}'. The same command goes on there, {how}; "
            f"{len(self.manifests)} finished stage(s) are kept in {self.output}.",
            code,
        )


def _in_thread(run: Callable[[Context[ConfigT]], StageResult], context: Context[ConfigT]) -> StageResult:
    """Run a stage beside the main thread, which stays free to hear Ctrl-C.

    In the main thread, Ray Train and Ray Tune put their own SIGINT handlers in place of Python's: they
    swallow the first Ctrl-C, and Ray Train never takes its handler away.
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stage")
    try:
        return executor.submit(run, context).result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def claim_output(output: str, fingerprint: str, holds: str) -> None:
    """Begin, or go on with, the job of this fingerprint in `output`.

    ValueError if the output holds what another job made: `holds`, of other settings or input.
    """
    if read_started(output) not in (None, fingerprint):
        raise ValueError(
            f"'{output}' holds {holds} of other settings or input: give another 'output', or delete it"
        )
    write_started(output, fingerprint)
