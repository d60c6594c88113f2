"""Memory of named cards, and what a process takes beside its tensors. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peftlab.errors import ConfigError, Problem
from peftlab.registry import did_you_mean
from peftlab.units import GIB, MIB, parse_bytes


@dataclass(frozen=True)
class Chip:
    """What of a chip decides which kernels run and what they allocate.

    Args:
        capability: compute capability.
        multiprocessors: how many there are.
        threads: that one of them can hold.
    """

    capability: tuple[int, int] = (8, 0)
    multiprocessors: int = 108
    threads: int = 2048


@dataclass(frozen=True)
class Card:
    """What a process sees of a card: less than is sold, and less than ``nvidia-smi`` shows.

    Args:
        chip: NVIDIA's data sheet of it.
        source: of ``memory_bytes``, a public report on github.com: the "total capacity" of torch's
            out-of-memory message, or the total of ``nvidia-smi``.
    """

    memory_bytes: int
    chip: Chip
    source: str


def _torch(gibibytes: float, chip: Chip, thread: str) -> Card:
    return Card(int(gibibytes * GIB), chip, f"torch: {gibibytes} GiB; github.com/{thread}")


def _smi(mebibytes: int, chip: Chip, thread: str) -> Card:
    return Card(mebibytes * MIB, chip, f"nvidia-smi: {mebibytes} MiB; github.com/{thread}")


_VOLTA, _AMPERE = Chip((7, 0), 80), Chip((8, 0), 108)
_HOPPER = Chip((9, 0), 132)


CARDS: Mapping[str, Card] = {
    "t4": _torch(14.56, Chip((7, 5), 40, 1024), "Zheng-Chong/CatVTON/issues/133"),
    "v100-16gb": _torch(15.78, _VOLTA, "kchengiva/Shift-GCN/issues/34"),
    "v100-32gb": _torch(31.74, _VOLTA, "liucongg/ChatGLM-Finetuning/issues/73"),
    "rtx3060": _torch(11.75, Chip((8, 6), 28, 1536), "Kunhao-Liu/StyleGaussian/issues/12"),
    "rtx3090": _torch(23.70, Chip((8, 6), 82, 1536), "GaoLii/DSP/issues/10"),
    "rtx4090": _torch(23.52, Chip((8, 9), 128, 1536), "Soul-AILab/SoulX-FlashTalk/issues/5"),
    "l4": _torch(22.03, Chip((8, 9), 58, 1536), "ArcInstitute/evo2/issues/190"),
    "a10": _torch(21.99, Chip((8, 6), 72, 1536), "zai-org/CogVLM/issues/236"),
    "a100-40gb": _torch(39.50, _AMPERE, "TianheWu/CoSeR/issues/10"),
    "a100-80gb": _torch(79.25, _AMPERE, "levihsu/OOTDiffusion/issues/235"),
    "l40s": _torch(44.42, Chip((8, 9), 142, 1536), "stepfun-ai/Step-Video-T2V/issues/8"),
    "h100": _torch(79.11, _HOPPER, "vllm-project/vllm/issues/27508"),
    "h200": _smi(143771, _HOPPER, "xlite-dev/LeetCUDA/pull/415"),
    "b200": _torch(178.35, Chip((10, 0), 148), "pytorch/ao/pull/4002"),
}
_ALIASES = {"a10g": "a10"}

CUDA_CONTEXT_BYTES = 512 * MIB
"""CUDA's context and the kernels loaded into it, beside what the allocator holds: about 300 MB
since CUDA 11.7 loads kernels when they are first used, above 1,000 MB before
(github.com/pytorch/pytorch/issues/107667); the rest is for kernels of cuBLAS and attention."""

CPU_PROCESS_BYTES = 512 * MIB
"""Python with torch, transformers, PEFT and bitsandbytes imported: 0.47 GiB resident on Linux."""


def card_of(text: str) -> Card | None:
    """The card of this name, if it is one's name."""
    name = _plain(text)
    return CARDS.get(_ALIASES.get(name, name))


def card_named(text: str, option: str) -> Card:
    """The card of this name.

    Args:
        option: that it was given for.

    Raises:
        ConfigError: no such card is known.
    """
    if (card := card_of(text)) is None:
        names = ["cpu", "cuda", *CARDS]
        message = f"{text!r} is neither cpu, nor cuda, nor a known card."
        raise ConfigError(Problem(option, message, did_you_mean(_plain(text), names)))
    return card


def memory_of(text: str) -> int:
    """``"24GiB"`` or a card's name → bytes.

    Raises:
        ConfigError: neither a size nor a known card.
    """
    if (card := card_of(text)) is not None:
        return card.memory_bytes
    try:
        return parse_bytes(text)
    except ValueError:
        message = f"{text!r} is neither a size like 24GiB nor a known card."
        hint = did_you_mean(_plain(text), CARDS)
        raise ConfigError(Problem("--memory", message, hint)) from None


def _plain(text: str) -> str:
    return text.strip().lower().replace(" ", "").replace("_", "-")
