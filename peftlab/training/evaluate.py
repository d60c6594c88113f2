"""Predict a split, shared between processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from peftlab.tasks.base import Prediction, Row, TaskKind
from peftlab.training.batches import split_step


def predict_rows(
    accelerator: Accelerator,
    kind: TaskKind[Any],
    model: nn.Module,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    batch_size: int,
    labels: Sequence[str],
) -> list[Prediction]:
    """Predictions for all rows in their order, on every process. Leaves the model in eval mode."""
    model.eval()
    shares = split_step(range(len(rows)), accelerator.num_processes)
    share = [rows[index] for index in shares[accelerator.process_index]]
    with accelerator.autocast():
        predictions = kind.predict(
            accelerator.unwrap_model(model), share, tokenizer, max_length, batch_size, labels
        )
    if accelerator.num_processes == 1:
        return predictions
    gathered: list[Prediction] = gather_object(predictions)
    return gathered
