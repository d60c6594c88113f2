"""The fused LoRA layer against PEFT's own: numbers, bytes kept, files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftlab.methods.fused_lora import (
    FusedLinear,
    _draw_kept,
    _LoraLinear,
    _Settings,
    cuda_layers,
    fuse_lora_layers,
    lora_layers,
)
from peftlab.methods.lora import Lora, LoraConfig

Build = Callable[..., nn.Module]
Batch = Callable[[str], dict[str, Tensor]]

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",  # PEFT's own call
    "ignore:fan_in_fan_out",  # PEFT corrects it itself
)


def attach(model: nn.Module, fused: bool, **section: Any) -> nn.Module:
    torch.manual_seed(5)
    section = {"r": 4, "init_lora_weights": False, **section}
    return Lora(LoraConfig(fused=fused, **section)).attach(model)


def pair(build: Build, name: str, dtype: torch.dtype = torch.float32, **section: Any) -> list[Any]:
    """PEFT's own and ours, with equal weights."""
    models = [attach(build(name).to(dtype), fused, **section) for fused in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    return models


def one_layer(
    fused: bool,
    *,
    bias: bool = True,
    conv: bool = False,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Any:
    """A linear 16 → 24 in a model of one layer, with an update of rank 3."""
    torch.manual_seed(7)
    linear: nn.Module = Conv1D(24, 16) if conv else nn.Linear(16, 24, bias=bias)
    model = nn.Sequential(linear).to(dtype)
    config = {"r": 3, "target_modules": ["0"], "init_lora_weights": False, **config}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    if fused:
        assert fuse_lora_layers(wrapped) == 1
    return wrapped


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def kept_bytes(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes of the distinct storages kept for backward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in parameters:
            kept[address] = tensor.detach()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(**inputs)
    assert out.logits.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("frozen_input", [True, False])
def test_gradients_against_differences(dropout: float, with_bias: bool, frozen_input: bool) -> None:
    def leaf(*shape: int, learns: bool = True) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=learns)

    torch.manual_seed(0)
    x, matrix = leaf(2, 3, 5, learns=not frozen_input), leaf(5, 4, learns=False)
    bias = leaf(4) if with_bias else None

    def layer(x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(1)
        keep = _draw_kept(nn.Dropout(dropout), x, x.dtype) if dropout else None
        out: Tensor = _LoraLinear.apply(x, matrix, bias, a, b, keep, _Settings(0.7, None))
        return out

    assert torch.autograd.gradcheck(layer, (x, bias, leaf(2, 5), leaf(4, 2)))


@pytest.mark.parametrize("learning", ["a", "b", "ab"])
@pytest.mark.parametrize("device", [nullcontext, cuda_layers])
def test_what_a_device_keeps(device: Callable[[], Any], learning: str) -> None:
    torch.manual_seed(0)
    x, matrix = torch.randn(6, 5), torch.randn(5, 4)
    a, b = (torch.randn(2, 5), torch.randn(4, 2))
    a.requires_grad, b.requires_grad = "a" in learning, "b" in learning
    with device():
        y = _LoraLinear.apply(x, matrix, None, a, b, None, _Settings(0.7, None))
    by_cuda = device is cuda_layers
    kept = {id(each) for each in y.grad_fn.saved_tensors if each is not None}
    assert (id(x) in kept) == (by_cuda or "a" in learning)
    shapes = [each.shape for each in y.grad_fn.saved_tensors if each is not None]
    assert ((6, 2) in shapes) == (not by_cuda and "b" in learning)
    y.square().sum().backward()
    plain = x @ matrix + 0.7 * x @ a.detach().T @ b.detach().T
    grad = 2 * plain
    if "a" in learning:
        torch.testing.assert_close(a.grad, 0.7 * (grad @ b.detach()).T @ x)
    if "b" in learning:
        torch.testing.assert_close(b.grad, 0.7 * grad.T @ (x @ a.detach().T))


@pytest.mark.parametrize("name", ["bert", "gpt2-lm", "llama-lm"])
def test_predictions_are_those_of_peft_to_the_last_bit(
    name: str, build: Build, batch: Batch
) -> None:
    theirs, ours = (model.eval() for model in pair(build, name, init_lora_weights=False))
    with torch.no_grad():
        assert torch.equal(ours(**batch(name)).logits, theirs(**batch(name)).logits)


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"bias": False},
        {"conv": True, "fan_in_fan_out": True},
        {"lora_dropout": 0.5},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "lora_dropout": 0.5},
        {"dtype": torch.float16},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(16,), (7, 16), (2, 5, 16), "transposed", "frozen"])
