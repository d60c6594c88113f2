"""Bytes, counts and seconds as people read and write them."""

from __future__ import annotations

import re

KIB, MIB, GIB = 2**10, 2**20, 2**30
_SUFFIXES = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 1000,
    "m": MIB, "mib": MIB, "mb": 1000**2,
    "g": GIB, "gib": GIB, "gb": 1000**3,
    "t": 2**40, "tib": 2**40, "tb": 1000**4,
}  # fmt: skip


def format_bytes(count: float | None) -> str:
    """``1536`` → ``1.5 KiB``; ``None`` → ``–``."""
    if count is None:
        return "–"
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= size:
            value = count / size
            return f"{value:.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"
    return f"{count:.0f} B"


def format_count(count: float | None) -> str:
    """``22713216`` → ``22.7M``; ``None`` → ``–``."""
    if count is None:
        return "–"
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def format_seconds(seconds: float | None) -> str:
    """``75.2`` → ``1m15s``; ``None`` → ``–``."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def parse_bytes(text: str) -> int:
    """``"24GiB"``, ``"24G"`` (binary) or ``"24GB"`` (decimal) → bytes.

    Raises:
        ValueError: the text is not a positive size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    factor = _SUFFIXES.get(match[2].lower()) if match else None
    if match is None or factor is None or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a size; write for example 24GiB, 24GB or 800MiB")
    return int(float(match[1]) * factor)
