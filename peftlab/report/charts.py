"""The charts of the report, each an SVG with a title and a description.

Bars and intervals are drawn in percent of their place, so that their text keeps its size on a
phone; scatter plots and curves have a view box, as their labels need pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peftlab.report import svg, text
from peftlab.report.svg import Axis, Box, Element, add
from peftlab.results.comparison import PARTS, Comparison, Parts, Row
from peftlab.units import format_bytes, format_seconds

_NAME_LENGTH = 26
_BAR, _THIN_BAR = 16, 6


def memory_bars(comparison: Comparison) -> str | None:
    """Peak memory by part, measured over planned; None if no recipe has either."""
    rows = [row for row in comparison.methods if row.peak_bytes is not None or row.planned]
    peaks = [peak for row in rows for peak in (row.peak_bytes, _total(row.planned)) if peak]
    if not peaks:
        return None
    axis = svg.byte_axis(max(peaks))
    step = 56
    height = step * len(rows) + 28
    told = "; ".join(f"{row.recipe}: {_memory_told(row)}" for row in rows)
    root = svg.figure("memory", "Peak memory by part", f"{told}.", height=height)
    _grid(root, axis, height)
    for at, row in enumerate(rows):
        top = at * step
        _name(root, row.recipe, top + 14)
        add(
            root,
            "text",
            _memory_told(row),
            x="100%",
            y=top + 14,
            text_anchor="end",
            class_="num halo",
        )
        measured = row.memory or Parts()
        _stack(root, measured, row.peak_bytes, axis, top + 21, _BAR, labels=True)
        if row.planned:
            place = top + 21 + _BAR + 2
            _stack(root, row.planned, _total(row.planned), axis, place, _THIN_BAR, labels=False)
    return svg.render(root)


def _memory_told(row: Row) -> str:
    planned = f"planned {format_bytes(_total(row.planned))}" if row.planned else ""
    measured = format_bytes(row.peak_bytes) if row.peak_bytes is not None else "not measured"
    return f"{measured} · {planned}" if planned else measured


def _total(parts: Parts | None) -> float | None:
    if parts is None:
        return None
    return parts.peak_bytes if parts.peak_bytes is not None else sum(parts.named().values())


def _stack(
    root: Element,
    parts: Parts,
    total: float | None,
    axis: Axis,
    top: float,
    height: float,
    labels: bool,
) -> None:
    known = parts.named()
    rest = (total or 0.0) - sum(known.values())
    if total and rest > 0.005 * total:
        known["unsplit"] = rest
    left = 0.0
    for part, value in known.items():
        width = 100 * axis.share(value)
        if width <= 0:
            continue
        bar = add(
            root,
            "rect",
            x=f"{left:.3f}%",
            y=top,
            width=f"{width:.3f}%",
            height=height,
            class_=f"part {part}",
        )
        kind = "" if labels else " (planned)"
        add(bar, "title", f"{part}{kind}: {format_bytes(value)}")
        if labels and width >= 11:
            class_ = "in-bar" if width >= 24 else "in-bar wide"
            middle = f"{left + width / 2:.3f}%"
            add(
                root,
                "text",
                format_bytes(value),
                x=middle,
                y=top + height - 4,
                text_anchor="middle",
                class_=f"{class_} on-{part}",
            )
        left += width


def differences(comparison: Comparison) -> str | None:
    """The 95% interval of each recipe's difference to the baseline; None if there is none."""
    rows = [(row, change) for row in comparison.methods if (change := row.difference)]
    if not rows:
        return None
    ends = [
        end for _, change in rows for end in (change.low, change.high, change.value, 0.0)
        if end is not None
    ]  # fmt: skip
    axis = svg.value_axis(min(ends), max(ends), 4)
    step = 44
    height = step * len(rows) + 28
    name, against = comparison.metric.name, comparison.reference.recipe
    told = "; ".join(
        f"{row.recipe}: {text.interval(change)}, {change.verdict or 'no interval'}"
        for row, change in rows
    )
    root = svg.figure("differences", f"{name}: difference to {against}", f"{told}.", height=height)
    _grid(root, axis, height, emphasised=0.0)
    for at, (row, change) in enumerate(rows):
        top = at * step
        _name(root, row.recipe, top + 14)
        verdict = add(root, "text", x="100%", y=top + 14, text_anchor="end", class_="num halo")
        add(verdict, "tspan", f"{change.verdict or 'no interval'}  ", class_="soft wide")
        add(verdict, "tspan", text.interval(change))
        y, shown = top + 30, change.verdict in ("better", "worse")
        class_ = change.verdict if shown and change.verdict else "unshown"
        if change.low is not None and change.high is not None:
            ends_at = [_in_percent(axis, end) for end in (change.low, change.high)]
            add(root, "line", x1=ends_at[0], x2=ends_at[1], y1=y, y2=y, class_=f"whisker {class_}")
            for x in ends_at:
                add(root, "line", x1=x, x2=x, y1=y - 4, y2=y + 4, class_=f"whisker {class_}")
        add(
            root,
            "circle",
            cx=_in_percent(axis, change.value),
            cy=y,
            r=5,
            class_=f"mark {class_} {'full' if shown else 'hollow'}",
        )
    return svg.render(root)


