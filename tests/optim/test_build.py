"""Every optimizer of the table learns; schedules are transformers'."""

from __future__ import annotations

import math
import re

import pytest
import torch
import transformers
from pydantic import ValidationError
from torch import nn

from peftlab.errors import IncompatibleError, UnknownNameError
from peftlab.optim.build import build_optimizer, build_scheduler
from peftlab.optim.config import OptimConfig
from peftlab.optim.table import ALIASES, OPTIMIZERS, optimizer_info
from tests.optim.conftest import make_optimizer


def quadratic(name: str, steps: int = 40) -> list[float]:
    """The losses of a regression on 64 × 128 weights."""
    torch.manual_seed(0)
    model = nn.Linear(64, 128)
    inputs, target = torch.randn(32, 64), torch.randn(32, 128)
    rate = 1.0 if name == "sgd" else 0.01
    optimizer = make_optimizer(name, model, learning_rate=rate)
    losses = []
    for _ in range(steps):
        loss = (model(inputs) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_lowers_a_quadratic_loss(name: str) -> None:
    losses = quadratic(name)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(("name", "tolerance"), [("adamw_8bit", 2e-3), ("paged_adamw_32bit", 1e-6)])
def test_bitsandbytes_follows_torch(name: str, tolerance: float) -> None:
    # Relative to where the loss starts: the noise of 8-bit states does not shrink with the loss.
    ours, reference = torch.tensor(quadratic(name)), torch.tensor(quadratic("adamw_torch"))
    torch.testing.assert_close(ours, reference, rtol=0, atol=tolerance * float(reference[0]))


@pytest.mark.parametrize(("alias", "name"), sorted(ALIASES.items()))
def test_aliases_name_the_same(alias: str, name: str) -> None:
    assert optimizer_info(alias) is OPTIMIZERS[name]
    model = nn.Linear(2, 2)
    assert type(make_optimizer(alias, model)) is type(make_optimizer(name, model))


def test_an_unknown_optimizer_is_answered_with_near_names() -> None:
    with pytest.raises(UnknownNameError, match=r"no optimizer 'adamw_8bits'.*'adamw_8bit'"):
        make_optimizer("adamw_8bits", nn.Linear(2, 2))


def test_settings_reach_the_optimizer() -> None:
    adam = make_optimizer(
        "adamw_torch", nn.Linear(2, 2), adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6,
        weight_decay=0.3,
    )  # fmt: skip
    weight, bias = adam.param_groups
    assert (weight["betas"], weight["eps"], weight["weight_decay"]) == ((0.8, 0.9), 1e-6, 0.3)
    assert weight["fused"] is True
    assert bias["weight_decay"] == 0.0
    sgd = make_optimizer("sgd", nn.Linear(2, 2), momentum=0.7)
    assert sgd.param_groups[0]["momentum"] == 0.7


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_state_is_as_large_as_the_table_says(name: str) -> None:
    info = OPTIMIZERS[name]
    model = nn.Linear(64, 128)
    optimizer = make_optimizer(name, model)
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    for parameter in model.parameters():
        small = parameter.numel() < info.min_quantized_size
        bits = 32 if small else info.state_bits
        states = [
            value
            for value in optimizer.state[parameter].values()
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape
        ]
        assert len(states) == (2 if info.adam else 0)
        assert all(state.element_size() * 8 == bits for state in states)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there paging works")
def test_paging_that_does_not_happen_is_noted() -> None:
    model = nn.Linear(2, 2)
    config = OptimConfig(optim="paged_adamw_8bit", learning_rate=1)
    _, notes = build_optimizer(model, config, None)  # type: ignore[arg-type]
    assert notes == ["paged_adamw_8bit: paging needs CUDA; the state is not paged here"]
    _, notes = build_optimizer(
        model, config.model_copy(update={"optim": "adamw_8bit"}), None  # type: ignore[arg-type]
    )  # fmt: skip
    assert notes == []


def test_nothing_trains() -> None:
    with pytest.raises(IncompatibleError, match="every parameter is frozen"):
        make_optimizer("sgd", nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize(
    "warmup", [{"warmup_steps": 0}, {"warmup_steps": 4}, {"warmup_ratio": 0.11}]
)
@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_schedules_are_transformers(name: str, warmup: dict[str, float]) -> None:
    total = 30
    config = OptimConfig(learning_rate=0.1, lr_scheduler_type=name, **warmup)  # type: ignore[arg-type]
    warmup_steps = int(warmup.get("warmup_steps", 4))
    their_name = "constant_with_warmup" if name == "constant" else name
    rates = []
    for ours in (True, False):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler = (
            build_scheduler(optimizer, config, total)
            if ours
            else transformers.get_scheduler(their_name, optimizer, warmup_steps, total)
        )
        seen = []
        for _ in range(total):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        rates.append(seen)
    assert rates[0] == rates[1]
    assert max(rates[0]) == 0.1
    assert (rates[0][0] == 0.0) == bool(warmup_steps)


@pytest.mark.parametrize("total", [1, 7, 10, 33, 50, 100, 101, 1000])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.06, 0.1, 0.5, 1.0])
def test_warmup_ratio_is_rounded_up(total: int, ratio: float) -> None:
    config = OptimConfig(learning_rate=1, warmup_ratio=ratio)
    assert config.num_warmup_steps(total) == math.ceil(total * ratio)


def test_warmup_steps_go_before_the_ratio() -> None:
    assert OptimConfig(learning_rate=1, warmup_ratio=0.5, warmup_steps=0).num_warmup_steps(10) == 0
    assert OptimConfig(learning_rate=1, warmup_ratio=0.5, warmup_steps=3).num_warmup_steps(10) == 3


def test_multipliers_are_not_negative() -> None:
    with pytest.raises(ValidationError, match=re.escape("must not be negative")):
        OptimConfig(learning_rate=1, learning_rate_multipliers={"x": -1.0})
