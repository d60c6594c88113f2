"""Writes the comparison between README.md's markers from a comparison.json.

    python benchmarks/readme_table.py runs/movie-sentiment/comparisons/ID \\
        --machine "2 cores of an AMD EPYC 9B45, no GPU" --wall-seconds 290
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peftlab.files import write_text
from peftlab.report.table import markdown
from peftlab.results.comparison import Comparison, read_comparison
from peftlab.units import format_seconds

BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
README = Path(__file__).resolve().parent.parent / "README.md"
LIBRARIES = ("torch", "transformers", "peft", "accelerate")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("comparison", type=Path, help="comparison.json or its folder")
    parser.add_argument("--machine", required=True, help="what it ran on, in words")
    parser.add_argument("--wall-seconds", type=float, help="of the whole command, as it printed")
    arguments = parser.parse_args()
    comparison = read_comparison(arguments.comparison)
    section = describe(comparison, arguments.machine, arguments.wall_seconds)
    write_text(README, replaced(README.read_text(encoding="utf-8"), section))


def describe(comparison: Comparison, machine: str, wall_seconds: float | None) -> str:
    """The command, the table and where it ran."""
    places = [cell.environment for cell in comparison.cells if cell.environment]
    ran = [machine]
    if places:
        used = places[0].versions
        ran.append(f"torch threads: {places[0].num_threads}, Python {places[0].python}")
        ran += [f"{name} {used[name]}" for name in LIBRARIES if name in used]
    if wall_seconds is not None:
        ran.append(f"{format_seconds(wall_seconds)} for all {len(comparison.cells)} runs")
    command = f"```sh\n{comparison.command}\n```"
    return f"{command}\n\n{markdown(comparison)}\nRun on {', '.join(ran)}."


def replaced(text: str, section: str) -> str:
    """``text`` with ``section`` between the markers, in place of what was there."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"README.md needs the markers {BEGIN} and {END}")
    return f"{before}{begin}\n\n{section}\n\n{end}{after}"


if __name__ == "__main__":
    main()
