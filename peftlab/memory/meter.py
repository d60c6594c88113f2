"""Measurement of one real optimizer step: its memory by part and its arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor, nn

from peftlab.memory.breakdown import Breakdown
from peftlab.memory.cards import Chip
from peftlab.memory.timeline import CUDA_GRANULARITY, Timeline
from peftlab.memory.trace import PHASES, StepMarks, StepTrace


@dataclass(frozen=True)
class StepMeasurement:
    """What one optimizer step took.

    Args:
        breakdown: the peak of live bytes by part.
        marks: live bytes at the ends and peaks of the phases.
        flops: floating-point operations of matrix products, convolutions and attention, a
            multiply-add counted as two; recomputation by checkpointing included.
        source: how it was measured, for ``Memory.source``.
        reserved_bytes: the allocator's high-water mark of reserved memory; None on CPU.
    """

    breakdown: Breakdown
    marks: StepMarks
    flops: int
    source: str
    reserved_bytes: int | None = None


class StepMeter(Protocol):
    """What a training step reports its progress to.

    One ``step``, in it any number of ``forward`` and ``backward`` phases, one pair a micro-batch,
    then ``optimizer``.
    """

    def step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any = ()
    ) -> AbstractContextManager[None]:
        """Around a whole optimizer step; ``inputs`` are its batches, any nesting of tensors."""
        ...

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Around a part of the step."""
        ...

    def result(self) -> StepMeasurement | None:
        """The last step's measurement; None if it was not measured."""
        ...


class NullMeter:
    """Measures nothing and costs nothing."""

    def step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any = ()
    ) -> AbstractContextManager[None]:
        return nullcontext()

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def result(self) -> None:
        return None


class TimelineMeter:
    """Measures by accounting for every storage the step allocates and drops.

    Args:
        granularity: bytes to which sizes are rounded up.
        timeline: one that is running already and sees more than this step; by default each step
            has its own.
        buckets: what gradients are averaged in between processes, counted with them.
    """

    source = "storages live during the step, exact sizes"

    def __init__(
        self,
        granularity: int = 1,
        timeline: Timeline | None = None,
        buckets: Sequence[Tensor] = (),
    ) -> None:
        self._own = partial(Timeline, granularity)
        self._buckets = buckets
        self._running = timeline
        self._timeline: Timeline | None = None
        self._model: nn.Module | None = None
        self._trace: StepTrace | None = None
        self._flops = 0

    @contextmanager
    def step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any = ()
    ) -> Iterator[None]:
        self._trace = None
        with ExitStack() as stack:
            timeline = self._running or stack.enter_context(self._own())
            timeline.adopt(model.parameters(), "weights")
            timeline.adopt(model.buffers(), "weights")
            timeline.adopt(_quantization_statistics(model), "weights")
            timeline.adopt(_gradients(model), "gradients")
            timeline.adopt(self._buckets, "gradients")
            timeline.adopt(state_tensors(optimizer), "optimizer")
            timeline.adopt(_tensors(inputs), "inputs")
            stack.callback(_watch_logits(model, timeline))
            stack.callback(self._close)
            self._timeline, self._model = timeline, model
            # Else this frame would hold the batches until the step ends.
            del inputs
            timeline.begin()
            yield
            timeline.adopt(state_tensors(optimizer), "optimizer")
            self._trace, self._flops = timeline.trace(), timeline.flops

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._timeline is None or self._model is None:
            raise RuntimeError("a phase outside of a step")
        with self._timeline.phase(name):
            yield
            self._timeline.adopt(_gradients(self._model), "gradients")

    def _close(self) -> None:
        self._timeline = self._model = None

    @property
    def trace(self) -> StepTrace:
        """The last step in full."""
        if self._trace is None:
            raise RuntimeError("no step was measured to its end")
        return self._trace

    def result(self) -> StepMeasurement:
        return StepMeasurement(self.trace.breakdown(), self.trace.marks(), self._flops, self.source)


