"""`mahalo label` and `mahalo calibrate`: labels for the steps of traces, and judges that people checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mahalo_ray.cli.common import Debug, Overrides, err, guarded, out, say
from mahalo_ray.config import load_document
from mahalo_ray.config.label import LabelConfig

LabelFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML: what is labelled, who judges.")]


def register(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    for verb in (label, calibrate):
        app.command()(verb)


def label(config: LabelFile, set_: Overrides = None, debug: Debug = False) -> None:
    """Label the steps of traces for a process reward model: continuations, judges, or both.

    Run again, it goes on where it stopped.
    """

    def work() -> None:
        from mahalo_ray.data import storage
        from mahalo_ray.pipeline.cluster import ray_session
        from mahalo_ray.pipeline.labelling import make_labels
        from mahalo_ray.pipeline.progress import RunProgress

        loaded = load_document(config, LabelConfig, set_)
        manifest = make_labels(loaded, lambda: ray_session(loaded.cluster), RunProgress(out))
        print_labels(manifest.metrics)
        for name, path in manifest.outputs.items():
            say(f"{name}: {storage.join(loaded.output, path)}")

    guarded(work, debug)


def print_labels(figures: dict[str, Any]) -> None:
    """What a labelling job came to, in lines."""
    say(f"traces: {figures['traces']}")
    for name, judge in figures["judges"].items():
        made, without = (figures[kind].get(name, 0) for kind in ("labels", "unjudged"))
        say(f"{name}: {made} labels ({judge['supervision']}), {without} without verdict")
        if not judge["calibrated"]:
            err.print(
                f"[bold yellow]warning:[/] the judge of '{name}' is not calibrated (threshold "
                f"{judge['threshold']:g}): `mahalo calibrate` fits it to human ratings"
            )
    sampling = figures["sampling"]
    if sampling:
        say(
            f"continuations: {sampling['samples']} of at most {sampling['samples_full']} "
            f"({sampling['samples_saved']:.0%} saved), for {sampling['prefixes']} distinct prefixes of "
            f"{sampling['steps']}"
        )
    for name, asked in figures["endpoints"].items():
        cost = "" if asked["cost"] is None else f", cost {asked['cost']:.4g}"
        say(f"{name}: {asked['requests']} requests, {sum(asked['failures'].values())} failed{cost}")


def calibrate(config: LabelFile, set_: Overrides = None, debug: Debug = False) -> None:
    """Fit a judge's threshold to human ratings, and report how well the judge agrees with them."""

    def work() -> None:
        from mahalo_ray.pipeline.judging import calibrate_judge

        url, found = calibrate_judge(load_document(config, LabelConfig, set_))
        ratings = f"{found['ratings']} ratings ({found['positive']} positive)"
        say(f"threshold {found['threshold']:.4g} from {ratings}")
        for name, figure in found["agreement"].items():
            shown = "undefined" if figure is None else "{value:.3f} [{low:.3f}, {high:.3f}]".format(**figure)
            say(f"{name}: {shown}")
        say(f"({found['method']})")
        say(f"calibration: {url}")

    guarded(work, debug)
