"""An average step of an epoch: the peak is the longest batch's, the cost is not."""

from __future__ import annotations

import math
from collections.abc import Mapping

from peftlab.errors import ConfigError, Problem
from peftlab.planning.schema import AverageStep
from peftlab.training.schedule import Schedule

_WHERE = "--length-distribution"
_EXAMPLES = 2000
"""Examples drawn from a distribution: enough for shares of a tenth of a percent."""


def average_step(schedule: Schedule, flops: int, planned_tokens: int) -> AverageStep:
    """What the steps of the first epoch are on average, for one process.

    Args:
        flops: of the step that was planned, which has ``planned_tokens`` padded tokens; arithmetic
            is taken to be proportional to those.
    """
    steps = range(schedule.steps_per_epoch)
    shapes = [shape for step in steps for shape in schedule.shapes_of(step)]
    padded = sum(map(math.prod, shapes)) / schedule.num_processes / len(steps)
    real = sum(schedule.plan.lengths) / schedule.num_processes / len(steps)
    return AverageStep(
        steps_per_epoch=len(steps),
        padded_tokens=padded,
        padding_share=1 - real / padded,
        flops=flops * padded / planned_tokens,
    )


def parse_distribution(text: str) -> dict[int, float]:
    """``"64:0.5,128:0.3,512:0.2"`` → tokens to share of the examples.

    Raises:
        ConfigError: another form, or the shares do not sum to 1.
    """
    try:
        pairs = [part.split(":") for part in text.split(",")]
        shares = {int(length): float(share) for length, share in pairs}
    except ValueError:
        message = f"{text!r} is not of the form LENGTH:SHARE,LENGTH:SHARE."
        raise ConfigError(Problem(_WHERE, message, "Such as 64:0.5,128:0.3,512:0.2.")) from None
    if min(shares) < 1 or min(shares.values()) <= 0:
        raise ConfigError(Problem(_WHERE, "lengths and shares must be above 0."))
    if len(shares) < len(pairs):
        raise ConfigError(Problem(_WHERE, "names a length twice."))
    if not math.isclose(total := sum(shares.values()), 1, abs_tol=0.005):
        raise ConfigError(Problem(_WHERE, f"the shares sum to {total:.3g}, not to 1."))
    return shares


def lengths_of(distribution: Mapping[int, float]) -> list[int]:
    """Tokens of a data set's examples with this distribution; every length occurs."""
    return [
        length
        for length, share in sorted(distribution.items())
        for _ in range(max(1, round(share * _EXAMPLES)))
    ]
