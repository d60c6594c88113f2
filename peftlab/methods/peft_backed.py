"""The body shared by all methods that PEFT implements."""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftlab.anatomy import Anatomy
from peftlab.errors import IncompatibleError
from peftlab.methods.base import ConfigT, Method, check_state

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn

ADAPTER = "default"
"""PEFT's name for the one adapter; it does not appear in files."""


class PeftMethod(Method[ConfigT]):
    """A method whose adapter is PEFT's. Subclasses translate their section in ``peft_config``."""

    @abstractmethod
    def peft_config(self, anatomy: Anatomy) -> PeftConfig:
        """PEFT's configuration for a model that ``check`` found nothing wrong with."""

    def attach(self, model: nn.Module) -> nn.Module:
        anatomy = Anatomy.of(model)
        if problems := self.check(anatomy):
            raise IncompatibleError(problems)
        attached: nn.Module = wrap(model, self.peft_config(anatomy))
        return attached

    def adapter_state(self, model: nn.Module) -> dict[str, Tensor]:
        """PEFT's adapter state: the tensors of ``adapter_model.safetensors`` by name."""
        from peft import get_peft_model_state_dict

        # "auto" would ask the hub whether the vocabulary grew; nothing here resizes it.
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        return {name: tensor.detach() for name, tensor in state.items()}

    def load_adapter_state(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        from peft import set_peft_model_state_dict

        check_state(self.adapter_state(model), state)
        set_peft_model_state_dict(model, dict(state))

    def save_adapter(self, model: nn.Module, folder: Path) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT does.

        ``PeftModel.from_pretrained(base, folder)`` loads the folder.
        """
        super().save_adapter(model, folder)
        wrapped: Any = model
        config: Any = copy.deepcopy(wrapped.peft_config[ADAPTER])
        config.inference_mode = True
        # PEFT keeps names in sets; in a file their order must not depend on the process.
        for key in ("target_modules", "modules_to_save"):
            if isinstance(names := getattr(config, key, None), (set, list)):
                setattr(config, key, sorted(set(names)))
        base = type(wrapped.get_base_model())
        origin = {"base_model_class": base.__name__, "parent_library": base.__module__}
        mapping = origin if config.task_type is None else None
        config.save_pretrained(str(folder), auto_mapping_dict=mapping)

    def merge(self, model: nn.Module) -> nn.Module:
        """Fold the adapter in. A quantised base is dequantised first, so nothing is rounded again.

        Raises:
            NotMergeableError: the method changes no weights.
        """
        super().merge(model)
        wrapped: PeftModel = model
        if getattr(wrapped.get_base_model(), "is_quantized", False):
            wrapped = self._on_dequantized(wrapped)
        merged: nn.Module = wrapped.merge_and_unload(safe_merge=True)
        return merged

    def _on_dequantized(self, model: PeftModel) -> PeftModel:
        """The same adapter on the dequantised base."""
        state = self.adapter_state(model)
        config = copy.deepcopy(model.peft_config[ADAPTER])
        base = model.unload()
        fresh = wrap(base.dequantize(), config)
        self.load_adapter_state(fresh, state)
        fresh.eval()
        return fresh


def wrap(model: nn.Module, config: PeftConfig) -> PeftModel:
    """``get_peft_model`` without the warnings that no user of ours can act on.

    Half-precision adapter weights are kept in fp32, as PEFT does by default.
    """
    from peft import get_peft_model

    with warnings.catch_warnings():
        # PEFT 0.21 asks a property that transformers 5.23 renamed, and corrects this flag itself.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        return get_peft_model(model, config)
