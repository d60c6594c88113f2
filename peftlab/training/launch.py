"""What a launcher may not ask for."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import DistributedType

from peftlab.errors import IncompatibleError, Problem
from peftlab.optim.config import OptimConfig


def refuse_sharding(accelerator: Accelerator) -> None:
    """Checkpoints, guard and adapters read whole parameters, which shards do not hold.

    Raises:
        IncompatibleError: the launcher asked for FSDP, DeepSpeed or another way of sharding.
    """
    whole = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in whole:
        raise IncompatibleError(
            Problem(
                "accelerate",
                f"{accelerator.distributed_type.value} shards parameters, which is not supported.",
                "Launch data-parallel training: accelerate launch --multi_gpu.",
            )
        )


def refuse_early_updates(accelerator: Accelerator, optim: OptimConfig) -> None:
    """Processes average their gradients after the hooks that would update.

    Raises:
        IncompatibleError: several processes with ``optimizer_in_backward``.
    """
    if optim.optimizer_in_backward and accelerator.num_processes > 1:
        raise IncompatibleError(
            Problem(
                "optim.optimizer_in_backward",
                f"does not work with {accelerator.num_processes} processes, which share gradients.",
                "Launch one process, or leave it off.",
            )
        )
