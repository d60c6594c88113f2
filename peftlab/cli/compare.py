"""peftlab compare: recipes × seeds on one task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from peftlab.cli.base import Verb
from peftlab.cli.nextstep import export_command
from peftlab.cli.options import (
    auto_batch_size_option,
    force_option,
    json_option,
    memory_bytes,
    memory_option,
    model_option,
    root_option,
    set_option,
)
from peftlab.cli.output import (
    INTERRUPTED,
    answer,
    is_main_process,
    people_stream,
    say,
    typed_command,
)

if TYPE_CHECKING:
    from peftlab.results.comparison import Cell, Comparison


def _names(_: click.Context, __: click.Parameter, text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seeds(_: click.Context, __: click.Parameter, text: str) -> int | list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0:
        raise click.BadParameter("must be how many, like 3, or which, like 0,1,7.")
    return numbers[0] if "," not in text else numbers


@click.command(
    cls=Verb,
    examples=[
        "peftlab compare movie-sentiment --recipes full,freeze-top2,lora,ptuning-v2 --seeds 3",
        "peftlab compare movie-sentiment --recipes full,lora --seeds 0,7 --model bert-tiny",
        "peftlab compare tweet-sentiment --recipes lora,lora-qv --set optim.learning_rate=5e-4",
    ],
)
@click.argument("task")
@click.option(
    "--recipes", "-r", required=True, callback=_names, metavar="A,B,...", help="Names or paths."
)
@click.option(
    "--seeds",
    default="3",
    show_default=True,
    callback=_seeds,
    metavar="N",
    help="How many, counted from 0, or which, like 0,1,7.",
)
@model_option
@set_option
@root_option
@force_option
@auto_batch_size_option
@memory_option
@json_option
def compare(
    task: str,
    recipes: list[str],
    seeds: int | list[int],
    model: str | None,
    overrides: tuple[str, ...],
    root: Path,
    force: bool,
    auto_batch_size: bool,
    memory: str | None,
) -> None:
    """Compare recipes on TASK over several seeds.

    Each run is a fresh process. Finished runs are not run again, and a run that fails leaves the
    others alone. Exit code 1 if one failed. --json prints comparison.json and "report".
    """
    from peftlab.comparing.verb import compare as run_comparison

    try:
        result = run_comparison(
            task,
            recipes,
            seeds=seeds,
            model=model,
            overrides=overrides,
            root=root,
            force=force,
            auto_batch_size=auto_batch_size,
            memory_bytes=memory_bytes(auto_batch_size, memory),
            command=typed_command(),
            progress=is_main_process(),
        )
    except KeyboardInterrupt:
        say("interrupted before a run was finished; nothing to compare.", err=True)
        click.get_current_context().exit(INTERRUPTED)
    comparison = result.comparison
    answer({**comparison.model_dump(mode="json"), "report": str(result.report)})
    if is_main_process():
        _show(comparison)
    say(f"report: {result.report}")
    if (cell := _winner(comparison)) is not None:
        say(f"next: {export_command(Path(str(cell.run_dir)))}")
    if result.interrupted:
        say("interrupted; finished runs are kept, the same command goes on.", err=True)
        click.get_current_context().exit(INTERRUPTED)
    failed = any(cell.status != "ok" for cell in comparison.cells)
    click.get_current_context().exit(1 if failed else 0)


def _show(comparison: Comparison) -> None:
    from rich.console import Console

    from peftlab.report.table import rich_table

    stream = people_stream()
    # In a pipe nothing wraps the lines again, so they may be as long as the table is.
    width = None if stream.isatty() else 120
    Console(file=stream, width=width).print(rich_table(comparison))


def _winner(comparison: Comparison) -> Cell | None:
    """The run of the best recipe that did best on the validation rows."""
    if (best := comparison.best) is None:
        return None
    metric = comparison.metric
    cells = [
        (value if metric.better == "max" else -value, cell)
        for cell in comparison.cells_of(best.recipe)
        if cell.status == "ok" and cell.run_dir
        if (value := cell.validation_metrics.get(metric.name)) is not None
    ]
    return max(cells, key=lambda pair: pair[0])[1] if cells else None


COMMAND = compare
