import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from peftlab.report.html import render_html, write_html
from peftlab.results.build import build_comparison
from peftlab.results.comparison import Comparison
from peftlab.results.record import CurvePoint, Speed
from peftlab.results.store import write_predictions
from peftlab.units import MIB

HOSTILE = "<script>alert('x')</script>\"&\x00\x1b[31m]]>"
PLAN = {"memory": {"weights_bytes": 50 * MIB, "peak_bytes": 120 * MIB}}
CURVE = tuple(
    CurvePoint(step=step, epoch=step / 10, train_loss=1 / step, metric=0.5 + step / 100)
    for step in (10, 20, 30)
)


def _many(make_cell: Any) -> list[Any]:
    cells = [
        make_cell(
            f"recipe-{at}", seed, 0.7 + at / 100 + seed / 50, peak=(100 + at) * MIB,
            seconds=10.0 + at, curve=CURVE, plan=PLAN,
        )
        for at in range(11)
        for seed in range(3)
    ]  # fmt: skip
    return [*cells, make_cell("full", 0, 0.8, peak=200 * MIB, seconds=20.0, curve=CURVE[:1])]


CASES: dict[str, Callable[[Any], list[Any]]] = {
    "many": _many,
    "one recipe, one seed": lambda make: [make("lora", 0, 0.8, peak=MIB, seconds=1.0, curve=CURVE)],
    "nothing measured": lambda make: [make("full", 0, 0.8, params=None), make("lora", 0, None)],
    "all failed": lambda make: [
        make("full", 0, None, status="oom", plan=PLAN, metric=""),
        make("lora", 0, None, status="diverged", error="loss is nan", metric=""),
    ],
    "hostile": lambda make: [
        make(
            recipe, seed, 0.5 + seed / 10, peak=MIB, seconds=1.0, curve=CURVE, status=status,
            task=HOSTILE, model=HOSTILE, metric=HOSTILE, metrics={HOSTILE: 0.5 + seed / 10},
            error=HOSTILE, command=HOSTILE, identity=HOSTILE, notes=(HOSTILE,), plan=PLAN,
        )
        for recipe, seed, status in (
            ("full", 0, "ok"), ("full", 1, "ok"), (HOSTILE, 0, "ok"), (HOSTILE, 1, "ok"),
            ("lora", 0, "failed"),
        )
    ],
    "extreme values": lambda make: [
        make("full", 0, 0.0, peak=0, seconds=0.0), make("lora", 0, -1e9, peak=10**15, seconds=1e7),
    ],
}  # fmt: skip


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id" and value]


def _parse(page: str) -> _Tags:
    parser = _Tags()
    parser.feed(page)
    return parser


def _svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", page, re.S)]


@pytest.fixture(params=CASES)
def page(request: pytest.FixtureRequest, make_cell: Any) -> str:
    return render_html(build_comparison(CASES[request.param](make_cell), command=HOSTILE))


def test_loads_nothing_and_runs_nothing(page: str) -> None:
    parsed = _parse(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    names = [name for name, _ in parsed.attributes]
    assert not {"src", "href", "xlink:href"} & set(names)
    assert not [name for name in names if name.startswith("on")]
    assert "url(" not in page
    assert "@import" not in page
    assert "\x1b" not in page
    assert "\x00" not in page


def test_svgs_are_well_formed_and_told(page: str) -> None:
    ids = _parse(page).ids
    assert len(ids) == len(set(ids))
    for svg in _svgs(page):
        labels = (svg.get("aria-labelledby") or "").split()
        title, description = svg[0], svg[1]
        assert [title.get("id"), description.get("id")] == labels
        assert title.text
        assert description.text
        coordinates = [
            value
            for element in svg.iter()
            for name, value in element.items()
            if name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "points")
        ]
        assert not [value for value in coordinates if "nan" in value or "inf" in value]


def test_every_run_is_there(make_cell: Any) -> None:
    cells = _many(make_cell)
    page = render_html(build_comparison(cells))
    assert page.count('<details class="run"') == len(cells)
    for cell in cells:
        assert cell.identity in page


def test_errors_are_shown(make_cell: Any) -> None:
    page = render_html(build_comparison(CASES["all failed"](make_cell)))
    assert "loss is nan" in page
    assert "No answer" in page


def _bars(comparison: Comparison) -> list[float]:
    chart = next(
        svg for svg in _svgs(render_html(comparison)) if svg[0].get("id") == "memory-title"
    )
    return [
        float((element.get("width") or "").rstrip("%"))
        for element in chart.iter("{http://www.w3.org/2000/svg}rect")
    ]


def test_bars_have_the_length_of_their_bytes(make_cell: Any) -> None:
    # Half weights, half optimizer; the axis ends at 200 MiB and 100 MiB is planned without parts.
    plan = {"memory": {"peak_bytes": 100 * MIB}}
    cells = [make_cell("full", 0, 0.8, peak=190 * MIB), make_cell("lora", 0, 0.8, plan=plan)]
    assert _bars(build_comparison(cells)) == pytest.approx([47.5, 47.5, 50])


def test_difference_marks_are_where_they_belong(make_cell: Any, tmp_path: Path) -> None:
    rows = [{"id": at, "prediction": int(at > 1), "label": 1} for at in range(4)]
    write_predictions(tmp_path / "lora", rows)
    write_predictions(tmp_path / "full", [{**row, "prediction": 1} for row in rows])
    cells = [make_cell("full", 0, 1.0, run_dir="full"), make_cell("lora", 0, 0.5, run_dir="lora")]
    page = render_html(build_comparison(cells, root=tmp_path))
    chart = next(svg for svg in _svgs(page) if svg[0].get("id") == "differences-title")
    # −0.5 [−1.42, +0.42] on an axis from −1.5 to 0.5.
    mark = next(chart.iter("{http://www.w3.org/2000/svg}circle"))
    assert mark.get("cx") == "50.000%"
    assert "hollow" in (mark.get("class") or "")


def test_write_html(make_cell: Any, tmp_path: Path) -> None:
    comparison = build_comparison(_many(make_cell))
    write_html(tmp_path / "report.html", comparison)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_html(comparison)


def test_utilisation_is_shown_where_it_is_known(make_cell: Any) -> None:
    known = build_comparison([make_cell("full", 0, 0.8, seconds=1.0)])
    assert "peak measured before each run: full 25.0%." in render_html(known)
    unknown = build_comparison([make_cell("full", 0, 0.8, speed=Speed(train_seconds=1.0))])
    assert "Model FLOPs utilisation" not in render_html(unknown)
