"""What benchmarks/speed.py times: one training run of one side, in a process of its own.

Every side trains the same recipe: the model with the same new head, the method's settings, AdamW,
learning rate, warm-up, clipping, batch size, epochs and seed. Rows are tokenised beforehand and
nothing is evaluated or saved while training; the final weights are tested.
"""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

TASK = "movie-sentiment"
Result = dict[str, Any]
"""One run, JSON-ready; a value that a side does not have is None."""


@dataclass(frozen=True)
class Setting:
    """What all sides train. ``max_steps`` cuts training short, for a quick look."""

    model: str = "minilm"
    rows: int = 2000
    epochs: int = 3
    batch_size: int = 32
    max_steps: int | None = None

    def overrides(self) -> list[str]:
        """The ``--set`` values of peftlab that say the same."""
        chosen = [
            f"data.max_train_rows={self.rows}",
            f"train.num_train_epochs={self.epochs}",
            f"train.per_device_train_batch_size={self.batch_size}",
            "train.eval_strategy=no",
            "train.load_best_model_at_end=false",
        ]
        return chosen + [f"train.max_steps={self.max_steps}"] * (self.max_steps is not None)


def train_ours(setting: Setting, recipe: str, seed: int, folder: Path) -> Result:
    """``peftlab train`` with an empty trunk cache.

    The clock runs from the assembled model to the trained one, so that all that a frozen trunk's
    cache costs is within, and stands still while rows are tokenised.
    """
    from peftlab import execute
    from peftlab.experiment.resolve import resolve
    from peftlab.results.store import read_predictions, read_steps
    from peftlab.run import Request, run_experiment
    from peftlab.tasks.sequence import SequenceTask
    from peftlab.training.loop import Loop
    from peftlab.trunk.store import CACHE_VARIABLE

    os.environ[CACHE_VARIABLE] = str(folder / "trunk")
    started = time.perf_counter()
    experiment = resolve(
        TASK, recipe, model=setting.model, seed=seed, overrides=setting.overrides()
    ).experiment
    assembled, tokenised, fitted = (Spans() for _ in range(3))
    execute.assemble = assembled.of(execute.assemble)
    SequenceTask.encode = tokenised.of(SequenceTask.encode)  # type: ignore[method-assign]
    Loop.fit = fitted.of(Loop.fit)  # type: ignore[method-assign]
    run = run_experiment(experiment, Request(root=folder / "runs", progress=False))
    run_seconds = time.perf_counter() - started
    record, losses = run.record, [step["loss"] for step in read_steps(run.folder)]
    last_epoch = (len(losses) - 1) % math.ceil(setting.rows / setting.batch_size) + 1
    memory, begin, end = record.memory, assembled[-1][1], fitted[-1][1]
    return {
        "train_seconds": end - begin - tokenised.within(begin, end),
        "run_seconds": run_seconds,
        "process_peak_bytes": memory.process_peak_bytes if memory else None,
        "live_peak_bytes": memory.peak_bytes if memory else None,
        "steps": record.steps_done,
        "train_loss": math.fsum(losses[-last_epoch:]) / last_epoch,
        "metrics": record.metrics,
        "test_loss": cross_entropy(read_predictions(run.folder), record.labels),
        "cache_bytes": _size(folder / "trunk"),
        "trunk_cache": record.trunk_cache.model_dump(),
        "notes": list(record.notes),
    }


