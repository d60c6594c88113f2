"""From the records of runs to a comparison: means, spreads, savings, differences, notes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from peftlab.errors import Problem, RunFolderError
from peftlab.results.comparison import Cell, Comparison, Metric, Parts, Reference, Row, best_of
from peftlab.results.paired import (
    Difference,
    Run,
    difference,
    mean,
    row_values,
    sample_variance,
    t_quantile,
)
from peftlab.results.store import read_predictions


def build_comparison(
    cells: Iterable[Cell],
    *,
    command: str = "",
    baseline: str = "full",
    baseline_plan: Mapping[str, Any] | None = None,
    metric_unit: str = "",
    root: Path | None = None,
    created: str | None = None,
) -> Comparison:
    """Work out what the runs of one task say.

    Args:
        cells: the runs, in the order in which recipes are to be shown.
        command: what the user typed.
        baseline: the recipe that differences and savings are against.
        baseline_plan: what the baseline would need, used where no run of it finished; as in
            ``plan.json``, with ``memory`` inside.
        metric_unit: unit of the task's metric; empty if it has none.
        root: the folder that the cells' ``run_dir`` are relative to; the working directory if None.
        created: ISO 8601 time; now if None.

    Raises:
        RunFolderError: no cells, cells of several tasks, models or metrics, or one cell twice.
    """
    cells = tuple(cells)
    _check(cells)
    better = cells[0].metric_better
    by_recipe: dict[str, list[Cell]] = {}
    for cell in cells:
        by_recipe.setdefault(cell.recipe, []).append(cell)
    reference = _reference(baseline, by_recipe.get(baseline, []), baseline_plan)
    rows = [_row(recipe, group, reference) for recipe, group in by_recipe.items()]
    runs = {recipe: _runs(group, root or Path()) for recipe, group in by_recipe.items()}
    best = best_of([row for row in rows if row.metric_mean is not None], better)
    compared = []
    for row in rows:
        changes = {
            "difference": _against(row, baseline, runs, better),
            "difference_to_best": _against(row, best.recipe if best else None, runs, better),
            "on_memory_front": _on_front(row, rows, "peak_bytes", better),
            "on_time_front": _on_front(row, rows, "train_seconds", better),
        }
        compared.append(row.model_copy(update=changes))
    names = [cell.metric for cell in cells if cell.metric]
    baselines = [c.majority_baseline for c in cells if c.majority_baseline is not None]
    return Comparison(
        task=cells[0].task,
        model=cells[0].model,
        metric=Metric(name=names[0] if names else "metric", unit=metric_unit, better=better),
        majority_baseline=baselines[0] if baselines else None,
        command=command,
        created=created or datetime.now(UTC).isoformat(timespec="seconds"),
        reference=reference,
        methods=tuple(compared),
        cells=cells,
        notes=tuple(_notes(cells, compared, reference)),
    )


def _check(cells: Sequence[Cell]) -> None:
    if not cells:
        raise RunFolderError("there are no runs to compare.")
    problems = []
    for what in ("task", "model", "metric", "metric_better"):
        # A run that failed early may not know its metric.
        counted = [cell for cell in cells if cell.status == "ok" or what in ("task", "model")]
        values = sorted({str(getattr(cell, what)) for cell in counted})
        if len(values) > 1:
            problems.append(Problem("", f"the runs differ in {what}: {', '.join(values)}."))
    for (recipe, seed), count in Counter((cell.recipe, cell.seed) for cell in cells).items():
        if count > 1:
            problems.append(Problem("", f"{recipe} with seed {seed} is there {count} times."))
    if problems:
        raise RunFolderError(problems)


def _reference(baseline: str, cells: Sequence[Cell], plan: Mapping[str, Any] | None) -> Reference:
    finished = [cell for cell in cells if cell.status == "ok"]
    peak = _mean_of(cell.memory.peak_bytes if cell.memory else None for cell in finished)
    source: Literal["measured", "planned"] | None = "measured" if peak is not None else None
    if peak is None:
        plans = [plan, *(cell.plan for cell in cells)]
        planned = [parts.peak_bytes for each in plans if (parts := _planned(each)) is not None]
        peak = next((value for value in planned if value is not None), None)
        source = "planned" if peak is not None else None
    seconds = _mean_of(cell.speed.train_seconds for cell in finished)
    return Reference(recipe=baseline, peak_bytes=peak, peak_source=source, train_seconds=seconds)


def _row(recipe: str, cells: Sequence[Cell], reference: Reference) -> Row:
    done = [cell for cell in cells if cell.status == "ok"]
    metrics = [value for cell in done if (value := _metric(cell)) is not None]
    seconds = [value for cell in done if (value := cell.speed.train_seconds) is not None]
    params = next((cell.params for cell in (*done, *cells) if cell.params is not None), None)
    memory = _mean_parts(done)
    peak = memory.peak_bytes if memory else None
    train_seconds = mean(seconds) if seconds else None
    sd = _sd(metrics)
    return Row(
        recipe=recipe,
        seeds_ok=len(done),
        seeds_total=len(cells),
        statuses=dict(Counter(cell.status for cell in cells)),
        metric_mean=mean(metrics) if metrics else None,
        metric_sd=sd,
        metric_ci95=None if sd is None else _t_half_width(sd, len(metrics)),
        test_rows=next((cell.test_rows for cell in done if cell.test_rows is not None), None),
        params=params,
        trainable_percent=100 * params.trainable / params.total if params else None,
        saved_bytes=_mean_of(cell.saved_bytes for cell in done),
        memory=memory,
        planned=next((parts for cell in cells if (parts := _planned(cell.plan))), None),
        peak_bytes=peak,
        peak_saving_percent=_saving(peak, reference.peak_bytes),
        train_seconds=train_seconds,
        train_seconds_sd=_sd(seconds),
        time_saving_percent=_saving(train_seconds, reference.train_seconds),
        tokens_per_second=_mean_of(cell.speed.tokens_per_second for cell in done),
        train_flops=_mean_of(cell.speed.train_flops for cell in done),
        model_flops_utilisation=_mean_of(cell.speed.model_flops_utilisation for cell in done),
    )


def _metric(cell: Cell) -> float | None:
    return cell.metrics.get(cell.metric)


def _runs(cells: Sequence[Cell], root: Path) -> dict[int, Run]:
    runs = {}
    for cell in cells:
        metric = _metric(cell)
        if cell.status == "ok" and metric is not None:
            found = read_predictions(root / cell.run_dir) if cell.run_dir else []
            runs[cell.seed] = Run(metric=metric, rows=row_values(found, metric))
    return runs


def _against(
    row: Row,
    other: str | None,
    runs: Mapping[str, Mapping[int, Run]],
    better: Literal["max", "min"],
) -> Difference | None:
    if other is None or other == row.recipe or other not in runs:
        return None
    return difference(runs[row.recipe], runs[other], other, better)


def _on_front(
    row: Row, rows: Sequence[Row], cost: str, better: Literal["max", "min"]
) -> bool | None:
    sign = 1 if better == "max" else -1
    points = {
        other.recipe: (sign * other.metric_mean, -getattr(other, cost))
        for other in rows
        if other.metric_mean is not None and getattr(other, cost) is not None
    }
    if (own := points.get(row.recipe)) is None:
        return None
    return not any(
        point != own and point[0] >= own[0] and point[1] >= own[1] for point in points.values()
    )


def _planned(plan: Mapping[str, Any] | None) -> Parts | None:
    memory = (plan or {}).get("memory")
    if not isinstance(memory, Mapping):
        return None
    known = {name: memory[name] for name in Parts.model_fields if memory.get(name) is not None}
    return Parts(**known) if known else None


def _mean_parts(cells: Sequence[Cell]) -> Parts | None:
    measured = [cell.memory for cell in cells if cell.memory is not None]
    if not measured:
        return None
    return Parts(
        **{
            name: _mean_of(getattr(memory, name) for memory in measured)
            for name in Parts.model_fields
        }
    )


def _mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _sd(values: Sequence[float]) -> float | None:
    return math.sqrt(sample_variance(values)) if len(values) > 1 else None


def _t_half_width(sd: float, count: int) -> float:
    return t_quantile(count - 1) * sd / math.sqrt(count)


def _saving(value: float | None, reference: float | None) -> float | None:
    return 100 * (1 - value / reference) if value is not None and reference else None


def _reused(recipe: str, done: Sequence[Cell]) -> str:
    """In how many of its runs another's activations served; empty if in none."""
    runs = [cell for cell in done if cell.recipe == recipe]
    found = [cell.trunk_cache for cell in runs]
    count = sum(bool(kept.filled_from or kept.found_rows) for kept in found)
    return f"{recipe} ({count} of {len(runs)} runs)" if count else ""


