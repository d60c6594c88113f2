"""Published GPU peaks with their settings and sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peftlab.memory.allocator import cublas_workspaces
from peftlab.memory.cards import CARDS, Chip
from peftlab.models.config import PrecisionConfig
from peftlab.units import MIB

LLAMA_3B = {
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
BERT_LARGE = {
    "vocab_size": 30522,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_labels": 2,
}


@dataclass(frozen=True)
class Source:
    """Where figures come from, and how that source trains.

    Args:
        base_params: of the base model, as the source or the model's card counts them.
        padded: the batch has examples of several lengths, and so a mask.
        holds_outputs: the model's outputs, logits and cache of keys and values among them, live
            until the next forward has returned.
        context_bytes: what the source measured of an idle process, contained in its figures.
        attention: as ``attn_implementation``.
        keeps_softmax_input: torch 1.10 kept it for backward.
        empties_cache: before the longest batch, the loop empties the allocator's cache and then
            lets go of the gradients of the step before.
        chip: that it ran on.
        workspaces: of cuBLAS, in the allocator since torch 2.0 (github.com/pytorch/pytorch/issues/
            95668).
    """

    title: str
    measured: str
    model_type: str
    shape: Mapping[str, Any]
    base_params: int
    kind: Literal["causal_lm", "classification"]
    padded: bool
    holds_outputs: bool
    chip: Chip
    context_bytes: int = 0
    attention: str = "sdpa"
    keeps_softmax_input: bool = False
    empties_cache: bool = False
    workspaces: tuple[int, ...] = ()


METAMATH = Source(
    title="PEFT's method comparison: Llama-3.2-3B on MetaMathQA, batch 4, bf16 weights, adapters "
    "in fp32, AdamW (foreach), clipping, one L40S; github.com/huggingface/peft, "
    "method_comparison/MetaMathQA/results/*.json, accelerator_memory_max or cuda_memory_max",
    measured="torch.cuda.max_memory_reserved of the process (run.py, utils.py beside it)",
    model_type="llama",
    shape=LLAMA_3B,
    base_params=3_212_749_824,
    kind="causal_lm",
    padded=True,
    holds_outputs=True,
    empties_cache=True,
    chip=CARDS["l40s"].chip,
    workspaces=cublas_workspaces(CARDS["l40s"].chip.capability),
)
GUIDE = Source(
    title="transformers' guide to training on one GPU: bert-large-uncased, classification, "
    "512 tokens, AdamW (one tensor at a time), clipping, V100 16 GB, January 2022; "
    "github.com/huggingface/transformers at 0016acf7, docs/source/en/perf_train_gpu_one.mdx",
    measured="used memory by NVML after training, less the 1,343 MiB it shows for an idle process",
    model_type="bert",
    shape=BERT_LARGE,
    base_params=335_143_938,
    kind="classification",
    chip=CARDS["v100-16gb"].chip,
    padded=False,
    holds_outputs=False,
    context_bytes=1343 * MIB,
    attention="eager",
    keeps_softmax_input=True,
)
METAMATH_LENGTH = 704
"""Tokens of the longest batch: not reported, at most 768. Fitted on one row, ``FITTED``."""
FITTED = "LoRA r=32, q and v"


@dataclass(frozen=True)
class Peak:
    """One published figure and its settings.

    Args:
        reported_bytes: as published.
        reference: where in the source.
        why: what explains the deviation.
    """

    name: str
    source: Source
    reported_bytes: int
    reference: str
    method: Mapping[str, Any]
    why: str
    batch: int = 4
    length: int = METAMATH_LENGTH
    accumulation: int = 1
    checkpointing: bool = False
    optim: str = "adamw_foreach"
    precision: PrecisionConfig = field(default_factory=lambda: PrecisionConfig(dtype="bfloat16"))

    @property
    def reserved_bytes(self) -> int:
        """What the source's allocator held."""
        return self.reported_bytes - self.source.context_bytes


