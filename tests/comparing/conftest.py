"""The toy task of the training tests, for comparisons in real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.conftest import write_task


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, bert_tiny: str) -> Path:
    return write_task(tmp_path_factory.mktemp("task"))
