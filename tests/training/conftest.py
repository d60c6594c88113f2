"""A tiny experiment to train: BERT-Tiny or a tiny Llama on rows made here."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from peftlab.assemble import Assembly, assemble
from peftlab.execute import job_of
from peftlab.experiment.resolve import resolve
from peftlab.models.tiny import tiny_config
from peftlab.training.events import Listener, StepEvent
from peftlab.training.loop import Loop
from tests.exporting.conftest import make_tokenizer

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


def write_task(folder: Path, seed: int = 0) -> Path:
    """A classification task of 160 training rows of 3 to 30 words."""
    generator = random.Random(seed)

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
        (folder / f"{split}.jsonl").write_text(lines)
    path = folder / "toy.yaml"
    path.write_text(
        "kind: classification\n"
        "summary: a toy\n"
        "model: bert-tiny\n"
        "data: {train: train.jsonl, validation: validation.jsonl, test: test.jsonl}\n"
        "train: {per_device_train_batch_size: 8, max_length: 32, num_train_epochs: 1}\n"
    )
    return path


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    """The toy task."""
    return write_task(tmp_path)


@pytest.fixture
def sft_task(tmp_path: Path) -> Path:
    """Prompts with completions of 1 to 9 words, for a tiny random Llama."""
    torch.manual_seed(0)
    config = tiny_config("llama")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    make_tokenizer(encoder=False).save_pretrained(tmp_path / "llama")
    for split, count in (("train", 32), ("validation", 4), ("test", 4)):
        rows = [
            {"prompt": "the plot " * (n % 4 + 1), "completion": "very good " * (n % 5) + "film"}
            for n in range(count)
        ]
        (tmp_path / f"sft-{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    path = tmp_path / "sft.yaml"
    path.write_text(
        "kind: causal-lm\n"
        "summary: a toy\n"
        f"model: {tmp_path / 'llama'}\n"
        "data: {train: sft-train.jsonl, validation: sft-validation.jsonl, test: sft-test.jsonl,"
        " prompt: prompt, completion: completion, max_new_tokens: 2}\n"
        "train: {max_length: 32, eval_strategy: 'no'}\n"
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


@pytest.fixture
def loop_of(tmp_path: Path) -> Iterator[Callable[..., tuple[Loop, Losses]]]:
    """A loop over an assembly, and the listener that hears it; more listeners may join."""

    def build(assembly: Assembly, *listeners: Listener) -> tuple[Loop, Losses]:
        AcceleratorState._reset_state()
        GradientState._reset_state()
        losses = Losses()
        precision = assembly.experiment.precision.mixed_precision
        accelerator = Accelerator(mixed_precision=precision)
        return Loop(
            job_of(assembly, tmp_path / "checkpoints"), accelerator, [losses, *listeners]
        ), losses

    yield build
    AcceleratorState._reset_state()
    GradientState._reset_state()
