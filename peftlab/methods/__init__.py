"""What changes the model: one module a method, found by its file name."""

from __future__ import annotations

from typing import Any

from peftlab.methods.base import Method
from peftlab.registry import Registry

METHODS: Registry[type[Method[Any]]] = Registry(
    "method", __name__, "METHOD", helpers={"base", "fused_lora", "peft_backed"}
)
