"""Page faults and time of training steps with glibc's own limits and with those that a run sets.

    python benchmarks/host_allocator.py [--rounds 3] [--write docs/decisions/host-allocator.md]

Runs of a few steps and of some more, each `peftlab train` in a process of its own, alternating;
what a step costs is their difference over the steps between, its time as a ratio to that with
glibc's own limits in the same round. Linux with glibc.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pages import write_section

from peftlab.units import MIB

RECIPES = ("lora", "full", "freeze-top2")
STEPS = (5, 45)
GLIBCS_OWN = "glibc's own"
# A run leaves malloc alone where the environment tunes it; the first of these tunes nothing.
LIMITS = {
    GLIBCS_OWN: {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"},
    "up to 32 MiB": {
        "GLIBC_TUNABLES": (
            f"glibc.malloc.mmap_threshold={32 * MIB}:glibc.malloc.trim_threshold={2**31 - 1}"
        )
    },
    "of a run": {},
}


@dataclass(frozen=True)
class Cost:
    """Of one run, or of one of its steps."""

    page_faults: float
    process_peak_bytes: float
    train_seconds: float


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
    return Cost(
        usage.ru_minflt,
        record["memory"]["process_peak_bytes"],
        record["speed"]["train_seconds"],
    )


def step(recipe: str, limits: str) -> Cost:
    """What one of the later steps costs; the peak is the longer run's."""
    few, many = (run(recipe, limits, steps) for steps in STEPS)
    between = STEPS[1] - STEPS[0]
    return Cost(
        (many.page_faults - few.page_faults) / between,
        many.process_peak_bytes,
        (many.train_seconds - few.train_seconds) / between,
    )


def row(recipe: str, limits: str, costs: Sequence[Cost], own: Sequence[Cost]) -> str:
    """A row of the table.

    Args:
        own: with glibc's own limits, round by round as ``costs``.
    """
    ratios = [
        cost.train_seconds / first.train_seconds for cost, first in zip(costs, own, strict=True)
    ]
    cells = (
        recipe,
        limits,
        f"{statistics.median(cost.page_faults for cost in costs):,.0f}",
        f"{statistics.median(ratios):.2f}",
        f"{statistics.median(cost.process_peak_bytes for cost in costs) / MIB:,.0f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="page whose table to write")
    arguments = parser.parse_args()
    found: dict[tuple[str, str], list[Cost]] = {}
    for _ in range(arguments.rounds):
        for recipe in RECIPES:
            for limits in LIMITS:
                found.setdefault((recipe, limits), []).append(step(recipe, limits))
                print(recipe, limits, found[recipe, limits][-1], file=sys.stderr, flush=True)
    lines = [
        "| recipe | limits | page faults a step | time of a step | process peak, MiB |",
        "| --- | --- | ---: | ---: | ---: |",
        *(
            row(recipe, limits, costs, found[recipe, GLIBCS_OWN])
            for (recipe, limits), costs in found.items()
        ),
    ]
    if arguments.write:
        write_section(arguments.write, "faults", "\n".join(lines))
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
