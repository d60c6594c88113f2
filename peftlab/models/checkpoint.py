"""What a checkpoint holds, by name: read from its header, no tensor is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from peftlab.models.load import resolve_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FILES = ("model.safetensors", "model.safetensors.index.json")
# How the first BERT checkpoints call a layer norm's parameters; transformers renames them.
_RENAMED = {"gamma": "weight", "beta": "bias"}


def checkpoint_keys(name_or_path: str) -> frozenset[str] | None:
    """The names of the tensors; None without a checkpoint here, for nothing is fetched for it.

    Args:
        name_or_path: embedded name, folder, hub id, or the path of a config.
    """
    from safetensors import safe_open
    from transformers.utils import cached_file

    if Path(name_or_path).suffix == ".json":
        return None
    name = resolve_path(name_or_path)
    for file in _FILES:
        path = cached_file(
            name,
            file,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is None:
            continue
        if file.endswith(".json"):
            index = json.loads(Path(path).read_text(encoding="utf-8"))
            return frozenset(index["weight_map"])
        with safe_open(path, "pt") as checkpoint:
            return frozenset(checkpoint.keys())
    return None


def lacking(model: PreTrainedModel, keys: Iterable[str]) -> tuple[str, ...]:
    """The parameters of a model that a checkpoint of it, or of its backbone, does not hold."""
    known = {re.sub(r"(gamma|beta)$", lambda old: _RENAMED[old[0]], key) for key in keys}
    prefix = f"{model.base_model_prefix}."
    return tuple(
        sorted(
            name
            for name, _ in model.named_parameters()
            if not known & {name, name.removeprefix(prefix), prefix + name}
        )
    )
