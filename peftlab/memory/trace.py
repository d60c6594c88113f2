"""What was live when, over one optimizer step: the one list every figure is read from. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from peftlab.memory.breakdown import Breakdown

Phase = Literal["forward", "backward", "optimizer"]
Role = Literal[
    "weights", "gathered", "gradients", "optimizer", "inputs", "activations", "logits", "temporary",
    "kernel",
]  # fmt: skip
PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")
_PARTS: dict[str, str] = {role: f"{role}_bytes" for role in ("weights", "gradients", "optimizer")}
_PARTS |= {"activations": "activations_bytes", "inputs": "activations_bytes"}
_PARTS |= {"logits": "logits_bytes", "temporary": "temporary_bytes", "gathered": "temporary_bytes"}
_PARTS |= {"kernel": "temporary_bytes"}


@dataclass(frozen=True, slots=True)
class StorageInfo:
    """One storage. ``op`` is the operation that returned it, empty if it was there before.

    ``stream`` numbers the streams that storages were allocated on; 0 is the default one.
    """

    size: int
    role: Role
    op: str = ""
    phase: str = ""
    stream: int = 0


@dataclass(frozen=True, slots=True)
class StepMarks:
    """Live bytes at the marks of one optimizer step.

    With several micro-batches the ends are those of the last one, the peaks the highest of all.
    """

    start_bytes: int
    forward_end_bytes: int
    forward_peak_bytes: int
    backward_end_bytes: int
    backward_peak_bytes: int
    optimizer_end_bytes: int
    optimizer_peak_bytes: int


@dataclass(frozen=True)
class StepTrace:
    """The life of every storage over one optimizer step, in the order it happened.

    Args:
        storages: by index.
        events: ``(storage index, change in bytes)``; positive where it appears or grows.
        start: how many events came before the step (what was adopted).
        entered: ``(phase, event index)`` each time a phase begins.
        left: ``(phase, event index)`` each time a phase ends.
    """

    storages: tuple[StorageInfo, ...]
    events: tuple[tuple[int, int], ...]
    start: int
    entered: tuple[tuple[Phase, int], ...]
    left: tuple[tuple[Phase, int], ...]

    def live_bytes(self) -> list[int]:
        """Bytes live after each number of events; entry 0 is before the first."""
        return list(accumulate((change for _, change in self.events), initial=0))

    def spans(self) -> Iterator[tuple[Phase, int, int]]:
        """The stretches of the step: phase, first and last number of events."""
        # Work between two phases belongs to the earlier one: it still holds what that one made.
        ends = [*(begin for _, begin in self.entered[1:]), len(self.events)]
        for index, ((phase, begin), end) in enumerate(zip(self.entered, ends, strict=True)):
            yield phase, begin if index else self.start, end

    def peak(self, within: Phase | None = None) -> tuple[Phase, int, int]:
        """The phase of the peak, how many events lead to it, and the bytes then live.

        Args:
            within: look at this phase only.
        """
        live = self.live_bytes()
        best: tuple[Phase, int, int] | None = None
        for phase, begin, end in self.spans():
            at = max(range(begin, end + 1), key=live.__getitem__)
            if within in (None, phase) and (best is None or live[at] > best[2]):
                best = phase, at, live[at]
        if best is None:
            raise ValueError("a step without phases has no peak")
        return best

    def marks(self) -> StepMarks:
        """Live bytes at the ends and peaks of the phases."""
        live = self.live_bytes()
        peaks = dict.fromkeys(PHASES, live[self.start])
        for phase, begin, end in self.spans():
            peaks[phase] = max(peaks[phase], *live[begin : end + 1])
        ends = dict.fromkeys(PHASES, live[self.start]) | {
            phase: live[at] for phase, at in self.left
        }
        return StepMarks(
            start_bytes=live[self.start],
            forward_end_bytes=ends["forward"],
            forward_peak_bytes=peaks["forward"],
            backward_end_bytes=ends["backward"],
            backward_peak_bytes=peaks["backward"],
            optimizer_end_bytes=ends["optimizer"],
            optimizer_peak_bytes=peaks["optimizer"],
        )

    def where(self, stays: Callable[[StorageInfo], bool]) -> StepTrace:
        """The same with the events of some storages only."""
        kept = [stays(self.storages[index]) for index, _ in self.events]
        before = list(accumulate(kept, initial=0))
        return replace(
            self,
            events=tuple(event for event, keep in zip(self.events, kept, strict=True) if keep),
            start=before[self.start],
            entered=tuple((phase, before[at]) for phase, at in self.entered),
            left=tuple((phase, before[at]) for phase, at in self.left),
        )

    def of_tensors(self) -> StepTrace:
        """The same without the blocks that kernels held inside, which no tensor shows."""
        return self.where(lambda storage: storage.role != "kernel")

    def alive(self, at: int) -> dict[int, int]:
        """Bytes of each storage live after ``at`` events, by index."""
        sizes: dict[int, int] = {}
        for index, change in self.events[:at]:
            sizes[index] = sizes.get(index, 0) + change
        return {index: size for index, size in sizes.items() if size}

    def breakdown(self, within: Phase | None = None) -> Breakdown:
        """The parts of what is live at the peak, of the step or of one phase."""
        phase, at, peak = self.peak(within)
        parts = dict.fromkeys(_PARTS.values(), 0)
        for index, size in self.alive(at).items():
            parts[_PARTS[self.storages[index].role]] += size
        return Breakdown(**parts, peak_bytes=peak, peak_moment=phase)
