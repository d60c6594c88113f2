"""What to learn: one module a task kind, found by its file name."""

from __future__ import annotations

from typing import Any

from peftlab.registry import Registry
from peftlab.tasks.base import TaskKind

TASK_KINDS: Registry[type[TaskKind[Any]]] = Registry(
    "task kind",
    __name__,
    "TASK_KIND",
    helpers={
        "base",
        "batches",
        "data",
        "embedded",
        "files",
        "lm_loss",
        "metrics",
        "packing",
        "prompts",
        "sequence",
    },
)
