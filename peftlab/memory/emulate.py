"""What CUDA would run, on fake tensors of a machine without it.

Fake tensors on ``cuda`` abort a CPU-only torch at the first autograd operation, so the tensors stay
on the CPU and the choices that torch makes by device are made here as on CUDA: which attention
kernel runs and what it keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

MAX_FLASH_HEAD_DIM = 256
"""Flash attention's limit (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)."""
_HALF = (torch.float16, torch.bfloat16)
_aten: Any = torch.ops.aten


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Inside, ``scaled_dot_product_attention`` takes the path it would take on CUDA."""
    # A TorchFunctionMode is popped during backward: checkpointing's recomputation would miss it.
    with mock.patch.object(functional, "scaled_dot_product_attention", _attention):
        yield


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash where nothing is masked, in half precision; else memory-efficient, as CUDA prefers.

    All of shape (batch, heads, seq, head_dim).
    """
    if attn_mask is None and query.dtype in _HALF and query.shape[-1] <= MAX_FLASH_HEAD_DIM:
        return _flash(query, key, value, dropout_p, is_causal, scale)
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    keeps = query.requires_grad or key.requires_grad or value.requires_grad
    out: Tensor = _aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, keeps, dropout_p, is_causal, scale=scale
    )[0]
    return out


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    if head_dim % 8:
        query, key, value = (functional.pad(t, (0, 8 - head_dim % 8)) for t in (query, key, value))
    out: Tensor = _aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, False, scale=scale
    )[0]
    return out[..., :head_dim]


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask as the kernel takes it: additive, its rows padded to 16, for every head."""
    if mask.dtype is torch.bool:
        zero = torch.zeros((), dtype=query.dtype)
        mask = torch.where(mask, zero, torch.full((), float("-inf"), dtype=query.dtype))
    width = mask.shape[-1]
    if width % 16:
        mask = functional.pad(mask, (0, 16 - width % 16))[..., :width]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
