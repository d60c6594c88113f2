from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError
from torch import nn

from peftlab.anatomy import Anatomy
from peftlab.errors import IncompatibleError
from peftlab.methods.freeze import Freeze, FreezeConfig

Build = Callable[..., nn.Module]


def freeze(**section: Any) -> Freeze:
    return Freeze(FreezeConfig.model_validate(section))


def trained_parts(model: nn.Module, method: Freeze) -> set[Any]:
    """Blocks by number, and the other parts by name."""
    anatomy = Anatomy.of(model)
    method.attach(model)
    parts: set[Any] = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        block = anatomy.block_of(name)
        outside = next(
            (
                part
                for part in ("embeddings", "after_blocks", "head")
                if name in anatomy.parameters_of(getattr(anatomy, part))
            ),
            None,
        )
        parts.add(block if block is not None else outside)
    return parts


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        ({"top": 1}, {2, "after_blocks", "head"}),
        ({"top": 3}, {0, 1, 2, "after_blocks", "head"}),
        ({"top": 0}, {"head"}),
        ({"top": 0, "after_blocks": True}, {"after_blocks", "head"}),
        ({"top": 1, "after_blocks": False, "head": False}, {2}),
        ({"bottom": 2}, {0, 1, "head"}),
        ({"blocks": "0-1"}, {0, 1, "head"}),
        ({"blocks": "0, -1"}, {0, 2, "after_blocks", "head"}),
        ({"blocks": "-2--1"}, {1, 2, "after_blocks", "head"}),
        ({"blocks": [1, -3]}, {0, 1, "head"}),
        ({"patterns": [r"layer\.1\.attention"]}, {1, "head"}),
        ({"patterns": [r"pooler"], "head": False}, {"after_blocks"}),
        ({"freeze_embeddings": True}, {0, 1, 2, "after_blocks", "head"}),
    ],
)
def test_what_trains(section: dict[str, Any], parts: set[Any], build: Build) -> None:
    assert trained_parts(build("bert"), freeze(**section)) == parts


def test_a_language_models_head_stays_frozen_unless_asked(build: Build) -> None:
    assert trained_parts(build("llama-lm-untied"), freeze(top=1)) == {2, "after_blocks"}
    with_head = freeze(top=1, head=True)
    assert trained_parts(build("llama-lm-untied"), with_head) == {2, "after_blocks", "head"}


