"""Tiny models, and optimizers for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from peftlab.models.tiny import tiny_config
from peftlab.optim.build import build_optimizer
from peftlab.optim.config import OptimConfig


def make_optimizer(name: str, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    """The table's optimizer over any module."""
    config = OptimConfig(optim=name, **({"learning_rate": 0.05} | settings))
    # Without layer-wise decay nothing asks about the anatomy.
    optimizer, _ = build_optimizer(model, config, anatomy=None)  # type: ignore[arg-type]
    return optimizer


@pytest.fixture
def bert() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model: transformers.PreTrainedModel = (
        transformers.AutoModelForSequenceClassification.from_config(tiny_config("bert"))
    )
    return model


@pytest.fixture
def llama() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
        tiny_config("llama")
    )
    return model
