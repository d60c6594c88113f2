"""Dropout that draws faster on the CPU: the same distribution from fewer random bits.

torch draws a float for every element there and keeps it for backward. Here an element costs 16
random bits and keeps one byte. The bits are SFC64's (Doty-Humphrey, PractRand), which every call
seeds with one number of torch's generator: to seed, save and restore that one is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

_LEVELS = 2**16
_WORDS = 2**13
"""64-bit numbers drawn at a time: little enough to stay in a core's cache."""

# An operation, so that it is seen by what watches operations and does nothing to fake tensors.
_library = torch.library.Library("peftlab", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "draw_kept_(Tensor(a!) kept, int dropped, Tensor? allowed=None, Tensor(b!)? bits=None) -> ()",
    tags=(torch.Tag.nondeterministic_seeded,),
)

DRAW_KEPT: Any = torch.ops.peftlab.draw_kept_.default
"""Fills a mask with ones and zeros; for those who look for it among operations. Who needs it later
gives ``bits`` too, filled as ``pack_bits`` packs while the mask is still in a core's cache."""


def draw_dropout_fast(model: nn.Module) -> None:
    """Give every ``nn.Dropout`` the faster forward; nothing is saved of it."""
    for module in model.modules():
        if type(module) is nn.Dropout and not module.inplace:
            module.__class__ = Dropout


class Dropout(nn.Dropout):
    """``nn.Dropout`` with other random numbers on the CPU. Made by ``draw_dropout_fast``.

    An element is zero with probability round(p · 2¹⁶) / 2¹⁶, independently of all others. Where
    that is 0 or 1, and where the compiler makes its own kernels, the forward is ``nn.Dropout``'s.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Of any shape."""
        if not self.training or not draws_fast(input, self.p):
            return super().forward(input)
        return _drop(input, self.p)

    def draw(self, like: Tensor) -> Tensor | None:
        """The zeros and ones that ``forward`` would draw for it, as bytes; None where torch draws.

        For layers that keep the mask and make the product themselves.
        """
        return _draw(like, self.p)


def draws_fast(x: Tensor, probability: float) -> bool:
    """Whether elements of ``x`` can be dropped with ``draw_kept`` with this probability."""
    uncertain = 0 < round(probability * _LEVELS) < _LEVELS
    return uncertain and x.device.type == "cpu" and not torch.compiler.is_compiling()


def draw_kept(
    like: Tensor, shape: Sequence[int], probability: float, allowed: Tensor | None = None
) -> Tensor:
    """Ones, and zeros with this probability, of dtype uint8.

    Bytes and not booleans: a float times a boolean takes torch twice the time on a CPU.

    Args:
        like: a tensor of the device.
        allowed: booleans broadcastable to ``shape``; where False, the result is zero.
    """
    kept = like.new_empty(shape, dtype=torch.uint8)
    DRAW_KEPT(kept, round(probability * _LEVELS), allowed)
    return kept


def _draw_kept(
    kept: Tensor, dropped: int, allowed: Tensor | None = None, bits: Tensor | None = None
) -> None:
    seed = int(torch.empty((), dtype=torch.int64).random_())
    generator = np.random.SFC64(seed)
    # A view: the tensor was just made, contiguous.
    shaped = kept.numpy().view(np.bool_)
    flat = shaped.reshape(-1)
    packed = None if bits is None else bits.numpy()
    step = _WORDS * 4
    for start in range(0, flat.size, step):
        part = flat[start : start + step]
        levels = generator.random_raw(-(-part.size // 4)).view(np.uint16)
        np.greater_equal(levels[: part.size], dropped, out=part)
        if packed is not None and allowed is None:
            packed[start // 8 : (start + step) // 8] = np.packbits(part)
    if allowed is not None:
        np.logical_and(shaped, allowed.numpy(), out=shaped)
        if packed is not None:
            packed[:] = np.packbits(flat)


def _draw_nothing(
    kept: Tensor, dropped: int, allowed: Tensor | None = None, bits: Tensor | None = None
) -> None:
    pass


_library.impl("draw_kept_", _draw_kept, "CPU")  # type: ignore[no-untyped-call]
_library.impl("draw_kept_", _draw_nothing, "Meta")  # type: ignore[no-untyped-call]


def _draw(like: Tensor, probability: float) -> Tensor | None:
    return draw_kept(like, like.shape, probability) if draws_fast(like, probability) else None


def _draw_as_cuda(like: Tensor, probability: float) -> Tensor | None:
    return None


def _drop(x: Tensor, probability: float) -> Tensor:
    kept = draw_kept(x, x.shape, probability)
    dropped: Tensor = _Dropped.apply(x, kept, 1 / (1 - probability))  # type: ignore[no-untyped-call]
    return dropped


class _Dropped(torch.autograd.Function):
    """s x ∘ K. The product with bytes would cast them to a tensor of its own, and again behind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        # Not s first: in half precision s K would be rounded.
        return kept.to(x.dtype).mul_(x).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Dropped.apply(grad, *ctx.saved_tensors, ctx.scale), None, None  # type: ignore[no-untyped-call]


def _drop_as_cuda(x: Tensor, probability: float) -> Tensor:
    return torch.native_dropout(x, probability, True)[0]


@contextmanager
def cuda_dropout() -> Iterator[None]:
    """Inside, tensors on the CPU stand for some on CUDA, whose kernel is another."""
    with (
        mock.patch(f"{__name__}._drop", _drop_as_cuda),
        mock.patch(f"{__name__}._draw", _draw_as_cuda),
    ):
        yield
