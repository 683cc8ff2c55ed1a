"""The verb that compares MAH-DPO with its baselines."""

from __future__ import annotations

import typer

from mahalo_ray.cli.common import ConfigFile, Debug, Overrides, guarded, load, out
from mahalo_ray.cli.stages import execute
from mahalo_ray.config import ConfigError


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    app.command()(compare)


def compare(config: ConfigFile, set_: Overrides = None, debug: Debug = False) -> None:
    """Train the baselines ('compare'), and compare all methods in one table and picture."""

    def work() -> None:
        from mahalo_ray.pipeline.compare import REPORT, comparison_pipeline, print_comparison

        loaded = load(config, set_)
        if loaded.data is not None:
            raise ConfigError("a run on own data ('data') has no students to play, and so no table")
        manifests = execute(comparison_pipeline(loaded), loaded, (REPORT,))
        print_comparison(out, loaded, manifests)

    guarded(work, debug)
