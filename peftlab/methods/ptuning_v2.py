"""P-tuning v2: trained keys and values in front of every layer's own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from peftlab.anatomy import Anatomy
from peftlab.errors import NotMergeableError, Problem
from peftlab.methods.base import MethodConfig, Traits, check_state
from peftlab.methods.peft_backed import ADAPTER, PeftMethod

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

# PEFT runs the head of these itself, past the model's own forward; a test proves each one.
_ENCODERS = ("bert", "camembert", "electra", "roberta", "xlm-roberta")


class PTuningV2Config(MethodConfig):
    """The keys of PEFT's ``PrefixTuningConfig``.

    Args:
        num_virtual_tokens: length of the prefix (alias ``pre_seq_len``).
        prefix_projection: make the prefix from a two-layer network while training.
        encoder_hidden_size: width of that network; None takes the width of the keys.
        init: "zero" starts from keys and values of zero, "random" from a normal distribution.
    """

    kind: Literal["ptuning_v2"] = "ptuning_v2"
    num_virtual_tokens: int = Field(default=20, ge=1)
    prefix_projection: bool = False
    encoder_hidden_size: int | None = Field(default=None, ge=1)
    init: Literal["zero", "random"] = "zero"

    @model_validator(mode="before")
    @classmethod
    def _alias(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "pre_seq_len" not in data:
            return data
        if "num_virtual_tokens" in data:
            raise ValueError("pre_seq_len is another name for num_virtual_tokens: give one of them")
        renamed = {key: value for key, value in data.items() if key != "pre_seq_len"}
        return {**renamed, "num_virtual_tokens": data["pre_seq_len"]}

    @model_validator(mode="after")
    def _has_effect(self) -> PTuningV2Config:
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError("encoder_hidden_size has no effect without prefix_projection: true")
        return self


class PTuningV2(PeftMethod[PTuningV2Config]):
    """A prefix of keys and values per layer, and the task head, train (Liu et al. 2021, §3)."""

    Config = PTuningV2Config
    traits = Traits(
        summary="a trained prefix of keys and values in every layer",
        paper="https://arxiv.org/abs/2110.07602",
        mergeable=False,
        works_quantized=True,
        works_with_checkpointing=False,
        is_peft=True,
    )

    @property
    def extra_positions(self) -> int:
        return self.config.num_virtual_tokens

    def check(self, anatomy: Anatomy) -> list[Problem]:
        problems = []
        if reason := _cannot_take_prefix(anatomy):
            hint = "Use lora or freeze: they work on every model."
            problems.append(Problem("method", f"{anatomy.model_class}: {reason}", hint))
        length, positions = self.config.num_virtual_tokens, anatomy.max_positions
        if positions is not None and length >= positions:
            message = f"a prefix of {length} leaves no room in {positions} positions."
            problems.append(Problem("method.num_virtual_tokens", message, "Make it shorter."))
        return problems

    def peft_config(self, anatomy: Anatomy) -> PeftConfig:
        import peft

        width = anatomy.num_key_value_heads * anatomy.head_dim
        return peft.PrefixTuningConfig(
            task_type=anatomy.task_type,
            num_virtual_tokens=self.config.num_virtual_tokens,
            num_layers=anatomy.num_layers,
            token_dim=width,
            num_attention_heads=anatomy.num_key_value_heads,
            prefix_projection=self.config.prefix_projection,
            encoder_hidden_size=self.config.encoder_hidden_size or width,
            init_weights="zero" if self.config.init == "zero" else None,
            modules_to_save=list(anatomy.head) if anatomy.head_is_new else None,
        )

    def attach(self, model: nn.Module) -> nn.Module:
        attached = super().attach(model)
        attached.register_forward_pre_hook(_move_prompt_tokens)
        return attached

    def load_adapter_state(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Put the prefix and the head back, to predict with them.

        The projection network cannot be recovered from the prefix that it made: a model with one
        becomes a plain prefix, as PEFT loads it. ``load_training_state`` keeps the network.
        """
        from peft import PrefixEncoder

        check_state(self.adapter_state(model), state)
        wrapped: Any = model
        config = wrapped.peft_config[ADAPTER]
        if config.prefix_projection and not config.inference_mode:
            config = copy.deepcopy(config)
            config.inference_mode = True
            wrapped.peft_config[ADAPTER] = config
            flat = PrefixEncoder(config).to(state["prompt_embeddings"]).requires_grad_(False)
            wrapped.prompt_encoder[ADAPTER] = flat.to(wrapped.device)
        super().load_adapter_state(model, state)

    def merge(self, model: nn.Module) -> nn.Module:
        raise NotMergeableError(
            Problem(
                "",
                "P-tuning v2 cannot be merged: the prefix is extra keys and values that the "
                "attention of each layer reads, and no weight of the model can hold them.",
                "Export it with --format adapter.",
            )
        )


def _move_prompt_tokens(model: Any, _: Any) -> None:
    """PEFT keeps the prefix's indices off the device and would copy them in each step."""
    weight = model.prompt_encoder[ADAPTER].embedding.weight
    model.prompt_tokens[ADAPTER] = model.prompt_tokens[ADAPTER].to(weight.device)


def _cannot_take_prefix(anatomy: Anatomy) -> str:
    """Why PEFT's prefix does not work on such a model; empty if it does."""
    if anatomy.task_type is None:
        return "PEFT has no prefix for this kind of head."
    if not anatomy.cache_in:
        return "it takes no past_key_values, which is how a prefix enters the attention."
    if anatomy.cache_in == "backbone" and anatomy.model_type not in _ENCODERS:
        return f"on encoders the prefix is proven for {', '.join(_ENCODERS)} only."
    return ""


METHOD = PTuningV2
