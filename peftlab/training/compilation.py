"""``torch.compile`` for the blocks that train."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from peftlab.anatomy import Anatomy
from peftlab.errors import IncompatibleError, Problem


def compile_blocks(
    model: nn.Module, anatomy: Anatomy, trunk: Sequence[nn.Module], device: torch.device
) -> None:
    """Compile each block outside of the frozen trunk when it is first called, in place.

    One compilation serves all blocks of a kind, and batches of any size and length. Parameters and
    names stay as they are.

    Args:
        model: with its method attached.

    Raises:
        IncompatibleError: there is no C++ compiler, which compiling for the CPU needs.
    """
    if device.type == "cpu":
        _require_compiler()
    frozen = {id(module) for module in trunk}
    for name, module in model.named_modules():
        # A method may keep the model behind a prefix.
        if id(module) not in frozen and any(
            name == block or name.endswith(f".{block}") for block in anatomy.blocks
        ):
            module.compile(dynamic=True)


def compile_seconds() -> float:
    """What this process has spent on compiling so far."""
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent().get("total_wall_time", 0.0))


def _require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise IncompatibleError(
            Problem(
                "train.torch_compile",
                f"compiling for the CPU needs a C++ compiler: {error}".splitlines()[0],
                "Install g++ or name another in CXX, or leave torch_compile off.",
            )
        ) from None
