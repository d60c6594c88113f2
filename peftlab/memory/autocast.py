"""CUDA's autocast on tensors of the CPU: which operations it casts, and to what.

``torch.autocast("cpu")`` has lists of its own: softmax, layer norm and ``pow`` stay in bf16 there
and are fp32 on CUDA. For a while the dispatcher's kernels for CPU autocast are replaced by kernels
that follow CUDA's lists. A dispatcher kernel, unlike a ``TorchFunctionMode``, is also there in
backward, where checkpointing repeats a forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# aten/src/ATen/autocast_mode.h: AT_FORALL_LOWER_PRECISION_FP, AT_FORALL_FP32,
# AT_FORALL_FP32_SET_OPT_DTYPE, AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE, AT_FORALL_PROMOTE.
LOWER_PRECISION = _names(
    """_convolution.deprecated _convolution conv1d conv2d conv3d conv_tbc conv_transpose1d
    conv_transpose2d.input conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum
    mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul linalg_multi_dot
    _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
    _scaled_dot_product_flash_attention scaled_dot_product_attention"""
)
FP32 = _names(
    """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan
    pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm rms_norm
    group_norm frobenius_norm.dim nuclear_norm nuclear_norm.dim cosine_similarity poisson_nll_loss
    cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss
    huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
    triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm
    logsumexp upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d
    _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d upsample_linear1d
    upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d
    _upsample_bicubic2d_aa"""
)
FP32_OUTPUT = _names(
    """prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm
    linalg_matrix_norm linalg_matrix_norm.str_ord sum sum.dim_IntList"""
)
FP32_NORM = {"norm.Scalar": "ScalarOpt_dtype", "norm.ScalarOpt_dim": "ScalarOpt_dim_dtype"}
PROMOTE = _names(
    """addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot
    scatter_add"""
)

_CPU = "AutocastCPU"
_Kernel = Callable[..., Any]


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Inside, ``torch.autocast("cpu", dtype)`` does what ``torch.autocast("cuda", dtype)`` would.

    Weights cast for a product are cached until the outermost autocast ends, as on CUDA.
    """
    registered = torch._C._dispatch_get_registrations_for_dispatch_key(_CPU)
    on_cpu = {name.removeprefix("aten::") for name in registered}
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
            for name, kernel in _kernels(on_cpu).items():
                library.impl(name, kernel, _CPU)  # type: ignore[no-untyped-call]
        yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]


def _kernels(on_cpu: set[str]) -> dict[str, _Kernel]:
    """What to put in the place of the CPU's kernels, by operation."""
    kernels: dict[str, _Kernel] = {}
    # What both cast to the lower precision is left to torch, which caches the casts.
    kernels |= {name: _casting(name, _lower_dtype) for name in LOWER_PRECISION - on_cpu}
    kernels |= {name: _casting(name, lambda _: torch.float32) for name in FP32}
    kernels |= {name: _casting(name, _widest) for name in PROMOTE}
    kernels |= {name: _with_fp32_output(name) for name in FP32_OUTPUT}
    kernels |= {name: _norm(name, into) for name, into in FP32_NORM.items()}
    for name in on_cpu - LOWER_PRECISION - kernels.keys():
        kernels[name] = torch.library.fallthrough_kernel
    return kernels


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _is_eligible(value: Any) -> bool:
    """As ``at::autocast::is_eligible``: floating point, and not double."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _lower_dtype(arguments: Any) -> torch.dtype:
    return torch.get_autocast_dtype("cpu")


def _widest(arguments: Any) -> torch.dtype:
    dtypes = [leaf.dtype for leaf in tree_leaves(arguments) if _is_eligible(leaf)]
    return torch.float32 if torch.float32 in dtypes else _lower_dtype(arguments)


def _without_autocast() -> Any:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    return torch._C._ExcludeDispatchKeyGuard(keys)


def _casting(name: str, dtype_of: Callable[[Any], torch.dtype]) -> _Kernel:
    operator = _operator(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            dtype = dtype_of((args, kwargs))

            def cast(tensor: Tensor) -> Tensor:
                return tensor.to(dtype) if _is_eligible(tensor) else tensor

            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
            return operator(*args, **kwargs)

    return kernel


def _with_fp32_output(name: str) -> _Kernel:
    """The operation casts as it reads; an output type that the caller chose stays."""
    operator = _operator(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = _by_name(operator, args, kwargs)
        with _without_autocast():
            if given["dtype"] is None and _is_eligible(given["self"]):
                given["dtype"] = torch.float32
            return operator(given.pop("self"), **given)

    return kernel


def _norm(name: str, into: str) -> _Kernel:
    operator, with_dtype = _operator(name), getattr(torch.ops.aten.norm, into)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = _by_name(operator, args, kwargs)
        with _without_autocast():
            if not _is_eligible(given["self"]):
                return operator(*args, **kwargs)
            return with_dtype(given.pop("self"), **given, dtype=torch.float32)

    return kernel


def _by_name(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every argument, defaults included."""
    declared = operator._schema.arguments
    defaults = {each.name: each.default_value for each in declared if each.has_default_value()}
    return defaults | dict(zip((each.name for each in declared), args, strict=False)) | kwargs
