"""Memory over one optimizer step as planned: a small panel a recipe, all on the same axis."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from peftlab.report import svg, text
from peftlab.report.svg import Axis, Box, add
from peftlab.results.comparison import Comparison
from peftlab.units import format_bytes

Timeline = list[tuple[str, float]]
_WIDTH, _HEIGHT = 300.0, 176.0
_FRAME = Box(40, 30, _WIDTH - 6, 150)


def step_timelines(comparison: Comparison) -> list[str]:
    """A panel for each recipe that was planned."""
    found = [
        (row.recipe, timeline)
        for row in comparison.methods
        if (timeline := _read(cell.plan for cell in comparison.cells_of(row.recipe)))
    ]
    if not found:
        return []
    axis = svg.byte_axis(max(value for _, timeline in found for _, value in timeline))
    return [_panel(at, recipe, timeline, axis) for at, (recipe, timeline) in enumerate(found)]


def _read(plans: Any) -> Timeline:
    """The first plan's (phase, live bytes) in order."""
    for plan in plans:
        points = (plan or {}).get("timeline") or ()
        known = [(str(point["phase"]), float(point["live_bytes"])) for point in points]
        if known:
            return known
    return []


def _panel(at: int, recipe: str, timeline: Timeline, axis: Axis) -> str:
    peak = max(range(len(timeline)), key=lambda index: timeline[index][1])
    phase, value = timeline[peak]
    title = f"{recipe}: memory over an optimizer step, as planned"
    described = f"It peaks at {format_bytes(value)} in {phase}."
    root = svg.figure(f"step-{at}", title, described, width=_WIDTH, height=_HEIGHT)
    heading = add(root, "text", text.shorten(text.clean(recipe), 30), x=0, y=13, class_="name")
    add(heading, "title", recipe)
    for tick, label in zip(axis.ticks, axis.labels, strict=True):
        y = axis.place(tick, _FRAME.bottom, _FRAME.top)
        add(root, "line", x1=_FRAME.left, x2=_FRAME.right, y1=y, y2=y, class_="grid")
        unit = f" {axis.unit}" if tick == axis.ticks[-1] else ""
        place = {"x": 0.0, "y": y - 4} if unit else {"x": _FRAME.left - 5, "y": y + 4}
        anchor = "start" if unit else "end"
        add(root, "text", label + unit, text_anchor=anchor, class_="tick", **place)
    width = (_FRAME.right - _FRAME.left) / len(timeline)

    def x_of(index: float) -> float:
        return _FRAME.left + width * index

    def y_of(size: float) -> float:
        return axis.place(size, _FRAME.bottom, _FRAME.top)

    outline = [f"{x_of(0):.1f},{_FRAME.bottom:.1f}"]
    for index, (_, size) in enumerate(timeline):
        outline += [
            f"{x_of(index):.1f},{y_of(size):.1f}",
            f"{x_of(index + 1):.1f},{y_of(size):.1f}",
        ]
    outline.append(f"{x_of(len(timeline)):.1f},{_FRAME.bottom:.1f}")
    add(root, "polygon", points=" ".join(outline), class_="area")
    start = 0
    for name, points in groupby(timeline, key=lambda point: point[0]):
        count = len(list(points))
        if start:
            x = x_of(start)
            add(root, "line", x1=x, x2=x, y1=_FRAME.top, y2=_FRAME.bottom, class_="leader")
        if count * width > 5.4 * len(name):
            middle = x_of(start + count / 2)
            below = _FRAME.bottom + 16
            add(root, "text", name, x=middle, y=below, text_anchor="middle", class_="tick")
        start += count
    x, y = x_of(peak + 0.5), y_of(value)
    add(root, "circle", cx=x, cy=y, r=3, class_="dot")
    side = "start" if x < (_FRAME.left + _FRAME.right) / 2 else "end"
    add(root, "text", format_bytes(value), x=x, y=y - 6, text_anchor=side, class_="num halo")
    return svg.render(root)
