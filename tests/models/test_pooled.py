"""Computing only what the head reads changes neither logits nor gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from peftlab.anatomy import Anatomy
from peftlab.methods import METHODS
from peftlab.methods.base import Method
from peftlab.models.pooled import _FIRST_TOKEN_FORWARDS, skip_unread_positions
from peftlab.models.tiny import tiny_config

SMALL = {
    "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 70, "num_labels": 3,
}  # fmt: skip
METHOD_SECTIONS: dict[str, dict[str, Any]] = {
    "freeze": {"top": 1},
    "lora": {"lora_dropout": 0.0},
    "ptuning_v2": {"num_virtual_tokens": 4},
}
NO_PREFIX = {"distilbert", "data2vec-text"}


def make(model_type: str, attention: str = "sdpa", dropout: float = 0.0) -> Any:
    """A classifier of 2 or 3 layers with weights that hide no mistake."""
    torch.manual_seed(0)
    if model_type == "distilbert":
        config = tiny_config(model_type)
        config.update({"dropout": dropout, "attention_dropout": dropout, "num_labels": 3})
    else:
        rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        config = transformers.AutoConfig.for_model(
            model_type, **SMALL, **dict.fromkeys(rates, dropout)
        )
    model = transformers.AutoModelForSequenceClassification.from_config(
        config, attn_implementation=attention
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    return model.train()


def attach(model: Any, kind: str) -> tuple[Method[Any], nn.Module]:
    method_class = METHODS.get(kind)
    section = {"kind": kind, **METHOD_SECTIONS.get(kind, {})}
    method = method_class(method_class.Config.model_validate(section))
    torch.manual_seed(3)
    attached = method.attach(model)
    for parameter in attached.parameters():
        if parameter.requires_grad:
            # Adapters start at zero, where half of their gradients vanish.
            nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    return method, attached


def batch(padded: bool = True) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(5, 128, (3, 9))
    mask = torch.ones_like(ids)
    if padded:
        ids[0, 6:], mask[0, 6:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def run(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    logits = model(**inputs).logits
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(model: nn.Module, reference: nn.Module, inputs: dict[str, Tensor]) -> None:
    logits, gradients = run(model, inputs)
    expected, plain = run(reference, inputs)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    assert {n for n, g in gradients.items() if g is None} == {
        n for n, g in plain.items() if g is None
    }
    scale = max(float(g.abs().max()) for g in plain.values() if g is not None)
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(
                gradient, plain[name], rtol=1e-4, atol=1e-6 * scale, msg=name
            )


def blocks_positions(model: Any, anatomy: Anatomy, inputs: dict[str, Tensor], **kwargs: Any) -> int:
    """How many positions the last block returns."""
    seen: list[int] = []
    block = model.get_submodule(anatomy.blocks[-1])
    handle = block.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    model(**inputs, **kwargs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("model_type", sorted(_FIRST_TOKEN_FORWARDS))
@pytest.mark.parametrize("kind", METHODS.names)
def test_same_logits_and_gradients(model_type: str, kind: str) -> None:
    if kind == "ptuning_v2" and model_type in NO_PREFIX:
        pytest.skip("PEFT has no prefix for it")
    base = make(model_type)
    anatomy = Anatomy.of(base)
    _, model = attach(base, kind)
    reference = copy.deepcopy(model)
    assert skip_unread_positions(base, anatomy)
    for padded in (True, False):
        inputs = batch(padded)
        assert blocks_positions(base, anatomy, inputs) == 1
        assert_same(model, reference, inputs)
        model.zero_grad()
        reference.zero_grad()


@pytest.mark.parametrize("model_type", sorted(_FIRST_TOKEN_FORWARDS))
@pytest.mark.parametrize("kind", ["full", "ptuning_v2"])
def test_same_with_eager_attention(model_type: str, kind: str) -> None:
    if kind == "ptuning_v2" and model_type in NO_PREFIX:
        pytest.skip("PEFT has no prefix for it")
    base = make(model_type, "eager")
    anatomy = Anatomy.of(base)
    _, model = attach(base, kind)
    reference = copy.deepcopy(model)
    assert skip_unread_positions(base, anatomy)
    assert_same(model, reference, batch())


def flops_of(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return int(counter.get_total_flops())


def test_a_single_query_needs_neither_keys_nor_values() -> None:
    """Unless something else is called with them: then they are made, with the same logits."""
    model, inputs = make("bert"), batch()
    assert skip_unread_positions(model, Anatomy.of(model))
    without, flops = model(**inputs).logits, flops_of(model, inputs)
    seen: list[torch.Size] = []
    key = model.bert.encoder.layer[-1].attention.self.key
    key.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(model(**inputs).logits, without, rtol=1e-5, atol=1e-6)
    assert seen == [(3, 9, 32)]
    # Two products of all positions against four of one.
    assert flops_of(model, inputs) - flops > 2 * 3 * 9 * 32 * 32


def test_a_mask_for_each_head() -> None:
    model = make("bert")
    reference, inputs = copy.deepcopy(model), batch(padded=False)
    assert skip_unread_positions(model, Anatomy.of(model))
    torch.manual_seed(2)
    inputs["attention_mask"] = torch.randn(3, 4, 9, 9)
    assert_same(model, reference, inputs)


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_same_with_gradient_checkpointing(model_type: str) -> None:
    base = make(model_type)
    anatomy = Anatomy.of(base)
    reference = copy.deepcopy(base)
    calls: list[int] = []
    block = base.get_submodule(anatomy.blocks[-1])
    norm = next(module for module in block.modules() if isinstance(module, nn.LayerNorm))
    norm.register_forward_hook(lambda *_: calls.append(1))
    base.activation_checkpointing_enable()
    skip_unread_positions(base, anatomy)
    assert blocks_positions(base, anatomy, batch()) == 1
    calls.clear()
    assert_same(base, reference, batch())
    assert len(calls) == 2  # Once forward, once again for backward.


def test_dropout_draws_the_same_distribution() -> None:
    """Other random numbers, but the same mean and spread of the logits over many draws."""
    base = make("bert", dropout=0.3)
    reference = copy.deepcopy(base)
    skip_unread_positions(base, Anatomy.of(base))
    row = {name: values[:1].repeat(4000, 1) for name, values in batch().items()}
    torch.manual_seed(5)
    with torch.no_grad():
        drawn, expected = base(**row).logits, reference(**row).logits
    spread = expected.std(dim=0)
    assert float(spread.min()) > 0
    # Five standard errors of a mean's and of a standard deviation's difference.
    assert ((drawn.mean(0) - expected.mean(0)).abs() < 5 * spread * (2 / 4000) ** 0.5).all()
    assert ((drawn.std(0) - spread).abs() < 5 * spread * (1 / 4000) ** 0.5).all()


def test_whole_states_on_request() -> None:
    base = make("bert", "eager")
    anatomy = Anatomy.of(base)
    expected = base(**batch(), output_hidden_states=True, output_attentions=True)
    skip_unread_positions(base, anatomy)
    output = base(**batch(), output_hidden_states=True, output_attentions=True)
    for key in ("hidden_states", "attentions"):
        for one, other in zip(output[key], expected[key], strict=True):
            torch.testing.assert_close(one, other)
    base.config.output_hidden_states = True
    assert base(**batch()).hidden_states[-1].shape[1] == 9


def test_copied_saved_and_loaded(tmp_path: Path) -> None:
    base = make("bert").eval()
    anatomy = Anatomy.of(base)
    names = list(base.state_dict())
    expected = base(**batch()).logits
    skip_unread_positions(base, anatomy)
    assert list(base.state_dict()) == names
    copied = copy.deepcopy(base)
    nn.init.zeros_(copied.classifier.weight)
    torch.testing.assert_close(base(**batch()).logits, expected)
    assert blocks_positions(copied, anatomy, batch()) == 1
    base.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert blocks_positions(again, anatomy, batch()) == 9
    torch.testing.assert_close(again(**batch()).logits, expected)


def test_attach_after_and_merge(tmp_path: Path) -> None:
    base = make("bert").eval()
    anatomy = Anatomy.of(base)
    skip_unread_positions(base, anatomy)
    method, model = attach(base, "lora")
    assert blocks_positions(base, anatomy, batch()) == 1
    logits = model.eval()(**batch()).logits
    merged: Any = method.merge(model)
    torch.testing.assert_close(merged(**batch()).logits, logits, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(**batch()).logits, logits, rtol=1e-4, atol=1e-5)


def saved_storages(model: nn.Module, inputs: dict[str, Tensor]) -> list[int]:
    """Bytes of every storage that a forward keeps for backward, parameters excepted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(**inputs).logits
    del logits
    return sorted(seen.values())


