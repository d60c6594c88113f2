"""The faster dropout drops as often, independently, and scales what it keeps."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from peftlab.models.bits import pack_bits
from peftlab.models.dropout import (
    DRAW_KEPT,
    Dropout,
    cuda_dropout,
    draw_dropout_fast,
    draw_kept,
)


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
    # Four neighbours share a 64-bit number; 2¹⁵ elements are drawn at a time.
    for lag in (1, 2, 3, 4, 2**15):
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


def test_second_derivatives() -> None:
    model = fast(0.25)

    def f(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return model(x) ** 2

    x = torch.randn(3, 5, dtype=torch.float64).mT.requires_grad_()
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_once_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, dtype=dtype)
    out = fast(0.3)(x)
    expected = (x.double() * (1 / 0.7)).to(dtype)
    torch.testing.assert_close(out, expected.where(out != 0, 0), rtol=0, atol=0)


def test_seeded() -> None:
    model, x = fast(0.5), torch.ones(33)
    torch.manual_seed(4)
    first, second = model(x), model(x)
    torch.manual_seed(4)
    assert torch.equal(model(x), first)
    assert not torch.equal(first, second)


def test_calls_are_independent() -> None:
    torch.manual_seed(0)
    model, x = fast(0.5), torch.ones(2**18)
    first, second = model(x) != 0, model(x) != 0
    same = float((first == second).float().mean())
    assert abs(same - 0.5) < 4 * 0.5 / math.sqrt(x.numel())


def test_torch_s_generator_is_all_there_is_to_restore() -> None:
    model, x = fast(0.5), torch.ones(33)
    model(x)
    state = torch.get_rng_state()
    expected = [model(x), torch.rand(3), model(x)]
    torch.set_rng_state(state)
    for one, other in zip(expected, [model(x), torch.rand(3), model(x)], strict=True):
        assert torch.equal(one, other)
    with torch.random.fork_rng(devices=[]):
        model(x)
    torch.set_rng_state(state)
    assert torch.equal(model(x), expected[0])


def test_the_numbers_stay_the_same_between_versions() -> None:
    torch.manual_seed(4)
    kept = draw_kept(torch.empty(0), (3, 7), 0.5)
    assert kept.dtype is torch.uint8
    assert kept.tolist() == [
        [1, 0, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 1, 0],
        [0, 1, 1, 0, 1, 1, 0],
    ]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 2**15 - 1, 2**15, 2**15 + 1])
def test_every_element_is_drawn(count: int) -> None:
    mask = torch.full((count,), 7, dtype=torch.uint8)
    DRAW_KEPT(mask, 1)
    assert mask.sum() >= count - 10
    assert set(mask.unique().tolist()) <= {0, 1}


def test_only_where_allowed() -> None:
    allowed = torch.tensor([[True, False, True]])
    kept = draw_kept(torch.empty(0), (2, 500, 3), 0.1, allowed)
    assert not kept[..., 1].any()
    assert 0.85 < float(kept[..., ::2].float().mean()) < 0.95


@pytest.mark.parametrize("allowed", [None, torch.tensor(False), torch.arange(7) % 3 > 0])
@pytest.mark.parametrize("rows", [0, 1, 8, 2**14])
def test_as_bits_too(rows: int, allowed: Tensor | None) -> None:
    mask, bits = (torch.full((n,), 7, dtype=torch.uint8) for n in (7 * rows, -(-7 * rows // 8)))
    DRAW_KEPT(mask.view(rows, 7), 2**14, allowed, bits)
    assert torch.equal(bits, pack_bits(mask))
    assert set(mask.unique().tolist()) <= {0, 1}


def test_fake_tensors_and_what_watches_operations() -> None:
    with FakeTensorMode():
        x = torch.ones(4, 5, requires_grad=True)
        out = fast(0.5)(x)
        out.sum().backward()
        assert out.shape == x.grad.shape == (4, 5)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **kwargs or {})

    with Watch():
        fast(0.5)(torch.ones(3))
    assert seen.count(DRAW_KEPT) == 1
    # Nothing but the mask and the results is allocated where it would be seen.
    assert [op.name() for op in seen if "random" in op.name() or "empty" in op.name()] == [
        "aten::new_empty"
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    out = fast(0.5)(torch.ones(64, dtype=dtype))
    assert out.dtype is dtype
    assert set(out.unique().tolist()) == {0.0, 2.0}


def test_undefined_numbers_stay_undefined() -> None:
    assert fast(0.5)(torch.full((64,), math.nan)).isnan().all()


@pytest.mark.parametrize("probability", [0.0, 1.0, 1e-6, 1 - 1e-6])
def test_certain(probability: float) -> None:
    torch.manual_seed(0)
    out = fast(probability)(torch.ones(9))
    torch.manual_seed(0)
    assert torch.equal(out, nn.Dropout(probability)(torch.ones(9)))


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


def test_what_is_drawn_alone_is_what_a_forward_drops() -> None:
    dropout = fast(0.3)[0]
    x = torch.ones(7, 11)
    torch.manual_seed(4)
    dropped = dropout(x)
    torch.manual_seed(4)
    kept = dropout.draw(x)
    assert torch.equal(kept.bool(), dropped != 0)
    assert 0 < kept.sum() < kept.numel()
    with cuda_dropout():
        assert dropout.draw(x) is None
    dropout.p = 1.0
    assert dropout.draw(x) is None
