"""Selective recomputation: the same numbers, fewer bytes."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peftlab.memory.timeline import Timeline
from peftlab.methods import METHODS
from peftlab.models.attention import SCORES, draw_attention_dropout_fast
from peftlab.models.dropout import draw_dropout_fast
from peftlab.models.tiny import tiny_config
from peftlab.training.recompute import enable_checkpointing

METHOD_SECTIONS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "top": {"kind": "freeze", "top": 1},
    "lora": {"kind": "lora", "r": 4, "init_lora_weights": False},
    "lora, dropout": {"kind": "lora", "r": 4, "init_lora_weights": False, "lora_dropout": 0.2},
    "bitfit": {"kind": "bitfit"},
    "prefix": {"kind": "ptuning_v2", "num_virtual_tokens": 4, "init": "random"},
}
DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "llama": {"attention_dropout": 0.1},
    "t5": {"dropout_rate": 0.1},
}
CASES = [
    (architecture, method)
    for architecture in DROPOUT
    for method in METHOD_SECTIONS
    if (architecture, method) not in {("llama", "bitfit"), ("t5", "bitfit"), ("t5", "prefix")}
]


def build(
    architecture: str, method: str, selective: bool, dtype: torch.dtype = torch.float32
) -> nn.Module:
    config = tiny_config(architecture)
    for key, value in DROPOUT[architecture].items():
        setattr(config, key, value)
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    if selective:
        enable_checkpointing(base, "selective")
    section = METHOD_SECTIONS[method]
    method_class = METHODS.get(section["kind"])
    torch.manual_seed(1)
    model: nn.Module = method_class(method_class.Config(**section)).attach(base)
    return model.train()


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(3, 100, (4, 24))
    ids[:, -1] = 1  # what T5's classifier reads
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and bytes that the forward leaves alive."""
    torch.manual_seed(3)
    with Timeline() as timeline:
        timeline.adopt(model.parameters(), "weights")
        timeline.begin()
        with timeline.phase("forward"):
            loss = model(**inputs()).loss
        marks = timeline.trace().marks()
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, marks.forward_end_bytes - marks.start_bytes


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own call
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT corrects it itself
@pytest.mark.parametrize(("architecture", "method"), CASES)
def test_the_same_bits_from_fewer_bytes(architecture: str, method: str) -> None:
    loss, gradients, before = step(build(architecture, method, selective=False))
    again, repeated, after = step(build(architecture, method, selective=True))
    assert torch.equal(loss, again)
    assert set(gradients) == set(repeated)
    for name, gradient in gradients.items():
        assert torch.equal(repeated[name], gradient), name
    assert after <= 0.75 * before


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT corrects it itself
@pytest.mark.parametrize("architecture", DROPOUT)
def test_dropout_that_draws_faster(architecture: str) -> None:
    results = []
    for selective in (False, True):
        model = build(architecture, "lora, dropout", selective)
        draw_dropout_fast(model)
        draw_attention_dropout_fast(model)
        results.append(step(model))
    (loss, gradients, before), (again, repeated, after) = results
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert torch.equal(repeated[name], gradient), name
    assert after <= 0.75 * before


