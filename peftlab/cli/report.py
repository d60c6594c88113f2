"""peftlab report: the page again, from the records alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from peftlab.cli.base import Verb
from peftlab.cli.options import json_option
from peftlab.cli.output import answer, say

if TYPE_CHECKING:
    from peftlab.results.comparison import Comparison


@click.command(
    cls=Verb,
    examples=["peftlab report runs/movie-sentiment", "peftlab report runs/movie-sentiment --json"],
)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@json_option
def report(folder: Path) -> None:
    """Write report.html again.

    FOLDER, where it goes, is that of a comparison, or of a task with all its runs. It is made from
    the records; no model is loaded.
    """
    from peftlab.report.html import write_html
    from peftlab.results.comparison import COMPARISON, read_comparison

    stored = (folder / COMPARISON).is_file()
    comparison = read_comparison(folder) if stored else _of_runs(folder)
    path = folder / "report.html"
    write_html(path, comparison)
    answer({**comparison.model_dump(mode="json"), "report": str(path)})
    say(f"report: {path}")


def _of_runs(folder: Path) -> Comparison:
    from peftlab.cli.output import typed_command
    from peftlab.errors import Problem, RunFolderError
    from peftlab.results.build import build_comparison
    from peftlab.results.comparison import Cell
    from peftlab.results.store import RECORD, read_record
    from peftlab.tasks.metrics import METRICS

    runs = sorted(path.parent for path in folder.rglob(RECORD))
    if not runs:
        raise RunFolderError(Problem(str(folder), "holds no comparison and no runs."))
    cells = [Cell(**read_record(run).model_dump(), run_dir=str(run)) for run in runs]
    recipes = [cell.recipe for cell in cells]
    metric = METRICS.get(cells[0].metric)
    return build_comparison(
        cells,
        command=typed_command(),
        baseline="full" if "full" in recipes else recipes[0],
        metric_unit=metric.unit if metric else "",
    )


COMMAND = report
