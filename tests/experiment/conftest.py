"""A working directory with a recipe and a task of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Write = Callable[[str, str], Path]

RECIPE = """\
summary: LoRA
method: {kind: lora, r: 4}
optim:
  learning_rate: 1e-3
"""
TASK = """\
summary: good or bad
kind: classification
model: bert-tiny
data: {train: rows.csv}
metric: macro_f1
train: {max_length: 32, num_train_epochs: 2}
"""
ROWS = "text,label\n" + "".join(
    f"this is number {n},{'good' if n % 2 else 'bad'}\n" for n in range(40)
)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file below the working directory, an empty one of its own."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def mine(write: Write) -> Write:
    """The recipe ``mine`` and the task ``ours`` in ./recipes."""
    write("recipes/methods/mine.yaml", RECIPE)
    write("recipes/tasks/ours.yaml", TASK)
    write("recipes/tasks/rows.csv", ROWS)
    return write
