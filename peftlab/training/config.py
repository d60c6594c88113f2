"""The train section of an experiment."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from peftlab.config import Config
from peftlab.units import parse_bytes


class TrainConfig(Config):
    """The training budget and its bookkeeping, in the words of ``TrainingArguments``.

    ``eval_strategy: epoch`` evaluates on the validation split at the end of each epoch, ``steps``
    every ``eval_steps`` optimizer steps. With ``load_best_model_at_end`` the weights with the best
    validation metric are the result. ``max_steps`` overrides ``num_train_epochs``.
    ``gradient_checkpointing: selective`` keeps matrix products and attention, and recomputes the
    rest. ``skip_unread_positions`` computes of an encoder's last block only the position that a
    sequence classifier's head reads: the same logits and gradients. ``torch_compile`` compiles the
    blocks that train; neither plan nor measurement can see into them.
    ``trunk_cache: auto | off | SIZE`` is how much of the disk may be taken to compute the frozen
    trunk once for all epochs; ``auto`` is 10 GiB, or a fifth of what is free if that is less.
    ``trunk_cache_dtype: float16`` halves it and rounds what float32 computed.
    """

    num_train_epochs: float = Field(default=3, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    per_device_train_batch_size: int = Field(default=32, ge=1)
    per_device_eval_batch_size: int = Field(default=64, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    max_length: int = Field(default=128, ge=4)
    gradient_checkpointing: bool | Literal["selective"] = False
    group_by_length: bool = True
    trunk_dropout: bool = False
    trunk_cache: str = "auto"
    trunk_cache_dtype: Literal["float32", "float16"] = "float32"
    skip_unread_positions: bool = True
    torch_compile: bool = False
    eval_strategy: Literal["no", "epoch", "steps"] = "epoch"
    eval_steps: int | None = Field(default=None, ge=1)
    load_best_model_at_end: bool = True
    early_stopping_patience: int | None = Field(default=None, ge=1)
    save_strategy: Literal["no", "epoch", "steps"] = "no"
    save_steps: int | None = Field(default=None, ge=1)
    save_total_limit: int = Field(default=1, ge=1)
    logging_steps: int = Field(default=1, ge=1)
    report_to: tuple[str, ...] = ()

    @field_validator("trunk_cache")
    @classmethod
    def _is_a_size(cls, setting: str) -> str:
        if setting not in ("auto", "off"):
            try:
                parse_bytes(setting)
            except ValueError as error:
                raise ValueError(f"must be auto, off or a size: {error}") from None
        return setting

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.eval_strategy == "steps" and self.eval_steps is None:
            raise ValueError("eval_strategy 'steps' needs eval_steps")
        if self.save_strategy == "steps" and self.save_steps is None:
            raise ValueError("save_strategy 'steps' needs save_steps")
        if self.eval_strategy == "no" and self.early_stopping_patience is not None:
            raise ValueError("early_stopping_patience needs an eval_strategy")
        return self
