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
from peftlab.trunk.rows import Row, gathered, row_keys, storage_of
from peftlab.trunk.store import Store, is_kept, trunk_cache_dir


class LowerTrunks:
    """The trunks kept below a boundary, highest first; one may hold rows that another does not.

    ``used`` names those of which some rows were asked for and known.
    """

    def __init__(self, trunks: Sequence[LowerTrunk]) -> None:
        self._trunks = trunks
        self.used: dict[str, None] = {}

    def values(self, inputs: Inputs) -> tuple[int, Tensor] | None:
        """See ``replay.Start``."""
        if (rows := row_keys(inputs)) is None:
            return None
        for trunk in self._trunks:
            if trunk.knows(rows):
                self.used[trunk.name] = None
                return trunk.depth, trunk.values(rows, inputs["input_ids"])
        return None


class LowerTrunk:
    """The rows of a trunk of ``depth`` blocks.

    Args:
        description: what its key is made of.
    """

    def __init__(self, depth: int, form: Form, description: dict[str, Any]) -> None:
        self.depth, self.name = depth, str(description["boundary"])
        self._form, self._description = form, description

    def knows(self, rows: Sequence[Row]) -> bool:
        """Whether it holds them all."""
        store = self._store
        return store is not None and all(digest in store for digest, _ in rows)

    def values(self, rows: Sequence[Row], ids: Tensor) -> Tensor:
        """What its topmost block returns of rows that it knows, (batch, seq, width)."""
        assert self._store is not None
        return gathered(self._store, rows, self._form, ids.shape[1], ids.device)

    @functools.cached_property
    def _store(self) -> Store | None:
        """Opened, which reads it whole, where a row is missing above; None if it cannot be read."""
        try:
            return Store(trunk_cache_dir() / key_of(self._description), self._description)
        except OSError:
            return None


def find_lower(
    replay: Replay, storage: np.dtype[Any], device: torch.device, weights: Sequence[str]
) -> LowerTrunks | None:
    """What is kept below a model's boundary, None if nothing is.

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
    found = []
    for depth in range(boundary.depth - 1, 0, -1):
        description = describe(boundary.lowered(depth), form, storage.name, device, weights)
        if is_kept(key_of(description)):
            found.append(LowerTrunk(depth, form, description))
    return LowerTrunks(found) if found else None