def test_layer_equals_that_of_peft(case: dict[str, Any], shape: Any) -> None:
    if case.get("conv") and not isinstance(shape, tuple):
        pytest.skip("transformers' Conv1D takes contiguous inputs only")
    dtype = case.get("dtype", torch.float32)
    results = []
    for fused in (False, True):
        model = one_layer(fused, **case).train()
        torch.manual_seed(3)
        x = torch.randn(shape if isinstance(shape, tuple) else (2, 16, 6)).to(dtype)
        x = (x if isinstance(shape, tuple) else x.transpose(1, 2)).requires_grad_(shape != "frozen")
        assert x.is_contiguous() is isinstance(shape, tuple)
        y = model(x)
        y.float().square().sum().backward()
        results.append(
            {"y": y.detach(), **gradients(model), **({} if x.grad is None else {"x": x.grad})}
        )
    peft_own, ours = results
    assert set(ours) == set(peft_own)
    assert len(ours) == (3 if shape == "frozen" else 4)
    for name, expected in peft_own.items():
        assert ours[name].dtype == expected.dtype
        # The sum of base result and update is rounded to the base's precision: once here, as there;
        # for x's gradient PEFT rounds both summands before.
        step = 2 * torch.finfo(expected.dtype if name in ("x", "y") else torch.float32).eps
        scale = expected.abs().max().item()
        if name not in ("x", "y") and dtype is not torch.float32:
            step = torch.finfo(dtype).eps  # of the gradient of y, which these read
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=4 * step * scale)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-lm", "t5"])
@pytest.mark.parametrize("section", [{}, {"lora_dropout": 0.2}, {"bias": "lora_only"}], ids=str)
def test_model_equals_that_of_peft(
    name: str, section: dict[str, Any], build: Build, batch: Batch
) -> None:
    # In single precision, the gradients of T5 are no nearer than 1e-3 to these on either side.
    models = pair(build, name, torch.float64, **section)
    assert all(type(layer) is FusedLinear for layer in lora_layers(models[1]))
    for model in models:
        torch.manual_seed(0)
        model.train()(**batch(name)).logits.sin().sum().backward()
    expected, ours = map(gradients, models)
    assert set(ours) == set(expected)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(ours[parameter], gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("section", [{}, {"lora_dropout": 0.2}], ids=str)
def test_autocast_as_in_peft(section: dict[str, Any], build: Build, batch: Batch) -> None:
    """Both round in bf16, at other places: both are near the gradients in fp32."""
    results = []
    for dtype, model in [
        (None, pair(build, "bert", **section)[0]),
        *((torch.bfloat16, m) for m in pair(build, "bert", **section)),
    ]:
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits = model(**batch("bert")).logits
        assert logits.dtype is (dtype or torch.float32)
        logits.float().sum().backward()
        assert {g.dtype for g in gradients(model).values()} == {torch.float32}
        results.append(torch.cat([g.flatten() for g in gradients(model).values()]))
    exact, theirs, ours = results
    for one in (theirs, ours):
        assert 0 < (one - exact).norm() <= 0.05 * exact.norm()


def test_dropout_drops_as_often_as_it_says_and_the_same_in_backward() -> None:
    x = torch.ones(999, 7, requires_grad=True)  # no multiple of eight
    a, b = torch.ones(1, 7, requires_grad=True), torch.ones(1, 1, requires_grad=True)
    keep = _draw_kept(nn.Dropout(0.25), x, x.dtype)
    y = _LoraLinear.apply(x, torch.zeros(7, 1), None, a, b, keep, _Settings(4 / 3, None))
    y.sum().backward()
    assert x.grad is not None
    assert a.grad is not None
    assert set(x.grad.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
    # y sums the kept inputs of a row, and x's gradient shows which they were.
    torch.testing.assert_close(y.detach()[:, 0], x.grad.sum(1))
    torch.testing.assert_close(a.grad[0], x.grad.sum(0))
    assert (x.grad == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("name", ["bert", "llama-lm"])
@pytest.mark.parametrize(
    ("dtype", "section", "most"),
    [
        (torch.float32, {}, 1.0),
        (torch.bfloat16, {}, 0.75),
        (torch.float32, {"lora_dropout": 0.1}, 0.75),
        (torch.bfloat16, {"lora_dropout": 0.1}, 0.75),
    ],
)
def test_bytes_kept_for_backward(
    name: str, dtype: torch.dtype, section: dict[str, Any], most: float, build: Build, batch: Batch
) -> None:
    models = pair(build, name, dtype, **section)
    before, after = (kept_bytes(model.train(), batch(name)) for model in models)
    assert after <= most * before


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-lm"])
def test_adapter_files_go_both_ways(name: str, build: Build, batch: Batch, tmp_path: Path) -> None:
    method = Lora(LoraConfig(r=4, init_lora_weights=False))
    ours: Any = method.attach(build(name)).eval()
    (tmp_path / "ours").mkdir()
    method.save_adapter(ours, tmp_path / "ours")
    theirs: Any = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours").eval()
    assert not any(isinstance(layer, FusedLinear) for layer in lora_layers(theirs))
    with torch.no_grad():
        expected = theirs(**batch(name)).logits
        torch.testing.assert_close(ours(**batch(name)).logits, expected, rtol=1e-5, atol=1e-6)
        theirs.save_pretrained(tmp_path / "theirs")
        back: Any = peft.PeftModel.from_pretrained(build(name), tmp_path / "theirs").eval()
        assert fuse_lora_layers(back) == len(lora_layers(back)) > 0
        torch.testing.assert_close(back(**batch(name)).logits, expected, rtol=1e-5, atol=1e-6)
    assert set(ours.state_dict()) == set(theirs.state_dict())


def test_with_gradient_checkpointing(build: Build, batch: Batch) -> None:
    results = []
    for checkpointing in (False, True):
        base: Any = build("bert")
        if checkpointing:
            base.activation_checkpointing_enable()
            base.disable_input_require_grads()
        model = attach(base, fused=True, lora_dropout=0.3)
        torch.manual_seed(0)
        model(**batch("bert")).logits.sum().backward()
        results.append(gradients(model))
    for name, gradient in results[0].items():
        assert torch.equal(results[1][name], gradient), name


def test_off_merged_and_several_adapters_run_as_in_peft() -> None:
    x = torch.randn(4, 16)
    models = [one_layer(fused).eval() for fused in (False, True)]
    layer = lora_layers(models[1])[0]
    calls = []
    update = layer.lora_A["default"]
    update.register_forward_hook(lambda *_: calls.append("PEFT's own"))

    def same(times: int) -> None:
        calls.clear()
        expected, ours = (model(x) for model in models)
        assert torch.equal(ours, expected)
        assert len(calls) == times

    same(1)  # a hooked module is called as a module
    for model in models:
        model.base_model.disable_adapter_layers()
    same(0)
    for model in models:
        model.base_model.enable_adapter_layers()
        model.merge_adapter()
    same(0)
    for model in models:
        model.unmerge_adapter()
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    same(1)


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "lora_bias"]
)
def test_what_the_layer_cannot_do_stays_with_peft(config: dict[str, Any]) -> None:
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(16, 24)), peft.LoraConfig(r=2, target_modules=["0"], **config)
    )
    assert fuse_lora_layers(model) == 0
    assert type(lora_layers(model)[0]) is peft.tuners.lora.layer.Linear


