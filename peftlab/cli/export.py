"""peftlab export: the winner, to take away."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from peftlab.cli.base import Verb
from peftlab.cli.options import json_option, root_option
from peftlab.cli.output import answer, say


@click.command(
    cls=Verb,
    examples=[
        "peftlab export movie-sentiment/lora --to exports/lora",
        "peftlab export runs/movie-sentiment/lora/1f0c5d2e9b7a-s0 --to exports/lora",
        "peftlab export movie-sentiment/ptuning-v2 --to exports/prefix --format adapter",
    ],
)
@click.argument("run")
@click.option(
    "--to", required=True, type=click.Path(path_type=Path), help="Folder to write; a new one."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["merged", "adapter"]),
    default="merged",
    show_default=True,
    help="A plain transformers model, or an adapter that PEFT loads.",
)
@root_option
@json_option
def export(run: str, to: Path, form: Literal["merged", "adapter"], root: Path) -> None:
    """Export a run as a model or an adapter.

    It is reloaded from disk without peftlab and must predict the same. RUN is a folder,
    "task/recipe" (its latest finished run) or the start of a run's hash. Exit code 1, and nothing
    is written, if the export predicts otherwise. --json prints merge_report.json and "export_dir".
    """
    from peftlab.exporting import export as run_export

    result = run_export(run, to, format=form, root=root)
    report = result.report
    answer({**report.model_dump(mode="json"), "export_dir": str(result.folder)})
    if result.already_there:
        say("this run was exported there before; nothing was written")
    difference = report.largest_logit_difference
    largest = "none" if difference is None else f"{difference:.3g}"
    say(
        f"reloaded without peftlab on {report.rows} validation rows: {report.verdict}; "
        f"largest logit difference {largest}, tolerance {report.tolerance:.3g}"
    )
    if report.agreement_of_predictions is not None:
        say(f"predictions that agree: {report.agreement_of_predictions:.2%}")
    say(f"exported: {result.folder}")


COMMAND = export
