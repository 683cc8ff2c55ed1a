"""The command `mahalo`: one verb per stage, `run` for all, `serve`, and verbs around models and data."""

from __future__ import annotations

import gc
import logging
from typing import Annotated, NoReturn

import typer

from mahalo_ray import __version__
from mahalo_ray.cli.commands import register
from mahalo_ray.cli.common import provide_home, say
from mahalo_ray.cli.sweep_commands import register_sweep_verbs

app = typer.Typer(
    name="mahalo",
    help="Multi-objective alignment of language models on Ray, with per-request weights. "
    "Every verb first runs what it needs; finished stages are skipped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
register(app)
register_sweep_verbs(app)


def main() -> NoReturn:
    """Entry point of the command. Exit codes: 0 done, 2 wrong input, 130 Ctrl-C, 143 SIGTERM, 1 a stage
    that failed for good, or a defect."""
    gc.set_threshold(10_000)  # as in the workers: see the package's `__init__`
    provide_home()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    app()
    raise AssertionError("typer exits by itself")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        say(f"mahalo_ray {__version__}")
        raise typer.Exit
