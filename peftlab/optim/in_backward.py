"""Updates inside of backward, so that gradients never exist all at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


def update_in_backward(optimizer: Optimizer, seen: Callable[[Tensor], Any] | None = None) -> None:
    """Update each parameter as soon as its gradient is complete, and free the gradient.

    The same weights as ``optimizer.step()`` after backward, which then finds nothing to do. Rates
    are those that the optimizer's groups have at that moment, state lies where it always does.

    Args:
        seen: called with a parameter while it has its gradient.
    """
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            parameter.register_post_accumulate_grad_hook(partial(_update, optimizer, index, seen))


def _update(
    optimizer: Optimizer, index: int, seen: Callable[[Tensor], Any] | None, parameter: Tensor
) -> None:
    if seen is not None:
        seen(parameter)
    groups = optimizer.param_groups
    optimizer.param_groups = [{**groups[index], "params": [parameter]}]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups
    parameter.grad = None
