"""The loop's state as a checkpoint, and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from peftlab.errors import RunFolderError
from peftlab.methods.base import Method
from peftlab.training import checkpoint as ckpt
from peftlab.training.events import StepEvent
from peftlab.training.guard import LearningGuard
from peftlab.training.job import Progression

CURVE_POINTS = 40
"""Points of the training loss that a record keeps; ``steps.jsonl`` has them all."""


@dataclass
class TrainingState:
    """All that changes while a run trains. ``scaler`` is there with fp16 only."""

    method: Method[Any]
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    scaler: Any
    guard: LearningGuard
    progress: Progression = field(default_factory=Progression)
    best: dict[str, Tensor] = field(default_factory=dict)

    def judge(
        self,
        metrics: dict[str, float | None],
        metric: str,
        better: Literal["max", "min"],
        return_to_best: bool,
    ) -> bool:
        """Note an evaluation; whether it is the best so far, whose weights are then kept."""
        progress, value = self.progress, metrics[metric]
        best = _is_better(value, progress.best_metric, better)
        progress.evaluations_since_best = 0 if best else progress.evaluations_since_best + 1
        if best:
            progress.best_metric, progress.best_step = value, progress.step
            if return_to_best:
                self.best = self.trained()
        if best or not return_to_best:
            progress.kept_metrics = metrics
        return best

    def trained(self) -> dict[str, Tensor]:
        """A copy on the CPU of what trains."""
        state = self.method.training_state(self.model)
        return {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}

    def return_to_best(self) -> None:
        """Put the best weights back, if any were kept."""
        if self.best:
            self.method.load_training_state(self.model, self.best)

    def note_loss(self, event: StepEvent, total_steps: int) -> None:
        """Add a point of the learning curve now and then: the mean loss since the last one."""
        progress = self.progress
        progress.recent_losses.append(event.loss)
        if event.step % max(1, total_steps // CURVE_POINTS) == 0:
            mean = sum(progress.recent_losses) / len(progress.recent_losses)
            progress.recent_losses.clear()
            progress.curve.append(
                {"step": event.step, "epoch": event.epoch, "train_loss": mean, "metric": None}
            )

    def capture(self, rng: list[dict[str, str]]) -> ckpt.Checkpoint:
        """A checkpoint of now; ``rng`` are the generators of all processes."""
        tensors, scalars = ckpt.optimizer_state(self.model, self.optimizer)
        cursor = {
            "progress": asdict(self.progress),
            "scheduler": self.scheduler.state_dict(),
            "learning_rates": [group["lr"] for group in self.optimizer.param_groups],
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "guard": {"pending": self.guard.state(), "initial": self.guard.initial},
        }
        return ckpt.Checkpoint(self.trained(), tensors, scalars, self.best, cursor, tuple(rng))

    def restore(self, saved: ckpt.Checkpoint, process_index: int, num_processes: int) -> None:
        """Take up a checkpoint, in place.

        Raises:
            RunFolderError: it was saved by another number of processes.
        """
        if len(saved.rng) != num_processes:
            raise RunFolderError(
                f"the checkpoint was saved by {len(saved.rng)} processes, this is a run of "
                f"{num_processes}. Resume with the same number."
            )
        cursor = saved.cursor
        self.progress = Progression(**cursor["progress"])
        self.method.load_training_state(self.model, saved.trainable)
        ckpt.load_optimizer_state(
            self.model, self.optimizer, saved.optimizer_tensors, saved.optimizer_scalars
        )
        self.scheduler.load_state_dict(cursor["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, cursor["learning_rates"], strict=True):
            group["lr"] = rate
        if self.scaler is not None and cursor["scaler"] is not None:
            self.scaler.load_state_dict(cursor["scaler"])
        self.guard.restore(cursor["guard"]["pending"], cursor["guard"]["initial"])
        self.best = dict(saved.best)
        ckpt.set_rng_state(saved.rng[process_index])


def _is_better(value: float | None, best: float | None, better: Literal["max", "min"]) -> bool:
    if value is None or best is None:
        return value is not None
    return value > best if better == "max" else value < best
