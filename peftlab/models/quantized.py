"""Bases in 4 or 8 bits through bitsandbytes: their settings, and their shape without weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import BitsAndBytesConfig, PreTrainedModel

Quantization = Literal["nf4", "int8"]


def quantization_config(
    shell: PreTrainedModel, quantization: Quantization, bf16: bool
) -> BitsAndBytesConfig:
    """What a model is loaded with: QLoRA's settings for nf4 (Dettmers et al. 2023, §3), or int8.

    Args:
        shell: the architecture, with or without storage; its heads stay as they are.
        bf16: multiply in bfloat16, where the device has it; else in float32.
    """
    import torch
    from transformers import BitsAndBytesConfig

    skip = _heads(shell)
    if quantization == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_once)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        llm_int8_skip_modules=skip,
    )


def quantize_shell(model: PreTrainedModel, quantization: Quantization, bf16: bool) -> list[str]:
    """Turn a model that was built from its config into what loading it quantised would give.

    For planning: the tensors may be fake, which bitsandbytes' own parameters cannot be.

    Returns:
        what a real run may do otherwise.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    config: Any = quantization_config(model, quantization, bf16)
    skip = [*config.llm_int8_skip_modules, *(model._keep_in_fp32_modules or ())]
    for name, module in list(model.named_modules()):
        if type(module) not in (nn.Linear, Conv1D) or not should_convert_module(name, skip):
            continue
        weight, bias = module.weight.detach(), module.bias
        if isinstance(module, Conv1D):
            weight = weight.T
        made = _in_4_bits(weight, config) if quantization == "nf4" else _in_8_bits(weight, config)
        made.out_features, made.in_features = weight.shape
        made.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        made.source_cls = type(module)
        model.set_submodule(name, made)
    settle_quantized(model)
    marked: Any = model
    marked.is_quantized = True
    marked.is_loaded_in_4bit, marked.is_loaded_in_8bit = (
        quantization == "nf4",
        not config.load_in_4bit,
    )
    if quantization == "int8":
        return ["planned as if no activation were an outlier of int8's threshold"]
    return []


def settle_quantized(model: nn.Module) -> None:
    """Do to 4-bit layers now what bitsandbytes would do while they compute, or keep it from it."""
    module: Any
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        # In its first evaluation it would repack the weights, with scales rounded to bf16, for a
        # kernel through which no gradient flows.
        module.support_avx512bf16_for_cpu = False
        if module.bias is not None:
            # Its forward casts the bias for good, and a frozen parameter would change.
            module.bias.data = module.bias.data.to(module.compute_dtype)


def _in_4_bits(weight: torch.Tensor, config: Any) -> Any:
    import bitsandbytes as bnb
    import torch
    from torch import nn

    packed, state = bnb.functional.quantize_4bit(
        weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    # A state dict reads its value, which computed fake tensors do not have.
    state.offset = torch.zeros(())
    made: Any = _bare(bnb.nn.Linear4bit)
    made.weight = nn.Parameter(packed, requires_grad=False)
    made.weight.quant_state = made.quant_state = state
    made.weight.compress_statistics, made.weight.quant_type = True, "nf4"
    made.compute_dtype, made.compute_type_is_set = config.bnb_4bit_compute_dtype, True
    made.quant_storage = torch.uint8
    made.support_avx512bf16_for_cpu = False
    return made


def _in_8_bits(weight: torch.Tensor, config: Any) -> Any:
    import bitsandbytes as bnb
    import torch
    from torch import nn

    rows, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
    made: Any = _bare(bnb.nn.Linear8bitLt)
    made.weight = nn.Parameter(rows, requires_grad=False)
    made.weight.has_fp16_weights = False
    made.weight.CB, made.weight.SCB = rows, scales
    made.state, made.index = bnb.MatmulLtState(), None
    # With a threshold the number of outlier columns, and so the memory, depends on the data.
    made.state.threshold, made.state.has_fp16_weights = 0.0, False
    return made


@contextmanager
def cuda_products() -> Iterator[None]:
    """Inside, products with quantised weights allocate step by step what they do on CUDA.

    bitsandbytes decides by device and by the number of rows: nf4 weights are dequantised for more
    than a few hundred, and int8 activations are quantised too (backends/cuda/ops.py, 0.50).
    """
    import bitsandbytes as bnb
    import torch
    from bitsandbytes.autograd._functions import MatMul8bitLt
    from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

    kernels = torch.ops.bitsandbytes

    def int8_scaled_mm(
        a: Tensor, b: Tensor, rows: Tensor, columns: Tensor, bias: Any, dtype: torch.dtype
    ) -> Tensor:
        product = kernels.int8_linear_matmul.default(a, b)
        halves: Tensor = kernels.int8_mm_dequant.default(
            product, rows, columns, dtype=torch.float16, bias=bias
        )
        return halves.to(dtype)

    def matmul(a: Tensor, b: Tensor, bias: Any, state: Any) -> Any:
        return MatMul8bitLt.apply(a, b, None, bias, state)

    with (
        mock.patch.object(kernels, "gemm_4bit", SimpleNamespace(default=_gemm_4bit_default_impl)),
        mock.patch.object(kernels, "int8_scaled_mm", SimpleNamespace(default=int8_scaled_mm)),
        mock.patch.object(bnb, "matmul", matmul),
    ):
        yield


def _bare(kind: type[nn.Module]) -> nn.Module:
    """A module of this class whose constructor did not run: it would make parameters of its own."""
    from torch import nn

    made = kind.__new__(kind)
    nn.Module.__init__(made)
    return made


def _heads(model: PreTrainedModel) -> list[str]:
    """Modules to keep out of quantization: the head, a pooler, and output embeddings.

    bitsandbytes' own choice spares output embeddings and the very last module only, but a head in
    4 bits cannot be trained.
    """
    output = model.get_output_embeddings()
    heads = {name for name, module in model.named_modules() if module is output and name}
    if prefix := backbone_prefix(model):
        heads |= {name for name, _ in model.named_children() if name != prefix[:-1]}
    return sorted(heads | {name for name, _ in model.named_modules() if is_pooler(f"{name}.")})


def backbone_prefix(model: PreTrainedModel) -> str:
    """``bert.`` for a BERT with a head; empty where backbone and head are one module (T5)."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def is_pooler(name: str) -> bool:
    """Whether a tensor is a pooler's.

    Encoders pretrained as masked language models have none: it is part of the task head.
    """
    return ".pooler." in f".{name}"


_said: set[str] = set()


def _once(record: logging.LogRecord) -> bool:
    """A logging filter: bitsandbytes repeats itself at every layer of every step."""
    message = record.getMessage()
    repeated = message in _said
    _said.add(message)
    return not repeated
