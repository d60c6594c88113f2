"""Parameter groups: weight decay without norms and biases, and learning-rate multipliers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from peftlab.anatomy import Anatomy, inside
from peftlab.errors import ConfigError, Problem
from peftlab.optim.config import OptimConfig
from peftlab.registry import did_you_mean

if TYPE_CHECKING:
    from torch import nn


def build_groups(
    model: nn.Module, config: OptimConfig, anatomy: Anatomy
) -> tuple[list[dict[str, Any]], list[str]]:
    """The optimizer's parameter groups, over the parameters that train.

    Returns:
        the groups (``params``, ``lr``, ``weight_decay``) in the model's order, and notes on
        patterns that match frozen parameters only.

    Raises:
        ConfigError: a pattern is no regular expression or matches no parameter.
    """
    patterns = _compile(config)
    matched: dict[str, set[bool]] = {pattern.pattern: set() for pattern, _ in patterns}
    undecayed = _undecayed_names(model)
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, parameter in model.named_parameters():
        multiplier = _layerwise(name, config, anatomy)
        hits = [(pattern, factor) for pattern, factor in patterns if pattern.search(name)]
        for pattern, _ in hits:
            matched[pattern.pattern].add(parameter.requires_grad)
        if not parameter.requires_grad:
            continue
        if hits:
            multiplier *= hits[0][1]
        decay = 0.0 if name in undecayed else config.weight_decay
        groups.setdefault((config.learning_rate * multiplier, decay), []).append(parameter)
    _require_matches(model, matched)
    notes = [
        f"learning_rate_multipliers: {pattern!r} matches frozen parameters only"
        for pattern, trains in matched.items()
        if trains == {False}
    ]
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ], notes


def _compile(config: OptimConfig) -> list[tuple[re.Pattern[str], float]]:
    patterns, problems = [], []
    for text, factor in config.learning_rate_multipliers.items():
        try:
            patterns.append((re.compile(text), factor))
        except re.error as error:
            where = "optim.learning_rate_multipliers"
            problems.append(Problem(where, f"{text!r} is no regular expression: {error}."))
    if problems:
        raise ConfigError(problems)
    return patterns


def _require_matches(model: nn.Module, matched: dict[str, set[bool]]) -> None:
    names = [name for name, _ in model.named_parameters()]
    where = "optim.learning_rate_multipliers"
    if problems := [
        Problem(where, f"{pattern!r} matches no parameter.", did_you_mean(pattern, names))
        for pattern, trains in matched.items()
        if not trains
    ]:
        raise ConfigError(problems)


def _undecayed_names(model: nn.Module) -> set[str]:
    """Biases and everything inside a normalisation layer, as ``transformers.Trainer`` has it."""
    names = set()
    for module_name, module in model.named_modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False):
            if is_norm or "bias" in name:
                names.add(f"{module_name}.{name}" if module_name else name)
    return names


def _layerwise(name: str, config: OptimConfig, anatomy: Anatomy) -> float:
    """``decay ** depth``: the head 0, the top block 1, … the embeddings deepest."""
    if config.layerwise_lr_decay is None:
        return 1.0
    # Adapters keep the base model's names behind a prefix.
    plain = name.removeprefix("base_model.model.")
    block = anatomy.block_of(plain)
    if block is not None:
        depth = len(anatomy.blocks) - block
    elif inside(plain, anatomy.embeddings):
        depth = len(anatomy.blocks) + 1
    else:
        depth = 0
    return float(config.layerwise_lr_decay**depth)
