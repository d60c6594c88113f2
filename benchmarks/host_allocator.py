"""Page faults of training steps with glibc's own limits and with those that a run sets.

    python benchmarks/host_allocator.py [--rounds 2] [--write docs/decisions/host-allocator.md]

Runs of a few steps and of some more, each `peftlab train` in a process of its own, alternating;
what a step costs is their difference over the steps between. Linux with glibc.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pages import write_section

from peftlab.units import MIB

RECIPES = ("lora", "full", "freeze-top2")
STEPS = (5, 25)
# A tunable of malloc leaves the limits alone; this one has its default.
LIMITS = {
    "glibc's own": {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"},
    "of a run": {},
}


@dataclass(frozen=True)
class Cost:
    """Of one run, or of one of its steps."""

    page_faults: float
    process_peak_bytes: float


def run(recipe: str, limits: str, steps: int) -> Cost:
    """Train in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["peftlab", "train", "movie-sentiment", "--recipe", recipe, "--output-dir", folder]
        for value in (
            f"train.max_steps={steps}",
            "train.eval_strategy=no",
            "train.load_best_model_at_end=false",
            "data.max_eval_rows=64",
        ):
            words += ["--set", value]
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            env={**os.environ, **LIMITS[limits], "PEFTLAB_TRUNK_CACHE": f"{folder}/trunk"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"failed: {' '.join(words)}")
        record = json.loads(next(Path(folder).rglob("record.json")).read_text(encoding="utf-8"))
    return Cost(usage.ru_minflt, record["memory"]["process_peak_bytes"])


def step(recipe: str, limits: str) -> Cost:
    """What one of the later steps costs; the peak is the longer run's."""
    few, many = (run(recipe, limits, steps) for steps in STEPS)
    between = STEPS[1] - STEPS[0]
    return Cost(
        (many.page_faults - few.page_faults) / between,
        many.process_peak_bytes,
    )


def row(recipe: str, limits: str, costs: Sequence[Cost]) -> str:
    def median(value: Callable[[Cost], float], form: str) -> str:
        return form.format(statistics.median(map(value, costs)))

    cells = (
        recipe,
        limits,
        median(lambda cost: cost.page_faults, "{:,.0f}"),
        median(lambda cost: cost.process_peak_bytes / MIB, "{:,.0f}"),
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", type=Path, help="page whose table to write")
    arguments = parser.parse_args()
    found: dict[tuple[str, str], list[Cost]] = {}
    for _ in range(arguments.rounds):
        for recipe in RECIPES:
            for limits in LIMITS:
                found.setdefault((recipe, limits), []).append(step(recipe, limits))
                print(recipe, limits, found[recipe, limits][-1], file=sys.stderr, flush=True)
    lines = [
        "| recipe | limits | page faults a step | process peak, MiB |",
        "| --- | --- | ---: | ---: |",
        *(row(recipe, limits, costs) for (recipe, limits), costs in found.items()),
    ]
    if arguments.write:
        write_section(arguments.write, "faults", "\n".join(lines))
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
