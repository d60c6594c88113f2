"""The frozen trunk of one run, computed once for each row in every stage of its training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Self

from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from peftlab.assemble import Assembly
from peftlab.memory.flops import FlopsByLength
from peftlab.sharing import Shared
from peftlab.training.loop import Loop
from peftlab.trunk.cache import TrunkCache, fill_batches

_SUMS = ("stored_bytes", "fill_seconds", "replayed_rows", "computed_rows", "found_rows")
"""Of what the stages' caches say, what is added up."""


class RunTrunk:
    """Replays what lies below what trains; to be used in a ``with`` statement.

    Args:
        shared: with runs before and after it in this process.
    """

    def __init__(self, assembly: Assembly, loop: Loop, shared: Shared) -> None:
        self._assembly, self._loop, self._shared = assembly, loop, shared
        self._lengths = {
            stage.number: {
                row: loop.lengths[row] for row in loop.schedule.trained_rows(stage.steps)
            }
            for stage in loop.stages
        }
        self._caches: dict[int, TrunkCache] = {}
        self._open = ExitStack()
        self._entered: int | None = None
        self.fill_flops = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def fill_seconds(self) -> float:
        """Spent on computing training rows before the first step."""
        return sum(cache.fill_seconds for cache in self._caches.values())

    def fill(self) -> None:
        """Compute the training rows of every stage.

        The last stage's trunk is the lowest: the others are computed from it.
        """
        for stage in reversed(self._loop.stages):
            self._loop.job.method.enter_stage(self._loop.model, stage.number)
            self.enter(stage.number)
            self._fill(stage.number)
        # What the fill and earlier runs held would count as reserved by the training.
        clear_device_cache()

    def enter(self, stage: int) -> None:
        """Replay the trunk of this stage, which the method has entered."""
        if stage == self._entered:
            return
        self._open.close()
        self._entered = None
        if stage not in self._caches:
            train = self._assembly.experiment.train
            self._caches[stage] = TrunkCache(
                self._assembly.prepared.boundary,
                train.trunk_cache,
                half=train.trunk_cache_dtype == "float16",
                before=self._shared.trunks.get(stage),
            )
        others = len(self._loop.job.validation) + len(self._assembly.splits.test)
        opened = self._caches[stage].opened(self._loss, list(self._lengths[stage].values()), others)
        self._open.enter_context(opened)
        self._entered = stage

    def _fill(self, stage: int) -> None:
        cache, accelerator = self._caches[stage], self._loop.accelerator
        known = self._shared.filled.get(stage, set()) if cache.continued else set()
        rows = self._lengths[stage]
        unknown = {row: length for row, length in rows.items() if row not in known}
        cache.found_rows += len(rows) - len(unknown)
        device, parts = accelerator.device.type, accelerator.num_processes
        share = fill_batches(unknown, device, accelerator.process_index, parts)
        counted = FlopsByLength()
        with accelerator.autocast():
            cache.fill(map(self._batch, share), accelerator.wait_for_everyone, counted.of)
        self.fill_flops += counted.flops
        if cache.key in {self._caches[other].key for other in self._caches if other != stage}:
            # Two stages with one trunk: what was found is this run's own.
            cache.found_rows = 0
        self._shared.filled[stage] = known if cache.note else {*known, *rows}
        self._shared.trunks[stage] = cache.open_trunk

    def usage(self) -> dict[str, Any]:
        """What a record says: of the lowest trunk that is kept, and what all stages did."""
        stages = {stage: cache.usage() for stage, cache in sorted(self._caches.items())}
        if not stages:
            return {}
        every = list(stages.values())
        lowest = next((usage for usage in reversed(every) if usage["key"]), every[-1])
        sums = {name: sum(usage[name] for usage in every) for name in _SUMS}
        notes = [usage["note"] for usage in every]
        if len(set(notes)) > 1:
            notes = [
                f"stage {n + 1}: {note}" for n, note in zip(stages, notes, strict=True) if note
            ]
        return {**lowest, **sums, "note": "; ".join(dict.fromkeys(notes))}

    def _batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        job = self._loop.job
        collated = job.kind.collate([job.features[row] for row in rows], job.tokenizer)
        on_device: dict[str, Tensor] = send_to_device(collated, self._loop.accelerator.device)
        return on_device

    def _loss(self) -> Tensor:
        """Of a few rows, through the model."""
        job = self._loop.job
        with self._loop.accelerator.autocast():
            return job.kind.loss(job.model, self._batch(range(min(2, len(job.features)))))