def test_top_of_an_encoder_decoder_is_the_decoder(build: Build) -> None:
    model = build("t5")
    freeze(top=1).attach(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(n.startswith(("decoder.block.2.", "decoder.final_layer_norm")) for n in trained)


@pytest.mark.parametrize(
    ("section", "model", "message"),
    [
        ({"top": 4}, "bert", "top: 4, but BertForSequenceClassification has 3 blocks"),
        ({"bottom": 9}, "gpt2", "bottom: 9, but GPT2ForSequenceClassification has 3 blocks"),
        ({"blocks": "0-5"}, "bert", "reaches block 5, but .* blocks 0 to 2"),
        ({"blocks": [-4]}, "bert", "reaches block -4, but .* blocks 0 to 2"),
        ({"patterns": [r"encodr\.layer"]}, "bert", "matches no parameter.*Nearest: .*encoder"),
        ({"patterns": ["classifier", "LayrNorm"]}, "bert", "'LayrNorm' matches no.*LayerNorm"),
        ({"top": 0, "head": True}, "llama-lm", "input embedding's tensor"),
        ({"top": 0}, "llama-lm", "nothing of LlamaForCausalLM would train"),
    ],
)
def test_refused(section: dict[str, Any], model: str, message: str, build: Build) -> None:
    tiny = build(model)
    method = freeze(**section)
    assert len(method.check(Anatomy.of(tiny))) == 1
    with pytest.raises(IncompatibleError, match=message):
        method.attach(tiny)
    assert all(parameter.requires_grad for parameter in tiny.parameters()), "left half done"


def test_every_wrong_pattern_is_named_at_once(build: Build) -> None:
    problems = freeze(patterns=["qery", "vlue"]).check(Anatomy.of(build("bert")))
    assert [problem.message.split("'")[1] for problem in problems] == ["qery", "vlue"]
    assert "query" in problems[0].hint
    assert "value" in problems[1].hint


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "exactly one of .*; found none"),
        ({"freeze_embeddings": False}, "found none"),
        ({"top": 1, "bottom": 1}, "found top and bottom"),
        ({"top": 0, "patterns": ["x"]}, "found top and patterns"),
        ({"top": -1}, "greater than or equal to 0"),
        ({"blocks": "first"}, "is not a list of block numbers"),
        ({"blocks": []}, "is empty"),
        ({"patterns": []}, "at least 1 item"),
        ({"patterns": ["("]}, "is not a regular expression"),
        ({"top": 0, "unfreeze_ratio": 0.5}, "unfreeze_ratio needs top: k"),
        ({"bottom": 2, "unfreeze_ratio": 0.5}, "unfreeze_ratio needs top: k"),
        ({"top": 2, "unfreeze_ratio": 1.0}, "less than 1"),
    ],
)
def test_section_is_checked(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FreezeConfig.model_validate(section)


@pytest.mark.parametrize(
    ("pattern", "notes"),
    [
        (r"(query|valeu)\.weight", ["'valeu' matches nothing. Nearest: value"]),
        (r"layer\.[01]\.output", []),
        (r"attention.*LayerNorm", []),
        (r"classifier", []),
    ],
)
def test_a_partial_match_is_reported(pattern: str, notes: list[str], build: Build) -> None:
    method = freeze(patterns=[pattern])
    method.attach(build("bert"))
    assert len(method.notes) == len(notes)
    for note, expected in zip(method.notes, notes, strict=True):
        assert expected in note


def test_a_pattern_that_reaches_some_blocks_is_reported(build: Build) -> None:
    method = freeze(patterns=["relative_attention_bias"])
    method.attach(build("t5"))
    assert method.notes == ["pattern 'relative_attention_bias' matches in 2 of 6 blocks."]


STAGED = {"top": 2, "unfreeze_ratio": 0.5}


@pytest.mark.parametrize(
    ("section", "model", "stages"),
    [
        ({}, "bert", [{"top": 0}, {"top": 1}, {"top": 2}]),
        ({"after_blocks": True}, "bert", [{"top": 0}, {"top": 1}, {"top": 2}]),
        # Where there is no head to train, the topmost block does from the start.
        ({}, "llama-lm", [{"top": 1}, {"top": 1}, {"top": 2}]),
        ({"head": False}, "bert", [{"top": 1}, {"top": 1}, {"top": 2}]),
    ],
)
def test_a_stage_trains_what_freezing_fewer_blocks_would(
    section: dict[str, Any], model: str, stages: list[dict[str, Any]], build: Build
) -> None:
    method = freeze(**STAGED, **section)
    staged = method.attach(build(model))
    for stage, top in enumerate(stages):
        method.enter_stage(staged, stage)
        expected = freeze(**top, **section).attach(build(model))
        for (name, parameter), other in zip(
            staged.named_parameters(), expected.parameters(), strict=True
        ):
            assert parameter.requires_grad == other.requires_grad, (stage, name)


@pytest.mark.parametrize(
    ("section", "steps", "starts"),
    [
        ({"top": 2}, 100, (0,)),
        ({"top": 2, "unfreeze_ratio": 0.5}, 100, (0, 25, 50)),
        ({"top": 4, "unfreeze_ratio": 0.67}, 100, (0, 16, 33, 50, 67)),
        ({"top": 4, "unfreeze_ratio": 0.5}, 3, (0, 0, 0, 1, 1)),
        ({"top": 1, "unfreeze_ratio": 0.99}, 1, (0, 0)),
    ],
)
def test_when_the_stages_start(
    section: dict[str, Any], steps: int, starts: tuple[int, ...]
) -> None:
    assert freeze(**section).stage_starts(steps) == starts
