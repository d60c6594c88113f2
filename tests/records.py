"""Records made by hand, so that every figure of a comparison can be worked out on paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from peftlab.results.comparison import Cell
from peftlab.results.record import Environment, Memory, ParameterCounts, Speed

MakeCell = Callable[..., Cell]


@pytest.fixture
def make_cell() -> MakeCell:
    """``make_cell("lora", 0, 0.8, peak=100, seconds=10.0)``; other keywords are the record's."""

    def make(
        recipe: str,
        seed: int,
        accuracy: float | None,
        *,
        peak: int | None = None,
        seconds: float | None = None,
        **values: Any,
    ) -> Cell:
        memory = None
        if peak is not None:
            # Half of it weights, the rest optimizer state.
            half = peak // 2
            memory = Memory(
                source="tensors counted", weights_bytes=half, optimizer_bytes=peak - half,
                gradients_bytes=0, activations_bytes=0, logits_bytes=0, temporary_bytes=0,
                peak_bytes=peak,
            )  # fmt: skip
        defaults: dict[str, Any] = {
            "identity": f"{recipe}-hash-of-the-experiment",
            "task": "movie-sentiment",
            "recipe": recipe,
            "model": "minilm",
            "seed": seed,
            "status": "ok",
            "metric": "accuracy",
            "metrics": {} if accuracy is None else {"accuracy": accuracy},
            "test_rows": 4,
            "params": ParameterCounts(
                total=1000, trainable=10, adapter=8, head=2, base_trainable=0
            ),
            "saved_bytes": 80,
            "memory": memory,
            "speed": Speed(
                train_seconds=seconds, tokens_per_second=1000.0, model_flops_utilisation=0.25
            ),
            "environment": Environment(
                device="cpu",
                num_processes=1,
                num_threads=2,
                python="3.11",
                platform="Linux",
                versions={"torch": "2.13.0"},
            ),
        }
        return Cell(**(defaults | values))

    return make
