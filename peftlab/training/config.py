"""The train section of an experiment."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from peftlab.config import Config


class TrainConfig(Config):
    """The training budget and its bookkeeping, in the words of ``TrainingArguments``.

    ``eval_strategy: epoch`` evaluates on the validation split at the end of each epoch, ``steps``
    every ``eval_steps`` optimizer steps. With ``load_best_model_at_end`` the weights with the best
    validation metric are the result. ``max_steps`` overrides ``num_train_epochs``.
    ``gradient_checkpointing: selective`` keeps matrix products and attention, and recomputes the
    rest.
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
    eval_strategy: Literal["no", "epoch", "steps"] = "epoch"
    eval_steps: int | None = Field(default=None, ge=1)
    load_best_model_at_end: bool = True
    early_stopping_patience: int | None = Field(default=None, ge=1)
    save_strategy: Literal["no", "epoch", "steps"] = "no"
    save_steps: int | None = Field(default=None, ge=1)
    save_total_limit: int = Field(default=1, ge=1)
    logging_steps: int = Field(default=1, ge=1)
    report_to: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.eval_strategy == "steps" and self.eval_steps is None:
            raise ValueError("eval_strategy 'steps' needs eval_steps")
        if self.save_strategy == "steps" and self.save_steps is None:
            raise ValueError("save_strategy 'steps' needs save_steps")
        if self.eval_strategy == "no" and self.early_stopping_patience is not None:
            raise ValueError("early_stopping_patience needs an eval_strategy")
        return self
