from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from peftlab.anatomy import Anatomy
from peftlab.methods.ptuning_v2 import _ENCODERS, PTuningV2, PTuningV2Config

Build = Callable[..., nn.Module]
Batch = Callable[[str], dict[str, Tensor]]
LENGTH = 4
DECODERS = ("gpt2", "llama", "gpt2-lm", "llama-lm")
CLAIMED = (*_ENCODERS, *DECODERS)
ROBERTA_LIKE = ("camembert", "roberta", "xlm-roberta")


def ptuning(**section: Any) -> PTuningV2:
    return PTuningV2(PTuningV2Config.model_validate(section))


def with_random_prefix(model: nn.Module) -> Any:
    torch.manual_seed(5)
    return ptuning(num_virtual_tokens=LENGTH, init="random").attach(model).eval()


@pytest.fixture
def prefixed_attention() -> dict[int, tuple[Tensor, Tensor]]:
    """An attention that puts a given prefix in front of the keys and values of each layer."""
    prefix: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        scaling: float | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        layer_key, layer_value = prefix[module.layer_idx]
        rows, length = key.shape[0], key.shape[2]
        key = torch.cat([layer_key.expand(rows, -1, -1, -1), key], 2)
        value = torch.cat([layer_value.expand(rows, -1, -1, -1), value], 2)
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        seen = query.new_ones(rows, 1, query.shape[2], length, dtype=torch.bool)
        seen = mask if mask is not None else seen
        ahead = seen.new_ones(rows, 1, query.shape[2], LENGTH)
        scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
        scores = scores.masked_fill(~torch.cat([ahead, seen], -1), float("-inf"))
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    def mask_of(*args: Any, **kwargs: Any) -> Tensor | None:
        # A causal mask that is skipped would be left to a kernel that is not there.
        kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(*args, **kwargs)

    AttentionInterface.register("prefixed", attend)
    AttentionMaskInterface.register("prefixed", mask_of)
    return prefix


@pytest.mark.parametrize("name", CLAIMED)
def test_it_is_a_prefix_of_keys_and_values_in_every_layer(
    name: str,
    build: Build,
    batch: Batch,
    prefixed_attention: dict[int, tuple[Tensor, Tensor]],
) -> None:
    """Against attention written out by hand; only the positions start behind the prefix."""
    inputs = batch(name)
    plain: Any = build(name).eval()
    model = with_random_prefix(build(name))
    with torch.no_grad():
        expected = model(**inputs).logits
        cache = model.get_prompt(1)
        for index, layer in enumerate(cache.layers):
            prefixed_attention[index] = (layer.keys, layer.values)
        assert len(prefixed_attention) == 3
        plain.set_attn_implementation("prefixed")
        if model.peft_config["default"].task_type != "CAUSAL_LM":
            head = Anatomy.of(plain).head[0]
            trained = model.get_base_model().get_submodule(head).modules_to_save["default"]
            plain.get_submodule(head).load_state_dict(trained.state_dict())
        if name in ROBERTA_LIKE:
            seen = inputs["attention_mask"]
            positions = (seen.cumsum(1) + LENGTH) * seen + plain.config.pad_token_id
        else:
            positions = torch.arange(7)[None].expand(2, -1) + LENGTH
        actual = plain(**inputs, position_ids=positions).logits
    real = inputs["attention_mask"].bool()
    if actual.ndim == 3:
        actual, expected = actual[real], expected[real]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*CLAIMED, "t5"])
def test_every_layers_keys_and_values_change_the_output_and_learn(
    name: str, build: Build, batch: Batch
) -> None:
    inputs = batch(name)
    model = with_random_prefix(build(name))
    expected = model(**inputs).logits
    expected.pow(2).sum().backward()
    table = model.prompt_encoder["default"].embedding.weight
    by_layer = table.grad.view(LENGTH, 6, -1).abs().sum((0, 2))
    assert by_layer.shape == (6,)
    assert (by_layer > 0).all()
    for part in range(6):
        with torch.no_grad():
            kept = table.clone()
            table.view(LENGTH, 6, -1)[:, part] += 0.5
            if part % 2:
                assert not torch.allclose(model(**inputs).logits, expected, atol=1e-6)
            table.copy_(kept)


