"""The frozen trunk: the blocks below the lowest trainable tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from peftlab.anatomy import Anatomy


def enable_checkpointing(model: Any) -> None:
    """Gradient checkpointing of a transformers model, before a method attaches."""
    model.activation_checkpointing_enable()
    # transformers makes the embeddings' output require gradients, which reentrant checkpointing
    # needed; without it blocks below the lowest trainable tensor stay out of backward.
    model.disable_input_require_grads()


def trunk_candidates(base: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """The embeddings and blocks of a model, bottom to top; to be taken before a method attaches."""
    return [base.get_submodule(name) for name in (*anatomy.embeddings, *anatomy.blocks)]


def frozen_trunk(
    model: nn.Module, candidates: Sequence[nn.Module], outside: Sequence[nn.Module]
) -> list[nn.Module]:
    """The leading candidates in which nothing trains.

    Args:
        model: the model with its method attached.
        candidates: what ``trunk_candidates`` returned.
        outside: modules above the trunk by nature (final norms, pooler, head).

    A trainable parameter that lies in none of these modules, like a prompt encoder's, may feed any
    layer, so then there is no trunk.
    """
    placed = {
        id(parameter) for module in (*candidates, *outside) for parameter in module.parameters()
    }
    trained = [p for name, p in model.named_parameters() if p.requires_grad and not _is_copy(name)]
    if any(id(parameter) not in placed for parameter in trained):
        return []
    trunk: list[nn.Module] = []
    for module in candidates:
        if any(parameter.requires_grad for parameter in module.parameters()):
            break
        trunk.append(module)
    return trunk


def _is_copy(name: str) -> bool:
    """Whether PEFT made this parameter as a trained copy of a head's."""
    return ".modules_to_save." in name


def set_training_mode(model: nn.Module, trunk: Sequence[nn.Module]) -> None:
    """Training mode, but eval mode for the trunk: dropout in layers that never learn is noise."""
    model.train()
    for module in trunk:
        module.eval()
