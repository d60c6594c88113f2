import math

import pytest

from peftlab.tasks import TASK_KINDS
from peftlab.tasks.metrics import METRICS

LABELS = ["a", "a", "a", "b"], ["a", "a", "b", "b"]
NUMBERS = [1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("name", "pair", "expected"),
    [
        ("accuracy", LABELS, 0.75),
        # a: 2·2/(2·2+0+1) = 4/5; b: 2·1/(2·1+1+0) = 2/3.
        ("macro_f1", LABELS, (4 / 5 + 2 / 3) / 2),
        # With a as positive TP 2, FN 1, TN 1, FP 0: (2·1 − 0·1)/√(2·3·1·2).
        ("matthews", LABELS, 2 / math.sqrt(2 * 3 * 1 * 2)),
        # Deviations (−1.5, −.5, .5, 1.5) and (−1.25, −1.25, .75, 1.75): 5.5/√(5·6.75).
        ("pearson", NUMBERS, 5.5 / math.sqrt(5 * 6.75)),
        # Ranks 1, 2, 3, 4 and 1.5, 1.5, 3, 4: 4.5/√(5·4.5).
        ("spearman", NUMBERS, 4.5 / math.sqrt(5 * 4.5)),
        ("mse", NUMBERS, (1 + 0 + 1 + 1) / 4),
        ("mae", NUMBERS, 3 / 4),
        ("exact_match", ([" yes", "no", "yes"], ["yes", " no\n", "Yes"]), 2 / 3),
        # The mean is over tokens, not over rows: (6 + 1)/(3 + 1).
        ("target_nll", ([3, 1], [6.0, 1.0]), 7 / 4),
    ],
)
def test_value_by_hand(name, pair, expected):
    assert METRICS[name](*pair) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_no_rows_have_no_score(name):
    assert METRICS[name]([], []) is None


@pytest.mark.parametrize("name", METRICS)
def test_a_missing_prediction_leaves_no_score(name):
    assert METRICS[name]([1, 2], [1, None]) is None


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize(
    "predictions",
    [[1.0, 1.0, 1.0], [1.0, math.nan, 2.0], [1.0, 2.0, math.inf]],
    ids=["constant", "nan", "inf"],
)
def test_undefined_correlation_is_none(name, predictions):
    assert METRICS[name]([1.0, 2.0, 3.0], predictions) is None
    assert METRICS[name](predictions, [1.0, 2.0, 3.0]) is None


def test_nearly_constant_predictions_have_no_pearson():
    assert METRICS["pearson"]([1.0, 2.0, 3.0], [1e9, 1e9 + 1e-6, 1e9]) is None


@pytest.mark.parametrize("name", ["mse", "mae"])
def test_error_of_infinite_predictions_is_none(name):
    assert METRICS[name]([1.0, 2.0], [1.0, math.inf]) is None


def test_matthews_of_constant_predictions_is_zero_and_of_constant_labels_none():
    assert METRICS["matthews"](["a", "b"], ["a", "a"]) == 0.0
    assert METRICS["matthews"](["a", "a"], ["a", "b"]) is None


def test_macro_f1_counts_a_label_that_is_only_predicted():
    assert METRICS["macro_f1"](["a", "a"], ["a", "b"]) == pytest.approx((2 / 3 + 0) / 2)


def test_different_lengths_are_a_programming_error():
    with pytest.raises(ValueError, match="2 references but 1 predictions"):
        METRICS["accuracy"](["a", "b"], ["a"])


@pytest.mark.parametrize("kind", TASK_KINDS.names)
def test_every_metric_of_a_kind_is_in_the_table(kind):
    names = TASK_KINDS.get(kind).traits.metrics
    assert names
    assert set(names) <= set(METRICS)


def test_names_are_fit_for_json_keys():
    assert all(name == metric.name and name.isidentifier() for name, metric in METRICS.items())
