"""Memory for time: what backward needs is computed again instead of kept.

``selective`` keeps what linear layers and fused attention made, and computes again what follows
from it at little cost: activations, norms, casts, gates, and in long rows the probabilities of
attention that is not fused. Dropout masks are kept as bits. Nothing is kept that was not before,
or a smaller tensor in its place; nothing is drawn again, and the values are those of the first
time, so losses and gradients are bitwise those of a run without it.

torch's selective checkpointing repeats whole blocks with the results of some operations in a cache.
It draws dropout masks again, a fifth of a step on a CPU; keeps each product whether or not backward
reads it, which for methods that train no matrix is more than they kept before; and runs without a
cache of keys and values, so not with a prefix.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from peftlab.anatomy import Anatomy
from peftlab.models.attention import SCORES
from peftlab.models.bits import pack_bits, unpack_bits
from peftlab.models.dropout import DRAW_KEPT
from peftlab.training.modes import trunk_candidates

_aten: Any = torch.ops.aten
_CHEAP = {
    op: None
    for packet in (
        _aten.add, _aten.sub, _aten.mul, _aten.div, _aten.neg, _aten.pow, _aten._to_copy,
        _aten.gelu, _aten.silu, _aten.relu, _aten.tanh, _aten.sigmoid, _aten.native_layer_norm,
        _aten.bmm, _aten._unsafe_view, _aten._softmax, _aten._safe_softmax,
    )
    for op in (getattr(packet, name) for name in packet.overloads())
    if not op._schema.is_mutable and ".out" not in str(op)
} | {SCORES: None}  # fmt: skip
"""Operations whose result is the same when they run again, at next to no cost.

A batched product is attention's: an element of its scores costs as many multiplications as a head
is wide, an element of a linear layer as many as the model is.
"""
_CHEAP_CALLS = {
    Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.neg, Tensor.pow, Tensor.to, Tensor.float,
    torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.pow, torch.bmm,
    functional.gelu, functional.layer_norm, SCORES,
}  # fmt: skip
"""Calls that are one of these operations each, and do not themselves keep what they return."""
_PRODUCTS = {torch.bmm, _aten.bmm.default, SCORES}
"""Of the first two arguments. Made again where the result is as large as these together; of short
rows it is smaller."""
_CHANGING_CALLS = {Tensor.add_, Tensor.mul_, Tensor.addmm_, Tensor.baddbmm_, DRAW_KEPT}
"""The most frequent calls that change what they are given: what was known of it holds no more."""
_OTHER_CALLS = {
    functional.linear, torch.addmm, torch.cat, torch.tensor,
    Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.transpose, Tensor.permute, Tensor.t,
    Tensor.contiguous, Tensor.expand, Tensor.unsqueeze, Tensor.split, Tensor.__getitem__,
    Tensor.new_empty, Tensor.size, Tensor.dim,
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "requires_grad")),
}  # fmt: skip
"""The most frequent calls of which there is nothing to note."""
_DRAWN = {_aten.bernoulli_.float, _aten.bernoulli_.Tensor, DRAW_KEPT}
_DIVIDED = {_aten.div_.Scalar, _aten.div_.Tensor}
_ORIGIN = "_peftlab_origin"


def enable_checkpointing(model: Any, mode: Literal[True, "selective"]) -> None:
    """Gradient checkpointing of a transformers model, before a method attaches.

    Args:
        mode: True keeps the input of each block and runs the block again; "selective" keeps what
            is expensive and computes the rest again.
    """
    if mode == "selective":
        for module in trunk_candidates(model, Anatomy.of(model)):
            module.forward = partial(_selectively, module)
        return
    model.activation_checkpointing_enable()
    # transformers makes the embeddings' output require gradients, which reentrant checkpointing
    # needed; without it blocks below the lowest trainable tensor stay out of backward.
    model.disable_input_require_grads()


def _selectively(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A block's forward; in eval mode, as the frozen trunk is, as it was."""
    # Looked up now: a block's class may have been exchanged for one with another forward.
    forward: Any = type(module).forward
    if not (module.training and torch.is_grad_enabled()):
        return forward(module, *args, **kwargs)
    given = (*args, *kwargs.values())
    device = next((arg.device.type for arg in given if isinstance(arg, Tensor)), "cpu")
    # A cast by autocast is an operation and no call.
    recorder = _OPERATIONS if torch.is_autocast_enabled(device) else _Calls(device)
    with torch.autograd.graph.saved_tensors_hooks(_pack, _value), recorder:
        return forward(module, *args, **kwargs)


