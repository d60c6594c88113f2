"""The frozen trunk: the blocks below the lowest trainable tensor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from peftlab.anatomy import Anatomy


def trunk_candidates(base: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """Embeddings, their dropout and blocks, bottom to top; to be taken before a method attaches."""
    embeddings, blocks = (
        [base.get_submodule(name) for name in names]
        for names in (anatomy.embeddings, anatomy.blocks)
    )
    stack = base.get_submodule(anatomy.blocks[0].rpartition(".")[0])
    around = base.get_submodule(anatomy.blocks[0].rpartition(".")[0].rpartition(".")[0])
    # GPT-2's lies beside the embeddings. The order of registration is the order of use.
    before = itertools.takewhile(lambda child: child is not stack, around.children())
    return [*embeddings, *(child for child in before if isinstance(child, nn.Dropout)), *blocks]


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