class Scores(TorchDispatchMode):
    """Counts how often attention's scores are made."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func is SCORES
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
def test_scores_are_made_again_where_rows_are_twice_as_long_as_a_head_is_wide(
    autocast: bool,
) -> None:
    model = build("bert", "bitfit", selective=True)
    draw_attention_dropout_fast(model)
    head: int = model.config.hidden_size // model.config.num_attention_heads
    for length, again in [(2 * head, True), (2 * head - 1, False)]:
        ids = torch.randint(3, 100, (4, length))
        with Scores() as forward, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids[:, 0] % 2).loss
        with Scores() as backward:
            loss.backward()
        layers = model.config.num_hidden_layers
        assert (forward.count, backward.count) == (layers, again * layers)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_half_precision_and_autocast(method: str) -> None:
    for dtype, autocast in [(torch.bfloat16, False), (torch.float32, True)]:
        results = []
        for selective in (False, True):
            model = build("llama", method, selective, dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                results.append(step(model))
        (_, gradients, before), (_, repeated, after) = results
        for name, gradient in gradients.items():
            assert torch.equal(repeated[name], gradient), name
        assert after <= 0.75 * before


def test_backward_twice_and_an_evaluation_between() -> None:
    model = build("bert", "lora, dropout", selective=True)
    torch.manual_seed(3)
    loss = model(**inputs()).loss
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        model(**inputs())
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, 2 * once[name])


def test_a_copy_of_the_model_runs_its_own_blocks() -> None:
    model = build("bert", "full", selective=True)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    _, gradients, _ = step(copied)
    _, expected, _ = step(build("bert", "full", selective=False))
    for name, gradient in expected.items():
        assert torch.equal(gradients[name], gradient), name


class InPlace(nn.Module):
    """A block that changes in place what an operation made."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.late = late

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        active = nn.functional.gelu(hidden)
        active.add_(1.0)
        out = self.second(active)
        if self.late:
            hidden.mul_(2.0)
        return out


def test_changes_in_place_are_seen() -> None:
    from functools import partial

    from peftlab.training.recompute import _selectively

    torch.manual_seed(0)
    plain = InPlace(late=False)
    x = torch.randn(3, 8)
    plain(x).sum().backward()
    selective = copy.deepcopy(plain)
    selective.zero_grad()
    selective.forward = partial(_selectively, selective)  # type: ignore[method-assign]
    selective(x).sum().backward()
    for one, other in zip(plain.parameters(), selective.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    selective.late = True
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        selective(x).sum().backward()


class Changing(nn.Module):
    """A block whose sum cannot be made again, because a term of it changes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.layers[0](x), self.layers[1](x)
        total = torch.add(one, other=other) if self.how == "a named term" else one + other
        if self.how in ("a term", "a named term"):
            other.add_(1.0)
        elif self.how == "the sum":
            total.sub_(1.0)
        else:
            with torch.no_grad():
                nn.functional.relu(total, inplace=True)
        parts = zip(self.layers[2:], (one, other, total), strict=True)
        return torch.stack([layer(part) for layer, part in parts]).sum(0)


@pytest.mark.parametrize("how", ["a term", "a named term", "the sum", "without autograd"])
def test_what_changes_before_it_is_read_is_not_made_again(how: str) -> None:
    from functools import partial

    from peftlab.training.recompute import _selectively

    torch.manual_seed(0)
    plain, x = Changing(how), torch.randn(3, 8)
    selective = copy.deepcopy(plain)
    selective.forward = partial(_selectively, selective)  # type: ignore[method-assign]
    for module in (plain, selective):
        module(x).sum().backward()
    for one, other in zip(plain.parameters(), selective.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("architecture", DROPOUT)
def test_calls_tell_what_operations_tell(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftlab.training import recompute

    loss, gradients, calls_bytes = step(build(architecture, "full", selective=True))
    monkeypatch.setattr(recompute, "_Calls", lambda device: recompute._OPERATIONS)
    same, others, operations_bytes = step(build(architecture, "full", selective=True))
    assert torch.equal(loss, same)
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())
    assert calls_bytes == operations_bytes


class Exponential(nn.Module):
    """A block of an operation that keeps its own result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.made = self.first(x).exp()
        return self.second(self.made)


def test_what_is_kept_neither_outlives_its_graph_nor_changes_unseen() -> None:
    from functools import partial

    from peftlab.training.recompute import _selectively

    module = Exponential()
    module.forward = partial(_selectively, module)  # type: ignore[method-assign]
    x = torch.randn(3, 8, requires_grad=True)
    loss = module(x).sum()
    with torch.no_grad():
        module.second.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    made = weakref.ref(module.made)
    gc.disable()
    try:
        del loss, module.made
        assert made() is None
    finally:
        gc.enable()
