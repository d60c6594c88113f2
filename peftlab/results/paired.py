"""The difference between two recipes that ran on the same seeds and the same test rows.

Each run gives every test row a value whose mean is the metric (1 or 0 for accuracy, the absolute
error for MAE). The differences d[s, i] of seed s and row i are taken first: what makes a row hard
for both recipes cancels (McNemar 1947; for model evaluations Miller 2024, arXiv:2411.00640, §4.2).

Seeds and rows are both samples, so the variance of the mean of d is estimated as
var_i(mean_s d) / rows + var_s(mean_i d) / seeds; both terms hold the residual once, which makes the
sum slightly conservative. The 95% interval is Student's t with the degrees of freedom of such a sum
(Satterthwaite 1946). With one seed only the first term is known. Where the metric is no mean over
rows (a correlation, F1) or predictions are missing, only seeds are paired: the second term alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from peftlab.config import Config

Verdict = Literal["better", "worse", "no difference shown"]
Rows = Mapping[Any, float]
_SAME_METRIC = 1e-6


class Difference(Config):
    """One recipe's metric minus another's, with a 95% interval.

    Args:
        against: the other recipe.
        value: mean over common seeds, in units of the metric.
        low: lower end of the interval; None if there is no interval.
        high: upper end of it.
        verdict: with the metric's direction taken into account; None without an interval.
        varies: what the interval lets vary: seeds and test rows, only one of them, or nothing.
        seeds: common seeds.
        rows: common test rows; None where rows were not paired.
    """

    against: str
    value: float
    low: float | None
    high: float | None
    verdict: Verdict | None
    varies: Literal["seeds and rows", "rows", "seeds", "nothing"]
    seeds: int
    rows: int | None


class Run(Config):
    """What pairing needs of one run: its metric, and its rows' values where they make it up."""

    metric: float
    rows: dict[str, float] | None = None


def t_quantile(degrees: float) -> float:
    """The 97.5% quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def sample_variance(values: Sequence[float]) -> float:
    """With n − 1 in the denominator; needs two values."""
    centre = mean(values)
    return math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)


def row_values(
    predictions: Sequence[Mapping[str, Any]], metric: float | None
) -> dict[str, float] | None:
    """Per row, the value whose mean is ``metric``; None if no such value is found.

    Tries what a row states (``score``, ``correct``), then agreement with the label, then the
    absolute and the squared error: the one that reproduces the metric is the right one.
    """
    if metric is None or not predictions:
        return None
    for value_of in (_stated, _agrees, _absolute_error, _squared_error):
        values = [value_of(row) for row in predictions]
        known = [value for value in values if value is not None]
        if len(known) == len(values) and abs(mean(known) - metric) <= _SAME_METRIC:
            by_id = {str(row["id"]): value for row, value in zip(predictions, known, strict=True)}
            return by_id if len(by_id) == len(known) else None
    return None


def _stated(row: Mapping[str, Any]) -> float | None:
    value = row.get("score", row.get("correct"))
    return float(value) if isinstance(value, (bool, int, float)) else None


def _agrees(row: Mapping[str, Any]) -> float | None:
    return float(row["prediction"] == row["label"]) if "label" in row else None


def _absolute_error(row: Mapping[str, Any]) -> float | None:
    prediction, label = row["prediction"], row.get("label")
    if isinstance(prediction, (int, float)) and isinstance(label, (int, float)):
        return abs(float(prediction) - float(label))
    return None


def _squared_error(row: Mapping[str, Any]) -> float | None:
    error = _absolute_error(row)
    return None if error is None else error**2


def difference(
    runs: Mapping[int, Run], others: Mapping[int, Run], against: str, better: Literal["max", "min"]
) -> Difference | None:
    """Compare two recipes over their common seeds; None if they have none.

    Args:
        runs: the finished runs of the recipe, by seed.
        others: those of the recipe it is compared with.
        against: the other recipe's name.
        better: whether a larger or a smaller metric is better.
    """
    seeds = sorted(runs.keys() & others.keys())
    if not seeds:
        return None
    by_seed = [runs[seed].metric - others[seed].metric for seed in seeds]
    by_row = _row_differences(seeds, runs, others)
    terms: list[tuple[float, int]] = []
    if by_row is not None and len(by_row) > 1:
        terms.append((sample_variance(by_row) / len(by_row), len(by_row) - 1))
    if len(seeds) > 1:
        terms.append((sample_variance(by_seed) / len(seeds), len(seeds) - 1))
    paired_rows = by_row is not None and len(by_row) > 1
    value = mean(by_seed)
    low = high = verdict = None
    half_width = _half_width(terms)
    # No spread around a difference is an accident of few samples, not certainty.
    if half_width > 0 or (terms and value == 0):
        low, high = value - half_width, value + half_width
        verdict = _verdict(low, high, better)
    return Difference(
        against=against,
        value=value,
        low=low,
        high=high,
        verdict=verdict,
        varies=_varies(paired_rows, len(seeds) > 1),
        seeds=len(seeds),
        rows=len(by_row) if by_row is not None and paired_rows else None,
    )


def _row_differences(
    seeds: Sequence[int], runs: Mapping[int, Run], others: Mapping[int, Run]
) -> list[float] | None:
    """For each test row the mean difference over seeds; None unless all runs share all rows."""
    tables = [run.rows for seed in seeds for run in (runs[seed], others[seed])]
    known = [rows for rows in tables if rows is not None]
    if len(known) < len(tables) or any(rows.keys() != known[0].keys() for rows in known):
        return None
    return [
        mean([known[2 * at][row] - known[2 * at + 1][row] for at in range(len(seeds))])
        for row in known[0]
    ]


def _half_width(terms: Sequence[tuple[float, int]]) -> float:
    variance = math.fsum(term for term, _ in terms)
    if variance == 0:
        return 0.0
    degrees = variance**2 / math.fsum(term**2 / freedom for term, freedom in terms)
    return t_quantile(degrees) * math.sqrt(variance)


def _verdict(low: float, high: float, better: Literal["max", "min"]) -> Verdict:
    if low <= 0 <= high:
        return "no difference shown"
    return "better" if (low > 0) == (better == "max") else "worse"


def _varies(rows: bool, seeds: bool) -> Literal["seeds and rows", "rows", "seeds", "nothing"]:
    if rows and seeds:
        return "seeds and rows"
    return "rows" if rows else "seeds" if seeds else "nothing"
