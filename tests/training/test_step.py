"""Clipping inside the update equals clipping before it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.nn import functional

from peftlab.memory.meter import NullMeter
from peftlab.optim.table import OPTIMIZERS
from peftlab.training.step import MicroBatch, _total_norm, cuda_norm, optimizer_step
from tests.optim.conftest import make_optimizer


class CountingAccelerator(Accelerator):  # type: ignore[misc]
    """Counts how often it was asked to clip."""

    clipped = 0

    def clip_grad_norm_(self, parameters: Any, max_norm: Any, norm_type: Any = 2) -> Any:
        self.clipped += 1
        return super().clip_grad_norm_(parameters, max_norm, norm_type)


@pytest.fixture
def accelerator() -> Iterator[CountingAccelerator]:
    AcceleratorState._reset_state()
    GradientState._reset_state()
    yield CountingAccelerator(cpu=True)
    AcceleratorState._reset_state()
    GradientState._reset_state()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    # Large enough for an 8-bit state, with a layer that gets no gradient.
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3), nn.Linear(2, 2))


def loss(model: Any, batch: Any) -> Tensor:
    return functional.cross_entropy(model[:3](batch["x"]), batch["y"], reduction="sum")


def batches() -> list[MicroBatch]:
    torch.manual_seed(1)
    return [
        MicroBatch({"x": 9 * torch.randn(4, 64), "y": torch.randint(3, (4,))}) for _ in range(2)
    ]


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, micros: Sequence[MicroBatch], limit: float
) -> Tensor:
    for micro in micros:
        (loss(model, micro.inputs) / 8).backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    optimizer.step()
    return norm


@pytest.mark.parametrize("limit", [0.05, 1e6], ids=["clips", "does-not-clip"])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_equal_to_clip_grad_norm(name: str, limit: float, accelerator: CountingAccelerator) -> None:
    ours, plain = network(), network()
    optimizer = make_optimizer(name, ours, learning_rate=1e-2)
    fused = "fused" in OPTIMIZERS[name].extra
    prepared: Any = accelerator.prepare_optimizer(optimizer)
    reference = make_optimizer(name, plain, learning_rate=1e-2)
    for _ in range(3):
        result = optimizer_step(
            ours,
            batches(),
            loss,
            prepared,
            num_items=8,
            parameters=list(ours.parameters()),
            backend=accelerator,
            max_grad_norm=limit,
            meter=NullMeter(),
        )
        norm = plain_step(plain, reference, batches(), limit)
        assert result.grad_norm is not None
        torch.testing.assert_close(result.grad_norm, norm)
        assert float(norm) > 0.05
        for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)
            if other.grad is None:
                assert one.grad is None
            else:
                # What the guard and methods see is the clipped gradient, as ever.
                torch.testing.assert_close(one.grad, other.grad)
        prepared.zero_grad()
        reference.zero_grad()
    assert accelerator.clipped == (0 if fused else 3)
    assert not hasattr(optimizer, "grad_scale")


def test_low_precision_gradients(accelerator: CountingAccelerator) -> None:
    ours = network().bfloat16()
    plain = copy.deepcopy(ours)
    micros = [MicroBatch({**each.inputs, "x": each.inputs["x"].bfloat16()}) for each in batches()]
    result = optimizer_step(
        ours,
        micros,
        loss,
        make_optimizer("sgd", ours),
        num_items=8,
        parameters=list(ours.parameters()),
        backend=accelerator,
        max_grad_norm=0.05,
        meter=NullMeter(),
    )
    assert accelerator.clipped == 0
    norm = plain_step(plain, make_optimizer("sgd", plain), micros, 0.05)
    assert result.grad_norm == norm
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_gradient_scaler_keeps_its_own_clipping(accelerator: CountingAccelerator) -> None:
    model = network()
    prepared: Any = accelerator.prepare_optimizer(make_optimizer("adamw_torch", model))
    prepared.scaler = object()
    stepped: list[bool] = []
    prepared.step = lambda: stepped.append(True)
    optimizer_step(
        model,
        batches(),
        loss,
        prepared,
        num_items=8,
        parameters=list(model.parameters()),
        backend=accelerator,
        max_grad_norm=1.0,
        meter=NullMeter(),
    )
    assert (accelerator.clipped, stepped) == (1, [True])


def test_a_norm_that_is_not_finite_is_reported(accelerator: CountingAccelerator) -> None:
    model = network()
    micro = MicroBatch({"x": torch.full((4, 64), float("nan")), "y": torch.zeros(4).long()})
    result = optimizer_step(
        model,
        [micro],
        loss,
        make_optimizer("adamw_torch", model),
        num_items=4,
        parameters=list(model.parameters()),
        backend=accelerator,
        max_grad_norm=1.0,
        meter=NullMeter(),
    )
    assert result.loss.isnan()
    assert result.grad_norm is not None
    assert result.grad_norm.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_norm_of_all_gradients(dtype: torch.dtype, transposed: bool) -> None:
    torch.manual_seed(0)
    # Squares that half precision cannot hold.
    gradients = [20 * torch.randn(shape, dtype=dtype) for shape in ((300, 700), (5,), (1, 1), ())]
    gradients = [one.mT if transposed and one.dim() > 1 else one for one in gradients]
    elements = torch.cat([one.double().flatten() for one in gradients])
    # Rounded once: torch's own norm in fp64 is further off than what is tested.
    exact = torch.tensor(math.sqrt(math.fsum((elements * elements).tolist())), dtype=torch.float64)
    norm = _total_norm(gradients)
    # torch adds the squares of rows that are not beside each other in fewer sums.
    rounding = (64 if transposed else 4) * torch.finfo(dtype).eps
    assert norm.dtype is dtype
    torch.testing.assert_close(norm.double(), exact, rtol=rounding, atol=0.0)


def test_the_norm_of_no_gradient() -> None:
    assert _total_norm([]) == 0


def test_the_norm_on_cuda_is_one_kernel() -> None:
    gradients = [torch.ones(3), torch.ones(13)]
    with patch.object(torch, "_foreach_norm", wraps=torch._foreach_norm) as kernel:
        assert _total_norm(gradients) == 4
        assert not kernel.called
        with cuda_norm():
            assert _total_norm(gradients) == 4
        assert kernel.called
