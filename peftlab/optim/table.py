"""Facts about optimizers, as data. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peftlab.registry import unknown


@dataclass(frozen=True)
class OptimizerInfo:
    """One optimizer.

    Args:
        summary: one line, with what its state costs.
        factory: "module:attribute" of the class.
        adam: takes betas and eps; else momentum.
        extra: further keyword arguments.
        state_bits: bits per element and state tensor; tensors of fewer than
            ``min_quantized_size`` elements keep 32.
        paged: state may move to host memory on CUDA; elsewhere it stays where it is.
        shards: it updates parameters that are sharded over processes (``DTensor``).
    """

    summary: str
    factory: str
    adam: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    state_bits: int = 32
    min_quantized_size: int = 0
    paged: bool = False
    shards: bool = False


_BNB_8BIT = {"state_bits": 8, "min_quantized_size": 4096}
OPTIMIZERS: Mapping[str, OptimizerInfo] = {
    "adamw_torch": OptimizerInfo(
        "AdamW (Loshchilov & Hutter 2019), fused kernel; 8 bytes a parameter",
        "torch.optim:AdamW",
        extra={"fused": True},
        shards=True,
    ),
    "sgd": OptimizerInfo(
        "SGD; no state without momentum, 4 bytes a parameter with it",
        "torch.optim:SGD",
        adam=False,
        extra={"fused": True},
    ),
    "adamw_8bit": OptimizerInfo(
        "bitsandbytes AdamW, block-wise 8-bit state (Dettmers et al. 2022); 2 bytes a parameter",
        "bitsandbytes.optim:AdamW8bit",
        **_BNB_8BIT,  # type: ignore[arg-type]
    ),
    "paged_adamw_8bit": OptimizerInfo(
        "adamw_8bit whose state moves to host memory when CUDA runs short",
        "bitsandbytes.optim:PagedAdamW8bit",
        paged=True,
        **_BNB_8BIT,  # type: ignore[arg-type]
    ),
    "paged_adamw_32bit": OptimizerInfo(
        "32-bit AdamW whose state moves to host memory when CUDA runs short",
        "bitsandbytes.optim:PagedAdamW32bit",
        paged=True,
    ),
}
ALIASES: Mapping[str, str] = {
    "adamw": "adamw_torch",
    "adamw_torch_fused": "adamw_torch",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
}


def optimizer_info(name: str, where: str = "") -> OptimizerInfo:
    """The facts about ``name`` or its alias.

    Raises:
        UnknownNameError: with the nearest names.
    """
    name = ALIASES.get(name, name)
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, (*OPTIMIZERS, *ALIASES), where)
    return OPTIMIZERS[name]
