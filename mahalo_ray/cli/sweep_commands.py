"""The verbs about the fronts of finished runs: `mahalo front` and `mahalo portfolio`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from mahalo_ray.cli.common import Debug, guarded, open_session, out, say
from mahalo_ray.config import Aggregation, Threshold
from mahalo_ray.data import storage
from mahalo_ray.objectives import Weights, unknown_name

Runs = Annotated[list[str], typer.Argument(metavar="RUN...", help="Output folders of finished runs.")]
ScaleOption = Annotated[
    str,
    typer.Option(
        "--scale",
        help="`none`: the objectives' own units; `range`: divided by their ranges over all points.",
    ),
]


def register_sweep_verbs(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command()(front)
    app.command()(portfolio)


def front(
    runs: Runs,
    output: Annotated[
        str | None,
        typer.Option(help="Folder for the pictures. Default: `front` in the run; needed for several runs."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Reference point: accuracy=0.05,engagement=0.3. Default: all 0.")
    ] = None,
    scale: ScaleOption = "none",
    weights: Annotated[
        str | None,
        typer.Option(help="Also choose the best point at this balance: accuracy=0.5,engagement=0.5."),
    ] = None,
    at_least: Annotated[
        str | None,
        typer.Option(
            help="Choose among the points that reach this, the most important first, in the objectives' own "
            "units: accuracy=0.2. With no --weights the rest is weighed alike."
        ),
    ] = None,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999)] = 0.95,
    resamples: Annotated[int, typer.Option(min=50, max=100_000)] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 17,
    debug: Debug = False,
) -> None:
    """The fronts of one or several finished runs: figures with intervals, a picture, and a page to turn."""

    def work() -> None:
        from mahalo_ray.pipeline.evaluating import wide_enough
        from mahalo_ray.pipeline.outputs import check_writable
        from mahalo_ray.sweeps.front_report import (
            choose_point,
            fronts_of_run,
            measure_fronts,
            print_fronts,
            write_fronts,
        )

        if output is None and len(runs) > 1:
            raise ValueError("several runs have no folder in common: give --output")
        folder = output or storage.join(runs[0], "front")
        check_writable(folder)
        fronts = [found for run in runs for found in fronts_of_run(run, named=len(runs) > 1)]
        document = measure_fronts(
            fronts, parse_point(reference), check_scale(scale), confidence, resamples, seed
        )
        print_fronts(wide_enough(out), document)
        if weights is not None or at_least is not None:
            balance = None if weights is None else Weights.parse(weights)
            say(choose_point(document, balance, _aggregation(parse_point(at_least))))
        for file in write_fronts(folder, document):
            say(file)

    guarded(work, debug)


def portfolio(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Output folder of a finished run.")],
    eps: Annotated[
        float | None, typer.Option(min=0, max=1, help="Relative loss allowed, e.g. 0.015.")
    ] = None,
    delta: Annotated[float | None, typer.Option(min=0, help="Absolute loss allowed on top.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Instead of eps: at most so many members.")] = None,
    scale: ScaleOption = "none",
    policies: Annotated[
        str | None,
        typer.Option(
            help="`swept`: this policy at the weights of the sweep; `trained`: those trained for one balance "
            "each ('sweep.kind: training'); `both`. Default: `swept` where there are any."
        ),
    ] = None,
    evaluate: Annotated[
        int, typer.Option(min=0, help="Most further policies to play, each where least is certified.")
    ] = 0,
    tolerance: Annotated[
        float, typer.Option(min=0, help="With --evaluate: certified loss that is small enough.")
    ] = 0.0,
    weights: Annotated[
        str | None, typer.Option(help="Show the member and certified loss here: accuracy=.6,engagement=.4.")
    ] = None,
    check: Annotated[
        int,
        typer.Option(
            min=0, help="Play the portfolio on new problems, against the policy at so many random weights."
        ),
    ] = 0,
    dialogues: Annotated[
        int | None, typer.Option(min=2, help="With --check: new problems. Default: evaluation.dialogues.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="With --check: of the random weights.")] = 17,
    debug: Debug = False,
) -> None:
    """A few policies of a finished run of which one is nearly the best at every balance; saved in the run.

    With --weights or --check alone, the saved portfolio is asked.
    """

    def work() -> None:
        from mahalo_ray.pipeline import portfolios
        from mahalo_ray.pipeline.evaluating import wide_enough
        from mahalo_ray.pipeline.progress import RunProgress
        from mahalo_ray.sweeps import Portfolio

        console = wide_enough(out)
        asked = None if weights is None else Weights.parse(weights)
        makes_one = (eps, delta, size) != (None, None, None) or evaluate > 0

        def checked(chosen: Portfolio) -> None:
            from mahalo_ray.pipeline.portfolio_checks import check_portfolio, print_check

            with RunProgress(out) as display, display.stage("Play on new problems") as progress:
                progress.start(0, "methods")
                found = check_portfolio(run, chosen, check, dialogues, seed, open_session, progress.update)
            print_check(console, found)

        if dialogues is not None and not check:
            raise ValueError("--dialogues is for --check: give it a number of random weights")
        if (asked is not None or check) and not makes_one:
            saved = Portfolio.of_run(run)
            if asked is not None:
                portfolios.print_choice(console, saved, asked)
            if check:
                with storage.run_lock(storage.absolute(run)):
                    checked(saved)
            return
        if (eps, delta, size) == (None, None, None):
            raise ValueError("say how good or how large it has to be: --eps (and --delta), or --size")
        demand = portfolios.PortfolioDemand(eps, delta, size, check_scale(scale))
        found = portfolios.candidates_of(run, policies)
        with storage.run_lock(storage.absolute(run)):
            if evaluate:
                with RunProgress(out) as display, display.stage("Play further policies") as progress:
                    progress.start(0, "methods")
                    count = portfolios.split_worst_cells(
                        run, found, demand, tolerance, evaluate, open_session, progress.update
                    )
                say(f"further policies: {count}")
            chosen = found.choose(demand)
            files = portfolios.save_portfolio(run, found, demand, chosen)
            if check:
                checked(chosen)
        portfolios.print_portfolio(console, chosen)
        if asked is not None:
            portfolios.print_choice(console, chosen, asked)
        for file in files:
            say(file)

    guarded(work, debug)


def _aggregation(at_least: Mapping[str, float] | None) -> Aggregation:
    """The weighted sum, among what reaches these thresholds where there are some."""
    if not at_least:
        return Aggregation()
    thresholds = [Threshold(objective=name, at_least=number) for name, number in at_least.items()]
    return Aggregation(kind="thresholds", thresholds=thresholds)


def parse_point(text: str | None) -> dict[str, float] | None:
    """`accuracy=0.05,engagement=0.3` as numbers by objective. ValueError naming the part that is none."""
    if text is None:
        return None
    point: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        try:
            point[name] = float(number)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise ValueError(f"cannot read '{part}' of '{text}': write objective=number")
    return point


def check_scale(name: str) -> str:
    """The scale of that name. ValueError for another."""
    if name not in ("none", "range"):
        raise ValueError(unknown_name("scale", name, ("none", "range")))
    return name
