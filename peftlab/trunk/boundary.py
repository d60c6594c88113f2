"""Up to where a model computes the same in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peftlab.anatomy import Anatomy

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Boundary:
    """A line below which, by the model's structure, nothing trains and nothing is random.

    Args:
        base: the transformers model; ``backbone`` its part without the head.
        blocks: all blocks, bottom to top; ``depth`` of them lie below the line.
        trunk: the modules below the line that must be in eval mode.
        below: what lies below the line and has parameters, by name, bottom to top.
        whole: nothing in the backbone trains: the line may be drawn above it.
    """

    base: nn.Module
    backbone: nn.Module
    blocks: tuple[nn.Module, ...]
    depth: int
    trunk: tuple[nn.Module, ...]
    below: tuple[tuple[str, nn.Module], ...]
    whole: bool

    def lowered(self, depth: int) -> Boundary:
        """The line above fewer blocks of the same trunk."""
        topmost = self.blocks[depth - 1]
        end = next(i for i, (_, module) in enumerate(self.below, 1) if module is topmost)
        return replace(self, depth=depth, below=self.below[:end], whole=False)


@dataclass(frozen=True)
class NoBoundary:
    """Nothing can be kept; ``reason`` says why."""

    reason: str


def find_boundary(
    base: nn.Module, anatomy: Anatomy, trunk: Sequence[nn.Module]
) -> Boundary | NoBoundary:
    """Find the line in a model with its method attached.

    Args:
        base: the transformers model, as the method left it.
        anatomy: of ``base`` before the method was attached.
        trunk: the modules that stay in eval mode while training.
    """
    transformer: Any = base
    backbone: nn.Module = getattr(base, transformer.base_model_prefix, base)
    frozen = {id(module) for module in trunk}
    blocks = tuple(base.get_submodule(name) for name in anatomy.blocks)
    depth = sum(id(block) in frozen for block in blocks)
    if depth == 0:
        return NoBoundary("no block is frozen below what trains")
    if anatomy.is_encoder_decoder or backbone is base:
        return NoBoundary(f"{anatomy.model_class} has no single stack of blocks under a head")
    if any(type(module).__name__ == "Linear8bitLt" for module in backbone.modules()):
        return NoBoundary("int8 rounds a row by what else is in its batch")
    if name := _random(transformer, backbone, (*trunk, *blocks)):
        return NoBoundary(f"{name} stays on outside of the frozen blocks")
    trains = any(parameter.requires_grad for parameter in backbone.parameters())
    names = (*anatomy.embeddings, *anatomy.blocks[:depth])
    if not trains:
        names = (*names, *anatomy.after_blocks)
    below = tuple((name, base.get_submodule(name)) for name in dict.fromkeys(names))
    return Boundary(base, backbone, blocks, depth, tuple(trunk), below, whole=not trains)


def _random(model: Any, backbone: nn.Module, inside: Sequence[nn.Module]) -> str | None:
    """The name of a dropout outside of these modules, if there is one."""
    from torch import nn

    if getattr(model.config, "layerdrop", 0):
        return "layerdrop"

    known = {id(module) for outer in inside for module in outer.modules()}
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0 and id(module) not in known:
            return str(name)
    return None
