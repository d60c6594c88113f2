"""Every storage that lives during an optimizer step, for real tensors and for fake ones alike.

A storage counts from the operation that returns it until its last reference is dropped. What a
kernel allocates inside is counted where its formula is known (kernels.py) and not seen else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from peftlab.memory.flops import flop_formula
from peftlab.memory.kernels import Kernels
from peftlab.memory.trace import PHASES, Phase, Role, StepTrace, StorageInfo

CUDA_GRANULARITY = 512
"""CUDA rounds to this many bytes (c10/cuda/CUDACachingAllocator.cpp, ``kMinBlockSize``)."""

_DEVICE = torch.ops.prim.device.default
_PLAIN = {Tensor, FakeTensor, torch.nn.Parameter}


class _Tracked:
    """A storage under observation."""

    __slots__ = ("address", "dead", "forward", "index", "op", "phase", "role", "size", "stream")

    def __init__(self, address: int, index: int, size: int, op: str, phase: str) -> None:
        self.address, self.index, self.size = address, index, size
        self.op, self.phase = op, phase
        self.dead = False
        self.role: Role | None = None
        self.forward: int | None = None
        self.stream = 0


class _Witness:
    """Lives in a storage's Python object, which the storage owns, and dies with it."""

    __slots__ = ("dead", "tracked")

    def __init__(self, tracked: _Tracked, dead: list[_Tracked]) -> None:
        self.tracked, self.dead = tracked, dead

    def __del__(self) -> None:
        # Possibly in the middle of an allocator or of backward: no more than this.
        self.tracked.dead = True
        self.dead.append(self.tracked)


@dataclass(frozen=True, slots=True)
class _Operation:
    """What is the same for every call of an operation."""

    name: str
    flops: Callable[..., int] | None
    returns_inputs: bool

    @classmethod
    def of(cls, func: Any) -> _Operation:
        aliases = any(result.alias_info is not None for result in func._schema.returns)
        return cls(str(func), flop_formula(func), aliases)


