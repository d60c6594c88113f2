"""How much of the machine's matrix-multiply peak a run reaches."""

from __future__ import annotations

import time

import torch

from peftlab.models.config import PrecisionConfig

_REPEATS = 6
_MAX_SECONDS = 0.4
_SIZE = {"cpu": 1024, "cuda": 4096}
"""Rows and columns of the square matrices: large enough for the peak, small enough to be quick."""
_best: dict[tuple[torch.device, torch.dtype], float] = {}
"""What this process has measured."""


def matmul_flops_per_second(
    device: torch.device, precision: PrecisionConfig, again: bool = False
) -> float:
    """Floating-point operations a second of a large matrix product, a multiply-add counted as two.

    The best of several, in the precision in which the run multiplies; measured once a process.

    Args:
        again: measure once more: for a while another program may have had one of two cores.
    """
    autocast = {"bf16": "bfloat16", "fp16": "float16", "no": precision.dtype}
    key = device, getattr(torch, autocast[precision.mixed_precision])
    if again or key not in _best:
        _best[key] = max(_measure(*key), _best.get(key, 0.0))
    return _best[key]


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    size = _SIZE.get(device.type, 1024)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in "ab")
    out = torch.empty_like(a)
    began, best = time.perf_counter(), float("inf")
    torch.mm(a, b, out=out)
    for _ in range(_REPEATS):
        _wait(device)
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        best = min(best, time.perf_counter() - started)
        if time.perf_counter() - began > _MAX_SECONDS:
            break
    del a, b, out
    if device.type == "cuda":
        # What the allocator keeps would count as reserved by the run.
        torch.cuda.empty_cache()
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def model_flops_utilisation(
    flops: float | None, seconds: float | None, flops_per_second: float | None
) -> float | None:
    """``flops`` of a run over what the peak would have done in its ``seconds``; None if unknown."""
    if not flops or not seconds or not flops_per_second:
        return None
    return flops / (seconds * flops_per_second)
