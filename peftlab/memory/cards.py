"""Memory of named cards, and what a process takes beside its tensors. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peftlab.errors import ConfigError, Problem
from peftlab.registry import did_you_mean
from peftlab.units import GIB, MIB, parse_bytes


@dataclass(frozen=True)
class Card:
    """What a process sees of a card: less than is sold, and less than ``nvidia-smi`` shows.

    Args:
        source: of ``memory_bytes``, a public report on github.com: the "total capacity" of torch's
            out-of-memory message, or the total of ``nvidia-smi``.
    """

    memory_bytes: int
    source: str


def _torch(gibibytes: float, thread: str) -> Card:
    return Card(int(gibibytes * GIB), f"torch: {gibibytes} GiB; github.com/{thread}")


def _smi(mebibytes: int, thread: str) -> Card:
    return Card(mebibytes * MIB, f"nvidia-smi: {mebibytes} MiB; github.com/{thread}")


CARDS: Mapping[str, Card] = {
    "t4": _torch(14.56, "Zheng-Chong/CatVTON/issues/133"),
    "v100-16gb": _torch(15.78, "kchengiva/Shift-GCN/issues/34"),
    "v100-32gb": _torch(31.74, "liucongg/ChatGLM-Finetuning/issues/73"),
    "rtx3060": _torch(11.75, "Kunhao-Liu/StyleGaussian/issues/12"),
    "rtx3090": _torch(23.70, "GaoLii/DSP/issues/10"),
    "rtx4090": _torch(23.52, "Soul-AILab/SoulX-FlashTalk/issues/5"),
    "l4": _torch(22.03, "ArcInstitute/evo2/issues/190"),
    "a10": _torch(21.99, "zai-org/CogVLM/issues/236"),
    "a100-40gb": _torch(39.50, "TianheWu/CoSeR/issues/10"),
    "a100-80gb": _torch(79.25, "levihsu/OOTDiffusion/issues/235"),
    "l40s": _torch(44.42, "stepfun-ai/Step-Video-T2V/issues/8"),
    "h100": _torch(79.11, "vllm-project/vllm/issues/27508"),
    "h200": _smi(143771, "xlite-dev/LeetCUDA/pull/415"),
    "b200": _torch(178.35, "pytorch/ao/pull/4002"),
}
_ALIASES = {"a10g": "a10"}

CUDA_CONTEXT_BYTES = 512 * MIB
"""CUDA's context and the kernels loaded into it, beside what the allocator holds: about 300 MB
since CUDA 11.7 loads kernels when they are first used, above 1,000 MB before
(github.com/pytorch/pytorch/issues/107667); the rest is for kernels of cuBLAS and attention."""

CPU_PROCESS_BYTES = 512 * MIB
"""Python with torch, transformers, PEFT and bitsandbytes imported: 0.47 GiB resident on Linux."""


def memory_of(text: str) -> int:
    """``"24GiB"`` or a card's name → bytes.

    Raises:
        ConfigError: neither a size nor a known card.
    """
    name = text.strip().lower().replace(" ", "").replace("_", "-")
    if (card := CARDS.get(_ALIASES.get(name, name))) is not None:
        return card.memory_bytes
    try:
        return parse_bytes(text)
    except ValueError:
        message = f"{text!r} is neither a size like 24GiB nor a known card."
        raise ConfigError(Problem("--memory", message, did_you_mean(name, CARDS))) from None
