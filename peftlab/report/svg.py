"""SVG by hand: elements, axes with round ticks, labels that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from peftlab.report.text import clean
from peftlab.units import GIB, KIB, MIB

Element = ElementTree.Element
CHARACTER_WIDTH = 6.7
"""Pixels of an average character at the charts' font size of 12."""


def figure(
    key: str, title: str, description: str, *, width: float | None = None, height: float
) -> Element:
    """An ``<svg>`` that screen readers can tell.

    Args:
        key: unique on the page.
        width: of the view box, which scales as a whole; None for a chart that is as wide as its
            place, drawn in percent, whose text keeps its size.
    """
    root = Element("svg", xmlns="http://www.w3.org/2000/svg", role="img")
    root.set("aria-labelledby", f"{key}-title {key}-description")
    if width is None:
        root.set("width", "100%")
        root.set("height", _number(height))
    else:
        root.set("viewBox", f"0 0 {_number(width)} {_number(height)}")
    add(root, "title", title, id=f"{key}-title")
    add(root, "desc", description, id=f"{key}-description")
    return root


def add(parent: Element, tag: str, text: str | None = None, **attributes: float | str) -> Element:
    """Append an element; ``class_`` is ``class`` and ``text_anchor`` is ``text-anchor``."""
    named = {
        name.rstrip("_").replace("_", "-"): value if isinstance(value, str) else _number(value)
        for name, value in attributes.items()
    }
    child = ElementTree.SubElement(parent, tag, {key: clean(value) for key, value in named.items()})
    if text is not None:
        child.text = clean(text)
    return child


def render(root: Element) -> str:
    """The element as text, escaped."""
    return ElementTree.tostring(root, encoding="unicode")


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class Axis:
    """A linear axis between its first and last tick.

    Args:
        ticks: values, evenly spaced, covering the data.
        labels: their texts.
        unit: in which the labels are; empty if they have none.
    """

    ticks: tuple[float, ...]
    labels: tuple[str, ...]
    unit: str = ""

    def share(self, value: float) -> float:
        """Where ``value`` lies, from 0 at the first tick to 1 at the last."""
        return (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])

    def place(self, value: float, start: float, end: float) -> float:
        """The coordinate of ``value`` on an axis drawn from ``start`` to ``end``."""
        return start + (end - start) * self.share(value)


def value_axis(low: float, high: float, count: int = 5, unit: str = "") -> Axis:
    """An axis over ``low`` to ``high`` in steps of 1, 2 or 5 times a power of ten."""
    ticks, digits = _ticks(low, high, count)
    labels = tuple(f"{tick:.{digits}f}".replace("-", "−") for tick in ticks)
    return Axis(ticks, labels, unit)


def byte_axis(highest: float, count: int = 5) -> Axis:
    """An axis from 0 in binary units."""
    sizes = (("GiB", GIB), ("MiB", MIB), ("KiB", KIB), ("B", 1))
    return _scaled(highest, count, [(unit, size) for unit, size in sizes])


def seconds_axis(highest: float, count: int = 5) -> Axis:
    """An axis from 0 in seconds, minutes or hours."""
    return _scaled(highest, count, [("h", 3600 * 2), ("min", 60 * 3), ("s", 0)])


def count_axis(highest: float, count: int = 3) -> Axis:
    """An axis from 0 over whole numbers."""
    return value_axis(0, max(highest, count), count)


def _scaled(highest: float, count: int, units: Sequence[tuple[str, float]]) -> Axis:
    unit, _ = next(((unit, least) for unit, least in units if highest >= least), units[-1])
    size = {"h": 3600, "min": 60, "s": 1, "GiB": GIB, "MiB": MIB, "KiB": KIB, "B": 1}[unit]
    axis = value_axis(0, highest / size, count)
    return Axis(tuple(tick * size for tick in axis.ticks), axis.labels, unit)


def _ticks(low: float, high: float, count: int) -> tuple[tuple[float, ...], int]:
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = (low - margin, high + margin) if low else (0.0, 1.0)
    rough = (high - low) / count
    power = math.floor(math.log10(rough))
    base = next((base for base in (1, 2, 5) if base * 10**power >= rough * 0.999), 10)
    step = base * 10**power
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, -power if base < 10 else -power - 1)
    # A tick just below zero must not read −0.
    ticks = tuple(round(at * step, digits + 6) + 0.0 for at in range(first, last + 1))
    return ticks, digits


@dataclass(frozen=True)
class Box:
    """A rectangle that a label or a mark takes."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The common area."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)

    def outside(self, frame: Box) -> float:
        """The area beyond ``frame``."""
        own = (self.right - self.left) * (self.bottom - self.top)
        return own - self.overlap(frame)


def place_labels(
    points: Sequence[tuple[float, float]], names: Sequence[str], marks: Sequence[Box], frame: Box
) -> list[Box]:
    """Where each point's label goes so that labels, marks and the frame's edge stay clear.

    Tries places around the point at growing distances, labels in order; the first free place wins,
    else the one that covers least.

    Args:
        points: (x, y) in pixels.
        names: one a point.
        marks: what labels must not cover.
        frame: where they must stay.
    """
    placed: list[Box] = []
    for (x, y), name in zip(points, names, strict=True):
        width, height = len(name) * CHARACTER_WIDTH, 14.0
        best, least = None, math.inf
        for distance in (8, 16, 26, 38, 52, 68, 86, 106):
            for turn in range(16):
                angle = math.pi * turn / 8
                box = _beside(x, y, distance, angle, width, height)
                cost = 4 * box.outside(frame) + sum(map(box.overlap, (*marks, *placed)))
                if cost < least - 1e-9:
                    best, least = box, cost
            if least == 0:
                break
        if best is None:
            raise AssertionError("no place was tried")
        placed.append(best)
    return placed


def _beside(x: float, y: float, distance: float, angle: float, width: float, height: float) -> Box:
    centre_x = x + math.cos(angle) * (distance + width / 2)
    centre_y = y - math.sin(angle) * (distance + height / 2)
    return Box(
        centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2
    )
