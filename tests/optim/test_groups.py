"""Weight decay as Trainer has it; learning-rate multipliers and layer-wise decay."""

from __future__ import annotations

import peft
import pytest
import transformers
from torch import nn

from peftlab.anatomy import Anatomy
from peftlab.errors import ConfigError
from peftlab.methods.peft_backed import wrap
from peftlab.optim.config import OptimConfig
from peftlab.optim.groups import build_groups

PATTERNS = "learning_rate_multipliers"


def by_name(
    model: nn.Module, anatomy: Anatomy | None = None, **settings: object
) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """(rate, decay) of every parameter in a group, and the notes."""
    config = OptimConfig(**({"learning_rate": 1.0} | settings))  # type: ignore[arg-type]
    groups, notes = build_groups(model, config, anatomy or Anatomy.of(model))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    assert len(found) == sum(len(group["params"]) for group in groups)
    return found, notes


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_decay_as_in_trainer(architecture: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(architecture)
    found, notes = by_name(model, weight_decay=0.1)
    # The method uses nothing of its Trainer.
    expected = transformers.Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    assert {name for name, (_, decay) in found.items() if decay} == set(expected)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert {decay for _, decay in found.values()} == {0.0, 0.1}
    assert notes == []


def test_frozen_parameters_are_in_no_group(bert: nn.Module) -> None:
    bert.bert.requires_grad_(False)  # type: ignore[union-attr]
    found, _ = by_name(bert)
    assert set(found) == {"classifier.weight", "classifier.bias"}


def test_the_first_pattern_that_matches_wins(bert: nn.Module) -> None:
    found, notes = by_name(
        bert, learning_rate=0.5, **{PATTERNS: {r"layer\.2\.": 4.0, "encoder": 2.0, "^class": 10.0}}
    )
    for name, (rate, _) in found.items():
        factor = 4 if "layer.2." in name else 2 if "encoder" in name else 1
        factor = 10 if name.startswith("classifier") else factor
        assert rate == 0.5 * factor, name
    assert notes == []


def test_every_pattern_that_matches_nothing_is_an_error(bert: nn.Module) -> None:
    patterns = {"clasifier.weight": 2.0, "classifier": 2.0, "nothing-like-it-at-all": 3.0}
    with pytest.raises(ConfigError) as raised:
        by_name(bert, **{PATTERNS: patterns})
    near, far = raised.value.problems
    assert near.where == far.where == "optim.learning_rate_multipliers"
    assert near.message == "'clasifier.weight' matches no parameter."
    assert "'classifier.weight'" in near.hint
    assert "nothing-like-it-at-all" in far.message


def test_a_shadowed_pattern_counts_as_matching(bert: nn.Module) -> None:
    found, _ = by_name(bert, **{PATTERNS: {"classifier": 2.0, "classifier.bias": 3.0}})
    assert found["classifier.bias"][0] == 2.0


def test_a_pattern_that_is_no_regular_expression(bert: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"'\(' is no regular expression"):
        by_name(bert, **{PATTERNS: {"(": 2.0}})


def test_a_pattern_for_frozen_parameters_alone_is_noted(bert: nn.Module) -> None:
    bert.bert.embeddings.requires_grad_(False)  # type: ignore[union-attr]
    _, notes = by_name(bert, **{PATTERNS: {"embeddings": 2.0, "word_emb|classifier": 2.0}})
    assert notes == ["learning_rate_multipliers: 'embeddings' matches frozen parameters only"]


def depth_of(name: str) -> int:
    """Of a 3-layer model: the head 0, the blocks 1 to 3 from the top, the embeddings 4."""
    for layer in range(3):
        if f"layer.{layer}." in name or f"layers.{layer}." in name:
            return 3 - layer
    return 4 if "embed" in name else 0


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_layerwise_decay_by_depth(architecture: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(architecture)
    found, _ = by_name(model, layerwise_lr_decay=0.5)
    assert {name: rate for name, (rate, _) in found.items()} == {
        name: 0.5 ** depth_of(name) for name in found
    }
    assert {rate for rate, _ in found.values()} == {1.0, 0.5, 0.25, 0.125, 0.0625}


def test_layerwise_decay_below_pefts_prefix(bert: nn.Module) -> None:
    anatomy = Anatomy.of(bert)
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    model = wrap(bert, config)
    found, _ = by_name(model, anatomy, layerwise_lr_decay=0.5)
    assert any("lora_A" in name for name in found)
    assert {name: rate for name, (rate, _) in found.items()} == {
        name: 0.5 ** depth_of(name) for name in found
    }
    assert {rate for rate, _ in found.values()} == {1.0, 0.5, 0.25, 0.125}


def test_multipliers_and_layerwise_decay_multiply(bert: nn.Module) -> None:
    found, _ = by_name(bert, layerwise_lr_decay=0.5, **{PATTERNS: {"query": 3.0}})
    assert found["bert.encoder.layer.2.attention.self.query.weight"][0] == 1.5
    assert found["bert.encoder.layer.2.attention.self.key.weight"][0] == 0.5


def test_the_pooler_counts_with_the_head(bert: nn.Module) -> None:
    found, _ = by_name(bert, layerwise_lr_decay=0.5)
    assert found["bert.pooler.dense.weight"][0] == 1.0
