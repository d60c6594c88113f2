"""All optimizer steps of a run: how many, of which examples, in which micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from peftlab.training.batches import BatchPlan, Shape, padded, shapes
from peftlab.training.config import TrainConfig

Micros = list[list[list[int]]]
"""Example indices by micro-batch and process."""


class Schedule:
    """The steps that training takes, and planning foresees.

    Args:
        lengths: tokens of each training example.
        num_processes: that share each micro-batch.
        shape: of a collated micro-batch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        config: TrainConfig,
        seed: int,
        num_processes: int = 1,
        shape: Shape = padded,
    ) -> None:
        self._config, self.num_processes, self._shape = config, num_processes, shape
        rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
        self.plan = BatchPlan(lengths, rows * num_processes, seed, config.group_by_length)
        self._epoch = lru_cache(maxsize=1)(self.plan.epoch)
        self._micro_batches = lru_cache(maxsize=1)(self._split)
        steps = math.ceil(config.num_train_epochs * self.plan.steps_per_epoch)
        self.total_steps = config.max_steps or steps

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return self.plan.steps_per_epoch

    def rows_of(self, step: int) -> list[int]:
        """The examples of a step, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[within]

    def micro_batches(self, step: int) -> Micros:
        """A step's examples by micro-batch and process."""
        return self._micro_batches(step)

    def _split(self, step: int) -> Micros:
        size = self._config.per_device_train_batch_size
        return self.plan.micro_batches(self.rows_of(step), size, self.num_processes)

    def shapes_of(self, step: int) -> list[tuple[int, int]]:
        """(rows, tokens) of each micro-batch of a step, on every process."""
        return shapes(self.micro_batches(step), self.plan.lengths, self._shape)

    def trained_rows(self, stage: tuple[int, int]) -> list[int]:
        """The examples that a stage's steps take; a whole epoch takes all."""
        start, end = stage
        epochs_before = math.ceil(start / self.steps_per_epoch)
        steps = range(start, min(end, (epochs_before + 1) * self.steps_per_epoch))
        return list(dict.fromkeys(row for step in steps for row in self.rows_of(step)))

    def largest_step(self, stage: tuple[int, int], resumed_at: int = 0) -> int:
        """The step with the largest micro-batch of a stage's, which are given as (start, end).

        Its very first step is left out, since optimizer state does not exist at its peak; where
        training may stop early, so is what comes after one epoch.
        """
        start, last = stage
        first = max(resumed_at, min(start + 1, last - 1))
        if self._config.early_stopping_patience is not None:
            last = min(last, first + self.steps_per_epoch)
        sizes = {step: max(map(math.prod, self.shapes_of(step))) for step in range(first, last)}
        return max(sizes, key=sizes.__getitem__, default=first)
