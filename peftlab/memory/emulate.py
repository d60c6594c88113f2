"""What CUDA would run, on fake tensors of a machine without it.

Fake tensors on ``cuda`` abort a CPU-only torch at the first autograd operation, so the tensors stay
on the CPU and the choices that torch makes by device are made here as on CUDA: which attention
kernel runs, what dropout keeps, what autocast casts, how fp16 losses are scaled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional

from peftlab.memory.autocast import cuda_autocast
from peftlab.memory.cards import Chip

_MAX_FLASH_HEAD_DIM = 256
_MAX_CUDNN_HEAD_DIM = 128
"""Limits of the kernels (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)."""
_PREFER_CUDNN = (9, 10)
_HALF = (torch.float16, torch.bfloat16)
_aten: Any = torch.ops.aten


@contextmanager
def cuda_kernels(chip: Chip) -> Iterator[None]:
    """Inside, attention and autocast take the paths they would take on CUDA."""
    # A TorchFunctionMode is popped during backward: checkpointing's recomputation would miss it.
    with (
        cuda_autocast(),
        _fused_dropout(),
        mock.patch.object(functional, "scaled_dot_product_attention", _Attention(chip)),
    ):
        yield


@contextmanager
def _fused_dropout() -> Iterator[None]:
    """Dropout as one kernel that keeps a mask of one byte an element, not the noise it multiplies.

    ``is_fused_kernel_acceptable`` in aten/src/ATen/native/Dropout.cpp asks for CUDA.
    """
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]

    def dropout(input: Tensor, p: float, train: bool) -> Tensor:
        if not train or p == 0 or input.numel() == 0:
            return input
        result: Tensor = _aten.native_dropout(input, p, train)[0]
        return result

    try:
        library.impl("dropout", dropout, "AutogradCPU")  # type: ignore[no-untyped-call]
        yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]


class ScaledOptimizer:
    """An optimizer behind a ``GradScaler``, as Accelerate wraps it for fp16 autocast on CUDA.

    Whether a gradient overflowed cannot be known of fake ones: here none ever does.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer, self._scaler = optimizer, _NeverOverflows("cpu")

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to take gradients of."""
        return self._scaler.scale(loss)

    def unscale(self) -> None:
        """Bring gradients back to their size, before they are clipped."""
        self._scaler.unscale_(self._optimizer)

    def step(self) -> None:
        """Update weights and scale."""
        self._scaler.step(self._optimizer)
        self._scaler.update()


class _NeverOverflows(GradScaler):
    def _maybe_opt_step(self, optimizer: Any, optimizer_state: Any, *args: Any, **kw: Any) -> Any:
        return optimizer.step(*args, **kw)


@dataclass(frozen=True)
class _Attention:
    """``scaled_dot_product_attention`` by the kernel that a chip would take.

    All tensors of shape (batch, heads, seq, head_dim). ``_fused_sdp_choice`` of torch 2.13 on an
    H100 says: cuDNN in half precision without dropout; else flash without a mask; else, as in fp32,
    memory-efficient, which has no shared heads, so that those are computed step by step. cuDNN is
    preferred from Hopper on (``check_prefer_cudnn_attention`` in sdp_utils.cpp).
    """

    chip: Chip

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.to(dtype)
        shared, head_dim = key.shape[1] != query.shape[1], query.shape[-1]
        half = query.dtype in _HALF
        bias = None if attn_mask is None else _additive(attn_mask, query.dtype)
        keeps = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (query, key, value, bias)
        )
        cudnn = self.chip.capability[0] in _PREFER_CUDNN and head_dim <= _MAX_CUDNN_HEAD_DIM
        made: Tensor
        if half and cudnn and head_dim % 8 == 0 and not dropout_p:
            made = _aten._scaled_dot_product_cudnn_attention(
                query, key, value, bias, keeps, dropout_p, is_causal, False, scale=scale
            )[0]
        elif half and bias is None and head_dim <= _MAX_FLASH_HEAD_DIM and self._has_flash:
            scale = head_dim**-0.5 if scale is None else scale
            if head_dim % 8:
                padding = (0, 8 - head_dim % 8)
                query, key, value = (functional.pad(t, padding) for t in (query, key, value))
            made = _aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0][..., :head_dim]
        elif shared and enable_gqa:
            made = _aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale,
                enable_gqa=True,
            )[0]  # fmt: skip
        else:
            bias = None if bias is None else _padded(bias, query, key)
            made = _aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, keeps, dropout_p, is_causal, scale=scale
            )[0]
        return made

    @property
    def _has_flash(self) -> bool:
        return self.chip.capability >= (8, 0)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``convert_boolean_attn_mask`` in ATen/native/transformers/attention.cpp."""
    if mask.dtype is not torch.bool:
        return mask
    zero, low = (torch.scalar_tensor(value, dtype=dtype) for value in (0.0, float("-inf")))
    return torch.where(mask, zero, low)


def _padded(bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """As the memory-efficient kernel takes it: its rows of a multiple of 8, for every head."""
    width = bias.shape[-1]
    if width % 8:
        bias = functional.pad(bias, (0, 8 - width % 8))[..., :width]
    return bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
