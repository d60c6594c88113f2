import math

import pytest

from peftlab.report.svg import Box, byte_axis, place_labels, seconds_axis, value_axis
from peftlab.units import MIB


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 1.0, ("0.0", "0.2", "0.4", "0.6", "0.8", "1.0")),
        (-0.031, 0.012, ("−0.04", "−0.03", "−0.02", "−0.01", "0.00", "0.01", "0.02")),
        (0, 90, ("0", "20", "40", "60", "80", "100")),
        (0.5, 0.5, ("0.44", "0.46", "0.48", "0.50", "0.52", "0.54", "0.56")),
    ],
)
def test_ticks_are_round(low: float, high: float, labels: tuple[str, ...]) -> None:
    assert value_axis(low, high).labels == labels


@pytest.mark.parametrize("scale", [1e-9, 0.003, 1, 7, 12345.6, 1e12])
def test_ticks_cover_the_data_evenly(scale: float) -> None:
    axis = value_axis(-0.37 * scale, 0.91 * scale)
    assert axis.ticks[0] <= -0.37 * scale * 0.999
    assert axis.ticks[-1] >= 0.91 * scale * 0.999
    assert 4 <= len(axis.ticks) <= 8
    steps = [after - before for before, after in zip(axis.ticks, axis.ticks[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert len(set(axis.labels)) == len(axis.labels)


def test_axes_of_costs_start_at_zero_in_readable_units() -> None:
    memory, time = byte_axis(700 * MIB), seconds_axis(600)
    assert (memory.ticks[0], memory.unit, memory.labels[-1]) == (0, "MiB", "800")
    assert memory.ticks[-1] == 800 * MIB
    assert (time.ticks[0], time.unit, time.labels[-1]) == (0, "min", "10")
    assert memory.place(400 * MIB, 100, 300) == 200


def test_labels_do_not_overlap() -> None:
    frame = Box(0, 0, 480, 340)
    points = [(240 + 30 * math.cos(at), 170 + 30 * math.sin(at)) for at in range(12)]
    marks = [Box(x - 7, y - 7, x + 7, y + 7) for x, y in points]
    boxes = place_labels(points, [f"recipe-number-{at}" for at in range(12)], marks, frame)
    for at, box in enumerate(boxes):
        assert box.outside(frame) == pytest.approx(0)
        assert sum(box.overlap(other) for other in (*boxes[:at], *marks)) == 0
