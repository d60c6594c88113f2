"""Plan the cells of a comparison, run those that are not finished, and say what they show."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftlab.comparing.cells import CellRunner
from peftlab.errors import ConfigError, Problem, UserError
from peftlab.experiment.resolve import resolve
from peftlab.experiment.schema import Experiment
from peftlab.report.html import write_html
from peftlab.report.text import metric_name, number
from peftlab.results.build import build_comparison
from peftlab.results.comparison import Cell, Comparison, Metric, write_comparison
from peftlab.results.record import Record
from peftlab.tasks.metrics import METRICS
from peftlab.units import format_bytes, format_seconds

REPORT = "report.html"


@dataclass(frozen=True)
class CompareResult:
    """A comparison, the folder that holds it, and its report.

    ``interrupted`` tells that the user stopped it: it holds what was finished by then.
    """

    comparison: Comparison
    folder: Path
    report: Path
    interrupted: bool = False


def compare(
    task: str,
    recipes: Sequence[str],
    *,
    seeds: int | Sequence[int] = 3,
    model: str | None = None,
    overrides: Iterable[str] = (),
    root: Path = Path("runs"),
    force: bool = False,
    auto_batch_size: bool = False,
    memory_bytes: int | None = None,
    command: str = "",
    progress: bool = True,
) -> CompareResult:
    """Run every recipe with every seed under equal terms; finished cells are not run again.

    Cells go seed by seed, so that a comparison that is interrupted is a fair one of fewer seeds; of
    a seed's cells, those first whose frozen trunk the others' continue. A cell that fails or runs
    out of memory is recorded and the rest go on.

    Args:
        recipes: names or paths. ``full``, or else the first, is what the others are compared with.
        seeds: how many, counted from 0, or which.
        overrides: ``section.key=value`` texts, for every cell.
        force: run finished cells again.
        auto_batch_size: every recipe in the largest micro-batch that is planned to fit for all of
            its seeds, into ``memory_bytes`` if that is given, at an unchanged effective batch.

    Raises:
        UserError: the request was wrong for any recipe; nothing was run.
        KeyboardInterrupt: before the first cell was finished.
    """
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    _check_request(recipes, chosen)
    experiments = _resolve_all(task, recipes, chosen, model, tuple(overrides))
    records: list[tuple[Record, Path]] = []
    interrupted = False
    with CellRunner(root, force=force, progress=progress, command=command) as runner:
        kept = runner.check([each for each in experiments if each.seed == chosen[0]])
        if auto_batch_size:
            experiments = runner.fit_batch_sizes(experiments, memory_bytes)
        order = list(dict.fromkeys(experiment.recipe for experiment in experiments))
        turns = _turns(order, kept)
        experiments.sort(key=lambda each: (chosen.index(each.seed), turns.index(each.recipe)))
        try:
            for position, experiment in enumerate(experiments, start=1):
                record, folder = runner.run(experiment, experiments[position:])
                records.append((record, folder))
                if progress:
                    print(f"[{position}/{len(experiments)}] {_line(record)}", file=sys.stderr)
                if runner.interrupted or record.status == "interrupted":
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            if not any(record.status != "interrupted" for record, _ in records):
                raise
            interrupted = True
    return _conclude(records, order, root, command, interrupted)


def _turns(recipes: Sequence[str], kept: Mapping[str, int]) -> list[str]:
    """The recipes as their cells take turns: those that keep blocks' outputs, fewest blocks first.

    The others stay in their places.
    """
    keeping = iter(sorted(filter(kept.get, recipes), key=lambda recipe: kept[recipe]))
    return [next(keeping) if kept.get(recipe) else recipe for recipe in recipes]


def _conclude(
    records: Sequence[tuple[Record, Path]],
    recipes: Sequence[str],
    root: Path,
    command: str,
    interrupted: bool,
) -> CompareResult:
    done = {record.recipe for record, _ in records}
    order = [recipe for recipe in recipes if recipe in done]
    ordered = sorted(records, key=lambda pair: (order.index(pair[0].recipe), pair[0].seed))
    metric = METRICS[ordered[0][0].metric]
    comparison = build_comparison(
        [Cell(**record.model_dump(), run_dir=str(folder)) for record, folder in ordered],
        command=command,
        baseline="full" if "full" in order else order[0],
        metric_unit=metric.unit,
    )
    cells = "\n".join(f"{record.identity}-{record.seed}" for record, _ in ordered)
    digest = hashlib.sha256(cells.encode()).hexdigest()[:12]
    folder = ordered[0][1].parent.parent / "comparisons" / digest
    write_comparison(folder, comparison)
    write_html(folder / REPORT, comparison)
    return CompareResult(comparison, folder, folder / REPORT, interrupted)


def _check_request(recipes: Sequence[str], seeds: Sequence[int]) -> None:
    problems = [
        Problem("--recipes", f"{recipe!r} is there {count} times.", "Name each recipe once.")
        for recipe, count in Counter(recipes).items()
        if count > 1
    ]
    if not recipes:
        problems.append(Problem("--recipes", "no recipe is named.", "See 'peftlab ls recipes'."))
    if not seeds or len(set(seeds)) != len(seeds):
        problems.append(Problem("--seeds", "needs at least one seed, and each once."))
    if problems:
        raise ConfigError(problems)


def _resolve_all(
    task: str,
    recipes: Sequence[str],
    seeds: Sequence[int],
    model: str | None,
    overrides: tuple[str, ...],
) -> list[Experiment]:
    """Every experiment, seed by seed; the problems of all recipes at once."""
    experiments: list[Experiment] = []
    problems: dict[Problem, None] = {}
    for seed in seeds:
        for recipe in recipes:
            try:
                resolved = resolve(task, recipe, model=model, seed=seed, overrides=overrides)
                experiments.append(resolved.experiment)
            except UserError as error:
                problems |= dict.fromkeys(error.problems)
    if problems:
        raise ConfigError(problems)
    return experiments


def _line(record: Record) -> str:
    """One finished cell in a line."""
    name = f"{record.recipe} seed {record.seed}"
    if record.status != "ok":
        return f"{name}: {record.status}: {(record.error or '').splitlines()[0]}"
    peak = record.memory.peak_bytes if record.memory else None
    metric = metric_name(Metric(name=record.metric, better=record.metric_better))
    return (
        f"{name}: {metric} {number(record.metrics.get(record.metric))}, "
        f"peak {format_bytes(peak)}, trained in {format_seconds(record.speed.train_seconds)}"
    )
