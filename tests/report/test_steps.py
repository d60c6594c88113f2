"""The picture of an optimizer step's memory."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from peftlab.report.html import render_html
from peftlab.report.steps import step_timelines
from peftlab.results.build import build_comparison
from tests.records import MakeCell

SVG = "{http://www.w3.org/2000/svg}"
MIB = 2**20


def plan_of(*points: tuple[str, int]) -> dict[str, Any]:
    return {"timeline": [{"phase": phase, "live_bytes": size} for phase, size in points]}


def test_a_panel_a_recipe_with_its_peak_and_phases(make_cell: MakeCell) -> None:
    points = [*[("forward", 40 * MIB)] * 20, *[("backward", 90 * MIB)] * 20]
    plan = plan_of(*points, *[("optimizer", 60 * MIB)] * 20)
    cells = [
        make_cell("full", 0, 0.8, plan=plan),
        make_cell("full", 1, 0.8, plan=plan),
        make_cell("lora<b>", 0, 0.7, plan=plan_of(("forward", 10 * MIB))),
        make_cell("head", 0, 0.6),
    ]
    comparison = build_comparison(cells, baseline="full")
    full, lora = step_timelines(comparison)
    root = ElementTree.fromstring(full)
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {"forward", "backward", "optimizer", "90 MiB"} <= set(texts)
    assert "peaks at 90 MiB in backward" in full
    (area,) = root.iter(f"{SVG}polygon")
    heights = {point.split(",")[1] for point in str(area.get("points")).split()}
    assert len(heights) == 4
    assert "&lt;b&gt;" in lora
    assert full in render_html(comparison)


def test_without_a_plan_there_is_no_picture(make_cell: MakeCell) -> None:
    comparison = build_comparison([make_cell("full", 0, 0.8)], baseline="full")
    assert step_timelines(comparison) == []
    assert "Over one optimizer step" not in render_html(comparison)
