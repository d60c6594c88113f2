"""The interface of a task kind: read splits, encode, collate, loss, predict, score.

Modules here import torch and transformers inside functions only: a task is listed and checked
without loading them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import Field, model_validator

from peftlab.config import Config
from peftlab.errors import Problem

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation", "test"]
Row = Mapping[str, Any]
"""One example as read: the columns the task needs, and ``id``, unique within its split."""
Features = dict[str, Any]
"""One encoded example: lists of ints (``input_ids``, …) and scalars (``labels``)."""
Prediction = dict[str, Any]
"""What the model says of one row, JSON-ready: always ``id`` and ``prediction``."""


class DataConfig(Config):
    """Where rows come from: files, or a data set by name (embedded, or a ``datasets`` id).

    A relative path is looked up beside the task's file, then in the working directory. Beside
    ``dataset``, the keys ``train``, ``validation`` and ``test`` name splits of it.
    """

    dataset: str | None = None
    dataset_config: str | None = None
    revision: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    max_train_rows: int | None = Field(default=None, ge=1)
    max_eval_rows: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.dataset is None and self.train is None:
            raise ValueError("needs 'train' (a file) or 'dataset' (a name)")
        return self


DataT = TypeVar("DataT", bound=DataConfig)


@dataclass(frozen=True)
class TaskTraits:
    """What the rest of the lab may ask of a task kind.

    Args:
        auto_class: the transformers class that loads its model.
        metrics: what ``score`` returns, the default first; names are in ``metrics.METRICS``.
        unit: what the loss is normalised over and ``num_items`` counts ("examples", "tokens").
        generates: its predictions come from ``generate``.
        pads_left: batches for prediction are padded on the left.
    """

    summary: str
    auto_class: str
    metrics: tuple[str, ...]
    unit: Literal["examples", "tokens"]
    generates: bool = False


@dataclass(frozen=True)
class Splits:
    """Rows by split. ``labels`` in index order for classification, empty otherwise."""

    train: Sequence[Row]
    validation: Sequence[Row]
    test: Sequence[Row]
    labels: tuple[str, ...] = ()
    fingerprint: str = ""
    notes: tuple[str, ...] = field(default=())

    def __getitem__(self, split: Split) -> Sequence[Row]:
        rows: Sequence[Row] = getattr(self, split)
        return rows


class TaskKind(ABC, Generic[DataT]):
    """A kind of task over its ``data`` section."""

    Config: ClassVar[type[DataConfig]]
    traits: ClassVar[TaskTraits]

    def __init__(self, data: DataT, folder: str = ".") -> None:
        self.data = data
        self.folder = folder

    @abstractmethod
    def read(self) -> Splits:
        """Read and check all rows; no tokenizer, no torch. Deterministic.

        Without a validation or test file the rows are split off the training rows (10% each,
        stratified, by a fixed hash of the row), and ``Splits.notes`` says so.

        Raises:
            DataError: every missing file, missing column, unknown label or empty split at once.
        """

    @abstractmethod
    def read_rows(self, path: str) -> list[Row]:
        """Rows to predict from a file; what is to be predicted may be absent from it.

        Raises:
            DataError: as ``read``.
        """

    def baseline(self, splits: Splits, metric: str | None = None) -> float | None:
        """What one and the same answer to every test row scores, the best the training rows offer.

        Args:
            metric: one of ``traits.metrics``, by default the first.
        """
        return None

    @abstractmethod
    def model_kwargs(self, splits: Splits) -> dict[str, Any]:
        """Config values the model is loaded with: ``num_labels``, ``id2label``, …"""

    @abstractmethod
    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> list[Features]:
        """Tokenize rows for training, in order, truncated to ``max_length`` tokens."""

    @abstractmethod
    def collate(
        self, features: Sequence[Features], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Tensor]:
        """A training batch: tensors of shape (batch, seq), labels (batch,) or (batch, seq).

        Padded to the longest, or packed into one row.
        """

    @property
    def packs(self) -> bool:
        """Whether a training batch is one row, its examples end to end (``packing.pack``)."""
        return False

    def batch_shape(self, lengths: Sequence[int]) -> tuple[int, int]:
        """(rows, tokens) of a training batch of examples of these lengths."""
        return (1, sum(lengths)) if self.packs else (len(lengths), max(lengths))

    def check(self, model: nn.Module) -> list[Problem]:
        """What is wrong with a transformers model for this task.

        Called first on ``meta``, then with weights, where more can be seen.
        """
        return []

    @abstractmethod
    def num_items(self, features: Features) -> int:
        """How many loss terms one example contributes (1, or its target tokens)."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The SUM of the loss terms of a collated batch, a scalar in fp32.

        The loop divides by the number of terms of the whole optimizer step.
        """

    @abstractmethod
    def predict(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        batch_size: int,
        labels: Sequence[str] = (),
    ) -> list[Prediction]:
        """Predict rows, in their order, in eval mode without autograd; labels may be absent."""

    @abstractmethod
    def score(
        self, rows: Sequence[Row], predictions: Sequence[Prediction]
    ) -> dict[str, float | None]:
        """Every metric of ``traits.metrics``; None where it is undefined for these rows."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The outputs that an export must reproduce, (batch, …) in fp32, for a collated batch."""
