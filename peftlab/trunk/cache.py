"""The trunk cache of one run: finds the boundary's values on disk, or computes and keeps them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.trunk.boundary import Boundary, NoBoundary
from peftlab.trunk.key import describe, digests, key_of
from peftlab.trunk.lower import LowerTrunks, find_lower
from peftlab.trunk.replay import READ, Compute, Form, Inputs, NotReplayableError, Replay
from peftlab.trunk.rows import Row, as_numpy, gathered, row_keys, storage_of
from peftlab.trunk.store import Store, budget_bytes, free_bytes, trunk_cache_dir
from peftlab.units import format_bytes

OFF = "off"
FILL_TOKENS = {"cpu": 2048}
"""Tokens of a batch that is computed to be kept, padding included, by device: a CPU is fastest
where they fit into its caches."""
_FILL_TOKENS_ELSEWHERE = 16384

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenTrunk:
    """A trunk whose rows are open and verified, for the next run in this process."""

    form: Form
    storage: np.dtype[Any]
    description: Mapping[str, Any]
    store: Store


class TrunkCache:
    """Replays what it knows of a run's rows and keeps what it does not.

    It never fails a run: where something prevents it, ``note`` says what and the model computes.

    Args:
        boundary: of the model, or why it has none.
        setting: "auto", "off" or the most that may be stored, as a size.
        half: store float32 as float16.
        before: of the last run in this process, if that had the very same trunk; ``continued``
            tells that it is used.
    """

    def __init__(
        self,
        boundary: Boundary | NoBoundary,
        setting: str,
        half: bool = False,
        before: OpenTrunk | None = None,
    ) -> None:
        self.note = ""
        self.continued = False
        self.open_trunk: OpenTrunk | None = None
        self._before = before
        self.fill_seconds = 0.0
        self.replayed_rows = self.computed_rows = self.found_rows = 0
        self._setting, self._half = setting, half
        self._store: Store | None = None
        self._description: dict[str, Any] = {}
        self._budget = 0
        self._storage: np.dtype[Any] = np.dtype(np.float32)
        self._replay: Replay | None = None
        self._lower: LowerTrunks | None = None
        if setting == OFF:
            self.note = "switched off"
        elif isinstance(boundary, NoBoundary):
            self.note = boundary.reason
        else:
            self._replay = Replay(boundary, self)

    @property
    def on(self) -> bool:
        """Whether anything is replayed."""
        return self._store is not None

    @contextmanager
    def opened(
        self, loss: Callable[[], Tensor], lengths: Sequence[int], later_rows: int
    ) -> Iterator[None]:
        """In here the model replays its trunk; may be entered again when it was left.

        Args:
            loss: of a few training rows, through the model.
            lengths: tokens of each training row.
            later_rows: how many other rows will be predicted.
        """
        with self._replay.attached() if self._replay else nullcontext():
            if self._replay is not None and self._store is None and not self.note:
                try:
                    with _eval_mode(self._replay.boundary.base):
                        self._open(self._replay, loss, lengths, later_rows)
                except NotReplayableError as error:
                    self._give_up(str(error))
                except OSError as error:
                    self._give_up(f"the cache cannot be used: {error}")
                # Nothing asks for it again, and it would stay on the device.
                self._replay.learned = {}
            try:
                yield
            finally:
                self.flush()

    def _open(
        self, replay: Replay, loss: Callable[[], Tensor], lengths: Sequence[int], later_rows: int
    ) -> None:
        form = replay.learn(loss)
        if reason := too_large(form, self._setting, self._half, lengths, later_rows):
            self._give_up(reason)
            return
        self._storage = storage_of(form, self._half)
        self._budget = budget_bytes(self._setting)
        before = self._before
        if before is not None and (before.form, before.storage) == (form, self._storage):
            self._description, self._store = dict(before.description), before.store
            self.open_trunk, self.continued = before, True
            return
        device = next(replay.boundary.backbone.parameters()).device
        weights = digests(replay.boundary.below)
        self._description = describe(replay.boundary, form, self._storage.name, device, weights)
        self._store = Store(trunk_cache_dir() / self.key, self._description)
        replay.start = self._lower = find_lower(replay, self._storage, device, weights)
        replay.verify(loss)
        self.open_trunk = OpenTrunk(form, self._storage, self._description, self._store)

    @property
    def key(self) -> str:
        """The trunk's name in the cache; empty where nothing is kept."""
        return key_of(self._description) if self._description else ""

    def usage(self) -> dict[str, Any]:
        """What a record says of the cache."""
        store = self._store
        return {
            "key": self.key if store else "",
            "boundary": self._description["boundary"] if store else "",
            "filled_from": ", ".join(self._lower.used if self._lower else ()),
            "rows": len(store) if store else 0,
            "stored_bytes": store.stored_bytes if store else 0,
            "fill_seconds": self.fill_seconds,
            "replayed_rows": self.replayed_rows,
            "computed_rows": self.computed_rows,
            "found_rows": self.found_rows,
            "note": "; ".join([*filter(None, [self.note]), *(store.notes if store else ())]),
        }

    def fill(
        self,
        batches: Iterable[Inputs],
        wait: Callable[[], None] = lambda: None,
        through: Callable[[Compute, Inputs], Tensor] = lambda compute, inputs: compute(inputs),
    ) -> None:
        """Compute and keep the rows of these batches that are not known.

        Args:
            batches: this process's share of the training rows, collated.
            wait: for the other processes, whose rows are taken up afterwards.
            through: what the model computes is computed through it.
        """
        if self._store is None or self._replay is None:
            return
        started = time.perf_counter()
        compute = partial(through, self._replay.compute)
        learned: set[bytes] = set()
        with _eval_mode(self._replay.boundary.base):
            for batch in batches:
                inputs = {name: batch[name] for name in READ if name in batch}
                if (rows := row_keys(inputs)) is None:
                    continue
                if self._learn_rows(inputs, rows, compute):
                    learned.update(digest for digest, _ in rows)
        # What was computed before this was computed to verify: training rows too.
        self.found_rows += max(0, len(learned) - self.computed_rows)
        self.flush()
        wait()
        if self._store is not None:
            self._store.refresh()
        self.fill_seconds += time.perf_counter() - started

    def values(self, inputs: Inputs, form: Form, compute: Compute) -> Tensor | None:
        """See ``Source``."""
        if self._store is None or (rows := row_keys(inputs)) is None:
            return None
        if not self._learn_rows(inputs, rows, compute):
            return None
        self.replayed_rows += len(rows)
        ids = inputs["input_ids"]
        return gathered(self._store, rows, form, ids.shape[1], ids.device)

    def _learn_rows(self, inputs: Inputs, rows: Sequence[Row], compute: Compute) -> bool:
        """Compute and keep what is not known; whether all is known then."""
        store = self._store
        if store is None:
            return False
        missing = list({d: i for i, (d, _) in enumerate(rows) if d not in store}.values())
        if not missing:
            return True
        if store.held_bytes >= self._budget:
            self._say(f"it holds {format_bytes(store.held_bytes)}, as much as is allowed")
            return False
        longest = max(rows[index][1] for index in missing)
        part = {name: tensor[missing, :longest] for name, tensor in inputs.items()}
        values = compute(part)
        if self._storage == np.float16 and values.dtype is torch.float32:
            values = values.half()
            if not values.isfinite().all():
                self._give_up("float16 cannot hold the trunk's activations")
                return False
        computed = as_numpy(values.cpu())
        try:
            for index, own in zip(missing, computed, strict=True):
                digest, length = rows[index]
                store.add(digest, np.array(own.reshape(-1, own.shape[-1])[:length]))
        except OSError as error:
            self._give_up(f"the cache cannot be written: {error}")
            return False
        self.computed_rows += len(missing)
        return True

    def flush(self) -> None:
        """Write what was computed to the disk."""
        if self._store is not None:
            try:
                self._store.flush()
            except OSError as error:
                self._give_up(f"the cache cannot be written: {error}")

    def _give_up(self, why: str) -> None:
        self._store = self.open_trunk = None
        self._say(why)

    def _say(self, why: str) -> None:
        if not self.note:
            self.note = why
            logger.warning("the frozen trunk is not cached: %s", why)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode; each module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def fill_batches(
    lengths: Mapping[int, int], device: str, part: int = 0, parts: int = 1
) -> list[list[int]]:
    """A process's rows in batches of similar length, the longest first.

    Args:
        lengths: the tokens of each row.
        device: its type.
    """
    most = FILL_TOKENS.get(device, _FILL_TOKENS_ELSEWHERE)
    order = sorted(lengths, key=lambda row: (-lengths[row], row))[part::parts]
    batches: list[list[int]] = []
    for row in order:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > most:
            batches.append([])
        batches[-1].append(row)
    return batches


def too_large(form: Form, setting: str, half: bool, lengths: Sequence[int], later_rows: int) -> str:
    """Why a run's rows may not be kept, empty if they may.

    Args:
        setting: "auto" or a size; ``half`` and the rest as for ``TrunkCache``. Rows to come are
            taken to be as long as training's on average.

    Raises:
        OSError: the disk cannot be asked.
    """
    vectors = sum(lengths) if form.per_token else len(lengths)
    share = 1 + later_rows / max(1, len(lengths))
    needed = vectors * share * form.width * storage_of(form, half).itemsize
    budget, free = budget_bytes(setting), free_bytes()
    if needed <= min(budget, free):
        return ""
    return (
        f"it would take about {format_bytes(needed)}; train.trunk_cache={setting} allows "
        f"{format_bytes(budget)} and {format_bytes(free)} are free"
    )
