"""Bits of masks: what was packed comes back, by either way and on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from peftlab.models.bits import cuda_bits, pack_bits, unpack_bits


class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", [nullcontext, Watching, cuda_bits])
@pytest.mark.parametrize("shape", [(8,), (3, 5, 7), (1,), (0, 4), ()])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_what_was_packed_comes_back(
    device: Callable[[], Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    mask = (torch.rand(shape) < 0.5).to(dtype)
    with device():
        bits = pack_bits(mask)
        again = unpack_bits(bits, mask.shape)
    assert bits.nbytes == -(-mask.numel() // 8)
    assert again.dtype is torch.bool
    assert torch.equal(again, mask.bool())


def test_a_mask_of_other_strides() -> None:
    mask = (torch.rand(6, 10) < 0.5).t()
    assert torch.equal(unpack_bits(pack_bits(mask), mask.shape), mask)


def test_who_watches_sees_it() -> None:
    with Watching() as watching:
        bits = pack_bits(torch.ones(8, dtype=torch.bool))
        unpack_bits(bits, torch.Size([8]))
    assert {"peftlab::pack_bits", "peftlab::unpack_bits"} <= set(watching.seen)


def test_fake_masks_have_the_same_sizes() -> None:
    with FakeTensorMode():
        mask = torch.zeros(3, 5, dtype=torch.bool)
        bits = pack_bits(mask)
        again = unpack_bits(bits, mask.shape)
    assert (bits.shape, bits.dtype) == ((2,), torch.uint8)
    assert (again.shape, again.dtype) == ((3, 5), torch.bool)
