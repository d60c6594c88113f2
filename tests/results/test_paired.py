import math

import pytest

from peftlab.results.paired import Run, difference, row_values

# 97.5% quantiles of Student's t, from a table.
T1, T2, T3 = 12.7062, 4.30265, 3.18245


def _runs(*metrics: float) -> dict[int, Run]:
    return {seed: Run(metric=metric) for seed, metric in enumerate(metrics)}


def _rows(*values: float) -> Run:
    return Run(
        metric=sum(values) / len(values), rows={str(at): value for at, value in enumerate(values)}
    )


def test_seeds_only() -> None:
    # Differences 0.03, 0.05, 0.04: mean 0.04, sd 0.01, standard error 0.01/√3.
    found = difference(_runs(0.83, 0.85, 0.84), _runs(0.80, 0.80, 0.80), "full", "max")
    assert found is not None
    half = T2 * 0.01 / math.sqrt(3)
    assert found.value == pytest.approx(0.04)
    assert (found.low, found.high) == pytest.approx((0.04 - half, 0.04 + half), rel=1e-5)
    assert (found.verdict, found.varies, found.seeds, found.rows) == ("better", "seeds", 3, None)


def test_a_smaller_error_is_better() -> None:
    found = difference(_runs(0.83, 0.85, 0.84), _runs(0.80, 0.80, 0.80), "full", "min")
    assert found is not None
    assert found.verdict == "worse"


def test_rows_of_one_seed() -> None:
    # Row differences 1, 1, 0, 0: mean 0.5, variance 1/3, standard error √(1/12).
    found = difference({0: _rows(1, 1, 1, 0)}, {0: _rows(0, 0, 1, 0)}, "full", "max")
    assert found is not None
    half = T3 * math.sqrt(1 / 12)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), rel=1e-5)
    assert (found.verdict, found.varies, found.rows) == ("no difference shown", "rows", 4)


def test_seeds_and_rows() -> None:
    runs = {0: _rows(1, 1, 1, 0), 1: _rows(1, 0, 1, 1)}
    others = {0: _rows(0, 0, 1, 0), 1: _rows(1, 0, 0, 1)}
    # Seed means 0.5 and 0.25; row means 0.5, 0.5, 0.5, 0.
    by_rows, by_seeds = 0.0625 / 4, 0.03125 / 2
    degrees = (by_rows + by_seeds) ** 2 / (by_rows**2 / 3 + by_seeds**2 / 1)
    assert degrees == pytest.approx(3)
    half = T3 * math.sqrt(by_rows + by_seeds)
    found = difference(runs, others, "full", "max")
    assert found is not None
    assert found.value == 0.375
    assert (found.low, found.high) == pytest.approx((0.375 - half, 0.375 + half), rel=1e-5)
    assert found.varies == "seeds and rows"


def test_only_common_seeds_are_paired() -> None:
    found = difference({0: Run(metric=0.5), 1: Run(metric=0.7)}, {1: Run(metric=0.6)}, "x", "max")
    assert found is not None
    assert found.value == pytest.approx(0.1)
    assert (found.low, found.verdict, found.varies, found.seeds) == (None, None, "nothing", 1)
    assert difference({0: Run(metric=0.5)}, {1: Run(metric=0.6)}, "x", "max") is None


def test_equal_differences_of_two_seeds_are_no_certainty() -> None:
    found = difference(_runs(0.75, 0.75), _runs(0.5, 0.5), "full", "max")
    assert found is not None
    assert (found.value, found.low, found.verdict) == (0.25, None, None)


def test_the_same_predictions_show_no_difference() -> None:
    found = difference({0: _rows(1, 0)}, {0: _rows(1, 0)}, "full", "max")
    assert found is not None
    assert (found.low, found.high, found.verdict) == (0, 0, "no difference shown")


def test_different_rows_are_not_paired() -> None:
    others = {0: Run(metric=0.5, rows={"a": 0.5, "b": 0.5})}
    found = difference({0: _rows(1, 0)}, others, "full", "max")
    assert found is not None
    assert found.varies == "nothing"


@pytest.mark.parametrize(
    ("rows", "metric", "expected"),
    [
        ([{"id": 1, "prediction": "a", "label": "a"}, {"id": 2, "prediction": "a", "label": "b"}],
         0.5, {"1": 1.0, "2": 0.0}),
        ([{"id": 1, "prediction": "x", "correct": True}], 1.0, {"1": 1.0}),
        # A score that is a probability does not average to the accuracy.
        ([{"id": 1, "prediction": "a", "label": "a", "score": 0.7}], 1.0, {"1": 1.0}),
        ([{"id": 1, "prediction": 2.0, "label": 1.0}, {"id": 2, "prediction": 4, "label": 1.0}],
         2.0, {"1": 1.0, "2": 3.0}),
        ([{"id": 1, "prediction": 2.0, "label": 1.0}, {"id": 2, "prediction": 4, "label": 1.0}],
         5.0, {"1": 1.0, "2": 9.0}),
        # A correlation is no mean over rows.
        ([{"id": 1, "prediction": 2.0, "label": 1.0}, {"id": 2, "prediction": 4, "label": 1.0}],
         0.9, None),
        ([{"id": 1, "prediction": "a", "label": "a"}] * 2, 1.0, None),
        ([], 1.0, None),
    ],
)  # fmt: skip
def test_row_values(
    rows: list[dict[str, object]], metric: float, expected: dict[str, float] | None
) -> None:
    assert row_values(rows, metric) == expected
