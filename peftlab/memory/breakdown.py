"""The parts of a run's memory: the same names for what was planned and what was measured."""

from __future__ import annotations

from typing import Self

from peftlab.config import Config


class Breakdown(Config):
    """Bytes live at the peak of an optimizer step, by part.

    The parts are disjoint and sum to ``peak_bytes``.

    Args:
        weights_bytes: parameters and buffers, frozen and trained, adapter included.
        gradients_bytes: ``.grad`` of the parameters.
        optimizer_bytes: optimizer state, quantisation constants included.
        activations_bytes: what forward keeps for backward, and hidden states still referenced.
        logits_bytes: the model's logits, their copies and the loss.
        temporary_bytes: everything else: what an operation makes and drops again.
        peak_bytes: the sum, at the moment of the peak.
        peak_moment: "forward", "backward" or "optimizer".
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    temporary_bytes: int
    peak_bytes: int
    peak_moment: str

    def raised_to(self, peak_bytes: int) -> Self:
        """The same of a peak that an allocator counts, where what no tensor needs is temporary."""
        unseen = peak_bytes - self.peak_bytes
        return self.model_copy(
            update={"temporary_bytes": self.temporary_bytes + unseen, "peak_bytes": peak_bytes}
        )
