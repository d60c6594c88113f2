"""Memory of named cards, and what a process takes beside its tensors. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from peftlab.errors import ConfigError, Problem
from peftlab.registry import did_you_mean
from peftlab.units import GIB, MIB, parse_bytes

CARDS: Mapping[str, int] = {
    "t4": 15 * GIB,
    "rtx3060": 12 * GIB,
    "rtx3090": 24 * GIB,
    "rtx4090": 24 * GIB,
    "l4": 22 * GIB,
    "a10g": 22 * GIB,
    "a100-40gb": 40 * GIB,
    "a100-80gb": 80 * GIB,
    "l40s": 45 * GIB,
    "h100": 80 * GIB,
    "h200": 141 * GIB,
}
"""What is usable: where the driver keeps error correction in memory, that is less than sold."""

CUDA_CONTEXT_BYTES = 512 * MIB
"""CUDA context and loaded kernels of a process: 0.3 to 0.6 GiB as reported by ``nvidia-smi`` above
what the allocator reserved; the middle, rounded up."""

CPU_PROCESS_BYTES = 512 * MIB
"""Python with torch, transformers, PEFT and bitsandbytes imported: 0.47 GiB resident on Linux."""


def memory_of(text: str) -> int:
    """``"24GiB"`` or a card's name → bytes.

    Raises:
        ConfigError: neither a size nor a known card.
    """
    name = text.strip().lower().replace(" ", "").replace("_", "-")
    if name in CARDS:
        return CARDS[name]
    try:
        return parse_bytes(text)
    except ValueError:
        message = f"{text!r} is neither a size like 24GiB nor a known card."
        raise ConfigError(Problem("--memory", message, did_you_mean(name, CARDS))) from None
