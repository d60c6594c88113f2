"""Regression: one number for a text or a pair of texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftlab.tasks.base import Prediction, Row, Splits, TaskTraits
from peftlab.tasks.data import read_splits
from peftlab.tasks.sequence import SequenceData, SequenceTask

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase


class RegressionData(SequenceData):
    """The data section of a regression task; the label column holds numbers."""


class Regression(SequenceTask[RegressionData]):
    """Rows carry ``label`` as a float. The loss is the squared error on the label's own scale."""

    Config = RegressionData
    target_key = "label"
    traits = TaskTraits(
        summary="one number for a text or a pair of texts",
        auto_class="AutoModelForSequenceClassification",
        metrics=("pearson", "spearman", "mse", "mae"),
        unit="examples",
    )

    def make_label(self) -> Callable[[Any], Any]:
        return _as_number

    def read(self) -> Splits:
        return read_splits(self.data, self.folder, self.fields())

    def baseline(self, splits: Splits, metric: str | None = None) -> float | None:
        mean = math.fsum(row["label"] for row in splits.train) / len(splits.train)
        return self.score_constant(splits, mean, metric)

    def model_kwargs(self, splits: Splits) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        from torch.nn import functional

        outputs = self.logits(model, batch).squeeze(-1)
        return functional.mse_loss(outputs, batch["labels"].float(), reduction="sum")

    def predict(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        batch_size: int,
        labels: Sequence[str] = (),
    ) -> list[Prediction]:
        """Each prediction is a number, with the ``label`` where it is known."""
        outputs = self.outputs(model, rows, tokenizer, max_length, batch_size)
        return [
            {
                "id": row["id"],
                **({"label": row["label"]} if "label" in row else {}),
                "prediction": value,
            }
            for row, (value,) in zip(rows, outputs, strict=True)
        ]


def _as_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"must be a number, got {value!r}")
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"must be a number, got {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"must be a finite number, got {value!r}")
    return number


TASK_KIND = Regression