class Timeline(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which storages are live, operation by operation.

    A storage that goes away is noted at once by a witness inside it and recorded before the next
    allocation, so that events are in exact order and a step's cost does not grow with what is live.
    Nothing is kept alive. One timeline runs at a time.

    Args:
        granularity: sizes are rounded up to a multiple of this many bytes; 1 on CPU.
        kernels: of the device that is stood for, whose kernels allocate what no operation returns.
        device: the type of device whose storages count; all, by default.
    """

    _running: ClassVar[bool] = False

    def __init__(
        self, granularity: int = 1, kernels: Kernels | None = None, device: str | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self._device = device
        self._kernels = kernels
        self._granularity = granularity
        self._operations: dict[Any, _Operation] = {}
        self._storages: list[_Tracked] = []
        self._live: dict[int, _Tracked] = {}
        self._dead: list[_Tracked] = []
        self._events: list[tuple[int, int]] = []
        self._start: int | None = None
        self._entered: list[tuple[Phase, int]] = []
        self._left: list[tuple[Phase, int]] = []
        self._phase: Phase | None = None
        self._inside = False
        self._forwards = 0
        self._forward_ends: dict[int, int] = {}
        self._in_forward: int | None = None
        self._logits_from: int | None = None
        self._backward_from = 0
        # Which a model on CPU names as on CUDA; there they do nothing.
        self._streams = {torch.cpu.current_stream(): 0}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing here is compiled, and the guard around every operation has its price.
        return False

    def __enter__(self) -> Timeline:
        if Timeline._running:
            raise RuntimeError("one timeline runs at a time")
        super().__enter__()  # type: ignore[no-untyped-call]
        Timeline._running = True
        resize = self._resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            before = storage.nbytes()
            result = resize(storage, size)
            self._resized(storage, before)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        Timeline._running = False
        self._live.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _DEVICE:
            # The engine asks every gradient; the mode below would answer the same.
            return args[0].device if isinstance(args[0], FakeTensor) else func(*args)
        if is_wrapper(types):
            return NotImplemented
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (operation := self._operations.get(func)) is None:
            operation = self._operations[func] = _Operation.of(func)
        if operation.flops is not None:
            self.flops += operation.flops(*args, **kwargs, out_val=out)
        if self._inside and self._phase == "backward":
            self._follow_recomputation()
        if self._kernels is not None:
            self._leave_on_host(func, out)
        for tensor in (out,) if isinstance(out, Tensor) else _tensors(out):
            if type(tensor) in _PLAIN:
                self._see(tensor, operation, args, kwargs)
            else:
                for inner in _inside(tensor):
                    self._see(inner, operation, args, kwargs)
        if self._kernels is not None:
            self._hold(self._kernels.inside(func, args), operation.name)
        return out

    def adopt(self, tensors: Iterable[Tensor], role: Role) -> None:
        """Give storages a role; those not seen so far are counted from now on."""
        for tensor in chain.from_iterable(map(_inside, tensors)):
            storage = tensor.untyped_storage()
            tracked = self._find(storage) or self._track(storage, "")
            if tracked is not None:
                tracked.role = role

    def begin(self) -> None:
        """What is live was there before the step; the step starts here."""
        self._bury()
        self._start = len(self._events)
        self._entered, self._left, self._phase, self.flops = [], [], None, 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the step. Phases may repeat, one pair a micro-batch, but never overlap."""
        if self._start is None or self._inside:
            raise RuntimeError("a phase needs a step that began, and cannot hold another phase")
        if name not in PHASES:
            raise ValueError(f"no phase {name!r}")
        self._bury()
        self._phase, self._inside = name, True
        self._entered.append((name, len(self._events)))
        if name == "forward":
            self._open_forward()
        elif name == "backward":
            self._backward_from = len(self._storages)
        try:
            yield
        finally:
            self._bury()
            self._left.append((name, len(self._events)))
            self._close_forward()
            self._inside = False
            self._logits_from = None if name == "forward" else self._logits_from

    def logits_made(self, logits: Tensor) -> None:
        """From this tensor to the end of forward, what is allocated is logits, copies and loss."""
        tracked = self._find(logits.untyped_storage())
        if tracked is None or self._phase != "forward":
            return
        if self._logits_from is None or tracked.index < self._logits_from:
            self._logits_from = tracked.index
            for later in self._storages[tracked.index :]:
                later.role = later.role or "logits"

    def logits_differentiated(self) -> None:
        """What backward allocated so far is the gradient of logits and loss."""
        if self._phase == "backward":
            for tracked in self._storages[self._backward_from :]:
                tracked.role = tracked.role or "logits"

    def trace(self) -> StepTrace:
        """The step as recorded so far."""
        self._bury()
        freed_at = {}
        for position, (index, change) in enumerate(self._events):
            if change < 0:
                freed_at[index] = position
        storages = tuple(
            StorageInfo(t.size, self._role(t, freed_at), t.op, t.phase, t.stream)
            for t in self._storages
        )
        start = len(self._events) if self._start is None else self._start
        return StepTrace(
            storages, tuple(self._events), start, tuple(self._entered), tuple(self._left)
        )

    def _role(self, tracked: _Tracked, freed_at: dict[int, int]) -> Role:
        if tracked.role is not None:
            return tracked.role
        if tracked.forward is None:
            return "temporary"
        end = self._forward_ends.get(tracked.forward, len(self._events))
        outlives = freed_at.get(tracked.index, len(self._events)) >= end
        return "activations" if outlives else "temporary"

    def _see(
        self, tensor: Tensor, operation: _Operation, args: tuple[Any, ...], kwargs: Any
    ) -> None:
        storage = tensor.untyped_storage()
        tracked = self._find(storage)
        if tracked is None:
            self._bury()
            tracked = self._track(storage, operation.name)
            # A view of, or a write to, something made outside is no allocation of this step.
            if tracked is not None and operation.returns_inputs:
                inputs = _tensors((*args, *kwargs.values()))
                if any(each.untyped_storage()._cdata == tracked.address for each in inputs):
                    tracked.role, tracked.op = "inputs", ""
        else:
            self._follow_size(tracked, storage)

    def _leave_on_host(self, func: Any, out: Any) -> None:
        """Mark the storages of results that are not on the device there."""
        assert self._kernels is not None
        for number in self._kernels.on_host(func):
            out[number].untyped_storage()._peftlab_on_host = True

    def _hold(self, sizes: Iterable[int], op: str) -> None:
        """Blocks that an operation needed inside, and has given back."""
        held = []
        for size in map(self._rounded, sizes):
            tracked = _Tracked(0, len(self._storages), size, op, self._phase or "")
            tracked.role = "kernel"
            self._bury()
            self._storages.append(tracked)
            self._events.append((tracked.index, size))
            held.append(tracked)
        self._events += [(each.index, -each.size) for each in held]

    def _follow_size(self, tracked: _Tracked, storage: Any) -> None:
        if (size := self._rounded(storage.nbytes())) != tracked.size:
            self._events.append((tracked.index, size - tracked.size))
            tracked.size = size

    def _resized(self, storage: Any, before: int) -> None:
        """No operation tells that a storage was given back while its tensor stays, or came back."""
        if before and storage.nbytes():
            return
        self._bury()
        if (tracked := self._find(storage)) is not None:
            self._follow_size(tracked, storage)
        else:
            tracked = self._track(storage, "resize_")
        if tracked is not None and tracked.role in (None, "logits"):
            tracked.role = "gathered"

    def _find(self, storage: Any) -> _Tracked | None:
        tracked = self._live.get(storage._cdata)
        # The address may be that of one that died since the last allocation.
        return None if tracked is None or tracked.dead else tracked

    def _track(self, storage: Any, op: str) -> _Tracked | None:
        size = self._rounded(storage.nbytes())
        elsewhere = self._device is not None and storage.device.type != self._device
        if size == 0 or elsewhere or hasattr(storage, "_peftlab_on_host"):
            return None
        address: int = storage._cdata
        tracked = _Tracked(address, len(self._storages), size, op, self._phase or "")
        tracked.forward = self._in_forward
        tracked.stream = self._streams.setdefault(torch.cpu.current_stream(), len(self._streams))
        if self._logits_from is not None and self._phase == "forward":
            tracked.role = "logits"
        self._storages.append(tracked)
        self._live[address] = tracked
        storage._peftlab_witness = _Witness(tracked, self._dead)
        self._events.append((tracked.index, size))
        return tracked

    def _rounded(self, size: int) -> int:
        return -(-size // self._granularity) * self._granularity

    def _bury(self) -> None:
        """Record what died since the last allocation."""
        if not self._dead:
            return
        # In place: the witnesses hold this very list.
        dead = sorted(self._dead, key=_index)
        del self._dead[: len(dead)]
        for tracked in dead:
            self._events.append((tracked.index, -tracked.size))
            if self._live.get(tracked.address) is tracked:
                del self._live[tracked.address]

    def _follow_recomputation(self) -> None:
        # Backward runs without autograd except where checkpointing repeats a forward.
        if torch.is_grad_enabled() != (self._in_forward is not None):
            if self._in_forward is None:
                self._open_forward()
            else:
                self._bury()
                self._close_forward()

    def _open_forward(self) -> None:
        self._in_forward = self._forwards
        self._forwards += 1

    def _close_forward(self) -> None:
        if self._in_forward is not None:
            self._forward_ends[self._in_forward] = len(self._events)
            self._in_forward = None


_index = attrgetter("index")


def is_wrapper(types: Iterable[type]) -> bool:
    """Whether tensors of these types take an operation apart themselves, as a ``DTensor`` does.

    A mode then lets them, and sees the operations on what they hold.
    """
    return any(hasattr(each, "__tensor_flatten__") for each in types)


def _inside(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold storage: of a ``DTensor`` its local shard."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    held = [getattr(tensor, name) for name in names]
    return [inner for each in held if isinstance(each, Tensor) for inner in _inside(each)]


def _tensors(values: Any) -> Iterator[Tensor]:
    """Those among arguments or results, which nest in lists only."""
    for value in values if isinstance(values, (list, tuple)) else ():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
