"""What a run shows while it works: stage k of n, a bar, and the time it is expected to take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

PLAIN_INTERVAL_S = 20.0


def duration(seconds: float) -> str:
    """`48 s`, `3 min 20 s`, `2 h 05 min`: as short as it can be read."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class TimeEstimate:
    """Expected total seconds of a stage: first what it took last time, then more and more its own pace.

    With f the share done, the estimate is (1 - f) * last time + f * (start-up + pace * total); the time
    before the first sign of progress (workers starting) counts as start-up, not as pace.
    """

    def __init__(self, last_time: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._last_time, self._begin = clock, last_time, clock()
        self._first: tuple[float, float] | None = None  # time and share of the first sign of progress
        self._latest = (self._begin, 0.0)

    @property
    def elapsed(self) -> float:
        """Seconds since the stage began."""
        return self._clock() - self._begin

    def observe(self, share: float) -> None:
        """Take note that `share` (0 to 1) of the work is done now."""
        self._latest = (self._clock(), share)
        if self._first is None and share > 0:
            self._first = self._latest

    def restart(self) -> None:
        """Another part of the stage begins: its pace is measured anew."""
        self._first, self._latest = None, (self._clock(), 0.0)

    def total(self) -> float | None:
        """Expected seconds for the whole stage; None while nothing is known, or more time has passed."""
        own, last, share = self._own_total(), self._last_time, self._latest[1]
        if own is None or last is None:
            expected = last if own is None else own
        else:
            expected = (1 - share) * last + share * own
        return expected if expected is not None and expected >= self.elapsed else None

    def _own_total(self) -> float | None:
        if self._first is None:
            return None
        (begin, first_share), (now, share) = self._first, self._latest
        if share <= first_share:
            return None
        return (begin - self._begin) + (now - begin) * (1 - first_share) / (share - first_share)


class StageProgress:
    """One stage's bar. A stage says `start(total, unit)` and then `advance(n)` or `update(done)`.

    Calls may come from any thread. A stage of several parts calls `start` again for each.
    """

    def __init__(self, title: str, last_time: float | None, console: Console, bars: Progress | None) -> None:
        self.title = title
        self._console, self._bars = console, bars
        self.estimate = TimeEstimate(last_time)
        self._unit, self._done, self._total = "", 0.0, 0.0
        self._last_line = time.monotonic()
        self._task: TaskID | None = None
        if bars is not None:
            self._task = bars.add_task(title, total=None, note="starting", estimate=self.estimate)
        else:
            expected = self.estimate.total()
            self.say(f"{title} ..." + (f" about {duration(expected)}" if expected else ""))

    def start(self, total: float, unit: str = "steps", note: str = "") -> None:
        """The work that now begins has `total` units."""
        self._unit, self._done, self._total = unit, 0.0, float(total)
        self.estimate.restart()
        self._show(note)

    def advance(self, n: float = 1, note: str = "") -> None:
        """`n` more units are done."""
        self.update(self._done + n, note=note)

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        """`done` units of `total` (default: as started) are done; `note` stands beside the bar."""
        self._done = done
        if total is not None:
            self._total = float(total)
        if self._total > 0:
            self.estimate.observe(min(done / self._total, 1.0))
        self._show(note)

    def training(self, done: int, total: int, unit: str, metrics: Mapping[str, float]) -> None:
        """For training stages: `done` of `total` optimiser steps, or of what comes before them, with these
        metrics."""
        if unit != self._unit:
            self._unit = unit
            self.estimate.restart()
        note = f"loss {metrics['loss']:.4f}" if "loss" in metrics else ""
        self.update(done, total, note)

    def say(self, message: str) -> None:
        """Print a line that stays, above the bar."""
        self._console.print(message, markup=False, soft_wrap=True)

    def _show(self, note: str) -> None:
        amount = f"{self._done:.0f}/{self._total:.0f} {self._unit}" if self._total else ""
        text = "  ".join(filter(None, (amount, note)))
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=self._done, total=self._total or None, note=text)
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_INTERVAL_S:
            self._last_line = now
            self.say(f"{self.title}: {text}{self._remaining()}")

    def _remaining(self) -> str:
        total = self.estimate.total()
        return "" if total is None else f", about {duration(max(total - self.estimate.elapsed, 0))} left"

    def close(self) -> None:
        """Take the bar away."""
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)


class RunProgress:
    """The display of one run: bars on a terminal, a plain line now and then elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._bars: Progress | None = None
        if self.console.is_terminal:
            columns = [
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                BarColumn(bar_width=20),
                _Expected(table_column=Column(no_wrap=True)),
                TextColumn(
                    "{task.fields[note]}",
                    style="dim",
                    markup=False,
                    table_column=Column(no_wrap=True, overflow="ellipsis"),
                ),
            ]
            self._bars = Progress(*columns, console=self.console, transient=True)

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, message: str) -> None:
        """Print a line that stays."""
        self.console.print(message, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, title: str, last_time: float | None = None) -> Iterator[StageProgress]:
        """Show one stage while the block runs. `last_time`: the seconds it took last time, if known."""
        progress = StageProgress(title, last_time, self.console, self._bars)
        try:
            yield progress
        finally:
            progress.close()


class _Expected(ProgressColumn):
    """Elapsed and expected time of the stage."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        estimate: TimeEstimate = task.fields["estimate"]
        total = estimate.total()
        expected = "" if total is None else f" of ~{duration(total)}"
        return Text(duration(estimate.elapsed) + expected)
