"""Text classification: one label for a text or a pair of texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peftlab.errors import DataError, Problem
from peftlab.tasks.base import Prediction, Row, Splits, TaskTraits
from peftlab.tasks.data import SPLITS, read_splits
from peftlab.tasks.sequence import SequenceData, SequenceTask

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase


class ClassificationData(SequenceData):
    """The data section of a classification task."""


class Classification(SequenceTask[ClassificationData]):
    """Rows carry ``label``, its name, and once read for training ``label_id``, its index."""

    Config = ClassificationData
    target_key = "label_id"
    traits = TaskTraits(
        summary="one label for a text or a pair of texts",
        auto_class="AutoModelForSequenceClassification",
        metrics=("accuracy", "macro_f1", "matthews"),
        unit="examples",
    )

    def make_label(self) -> Callable[[Any], Any]:
        return _as_label

    def read(self) -> Splits:
        splits = read_splits(self.data, self.folder, self.fields(), stratify="label")
        labels = sort_labels({row["label"] for row in splits.train})
        problems = []
        if len(labels) == 1:
            message = f"all training rows have the same label, {labels[0]!r}."
            problems.append(Problem("data.label", message, "There is nothing to learn."))
        for split in SPLITS[1:]:
            unknown = Counter(row["label"] for row in splits[split] if row["label"] not in labels)
            for label in sort_labels(unknown):
                first = next(row["id"] for row in splits[split] if row["label"] == label)
                message = f"label {label!r} does not occur in training"
                detail = f"{unknown[label]} rows, the first with id {first}"
                hint = f"Labels in training: {_listing(labels)}."
                problems.append(Problem(f"data.{split}", f"{message} ({detail}).", hint))
        if problems:
            raise DataError(problems)
        index = {label: number for number, label in enumerate(labels)}
        train, validation, test = (
            [{**row, "label_id": index[row["label"]]} for row in splits[split]] for split in SPLITS
        )
        return replace(splits, train=train, validation=validation, test=test, labels=labels)

    def baseline(self, splits: Splits, metric: str | None = None) -> float | None:
        counts = Counter(row["label"] for row in splits.train)
        most_frequent = max(splits.labels, key=lambda label: counts[label])
        return self.score_constant(splits, most_frequent, metric)

    def model_kwargs(self, splits: Splits) -> dict[str, Any]:
        return {
            "num_labels": len(splits.labels),
            "id2label": dict(enumerate(splits.labels)),
            "label2id": {label: number for number, label in enumerate(splits.labels)},
            "problem_type": "single_label_classification",
        }

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        from torch.nn import functional

        logits = self.logits(model, batch)
        return functional.cross_entropy(logits, batch["labels"], reduction="sum")

    def predict(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        batch_size: int,
        labels: Sequence[str] = (),
    ) -> list[Prediction]:
        """Each prediction also has the ``logits`` in label order and, where known, the ``label``.

        Args:
            labels: names in index order, by default those of the model's configuration.
        """
        outputs = self.outputs(model, rows, tokenizer, max_length, batch_size)
        config: Any = model.config
        names = labels or [config.id2label[number] for number in range(config.num_labels)]
        return [
            {
                "id": row["id"],
                **({"label": row["label"]} if "label" in row else {}),
                "prediction": names[max(range(len(logits)), key=logits.__getitem__)],
                "logits": logits,
            }
            for row, logits in zip(rows, outputs, strict=True)
        ]


def sort_labels(labels: Any) -> tuple[str, ...]:
    """Whole numbers by value; other names with their digits read as numbers: a2 before a10."""
    if all(re.fullmatch(r"-?[0-9]+", label) for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))

    def chunks(label: str) -> tuple[list[str | int], str]:
        parts = re.split(r"([0-9]+)", label)
        return [int(part) if number % 2 else part for number, part in enumerate(parts)], label

    return tuple(sorted(labels, key=chunks))


def _as_label(value: Any) -> str:
    if isinstance(value, float):
        raise ValueError(f"must be text or a whole number, got {value}; for ratings: regression")
    if isinstance(value, str | int):
        return str(value)
    raise ValueError(f"must be text or a whole number, got {type(value).__name__}")


def _listing(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - 20} more" if len(labels) > 20 else ""
    return ", ".join(labels[:20]) + more


TASK_KIND = Classification
