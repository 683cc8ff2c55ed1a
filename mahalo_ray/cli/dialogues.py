"""`mahalo dialogues`: tutor-student dialogues, their candidate turns, and pairs made from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mahalo_ray.cli.common import Debug, Overrides, guarded, out, say
from mahalo_ray.config import load_document
from mahalo_ray.config.rollouts import DialoguesConfig

DialoguesFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML: who talks, about what.")]


def register(app: typer.Typer) -> None:
    """Add this verb to the command."""
    app.command()(dialogues)


def dialogues(config: DialoguesFile, set_: Overrides = None, debug: Debug = False) -> None:
    """Play tutor-student dialogues with K candidates per turn, score them and make preference pairs.

    Run again, it goes on where it stopped and plays failed dialogues again.
    """

    def work() -> None:
        from mahalo_ray.data import storage
        from mahalo_ray.pipeline.cluster import ray_session
        from mahalo_ray.pipeline.dialogues import check_sources, make_dialogues
        from mahalo_ray.pipeline.progress import RunProgress

        loaded = load_document(config, DialoguesConfig, set_)
        check_sources(loaded)
        manifest = make_dialogues(loaded, lambda: ray_session(loaded.cluster), RunProgress(out))
        figures = manifest.metrics
        say(f"dialogues: {figures['dialogues']}, candidates: {figures['candidates']}")
        if figures["failed"]:
            kinds = ", ".join(f"{kind} {count}" for kind, count in figures["failed"].items())
            say(f"failed: {kinds}; the same command plays them again")
        for name, path in manifest.outputs.items():
            say(f"{name}: {storage.join(loaded.output, path)}")

    guarded(work, debug)
