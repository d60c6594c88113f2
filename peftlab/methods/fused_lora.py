"""LoRA's linear layer as one autograd function: the input is kept once, its copies made again.

PEFT's own layer is a chain of operations. Each of them keeps what it reads: a copy of the input in
the adapter's precision, the input after dropout, the dropout mask, the low-rank product; and each
makes a result of its own. Here the layer keeps the tensor that it was given, which layers that read
the same tensor share, and one byte per element where there is dropout; on a CPU also the low-rank
product, whose few columns cost as long to compute as to read the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from peftlab.anatomy import calls_nothing_else


def lora_layers(model: nn.Module) -> list[LoraLayer]:
    """The layers that PEFT put an update on, of whichever kind."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def fuse_lora_layers(model: nn.Module) -> int:
    """Give PEFT's LoRA linear layers the fused forward; parameters, names and files stay PEFT's.

    Returns:
        How many layers it applies to: updates of a plain linear matrix (``nn.Linear``, or GPT-2's
        ``Conv1D``) without DoRA, other variants or a bias of their own. The others run PEFT's
        forward, and so does a fused layer whenever its adapter is off, merged or one of several.
    """
    fused = 0
    for layer in lora_layers(model):
        if type(layer) is Linear and (name := _only_adapter(layer)) and _is_plain(layer, name):
            layer.__class__ = FusedLinear
            fused += 1
    return fused


@contextmanager
def cuda_layers() -> Iterator[None]:
    """Inside, tensors on the CPU stand for some on CUDA, where the layer does other things."""
    # A mock would remember the tensors that it was asked about, and so keep their memory.
    with mock.patch(f"{__name__}._on_cpu", _on_none):
        yield


class FusedLinear(Linear):  # type: ignore[misc]
    """PEFT's layer with another forward. Made by ``fuse_lora_layers``, never constructed."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x``: (..., in) → (..., out)."""
        name = _only_adapter(self)
        if args or kwargs or name is None or not _is_plain(self, name):
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        base, dropout = self.base_layer, self.lora_dropout[name]
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        autocast, scaling, keep = _autocast_dtype(x), self.scaling[name], None
        if isinstance(dropout, nn.Dropout) and dropout.training:
            scaling /= 1 - dropout.p
            keep = _draw_kept(dropout, x, autocast or a.dtype)
        with _unwatched():
            matrix = base.weight if isinstance(base, Conv1D) else base.weight.t()
            settings = _Settings(scaling, autocast)
            fused: Tensor = _LoraLinear.apply(x, matrix, base.bias, a, b, keep, settings)  # type: ignore[no-untyped-call]
        return fused


_HALF = (torch.bfloat16, torch.float16)


class _Settings(NamedTuple):
    """``scaling`` of the update, and of what dropout keeps."""

    scaling: float
    autocast: torch.dtype | None


def _only_adapter(layer: Linear) -> str | None:
    """The adapter that is to be added to the base layer's result, if it is exactly one."""
    if layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    return active[0] if len(active) == 1 else None


def _is_plain(layer: Linear, name: str) -> bool:
    """Whether the layer is x W + bias + scaling · dropout(x) Aᵀ Bᵀ with W frozen, and no more."""
    base, down, up = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    return (
        type(base) in (nn.Linear, Conv1D)
        and not base.weight.requires_grad
        and name not in layer.lora_variant
        and not layer.lora_bias[name]
        and layer.cast_input_dtype_enabled
        and all(calls_nothing_else(module) for module in (base, down, up))
    )


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    # Autocast leaves double precision alone.
    if not torch.is_autocast_enabled(device) or x.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _unwatched() -> AbstractContextManager[Any]:
    """No mode sees torch's calls in here: there is nothing to note, and seeing takes time."""
    # The compiler traces through; it does not know the other.
    return nullcontext() if torch.compiler.is_compiling() else torch._C.DisableTorchFunction()


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _on_none(tensor: Tensor) -> bool:
    return False


