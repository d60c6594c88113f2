"""Dropout that draws faster on the CPU: the same distribution from fewer random bits.

torch draws and keeps a float for every element there. Here an element costs half of a 64-bit number
of the same generator, and one byte is kept for backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

_BITS = 32


def draw_dropout_fast(model: nn.Module) -> None:
    """Give every ``nn.Dropout`` the faster forward; nothing is saved of it."""
    for module in model.modules():
        if type(module) is nn.Dropout and not module.inplace:
            module.__class__ = Dropout


class Dropout(nn.Dropout):
    """``nn.Dropout`` with other random numbers on the CPU. Made by ``draw_dropout_fast``.

    An element is zero with probability round(p · 2³²) / 2³², independently of all others.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Of any shape."""
        if not self.training or not 0 < self.p < 1 or input.device.type != "cpu":
            return super().forward(input)
        return _drop(input, self.p)


def _drop(x: Tensor, probability: float) -> Tensor:
    pairs = torch.empty((x.numel() + 1) // 2, dtype=torch.int64)
    # From the smallest number on and without an end: all 64 bits.
    numbers = pairs.random_(-(2**63), None).view(torch.int32)[: x.numel()]
    kept = numbers >= round(probability * 2**_BITS) - 2 ** (_BITS - 1)
    del pairs, numbers
    return (x * (1 / (1 - probability))).mul_(kept.view(x.shape))


def _drop_as_cuda(x: Tensor, probability: float) -> Tensor:
    return torch.native_dropout(x, probability, True)[0]


@contextmanager
def cuda_dropout() -> Iterator[None]:
    """Inside, tensors on the CPU stand for some on CUDA, whose kernel is another."""
    with mock.patch(f"{__name__}._drop", _drop_as_cuda):
        yield
