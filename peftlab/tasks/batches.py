"""What every task kind does with batches: order them by length, predict in eval mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peftlab.tasks.base import Prediction, Row
from peftlab.tasks.metrics import METRICS

if TYPE_CHECKING:
    import torch
    from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[torch.device]:
    """Eval mode without autograd; yields the model's device.

    Each module gets its own mode back: while a frozen trunk trains in eval mode, ``model.train()``
    would wake its dropout.
    """
    import torch

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        for module, training in modes:
            module.training = training


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of similar length, longest first."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def check_aligned(rows: Sequence[Row], predictions: Sequence[Prediction]) -> None:
    """Raises ValueError where predictions are not those of the rows, in their order."""
    if [row["id"] for row in rows] != [prediction["id"] for prediction in predictions]:
        raise ValueError("the predictions are not those of these rows")


def score_all(
    names: Sequence[str], references: Sequence[Any], predictions: Sequence[Any]
) -> dict[str, float | None]:
    """Several metrics of the same references and predictions."""
    return {name: METRICS[name](references, predictions) for name in names}
