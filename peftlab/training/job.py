"""What goes into the loop and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from peftlab.anatomy import Anatomy
from peftlab.memory.meter import StepMeasurement
from peftlab.methods.base import Method
from peftlab.optim.config import OptimConfig
from peftlab.tasks.base import Features, Row, TaskKind
from peftlab.training.config import TrainConfig


@dataclass(frozen=True)
class Job:
    """What to train, on what, how long.

    Args:
        model: with its method attached.
        trunk: answers which modules stay in eval mode while training, in the stage that is entered.
        features: the encoded training examples.
        validation: rows to evaluate on.
        metric: the validation metric that decides which weights are best.
        checkpoints: folder to save to and to resume from.
    """

    model: nn.Module
    method: Method[Any]
    kind: TaskKind[Any]
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    trunk: Callable[[], Sequence[nn.Module]]
    features: Sequence[Features]
    validation: Sequence[Row]
    labels: Sequence[str]
    metric: str
    metric_better: Literal["max", "min"]
    optim: OptimConfig
    train: TrainConfig
    seed: int
    checkpoints: Path


@dataclass
class Progression:
    """Where a run stands; JSON-ready, saved with every checkpoint.

    ``timed_*`` leave the first step out: it allocates what later ones reuse. ``kept_metrics`` are
    the validation metrics of the weights that the run ends with.
    """

    step: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    timed_seconds: float = 0.0
    timed_tokens: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    last_loss: float | None = None
    kept_metrics: dict[str, float | None] = field(default_factory=dict)
    recent_losses: list[float] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class MeasuredStep:
    """The step that was measured: its number, its largest micro-batch (rows, tokens)."""

    step: int
    batch: tuple[int, int]
    padded_tokens: int
    measurement: StepMeasurement


@dataclass(frozen=True)
class FitResult:
    """What training gives back besides the trained model; ``measured`` is of the last stage."""

    progress: Progression
    measured: MeasuredStep | None
    notes: tuple[str, ...]
