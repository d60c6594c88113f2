"""What decides a trunk's activations, besides the tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from torch import Tensor, nn

from peftlab.trunk.boundary import Boundary
from peftlab.trunk.replay import BLOCK, Form

_HEAD_KEYS = {
    "_name_or_path", "architectures", "classifier_dropout", "dtype", "id2label", "label2id",
    "num_labels", "pad_token_id", "problem_type", "transformers_version", "use_cache",
}  # fmt: skip
"""Keys of a model's config that say nothing of its trunk."""


def describe(
    boundary: Boundary, form: Form, storage: str, device: torch.device, weights: Sequence[str]
) -> dict[str, Any]:
    """All that decides the values, and the values' form; JSON-ready.

    Args:
        weights: the digests of what lies below the line; more are not looked at.
    """
    config: Any = boundary.base.config
    settings = {key: value for key, value in config.to_dict().items() if key not in _HEAD_KEYS}
    count = len(boundary.blocks)
    here = f"block {boundary.depth} of {count}"
    return {
        "model": Path(name).name if Path(name := config._name_or_path).is_dir() else name,
        "boundary": here if form.place == BLOCK else form.place,
        "kept": "a vector a token" if form.per_token else "a vector a row",
        "width": form.width,
        "storage": storage,
        "class": type(boundary.backbone).__name__,
        "attn_implementation": config._attn_implementation,
        "weights": _digest_of(weights[: len(boundary.below)]),
        "config": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "dtype": str(form.dtype),
        "autocast": str(form.autocast),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def key_of(description: dict[str, Any]) -> str:
    """A trunk's name: a hash of its description, the model's name left out."""
    content = {key: value for key, value in description.items() if key != "model"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def digests(modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """Of each module every parameter and buffer, and how it describes itself."""
    return [_digest(name, module) for name, module in modules]


def _digest(name: str, module: nn.Module) -> str:
    digest = xxhash.xxh3_128(f"{name}{module!r}".encode())
    for key, tensor in _tensors(module):
        digest.update(f"{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()


def _digest_of(parts: Sequence[str]) -> str:
    return xxhash.xxh3_128("".join(parts).encode()).hexdigest()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # The state also has what quantised weights keep beside themselves, but not every buffer.
    state = {**dict(module.named_buffers()), **module.state_dict()}
    return ((key, state[key]) for key in sorted(state) if isinstance(state[key], Tensor))
