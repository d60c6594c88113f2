"""Writes docs/benchmarks.md from the results of benchmarks/speed.py."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from speed_sides import OURS, PEERS, TASK

from peftlab.results.paired import Run, difference
from peftlab.units import MIB

Entry = Mapping[str, Any]
METRIC = "accuracy"
LIBRARIES = ("torch", "transformers", "peft", "accelerate")
HEAD = f"""# Speed against transformers.Trainer and PEFT

Written by `benchmarks/speed.py`: the same training on the same machine, by peftlab and by what
users run otherwise. The task is {TASK}. A recipe's method, new head, AdamW, learning rate, warm-up,
clipping, batch size, epochs and seed are the same on all sides, and so is the number of threads.

- **peftlab**: `peftlab train` as it comes. Its trunk cache is empty at the start of each run, so
  what a frozen trunk puts there is computed within the training time.
- **trainer**: `transformers.Trainer` with its defaults around PEFT's own layers, or around the
  model with frozen parameters: random batches, padded to their longest row, dropout in all layers.
- **trainer-by-length**: the same with `train_sampling_strategy="group_by_length"`.

Each run is a fresh process. The sides of a pair follow each other, and who begins changes from
pair to pair. A ratio is peer ÷ peftlab within a pair: the median over the pairs, and the smallest
and the largest of them; other figures are medians. A dash is a value that was not measured.
"""
TIME = """### Time

*Training* is the wall time of `Trainer.train()`, and for peftlab from the assembled model to the
trained one; tokenising is not in it, and nothing is evaluated or saved meanwhile. *Whole run* adds
loading, tokenising and testing, and for peftlab its plan, its records and the saved adapter; not
the imports.
"""
MEMORY = """### Memory