class CudaMeter(TimelineMeter):
    """Measures by CUDA's caching allocator; the timeline tells the parts.

    What the allocator counts above the timeline (workspaces inside kernels, slack of large blocks)
    is temporary. Backward runs in the calling thread, else the timeline would not see it.
    """

    source = "torch.cuda allocator, parts by live storages"

    def __init__(self, device: torch.device) -> None:
        super().__init__(CUDA_GRANULARITY)
        self._own = partial(Timeline, CUDA_GRANULARITY, device=device.type)
        self._device = device
        self._start_bytes = 0
        self._reserved_bytes = 0
        self._ends: dict[str, int] = {}
        self._peaks: dict[str, int] = {}

    @contextmanager
    def step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any = ()
    ) -> Iterator[None]:
        self._ends, self._peaks = {}, {}
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._start_bytes = torch.cuda.memory_allocated(self._device)
        with (
            torch.autograd.set_multithreading_enabled(False),
            super().step(model, optimizer, inputs),
        ):
            del inputs
            yield
        self._reserved_bytes = torch.cuda.max_memory_reserved(self._device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        # The high-water mark of reserved memory is reset too, but never falls while blocks stay.
        torch.cuda.reset_peak_memory_stats(self._device)
        with super().phase(name):
            yield
        self._ends[name] = torch.cuda.memory_allocated(self._device)
        peak = torch.cuda.max_memory_allocated(self._device)
        self._peaks[name] = max(peak, self._peaks.get(name, 0))

    def result(self) -> StepMeasurement:
        peaks = {phase: self._peaks.get(phase, self._start_bytes) for phase in PHASES}
        ends = {phase: self._ends.get(phase, self._start_bytes) for phase in PHASES}
        moment = max(PHASES, key=peaks.__getitem__)
        breakdown = self.trace.breakdown(moment).raised_to(peaks[moment])
        marks = StepMarks(
            start_bytes=self._start_bytes,
            forward_end_bytes=ends["forward"],
            forward_peak_bytes=peaks["forward"],
            backward_end_bytes=ends["backward"],
            backward_peak_bytes=peaks["backward"],
            optimizer_end_bytes=ends["optimizer"],
            optimizer_peak_bytes=peaks["optimizer"],
        )
        return StepMeasurement(breakdown, marks, self._flops, self.source, self._reserved_bytes)


def step_meter(device: torch.device | str) -> StepMeter:
    """The meter for training on ``device``: allocator counters on CUDA, a timeline elsewhere."""
    device = torch.device(device)
    return CudaMeter(device) if device.type == "cuda" else TimelineMeter()


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor of the optimizer's state, also those inside objects of its own."""
    return list(_tensors(dict(optimizer.state)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def _quantization_statistics(model: nn.Module) -> Iterator[Tensor]:
    """What bitsandbytes keeps beside packed weights: scales and their codes."""
    for parameter in model.parameters():
        yield from _tensors([getattr(parameter, key, None) for key in ("quant_state", "SCB")])
    for module in model.modules():
        yield from _tensors(getattr(getattr(module, "state", None), "SCB", None))


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def _watch_logits(model: nn.Module, timeline: Timeline) -> Callable[[], None]:
    """Tell the timeline where logits begin: at the output head, or in the model's output.

    A head that returns the loss itself made it before anything else.
    """

    def made(logits: Tensor) -> None:
        if not torch.is_grad_enabled():
            return  # A look at the model on the side, no part of the step.
        timeline.logits_made(logits)
        if logits.requires_grad:
            hooked: Any = logits
            hooked.register_hook(lambda gradient: timeline.logits_differentiated())

    def after_head(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            made(output)

    def after_model(module: nn.Module, args: Any, output: Any) -> None:
        for name, value in output.items() if isinstance(output, Mapping) else ():
            if name.endswith("logits") and isinstance(value, Tensor):
                made(value)

    handles = [model.register_forward_hook(after_model)]
    find_head = getattr(model, "get_output_embeddings", None)
    if find_head is not None and (head := find_head()) is not None:
        handles.append(head.register_forward_hook(after_head))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def chip_here() -> Chip:
    """That of the current CUDA device."""
    properties = torch.cuda.get_device_properties()
    return Chip(
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.max_threads_per_multi_processor,
    )


def available_bytes(device: torch.device) -> int:
    """What is free: on the card, or of the machine's memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def process_peak_bytes() -> int:
    """The most memory this process ever held resident (Linux: ``VmHWM``)."""
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