def _in_percent(axis: Axis, value: float) -> str:
    return f"{100 * axis.share(value):.3f}%"


def _name(root: Element, name: str, y: float) -> None:
    label = add(root, "text", text.shorten(text.clean(name), _NAME_LENGTH), x=0, y=y, class_="name")
    add(label, "title", name)


def _grid(root: Element, axis: Axis, height: float, emphasised: float | None = None) -> None:
    last = len(axis.ticks) - 1
    for at, (tick, label) in enumerate(zip(axis.ticks, axis.labels, strict=True)):
        x = _in_percent(axis, tick)
        class_ = "grid zero" if tick == emphasised else "grid"
        add(root, "line", x1=x, x2=x, y1=0, y2=height - 20, class_=class_)
        unit = f" {axis.unit}" if axis.unit and at == last else ""
        anchor = "start" if at == 0 else "end" if at == last else "middle"
        add(root, "text", label + unit, x=x, y=height - 5, text_anchor=anchor, class_="tick")


def quality_against_memory(comparison: Comparison) -> str | None:
    """Metric over peak memory, a point a recipe; None if nothing has both."""
    return _scatter(
        comparison,
        "peak memory",
        lambda row: row.peak_bytes,
        lambda row: row.on_memory_front,
        svg.byte_axis,
        format_bytes,
    )


def quality_against_time(comparison: Comparison) -> str | None:
    """Metric over training time, a point a recipe; None if nothing has both."""
    return _scatter(
        comparison,
        "training time",
        lambda row: row.train_seconds,
        lambda row: row.on_time_front,
        svg.seconds_axis,
        format_seconds,
    )


