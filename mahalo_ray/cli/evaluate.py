"""`mahalo evaluate CONFIG`, the stage of a run, and `mahalo evaluate reward MODEL DATA...`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mahalo_ray.cli.common import Debug, guarded, out, say
from mahalo_ray.cli.stages import stage_verb

_STAGE = "stage"


class _StageUnlessNamed(TyperGroup):
    """What names no verb of this group is the configuration of a run. (`ctx`: typer carries a click of its
    own.)"""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = [_STAGE, *args]
        return super().parse_args(ctx, args)


def register(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    group = typer.Typer(
        cls=_StageUnlessNamed,
        no_args_is_help=True,
        help="`evaluate CONFIG`: evaluate SFT, each head alone and guided decoding of a run. "
        "`evaluate reward`: figures of a reward model.",
    )
    group.command(_STAGE, hidden=True)(stage_verb("evaluate"))
    group.command("reward")(reward)
    app.add_typer(group, name="evaluate")


def reward(
    model: Annotated[str, typer.Argument(help="A reward model's folder, or a foreign one's (or hub id).")],
    data: Annotated[list[str], typer.Argument(help="Files or folders of step traces or preference pairs.")],
    objective: Annotated[
        str | None, typer.Option(help="Of rows that name none; what a foreign model scores.")
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="Of step traces; default: by their fields.")
    ] = "auto",
    threshold_from: Annotated[
        list[str] | None,
        typer.Option(help="Other data, on which the threshold of the first error is chosen."),
    ] = None,
    output: Annotated[str, typer.Option(help="Folder for JSON, picture and bad rows.")] = "reward_evaluation",
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    max_bad_fraction: Annotated[float, typer.Option(min=0, max=1)] = 0.01,
    debug: Debug = False,
) -> None:
    """Figures of a reward model on data it was not trained on, each with n and interval."""

    def work() -> None:
        from mahalo_ray.evaluation.reward_report import evaluate_scorer, print_report
        from mahalo_ray.models.classifiers import is_own_model, load_scorer

        scorer = load_scorer(model, None if is_own_model(model) else objective, device=device)
        evaluate_scorer(
            scorer, data, objective, format_, threshold_from or [], output, batch_size, max_bad_fraction
        )
        print_report(out, output)
        say(f"figures and picture: {output}")

    guarded(work, debug)
