"""The processes that a test has started, seen from outside: any of them may end while one looks at it."""

from __future__ import annotations

import psutil


def command_line(process: psutil.Process) -> str | None:
    """What it was started as, or `None` when it has ended."""
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return None


def started_here(part: str, pid: int | None = None) -> list[psutil.Process]:
    """The running descendants of the process (this one unless told) with that part in their command line."""
    descendants = psutil.Process(pid).children(recursive=True)
    return [process for process in descendants if part in (command_line(process) or "")]
