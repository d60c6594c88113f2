"""What classification and regression share: one text or a pair of texts in, one output row out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from peftlab.tasks.base import DataConfig, Features, Prediction, Row, Splits, TaskKind
from peftlab.tasks.batches import by_length, check_aligned, eval_mode, score_all
from peftlab.tasks.data import Field, as_text, read_rows

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase


class SequenceData(DataConfig):
    """Which columns hold the text, its second part if there is one, and the label."""

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"


DataT = TypeVar("DataT", bound=SequenceData)


class SequenceTask(TaskKind[DataT]):
    """Rows are ``id``, ``text``, ``text_pair`` if configured, and ``label``."""

    target_key: ClassVar[str]
    """The key of a row that holds what the loss compares with."""
    _predicted: tuple[object, list[Features]] | None = None
    """What was predicted last, and its tokens: validation rows come again after every epoch."""

    def fields(self) -> list[Field]:
        """The row's keys and the columns they come from."""
        texts = [Field("text", (self.data.text,), as_text)]
        if self.data.text_pair is not None:
            texts.append(Field("text_pair", (self.data.text_pair,), as_text))
        return [*texts, Field("label", (self.data.label,), self.make_label(), target=True)]

    def make_label(self) -> Callable[[Any], Any]:
        """How a column's value becomes a label; a ValueError tells what is wrong."""
        return as_text

    def read_rows(self, path: str) -> list[Row]:
        return read_rows(path, self.fields())

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> list[Features]:
        if not rows:
            return []
        pairs = [row["text_pair"] for row in rows] if self.data.text_pair is not None else None
        encoded = tokenizer(
            [row["text"] for row in rows], pairs, truncation=True, max_length=max_length
        )
        features = []
        for index, row in enumerate(rows):
            example: Features = {key: values[index] for key, values in encoded.items()}
            if self.target_key in row:
                example["labels"] = row[self.target_key]
            features.append(example)
        return features

    def collate(
        self, features: Sequence[Features], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Tensor]:
        import numpy as np
        import torch

        inputs = [
            {key: value for key, value in example.items() if key != "labels"}
            for example in features
        ]
        # Not return_tensors="pt": for that, transformers walks through every number in Python.
        padded = tokenizer.pad(inputs)
        batch = {key: torch.from_numpy(np.array(rows, np.int64)) for key, rows in padded.items()}
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([example["labels"] for example in features])
        return batch

    def num_items(self, features: Features) -> int:
        return 1

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """(batch, labels) in fp32."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits: Tensor = model(**inputs).logits
        return logits.float()

    def outputs(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        batch_size: int,
    ) -> list[list[float]]:
        """The logits of each row, in the rows' order."""
        features = self._tokens(rows, tokenizer, max_length)
        result: list[list[float]] = [[] for _ in rows]
        with eval_mode(model) as device:
            for numbers in by_length([len(row["input_ids"]) for row in features], batch_size):
                batch = self.collate([features[number] for number in numbers], tokenizer)
                on_device = {key: value.to(device) for key, value in batch.items()}
                logits = self.logits(model, on_device).tolist()
                for number, values in zip(numbers, logits, strict=True):
                    result[number] = values
        return result

    def _tokens(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> list[Features]:
        """``encode``, remembered for the same rows."""
        asked = [(row["text"], row.get("text_pair")) for row in rows], tokenizer, max_length
        if self._predicted is None or self._predicted[0] != asked:
            self._predicted = asked, self.encode(rows, tokenizer, max_length)
        return self._predicted[1]

    def score(
        self, rows: Sequence[Row], predictions: Sequence[Prediction]
    ) -> dict[str, float | None]:
        check_aligned(rows, predictions)
        references = [row["label"] for row in rows]
        return score_all(self.traits.metrics, references, [p["prediction"] for p in predictions])

    def score_constant(self, splits: Splits, answer: Any, metric: str | None) -> float | None:
        """The score of the same answer to every test row."""
        predictions = [{"id": row["id"], "prediction": answer} for row in splits.test]
        return self.score(splits.test, predictions)[metric or self.traits.metrics[0]]
