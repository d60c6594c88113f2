"""The comparison as one page that stands on its own: no network, no scripts, light and dark."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftlab.files import write_text
from peftlab.report import charts, text
from peftlab.report.curves import learning_curves
from peftlab.report.findings import findings
from peftlab.report.steps import step_timelines
from peftlab.report.table import caption, columns
from peftlab.results.comparison import PARTS, Comparison
from peftlab.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from jinja2 import Template


def write_html(path: Path, comparison: Comparison) -> None:
    """Write the page to ``path``, atomically."""
    write_text(path, render_html(comparison))


def render_html(comparison: Comparison) -> str:
    """The page; every text from the data is escaped."""
    from markupsafe import Markup

    def drawn(chart: str | None) -> Markup | None:
        # Built by ElementTree, which escapes texts and attributes.
        return None if chart is None else Markup(chart)

    shown = columns(comparison)
    return _template().render(
        c=comparison,
        findings=findings(comparison),
        caption=caption(comparison),
        columns=shown,
        rows=[(row, [column.show(row) for column in shown]) for row in comparison.methods],
        differences=drawn(charts.differences(comparison)),
        scatters=[
            drawn(chart)
            for chart in (
                charts.quality_against_memory(comparison),
                charts.quality_against_time(comparison),
            )
            if chart
        ],
        memory=drawn(charts.memory_bars(comparison)),
        memory_legend=charts.legend_parts(comparison),
        memory_table=charts.memory_table(comparison.methods),
        memory_sources=_memory_sources(comparison),
        parts=PARTS,
        steps=[drawn(panel) for panel in step_timelines(comparison)],
        curves=[drawn(panel) for panel in learning_curves(comparison)],
        environments=_environments(comparison),
        run_notes=_run_notes(comparison),
        utilisation=[
            (row.recipe, text.percent(100 * row.model_flops_utilisation))
            for row in comparison.methods
            if row.model_flops_utilisation is not None
        ],
        flops_sources=sorted(
            {cell.speed.flops_source for cell in comparison.cells if cell.speed.flops_source}
        ),
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.finalize = lambda value: text.clean(value) if type(value) is str else value
    environment.filters.update(
        bytes=format_bytes,
        count=format_count,
        seconds=format_seconds,
        percent=text.percent,
        number=text.number,
        interval=text.interval,
    )
    source = resources.files("peftlab.report").joinpath("template.html")
    return environment.from_string(source.read_text(encoding="utf-8"))


def _memory_sources(comparison: Comparison) -> list[str]:
    return sorted({cell.memory.source for cell in comparison.cells if cell.memory})


def _environments(comparison: Comparison) -> list[tuple[dict[str, Any], int]]:
    """Each environment that runs had, as label → value, and how many runs had it."""
    found: list[tuple[dict[str, Any], int]] = []
    for cell in comparison.cells:
        if (place := cell.environment) is None:
            continue
        dirty = {True: " (with changes)", False: "", None: ""}[place.git_dirty]
        shown = {
            "device": place.device,
            "processes × threads": f"{place.num_processes} × {place.num_threads}",
            "platform": place.platform,
            "Python": place.python,
            **place.versions,
            "git commit": f"{place.git_commit}{dirty}" if place.git_commit else text.MISSING,
        }
        at = next((at for at, (other, _) in enumerate(found) if other == shown), None)
        if at is None:
            found.append((shown, 1))
        else:
            found[at] = (shown, found[at][1] + 1)
    return found


def _run_notes(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """What runs noted, each once, with the recipes that noted it."""
    found: dict[str, list[str]] = {}
    for cell in comparison.cells:
        for note in cell.notes:
            recipes = found.setdefault(note, [])
            if cell.recipe not in recipes:
                recipes.append(cell.recipe)
    return list(found.items())
