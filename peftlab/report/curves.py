"""Learning curves: a small panel a recipe, all on the same axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftlab.report import svg, text
from peftlab.report.svg import Axis, Box, Element, add
from peftlab.results.comparison import Cell, Comparison
from peftlab.results.paired import mean

Curve = list[tuple[float, float]]
_WIDTH, _HEIGHT = 300.0, 246.0
_METRIC = Box(40, 36, _WIDTH - 6, 142)
_LOSS = Box(40, 166, _WIDTH - 6, 220)


@dataclass(frozen=True)
class _Curves:
    """Curves of one recipe: one a seed, and the mean of the finished seeds (of all if none is)."""

    recipe: str
    metric: list[Curve]
    loss: list[Curve]
    metric_mean: Curve
    loss_mean: Curve


def learning_curves(comparison: Comparison) -> list[str]:
    """For each recipe with evaluations, the validation metric and the training loss by step."""
    found = [_read(row.recipe, comparison.cells_of(row.recipe)) for row in comparison.methods]
    found = [curves for curves in found if curves.metric or curves.loss]
    if not found:
        return []
    steps = [x for each in found for curve in (*each.metric, *each.loss) for x, _ in curve]
    x_axis = svg.count_axis(max(steps))
    metric_axis = _axis([curve for each in found for curve in each.metric])
    loss_axis = _axis([curve for each in found for curve in each.loss], low=0.0)
    return [
        _panel(at, each, found, comparison.metric.name, x_axis, metric_axis, loss_axis)
        for at, each in enumerate(found)
    ]


def _read(recipe: str, cells: Sequence[Cell]) -> _Curves:
    averaged = [cell for cell in cells if cell.status == "ok"] or cells
    return _Curves(
        recipe,
        [curve for cell in cells if (curve := _metric_curve(cell))],
        [curve for cell in cells if (curve := _loss_curve(cell))],
        mean_curve([_metric_curve(cell) for cell in averaged]),
        mean_curve([_loss_curve(cell) for cell in averaged]),
    )


def _metric_curve(cell: Cell) -> Curve:
    return [(point.step, point.metric) for point in cell.curve if point.metric is not None]


def _loss_curve(cell: Cell) -> Curve:
    return [(point.step, point.train_loss) for point in cell.curve if point.train_loss is not None]


def _axis(curves: Sequence[Curve], low: float | None = None) -> Axis | None:
    values = [y for curve in curves for _, y in curve]
    if not values:
        return None
    return svg.value_axis(min(values) if low is None else min(low, *values), max(values), 3)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean at the steps that every curve has."""
    tables = [dict(curve) for curve in curves]
    common = set(tables[0]).intersection(*tables[1:]) if tables else set()
    return [(step, mean([table[step] for table in tables])) for step in sorted(common)]


def _panel(
    at: int,
    own: _Curves,
    everyone: Sequence[_Curves],
    metric: str,
    x_axis: Axis,
    metric_axis: Axis | None,
    loss_axis: Axis | None,
) -> str:
    last = own.metric_mean[-1:]
    end = f" It ends at {text.number(last[0][1])} at step {last[0][0]:.0f}." if last else ""
    title = f"{own.recipe}: validation {metric} and training loss by step"
    described = f"{max(len(own.metric), len(own.loss))} seeds, their mean in bold.{end}"
    root = svg.figure(f"curve-{at}", title, described, width=_WIDTH, height=_HEIGHT)
    heading = add(root, "text", text.shorten(text.clean(own.recipe), 38), x=0, y=13, class_="name")
    add(heading, "title", own.recipe)
    for axis, frame, what in (
        (metric_axis, _METRIC, f"validation {metric}"),
        (loss_axis, _LOSS, "training loss"),
    ):
        if axis is None:
            continue
        for tick, label in zip(axis.ticks, axis.labels, strict=True):
            y = axis.place(tick, frame.bottom, frame.top)
            add(root, "line", x1=frame.left, x2=frame.right, y1=y, y2=y, class_="grid")
            add(root, "text", label, x=frame.left - 5, y=y + 4, text_anchor="end", class_="tick")
        others = [each for each in everyone if each is not own]
        own_curves = own.metric if frame is _METRIC else own.loss
        for each in others:
            ghost = each.metric_mean if frame is _METRIC else each.loss_mean
            _line(root, ghost, x_axis, axis, frame, "ghost")
        for curve in own_curves:
            _line(root, curve, x_axis, axis, frame, "thin")
        own_mean = own.metric_mean if frame is _METRIC else own.loss_mean
        _line(root, own_mean, x_axis, axis, frame, "bold")
        top = frame.top - 5 if frame is _LOSS else frame.top - 3
        where = {"x": frame.right, "y": top}
        add(root, "text", text.shorten(what, 34), text_anchor="end", class_="axis halo", **where)
    for tick, label in zip(x_axis.ticks, x_axis.labels, strict=True):
        x = x_axis.place(tick, _LOSS.left, _LOSS.right)
        anchor = "end" if tick == x_axis.ticks[-1] else "middle"
        shown = f"step {label}" if tick == x_axis.ticks[-1] else label
        add(root, "text", shown, x=x, y=_LOSS.bottom + 17, text_anchor=anchor, class_="tick")
    return svg.render(root)


def _line(root: Element, curve: Curve, x_axis: Axis, y_axis: Axis, frame: Box, kind: str) -> None:
    points = [
        (x_axis.place(x, frame.left, frame.right), y_axis.place(y, frame.bottom, frame.top))
        for x, y in curve
    ]
    if len(points) == 1 and kind != "ghost":
        add(root, "circle", cx=points[0][0], cy=points[0][1], r=2.5, class_=f"dot {kind}")
    elif len(points) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        add(root, "polyline", points=path, class_=f"curve {kind}")
