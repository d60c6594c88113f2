"""BitFit: only the biases train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from peftlab.anatomy import Anatomy
from peftlab.errors import IncompatibleError, Problem
from peftlab.methods.base import Method, MethodConfig, Traits

if TYPE_CHECKING:
    from torch import nn


class BitFitConfig(MethodConfig):
    """No keys of its own."""

    kind: Literal["bitfit"] = "bitfit"


class BitFit(Method[BitFitConfig]):
    """Trains all bias vectors, and a task head whole (Ben Zaken et al. 2022)."""

    Config = BitFitConfig
    traits = Traits(
        summary="only the biases train", paper="https://aclanthology.org/2022.acl-short.1"
    )

    def check(self, anatomy: Anatomy) -> list[Problem]:
        head = anatomy.parameters_of(anatomy.head)
        if set(anatomy.biases) - set(head):
            return []
        message = f"{anatomy.model_class} has no biases to train."
        return [Problem("method", message, "Llama-type models have none: use lora.")]

    def attach(self, model: nn.Module) -> nn.Module:
        anatomy = Anatomy.of(model)
        if problems := self.check(anatomy):
            raise IncompatibleError(problems)
        head = anatomy.parameters_of(anatomy.head) if anatomy.head_is_new else []
        chosen = {*anatomy.biases, *head}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        return model


METHOD = BitFit
