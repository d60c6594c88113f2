"""The parts of a training in which the same tensors train; for most methods there is one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from peftlab.errors import IncompatibleError, Problem
from peftlab.methods.base import Method
from peftlab.training.job import MeasuredStep
from peftlab.training.schedule import Schedule


class Stage(NamedTuple):
    """A method's stage of this number trains from step ``start`` to before ``end``."""

    number: int
    start: int
    end: int

    @property
    def steps(self) -> tuple[int, int]:
        """Its first step, and the one after its last."""
        return self.start, self.end


def stages_of(method: Method[Any], total_steps: int, num_processes: int = 1) -> list[Stage]:
    """The stages of a training that have a step.

    Raises:
        IncompatibleError: several stages in several processes, which reduce the gradients of what
            trained when they were set up.
    """
    bounds = pairwise((*method.stage_starts(total_steps), total_steps))
    stages = [Stage(number, *each) for number, each in enumerate(bounds) if each[0] < each[1]]
    if len(stages) > 1 and num_processes > 1:
        raise IncompatibleError(
            Problem(
                "method",
                f"{method.config.kind} trains in stages, which {num_processes} processes cannot.",
                "Launch one process.",
            )
        )
    return stages


def stage_notes(stages: Sequence[Stage]) -> tuple[str, ...]:
    """What a record or a plan says of several stages."""
    if len(stages) == 1:
        return ()
    starts = ", ".join(str(stage.start + 1) for stage in stages[1:])
    return (f"trains in stages: more with steps {starts}; figures of a step are the last stage's",)


def train_flops(
    measured: Sequence[MeasuredStep],
    stages: Sequence[Stage],
    schedule: Schedule,
    steps: int,
    padded_tokens: int,
) -> float | None:
    """Floating-point operations of a training, from one measured step of each stage.

    Args:
        steps: that were done, with so many ``padded_tokens`` of all processes, to which operations
            are taken to be proportional.

    Returns:
        None where a stage was trained but no step of it measured.
    """
    reached = [stage for stage in stages if stage.start < steps]
    tokens = [
        sum(math.prod(shape) for step in range(*stage.steps) for shape in schedule.shapes_of(step))
        for stage in reached[:-1]
    ]
    tokens.append(padded_tokens - sum(tokens))
    total = 0.0
    for stage, share in zip(reached, tokens, strict=True):
        found = [each for each in measured if stage.start < each.step <= stage.end]
        if not found:
            return None
        total += found[0].measurement.flops * share / found[0].padded_tokens
    return total
