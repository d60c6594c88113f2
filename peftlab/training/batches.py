"""Which examples make up each optimizer step: random, yet of similar length.

The order depends on the lengths, the seed and the step size alone, so every method and every
number of processes sees the same steps.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Shape = Callable[[Sequence[int]], tuple[int, int]]
"""From the lengths of a micro-batch's examples to its (rows, tokens)."""
BUCKET_STEPS = 30
"""Steps whose examples are sorted together; larger wastes less padding but mixes less."""


@dataclass(frozen=True)
class BatchPlan:
    """Steps of a training run.

    Args:
        lengths: tokens of each example.
        step_size: examples of an optimizer step over all processes and micro-batches.
        seed: of the shuffling.
        group_by_length: put examples of similar length together.
    """

    lengths: Sequence[int]
    step_size: int
    seed: int
    group_by_length: bool = True

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last may be smaller."""
        return math.ceil(len(self.lengths) / self.step_size)

    def epoch(self, epoch: int) -> list[list[int]]:
        """The example indices of each step of an epoch, counted from 0."""
        # A string seed: arithmetic on two seeds would let (1, 0) and (0, 1) collide.
        generator = random.Random(f"{self.seed}/{epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        if not self.group_by_length:
            return [order[at : at + self.step_size] for at in range(0, len(order), self.step_size)]
        steps = []
        bucket_size = BUCKET_STEPS * self.step_size
        for start in range(0, len(order), bucket_size):
            bucket = order[start : start + bucket_size]
            bucket.sort(key=lambda index: self.lengths[index])
            steps += [
                bucket[at : at + self.step_size] for at in range(0, len(bucket), self.step_size)
            ]
        generator.shuffle(steps)
        return steps

    def micro_batches(
        self, step: Sequence[int], rows: int, processes: int
    ) -> list[list[list[int]]]:
        """A step as micro-batches of at most ``rows`` examples, each split over the processes.

        Every process has the same number of micro-batches; a process's share may be empty.

        Returns:
            indices by micro-batch and process.
        """
        count = math.ceil(len(step) / (rows * processes))
        micros = split_step(step, count, self.lengths if self.group_by_length else None)
        return [split_step(micro, processes) for micro in micros]


def padded(lengths: Sequence[int]) -> tuple[int, int]:
    """(rows, tokens) of examples that are padded to the longest."""
    return len(lengths), max(lengths)


def shapes(
    micro_batches: Sequence[Sequence[Sequence[int]]],
    lengths: Sequence[int],
    shape: Shape = padded,
) -> list[tuple[int, int]]:
    """(rows, tokens) of every share that is not empty, once it is collated."""
    return [
        shape([lengths[row] for row in part]) for micro in micro_batches for part in micro if part
    ]


def split_step(
    step: Sequence[int], parts: int, lengths: Sequence[int] | None = None
) -> list[list[int]]:
    """A step's examples in ``parts`` nearly equal parts; sorted by length first, if given."""
    order = sorted(step, key=lambda index: lengths[index]) if lengths is not None else list(step)
    size, longer = divmod(len(order), parts)
    bounds = [part * size + min(part, longer) for part in range(parts + 1)]
    return [order[start:end] for start, end in pairwise(bounds)]
