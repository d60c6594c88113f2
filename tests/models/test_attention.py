"""Attention that draws its dropout faster is torch's, given what was drawn."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from peftlab.memory.flops import count_flops
from peftlab.models import attention as module
from peftlab.models.attention import attention, draw_attention_dropout_fast
from peftlab.models.tiny import tiny_config

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 4, 5, 5, 8
P = 0.3


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    masks: list[Tensor] = []
    draw = module.draw_kept

    def noted(*args: Any) -> Tensor:
        masks.append(draw(*args))
        return masks[-1]

    monkeypatch.setattr(module, "draw_kept", noted)
    return masks


def tensors(
    dtype: torch.dtype = torch.float32,
    *,
    keys: int = KEYS,
    key_heads: int = HEADS,
    value_width: int = WIDTH,
) -> tuple[Tensor, Tensor, Tensor]:
    """As projections leave them: heads beside each other in memory."""
    torch.manual_seed(0)
    made = [
        torch.randn(BATCH, length, heads, width, dtype=dtype).transpose(1, 2).requires_grad_()
        for length, heads, width in (
            (QUERIES, HEADS, WIDTH),
            (keys, key_heads, WIDTH),
            (keys, key_heads, value_width),
        )
    ]
    return made[0], made[1], made[2]


def oracle(
    *inputs: Tensor, kept: Tensor, attn_mask: Tensor | None = None, **settings: Any
) -> Tensor:
    """What torch computes when it is given what was drawn; there booleans would be numbers."""
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -math.inf)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Dropout mask should only be used for testing")
        out: Tensor = torch._scaled_dot_product_attention_math(
            *inputs, attn_mask=attn_mask, dropout_p=P, dropout_mask=kept.bool(), **settings
        )[0]
    return out


def gradients(out: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return list(torch.autograd.grad(out, inputs, torch.linspace(-1, 1, out.numel()).view_as(out)))


def padding(*shape: int) -> Tensor:
    torch.manual_seed(1)
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    return mask


def blind() -> Tensor:
    mask = padding(BATCH, 1, QUERIES, KEYS)
    mask[1, 0, 2] = False
    return mask


def numbers() -> Tensor:
    return torch.randn(1, HEADS, QUERIES, KEYS, generator=torch.Generator().manual_seed(5))


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no mask": ({}, {}),
    "scale": ({}, {"scale": 0.7}),
    "causal": ({}, {"is_causal": True}),
    "causal, more keys": ({"keys": 9}, {"is_causal": True}),
    "padding": ({}, {"attn_mask": padding(BATCH, 1, 1, KEYS)}),
    "mask of every head": ({}, {"attn_mask": padding(BATCH, HEADS, QUERIES, KEYS)}),
    "mask for all": ({}, {"attn_mask": padding(QUERIES, KEYS)}),
    "a query that sees nothing": ({}, {"attn_mask": blind()}),
    "a prefix": ({"keys": 9}, {"attn_mask": padding(BATCH, 1, QUERIES, 9)}),
    "numbers": ({}, {"attn_mask": numbers()}),
    "numbers, a query that sees nothing": (
        {},
        {"attn_mask": torch.zeros(BATCH, 1, QUERIES, KEYS).masked_fill(~blind(), -math.inf)},
    ),
    "values of another width": ({"value_width": 3}, {}),
    "grouped": ({"key_heads": 2}, {"enable_gqa": True, "is_causal": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_torch_s_with_the_same_mask(case: str, drawn: list[Tensor]) -> None:
    shapes, settings = CASES[case]
    inputs = tensors(**shapes)
    out = attention(*inputs, dropout_p=P, **settings)
    (kept,) = drawn
    expected = oracle(*inputs, kept=kept, **settings)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert out.isfinite().all()
    for ours, theirs in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    if "sees nothing" in case:
        assert not out[1, :, 2].any()


def test_learned_numbers(drawn: list[Tensor]) -> None:
    inputs, bias = tensors(), numbers().requires_grad_()
    out = attention(*inputs, attn_mask=bias, dropout_p=P)
    expected = oracle(*inputs, attn_mask=bias, kept=drawn[0])
    torch.testing.assert_close(
        gradients(out, (bias,)), gradients(expected, (bias,)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("mask", [None, blind(), numbers()], ids=["none", "booleans", "numbers"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision(
    dtype: torch.dtype, autocast: torch.dtype | None, mask: Tensor | None, drawn: list[Tensor]
) -> None:
    inputs = tensors(dtype)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        out = attention(*inputs, attn_mask=mask, dropout_p=P)
        plain = nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask, dropout_p=P)
        assert out.dtype is plain.dtype
    # The rounding that torch puts between its own operations, on top of the result's.
    wide = [tensor.to(out.dtype).double() for tensor in inputs]
    if mask is not None and mask.is_floating_point():
        mask = mask.to(out.dtype).double()
    expected = oracle(*wide, attn_mask=mask, kept=drawn[0])
    torch.testing.assert_close(out, expected.to(out.dtype))
    assert [g.dtype for g in gradients(out, inputs)] == [dtype] * 3


def test_second_derivatives() -> None:
    def f(*inputs: Tensor) -> Tensor:
        torch.manual_seed(7)
        return attention(*inputs, attn_mask=blind(), dropout_p=P)

    inputs = tensors(torch.float64)
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("p", [0.0, 1.0, 1e-9])
def test_certain_dropout_is_torch_s(p: float) -> None:
    inputs = tensors()
    torch.manual_seed(0)
    out = attention(*inputs, dropout_p=p)
    torch.manual_seed(0)
    expected = nn.functional.scaled_dot_product_attention(*inputs, dropout_p=p)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "settings", [{"is_causal": True, "attn_mask": blind()}, {"dropout_p": 2.0}]
)
def test_refused_by_torch(settings: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError):
        attention(*tensors(), **{"dropout_p": P} | settings)


def test_batches_that_broadcast() -> None:
    query, key, value = tensors()
    assert attention(query[:1], key, value, dropout_p=P).shape == (BATCH, HEADS, QUERIES, WIDTH)


def test_drops_as_often(drawn: list[Tensor]) -> None:
    torch.manual_seed(0)
    ones = torch.ones(8, 8, 64, 16)
    mask = torch.ones(8, 1, 1, 64, dtype=torch.bool)
    mask[0, ..., 32:] = False
    out = attention(ones, ones, ones, attn_mask=mask, dropout_p=P)
    (kept,) = drawn
    assert not kept[0, ..., 32:].any()
    visible = kept[1:].float()
    assert abs(float(visible.mean()) - (1 - P)) < 4 * math.sqrt(P * (1 - P) / visible.numel())
    assert abs(float(out.mean()) - 1) < 0.01


@pytest.mark.parametrize("learns", ["query", "key", "value", "query key value"])
def test_keeps_a_byte_for_a_probability_and_what_gradients_need(learns: str) -> None:
    inputs = dict(zip(("query", "key", "value"), tensors(), strict=True))
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in learns)
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = attention(**inputs, dropout_p=P)
    needed = {"query": {"key", "value"}, "key": {"query", "value"}, "value": set[str]()}
    named = set().union(*(needed[name] for name in learns.split()))
    probabilities = BATCH * HEADS * QUERIES * KEYS
    assert sum(storages.values()) == 5 * probabilities + sum(inputs[n].nbytes for n in named)
    assert out.requires_grad


def test_counts_as_torch_s_products() -> None:
    inputs, mask = tensors(), padding(BATCH, 1, 1, KEYS)
    with FlopCounterMode(display=False) as torchs:
        gradients(oracle(*inputs, attn_mask=mask, kept=torch.ones(1)), inputs)
    with count_flops() as ours:
        gradients(attention(*inputs, attn_mask=mask, dropout_p=P), inputs)
    assert ours.flops == torchs.get_total_flops() == 6 * 2 * BATCH * HEADS * QUERIES * KEYS * WIDTH


def tiny(architecture: str, **settings: Any) -> Any:
    config = tiny_config(architecture)
    for key, value in settings.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_config(config)


def loss_of(model: nn.Module, seed: int = 1) -> Tensor:
    torch.manual_seed(2)
    ids = torch.randint(3, 100, (4, 24))
    ids[:, -1] = 1  # what T5's classifier reads
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    torch.manual_seed(seed)
    loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=ids[:, 0] % 2).loss
    return loss


MODELS = {
    "bert": "attention_probs_dropout_prob",
    "gpt2": "attn_pdrop",
    "llama": "attention_dropout",
    "qwen2": "attention_dropout",
}


@pytest.mark.parametrize("architecture", MODELS)
def test_a_model_that_was_given_and_one_that_was_not(
    architecture: str, drawn: list[Tensor]
) -> None:
    model = tiny(architecture, **{MODELS[architecture]: 0.2}).train()
    expected = loss_of(model)
    ours = copy.deepcopy(model)
    draw_attention_dropout_fast(ours)
    assert torch.equal(loss_of(model), expected)
    assert not drawn
    loss = loss_of(ours)
    assert len(drawn) == ours.config.num_hidden_layers
    assert torch.equal(loss_of(ours), loss)
    assert not torch.equal(loss_of(ours, seed=2), loss)
    assert ours.config._attn_implementation == "sdpa"
    assert len(drawn) == 3 * ours.config.num_hidden_layers
    # Without dropout nothing of ours runs.
    assert torch.equal(loss_of(ours.eval()), loss_of(model.eval()))
    assert len(drawn) == 3 * ours.config.num_hidden_layers
    loss_of(copy.deepcopy(ours).train())
    assert len(drawn) == 4 * ours.config.num_hidden_layers


def test_a_model_s_gradients_with_the_same_mask(
    drawn: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("bert", attention_probs_dropout_prob=P, hidden_dropout_prob=0.0).train()
    draw_attention_dropout_fast(model)
    loss_of(model).backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    masks = iter(drawn)

    def same(*inputs: Tensor, dropout_p: float, **settings: Any) -> Tensor:
        assert dropout_p == P
        return oracle(*inputs, kept=next(masks), **settings)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", same)
    loss_of(model).backward()
    assert next(masks, None) is None
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-5, atol=1e-7)


def test_registered_once_over_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = transformers.AttentionInterface._global_mapping
    calls = []

    def foreign(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return transformers.integrations.sdpa_attention.sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setitem(mapping, "sdpa", foreign)
    model = tiny("bert").train()
    draw_attention_dropout_fast(model)
    registered = mapping["sdpa"]
    draw_attention_dropout_fast(model)
    assert mapping["sdpa"] is registered
    loss_of(model)
    assert len(calls) == model.config.num_hidden_layers
