"""The runs of several recipes and seeds on one task, and what can honestly be said of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from peftlab.config import Config
from peftlab.files import write_json
from peftlab.results.paired import Difference
from peftlab.results.record import ParameterCounts, Record
from peftlab.results.store import read_json

SCHEMA_VERSION = 1
COMPARISON = "comparison.json"
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "temporary")
"""The parts of a run's memory, in the order in which they are shown."""


class Cell(Record):
    """One recipe × seed: its record, and where its folder is; None if it left none."""

    run_dir: str | None = None


class Metric(Config):
    """What is compared; ``unit`` is "share" for one from 0 to 1, empty for none."""

    name: str
    unit: str = ""
    better: Literal["max", "min"] = "max"


class Parts(Config):
    """Bytes by part at the peak of a step; means over seeds, or a plan's."""

    weights_bytes: float | None = None
    gradients_bytes: float | None = None
    optimizer_bytes: float | None = None
    activations_bytes: float | None = None
    logits_bytes: float | None = None
    temporary_bytes: float | None = None
    peak_bytes: float | None = None

    def named(self) -> dict[str, float]:
        """The parts that are known, by the names of ``PARTS``."""
        known = {part: getattr(self, f"{part}_bytes") for part in PARTS}
        return {part: value for part, value in known.items() if value is not None}


class Row(Config):
    """One recipe over its seeds. Means are over the runs that finished; None is unknown.

    Args:
        metric_sd: sample standard deviation over seeds; None with one.
        metric_ci95: half width of the t interval of the mean over seeds; None with one.
        memory: measured, means over seeds.
        planned: as planned, the same for all seeds.
        peak_saving_percent: against the reference of the comparison; negative if it takes more.
        difference: metric minus the baseline's, over common seeds.
        difference_to_best: metric minus that of the recipe with the best mean.
        on_memory_front: no other recipe is at least as good and smaller, or as small and better.
        on_time_front: the same with training time.
    """

    recipe: str
    seeds_ok: int
    seeds_total: int
    statuses: dict[str, int]
    metric_mean: float | None = None
    metric_sd: float | None = None
    metric_ci95: float | None = None
    test_rows: int | None = None
    params: ParameterCounts | None = None
    trainable_percent: float | None = None
    saved_bytes: float | None = None
    memory: Parts | None = None
    planned: Parts | None = None
    peak_bytes: float | None = None
    peak_saving_percent: float | None = None
    train_seconds: float | None = None
    train_seconds_sd: float | None = None
    time_saving_percent: float | None = None
    tokens_per_second: float | None = None
    train_flops: float | None = None
    model_flops_utilisation: float | None = None
    difference: Difference | None = None
    difference_to_best: Difference | None = None
    on_memory_front: bool | None = None
    on_time_front: bool | None = None


class Reference(Config):
    """What savings are against. ``peak_source`` says whether its peak was measured or planned."""

    recipe: str
    peak_bytes: float | None = None
    peak_source: Literal["measured", "planned"] | None = None
    train_seconds: float | None = None


class Comparison(Config):
    """``comparison.json``: one cell a recipe × seed, one row a recipe."""

    schema_version: int = SCHEMA_VERSION
    task: str
    model: str
    metric: Metric
    majority_baseline: float | None = None
    command: str
    created: str
    reference: Reference
    methods: tuple[Row, ...]
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Row | None:
        """The row with the best mean; the first of equals."""
        known = [row for row in self.methods if row.metric_mean is not None]
        return best_of(known, self.metric.better)

    def cells_of(self, recipe: str) -> list[Cell]:
        """The cells of one recipe, by seed."""
        found = [cell for cell in self.cells if cell.recipe == recipe]
        return sorted(found, key=lambda cell: cell.seed)


def write_comparison(folder: Path, comparison: Comparison) -> Path:
    """Write ``comparison.json`` into ``folder``, atomically; returns its path."""
    path = folder / COMPARISON
    write_json(path, comparison.model_dump(mode="json"))
    return path


def read_comparison(path: Path) -> Comparison:
    """Read ``comparison.json``, given it or its folder.

    Raises:
        RunFolderError: missing, damaged, or written by another version of the schema.
    """
    path = path / COMPARISON if path.is_dir() else path
    hint = "Run the comparison again: finished runs are not repeated."
    return read_json(path, Comparison, SCHEMA_VERSION, hint)


def best_of(rows: Sequence[Row], better: Literal["max", "min"]) -> Row | None:
    """The row with the best mean metric; the first of equals, None of none."""
    sign = 1 if better == "max" else -1
    return max(rows, key=lambda row: sign * (row.metric_mean or 0.0), default=None)
