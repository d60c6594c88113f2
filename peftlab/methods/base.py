"""The interface of a method. Methods change models; the lab measures them.

Modules here import torch, transformers and peft inside functions only: a recipe is listed and
checked without loading them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from peftlab.config import Config
from peftlab.errors import NotMergeableError, Problem, RunFolderError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from peftlab.anatomy import Anatomy


class MethodConfig(Config):
    """Base of a method's section; each narrows ``kind`` to its own name."""

    kind: str


ConfigT = TypeVar("ConfigT", bound=MethodConfig)


@dataclass(frozen=True)
class Traits:
    """What the rest of the lab may ask of a method.

    Args:
        summary: one line, for lists and model cards.
        paper: where the method was published; empty if it has no paper.
        mergeable: folds into the base weights.
        works_quantized: the base may be nf4 or int8.
        works_with_checkpointing: gradient checkpointing may be on.
        is_peft: the adapter folder is PEFT's and loads with ``PeftModel.from_pretrained``.
    """

    summary: str
    paper: str = ""
    mergeable: bool = True
    works_quantized: bool = False
    works_with_checkpointing: bool = True
    is_peft: bool = False


@dataclass(frozen=True)
class Progress:
    """Where training stands when ``on_step_end`` is called; ``step`` counts from 1."""

    step: int
    total_steps: int


class Method(ABC, Generic[ConfigT]):
    """A way to adapt a model.

    ``attach`` decides what trains, and ``requires_grad`` is final afterwards; only ``enter_stage``
    may hold some of it back for a while. Everything else asks ``traits`` and ``requires_grad``,
    never a method's name. ``notes`` holds what the user should
    know of an ``attach`` that went well but may not be what was meant; a run records it.
    """

    Config: ClassVar[type[MethodConfig]]
    traits: ClassVar[Traits]

    def __init__(self, config: ConfigT) -> None:
        self.config = config
        self.notes: list[str] = []

    @property
    def extra_positions(self) -> int:
        """Positions of the model that the method takes in front of the text."""
        return 0

    def check(self, anatomy: Anatomy) -> list[Problem]:
        """What is wrong with putting this method on such a model, before weights are loaded."""
        return []

    @abstractmethod
    def attach(self, model: nn.Module) -> nn.Module:
        """Put the method on a transformers model and return the model to train.

        Raises:
            IncompatibleError: nothing would train, or a pattern matches nothing.
        """

    def stage_starts(self, total_steps: int) -> tuple[int, ...]:
        """The steps, counted from 0, with which the stages of a training start; known unattached.

        In each stage other tensors train, in the last all that ``attach`` let train. Most methods
        have one stage.
        """
        return (0,)

    def enter_stage(self, model: nn.Module, stage: int) -> None:
        """Let only what trains in this stage require gradients, in a model that ``attach`` made."""

    def on_step_end(self, model: nn.Module, progress: Progress) -> None:
        """Called after each optimizer step; for methods that change while they train."""

    def training_state(self, model: nn.Module) -> dict[str, Tensor]:
        """What trains, by parameter name: what a checkpoint keeps to go on training."""
        return {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    def load_training_state(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Put ``training_state`` back into a model that ``attach`` returned.

        Raises:
            RunFolderError: names or shapes differ.
        """
        expected = self.training_state(model)
        check_state(expected, state)
        for name, tensor in expected.items():
            tensor.copy_(state[name])

    def adapter_state(self, model: nn.Module) -> dict[str, Tensor]:
        """The smallest state that restores the predictions on the same base model.

        It may be less than ``training_state``: a reparametrised prefix is kept without the network
        that made it, and can then predict but not go on training.
        """
        return self.training_state(model)

    def load_adapter_state(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Put ``adapter_state`` back into a model that ``attach`` returned, to predict with it.

        Raises:
            RunFolderError: names or shapes differ.
        """
        self.load_training_state(model, state)

    def save_adapter(self, model: nn.Module, folder: Path) -> None:
        """Write ``adapter_state`` into an existing folder as safetensors."""
        from safetensors.torch import save_file

        state = {name: tensor.contiguous() for name, tensor in self.adapter_state(model).items()}
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def merge(self, model: nn.Module) -> nn.Module:
        """The plain transformers model with the same predictions; ``model`` may be consumed.

        Raises:
            NotMergeableError: the change is no change of weights.
        """
        if not self.traits.mergeable:
            raise NotMergeableError(f"{self.config.kind} cannot be merged into the weights.")
        return model


def check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Compare names and shapes of a saved state with what the model has.

    Raises:
        RunFolderError: naming what is missing, unknown or of another shape.
    """
    if wrong := sorted(set(expected) ^ set(state)):
        raise RunFolderError(f"the adapter does not fit this model: {', '.join(wrong[:5])}.")
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise RunFolderError(
                f"the adapter does not fit this model: {name} has shape "
                f"{tuple(state[name].shape)}, expected {tuple(tensor.shape)}."
            )
