"""What CUDA's kernels allocate inside: blocks that no operation returns, gone when it ends.

Formulas of torch 2.13. The large blocks of each were seen in an H100's allocator
(tests/memory/test_kernels.py); a few KiB inside other operations are not modelled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from peftlab.memory.cards import Chip

_aten: Any = torch.ops.aten
_NORM_CHUNK = 65_536
_SORTED_ROWS = 3_072
_ROWS_PER_SEGMENT = 10


class Kernels:
    """The blocks that operations need inside on a chip.

    Args:
        chip: whose multiprocessors a reduction is spread over.
    """

    def __init__(self, chip: Chip) -> None:
        self._chip = chip
        self._formulas: Mapping[Any, Callable[..., tuple[int, ...]]] = {
            _aten.sum.dim_IntList: self._sum,
            _aten._foreach_norm.Scalar: _foreach_norm,
            _aten.embedding_dense_backward.default: _embedding_backward,
            _aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
            _aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
            _aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
        }

    def inside(self, func: Any, args: tuple[Any, ...]) -> tuple[int, ...]:
        """Bytes of each block that a call holds beside its arguments and results."""
        formula = self._formulas.get(func)
        return () if formula is None else formula(*args)

    def on_host(self, func: Any) -> frozenset[int]:
        """Which results are on the CPU: the random state of memory-efficient attention."""
        efficient = func is _aten._scaled_dot_product_efficient_attention.default
        return frozenset({2, 3}) if efficient else frozenset()

    def _sum(self, x: Tensor, dims: Any = None, *_: Any) -> tuple[int, ...]:
        """Partial sums of a reduction of leading dimensions that is split over thread blocks.

        ``setReduceConfig`` and ``global_memory_size`` in ATen/native/cuda/Reduce.cuh.
        """
        kept = x.ndim - len(dims or range(x.ndim))
        if not dims or {dim % x.ndim for dim in dims} != set(range(x.ndim - kept)):
            # Reductions of the last dimension are split into few, small partial sums.
            return ()
        outputs = math.prod(x.shape[x.ndim - kept :])
        rows = x.numel() // max(1, outputs)
        if not outputs or not rows or not x.is_contiguous():
            return ()
        vector = math.gcd(outputs, 4)
        most = 512 // vector
        across, down = (min(_power_of_two(n), most) for n in (max(1, outputs // vector), rows))
        height = min(down, most // min(across, 32))
        width = min(across, most // height)
        values = -(-rows // height)
        grid = -(-outputs // (vector * width))
        blocks = self._chip.multiprocessors * (self._chip.threads // (width * height))
        if rows < min(height * 16, 256) or values < 256 or grid > blocks:
            return ()
        split = max(min(-(-blocks // grid), -(-values // 16)), -(-values // 256))
        if split == 1:
            return ()
        return 4 * outputs * split * width * vector, 4 * grid


def _power_of_two(number: int) -> int:
    """The largest one that is not larger."""
    return 1 << (number.bit_length() - 1)


def _foreach_norm(tensors: list[Tensor], *_: Any) -> tuple[int, ...]:
    """A partial norm for each chunk of each tensor (``ForeachReduceOp.cu``)."""
    chunks = max(-(-tensor.numel() // _NORM_CHUNK) for tensor in tensors)
    return (4 * len(tensors) * chunks,)


def _embedding_backward(gradient: Tensor, indices: Tensor, rows: int, *_: Any) -> tuple[int, ...]:
    """Sorted indices, and a gradient for each segment of equal ones; few are added up directly.

    aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu.
    """
    count = indices.numel()
    if count <= _SORTED_ROWS:
        return ()
    segments = count // _ROWS_PER_SEGMENT + min(count, rows)
    width = -(-gradient.shape[-1] // 32) * 32
    return (*[8 * count] * 5, 8 * segments, 4 * segments * width)


def _efficient_backward(gradient: Tensor, query: Tensor, *_: Any) -> tuple[int, ...]:
    """The queries' gradient in fp32 with a lock a block, and a sum for each query.

    ``workspace_elements_gq`` in mem_eff_attention/kernel_backward.h; blocks of 64 × 64.
    """
    batch, heads, length, head_dim = query.shape
    blocks = batch * heads * -(-length // 64) * -(-head_dim // 64)
    return blocks * (64 * 64 * 4 + 16), batch * heads * length * 4


def _flash_backward(gradient: Tensor, query: Tensor, key: Tensor, *_: Any) -> tuple[int, ...]:
    """The queries' gradient in fp32, a sum for each query, and gradients of shared heads.

    ``mha_bwd`` in aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp.
    """
    batch, heads, length, head_dim = query.shape
    rows = batch * heads * -(-length // 128) * 128
    return (rows * -(-head_dim // 32) * 32 * 4, rows * 4, *_shared(query, key))


def _cudnn_backward(gradient: Tensor, query: Tensor, key: Tensor, *_: Any) -> tuple[int, ...]:
    """One workspace: the queries' gradient in fp32, a sum for each, gradients of shared heads."""
    batch, heads, length, head_dim = query.shape
    rows = batch * heads * length
    return (rows * head_dim * 4 + rows * 4 + 512 + sum(_shared(query, key)),)


def _shared(query: Tensor, key: Tensor) -> tuple[int, ...]:
    """Gradients of keys and values for every head of the queries, where several share one."""
    heads = query.shape[1]
    if key.shape[1] == heads:
        return ()
    return (key.nbytes // key.shape[1] * heads,) * 2