@pytest.mark.parametrize("name", [*CLAIMED, "t5"])
def test_padding_changes_nothing(name: str, build: Build, batch: Batch) -> None:
    inputs = batch(name)
    model = with_random_prefix(build(name))
    short = {
        key: value[:1] if key == "decoder_input_ids" else value[:1, :5]
        for key, value in inputs.items()
    }
    with torch.no_grad():
        padded, alone = model(**inputs).logits[:1], model(**short).logits
    if name.endswith("lm"):
        padded = padded[:, :5]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own call
@pytest.mark.parametrize("name", [*CLAIMED, "t5"])
def test_same_as_peft(name: str, build: Build, batch: Batch) -> None:
    task = Anatomy.of(build(name)).task_type
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=LENGTH)
    torch.manual_seed(5)
    theirs: Any = peft.get_peft_model(build(name), config).eval()
    torch.manual_seed(5)
    ours = with_random_prefix(build(name))
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(**batch(name)).logits, theirs(**batch(name)).logits)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("name", ["gpt2-lm", "llama-lm"])
def test_generation_sees_the_prefix(name: str, build: Build, batch: Batch) -> None:
    model = with_random_prefix(build(name))
    prompt = batch(name)["input_ids"][1:]
    with torch.no_grad():
        generated = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5,
            do_sample=False, eos_token_id=None,
        )  # fmt: skip
        by_hand = prompt
        for _ in range(5):
            step = model(input_ids=by_hand, attention_mask=torch.ones_like(by_hand)).logits
            by_hand = torch.cat([by_hand, step[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, by_hand)


def test_prompt_tokens_are_where_the_weights_are(build: Build) -> None:
    """Else they would be copied to the device in each step."""
    model = with_random_prefix(build("bert")).to("meta")
    (follow,) = model._forward_pre_hooks.values()
    follow(model, ())
    (tokens,) = model.prompt_tokens.values()
    assert tokens.is_meta


@pytest.mark.parametrize("projected", [False, True])
def test_starts_from_zero(projected: bool, build: Build) -> None:
    method = ptuning(num_virtual_tokens=LENGTH, prefix_projection=projected)
    model = method.attach(build("bert"))
    assert method.adapter_state(model)["prompt_embeddings"].abs().max() == 0
    assert method.adapter_state(model)["prompt_embeddings"].shape == (LENGTH, 3 * 2 * 32)


def test_projection_is_kept_to_train_and_dropped_to_predict(build: Build) -> None:
    method = ptuning(num_virtual_tokens=LENGTH, prefix_projection=True, encoder_hidden_size=8)
    model = method.attach(build("bert"))
    assert any("transform" in name for name in method.training_state(model))
    assert not any("transform" in name for name in method.adapter_state(model))


def test_too_long_a_prefix(build: Build) -> None:
    (problem,) = ptuning(num_virtual_tokens=64).check(Anatomy.of(build("bert")))
    assert "64 positions" in problem.message


def test_only_proven_encoders(build: Build) -> None:
    for name in _ENCODERS:
        assert Anatomy.of(build(name)).model_type == name
    (problem,) = ptuning().check(Anatomy.of(build("distilbert")))
    assert "past_key_values" in problem.message


def test_alias() -> None:
    assert PTuningV2Config.model_validate({"pre_seq_len": 7}).num_virtual_tokens == 7


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"pre_seq_len": 7, "num_virtual_tokens": 7}, "give one of them"),
        ({"pre_seq_len": 0}, "greater than or equal to 1"),
        ({"encoder_hidden_size": 8}, "no effect without prefix_projection"),
        ({"init": "text"}, "'zero' or 'random'"),
    ],
)
def test_section_is_checked(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PTuningV2Config.model_validate(section)
