"""The loop on packed texts: the losses of the padded ones, and not a token of padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SETTINGS = ("train.num_train_epochs=1", "train.per_device_train_batch_size=4")


def test_packed_and_padded_batches_train_alike(
    assembled: Any, loop_of: Callable[..., Any], sft_task: Path
) -> None:
    losses, results = [], []
    for packing in ("false", "true"):
        job = assembled("lora", *SETTINGS, f"data.packing={packing}", task=sft_task)
        loop, heard = loop_of(job)
        results.append(loop.fit())
        losses.append(heard.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    padded, packed = (result.progress for result in results)
    assert packed.tokens == padded.tokens == packed.padded_tokens < padded.padded_tokens
    rows, tokens = results[1].measured.batch
    assert rows == 1
    assert tokens == results[1].measured.padded_tokens
