"""A tiny experiment to train: BERT-Tiny or a tiny Llama on rows made here."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from peftlab.assemble import Assembly, assemble
from peftlab.experiment.resolve import resolve
from peftlab.tasks.metrics import METRICS
from peftlab.train.events import Listener, StepEvent
from peftlab.train.job import Job
from peftlab.train.loop import Loop

WORDS = ("good", "bad", "fine", "dull", "film", "plot", "the", "a", "very", "and", "was", "is")
Assemble = Callable[..., Assembly]


@pytest.fixture
def no_dropout(bert_tiny: str, tmp_path: Path) -> Path:
    """BERT-Tiny without dropout, whose random numbers depend on how rows share processes."""
    folder = tmp_path / "no-dropout"
    shutil.copytree(bert_tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    """A classification task of 160 training rows of 3 to 30 words."""
    generator = random.Random(0)

    def rows(count: int) -> list[dict[str, str]]:
        made = []
        for _ in range(count):
            label = generator.choice(("no", "yes"))
            words = generator.choices(WORDS, k=generator.randint(3, 30))
            words[0] = "good" if label == "yes" else "bad"
            made.append({"text": " ".join(words), "label": label})
        return made

    for split, count in (("train", 160), ("validation", 24), ("test", 24)):
        lines = "".join(json.dumps(row) + "\n" for row in rows(count))
        (tmp_path / f"{split}.jsonl").write_text(lines)
    path = tmp_path / "toy.yaml"
    path.write_text(
        "kind: classification\n"
        "summary: a toy\n"
        "model: bert-tiny\n"
        "data: {train: train.jsonl, validation: validation.jsonl, test: test.jsonl}\n"
        "train: {per_device_train_batch_size: 8, max_length: 32, num_train_epochs: 1}\n"
    )
    return path


@pytest.fixture
def assembled(task_file: Path) -> Assemble:
    """Assemble the toy task with a recipe; dropout is off, so that two loops can agree."""

    def build(
        recipe: str, *overrides: str, task: Path = task_file, dropout: bool = False
    ) -> Assembly:
        experiment = resolve(str(task), recipe, overrides=overrides).experiment
        kind = experiment.build_kind()
        assembly = assemble(experiment, kind, kind.read())
        if not dropout:
            for module in assembly.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        return assembly

    return build


class Losses(Listener):
    """Remembers the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.events: list[StepEvent] = []

    def on_step(self, event: StepEvent) -> None:
        self.losses.append(event.loss)
        self.events.append(event)


def job_of(assembly: Assembly, folder: Path) -> Job:
    """The job that ``peftlab train`` would run for an assembly."""
    experiment = assembly.experiment
    return Job(
        model=assembly.model,
        method=assembly.method,
        kind=assembly.kind,
        tokenizer=assembly.tokenizer,
        anatomy=assembly.anatomy,
        trunk=assembly.trunk,
        features=assembly.kind.encode(
            assembly.splits.train, assembly.tokenizer, experiment.train.max_length
        ),
        validation=assembly.splits.validation,
        labels=assembly.splits.labels,
        metric=experiment.metric,
        metric_better=METRICS[experiment.metric].better,
        optim=experiment.optim,
        train=experiment.train,
        seed=experiment.seed,
        checkpoints=folder / "checkpoints",
    )


@pytest.fixture
def loop_of(tmp_path: Path) -> Callable[..., tuple[Loop, Losses]]:
    """A loop over an assembly, and the listener that hears it."""

    def build(assembly: Assembly) -> tuple[Loop, Losses]:
        AcceleratorState._reset_state()
        GradientState._reset_state()
        losses = Losses()
        precision = assembly.experiment.precision.mixed_precision
        accelerator = Accelerator(mixed_precision=precision)
        return Loop(job_of(assembly, tmp_path), accelerator, [losses]), losses

    return build