def _notes(cells: Sequence[Cell], rows: Sequence[Row], reference: Reference) -> Iterable[str]:
    done = [cell for cell in cells if cell.status == "ok"]
    single = [row.recipe for row in rows if row.seeds_ok == 1]
    if single:
        yield (
            f"One seed: no spread for {', '.join(single)}. How much another seed would change the "
            "result is not known; do not rank on it."
        )
    if len({row.seeds_ok for row in rows if row.seeds_ok}) > 1:
        yield "Recipes finished different numbers of seeds; differences use the common ones."
    if any(_metric(cell) is None for cell in done):
        yield "A finished run has no value of the metric; means leave it out."
    if reference.peak_source == "planned":
        yield (
            f"No run of {reference.recipe} finished with its memory measured: memory savings are "
            "against its plan."
        )
    elif reference.peak_source is None:
        yield f"There is no {reference.recipe} to take savings against."
    if len({cell.memory.source for cell in done if cell.memory}) > 1:
        yield "Memory was not measured in the same way in all runs."
    places = [cell.environment for cell in done if cell.environment]
    if len({(place.device, place.num_threads, place.num_processes) for place in places}) > 1:
        yield "The runs had different devices, threads or processes: do not compare their times."
    if reused := [text for row in rows if (text := _reused(row.recipe, done))]:
        yield (
            f"Activations of frozen blocks were there already in {', '.join(reused)}: these "
            "training times leave out what other runs had computed."
        )
    if len({json.dumps(place.versions, sort_keys=True) for place in places}) > 1:
        yield "The runs used different versions of the libraries."
    if any(row.difference_to_best and row.difference_to_best.varies == "seeds" for row in rows):
        yield (
            "Test rows could not be paired, so intervals of differences hold for these test rows "
            "only."
        )
    if len(rows) > 2:
        yield (
            "Every interval is 95% by itself, not corrected for the number of recipes, and the "
            "best of several means is a little lucky."
        )
