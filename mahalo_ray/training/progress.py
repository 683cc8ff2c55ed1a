"""News from the workers to the driver while `TorchTrainer.fit` runs.

Ray Train calls the callback below inside its controller, which lives on the driver's node: a file there is
all the channel that is needed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.train import Checkpoint, UserCallback

# (done, in all, of what: "steps", or what comes before the first; metrics of the last report)
ProgressFunction = Callable[[int, int, str, dict[str, float]], None]

# What would come again on every retry: wrong input or a programming error. A lost process, a broken
# connection, a hiccup of the storage or of the device are RuntimeErrors, OSErrors or Ray's own.
FINAL_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ImportError,
    FileNotFoundError,
)

logger = logging.getLogger(__name__)


class ProgressFile(UserCallback):
    """Controller side: appends one JSON line per report or failure.

    An error that would come again is not worth the retries of FailureConfig. Raised here, it ends the run;
    unless another worker failed for another reason, of which it may be a consequence.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Pass rank 0's report on."""
        self._append({"report": metrics[0]})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Pass the failure on, or end the run."""
        errors = dict(sorted(worker_exceptions.items()))
        if all(isinstance(error, FINAL_ERRORS) for error in errors.values()):
            raise next(iter(errors.values()))
        self._append({"failures": {rank: _first_line(error) for rank, error in errors.items()}})

    def _append(self, news: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(news) + "\n")


class ProgressReader:
    """Driver side: hands complete new lines to the progress function, failures to the log."""

    def __init__(self, path: Path, stage: str, progress: ProgressFunction | None) -> None:
        self._path, self._stage, self._progress = path, stage, progress
        self._read = 0

    def poll(self) -> None:
        """Read what is new."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            if not line.endswith(b"\n"):
                return
            self._read += len(line)
            self._tell(json.loads(line))

    def _tell(self, news: dict[str, Any]) -> None:
        if "failures" in news:
            what = "; ".join(f"worker {rank}: {text}" for rank, text in news["failures"].items())
            logger.warning("%s: training failed (%s); it goes on from the last checkpoint", self._stage, what)
        elif self._progress is not None:
            report = news["report"]
            self._progress(report["done"], report["of"], report["unit"], report.get("metrics", {}))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
