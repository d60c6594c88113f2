"""The answer in words: which way to fine-tune, as far as these runs can say."""

from __future__ import annotations

from dataclasses import dataclass

from peftlab.report import text
from peftlab.results.comparison import Comparison, Row
from peftlab.units import format_bytes, format_seconds


@dataclass(frozen=True)
class Findings:
    """A headline, and the sentences that support or limit it."""

    headline: str
    details: tuple[str, ...] = ()


def findings(comparison: Comparison) -> Findings:
    """Answer from the intervals: not shown worse than the best, then cheapest.

    A recipe counts as being within noise of the best where the 95% interval of their difference
    includes zero; the sentence always gives that interval, as not shown worse is not shown equal.
    """
    name = comparison.metric.name
    best = comparison.best
    if best is None:
        return Findings("No answer: no run finished with a value of the metric.")
    known = [row for row in comparison.methods if row.metric_mean is not None]
    if len(known) == 1:
        rest = " Nothing else finished." if len(comparison.methods) > 1 else ""
        headline = f"{best.recipe} reaches {name} {text.mean_sd(best)}.{rest}"
        return Findings(headline, (_nothing_to_compare(), *_caveats(comparison, known)))
    unknown = [row for row in known if row is not best and _verdict(row) is None]
    if len(unknown) == len(known) - 1:
        headline = (
            f"No recipe can be told from another yet: {best.recipe} has the best {name} "
            f"({text.mean_sd(best)}), with no measure of chance."
        )
        return Findings(headline, _caveats(comparison, known))
    within = [row for row in known if row is best or _verdict(row) == "no difference shown"]
    small, fast = _cheapest(within, "peak_bytes"), _cheapest(within, "train_seconds")
    details = [_sentence(row, best, name) for row in _distinct(small, fast) if row is not best]
    worse = [row.recipe for row in known if _verdict(row) == "worse"]
    if worse:
        details.append(f"Shown to be worse than {best.recipe}: {text.join(worse)}.")
    if unknown:
        names = text.join([row.recipe for row in unknown])
        details.append(f"Not comparable with {best.recipe} yet: {names}.")
    prefix = "On one seed only: " if all(row.seeds_ok == 1 for row in known) else ""
    headline = prefix + _headline(comparison, best, within, small, fast)
    return Findings(headline, (*details, *_caveats(comparison, known)))


def _headline(
    comparison: Comparison, best: Row, within: list[Row], small: Row | None, fast: Row | None
) -> str:
    name = comparison.metric.name
    if len(within) == 1:
        return f"{best.recipe}: it has the best {name} ({text.mean_sd(best)}), beyond noise."
    chosen = _distinct(small, fast)
    if not chosen:
        names = text.join([row.recipe for row in within])
        return f"{names} reach the same {name} within noise; what they cost was not measured."
    if len(chosen) == 1:
        row = chosen[0]
        if row is best:
            return f"{row.recipe}: the best {name} ({text.mean_sd(row)}){_cost(row, small, fast)}"
        return (
            f"{row.recipe}: its {name} ({text.mean_sd(row)}) is within noise of the best "
            f"({best.recipe}, {text.mean_sd(best)}){_cost(row, small, fast)}"
        )
    first, second = chosen
    return (
        f"{first.recipe} where memory is short ({format_bytes(first.peak_bytes)}), "
        f"{second.recipe} where time is ({format_seconds(second.train_seconds)}): both within "
        f"noise of the best {name}."
    )


def _cost(row: Row, small: Row | None, fast: Row | None) -> str:
    words = [word for word, least in (("memory", small), ("time", fast)) if row is least]
    return f". Of the recipes within noise it takes the least {text.join(words)}."


def _sentence(row: Row, best: Row, name: str) -> str:
    change = row.difference_to_best
    cost = [
        f"{text.saving(abs(value))} {'less' if value > 0 else 'more'} {what}"
        for value, what in (
            (_saving(row.peak_bytes, best.peak_bytes), "peak memory"),
            (_saving(row.train_seconds, best.train_seconds), "training time"),
        )
        if value is not None
    ]
    costs = f"; it takes {text.join(cost)} than {best.recipe}" if cost else ""
    return (
        f"{row.recipe} against {best.recipe}: {name} {text.interval(change)}{costs}. "
        "The interval is what the data allow, not proof that they are equal."
    )


def _caveats(comparison: Comparison, known: list[Row]) -> tuple[str, ...]:
    found = []
    floor, better = comparison.majority_baseline, comparison.metric.better
    if floor is not None:
        sign = 1 if better == "max" else -1
        idle = [row.recipe for row in known if sign * ((row.metric_mean or 0) - floor) <= 0]
        if idle:
            found.append(
                f"No better than always giving the most frequent answer ({text.number(floor)}): "
                f"{text.join(idle)}."
            )
    if all(row.seeds_ok == 1 for row in known):
        found.append("One seed a recipe: how much another seed would change this is not known.")
    failed = [row.recipe for row in comparison.methods if row.seeds_ok == 0]
    if failed:
        found.append(f"No run finished of: {text.join(failed)}.")
    return tuple(found)


def _nothing_to_compare() -> str:
    return "One recipe cannot answer which is better; add more with --recipes."


def _verdict(row: Row) -> str | None:
    return row.difference_to_best.verdict if row.difference_to_best else None


def _cheapest(rows: list[Row], cost: str) -> Row | None:
    known = [row for row in rows if getattr(row, cost) is not None]
    return min(known, key=lambda row: float(getattr(row, cost)), default=None)


def _distinct(*rows: Row | None) -> list[Row]:
    found: list[Row] = []
    for row in rows:
        if row is not None and row not in found:
            found.append(row)
    return found


def _saving(value: float | None, reference: float | None) -> float | None:
    return 100 * (1 - value / reference) if value is not None and reference else None
