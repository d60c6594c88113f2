"""From the trace of a simulated step to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from torch import Tensor

from peftlab.assemble import too_long
from peftlab.errors import IncompatibleError
from peftlab.memory.allocator import cublas_workspaces, replay_allocator
from peftlab.memory.cards import CPU_PROCESS_BYTES, CUDA_CONTEXT_BYTES
from peftlab.memory.trace import StepTrace
from peftlab.planning.schema import Plan, PlannedMemory, TimelinePoint
from peftlab.planning.simulate import PlanRequest, simulate
from peftlab.results.record import PhaseMarks

TIMELINE_POINTS = 160


def answer(request: PlanRequest, batches: Sequence[Mapping[str, Tensor]] | None = None) -> Plan:
    """Plan one optimizer step.

    Args:
        batches: collated micro-batches; by default made from ``request.lengths``.

    Raises:
        IncompatibleError: the method cannot be put on this model, or cannot be planned.
    """
    try:
        simulation = simulate(request, batches)
    except IncompatibleError as error:
        positions = getattr(request.config.get_text_config(), "max_position_embeddings", None)
        longest = max(request.lengths)
        change = "--seq-len", "--seq-len {}"
        if problems := too_long(longest, positions, request.method, *change):
            raise IncompatibleError(problems) from error
        raise
    trace, breakdown = simulation.trace, simulation.trace.breakdown()
    reserved = breakdown.peak_bytes
    workspaces: tuple[int, ...] = ()
    if request.device == "cuda":
        workspaces = cublas_workspaces(request.chip.capability)
        replayed = replay_allocator(trace, workspaces)
        moment, _, peak = replayed.trace.peak()
        breakdown = trace.of_tensors().breakdown(moment).raised_to(peak)
        trace, reserved = replayed.trace, replayed.reserved_bytes
    context = CUDA_CONTEXT_BYTES if request.device == "cuda" else CPU_PROCESS_BYTES
    shapes = [tuple(batch["input_ids"].shape) for batch in batches or () if "input_ids" in batch]
    rows, tokens = max(shapes) if shapes else request.kind.batch_shape(request.lengths)
    return Plan(
        params=simulation.params,
        memory=PlannedMemory(**breakdown.model_dump(exclude={"peak_moment"})),
        peak_moment=breakdown.peak_moment,
        marks=PhaseMarks(**asdict(trace.marks())),
        timeline=_timeline(trace),
        saved_bytes=simulation.saved_bytes,
        flops_per_step=simulation.flops,
        device=request.device,
        batch_shape=(rows, tokens),
        gradient_accumulation_steps=len(batches)
        if batches
        else request.train.gradient_accumulation_steps,
        num_processes=request.num_processes,
        sharding=request.sharding,
        gathered_bytes=_gathered(simulation.trace) if request.sharding != "none" else 0,
        gradient_checkpointing=request.train.gradient_checkpointing,
        reserved_bytes=reserved,
        workspace_bytes=sum(workspaces),
        context_bytes=context,
        needed_bytes=reserved + context,
        notes=simulation.notes,
    )


def _gathered(trace: StepTrace) -> int:
    """Bytes of gathered parameters at the peak."""
    _, at, _ = trace.peak()
    alive = trace.alive(at).items()
    return sum(size for index, size in alive if trace.storages[index].role == "gathered")


def _timeline(trace: StepTrace) -> tuple[TimelinePoint, ...]:
    live = trace.live_bytes()
    width = max(1, (len(live) - trace.start) // TIMELINE_POINTS)
    points = []
    for phase, begin, end in trace.spans():
        for start in range(begin, end + 1, width):
            stretch = live[start : min(start + width, end + 1)]
            points.append(TimelinePoint(phase=phase, live_bytes=max(stretch)))
    return tuple(points)
