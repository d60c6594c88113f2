"""What CUDA would run, on fake tensors of a machine without it.

Fake tensors on ``cuda`` abort a CPU-only torch at the first autograd operation, so the tensors stay
on the CPU and the choices that torch makes by device are made here as on CUDA: which attention
kernel runs, what it keeps and needs inside, what dropout keeps, what autocast casts, how fp16
losses are scaled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional

from peftlab.memory.autocast import cuda_autocast

MAX_FLASH_HEAD_DIM = 256
"""Flash attention's limit (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)."""
_HALF = (torch.float16, torch.bfloat16)
_aten: Any = torch.ops.aten


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Inside, attention and autocast take the paths they would take on CUDA."""
    # A TorchFunctionMode is popped during backward: checkpointing's recomputation would miss it.
    with (
        cuda_autocast(),
        _fused_dropout(),
        mock.patch.object(functional, "scaled_dot_product_attention", _attention),
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
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    head_dim = query.shape[-1]
    if attn_mask is None and query.dtype in _HALF and head_dim <= MAX_FLASH_HEAD_DIM:
        scale = head_dim**-0.5 if scale is None else scale
        if head_dim % 8:
            padding = (0, 8 - head_dim % 8)
            query, key, value = (functional.pad(t, padding) for t in (query, key, value))
        flash: Any = _Flash
        made: Tensor = flash.apply(query, key, value, dropout_p, is_causal, scale)
        return made[..., :head_dim]
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    inputs = [tensor for tensor in (query, key, value, bias) if tensor is not None]
    keeps = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    efficient: Any = _Efficient
    out: Tensor = efficient.apply(query, key, value, bias, keeps, dropout_p, is_causal, scale)
    return out


class _Flash(torch.autograd.Function):
    """Flash attention, whose backward needs more than its inputs and results.

    A gradient of the queries in fp32, a sum for each of them, and gradients of keys and values for
    every head of the queries where those are shared: ``mha_bwd`` in
    aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        out, logsumexp, *lengths, seed, offset, _ = _aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )
        ctx.save_for_backward(query, key, value, out, logsumexp, seed, offset)
        ctx.settings = (*lengths, dropout_p, is_causal), scale
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, out, logsumexp, seed, offset = ctx.saved_tensors
        settings, scale = ctx.settings
        batch, heads, length, head_dim = query.shape
        rows = batch * heads * _rounded(length, 128)
        workspace = [_floats(rows * _rounded(head_dim, 32)), _floats(rows)]
        if key.shape[1] != heads:
            shared = (batch, heads, key.shape[2], head_dim)
            workspace += [key.new_empty(shared), key.new_empty(shared)]
        inputs = _aten._scaled_dot_product_flash_attention_backward(
            gradients[0], query, key, value, out, logsumexp, *settings, seed, offset, scale=scale
        )
        del workspace
        return *inputs, None, None, None


class _Efficient(torch.autograd.Function):
    """Memory-efficient attention; its backward adds up the queries' gradient in fp32.

    ``workspace_elements_gq`` and ``delta`` in mem_eff_attention/kernel_backward.h and
    attention_backward.cu beside it, with blocks of 64.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        keeps: bool,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
    ) -> Tensor:
        out, logsumexp, seed, offset = _aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, keeps, dropout_p, is_causal, scale=scale
        )
        ctx.save_for_backward(query, key, value, bias, out, logsumexp, seed, offset)
        ctx.settings = dropout_p, is_causal, scale
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        dropout_p, is_causal, scale = ctx.settings
        saved = ctx.saved_tensors
        query = saved[0]
        batch, heads, length, head_dim = query.shape
        rows = batch * heads * _rounded(length, 64)
        workspace = [_floats(rows * _rounded(head_dim, 64)), _floats(rows)]
        wanted = list(ctx.needs_input_grad[:4])
        inputs = _aten._scaled_dot_product_efficient_attention_backward(
            gradients[0], *saved, dropout_p, wanted, is_causal, scale=scale
        )
        del workspace
        found = [gradient if want else None for gradient, want in zip(inputs, wanted, strict=True)]
        return *found, None, None, None, None


def _rounded(count: int, block: int) -> int:
    return -(-count // block) * block


def _floats(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.float32)


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask as the kernel takes it: additive, its rows padded to 16, for every head."""
    if mask.dtype is torch.bool:
        zero = torch.zeros((), dtype=query.dtype)
        mask = torch.where(mask, zero, torch.full((), float("-inf"), dtype=query.dtype))
    width = mask.shape[-1]
    if width % 16:
        mask = functional.pad(mask, (0, 16 - width % 16))[..., :width]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
