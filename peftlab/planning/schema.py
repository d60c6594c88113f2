"""A plan, as it is printed and stored. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from peftlab.config import Config
from peftlab.results.record import ParameterCounts, PhaseMarks

Device = Literal["cpu", "cuda"]
Sharding = Literal["none", "fsdp"]


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

    def settings(self) -> list[tuple[str, str]]:
        """The overrides as YAML writes them."""
        return [(key, str(value).lower()) for key, value in self.overrides.items()]


class AverageStep(Config):
    """A step of the first epoch on average, of one process.

    Args:
        padded_tokens: of a step, padding included; ``padding_share`` of them are padding.
        flops: scaled from the planned step by padded tokens.
    """

    steps_per_epoch: int
    padded_tokens: float
    padding_share: float
    flops: float


class Plan(Config):
    """One optimizer step, planned.

    Args:
        peak_moment: "forward", "backward" or "optimizer".
        marks: live bytes at the ends and peaks of the phases.
        timeline: live bytes over the step, for a picture.
        reserved_bytes: what the allocator holds for that; equal to the peak on CPU.
        workspace_bytes: an allowance for cuBLAS within ``reserved_bytes`` (``memory.allocator``).
        context_bytes: an allowance for the process beside its tensors (``memory.cards``).
        needed_bytes: reserved and context together.
        num_processes: that train data-parallel; everything here is of one of them.
        sharding: of parameters, gradients and optimizer state over the processes.
        gathered_bytes: of ``memory.temporary_bytes``, whole parameters put together from shards.
        average: None where all examples are taken to be of one length.
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
    gradient_checkpointing: bool | Literal["selective"]
    reserved_bytes: int
    workspace_bytes: int = 0
    context_bytes: int
    needed_bytes: int
    num_processes: int = 1
    sharding: Sharding = "none"
    gathered_bytes: int = 0
    average: AverageStep | None = None
    memory_bytes: int | None = None
    fits: bool | None = None
    suggestions: tuple[Suggestion, ...] = ()
    notes: tuple[str, ...] = ()
