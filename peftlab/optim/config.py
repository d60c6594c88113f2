"""The optim section of an experiment."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from peftlab.config import Config


class OptimConfig(Config):
    """Optimizer, schedule and clipping, in the words of ``TrainingArguments``.

    ``learning_rate_multipliers`` maps a regular expression over parameter names to a factor; a
    parameter takes the first that matches (``re.search``). ``layerwise_lr_decay`` multiplies the
    rate by that factor per block from the top down (ULMFiT, Howard & Ruder 2018, §3.2).
    ``optimizer_in_backward`` updates each parameter during backward and frees its gradient at once;
    it needs ``max_grad_norm: null`` and one micro-batch a step.
    """

    optim: str = "adamw_torch"
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = Field(default=0.06, ge=0, le=1)
    warmup_steps: int | None = Field(default=None, ge=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    learning_rate_multipliers: dict[str, float] = Field(default_factory=dict)
    layerwise_lr_decay: float | None = Field(default=None, gt=0, le=1)
    optimizer_in_backward: bool = False

    @model_validator(mode="after")
    def _multipliers_positive(self) -> OptimConfig:
        if any(factor < 0 for factor in self.learning_rate_multipliers.values()):
            raise ValueError("learning_rate_multipliers must not be negative")
        return self

    def num_warmup_steps(self, total_steps: int) -> int:
        """``warmup_steps`` where given, else the ratio of ``total_steps``, rounded up."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return -int(-total_steps * self.warmup_ratio // 1)
