"""What data-parallel training keeps on each device beside the step itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._distributed_c10d import _compute_bucket_assignment_by_size

_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20
"""Bytes (``torch.nn.parallel.DistributedDataParallel``, ``bucket_cap_mb`` and its first bucket)."""


def gradient_buckets(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The flat buffers in which DDP averages gradients; they live as long as the model.

    Accelerate's default leaves ``gradient_as_bucket_view`` off, so that gradients exist twice.
    Communication buffers of the backend come on top.
    """
    limits = [_FIRST_BUCKET, _BUCKET]
    groups, _ = _compute_bucket_assignment_by_size(list(parameters), limits)
    return [
        torch.empty(sum(parameters[index].numel() for index in group), dtype=dtype)
        for group in groups
        if (dtype := parameters[group[0]].dtype)
    ]
