from __future__ import annotations

import pytest
import torch

from peftlab.errors import IncompatibleError, UnknownNameError
from peftlab.models.load import build_from_config
from peftlab.models.tiny import TINY_ARCHITECTURES, tiny_config


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_a_tiny_model_classifies_64_tokens_without_dropout(architecture: str) -> None:
    torch.manual_seed(0)
    config = tiny_config(architecture)
    model = build_from_config(
        config, "AutoModelForSequenceClassification", torch.float32, "sdpa"
    ).train()
    # Ends in T5's end-of-text token, which its classifier looks for.
    ids = torch.randint(3, config.vocab_size, (2, 64))
    ids[:, -1] = 1
    first, second = model(input_ids=ids).logits, model(input_ids=ids).logits
    assert first.shape == (2, 2)
    assert torch.equal(first, second)
    assert model.num_parameters() < 100_000


def test_a_model_is_built_without_weights_and_leaves_the_config_alone() -> None:
    config = tiny_config("llama")
    before = config.to_dict()
    with torch.device("meta"):
        model = build_from_config(config, "AutoModelForCausalLM", torch.bfloat16, "eager")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert config.to_dict() == before


def test_a_missing_form_is_named() -> None:
    with pytest.raises(IncompatibleError, match=r"bert.*no AutoModelForSeq2SeqLM"):
        build_from_config(tiny_config("bert"), "AutoModelForSeq2SeqLM", torch.float32, "sdpa")


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(UnknownNameError, match="llama"):
        tiny_config("lama")
