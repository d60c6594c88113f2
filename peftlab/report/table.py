"""The comparison as a table: for the terminal, as Markdown, and as cells for the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftlab.report import text
from peftlab.results.comparison import Comparison, Row
from peftlab.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.table import Table

_WIDE = 92


@dataclass(frozen=True)
class Column:
    """One column: its heading and what it shows of a row."""

    heading: str
    show: Callable[[Row], str]
    numeric: bool = True


def columns(comparison: Comparison) -> tuple[Column, ...]:
    """The columns, in order, of every rendering."""
    reference = comparison.reference
    planned = " (plan)" if reference.peak_source == "planned" else ""
    return (
        Column("recipe", lambda row: text.clean(row.recipe), numeric=False),
        Column(text.clean(text.metric_name(comparison.metric)), text.mean_sd),
        Column(f"vs {text.clean(reference.recipe)}", lambda row: text.starred(row.difference)),
        Column("trainable", lambda row: text.percent(row.trainable_percent)),
        Column("saved", lambda row: format_bytes(row.saved_bytes)),
        Column("peak memory", lambda row: format_bytes(row.peak_bytes)),
        Column(f"less{planned}", lambda row: text.saving(_of_others(row, row.peak_saving_percent))),
        Column("train time", lambda row: format_seconds(row.train_seconds)),
        Column("less", lambda row: text.saving(_of_others(row, row.time_saving_percent))),
        Column("runs", lambda row: f"{row.seeds_ok}/{row.seeds_total}"),
    )


def _of_others(row: Row, value: float | None) -> float | None:
    # What the reference saves against itself is 0 by definition and says nothing.
    return None if value == 0 else value


def rich_table(comparison: Comparison, width: int = 100) -> Table:
    """The table for a terminal of ``width`` characters; a narrow one does without saved sizes."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = [each for each in columns(comparison) if width >= _WIDE or each.heading != "saved"]
    table = Table(
        title=Text(_title(comparison)),
        title_justify="left",
        caption=Text(caption(comparison)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in shown:
        # Text, not markup: a name in brackets is a name.
        table.add_column(
            Text(column.heading.replace(" ", "\n", 1).replace("trainable", "train-\nable")),
            justify="right" if column.numeric else "left",
            no_wrap=column.numeric,
            min_width=None if column.numeric else 11,
            overflow="fold",
        )
    for row in comparison.methods:
        style = "" if row.seeds_ok else "dim"
        table.add_row(*(Text(column.show(row)) for column in shown), style=style)
    return table


def markdown(comparison: Comparison) -> str:
    """The table as GitHub Markdown, with its caption below."""
    shown = columns(comparison)
    lines = [
        _markdown_row([column.heading for column in shown]),
        _markdown_row(["---:" if column.numeric else "---" for column in shown]),
        *(_markdown_row([column.show(row) for column in shown]) for row in comparison.methods),
    ]
    return "\n".join([*lines, "", _escaped(caption(comparison))]) + "\n"


def caption(comparison: Comparison) -> str:
    """What the figures mean, in one line."""
    metric, reference = comparison.metric, comparison.reference
    direction = "higher" if metric.better == "max" else "lower"
    parts = [f"{metric.name} (test): mean ± sd over seeds, {direction} is better"]
    if any(row.difference for row in comparison.methods):
        parts.append(f"* differs from {reference.recipe}: the 95% interval leaves out 0")
    saves = any(row.peak_saving_percent is not None for row in comparison.methods)
    if saves and reference.peak_source == "planned":
        parts.append(f"memory savings are against the plan of {reference.recipe}")
    parts += [f"{row.recipe}: {lost}" for row in comparison.methods if (lost := text.lost(row))]
    return text.clean("; ".join(parts) + ".")


def _title(comparison: Comparison) -> str:
    return text.clean(f"{comparison.task} on {comparison.model}")


def _markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cell if set(cell) <= set('-:') else _escaped(cell) for cell in cells)} |"


def _escaped(value: str) -> str:
    for character in "\\|*_<>[]`":
        value = value.replace(character, f"\\{character}")
    return value.replace("\n", " ")
