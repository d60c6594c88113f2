"""Every storage that lives during an optimizer step, for real tensors and for fake ones alike.

Memory inside an operation (a kernel's workspace) is not seen, nor are reads or writes: a storage
counts from the operation that returns it until its last reference is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftlab.memory.flops import operation_flops
from peftlab.memory.trace import PHASES, Phase, Role, StepTrace, StorageInfo

CUDA_GRANULARITY = 512
"""CUDA rounds to this many bytes (c10/cuda/CUDACachingAllocator.cpp, ``kMinBlockSize``)."""

_untyped: Any = torch.UntypedStorage
_expired: Callable[[int], bool] = _untyped._expired
_free_weak_ref: Callable[[int], None] = _untyped._free_weak_ref
_DEVICE = torch.ops.prim.device.default
_PINNED: tuple[Role, ...] = ("weights", "optimizer")


class _Tracked:
    """A storage under observation; holds a weak reference to it until closed."""

    __slots__ = ("address", "forward", "index", "op", "phase", "role", "size")

    def __init__(self, address: int, index: int, size: int, op: str, phase: str) -> None:
        self.address, self.index, self.size = address, index, size
        self.op, self.phase = op, phase
        self.role: Role | None = None
        self.forward: int | None = None


class Timeline(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which storages are live, operation by operation.

    Frees are found by polling weak references before every allocation: the reference keeps a
    storage's address from being reused, never its data, so that no callback runs inside the
    allocator and events are in exact order. Nothing is kept alive.

    Args:
        granularity: sizes are rounded up to a multiple of this many bytes; 1 on CPU.
    """

    def __init__(self, granularity: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self._granularity = granularity
        self._storages: list[_Tracked] = []
        self._live: dict[int, _Tracked] = {}
        self._mortal: dict[int, None] = {}
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

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for tracked in self._live.values():
            _free_weak_ref(tracked.address)
        self._live.clear()
        self._mortal.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is _DEVICE:
            return out
        self.flops += operation_flops(func, args, kwargs or {}, out)
        if self._inside and self._phase == "backward":
            self._follow_recomputation()
        outputs = (out,) if isinstance(out, Tensor) else tree_leaves(out)
        for tensor in outputs:
            if isinstance(tensor, Tensor):
                self._see(tensor, func, args, kwargs)
        return out

    def adopt(self, tensors: Iterable[Tensor], role: Role) -> None:
        """Give storages a role; those not seen so far are counted from now on."""
        for tensor in tensors:
            if (tracked := self._live.get(tensor.untyped_storage()._cdata)) is None:
                tracked = self._track(tensor.untyped_storage(), "")
            if tracked is not None:
                tracked.role = role
                if role in _PINNED:
                    self._mortal.pop(tracked.address, None)

    def begin(self) -> None:
        """What is live was there before the step; the step starts here."""
        self._poll(everything=True)
        self._start = len(self._events)
        self._entered, self._left, self._phase, self.flops = [], [], None, 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the step. Phases may repeat, one pair a micro-batch, but never overlap."""
        if self._start is None or self._inside:
            raise RuntimeError("a phase needs a step that began, and cannot hold another phase")
        if name not in PHASES:
            raise ValueError(f"no phase {name!r}")
        self._poll()
        self._phase, self._inside = name, True
        self._entered.append((name, len(self._events)))
        if name == "forward":
            self._open_forward()
        elif name == "backward":
            self._backward_from = len(self._storages)
        try:
            yield
        finally:
            self._poll(everything=True)
            self._left.append((name, len(self._events)))
            self._close_forward()
            self._inside = False
            self._logits_from = None if name == "forward" else self._logits_from

    def logits_made(self, logits: Tensor) -> None:
        """From this tensor to the end of forward, what is allocated is logits, copies and loss."""
        tracked = self._live.get(logits.untyped_storage()._cdata)
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
        self._poll(everything=True)
        freed_at = {}
        for position, (index, change) in enumerate(self._events):
            if change < 0:
                freed_at[index] = position
        storages = tuple(
            StorageInfo(t.size, self._role(t, freed_at), t.op, t.phase) for t in self._storages
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

    def _see(self, tensor: Tensor, func: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        storage = tensor.untyped_storage()
        tracked = self._live.get(storage._cdata)
        if tracked is None:
            self._poll()
            tracked = self._track(storage, str(func))
            # A view of, or a write to, something made outside is no allocation of this step.
            if tracked is not None and any(
                isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata == tracked.address
                for leaf in tree_leaves((args, kwargs))
            ):
                tracked.role, tracked.op = "inputs", ""
        elif (size := self._rounded(storage.nbytes())) != tracked.size:
            self._events.append((tracked.index, size - tracked.size))
            tracked.size = size

    def _track(self, storage: Any, op: str) -> _Tracked | None:
        size = self._rounded(storage.nbytes())
        if size == 0:
            return None
        address: int = storage._weak_ref()
        tracked = _Tracked(address, len(self._storages), size, op, self._phase or "")
        tracked.forward = self._in_forward
        if self._logits_from is not None and self._phase == "forward":
            tracked.role = "logits"
        self._storages.append(tracked)
        self._live[address] = tracked
        self._mortal[address] = None
        self._events.append((tracked.index, size))
        return tracked

    def _rounded(self, size: int) -> int:
        return -(-size // self._granularity) * self._granularity

    def _poll(self, everything: bool = False) -> None:
        watched: Iterable[int] = self._live if everything else self._mortal
        for address in [address for address in watched if _expired(address)]:
            tracked = self._live.pop(address)
            self._mortal.pop(address, None)
            _free_weak_ref(address)
            self._events.append((tracked.index, -tracked.size))

    def _follow_recomputation(self) -> None:
        # Backward runs without autograd except where checkpointing repeats a forward.
        if torch.is_grad_enabled() != (self._in_forward is not None):
            if self._in_forward is None:
                self._open_forward()
            else:
                self._poll()
                self._close_forward()

    def _open_forward(self) -> None:
        self._in_forward = self._forwards
        self._forwards += 1

    def _close_forward(self) -> None:
        if self._in_forward is not None:
            self._forward_ends[self._in_forward] = len(self._events)
            self._in_forward = None
