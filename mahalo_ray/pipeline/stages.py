"""The stage framework: what runs, what is skipped because it is finished, and what continues."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from mahalo_ray.config import RunConfig, dump_config
from mahalo_ray.data import storage
from mahalo_ray.objectives import unknown_name
from mahalo_ray.pipeline.fingerprint import Manifest, fingerprint, read_started, write_started
from mahalo_ray.pipeline.lock import run_lock
from mahalo_ray.pipeline.progress import RunProgress, StageProgress, duration

TIMINGS = "timings.json"

Session = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class StageResult:
    """What a stage hands on: numbers for people, and names for paths inside its folder."""

    metrics: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What a stage may look at while it runs."""

    config: RunConfig
    folder: str
    progress: StageProgress
    upstream: Mapping[str, tuple[str, Manifest]]

    def path(self, *parts: str) -> str:
        """A path or URL inside this stage's own folder."""
        return storage.join(self.folder, *parts)

    def input(self, stage: str, output: str) -> str:
        """Path or URL of an output of a stage that this one needs."""
        folder, manifest = self.upstream[stage]
        return storage.join(folder, manifest.outputs[output])

    def metrics_of(self, stage: str) -> dict[str, Any]:
        """Metrics of a stage that this one needs."""
        return self.upstream[stage][1].metrics


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    `config_of` returns the part of the configuration (JSON values) that the result depends on; `needs` names
    the stages whose outputs it reads. Raise `version` when its code makes something else of the same input.
    With `resumes` an unfinished attempt of the same fingerprint keeps its files; otherwise the stage begins
    with an empty folder.
    """

    name: str
    title: str
    run: Callable[[Context], StageResult]
    config_of: Callable[[RunConfig], Any]
    needs: tuple[str, ...] = ()
    version: int = 1
    uses_ray: bool = True
    resumes: bool = False


class RunInterrupted(KeyboardInterrupt):
    """The run was stopped from outside (Ctrl-C, SIGTERM); the message says what the next run does."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Pipeline:
    """Stages in the order they run in; each may need only stages before it."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = {stage.name: stage for stage in stages}
        assert len(self.stages) == len(stages), "two stages have the same name"
        seen: set[str] = set()
        for stage in stages:
            assert seen.issuperset(stage.needs), f"{stage.name} needs a later stage"
            seen.add(stage.name)

    def fingerprints(self, config: RunConfig) -> dict[str, str]:
        """Every stage's fingerprint under this configuration."""
        found: dict[str, str] = {}
        for stage in self.stages.values():
            upstream = {name: found[name] for name in stage.needs}
            section = stage.config_of(config)
            found[stage.name] = fingerprint(stage.name, stage.version, config.seed, section, upstream)
        return found

    def needed_for(self, targets: Iterable[str]) -> list[Stage]:
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

    def followers_of(self, name: str) -> list[Stage]:
        """The stages that need this one, directly or through others."""
        return [
            s
            for s in self.stages.values()
            if s.name != name and self.stages[name] in self.needed_for([s.name])
        ]

    def run(
        self,
        config: RunConfig,
        targets: Iterable[str] | None = None,
        *,
        session: Session,
        progress: RunProgress | None = None,
    ) -> dict[str, Manifest]:
        """Bring the targets (default: all stages) up to date; returns the manifests of all that they need.

        `session` opens Ray; it is entered before the first stage that uses Ray and has to run. Raises
        RunLocked when another run works in the same output, RunInterrupted when stopped from outside; errors
        of a stage come through with a note that names it.
        """
        todo = self.needed_for(self.stages if targets is None else targets)
        output = storage.absolute(config.output)
        with run_lock(output), progress or RunProgress() as display, contextlib.ExitStack() as ray:
            storage.write_bytes(storage.join(output, "config.yaml"), dump_config(config).encode())
            return _Run(self, config, output, display, session, ray).bring_up_to_date(todo)


class _Run:
    """One call of `Pipeline.run`."""

    def __init__(
        self,
        pipeline: Pipeline,
        config: RunConfig,
        output: str,
        display: RunProgress,
        session: Session,
        ray: contextlib.ExitStack,
    ) -> None:
        self.pipeline, self.config, self.output, self.display = pipeline, config, output, display
        self.session, self.ray, self.ray_is_open = session, ray, False
        self.fingerprints = pipeline.fingerprints(config)
        self.manifests: dict[str, Manifest] = {}

    def bring_up_to_date(self, todo: list[Stage]) -> dict[str, Manifest]:
        for number, stage in enumerate(todo, start=1):
            title = f"[{number}/{len(todo)}] {stage.title}"
            finished = self._finished(stage)
            if finished is not None:
                self.display.say(f"{title}: done before, skipped")
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

    def _folder(self, stage: Stage) -> str:
        return storage.join(self.output, stage.name)

    def _finished(self, stage: Stage) -> Manifest | None:
        """The stage's manifest if it was made from the same inputs and its outputs are all there."""
        folder = self._folder(stage)
        manifest = Manifest.read(folder)
        if manifest is None or manifest.fingerprint != self.fingerprints[stage.name]:
            return None
        there = all(storage.exists(storage.join(folder, path)) for path in manifest.outputs.values())
        return manifest if there else None

    def _execute(self, stage: Stage, title: str) -> Manifest:
        self._prepare_folder(stage, title)
        began = time.monotonic()
        timings = self._timings()
        with self.display.stage(title, timings.get(stage.name)) as progress:
            if stage.uses_ray and not self.ray_is_open:
                self.ray.enter_context(self.session())
                self.ray_is_open = True
            upstream = {name: (storage.join(self.output, name), self.manifests[name]) for name in stage.needs}
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

    def _prepare_folder(self, stage: Stage, title: str) -> None:
        """Clear what may not be reused: this stage's old files and everything that was made from them."""
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
        stale = [s for s in self.pipeline.followers_of(stage.name) if storage.exists(self._folder(s))]
        for follower in stale:
            storage.remove(self._folder(follower))
        if stale:
            self.display.say(f"  removed what was made from it: {', '.join(s.name for s in stale)}")
        write_started(folder, mine)

    def _timings(self) -> dict[str, float]:
        url = storage.join(self.output, TIMINGS)
        return dict(storage.read_json(url)) if storage.exists(url) else {}

    def _interrupted(self, stage: Stage, stop: BaseException) -> RunInterrupted:
        self.display.say("Stopping ...")
        how = "from its last checkpoint" if stage.resumes else "from its beginning"
        code = stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else 130
        return RunInterrupted(
            f"Stopped in stage '{stage.name}'. The same command goes on there, {how}; "
            f"{len(self.manifests)} finished stage(s) are kept in {self.output}.",
            code,
        )


def _in_thread(run: Callable[[Context], StageResult], context: Context) -> StageResult:
    """Run a stage beside the main thread, which stays free to hear Ctrl-C.

    In the main thread, Ray Train and Ray Tune put their own SIGINT handlers in place of Python's: they
    swallow the first Ctrl-C, and Ray Train never takes its handler away.
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stage")
    try:
        return executor.submit(run, context).result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
