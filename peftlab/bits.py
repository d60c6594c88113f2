"""Boolean masks at one bit per element, on any device and without a loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def pack_bits(mask: Tensor) -> Tensor:
    """A boolean mask of any shape as (⌈elements / 8⌉,) bytes; its n-th eighth is in bit n."""
    flat = mask.flatten().view(torch.uint8)
    if spare := -flat.numel() % 8:
        flat = nn.functional.pad(flat, (0, spare))
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (flat.view(8, -1) << places[:, None]).sum(0, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: torch.Size) -> Tensor:
    """What ``pack_bits`` was given, contiguous, of that shape."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = ((bits >> places[:, None]) & 1).view(torch.bool).flatten()
    return flat[: shape.numel()].view(shape)
