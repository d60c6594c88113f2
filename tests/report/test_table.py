import io
from typing import Any

import pytest
from rich.console import Console

from peftlab.report.table import markdown, rich_table
from peftlab.results.build import build_comparison
from peftlab.results.comparison import Comparison
from peftlab.units import MIB


@pytest.fixture
def comparison(make_cell: Any) -> Comparison:
    values = {"full": (0.80, 0.82, 0.84), "freeze-top2": (0.70, 0.72, 0.74)}
    cells = [
        make_cell(recipe, seed, value, peak=peak * MIB, seconds=seconds)
        for (recipe, accuracies), peak, seconds in zip(
            values.items(), (600, 150), (80.0, 20.0), strict=True
        )
        for seed, value in enumerate(accuracies)
    ]
    cells[3] = cells[3].model_copy(update={"metrics": {"accuracy": 0.71}})
    return build_comparison([*cells, make_cell("lora|[red]x", 0, None, status="oom")])


def _printed(comparison: Comparison, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(rich_table(comparison, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_figures(comparison: Comparison) -> None:
    lines = markdown(comparison).splitlines()
    cells = [[cell.strip() for cell in line.split(" | ")] for line in lines[2:5]]
    assert [cell.strip("| ") for cell in cells[0]] == [
        "full", "0.820 ± 0.020", "–", "1.00%", "80 B", "600 MiB", "–", "1m20s", "–", "3/3",
    ]  # fmt: skip
    # Differences −0.09, −0.10, −0.10 leave zero out.
    assert [cell.strip("| ") for cell in cells[1]] == [
        "freeze-top2", "0.723 ± 0.015", "−0.097 \\*", "1.00%", "80 B", "150 MiB", "75%", "20.0s",
        "75%", "3/3",
    ]  # fmt: skip


def test_markdown_escapes_names(comparison: Comparison) -> None:
    line = next(line for line in markdown(comparison).splitlines() if "lora" in line)
    assert line.startswith("| lora\\|\\[red\\]x | – | – | 1.00% | 80 B".replace("80 B", "–"))


@pytest.mark.parametrize("width", [80, 100])
def test_the_terminal_table_is_whole(comparison: Comparison, width: int) -> None:
    printed = _printed(comparison, width)
    assert max(map(len, printed.splitlines())) <= width
    for text in ("freeze-top2", "0.820 ± 0.020", "−0.097 *", "600 MiB", "75%", "1m20s", "3/3"):
        assert text in printed
    assert "[red]x" in printed
    assert "1 oom" in " ".join(printed.split())
    assert ("80 B" in printed) == (width == 100)


def test_savings_against_a_plan_say_so(make_cell: Any) -> None:
    plan = {"memory": {"peak_bytes": 400 * MIB}}
    cells = [make_cell("lora", 0, 0.8, peak=100 * MIB)]
    text = markdown(build_comparison(cells, baseline_plan=plan))
    assert "less (plan)" in text
    assert "| 75% |" in text
    assert "against the plan of full" in text


@pytest.mark.parametrize(
    ("unit", "heading"), [("share", "accuracy"), ("", "accuracy"), ("ms", "accuracy (ms)")]
)
def test_the_heading_has_the_unit(make_cell: Any, unit: str, heading: str) -> None:
    text = markdown(build_comparison([make_cell("full", 0, 0.8)], metric_unit=unit))
    assert f"| {heading} |" in text
