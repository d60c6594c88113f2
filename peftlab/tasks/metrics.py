"""The one table of metrics. A score that is undefined for the rows at hand is None."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """A metric and its facts.

    Args:
        name: as in ``record.json``.
        unit: "share" of 1, "nats/token", or empty for a number without one.
        better: whether larger or smaller scores win.
        function: from references and predictions, in the same order, to the score.
    """

    name: str
    unit: str
    better: Literal["max", "min"]
    description: str
    function: Callable[[Sequence[Any], Sequence[Any]], float | None]

    def __call__(self, references: Sequence[Any], predictions: Sequence[Any]) -> float | None:
        if len(references) != len(predictions):
            raise ValueError(f"{len(references)} references but {len(predictions)} predictions")
        if not references or any(prediction is None for prediction in predictions):
            return None
        return self.function(references, predictions)


def _accuracy(references: Sequence[Any], predictions: Sequence[Any]) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(references, predictions))


def _macro_f1(references: Sequence[Any], predictions: Sequence[Any]) -> float:
    from sklearn.metrics import f1_score

    # A label that is predicted but never true, or the reverse, has F1 = 0 by its definition.
    return float(f1_score(references, predictions, average="macro", zero_division=0.0))


def _matthews(references: Sequence[Any], predictions: Sequence[Any]) -> float | None:
    from sklearn.metrics import matthews_corrcoef

    # With a constant prediction 0/0 is taken as 0, no better than chance (Chicco & Jurman 2020);
    # with constant references there is nothing to correlate with.
    return float(matthews_corrcoef(references, predictions)) if len(set(references)) > 1 else None


def _finite(values: Sequence[float]) -> bool:
    return all(math.isfinite(value) for value in values)


def _correlation(kind: str, references: Sequence[float], predictions: Sequence[float]) -> Any:
    from scipy import stats

    varied = len(set(references)) > 1 and len(set(predictions)) > 1
    if not varied or not _finite(references) or not _finite(predictions):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error", stats.NearConstantInputWarning)
        try:
            value = float(getattr(stats, kind)(references, predictions).statistic)
        except stats.NearConstantInputWarning:
            return None
    return value if math.isfinite(value) else None


def _pearson(references: Sequence[float], predictions: Sequence[float]) -> float | None:
    value: float | None = _correlation("pearsonr", references, predictions)
    return value


def _spearman(references: Sequence[float], predictions: Sequence[float]) -> float | None:
    value: float | None = _correlation("spearmanr", references, predictions)
    return value


def _mse(references: Sequence[float], predictions: Sequence[float]) -> float | None:
    from sklearn.metrics import mean_squared_error

    if not _finite(predictions):
        return None
    return float(mean_squared_error(references, predictions))


def _mae(references: Sequence[float], predictions: Sequence[float]) -> float | None:
    from sklearn.metrics import mean_absolute_error

    if not _finite(predictions):
        return None
    return float(mean_absolute_error(references, predictions))


def _exact_match(references: Sequence[str], predictions: Sequence[str]) -> float:
    pairs = zip(references, predictions, strict=True)
    return sum(a.strip() == b.strip() for a, b in pairs) / len(references)


def _target_nll(num_tokens: Sequence[int], nlls: Sequence[float]) -> float | None:
    mean = sum(nlls) / sum(num_tokens)
    return mean if math.isfinite(mean) else None


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "share", "max", "rows with the right label", _accuracy),
        Metric(
            "macro_f1", "share", "max", "F1 averaged over labels, each counting once", _macro_f1
        ),
        Metric("matthews", "", "max", "correlation of labels, -1 to 1", _matthews),
        Metric("pearson", "", "max", "linear correlation, -1 to 1", _pearson),
        Metric("spearman", "", "max", "correlation of ranks, -1 to 1", _spearman),
        Metric("mse", "", "min", "mean squared error, in squared units of the target", _mse),
        Metric("mae", "", "min", "mean absolute error, in units of the target", _mae),
        Metric("exact_match", "share", "max", "completions generated to the letter", _exact_match),
        Metric(
            "target_nll", "nats/token", "min", "mean loss per token of the reference", _target_nll
        ),
    )
}
