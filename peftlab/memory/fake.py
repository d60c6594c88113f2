"""A world in which models are built and trained without storage, and take the paths they would.

Floating-point tensors are fake. Small tensors of integers and booleans (token ids, masks,
positions) carry their values along, so that what a model decides by looking at its input (is
anything padded? is the batch packed?) is decided as in a real run.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from peftlab.memory.recall import Recall
from peftlab.memory.timeline import is_wrapper

MAX_VALUES = 2**22
"""Tensors of more elements do not carry values."""
_CONSTANT = 2**14

_aten = torch.ops.aten
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten._index_put_impl_.default}
_INDEXING |= {_aten.index_put_.default}
_EMPTY = {_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default}
_EMPTY |= {_aten.new_empty.default, _aten.new_empty_strided.default}
_EMPTY |= {_aten.empty_permuted.default}
_DEVICE = torch.ops.prim.device.default
_DYNAMIC = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_KERNELS_IN_PLACE = ("bitsandbytes::optimizer_update",)


@dataclass(frozen=True, slots=True)
class _Nature:
    """What is the same for every call of an operation.

    Args:
        special: more than the inputs' shapes decides what it returns or needs.
        writes: it changes an input.
    """

    special: bool
    writes: bool

    @classmethod
    def of(cls, func: Any) -> _Nature:
        schema = func._schema
        special = (
            func in _INDEXING
            or func is _aten._local_scalar_dense.default
            or schema.name.startswith(_KERNELS_IN_PLACE)
            or any(argument.is_out for argument in schema.arguments)
            or not (_DYNAMIC | {torch.Tag.inplace_view}).isdisjoint(func.tags)
        )
        return cls(special, schema.is_mutable)


class _Mode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A mode that a deep copy of a fake tensor keeps.

    PEFT copies heads; a tensor of another mode would be taken for a real one, and reading it
    corrupts the heap (torch 2.13).
    """

    def __deepcopy__(self, memo: Any) -> _Mode:
        return self