*Live*: the storages alive at the peak of an optimizer step on the largest batch, by the
[same meter](measuring.md#how-on-cpu) on all sides. *Process*: the most that the process held
resident by the end of training, libraries included. *Cache*: what peftlab left on disk for later
runs.
"""
QUALITY = """### Quality

The weights of the last step, mean ± standard deviation over the seeds. *Train loss* is the mean
over the steps of the last epoch, as each side trains (with its dropout); *test loss* the mean
cross-entropy on the test rows. *Difference* is peftlab − peer with Student's 95% interval over the
seeds: where it holds zero, the two are equal within the noise of seeds.
"""
GROWTH = """## How the cost of a comparison grows

The wall time of a whole `peftlab compare`, from the start of Python to its end: loading, planning,
an evaluation each epoch and the test of every cell. Once with the cache of the frozen trunk, which
is empty at the start, and once with `--set train.trunk_cache=off`; a ratio is without ÷ with. The
two commands take turns: before each of its cells a command waits until the other has done one, and
a command's time is that of its turns, so that a change in the machine's speed meets both.
Times of training and evaluation are sums over the cells. *Arithmetic* is the floating-point
operations of training, counted, filling the cache included: the ratio that training would come to
if nothing but matrix products took time. *Rate* is that over the seconds of training: a replayed
step has fewer products, and what is none (updates, dropout, norms, Python) is more of its time.
"""


def page(content: Mapping[str, Any], results: Path) -> str:
    """The whole page.

    Args:
        content: of the results file; ``results`` is where it lies, for the commands.
    """
    ran = _ran_on(content["environment"])
    parts = [HEAD]
    for setting, pairs in _by_setting(content["pairs"]):
        alike = _by_peers(pairs)
        commands = [_pairs_command(setting, group, results) for group in alike]
        parts += [_heading(setting), _shell(*commands)]
        parts += [f"{ran} {_commits(pairs)}\n", TIME, _time(pairs), MEMORY, _memory(pairs)]
        parts += [QUALITY, _quality(pairs)]
    if content["growth"]:
        settings = list(_by_setting(content["growth"]))
        commands = [_growth_command(setting, pairs, results) for setting, pairs in settings]
        parts += [GROWTH, _shell(*commands), f"{ran} {_commits(content['growth'])}\n"]
        parts += [_growth(settings), *(_cells(*each) for each in settings)]
    return "\n".join(parts)


def _by_setting(entries: Sequence[Entry]) -> Iterator[tuple[Entry, list[Entry]]]:
    """Entries with the same setting, in the order in which the settings first came."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(json.dumps(entry["setting"]), []).append(entry)
    for setting, group in groups.items():
        yield json.loads(setting), group


def _by_peers(pairs: Sequence[Entry]) -> list[list[Entry]]:
    """Entries with the same sides: those of one command."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in pairs:
        groups.setdefault(tuple(_peers([entry])), []).append(entry)
    return list(groups.values())


def _heading(setting: Entry) -> str:
    length = f"{setting['epochs']} epochs"
    if setting["max_steps"] is not None:
        length = f"{setting['max_steps']} steps"
    model, rows, size = setting["model"], setting["rows"], setting["batch_size"]
    return f"## {model}, {rows:,} rows, batches of {size}, {length}\n"


def _time(pairs: Sequence[Entry]) -> str:
    def cells(group: Sequence[Entry], side: str) -> Iterator[str]:
        for name in ("train_seconds", "run_seconds"):
            yield _median(_values(group, side, name), "{:.1f}")
            yield _ratio(group, side, name)

    return _sides(pairs, ("training, s", "ratio", "whole run, s", "ratio"), cells)


def _memory(pairs: Sequence[Entry]) -> str:
    def cells(group: Sequence[Entry], side: str) -> Iterator[str]:
        for name in ("live_peak_bytes", "process_peak_bytes"):
            yield _mebibytes(_values(group, side, name))
            yield _ratio(group, side, name)
        yield _mebibytes(_values(group, side, "cache_bytes"))

    return _sides(pairs, ("live, MiB", "ratio", "process, MiB", "ratio", "cache, MiB"), cells)


def _sides(
    pairs: Sequence[Entry],
    head: Sequence[str],
    cells: Callable[[Sequence[Entry], str], Iterable[str]],
) -> str:
    """One row for each recipe and side; ``cells`` gets those of a recipe that have the side."""
    rows = []
    for method, group in _by_method(pairs):
        for side in (OURS, *_peers(group)):
            those = [entry for entry in group if side in entry["sides"]]
            rows.append([method, side, str(len(those)), *cells(those, side)])
    return _table(["recipe", "side", "pairs", *head], rows)


def _quality(pairs: Sequence[Entry]) -> str:
    def cells(group: Sequence[Entry], side: str) -> Iterator[str]:
        # A second pair of the same seed says nothing new about quality.
        first = list({entry["seed"]: entry for entry in reversed(group)}.values())
        results = [entry["sides"][side] for entry in first]
        yield str(len(first))
        yield _spread([result["metrics"][METRIC] for result in results])
        yield "" if side == OURS else _difference(first, side)
        yield _spread([result["train_loss"] for result in results])
        yield _spread([result["test_loss"] for result in results])

    return _sides(pairs, ("seeds", METRIC, "difference", "train loss", "test loss"), cells)


def _difference(entries: Sequence[Entry], peer: str) -> str:
    ours, theirs = (
        {entry["seed"]: Run(metric=entry["sides"][side]["metrics"][METRIC]) for entry in entries}
        for side in (OURS, peer)
    )
    found = difference(ours, theirs, peer, "max")
    if found is None:
        return "–"
    interval = f" [{found.low:+.4f}, {found.high:+.4f}]" if found.low is not None else ""
    return f"{found.value:+.4f}{interval}"


def _growth(settings: Sequence[tuple[Entry, list[Entry]]]) -> str:
    measures: dict[str, Callable[[Entry], float]] = {
        "the whole command": lambda side: side["wall_seconds"],
        "training": lambda side: _sum(side, "train_seconds"),
        "training and evaluation": lambda side: _sum(side, "train_seconds", "eval_seconds"),
    }
    rows = []
    for setting, entries in settings:
        what = [", ".join(setting["recipes"]), str(setting["seeds"]), str(setting["epochs"])]
        for name, measure in measures.items():
            cached, uncached = (
                [measure(entry[side]) for entry in entries] for side in ("cached", "uncached")
            )
            ratios = [without / with_it for with_it, without in zip(cached, uncached, strict=True)]
            medians = [_median(values, "{:.1f}") for values in (cached, uncached)]
            rows.append([*what, str(len(entries)), name, *medians, _ratios(ratios)])
        first = entries[0]
        flops = [_sum(first[side], "train_flops") for side in ("cached", "uncached")]
        amounts = [f"{amount / 1e12:.1f} TFLOP" for amount in flops]
        rows.append([*what, "", "arithmetic", *amounts, _ratios([flops[1] / flops[0]])])
        rates = [
            [
                _sum(each[side], "train_flops") / _sum(each[side], "train_seconds")
                for each in entries
            ]
            for side in ("cached", "uncached")
        ]
        reached = [f"{statistics.median(rate) / 1e9:.0f} GFLOP/s" for rate in rates]
        rows.append([*what, str(len(entries)), "rate", *reached, ""])
    head = ["recipes", "seeds", "epochs", "pairs", "time of", "cached, s", "uncached, s", "ratio"]
    return _table(head, rows)


def _sum(side: Entry, *names: str) -> float:
    return math.fsum(cell[name] for cell in side["cells"] for name in names)


def _cells(setting: Entry, entries: Sequence[Entry]) -> str:
    """Training seconds of every cell, by seed: the first to need a trunk fills its cache."""
    head = ["recipe", "", *(f"seed {seed}, s" for seed in range(setting["seeds"])), METRIC]
    rows = []
    for recipe in setting["recipes"]:
        for side in ("cached", "uncached"):
            row, metrics = [recipe, side], []
            for seed in range(setting["seeds"]):
                cells = [
                    cell
                    for entry in entries
                    for cell in entry[side]["cells"]
                    if (cell["recipe"], cell["seed"]) == (recipe, seed)
                ]
                row.append(_median([cell["train_seconds"] for cell in cells], "{:.2f}"))
                metrics.append(cells[0]["metric"])
            rows.append([*row, _spread(metrics)])
    title = f"Training time of each cell, {setting['epochs']} epochs:\n"
    return f"{title}\n{_table(head, rows)}"


def _pairs_command(setting: Entry, pairs: Sequence[Entry], results: Path) -> list[str]:
    seeds = sorted({entry["seed"] for entry in pairs})
    words = ["--methods", ",".join(dict.fromkeys(entry["method"] for entry in pairs))]
    words += ["--peers", ",".join(_peers(pairs)), "--seeds", _seed_words(seeds)]
    words += ["--pairs", str(1 + max(entry["repeat"] for entry in pairs))]
    for key, value in setting.items():
        words += [f"--{key.replace('_', '-')}", str(value)] if value is not None else []
    return [*words, "--results", results.name]


def _growth_command(setting: Entry, entries: Sequence[Entry], results: Path) -> list[str]:
    words = ["--growth", "--growth-recipes", ",".join(setting["recipes"])]
    words += ["--growth-seeds", str(setting["seeds"]), "--growth-epochs", str(setting["epochs"])]
    words += ["--pairs", str(1 + max(entry["repeat"] for entry in entries))]
    words += ["--model", setting["model"], "--rows", str(setting["rows"])]
    return [*words, "--results", results.name]


def _seed_words(seeds: Sequence[int]) -> str:
    if list(seeds) == list(range(len(seeds))):
        return str(len(seeds))
    return ",".join(map(str, seeds)) + "," * (len(seeds) == 1)


def _shell(*commands: Sequence[str]) -> str:
    lines = [shlex.join(["python", "benchmarks/speed.py", *words]) for words in commands]
    return "\n".join(["```sh", *lines, "```\n"])


def _ran_on(environment: Entry) -> str:
    versions = [f"{name} {environment['versions'][name]}" for name in LIBRARIES]
    return (
        f"Run on {environment['cores']} cores of {environment['device']}, torch threads: "
        f"{environment['threads']}, Python {environment['python']}, {', '.join(versions)}."
    )


def _commits(entries: Iterable[Entry]) -> str:
    """Which source ran; ``+`` marks one with changes that were not committed."""
    commits = dict.fromkeys(entry["commit"] for entry in entries if entry["commit"] is not None)
    return f"Source: {', '.join(commits)}." if commits else ""


def _by_method(pairs: Sequence[Entry]) -> Iterator[tuple[str, list[Entry]]]:
    for method in dict.fromkeys(entry["method"] for entry in pairs):
        yield method, [entry for entry in pairs if entry["method"] == method]


def _peers(pairs: Sequence[Entry]) -> list[str]:
    return [peer for peer in PEERS if any(peer in entry["sides"] for entry in pairs)]


def _values(group: Sequence[Entry], side: str, name: str) -> list[float]:
    known = [entry["sides"][side][name] for entry in group]
    return [value for value in known if value is not None]


def _ratio(group: Sequence[Entry], side: str, name: str) -> str:
    if side == OURS:
        return ""
    pairs = [(entry["sides"][side][name], entry["sides"][OURS][name]) for entry in group]
    return _ratios([theirs / ours for theirs, ours in pairs if theirs and ours])


def _ratios(ratios: Sequence[float]) -> str:
    if len(ratios) < 2:
        return _median(ratios, "**{:.2f}**")
    return f"{_median(ratios, '**{:.2f}**')} ({min(ratios):.2f}–{max(ratios):.2f})"


def _median(values: Sequence[float], form: str) -> str:
    return form.format(statistics.median(values)) if values else "–"


def _mebibytes(values: Sequence[float]) -> str:
    return _median([value / MIB for value in values], "{:,.0f}")


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rules = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rules, *rows)) + "\n"
