"""Updating in backward gives the same weights, and gradients never exist all at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftlab.optim.in_backward import update_in_backward
from peftlab.optim.table import OPTIMIZERS
from tests.optim.conftest import make_optimizer


def step(model: Any) -> None:
    ids = torch.arange(3, 27).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_the_same_weights_and_state(name: str, llama: Any) -> None:
    llama.tie_weights()
    plain = copy.deepcopy(llama)
    optimizer = make_optimizer(name, llama, learning_rate=1e-2, weight_decay=0.1, momentum=0.9)
    reference = make_optimizer(name, plain, learning_rate=1e-2, weight_decay=0.1, momentum=0.9)
    update_in_backward(optimizer)
    for number in range(4):
        for each in (optimizer, reference):
            for group in each.param_groups:
                group["lr"] = 1e-2 / (number + 1)
        step(llama)
        assert all(parameter.grad is None for parameter in llama.parameters())
        optimizer.step()
        step(plain)
        reference.step()
        reference.zero_grad()
    assert len(optimizer.param_groups) == len(reference.param_groups) == 2
    for one, other in zip(llama.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
        ours, theirs = optimizer.state[one], reference.state[other]
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            same = (
                torch.equal(ours[key], value) if isinstance(value, Tensor) else ours[key] == value
            )
            assert same, key


def test_one_gradient_at_a_time(llama: Any) -> None:
    live: list[int] = []

    def seen(parameter: Tensor) -> None:
        assert parameter.grad is not None
        live.append(sum(p.grad is not None for p in llama.parameters()))

    update_in_backward(make_optimizer("adamw_torch", llama), seen)
    step(llama)
    assert len(live) == sum(1 for _ in llama.parameters())
    # What one operation differentiates together waits together: weight and bias, or a norm's.
    assert max(live) <= 2


def test_shared_parameters_are_updated_once() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 4)
    model = nn.Sequential(linear, nn.Tanh(), linear)
    plain = copy.deepcopy(model)
    optimizer, reference = (make_optimizer("adamw_torch", each) for each in (model, plain))
    update_in_backward(optimizer)
    x = torch.randn(3, 4)
    model(x).sum().backward()
    plain(x).sum().backward()
    reference.step()
    assert torch.equal(linear.weight, plain[0].weight)  # type: ignore[arg-type]
