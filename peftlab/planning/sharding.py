"""A model sharded over processes as Accelerate does it (FSDP2), also over those that are not there.

What a process then holds follows from torch's own ``fully_shard``: its part of every parameter,
gradient and optimizer state, the parameters gathered for a block, and what it sends and receives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from peftlab.errors import IncompatibleError, Problem
from peftlab.optim.table import optimizer_info

if TYPE_CHECKING:
    from peftlab.planning.simulate import PlanRequest

_AXIS = "fsdp"


def check_sharding(request: PlanRequest) -> None:
    """What FSDP cannot do, or does in a way that cannot be planned.

    Raises:
        IncompatibleError: all of it.
    """
    problems = []
    if request.num_processes < 2:
        message = "shards need several processes."
        problems.append(Problem("--sharding", message, "Say how many: --num-processes."))
    if not optimizer_info(request.optim.optim, "optim.optim").shards:
        message = f"{request.optim.optim!r} does not update shards (DTensor)."
        hint = "Plan with optim.optim=adamw_torch."
        problems.append(Problem("optim.optim", message, hint))
    if request.precision.quantization is not None:
        message = "a quantized base is not planned in shards: Accelerate leaves nf4 whole on each "
        message += "process, and int8 loses its scales."
        hint = "Plan without it: precision.dtype=bfloat16."
        problems.append(Problem("precision.quantization", message, hint))
    if request.train.gradient_checkpointing == "selective":
        message = "'selective' reads weights that FSDP gave back."
        hint = "Set it to true or false."
        problems.append(Problem("train.gradient_checkpointing", message, hint))
    if problems:
        raise IncompatibleError(problems)


@contextmanager
def fake_group(num_processes: int) -> Iterator[None]:
    """In here this process is the first of as many, and nothing is sent to the others."""
    # Shapes of what collectives return, for tensors without storage.
    import torch.distributed._tools.fake_collectives  # noqa: F401
    from torch.distributed.tensor._sharding_prop import ShardingPropagator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        message = "this process is one of several itself; their number is not free to choose."
        raise IncompatibleError(Problem("--sharding", message, "Plan in a process of its own."))
    work_out_shapes = ShardingPropagator._propagate_tensor_meta_non_cached

    def unseen(self: Any, schema: Any) -> Any:
        # It makes whole tensors in any fake mode it finds, which are none of this process's.
        with _disable_current_modes():
            return work_out_shapes(self, schema)

    dist.init_process_group("fake", rank=0, world_size=num_processes, store=FakeStore())
    try:
        with mock.patch.object(ShardingPropagator, work_out_shapes.__name__, unseen):
            yield
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, mixed_precision: str) -> None:
    """Shard in place over the processes of the default group, by Accelerate's own function.

    Settings are those of ``accelerate config`` with ``fsdp_version: 2``: transformer blocks are
    gathered and given back one by one, in forward and in backward.

    Args:
        mixed_precision: "no", "bf16" or "fp16". Then parameters that train are in fp32, and are
            gathered, and their gradients summed, in that type.

    Raises:
        IncompatibleError: modules in different blocks share a parameter.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
    from torch.distributed.device_mesh import init_device_mesh

    plugin: Any = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=_blocks(model),
        cpu_offload=False,
        cpu_ram_efficient_loading=False,
        activation_checkpointing=False,
    )
    if mixed_precision != "no":
        plugin.set_mixed_precision(mixed_precision)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(_AXIS,))
    # What the function reads of an Accelerator, which is one for the process.
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision=mixed_precision,
        is_main_process=False,
        torch_device_mesh=mesh,
        parallelism_config=SimpleNamespace(fsdp_dim_names=(_AXIS,)),
    )
    try:
        fsdp2_prepare_model(accelerator, model)
    except ValueError as error:
        raise IncompatibleError(Problem("--sharding", f"FSDP cannot take it: {error}")) from error


@contextmanager
def without_reduction(model: nn.Module) -> Iterator[None]:
    """As ``Accelerator.no_sync``: gradients stay whole until the last micro-batch."""
    sharded: Any = model
    sharded.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        sharded.set_requires_gradient_sync(True)


def _blocks(model: Any) -> list[str]:
    """The classes that Accelerate wraps by itself, except those around the input embedding.

    It shards the embedding on its own, which fails within what is sharded already (Accelerate 1.15
    on BERT); its users then have to name the blocks (``fsdp_transformer_layer_cls_to_wrap``).
    """
    embedding = model.get_input_embeddings()
    modules = list(model.modules())
    around = {type(each).__name__ for each in modules if embedding in each.modules()}
    present = {type(each).__name__ for each in modules}
    return sorted(present.intersection(model._no_split_modules or ()) - around)