def _lora(r: int, target: tuple[str, ...] = ("q_proj", "v_proj"), **more: Any) -> dict[str, Any]:
    return {"kind": "lora", "r": r, "target_modules": target, "fused": False, **more}


def _metamath(name: str, reported: int, file: str, method: Mapping[str, Any], why: str) -> Peak:
    return Peak(name, METAMATH, reported, file, method, why)


def _guide(name: str, mebibytes: int, section: str, why: str, **settings: Any) -> Peak:
    values = {"length": 512, "optim": "adamw_loop", "precision": PrecisionConfig(), **settings}
    return Peak(name, GUIDE, mebibytes * MIB, section, {"kind": "full"}, why, **values)


# Of four micro-batches the last two hold no more than the second.
_SMALL = {"batch": 1, "accumulation": 2}
_FP16 = {"precision": PrecisionConfig(fp16=True)}
_SAME = "same batches, nothing fitted"
_OLD = (
    "grows with the batch, gone with checkpointing: activations that the software of 2022 kept; "
    "not traced"
)
_FEW = "probably kernels loaded after the idle figure was taken, which the report contains"
PEAKS = (
    _metamath(
        FITTED,
        22_273_851_392,
        "lora--llama-3.2-3B-rank32",
        _lora(32),
        "the length of the longest batch is fitted here",
    ),
    _metamath("LoRA r=64, q and v", 22_540_189_696, "lora--llama-3.2-3B-rank64", _lora(64), _SAME),
    _metamath(
        "LoRA r=10, feed-forward",
        24_712_839_168,
        "lora--llama-3.2-3B-rank10-target-mlp",
        _lora(10, ("up_proj", "gate_proj", "down_proj")),
        _SAME,
    ),
    _metamath(
        "DoRA r=32, q and v",
        24_540_872_704,
        "lora--llama-3.2-3B-rank32-dora",
        _lora(32, use_dora=True),
        _SAME,
    ),
    _metamath(
        "prefix of 200 tokens",
        20_912_799_744,
        "prefixtuning--llama-3.2-3B-lr_0.001",
        {"kind": "ptuning_v2", "num_virtual_tokens": 200},
        "same batches; not traced (PEFT 0.15 and transformers 4.52 there)",
    ),
    _metamath(
        "norms",
        21_179_138_048,
        "ln_tuning--llama-3.2-3B-default",
        {"kind": "freeze", "patterns": ("norm",)},
        "same batches; PEFT trains a copy of each norm, a plan the norm itself",
    ),
    _metamath(
        "full",
        37_241_225_216,
        "full-finetuning--llama-3.2-3B-lr_0.00001",
        {"kind": "full"},
        "same batches, nothing fitted; here it counts that the loop empties the cache while the "
        "gradients of the step before are alive: their blocks stay and are used again",
    ),
    _guide("fp32, batch 4", 14949, "Vanilla Training", _OLD),
    _guide("fp32, batch 1 × 4", 8681, "Gradient Accumulation", _OLD, **_SMALL),
    _guide(
        "fp32, batch 1 × 4, checkpointing",
        6775,
        "Gradient Checkpointing",
        _FEW,
        **_SMALL,
        checkpointing=True,
    ),
    _guide("fp16 autocast, batch 4", 13939, "FP16 Training", _OLD, **_FP16),
    _guide(
        "fp16 autocast, batch 1 × 4, checkpointing",
        7275,
        "FP16 Training",
        _FEW,
        **_SMALL,
        **_FP16,
        checkpointing=True,
    ),
    _guide("fp32, batch 4, 8-bit Adam", 13085, "8-bit Adam", _OLD, optim="adamw_8bit_kept"),
    _guide(
        "fp16 autocast, batch 1 × 4, checkpointing, 8-bit Adam",
        5363,
        "8-bit Adam",
        _FEW,
        **_SMALL,
        **_FP16,
        checkpointing=True,
        optim="adamw_8bit_kept",
    ),
)
