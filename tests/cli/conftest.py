"""A working directory with a small task and recipes of one's own, and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from peftlab.cli import main

Write = Callable[[str, str], Path]
WORDS = {"good": "a fine and lovely film", "bad": "a dull and dreary film"}


@dataclass(frozen=True)
class Outcome:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def errors(self) -> list[str]:
        """The lines that say what is wrong, however click or peftlab marks them."""
        return [line for line in self.err.splitlines() if line.lower().startswith("error: ")]


Call = Callable[..., Outcome]


def rows(split: str, count: int) -> str:
    """A CSV of alternating labels; no text is in another split."""
    lines = [f"{WORDS[label]} {split} {n},{label}" for n in range(count) for label in WORDS]
    return "text,label\n" + "\n".join(lines) + "\n"


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
def project(write: Write) -> Write:
    """The task ``films`` on bert-tiny and the recipes ``small-lora`` and ``small-prefix``."""
    for split, count in (("train", 16), ("validation", 4), ("test", 6)):
        write(f"recipes/tasks/{split}.csv", rows(split, count))
    write(
        "recipes/tasks/films.yaml",
        "summary: films\nkind: classification\nmodel: bert-tiny\n"
        "data: {train: train.csv, validation: validation.csv, test: test.csv}\n"
        "train: {max_length: 16, max_steps: 2, per_device_train_batch_size: 8}\n",
    )
    write(
        "recipes/methods/small-lora.yaml",
        "summary: LoRA\nmethod: {kind: lora, r: 4}\noptim: {learning_rate: 1e-3}\n",
    )
    write(
        "recipes/methods/small-prefix.yaml",
        "summary: a prefix\nmethod: {kind: ptuning_v2, num_virtual_tokens: 4}\n"
        "optim: {learning_rate: 5e-3}\n",
    )
    return write


@pytest.fixture
def call() -> Call:
    """Runs a command in this process; an error that nobody meant is raised."""

    def call(*words: str | Path, stdin: str | None = None) -> Outcome:
        done = CliRunner().invoke(
            main, [str(word) for word in words], input=stdin, prog_name="peftlab"
        )
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Outcome(done.exit_code, done.stdout, done.stderr)

    return call


@pytest.fixture
def listing(tmp_path: Path) -> Callable[[], dict[str, bytes]]:
    """Every file below the working directory with its content."""

    def listing() -> dict[str, bytes]:
        return {
            str(path.relative_to(tmp_path)): path.read_bytes() if path.is_file() else b""
            for path in sorted(tmp_path.rglob("*"))
        }

    return listing


@pytest.fixture
def comparison_folder(write: Write) -> Path:
    """Three finished runs of ``films`` below ./runs, and their comparison."""
    from peftlab.experiment.resolve import resolve
    from peftlab.experiment.store import write_experiment
    from peftlab.results.build import build_comparison
    from peftlab.results.comparison import Cell, write_comparison
    from peftlab.results.record import Record
    from peftlab.results.store import run_dir, write_record

    cells = []
    runs = (("full", 0, 0.5, 0.9), ("ptuning-v2", 0, 0.8, 0.6), ("ptuning-v2", 1, 0.7, 0.7))
    for recipe, seed, accuracy, validation in runs:
        record = Record(
            identity=f"{recipe}-identity-of-the-run",
            task="films",
            recipe=recipe,
            model="bert-tiny",
            seed=seed,
            status="ok",
            metric="accuracy",
            metrics={"accuracy": accuracy},
            validation_metrics={"accuracy": validation},
        )
        folder = run_dir(Path("runs"), "films", recipe, record.identity, seed)
        write_record(folder, record)
        experiment = resolve("movie-sentiment", recipe, seed=seed).experiment
        write_experiment(folder, experiment, record.identity)
        cells.append(Cell(**record.model_dump(), run_dir=str(folder)))
    folder = Path("runs/films/comparisons/abc")
    write_comparison(folder, build_comparison(cells))
    return folder
