"""Attention with dropout on the CPU, where torch has no fused kernel for it.

torch's ``scaled_dot_product_attention`` takes its plain path there: it draws and keeps a float for
every probability, keeps the probabilities before and after dropout, and searches each row for a
query that sees nothing. Here a probability costs 16 random bits and keeps one byte beside itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peftlab.models.dropout import draw_kept, draws_fast

_sdpa: Any = nn.functional.scaled_dot_product_attention
_HALF = (torch.float16, torch.bfloat16)
_MARK = "_peftlab_draws_fast"

# An operation, so that what computes it again later sees it as one.
_library = torch.library.Library("peftlab", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "attention_scores(Tensor query, Tensor key, Tensor? bias, float scale, int heads) -> Tensor"
)
SCORES: Any = torch.ops.peftlab.attention_scores.default
"""s Q Kᵀ + bias, with Q (rows · heads, queries, dim), K (rows · heads, keys, dim) and a bias
broadcastable to the result, (rows, heads, queries, keys), which does not learn. One pass over the
result fewer than of a product and a sum, and none over the queries for the scale."""


def draw_attention_dropout_fast(model: nn.Module) -> None:
    """Let a transformers model drop attention probabilities as ``Dropout`` drops elements.

    Where its attention is ``sdpa``, by name and by what it computes, it stays so: transformers'
    function still prepares the inputs, and runs untouched outside of training, without dropout, on
    other devices, in compiled models, and in models that were not given here.
    """
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    registered: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if getattr(registered, "func", None) is not _attend:
        AttentionInterface.register("sdpa", partial(_attend, registered))
    for module in model.modules():
        # Where a module finds the name of its attention function.
        if hasattr(module, "config"):
            setattr(module, _MARK, True)


def _attend(
    original: Callable[..., Any], module: nn.Module, query: Tensor, *args: Any, **kwargs: Any
) -> Any:
    drops = kwargs.get("dropout", 0.0) > 0
    if not (drops and hasattr(module, _MARK)) or torch.compiler.is_compiling():
        return original(module, query, *args, **kwargs)
    with _OwnAttention():
        return original(module, query, *args, **kwargs)


class _OwnAttention(TorchFunctionMode):
    """Inside, torch's function is ``attention``.

    A function put in torch's place, as the emulation of CUDA does, is none of torch's and runs.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return (attention if func is _sdpa else func)(*args, **(kwargs or {}))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` with dropout drawn faster on the CPU.

    Probabilities are zero with probability round(dropout_p · 2¹⁶) / 2¹⁶, independently. What torch
    refuses, broadcasts or has a kernel for is left to it.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, heads, keys, head_dim).
        value: (batch, heads, keys, value_dim).
        attn_mask: broadcastable to (batch, heads, queries, keys): True where a query sees a key,
            or numbers to add. A query that sees none has the result zero.
        is_causal: a query sees the keys up to its own place, counted from the first; not with a
            mask.
        enable_gqa: keys and values have a head for several of the queries'.

    Returns:
        (batch, heads, queries, value_dim).
    """
    tensors = query, key, value
    heads = key.shape[-3] if enable_gqa else query.shape[-3]
    plain = (
        all(tensor.dim() == 4 for tensor in tensors)
        and key.shape[:2] == value.shape[:2] == (query.shape[0], heads)
        and not (is_causal and attn_mask is not None)
    )
    if not plain or not draws_fast(query, dropout_p):
        out: Tensor = _sdpa(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return out
    if torch.is_autocast_enabled("cpu") and query.dtype is not torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (tensor.to(dtype) for tensor in tensors)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    with torch.autocast("cpu", enabled=False):
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    probability: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    batch, heads, queries, head_dim = query.shape
    keys, dtype = key.shape[2], query.dtype
    if dtype in _HALF:
        # As torch does: half precision only between operations.
        query, key, value = query.float(), key.float(), value.float()
    if key.shape[1] != heads:
        groups = heads // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    if is_causal:
        mask = query.new_ones(queries, keys, dtype=torch.bool).tril()
    allowed = mask if mask is not None and mask.dtype is torch.bool else None
    if allowed is not None:
        # Not -∞: of a query that sees nothing the kept probabilities are zero, not undefined.
        mask = torch.zeros_like(allowed, dtype=query.dtype).masked_fill(
            allowed.logical_not(), torch.finfo(query.dtype).min
        )
    # The operation has no gradient of its third argument.
    learned, bias = (mask, None) if mask is not None and mask.requires_grad else (None, mask)
    scale = head_dim**-0.5 if scale is None else scale
    scores: Tensor = SCORES(query.flatten(0, 1), key.flatten(0, 1), bias, scale, heads)
    if learned is not None:
        scores = scores + learned
    softmax = torch.softmax if mask is None or allowed is not None else torch._safe_softmax
    probabilities = softmax(scores, -1)
    del scores
    kept = draw_kept(query, (batch, heads, queries, keys), probability, allowed)
    product: Any = _KeptProduct.apply(  # type: ignore[no-untyped-call]
        probabilities.flatten(0, 1), value.flatten(0, 1), kept.flatten(0, 1), 1 / (1 - probability)
    )
    out: Tensor = product.view(batch, heads, queries, -1).to(dtype)
    return out


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, scale: float, heads: int) -> Tensor:
    out = _scaled_product(query, key.transpose(1, 2), scale)
    out = out.view(-1, heads, *out.shape[1:])
    return out if bias is None else out.add_(bias)


def _no_scores(query: Tensor, key: Tensor, bias: Tensor | None, scale: float, heads: int) -> Tensor:
    rows = query.shape[0] // heads
    return query.new_empty(rows, heads, query.shape[1], key.shape[1])


class _Scores(torch.autograd.Function):
    """Gradients, with g for the result's: Q: s g K; K: s gᵀ Q."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        scale: float,
        heads: int,
        grad_enabled: bool,
    ) -> Tensor:
        learns_query, learns_key, *_ = ctx.needs_input_grad
        ctx.save_for_backward(query if learns_key else None, key if learns_query else None)
        ctx.scale = scale
        # For what watches operations, in the mode that torch's own would have.
        with torch.set_grad_enabled(grad_enabled), torch._C._AutoDispatchBelowAutograd():
            scores: Tensor = SCORES(query, key, bias, scale, heads)
        return scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key = ctx.saved_tensors
        grad = grad.flatten(0, 1)
        grad_query = grad_key = None
        if ctx.needs_input_grad[0]:
            grad_query = _scaled_product(grad, key, ctx.scale)
        if ctx.needs_input_grad[1]:
            grad_key = _scaled_product(grad.transpose(1, 2), query, ctx.scale)
        return grad_query, grad_key, None, None, None, None


def _differentiable_scores(*arguments: Any) -> Tensor:
    scores: Tensor = _Scores.apply(*arguments, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return scores


_library.impl("attention_scores", _scores, "CPU")  # type: ignore[no-untyped-call]
_library.impl("attention_scores", _no_scores, "Meta")  # type: ignore[no-untyped-call]
_library.impl("attention_scores", _differentiable_scores, "Autograd")  # type: ignore[no-untyped-call]


class _KeptProduct(torch.autograd.Function):
    """s (P ∘ K) V, with P (n, queries, keys), V (n, keys, dim), K of P's shape, zeros and ones.

    P ∘ K is computed again. Gradients, with g for the result's: P: s K ∘ (g Vᵀ); V: s (P ∘ K)ᵀ g.
    """

    @staticmethod
    def forward(
        ctx: Any, probabilities: Tensor, value: Tensor, kept: Tensor, scale: float
    ) -> Tensor:
        learns_probabilities, learns_value, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            probabilities if learns_value else None, value if learns_probabilities else None, kept
        )
        ctx.scale = scale
        return _scaled_product(kept.to(probabilities.dtype).mul_(probabilities), value, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        probabilities, value, kept = ctx.saved_tensors
        # Once for both: the cast costs as much as the product.
        kept = kept.to(grad.dtype)
        grad_probabilities = grad_value = None
        if ctx.needs_input_grad[0]:
            grad_probabilities = _scaled_product(grad, value.transpose(1, 2), ctx.scale).mul_(kept)
        if ctx.needs_input_grad[1]:
            # In place unless a second derivative needs it.
            again = torch.is_grad_enabled()
            masked = kept * probabilities if again else kept.mul_(probabilities)
            grad_value = _scaled_product(masked.transpose(1, 2), grad, ctx.scale)
        return grad_probabilities, grad_value, None, None


def _scaled_product(one: Tensor, other: Tensor, scale: float) -> Tensor:
    """The batched product times a number, without a pass for the number."""
    out = one.new_empty(one.shape[0], one.shape[1], other.shape[2])
    return out.baddbmm_(one, other, beta=0, alpha=scale)