class _Made(NamedTuple):
    """A call that made a tensor, and the versions of that and of the tensors it was given."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]


class _Origin:
    """What is known of a tensor: a field of the tensor itself, so that it lives as long."""

    __slots__ = ("again", "bits", "divisor", "drawn", "kept", "made")

    def __init__(self) -> None:
        self.made: _Made | None = None
        self.drawn, self.divisor = False, None
        self.bits: Tensor | None = None
        self.kept = False
        self.again: _Again | None = None


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes on each result of a cheap operation how it was made, and what dropout drew."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # What hides the mode from the compiler takes longer than the mode; nothing is compiled.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _CHEAP:
            learns = any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
            if learns and torch.is_grad_enabled():
                _note(_first(out), func, args, kwargs)
        elif _is_mutable(func):
            origin = getattr(_root(args[0]), _ORIGIN, None)
            if func in _DIVIDED and origin is not None and origin.drawn:
                origin.divisor = args[1]
            else:
                setattr(_root(args[0]), _ORIGIN, None)
            if func in _DRAWN:
                _origin(args[0]).drawn = True
        return out


def _note(out: Tensor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _origin(out).made = _Made(func, args, kwargs, _versions(out, *args, *kwargs.values()))


def _versions(*values: Any) -> list[int]:
    return [value._version for value in values if isinstance(value, Tensor)]


_OPERATIONS = _Operations()  # type: ignore[no-untyped-call]


class _Calls(TorchFunctionMode):
    """The same as ``_Operations``, at less cost: torch is called less often than it operates."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        plain = "out" not in kwargs
        if plain and func in _OTHER_CALLS:
            return func(*args, **kwargs)
        if plain and func in _CHEAP_CALLS and not torch.is_autocast_enabled(self._device):
            out = func(*args, **kwargs)
            if out.requires_grad and out is not args[0]:
                _note(out, func, args, kwargs)
            return out
        if func in _CHANGING_CALLS:
            changed = _root(args[0])
            setattr(changed, _ORIGIN, None)
            if func is DRAW_KEPT:
                origin = _origin(changed)
                origin.drawn = True
                origin.bits = changed.new_empty(-(-changed.numel() // 8))
                kwargs = {**kwargs, "bits": origin.bits}
            return func(*args, **kwargs)
        # Without autograd nothing is made that backward will read.
        if not (torch.is_grad_enabled() or _changes(func)):
            return func(*args, **kwargs)
        with _OPERATIONS:
            return func(*args, **kwargs)


class _Kept(NamedTuple):
    tensor: Tensor
    version: int


class _View(NamedTuple):
    of: _Again
    shape: torch.Size
    stride: tuple[int, ...]
    offset: Any


class _Again:
    """A tensor that is made again when it is asked for, and held until all have asked."""

    def __init__(self, func: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
        self._func, self._args, self._kwargs = func, args, kwargs
        self._value: Tensor | None = None
        self.uses = 0

    def value(self) -> Tensor:
        value = self._make() if self._value is None else self._value
        self.uses -= 1
        self._value = value if self.uses > 0 else None
        return value

    def _make(self) -> Tensor:
        args = [_value(arg) for arg in self._args]
        kwargs = {name: _value(arg) for name, arg in self._kwargs.items()}
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        # What autocast cast is among the operations; backward may run inside of it.
        casts = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if casts else nullcontext():
            return _first(self._func(*args, **kwargs))


class _Mask(_Again):
    """Zeros and one other number, as bits: a boolean tensor, or what the CPU's dropout drew."""

    def __init__(self, mask: Tensor, divisor: Any, bits: Tensor | None) -> None:
        super().__init__(None, [], {})
        if bits is None:
            bits = pack_bits(mask if mask.dtype in (torch.bool, torch.uint8) else mask != 0)
        self._bits = bits
        self._shape, self._stride, self._dtype = mask.shape, mask.stride(), mask.dtype
        self._divisor = divisor

    def _make(self) -> Tensor:
        value = unpack_bits(self._bits, self._shape)
        # A byte of zero or one is a boolean already; torch would copy it.
        value = value.view(self._dtype) if self._dtype is torch.uint8 else value.to(self._dtype)
        if self._divisor is not None:
            value.div_(self._divisor)
        if value.stride() != self._stride:
            value = value.new_empty_strided(self._shape, self._stride).copy_(value)
        return value


def _pack(tensor: Tensor) -> _Kept | _View | _Again:
    """What autograd keeps in the place of a tensor that backward will read."""
    with torch._C.DisableTorchFunction():
        root = _root(tensor)
        again = _again(root)
        if again is None:
            origin = _origin(root)
            origin.kept, origin.made = True, None
            return _kept(tensor)
        return _use(again, tensor, root)


def _again(root: Tensor) -> _Again | None:
    """How to make a tensor from others, kept anyway or smaller; None if it must be kept."""
    if root.dtype is torch.bool:
        _origin(root).drawn = True
    origin: _Origin | None = getattr(root, _ORIGIN, None)
    if origin is None or origin.kept or origin.again is not None:
        return None if origin is None else origin.again
    if origin.drawn:
        origin.again = _Mask(root, origin.divisor, origin.bits)
    elif origin.made is not None:
        func, args, kwargs, versions = origin.made
        given = (*args, *kwargs.values())
        roots = {id(_root(arg)): _root(arg) for arg in given if isinstance(arg, Tensor)}
        missing = [one for one in roots.values() if not _is_kept(one) and _again(one) is None]
        unchanged = versions == _versions(root, *given)
        worth = func not in _PRODUCTS or sum(map(_nbytes, map(_root, given[:2]))) <= _nbytes(root)
        if unchanged and worth and sum(map(_nbytes, missing)) < _nbytes(root):
            for one in missing:
                _origin(one).kept = True
            named = {name: _source(arg) for name, arg in kwargs.items()}
            origin.again = _Again(func, [_source(arg) for arg in args], named)
            origin.made = None
    return origin.again


def _source(arg: Any) -> Any:
    if not isinstance(arg, Tensor):
        return arg
    root = _root(arg)
    again = _again(root)
    return _kept(arg) if again is None else _use(again, arg, root)


def _kept(tensor: Tensor) -> _Kept:
    # Detached, or a result that its own operation keeps would keep itself alive.
    return _Kept(tensor if tensor.grad_fn is None else tensor.detach(), tensor._version)


def _use(again: _Again, tensor: Tensor, root: Tensor) -> _View | _Again:
    again.uses += 1
    if tensor is root:
        return again
    return _View(again, tensor.shape, tensor.stride(), tensor.storage_offset())


def _value(packed: Any) -> Any:
    if isinstance(packed, _Kept):
        if packed.tensor._version != packed.version:
            raise RuntimeError(
                "a tensor needed for gradient computation has been modified by an inplace operation"
            )
        return packed.tensor
    if isinstance(packed, _View):
        return packed.of.value().as_strided(packed.shape, packed.stride, packed.offset)
    return packed.value() if isinstance(packed, _Again) else packed


def _root(tensor: Tensor) -> Tensor:
    base: Tensor | None = tensor._base
    return tensor if base is None else base


def _origin(tensor: Tensor) -> _Origin:
    origin: _Origin | None = getattr(tensor, _ORIGIN, None)
    if origin is None:
        origin = _Origin()
        setattr(tensor, _ORIGIN, origin)
    return origin


def _is_kept(root: Tensor) -> bool:
    return isinstance(root, nn.Parameter) or (
        (origin := getattr(root, _ORIGIN, None)) is not None and origin.kept
    )


def _nbytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _first(out: Any) -> Tensor:
    first: Tensor = out if isinstance(out, Tensor) else out[0]
    return first


@cache
def _changes(func: Any) -> bool:
    """Whether a call may change what it is given: by its name, ``mul_`` or ``mul_.Tensor``."""
    return str(getattr(func, "__name__", "_")).partition(".")[0].endswith("_")


@cache
def _is_mutable(func: Any) -> bool:
    mutable: bool = func._schema.is_mutable
    return mutable
