"""From the optim section to an optimizer and a schedule."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peftlab.errors import IncompatibleError
from peftlab.optim.config import OptimConfig
from peftlab.optim.groups import build_groups
from peftlab.optim.table import optimizer_info

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from peftlab.anatomy import Anatomy


def build_optimizer(
    model: nn.Module, config: OptimConfig, anatomy: Anatomy, planned_for: str | None = None
) -> tuple[Optimizer, list[str]]:
    """The optimizer over the parameters that train, and notes for the run's record.

    Args:
        planned_for: the device type that the model's tensors stand for, if it is not theirs.

    Raises:
        IncompatibleError: nothing trains.
        ConfigError: a learning-rate pattern matches nothing.
        UnknownNameError: no such optimizer.
    """
    info = optimizer_info(config.optim, "optim.optim")
    groups, notes = build_groups(model, config, anatomy)
    if not groups:
        raise IncompatibleError("nothing trains: every parameter is frozen.")
    module, _, attribute = info.factory.partition(":")
    arguments: dict[str, Any] = {"lr": config.learning_rate, **info.extra}
    if info.adam:
        arguments["betas"] = (config.adam_beta1, config.adam_beta2)
        arguments["eps"] = config.adam_epsilon
    else:
        arguments["momentum"] = config.momentum
    optimizer: Any = getattr(importlib.import_module(module), attribute)(groups, **arguments)
    on_cuda = next(iter(groups[0]["params"])).is_cuda
    if info.paged and not on_cuda:
        # Else bitsandbytes does the same, with a warning in the first step.
        optimizer.is_paged = False
        here = "paging needs CUDA; the state is not paged here"
        there = "planned with all of its state on the device, none of it paged out"
        notes.append(f"{config.optim}: {there if planned_for == 'cuda' else here}")
    return optimizer, notes


def build_scheduler(optimizer: Optimizer, config: OptimConfig, total_steps: int) -> LRScheduler:
    """transformers' schedule of that name over ``total_steps`` optimizer steps."""
    from transformers import get_scheduler

    warmup_steps = config.num_warmup_steps(total_steps)
    name = config.lr_scheduler_type
    if name == "constant" and warmup_steps:
        name = "constant_with_warmup"  # type: ignore[assignment]
    scheduler: LRScheduler = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=total_steps,
    )
    return scheduler