def _scatter(
    comparison: Comparison,
    what: str,
    cost: Callable[[Row], float | None],
    on_front: Callable[[Row], bool | None],
    axis: Callable[[float], Axis],
    show: Callable[[float | None], str],
) -> str | None:
    found = [
        (row, mean, spent)
        for row in comparison.methods
        if (mean := row.metric_mean) is not None and (spent := cost(row)) is not None
    ]
    if not found:
        return None
    width, height = 480.0, 340.0
    frame = Box(46, 26, width - 8, height - 44)
    means = [(mean, row.metric_sd or 0.0) for row, mean, _ in found]
    seeds = {
        row.recipe: [
            value
            for cell in comparison.cells_of(row.recipe)
            if cell.status == "ok" and (value := cell.metrics.get(cell.metric)) is not None
        ]
        for row, _, _ in found
    }
    all_seeds = [value for values in seeds.values() for value in values]
    x_axis = axis(1.04 * max(spent for _, _, spent in found))
    y_axis = svg.value_axis(
        min([*all_seeds, *(mean - sd for mean, sd in means)]),
        max([*all_seeds, *(mean + sd for mean, sd in means)]),
    )
    metric = text.metric_name(comparison.metric)
    told = "; ".join(
        f"{row.recipe}: {text.mean_sd(row)} at {show(spent)}" for row, _, spent in found
    )
    root = svg.figure(
        f"scatter-{what.replace(' ', '-')}", f"{metric} against {what}", f"{told}.",
        width=width, height=height,
    )  # fmt: skip
    direction = "↑" if comparison.metric.better == "max" else "↓"
    add(root, "text", f"{metric} ({direction} better)", x=4, y=14, class_="axis")
    _axes(root, x_axis, y_axis, frame)
    unit = f", {x_axis.unit}" if x_axis.unit else ""
    add(
        root, "text", f"{what}{unit} (← better)",
        x=frame.right, y=height - 8, text_anchor="end", class_="axis",
    )  # fmt: skip
    marks, points = [], []
    for row, mean, spent in found:
        x = x_axis.place(spent, frame.left, frame.right)
        y = y_axis.place(mean, frame.bottom, frame.top)
        points.append((x, y))
        marks.append(Box(x - 7, y - 7, x + 7, y + 7))
        if row.metric_sd is not None:
            top, bottom = (
                y_axis.place(mean + sign * row.metric_sd, frame.bottom, frame.top)
                for sign in (1, -1)
            )
            marks.append(Box(x - 4, top, x + 4, bottom))
            add(root, "line", x1=x, x2=x, y1=top, y2=bottom, class_="whisker")
            for end in (top, bottom):
                add(root, "line", x1=x - 3, x2=x + 3, y1=end, y2=end, class_="whisker")
            for value in seeds[row.recipe]:
                seed_y = y_axis.place(value, frame.bottom, frame.top)
                add(root, "circle", cx=x, cy=seed_y, r=2, class_="seed")
    names = [text.shorten(text.clean(row.recipe), 20) for row, _, _ in found]
    boxes = svg.place_labels(points, names, marks, frame)
    for (row, _, _), name, (x, y), box in zip(found, names, points, boxes, strict=True):
        _leader(root, x, y, box)
        label = add(
            root, "text", name,
            x=(box.left + box.right) / 2, y=box.bottom - 3, text_anchor="middle", class_="label",
        )  # fmt: skip
        add(label, "title", row.recipe)
        kind = "full" if on_front(row) else "hollow"
        add(root, "circle", cx=x, cy=y, r=5, class_=f"mark {kind}")
    return svg.render(root)


def _leader(root: Element, x: float, y: float, box: Box) -> None:
    """A thin line to a label that stands too far from its point to be read as its own."""
    to_x = min(max(x, box.left), box.right)
    to_y = min(max(y, box.top), box.bottom)
    if (to_x - x) ** 2 + (to_y - y) ** 2 > 15**2:
        add(root, "line", x1=x, y1=y, x2=to_x, y2=to_y, class_="leader")


def _axes(root: Element, x_axis: Axis, y_axis: Axis, frame: Box) -> None:
    for tick, label in zip(y_axis.ticks, y_axis.labels, strict=True):
        y = y_axis.place(tick, frame.bottom, frame.top)
        add(root, "line", x1=frame.left, x2=frame.right, y1=y, y2=y, class_="grid")
        add(root, "text", label, x=frame.left - 6, y=y + 4, text_anchor="end", class_="tick")
    for tick, label in zip(x_axis.ticks, x_axis.labels, strict=True):
        x = x_axis.place(tick, frame.left, frame.right)
        add(root, "line", x1=x, x2=x, y1=frame.bottom, y2=frame.bottom + 4, class_="grid")
        anchor = "end" if tick == x_axis.ticks[-1] else "middle"
        add(root, "text", label, x=x, y=frame.bottom + 17, text_anchor=anchor, class_="tick")


def legend_parts(comparison: Comparison) -> list[str]:
    """The parts that occur, in their order, for the legend of the bars."""
    seen = {
        part
        for row in comparison.methods
        for parts in (row.memory, row.planned)
        if parts is not None
        for part, value in parts.named().items()
        if value > 0
    }
    return [part for part in PARTS if part in seen]


def memory_table(rows: Sequence[Row]) -> list[list[str]]:
    """The figures behind the bars: recipe, which, the parts, the peak."""
    found = []
    for row in rows:
        for kind, parts in (("measured", row.memory), ("planned", row.planned)):
            if parts is not None:
                known = parts.named()
                shown = [format_bytes(known.get(part)) for part in PARTS]
                found.append([row.recipe, kind, *shown, format_bytes(_total(parts))])
    return found