class FakeWorld(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Carries values through fake operations and answers what depends on data.

    Entered inside ``mode``; use ``fake_world``.

    Args:
        mode: makes the tensors fake.
        device: whose kernels they stand for, "cpu" or "cuda".
    """

    def __init__(self, mode: FakeTensorMode, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode, self.device = mode, device
        self.guesses: set[str] = set()
        self._recall = Recall(mode, device)
        self._natures: dict[Any, _Nature] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing here is compiled, and the guard around every operation has its price.
        return False

    def fake(self, tensor: Tensor) -> Tensor:
        """A fake tensor in the place of a real one, that carries its values."""
        if isinstance(tensor, FakeTensor):
            raise TypeError("the tensor is fake already: it has no values")
        made: Tensor = self.mode.from_tensor(tensor)
        if tensor.numel() <= MAX_VALUES:
            _remember(made, tensor)
        return made

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _DEVICE:
            return args[0].device if isinstance(args[0], FakeTensor) else func(*args)
        if is_wrapper(types):
            return NotImplemented
        if (nature := self._natures.get(func)) is None:
            nature = self._natures[func] = _Nature.of(func)
        inputs = list(_tensors((*args, *kwargs.values())))
        known = [_value(tensor) is not None for tensor in inputs]
        if nature.special or all(known) or (nature.writes and any(known)):
            return self._step_by_step(func, args, kwargs)
        # Only shapes matter here: no value goes in, none comes out.
        key = self._recall.key(func, args, kwargs)
        if key is not None and self._recall.knows(key):
            return self._recall.again(key, inputs)
        out = self._as_kernel(func, args, func(*args, **kwargs))
        if key is not None:
            self._recall.learn(key, inputs, out)
        return out

    def _step_by_step(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func._schema.name.startswith(_KERNELS_IN_PLACE):
            return None
        if func in _INDEXING:
            args = (args[0], self._as_numbers(args[1]), *args[2:])
        inputs = list(_tensors((*args, *kwargs.values())))
        known = all(_value(tensor) is not None for tensor in inputs)
        if _DYNAMIC.intersection(func.tags) and known:
            return tree_map_only(Tensor, self._result, _really(func, args, kwargs))
        if func is _aten._local_scalar_dense.default:
            return self._guess(inputs[0])
        out = self._as_kernel(func, args, func(*args, **kwargs))
        outputs = list(_tensors((out,)))
        if known and outputs and _worth_knowing(func, inputs, outputs):
            for fake, real in zip(outputs, tree_leaves(_really(func, args, kwargs)), strict=True):
                _remember(fake, real)
        elif func._schema.is_mutable:
            for tensor in (*inputs, *outputs):
                if tensor.is_floating_point() or any(tensor is output for output in outputs):
                    _forget(tensor)
        return out

    def _as_kernel(self, func: Any, args: tuple[Any, ...], out: Any) -> Any:
        """A result as the kernel leaves it, where torch's formula of its shape says otherwise."""
        if func is _aten.mse_loss.default:
            # The kernel makes the differences in its result and reduces them in place.
            _grow(out, args[0].untyped_storage().nbytes())
        elif func._schema.name == "_c10d_functional::wait_tensor":
            # The collective is done, in the tensor that was waited for.
            return args[0]
        elif func is _aten.native_layer_norm.default:
            # Means and deviations are in the weights' type on CPU, and in fp32 on CUDA.
            weight_is_wide = args[2] is not None and args[2].dtype is torch.float32
            if weight_is_wide or self.device == "cuda":
                return (out[0], *(statistic.float() for statistic in out[1:]))
        return out

    def _as_numbers(self, indices: Any) -> list[Any]:
        """Boolean indices as positions: how many they select is what the result's shape needs."""
        numbers: list[Any] = []
        for index in indices:
            value = None if index is None else _value(index)
            if value is None or value.dtype not in (torch.bool, torch.uint8):
                numbers.append(index)
            else:
                with no_dispatch():
                    positions = value.nonzero(as_tuple=True)
                numbers.extend(self.fake(position) for position in positions)
        return numbers

    def _result(self, real: Tensor) -> Tensor:
        """The fake of what an operation returned, on a storage as large."""
        made = self.fake(real)
        _grow(made, real.untyped_storage().nbytes())
        return made

    def _guess(self, tensor: Tensor) -> Any:
        """True, or one."""
        kind = "a condition" if tensor.dtype is torch.bool else f"a {tensor.dtype} number"
        self.guesses.add(f"{kind} read from computed values to be true or one")
        return True if tensor.dtype is torch.bool else 1.0 if tensor.is_floating_point() else 1


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among arguments or results, which nest in lists only."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _value(tensor: Tensor) -> Tensor | None:
    """The real values that a tensor has or carries."""
    if isinstance(tensor, FakeTensor):
        return getattr(tensor, "_peftlab_value", None)
    return tensor


def _grow(tensor: Tensor, size: int) -> None:
    storage = tensor.untyped_storage()
    if storage.nbytes() < size:
        storage.resize_(size)


def _remember(tensor: Tensor, value: Tensor) -> None:
    tensor._peftlab_value = value  # type: ignore[attr-defined]


def _forget(tensor: Tensor) -> None:
    if getattr(tensor, "_peftlab_value", None) is not None:
        tensor._peftlab_value = None  # type: ignore[attr-defined]


def _worth_knowing(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    if func in _EMPTY or torch.Tag.nondeterministic_seeded in func.tags:
        return False
    if sum(tensor.numel() for tensor in outputs) > MAX_VALUES:
        return False
    # What nothing went into is a constant: positions and masks matter, large zeros do not.
    return bool(inputs) or all(t.numel() <= _CONSTANT or not t.is_floating_point() for t in outputs)


def _really(func: Any, args: Any, kwargs: Any) -> Any:
    with no_dispatch():
        return func(*tree_map_only(Tensor, _value, args), **tree_map_only(Tensor, _value, kwargs))


def _apply_in_place(
    self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """``nn.Module._apply`` as it works on real tensors; on fake ones it would swap, and fail."""
    for child in self.children() if recurse else ():
        child._apply(fn)  # type: ignore[no-untyped-call]
    for parameter in self._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                parameter.data = fn(parameter)
                if parameter.grad is not None:
                    parameter.grad.data = fn(parameter.grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self


def _is_not_fake(tensor: Any) -> bool:
    # No Mock, which would keep every tensor it was asked about alive.
    return False


@contextmanager
def fake_world(device: str = "cpu") -> Iterator[FakeWorld]:
    """Inside, everything that is made is fake.

    Args:
        device: what the tensors stand for, "cpu" or "cuda"; torch takes all for the CPU's.
    """
    # Their tables are made on import or first use, are kept, and must be real.
    functional = importlib.import_module("bitsandbytes").functional
    functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    importlib.import_module("peft")
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Deep copies ask, and get none.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        # torch logs each failure with its traceback, also those that are answered with a message.
        logger = logging.getLogger("torch._subclasses.fake_tensor")
        stack.enter_context(mock.patch.object(logger, "disabled", True))
        mode = stack.enter_context(_Mode(allow_non_fake_inputs=True))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply_in_place))
        # transformers takes fake tensors for a sign of tracing, and then takes other paths.
        stack.enter_context(
            mock.patch("transformers.utils.import_utils.is_fake_tensor", _is_not_fake)
        )
        # Else optimizers and clipping work tensor by tensor, with other temporaries.
        for name in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
            module = importlib.import_module(name)
            types = [*module._foreach_supported_types, FakeTensor]
            stack.enter_context(mock.patch.object(module, "_foreach_supported_types", types))
        yield stack.enter_context(FakeWorld(mode, device))
