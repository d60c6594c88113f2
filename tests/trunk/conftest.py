"""A cache of the test's own, and small random models with a method attached."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peftlab.assemble import Prepared, prepare
from peftlab.methods import METHODS
from peftlab.models.load import build_from_config
from peftlab.models.tiny import tiny_config
from peftlab.tasks import TASK_KINDS
from peftlab.tasks.base import TaskKind
from peftlab.training.config import TrainConfig
from peftlab.training.modes import set_training_mode
from peftlab.trunk.cache import TrunkCache

LENGTHS = (9, 4, 7, 7)
Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def trunk_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trunk cache's folder."""
    folder = tmp_path / "trunks"
    monkeypatch.setenv("PEFTLAB_TRUNK_CACHE", str(folder))
    return folder


@dataclass
class Case:
    """A model with its method, its task kind and its settings."""

    prepared: Prepared
    kind: TaskKind[Any]
    train: TrainConfig

    @property
    def model(self) -> Any:
        return self.prepared.model

    def batch(self, seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> Batch:
        """Random tokens, padded on the right."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 100, (len(lengths), max(lengths)), generator=generator)
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        ids = torch.where(mask, ids, 0)
        labels = torch.where(mask, ids, -100)
        if self.kind.traits.unit == "examples":
            labels = torch.arange(len(lengths)) % 2
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}

    def loss(self, batch: Batch) -> Tensor:
        return self.kind.loss(self.model, batch)

    def gradients(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch in training mode, and the gradients of what trains."""
        set_training_mode(self.model, self.prepared.trunk)
        torch.manual_seed(7)
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        found = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return loss.detach(), found

    def cache(self, setting: str = "auto", half: bool = False) -> TrunkCache:
        return TrunkCache(self.prepared.boundary, setting, half)

    def opened(self, cache: TrunkCache) -> Any:
        """The cache, learned from a batch that is none of the test's."""
        return cache.opened(lambda: self.loss(self.batch(99, (5, 3))), LENGTHS, 0)


def make(
    architecture: str, method: dict[str, Any], kind: str = "classification", **values: Any
) -> Case:
    """A random model; ``values`` are set in its config."""
    torch.manual_seed(0)
    task, methods = TASK_KINDS.get(kind), METHODS.get(method["kind"])
    config = tiny_config(architecture)
    config.update(values)
    base = build_from_config(config, task.traits.auto_class, torch.float32, "sdpa")
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    train = TrainConfig()
    attached = prepare(base, methods(methods.Config(**method)), task.traits, train)
    return Case(attached, task(task.Config.model_construct()), train)
