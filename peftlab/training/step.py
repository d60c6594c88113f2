"""One optimizer step: the same code for a real run and for a planned one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from peftlab.errors import DivergedError

Batch = Mapping[str, Tensor]
LossFunction = Callable[[nn.Module, Batch], Tensor]


class Backend(Protocol):
    """The part of ``accelerate.Accelerator`` that a step needs."""

    @property
    def num_processes(self) -> int: ...
    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]: ...
    def autocast(self) -> AbstractContextManager[Any]: ...
    def backward(self, loss: Tensor) -> None: ...
    def clip_grad_norm_(self, parameters: Sequence[Tensor], max_norm: float) -> Tensor | None: ...


class PhaseMeter(Protocol):
    """Told which phase of a step is running: forward, backward or optimizer."""

    def phase(self, name: str) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True)
class MicroBatch:
    """A collated batch; ``weight`` is 0 for one that only keeps the processes in step."""

    inputs: Batch
    weight: float = 1.0


@dataclass(frozen=True)
class StepResult:
    """Mean loss over the step's terms on this process's share, and the norm before clipping."""

    loss: Tensor
    grad_norm: Tensor | None


def optimizer_step(
    model: nn.Module,
    batches: Sequence[MicroBatch],
    loss_function: LossFunction,
    optimizer: Optimizer,
    *,
    num_items: int,
    parameters: Sequence[Tensor],
    backend: Backend,
    max_grad_norm: float | None,
    meter: PhaseMeter,
) -> StepResult:
    """Forward and backward over the micro-batches, clip, update. Gradients are left in place.

    Args:
        model: as the backend prepared it.
        loss_function: the SUM of a batch's loss terms.
        num_items: loss terms of the whole step over all micro-batches and processes, so that
            neither accumulation nor the number of processes changes the gradient.
        parameters: those that train.
        max_grad_norm: of the global norm; None does not clip.
    """
    total = torch.zeros((), device=parameters[0].device)
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with nullcontext() if last else backend.no_sync(model):
            with meter.phase("forward"), backend.autocast():
                # Data-parallel training averages gradients; the factor turns that into a sum.
                scale = batch.weight * backend.num_processes / num_items
                loss = loss_function(model, batch.inputs) * scale
                total += loss.detach() / backend.num_processes
            with meter.phase("backward"):
                backend.backward(loss)
        del loss
    with meter.phase("optimizer"):
        grad_norm = None
        if max_grad_norm is None:
            optimizer.step()
        else:
            grad_norm = _clip_and_update(optimizer, parameters, max_grad_norm, backend)
    return StepResult(total, grad_norm)


def finite(loss: Tensor, step: int) -> float:
    """The loss of a step as a number.

    Raises:
        DivergedError: it is none.
    """
    value = float(loss)
    if not math.isfinite(value):
        raise DivergedError(
            f"the loss is {value} at step {step}. "
            "Try a smaller optim.learning_rate or a longer warm-up."
        )
    return value


def _clip_and_update(
    optimizer: Optimizer, parameters: Sequence[Tensor], max_norm: float, backend: Backend
) -> Tensor | None:
    """Update with gradients of at most this global norm; the norm that they had.

    A fused kernel scales the gradients while it updates, so that they are passed over once less.
    """
    wrapped: Any = getattr(optimizer, "optimizer", optimizer)
    # Fused kernels read a divisor of the gradients, for a GradScaler; with one it is taken.
    takes_divisor = getattr(wrapped, "_step_supports_amp_scaling", False)
    if not takes_divisor or getattr(optimizer, "scaler", None) is not None:
        norm = backend.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        return norm
    norm = _total_norm([p.grad for p in parameters if p.grad is not None])
    wrapped.grad_scale = ((norm.float() + 1e-6) / max_norm).clamp(min=1.0)
    try:
        # Accelerate's own step would only look twice for a package on the disk.
        wrapped.step()
    finally:
        del wrapped.grad_scale
    return norm


def _total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all elements together."""
    if not gradients or not all(map(_has_quick_product, gradients)):
        return torch.nn.utils.get_total_norm(gradients)
    flat = [gradient.view(-1) for gradient in gradients]
    return torch.stack([torch.dot(one, one) for one in flat]).sum().sqrt_()


def _has_quick_product(gradient: Tensor) -> bool:
    """Whether BLAS multiplies it with itself: up to three times faster than torch takes a norm."""
    # Not a shard, which has elements elsewhere.
    plain = type(gradient) in (Tensor, FakeTensor) and gradient.device.type == "cpu"
    # In half precision the product would be rounded, and overflow.
    return plain and gradient.is_contiguous() and gradient.dtype in (torch.float32, torch.float64)


def _has_no_product(gradient: Tensor) -> bool:
    return False


@contextmanager
def cuda_norm() -> Iterator[None]:
    """Inside, tensors on the CPU stand for some on CUDA, where torch's norm is one kernel."""
    with mock.patch(f"{__name__}._has_quick_product", _has_no_product):
        yield
