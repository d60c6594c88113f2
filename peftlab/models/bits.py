"""Masks as bits: an eighth of a boolean tensor's bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

# Operations, so that they are seen by what watches operations and fake tensors pass through them.
_library = torch.library.Library("peftlab", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("pack_bits(Tensor mask) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("unpack_bits(Tensor bits, SymInt[] shape) -> Tensor")  # type: ignore[no-untyped-call]
_ops: Any = torch.ops.peftlab


def pack_bits(mask: Tensor) -> Tensor:
    """A mask of any shape, booleans or bytes of zero and one, as (⌈elements / 8⌉,) bytes."""
    if _on_cpu(mask):
        packed: Tensor = (_ops.pack_bits if _is_watched(mask) else _pack)(mask)
        return packed
    flat = mask.flatten().view(torch.uint8)
    if spare := -flat.numel() % 8:
        flat = nn.functional.pad(flat, (0, spare))
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (flat.view(8, -1) << places[:, None]).sum(0, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    """What ``pack_bits`` was given on the same device, contiguous, as booleans of that shape."""
    if _on_cpu(bits):
        mask: Tensor = (_ops.unpack_bits if _is_watched(bits) else _unpack)(bits, shape)
        return mask.view(torch.bool)
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = ((bits >> places[:, None]) & 1).view(torch.bool).flatten()
    return flat[: shape.numel()].view(shape)


@contextmanager
def cuda_bits() -> Iterator[None]:
    """Inside, tensors on the CPU stand for some on CUDA, where other operations pack."""
    with mock.patch(f"{__name__}._on_cpu", _on_none):
        yield


def _is_watched(tensor: Tensor) -> bool:
    """Whether anything follows operations. To be one takes as long as packing a small mask."""
    return type(tensor) is not Tensor or torch._C._len_torch_dispatch_stack() > 0


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _on_none(tensor: Tensor) -> bool:
    return False


def _pack(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.numpy()))


def _pack_nothing(mask: Tensor) -> Tensor:
    return mask.new_empty(-(-mask.numel() // 8), dtype=torch.uint8)


def _unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    flat = np.unpackbits(bits.numpy(), count=math.prod(shape))
    return torch.from_numpy(flat).view(shape)


def _unpack_nothing(bits: Tensor, shape: torch.Size) -> Tensor:
    return bits.new_empty(shape)


_library.impl("pack_bits", _pack, "CPU")  # type: ignore[no-untyped-call]
_library.impl("pack_bits", _pack_nothing, "Meta")  # type: ignore[no-untyped-call]
_library.impl("unpack_bits", _unpack, "CPU")  # type: ignore[no-untyped-call]
_library.impl("unpack_bits", _unpack_nothing, "Meta")  # type: ignore[no-untyped-call]
