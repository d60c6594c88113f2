"""Floating-point operations of a stretch of code, by torch's formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)


def _product(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * int(prod(a.shape)) * int(b.shape[-1])


def _sum_and_product(_: Any, a: Any, b: Any, *__: Any, **___: Any) -> int:
    return _product(a, b)


def _int8(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * int(prod(a.shape)) * int(b.shape[0])


def _int8_mixed(a: Any, ca: Any, cb: Any, *_: Any, **__: Any) -> int:
    return 2 * int(prod(a.shape)) * int(cb.shape[0])


def _four_bit(a: Any, b: Any, shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * int(prod(a.shape)) * int(shape[0])


def _scores(query: Any, key: Any, *_: Any, **__: Any) -> int:
    return 2 * int(prod(query.shape)) * int(key.shape[-2])


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    count = sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return int(count)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    shapes = grad.shape, query.shape, key.shape, value.shape
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


_OWN: dict[str, Callable[..., int]] = {
    "aten::mm": _product,
    "aten::bmm": _product,
    "aten::addmm": _sum_and_product,
    "aten::baddbmm": _sum_and_product,
    "bitsandbytes::int8_linear_matmul": _int8,
    "bitsandbytes::int8_scaled_mm": _int8,
    "bitsandbytes::int8_mixed_scaled_mm": _int8_mixed,
    "bitsandbytes::gemm_4bit": _four_bit,
    "bitsandbytes::gemv_4bit": _four_bit,
    "peftlab::attention_scores": _scores,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
"""What torch has no formula for: quantised weights, attention on the CPU. The commonest products
are here because torch's formulas take ten times as long to call. An operation in place, for which
torch has none either, counts as the one it is named after."""


@cache
def flop_formula(func: Any) -> Callable[..., int] | None:
    """For one operation: its arguments, and ``out_val``, to floating-point operations.

    None for all but products, which are not counted.
    """
    packet = func._overloadpacket
    formula: Callable[..., int] | None = flop_registry.get(packet)
    return _OWN.get(packet._qualified_op_name.removesuffix("_"), formula)


class count_flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context that adds up ``flops``: matrix products, convolutions and attention.

    A multiply-add counts as two. Backward and checkpointing's recomputation are included.
    ``torch.utils.flop_counter.FlopCounterMode`` would put hooks on every module, which keep tensors
    alive and lose their place when checkpointing repeats a forward.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The guard that hides it from the compiler has its price at every operation.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_formula(func)) is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


_SHORTER = 0.75
"""Rows are counted again at this share of the shortest length that was: a token's part in
attention is then less by a quarter."""


class FlopsByLength:
    """Operations of computing many rows, the longest first, counted in few of the batches.

    Counting has its price at every operation. What a transformer does for a token is the same
    products in every row and attention to so many others, so between two lengths that were counted
    the others follow, by a straight line. Rows a little shorter than the shortest counted are taken
    to be like it.
    """

    def __init__(self) -> None:
        self._counted: dict[int, float] = {}
        self._tokens: dict[int, int] = {}

    def of(
        self, compute: Callable[[Mapping[str, Tensor]], Tensor], inputs: Mapping[str, Tensor]
    ) -> Tensor:
        """What ``compute`` makes of inputs whose ``input_ids`` are (rows, tokens)."""
        rows, length = inputs["input_ids"].shape
        self._tokens[length] = self._tokens.get(length, 0) + rows * length
        if self._counted and length > _SHORTER * min(self._counted):
            return compute(inputs)
        with count_flops() as counter:
            values = compute(inputs)
        self._counted[length] = counter.flops / (rows * length)
        return values

    @property
    def flops(self) -> int:
        """Of all that was computed."""
        if not self._counted:
            return 0
        lengths = sorted(self._counted)
        by_token = np.interp(list(self._tokens), lengths, [self._counted[each] for each in lengths])
        return round(float(by_token @ list(self._tokens.values())))