def test_the_pooled_vector_does_not_keep_the_hidden_state() -> None:
    """MPNet's head reads the first token; its block is not one of those that are known."""
    torch.manual_seed(0)
    config = transformers.MPNetConfig(
        **SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    base: Any = transformers.MPNetForSequenceClassification(config)
    for parameter in base.mpnet.parameters():
        parameter.requires_grad = False
    anatomy, inputs = Anatomy.of(base), batch()
    hidden_bytes, pooled_bytes = 3 * 9 * 32 * 4, 3 * 32 * 4
    assert hidden_bytes in saved_storages(base, inputs)
    expected, gradients = run(base, inputs)
    base.zero_grad()
    assert not skip_unread_positions(base, anatomy)
    after = saved_storages(base, inputs)
    assert hidden_bytes not in after
    assert pooled_bytes in after
    logits, same = run(base, inputs)
    assert torch.equal(logits, expected)
    for name, gradient in gradients.items():
        assert (gradient is None) == (same[name] is None)
        torch.testing.assert_close(gradient, same[name], rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_other_classifiers_stay_as_they_are(architecture: str) -> None:
    torch.manual_seed(0)
    base: Any = transformers.AutoModelForSequenceClassification.from_config(
        tiny_config(architecture)
    )
    inputs = batch(padded=False)
    inputs["input_ids"][:, -1] = 1
    reference, anatomy = copy.deepcopy(base), Anatomy.of(base)
    assert not skip_unread_positions(base, anatomy)
    assert type(base.get_submodule(anatomy.blocks[-1])) is type(
        reference.get_submodule(anatomy.blocks[-1])
    )
    assert_same(base, reference, inputs)


def test_decoders_and_language_models_are_left_alone() -> None:
    config = transformers.BertConfig(**SMALL, is_decoder=True)
    decoder = transformers.BertForSequenceClassification(config)
    assert not skip_unread_positions(decoder, Anatomy.of(decoder))
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))
    assert not skip_unread_positions(masked, Anatomy.of(masked))
