"""What the loop tells others: a few named events."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftlab.results.store import StepLog

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class StepEvent:
    """One optimizer step; ``tokens`` are real, ``padded_tokens`` computed, over all processes."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float | None
    seconds: float
    tokens: int
    padded_tokens: int


@dataclass(frozen=True)
class EvaluationEvent:
    """One evaluation on the validation split, and whether its metric is the best so far."""

    step: int
    epoch: float
    metrics: dict[str, float | None]
    best: bool


class Listener:
    """Base of all listeners; each event does nothing unless overridden.

    on_begin → (on_step … on_evaluate …)* → on_end. ``on_end`` comes after failures too.
    """

    def on_begin(self, total_steps: int, first_step: int) -> None:
        """Training starts (or goes on) after ``first_step`` finished steps."""

    def on_step(self, event: StepEvent) -> None:
        """Every ``logging_steps`` optimizer steps, and for the last."""

    def on_evaluate(self, event: EvaluationEvent) -> None:
        """After each evaluation."""

    def on_end(self) -> None:
        """Training ended, well or not."""


class ProgressBar(Listener):
    """A bar on stderr, with loss and the last validation metric."""

    def __init__(self, label: str, metric: str) -> None:
        self._label, self._metric = label, metric
        self._shown: dict[str, str] = {}
        self._bar: Any = None

    def on_begin(self, total_steps: int, first_step: int) -> None:
        import sys

        from tqdm import tqdm

        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc=self._label,
            unit="step",
            leave=False,
            disable=not sys.stderr.isatty(),
        )

    def on_step(self, event: StepEvent) -> None:
        self._shown["loss"] = f"{event.loss:.3f}"
        self._bar.update(event.step - self._bar.n)
        self._bar.set_postfix(self._shown)

    def on_evaluate(self, event: EvaluationEvent) -> None:
        value = event.metrics.get(self._metric)
        self._shown[self._metric] = "–" if value is None else f"{value:.3f}"
        self._bar.set_postfix(self._shown)

    def on_end(self) -> None:
        if self._bar is not None:
            self._bar.close()


class StepFile(Listener):
    """Writes ``steps.jsonl`` in a run's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log: StepLog | None = None

    def on_begin(self, total_steps: int, first_step: int) -> None:
        self._log = StepLog(self._folder, resume_step=first_step)

    def on_step(self, event: StepEvent) -> None:
        if self._log is not None:
            self._log.append(**asdict(event))

    def on_evaluate(self, event: EvaluationEvent) -> None:
        if self._log is not None:
            self._log.append(event.step, epoch=event.epoch, validation=event.metrics)

    def on_end(self) -> None:
        if self._log is not None:
            self._log.close()


class Tracking(Listener):
    """Passes everything on to Accelerate's trackers (TensorBoard, …)."""

    def __init__(self, accelerator: Accelerator, config: dict[str, Any]) -> None:
        self._accelerator, self._config = accelerator, config

    def on_begin(self, total_steps: int, first_step: int) -> None:
        self._accelerator.init_trackers("trackers", config=self._config)

    def on_step(self, event: StepEvent) -> None:
        values = {
            f"train/{key}": value for key, value in asdict(event).items() if value is not None
        }
        self._accelerator.log(values, step=event.step)

    def on_evaluate(self, event: EvaluationEvent) -> None:
        values = {f"validation/{k}": v for k, v in event.metrics.items() if v is not None}
        self._accelerator.log(values, step=event.step)

    def on_end(self) -> None:
        # Not end_training(), which also leaves the process group: testing still needs it.
        for tracker in self._accelerator.trackers:
            tracker.finish()
