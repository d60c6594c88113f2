"""What an experiment will need: the answer of ``peftlab plan``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from peftlab.config import Config
from peftlab.memory.allocator import reserved_bytes
from peftlab.memory.cards import CPU_PROCESS_BYTES, CUDA_CONTEXT_BYTES
from peftlab.memory.trace import StepTrace
from peftlab.plan.simulate import Device, PlanRequest, simulate
from peftlab.results.record import ParameterCounts, PhaseMarks

TIMELINE_POINTS = 400


class PlannedMemory(Config):
    """Live bytes at the peak of a step, by part; they sum to ``peak_bytes``."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    temporary_bytes: int
    peak_bytes: int


class TimelinePoint(Config):
    """The most that is live within a stretch of operations."""

    phase: str
    live_bytes: int


class Suggestion(Config):
    """A change under which it fits, and what it then needs.

    Args:
        overrides: as ``--set`` takes them.
    """

    text: str
    overrides: dict[str, Any]
    needed_bytes: int


class Plan(Config):
    """One optimizer step, planned.

    Args:
        peak_moment: "forward", "backward" or "optimizer".
        marks: live bytes at the ends and peaks of the phases.
        timeline: live bytes over the step, for a picture.
        reserved_bytes: what the allocator holds for that; equal to the peak on CPU.
        context_bytes: an allowance for the process beside its tensors (``memory.cards``).
        needed_bytes: reserved and context together.
        memory_bytes: what there is, if it was asked for.
        fits: None if no memory was given.
        suggestions: what would make it fit, least harm first.
        saved_bytes: of the adapter's tensors.
    """

    params: ParameterCounts
    memory: PlannedMemory
    peak_moment: str
    marks: PhaseMarks
    timeline: tuple[TimelinePoint, ...]
    saved_bytes: int
    flops_per_step: int
    device: Device
    batch_shape: tuple[int, int]
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    reserved_bytes: int
    context_bytes: int
    needed_bytes: int
    memory_bytes: int | None = None
    fits: bool | None = None
    suggestions: tuple[Suggestion, ...] = ()
    notes: tuple[str, ...] = ()


def answer(request: PlanRequest, batches: Sequence[Mapping[str, Tensor]] | None = None) -> Plan:
    """Plan one optimizer step.

    Args:
        batches: collated micro-batches; by default made from ``request.lengths``.

    Raises:
        IncompatibleError: the method cannot be put on this model, or cannot be planned.
    """
    simulation = simulate(request, batches)
    breakdown = simulation.trace.breakdown()
    reserved = breakdown.peak_bytes
    if request.device == "cuda":
        reserved = max(reserved, reserved_bytes(simulation.trace))
    context = CUDA_CONTEXT_BYTES if request.device == "cuda" else CPU_PROCESS_BYTES
    shapes = [tuple(batch["input_ids"].shape) for batch in batches or () if "input_ids" in batch]
    rows, tokens = max(shapes) if shapes else (len(request.lengths), max(request.lengths))
    return Plan(
        params=simulation.params,
        memory=PlannedMemory(**breakdown.model_dump(exclude={"peak_moment"})),
        peak_moment=breakdown.peak_moment,
        marks=PhaseMarks(**asdict(simulation.trace.marks())),
        timeline=_timeline(simulation.trace),
        saved_bytes=simulation.saved_bytes,
        flops_per_step=simulation.flops,
        device=request.device,
        batch_shape=(rows, tokens),
        gradient_accumulation_steps=len(batches)
        if batches
        else request.gradient_accumulation_steps,
        gradient_checkpointing=request.gradient_checkpointing,
        reserved_bytes=reserved,
        context_bytes=context,
        needed_bytes=reserved + context,
        notes=simulation.notes,
    )


def _timeline(trace: StepTrace) -> tuple[TimelinePoint, ...]:
    live = trace.live_bytes()
    width = max(1, (len(live) - trace.start) // TIMELINE_POINTS)
    points = []
    for phase, begin, end in trace.spans():
        for start in range(begin, end + 1, width):
            stretch = live[start : min(start + width, end + 1)]
            points.append(TimelinePoint(phase=phase, live_bytes=max(stretch)))
    return tuple(points)
