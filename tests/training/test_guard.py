"""The guard names what changed but is frozen, and what trains but did not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peftlab.errors import GuardError
from peftlab.training.guard import MIN_STEPS, LearningGuard, fingerprint


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def learn(model: nn.Module, guard: LearningGuard, steps: int = MIN_STEPS) -> None:
    """Steps in which everything trainable that has a gradient moves."""
    inputs = torch.ones(3, 4)
    for _ in range(steps):
        model.zero_grad()
        model(inputs).square().sum().backward()
        guard.observe(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad


def test_a_run_that_learned_passes() -> None:
    model = small_model()
    guard = LearningGuard(model)
    learn(model, guard)
    guard.verify(model, MIN_STEPS)


@pytest.mark.parametrize("steps", [0, MIN_STEPS])
def test_a_frozen_tensor_that_changed_is_named(steps: int) -> None:
    model = small_model()
    guard = LearningGuard(model)
    learn(model, guard, steps)
    with torch.no_grad():
        model[0].bias[0] = torch.nextafter(model[0].bias[0], torch.tensor(9.0))
    with pytest.raises(GuardError, match=r"^frozen parameters changed: 0\.bias\.$"):
        guard.verify(model, steps)


def test_what_never_had_a_gradient_is_named() -> None:
    model = small_model()
    unused = nn.Linear(2, 2)
    model.add_module("unused", unused)
    guard = LearningGuard(model)
    del model.unused
    learn(model, guard)
    model.add_module("unused", unused)
    with torch.no_grad():
        unused.weight += 1
    message = (
        r"^trainable parameters never had a gradient: unused\.bias, unused\.weight; "
        r"trainable parameters did not move: unused\.bias\.$"
    )
    with pytest.raises(GuardError, match=message):
        guard.verify(model, MIN_STEPS)


def test_a_gradient_of_zeros_is_none() -> None:
    model = small_model()
    guard = LearningGuard(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    guard.observe(model)
    assert guard.state() == ["1.bias", "1.weight", "2.bias", "2.weight"]


def test_what_did_not_move_is_named() -> None:
    model = small_model()
    guard = LearningGuard(model)
    before = model[1].weight.detach().clone()
    learn(model, guard)
    with torch.no_grad():
        model[1].weight.copy_(before)
    with pytest.raises(GuardError, match=r"^trainable parameters did not move: 1\.weight\.$"):
        guard.verify(model, MIN_STEPS)


def test_few_steps_are_not_judged() -> None:
    model = small_model()
    guard = LearningGuard(model)
    guard.verify(model, MIN_STEPS - 1)
    with pytest.raises(GuardError, match="and 1 more"):
        LearningGuard(nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))).verify(
            nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))), MIN_STEPS
        )
    with pytest.raises(GuardError, match="never had a gradient"):
        guard.verify(model, MIN_STEPS)


def test_a_resumed_run_is_judged_as_a_whole() -> None:
    model = small_model()
    first = LearningGuard(model)
    learn(model, first)
    # A guard made at the resumed weights sees no movement and no gradient of its own.
    resumed = LearningGuard(model)
    with pytest.raises(GuardError):
        resumed.verify(model, MIN_STEPS)
    resumed.restore(first.state(), first.initial)
    resumed.verify(model, MIN_STEPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_fingerprint_sees_bytes(dtype: torch.dtype) -> None:
    values = torch.arange(6).to(dtype).view(2, 3)
    assert fingerprint(values) == fingerprint(values.clone())
    assert fingerprint(values) == fingerprint(values.t().contiguous().t())
    changed = values.clone()
    changed[1, 2] += 1
    assert fingerprint(values) != fingerprint(changed)
    assert fingerprint(torch.tensor(0.0)) != fingerprint(torch.tensor(-0.0))
