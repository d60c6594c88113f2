"""Did it learn? What trains must have had gradients and moved; what is frozen must be untouched."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor, nn

from peftlab.errors import GuardError

MIN_STEPS = 4
"""Judged from this many steps on: a warm-up starts at rate 0, and a factor whose partner starts
at zero (LoRA's A) has its first gradient one update later."""


class LearningGuard:
    """Watches one training run by 128-bit hashes of the parameters' bytes."""

    def __init__(self, model: nn.Module) -> None:
        self._frozen = _fingerprints(model, trains=False)
        self._trained = _fingerprints(model, trains=True)
        self._without_gradient = set(self._trained)

    def observe(self, model: nn.Module) -> None:
        """Note which parameters have a gradient that is not zero; call before it is cleared."""
        if not self._without_gradient:
            return
        for name, parameter in model.named_parameters():
            self.observe_parameter(name, parameter)

    def observe_parameter(self, name: str, parameter: Tensor) -> None:
        """The same for one parameter, where gradients do not last until the end of the step."""
        if name in self._without_gradient and _has_gradient(parameter):
            self._without_gradient.discard(name)

    def state(self) -> list[str]:
        """The parameters not yet seen with a gradient, for a checkpoint."""
        return sorted(self._without_gradient)

    def restore(self, state: list[str], initial: Mapping[str, str]) -> None:
        """Take up the state and the first fingerprints of the run that is resumed."""
        self._without_gradient = set(state)
        self._trained = dict(initial)

    @property
    def initial(self) -> dict[str, str]:
        """The fingerprints of the trained parameters before the first step."""
        return dict(self._trained)

    def verify(self, model: nn.Module, steps: int) -> None:
        """Check the whole run.

        Raises:
            GuardError: with the names of all violations.
        """
        violations = []
        now_frozen = _fingerprints(model, trains=False)
        changed = [name for name, value in self._frozen.items() if now_frozen.get(name) != value]
        if changed:
            violations.append(f"frozen parameters changed: {_names(changed)}")
        if steps >= MIN_STEPS:
            now_trained = _fingerprints(model, trains=True)
            if self._without_gradient:
                still = sorted(self._without_gradient)
                violations.append(f"trainable parameters never had a gradient: {_names(still)}")
            still = [name for name, value in self._trained.items() if now_trained[name] == value]
            if still:
                violations.append(f"trainable parameters did not move: {_names(still)}")
        if violations:
            raise GuardError("; ".join(violations) + ".")


def _has_gradient(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.count_nonzero())


def fingerprint(tensor: Tensor) -> str:
    """A 128-bit hash of a tensor's bytes (XXH3)."""
    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return str(xxhash.xxh3_128_hexdigest(flat.numpy().data))


def _fingerprints(model: nn.Module, trains: bool) -> dict[str, str]:
    return {
        name: fingerprint(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad == trains
    }


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