class _LoraLinear(torch.autograd.Function):
    """y = x W + bias + s (x ∘ K) Aᵀ Bᵀ, with W (in, out), A (r, in), B (out, r).

    K, zeros and ones, is dropout's; without it, x stands for x ∘ K. The update is computed in the
    adapter's precision, or autocast's, and added to the base layer's result before that is rounded,
    as PEFT does. Gradients, with g for y's:
    B: s gᵀ (x ∘ K) Aᵀ; A: s (g B)ᵀ (x ∘ K); x: g Wᵀ + s K ∘ (g B) A. On CUDA, where memory is
    scarcer than time, (x ∘ K) Aᵀ is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        keep: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        scaling, autocast = settings
        _, _, _, learns_a, learns_b, _, _ = ctx.needs_input_grad
        with _without_autocast(x):
            rows, wide = _as(x.reshape(-1, x.shape[-1]), autocast), _as(matrix, autocast)
            y = rows @ wide if bias is None else torch.addmm(_as(bias, autocast), rows, wide)
            down, up = _as(a, autocast), _as(b, autocast)
            low = _kept_of(rows.to(down.dtype), keep) @ down.t()
            _add_product(y, low, up.t(), scaling)
        ctx.settings, ctx.shape, ctx.x_dtype = settings, x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        kept_low = low if learns_b and _on_cpu(x) else None
        keeps_x = learns_a or (learns_b and kept_low is None)
        ctx.save_for_backward(x if keeps_x else None, matrix, a, b, keep, kept_low)
        # As matmul does: a view made in here could not be changed in place by its reader.
        out: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix, a, b, keep, low = ctx.saved_tensors
        learns_x, _, learns_bias, learns_a, learns_b, _, _ = ctx.needs_input_grad
        scaling, autocast = ctx.settings
        grad_x = grad_bias = grad_a = grad_b = None
        with _without_autocast(grad):
            grad = grad.reshape(-1, grad.shape[-1])
            down, up = _as(a, autocast), _as(b, autocast)
            into_update = grad.to(down.dtype)
            into_product = into_update @ up
            if x is not None:
                rows = _as(x.reshape(-1, x.shape[-1]), autocast).to(down.dtype)
                rows = _kept_of(rows, keep)
                if learns_a:
                    grad_a = (into_product.t() @ rows).to(a.dtype).mul_(scaling)
                if learns_b and low is None:
                    low = rows @ down.t()
                del rows
            if learns_b:
                # A tall result of few columns is the slower way round.
                grad_b = (low.t() @ into_update).t().to(b.dtype).mul(scaling)
            del into_update, low
            if learns_x:
                grad_x = (grad @ _as(matrix, autocast).t()).to(ctx.x_dtype)
                if keep is None:
                    _add_product(grad_x, into_product, down, scaling)
                else:
                    grad_x.add_((into_product @ down).mul_(keep), alpha=scaling)
                grad_x = grad_x.view(ctx.shape)
            if learns_bias:
                grad_bias = grad.sum(0).to(ctx.bias_dtype)
        return grad_x, None, grad_bias, grad_a, grad_b, None, None


def _as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def _draw_kept(dropout: nn.Dropout, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Dropout's zeros and ones for ``x`` as bytes, (rows, in); drawn as the module itself draws."""
    # peftlab's own module draws bytes; torch's can only be asked for a result.
    draw: Any = getattr(dropout, "draw", None)
    kept: Tensor | None = None if draw is None else draw(x)
    if kept is None:
        # For as many elements in the same layout as in PEFT. Bits would be an eighth of the bytes.
        kept = dropout(torch.ones_like(x, dtype=dtype)).bool().view(torch.uint8)
    return kept.reshape(-1, x.shape[-1])


def _kept_of(rows: Tensor, keep: Tensor | None) -> Tensor:
    """What dropout leaves of them."""
    if keep is None:
        return rows
    if _on_cpu(rows):
        # There a product of two dtypes would first make the same copy, and then another.
        return keep.to(rows.dtype).mul_(rows)
    return rows * keep


def _add_product(total: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """``total += scaling · left @ right``; in a narrower ``total``, rounded once."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scaling)
    elif _on_cpu(total) and total.dtype in _HALF:
        # There an addition of two dtypes takes as long as all of this.
        total.copy_(total.to(left.dtype).addmm_(left, right, alpha=scaling))
    else:
        total.add_(left @ right, alpha=scaling)
