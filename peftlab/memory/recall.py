"""Results of fake operations made again without asking torch for their shapes a second time.

A model repeats one block many times, so nearly every operation was seen before with inputs of the
same shapes. torch keeps such a cache too, but spends half a millisecond on each use of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch

Key = tuple[Any, ...]
_NOTHING = type(None)
_PLAIN = {int, float, bool, str, _NOTHING}
_PLAIN |= {torch.dtype, torch.device, torch.layout, torch.memory_format}
_NO_RECIPE = object()


class Recall:
    """From the shapes of an operation's inputs to what it returns; kept from plan to plan.

    Args:
        mode: makes the tensors fake.
        device: whose kernels they stand for.
    """

    _recipes: ClassVar[dict[Key, Any]] = {}

    def __init__(self, mode: FakeTensorMode, device: str) -> None:
        self._mode, self._device = mode, device

    def key(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key | None:
        """Everything that decides what is returned; None where that is more than shapes."""
        parts: list[Any] = [func, self._device, torch.get_default_dtype()]
        if not _sign(args, parts):
            return None
        if kwargs:
            parts.extend(kwargs)
            if not _sign(kwargs.values(), parts):
                return None
        return tuple(parts)

    def knows(self, key: Key) -> bool:
        """Whether ``again`` can answer."""
        return self._recipes.get(key, _NO_RECIPE) is not _NO_RECIPE

    def again(self, key: Key, inputs: list[Tensor]) -> Any:
        """What was learned, for other inputs of the same shapes.

        Args:
            inputs: the tensors among the arguments, in order.
        """
        kind, recipes = self._recipes[key]
        if kind is None:
            return self._one(recipes, inputs)
        return kind(self._one(recipe, inputs) for recipe in recipes)

    def learn(self, key: Key, inputs: list[Tensor], out: Any) -> None:
        """Keep what an operation returned, if shapes alone tell it."""
        storages = {t.untyped_storage()._cdata: at for at, t in reversed(list(enumerate(inputs)))}
        if type(out) in (list, tuple):
            recipes = [_recipe(each, inputs, storages) for each in out]
            if _NO_RECIPE not in recipes:
                self._recipes[key] = type(out), recipes
        elif (recipe := _recipe(out, inputs, storages)) is not _NO_RECIPE:
            self._recipes[key] = None, recipe

    def _one(self, recipe: Any, inputs: list[Tensor]) -> Any:
        if recipe is None:
            return None
        at, shape, stride, offset, dtype, device = recipe
        if shape is None:
            return inputs[at]
        with no_dispatch():
            if at is None:
                made = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            else:
                made = torch.empty(0, dtype=dtype, device="meta")
                made.set_(inputs[at].untyped_storage(), offset, shape, stride)
        return FakeTensor(self._mode, made, device)


def _sign(values: Iterable[Any], parts: list[Any]) -> bool:
    for value in values:
        kind = type(value)
        if kind is FakeTensor and value.layout is torch.strided:
            parts += (value.shape, value.stride(), value.storage_offset(), value.dtype)
        elif kind in _PLAIN:
            parts += (kind, value)
        elif isinstance(value, (list, tuple)):
            parts += (kind, len(value))
            if not _sign(value, parts):
                return False
        else:
            return False
    return True


def _recipe(out: Any, inputs: list[Tensor], storages: dict[int, int]) -> Any:
    """Which input it is; or how it lies in an input's storage, or in one of its own."""
    if out is None:
        return None
    if not isinstance(out, FakeTensor) or out.dtype.is_complex:
        return _NO_RECIPE
    for place, tensor in enumerate(inputs):
        if out is tensor:
            return place, None, None, None, None, None
    shape, stride, offset = tuple(out.shape), out.stride(), out.storage_offset()
    storage = out.untyped_storage()
    at = storages.get(storage._cdata)
    if at is None:
        # Results that share a storage, or lie in a larger one, are left to torch.
        storages[storage._cdata] = -1
        needed = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if offset or storage.nbytes() != (needed if out.numel() else 0) * out.itemsize:
            return _NO_RECIPE
    elif at < 0 or out.dtype is not inputs[at].dtype:
        return _NO_RECIPE
    return at, shape, stride, offset, out.dtype, out.fake_device
