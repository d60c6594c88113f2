"""The faster dropout drops as often, independently, and scales what it keeps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from peftlab.models.dropout import Dropout, cuda_dropout, draw_dropout_fast


def fast(probability: float) -> nn.Sequential:
    model = nn.Sequential(nn.Dropout(probability))
    draw_dropout_fast(model)
    assert type(model[0]) is Dropout
    return model


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9])
def test_bernoulli(probability: float) -> None:
    torch.manual_seed(0)
    count = 1_000_001
    kept = fast(probability)(torch.ones(count)) != 0
    deviation = math.sqrt(probability * (1 - probability) / count)
    assert abs(1 - float(kept.float().mean()) - probability) < 4 * deviation
    # Neighbours share a 64-bit number, and every second pair a state of the generator.
    for lag in (1, 2, 3, 624):
        both = float((~kept[lag:] & ~kept[:-lag]).float().mean())
        spread = math.sqrt(probability**2 * (1 + 2 * probability) / count)
        assert abs(both - probability**2) < 5 * spread


def test_scaled_and_differentiated() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 5, 3, requires_grad=True)
    out = fast(0.25)(x)
    kept = out != 0
    torch.testing.assert_close(out[kept], x[kept] / 0.75)
    out.backward(torch.full_like(out, 3.0))
    torch.testing.assert_close(x.grad, kept * 4.0)


def test_seeded() -> None:
    model, x = fast(0.5), torch.ones(33)
    torch.manual_seed(4)
    first, second = model(x), model(x)
    torch.manual_seed(4)
    assert torch.equal(model(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_certain(probability: float) -> None:
    assert torch.equal(fast(probability)(torch.ones(9)), torch.full((9,), 1 - probability))


def test_eval_and_copies() -> None:
    model, x = fast(0.5), torch.ones(9)
    model.eval()
    assert torch.equal(model(x), x)
    assert type(copy.deepcopy(model)[0]) is Dropout


@pytest.mark.parametrize("as_cuda", [False, True])
def test_keeps_a_byte_for_an_element(as_cuda: bool) -> None:
    model = fast(0.5)
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> None:
        sizes.append(tensor.nbytes)

    with saved_tensors_hooks(pack, lambda nothing: nothing):
        if as_cuda:
            with cuda_dropout():
                model(torch.ones(64, requires_grad=True))
        else:
            model(torch.ones(64, requires_grad=True))
    assert sizes == [64]