def train_peer(sampling: str, setting: Setting, recipe: str, seed: int, folder: Path) -> Result:
    """``transformers.Trainer`` and PEFT's own layers as they come.

    Args:
        sampling: ``TrainingArguments.train_sampling_strategy``.
    """
    import peft
    from accelerate.utils import set_seed
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from peftlab.anatomy import Anatomy
    from peftlab.experiment.resolve import resolve
    from peftlab.memory.meter import process_peak_bytes
    from peftlab.methods.peft_backed import PeftMethod
    from peftlab.models.load import load_model, load_tokenizer

    warnings.simplefilter("ignore")
    started = time.perf_counter()
    experiment = resolve(
        TASK, recipe, model=setting.model, seed=seed, overrides=setting.overrides()
    ).experiment
    kind, optim, train = experiment.build_kind(), experiment.optim, experiment.train
    splits, method = kind.read(), experiment.build_method()
    tokenizer = load_tokenizer(experiment.model)
    set_seed(seed)
    model: Any = load_model(
        experiment.model, experiment.precision, kind.traits.auto_class, kind.model_kwargs(splits)
    )
    if isinstance(method, PeftMethod):
        model = peft.get_peft_model(model, method.peft_config(Anatomy.of(model)))
    else:
        model = method.attach(model)
    _require_plain(model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            seed=seed,
            num_train_epochs=train.num_train_epochs,
            max_steps=train.max_steps or -1,
            per_device_train_batch_size=train.per_device_train_batch_size,
            learning_rate=optim.learning_rate,
            weight_decay=optim.weight_decay,
            lr_scheduler_type=optim.lr_scheduler_type,
            warmup_steps=optim.warmup_ratio,
            max_grad_norm=optim.max_grad_norm,
            train_sampling_strategy=sampling,
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=kind.encode(splits.train, tokenizer, train.max_length),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    training = time.perf_counter()
    trainer.train()
    train_seconds = time.perf_counter() - training
    process_peak = process_peak_bytes()
    predictions = kind.predict(
        model,
        splits.test,
        tokenizer,
        train.max_length,
        train.per_device_eval_batch_size,
        splits.labels,
    )
    run_seconds = time.perf_counter() - started
    return {
        "train_seconds": train_seconds,
        "run_seconds": run_seconds,
        "process_peak_bytes": process_peak,
        "live_peak_bytes": _live_peak_bytes(trainer),
        "steps": trainer.state.global_step,
        "train_loss": [log["loss"] for log in trainer.state.log_history if "loss" in log][-1],
        "metrics": kind.score(splits.test, predictions),
        "test_loss": cross_entropy(predictions, splits.labels),
        "cache_bytes": None,
        "trunk_cache": None,
        "notes": [],
    }


Side = Callable[[Setting, str, int, Path], Result]
"""Trains a recipe from a seed, with an empty folder of its own."""
OURS = "peftlab"
PEERS: Mapping[str, Side] = {
    "trainer": partial(train_peer, "random"),
    "trainer-by-length": partial(train_peer, "group_by_length"),
}
SIDES: Mapping[str, Side] = {OURS: train_ours, **PEERS}


def run_side(
    side: str, setting: Setting, recipe: str, seed: int, folder: Path, sender: Any
) -> None:
    """What a side's process does: train, and send the result."""
    import torch

    try:
        result = SIDES[side](setting, recipe, seed, folder)
    except KeyboardInterrupt:
        sys.exit(130)
    sender.send({**result, "num_threads": torch.get_num_threads()})


class Spans(list[tuple[float, float]]):
    """When calls began and ended, by ``time.perf_counter``."""

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, each call of which adds a span."""

        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.append((began, time.perf_counter()))

        return call

    def within(self, begin: float, end: float) -> float:
        """Seconds of the spans that began between two moments."""
        return math.fsum(ended - began for began, ended in self if begin <= began < end)


def cross_entropy(predictions: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> float:
    """The mean over predictions with ``logits`` and ``label``, in nats."""
    terms = []
    for row in predictions:
        logits = row["logits"]
        largest = max(logits)
        total = math.fsum(math.exp(value - largest) for value in logits)
        terms.append(largest + math.log(total) - logits[labels.index(row["label"])])
    return math.fsum(terms) / len(terms)


def _require_plain(model: Any) -> None:
    """The peer must not profit from layers of ours."""
    ours = {type(m).__name__ for m in model.modules() if type(m).__module__.startswith(OURS)}
    if ours:
        raise RuntimeError(f"the peer's model has peftlab's {', '.join(sorted(ours))}")


def _live_peak_bytes(trainer: Any) -> int:
    """Live bytes of one more step, on the largest batch of an epoch: as peftlab measures itself."""
    from peftlab.memory.meter import step_meter

    batches = trainer.get_train_dataloader()
    inputs = trainer._prepare_inputs(max(batches, key=lambda batch: batch["input_ids"].numel()))
    model, meter = trainer.model_wrapped, step_meter(trainer.args.device)
    model.train()
    with meter.step(model, trainer.optimizer, [inputs]):
        with meter.phase("forward"):
            loss = trainer.compute_loss(model, inputs)
        with meter.phase("backward"):
            trainer.accelerator.backward(loss)
        with meter.phase("optimizer"):
            parameters = model.parameters()
            trainer.accelerator.clip_grad_norm_(parameters, trainer.args.max_grad_norm)
            trainer.optimizer.step()
    measurement = meter.result()
    assert measurement is not None
    return measurement.breakdown.peak_bytes


def _size(folder: Path) -> int:
    """Bytes of the files below ``folder``."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