def test_a_trained_base_matrix_gets_its_gradient() -> None:
    model = one_layer(fused=True)
    base = lora_layers(model)[0].base_layer
    base.weight.requires_grad_(True)
    model(torch.randn(3, 16)).sum().backward()
    assert base.weight.grad is not None


def test_a_result_may_be_changed_in_place() -> None:
    x = torch.randn(2, 3, 16, requires_grad=True)
    one_layer(fused=True)(x).relu_().sum().backward()
    changed = x.grad
    x.grad = None
    one_layer(fused=True)(x).relu().sum().backward()
    assert torch.equal(changed, x.grad)


@pytest.mark.parametrize(
    ("section", "note"),
    [
        ({}, "19 of 19 LoRA layers are fused."),
        ({"fused": False}, "0 of 19 LoRA layers are fused. The others run PEFT's own forward."),
        ({"use_dora": True}, "0 of 19 LoRA layers are fused. The others run PEFT's own forward."),
        (
            {"target_modules": ["query", "word_embeddings"]},
            "3 of 4 LoRA layers are fused. The others run PEFT's own forward.",
        ),
    ],
)
def test_the_record_says_which(section: dict[str, Any], note: str, build: Build) -> None:
    method = Lora(LoraConfig(**section))
    method.attach(build("bert"))
    assert method.notes == [note]
