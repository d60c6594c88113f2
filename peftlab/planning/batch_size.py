"""The largest micro-batch that fits, at an unchanged effective batch."""

from __future__ import annotations

from typing import Any

import torch

from peftlab.errors import ConfigError, Problem
from peftlab.experiment.schema import Experiment
from peftlab.memory.meter import available_bytes
from peftlab.planning.experiment import plan_experiment
from peftlab.planning.fit import divisors, last_that_fits
from peftlab.planning.schema import Plan
from peftlab.tasks.base import Splits, TaskKind
from peftlab.units import format_bytes


def fit_batch_size(
    experiment: Experiment, kind: TaskKind[Any], splits: Splits, memory_bytes: int | None = None
) -> Experiment:
    """The experiment with the largest micro-batch that is planned to fit, and more accumulation.

    Losses are normalised over the whole optimizer step, so the result is the same; a micro-batch
    that fits as it is stays.

    Args:
        memory_bytes: what there is; by default what is free on the accelerator, or else in memory.

    Raises:
        ConfigError: not even a micro-batch of one example fits.
        IncompatibleError: the experiment cannot be planned.
    """
    if memory_bytes is None:
        here = torch.accelerator.current_accelerator(check_available=True)
        memory_bytes = available_bytes(here or torch.device("cpu"))
    size = experiment.train.per_device_train_batch_size

    def planned(micro: int) -> tuple[Experiment, Plan]:
        smaller = with_micro_batch(experiment, micro)
        return smaller, plan_experiment(smaller, kind, splits)

    found = last_that_fits(divisors(size), memory_bytes, planned)
    if found is None:
        raise ConfigError(
            Problem(
                "--auto-batch-size",
                f"{experiment.recipe}: not even one example fits into "
                f"{format_bytes(memory_bytes)}.",
                "'peftlab plan --memory' says what would make it fit.",
            )
        )
    return found[0]


def with_micro_batch(experiment: Experiment, micro: int) -> Experiment:
    """The same experiment in micro-batches of ``micro`` examples, a divisor of its own."""
    train = experiment.train
    factor = train.per_device_train_batch_size // micro
    values = {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": train.gradient_accumulation_steps * factor,
    }
    return experiment.model_copy(update={"train": train.model_copy(update=values)})
