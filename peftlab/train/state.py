"""The loop's state as a checkpoint, and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from peftlab.errors import RunFolderError
from peftlab.train import checkpoint as ckpt
from peftlab.train.guard import LearningGuard
from peftlab.train.job import Progression


@dataclass
class TrainingState:
    """All that changes while a run trains. ``scaler`` is there with fp16 only."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    scaler: Any
    guard: LearningGuard
    progress: Progression = field(default_factory=Progression)
    best: dict[str, Tensor] = field(default_factory=dict)

    def keep_as_best(self) -> None:
        """Remember the trainable weights as they are now."""
        self.best = ckpt.trainable_state(self.model)

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
        trainable = ckpt.trainable_state(self.model)
        return ckpt.Checkpoint(trainable, tensors, scalars, self.best, cursor, tuple(rng))

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
        ckpt.load_trainable_state(self.model, saved.trainable)
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
