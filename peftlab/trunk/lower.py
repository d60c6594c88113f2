"""What another run kept of the same trunk below a boundary: the blocks between are all to run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftlab.trunk.key import describe, key_of
from peftlab.trunk.replay import Form, Inputs, NotReplayableError, Replay
from peftlab.trunk.rows import gathered, row_keys, storage_of
from peftlab.trunk.store import Store, is_kept, trunk_cache_dir


class LowerTrunk:
    """The rows of a trunk of ``depth`` blocks; ``used`` tells that some were asked for and known.

    Args:
        description: what its key is made of.
    """

    def __init__(self, depth: int, form: Form, description: dict[str, Any]) -> None:
        self.depth, self.name, self.used = depth, description["boundary"], False
        self._form, self._description = form, description

    def values(self, inputs: Inputs) -> Tensor | None:
        """See ``replay.Start``."""
        rows, store = row_keys(inputs), self._store
        if rows is None or store is None or any(digest not in store for digest, _ in rows):
            return None
        self.used = True
        ids = inputs["input_ids"]
        return gathered(store, rows, self._form, ids.shape[1], ids.device)

    @functools.cached_property
    def _store(self) -> Store | None:
        """Opened, which reads it whole, where a row is missing above; None if it cannot be read."""
        try:
            return Store(trunk_cache_dir() / key_of(self._description), self._description)
        except OSError:
            return None


def find_lower(
    replay: Replay, storage: np.dtype[Any], device: torch.device, weights: Sequence[str]
) -> LowerTrunk | None:
    """The highest one that is kept below a model's boundary, if there is one.

    Args:
        replay: that has learned its form.
        storage: of the boundary's values; what was rounded to be stored is no start for others.
        weights: the digests of what lies below the boundary.
    """
    boundary = replay.boundary
    if boundary.depth < 2:
        return None
    try:
        with torch.no_grad():
            form = replay.block_form(boundary.depth - 1)
    except NotReplayableError:
        return None
    if storage != storage_of(form, half=False):
        return None
    for depth in range(boundary.depth - 1, 0, -1):
        description = describe(boundary.lowered(depth), form, storage.name, device, weights)
        if is_kept(key_of(description)):
            return LowerTrunk(depth, form, description)
    return None
