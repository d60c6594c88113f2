"""Full fine-tuning: every parameter trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from peftlab.methods.base import Method, MethodConfig, Traits

if TYPE_CHECKING:
    from torch import nn


class FullConfig(MethodConfig):
    """No keys of its own."""

    kind: Literal["full"] = "full"


class Full(Method[FullConfig]):
    """Trains everything: the yardstick of every comparison."""

    Config = FullConfig
    traits = Traits(summary="every parameter trains")

    def attach(self, model: nn.Module) -> nn.Module:
        return model.requires_grad_(True)


METHOD = Full
