"""An experiment: model × task × recipe × seed, fully resolved and immutable. No torch here."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import SerializeAsAny

from peftlab.config import Config
from peftlab.methods import METHODS
from peftlab.methods.base import Method, MethodConfig
from peftlab.models.config import ModelConfig, PrecisionConfig
from peftlab.optim.config import OptimConfig
from peftlab.tasks import TASK_KINDS
from peftlab.tasks.base import DataConfig, TaskKind
from peftlab.training.config import TrainConfig

IDENTITY_VERSION = 1
_BOOKKEEPING = (
    "logging_steps", "report_to", "save_strategy", "save_steps", "save_total_limit", "trunk_cache"
)  # fmt: skip
"""Training keys that change what is written down, not what is learned."""


class Experiment(Config):
    """Everything that decides a run's result, besides the machine.

    Args:
        task: name of the task; ``recipe``: name of the recipe.
        kind: the task kind; ``data``: its data section.
        folder: where relative data paths start.
    """

    task: str
    recipe: str
    kind: str
    folder: str
    metric: str
    seed: int
    model: ModelConfig
    data: SerializeAsAny[DataConfig]
    method: SerializeAsAny[MethodConfig]
    optim: OptimConfig
    precision: PrecisionConfig
    train: TrainConfig

    def build_kind(self) -> TaskKind[Any]:
        """The task kind over this experiment's data."""
        return TASK_KINDS.get(self.kind)(self.data, self.folder)

    def build_method(self) -> Method[Any]:
        """The method with this experiment's settings."""
        return METHODS.get(self.method.kind)(self.method)

    def identity(self, fingerprint: str) -> str:
        """A hash of all that decides the result, the seed left out.

        Args:
            fingerprint: of the data's rows, since a file can change under its name.
        """
        content = self.model_dump(mode="json", exclude={"task", "recipe", "folder", "seed"})
        for key in _BOOKKEEPING:
            content["train"].pop(key)
        text = json.dumps([IDENTITY_VERSION, content, fingerprint], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def parse(cls, data: dict[str, Any]) -> Experiment:
        """From ``model_dump``'s form, with the sections' own classes.

        Raises:
            UnknownNameError: the method or task kind is not known here.
            pydantic.ValidationError: the data fits no experiment.
        """
        method = METHODS.get(data["method"]["kind"]).Config
        rows = TASK_KINDS.get(data["kind"]).Config
        sections = {
            "method": method.model_validate_json(json.dumps(data["method"])),
            "data": rows.model_validate_json(json.dumps(data["data"])),
        }
        return cls.model_validate({**data, **sections})
