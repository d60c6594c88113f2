"""One pretrained model for several runs, each of which trains a part of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SharedModel:
    """Reads a model from disk once.

    Every run gets modules of its own whose pretrained tensors are the same storage; what the
    checkpoint did not hold is drawn for each from the global random state, as ``load_model`` draws
    it. ``copy_trained`` must come before a run writes to any of them.
    """

    def __init__(self) -> None:
        self._kept: PreTrainedModel | None = None
        self._loaded = False

    @property
    def nbytes(self) -> int:
        """What is kept in memory for the next run; 0 where the next must load again."""
        return sum(tensor.nbytes for tensor in _tensors(self._kept)) if self._kept else 0

    def get(self, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """The model as ``load`` would return it now, with the same random numbers drawn."""
        if self._kept is not None:
            return _drawn(self._kept)
        before = torch.get_rng_state()
        model = load()
        if self._loaded or any(tensor.device.type != "cpu" for tensor in _tensors(model)):
            return model
        self._loaded = True
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        again = _drawn(model)
        if torch.equal(torch.get_rng_state(), after) and _same(model, again):
            self._kept = _copied(model)
        torch.set_rng_state(after)
        return model

    def copy_trained(self, model: nn.Module) -> None:
        """Give what a run of ``model`` trains storage of its own, so that what is kept stays."""
        kept = {tensor.data_ptr() for tensor in _tensors(self._kept)} if self._kept else set()
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.data_ptr() in kept:
                parameter.data = parameter.data.clone()

    def drop(self) -> None:
        """Keep nothing: what was loaded will be trained whole, or nothing comes after it."""
        self._kept = None


def _copied(model: PreTrainedModel) -> PreTrainedModel:
    """Modules of its own over the same storage; what is new has storage of its own."""
    memo: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    for name, parameter in model.named_parameters():
        new = name in model.newly_initialized
        data = torch.empty_like(parameter) if new else parameter.detach()
        own = nn.Parameter(data, requires_grad=parameter.requires_grad)
        if not new:
            # transformers' mark of what it need not draw.
            own._is_hf_initialized = True  # type: ignore[attr-defined]
        memo[id(parameter)] = own
    return copy.deepcopy(model, memo)


def _drawn(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with new values of what is new, by the function that drew the first."""
    own = _copied(model)
    for name in own.newly_initialized:
        own.get_submodule(name.rpartition(".")[0])._is_hf_initialized = False
    own.initialize_weights()
    return own


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(_tensors(one), _tensors(other), strict=True)
    return all(a is b or a.data_ptr() == b.data_ptr() or torch.equal(a, b) for a, b in pairs)
