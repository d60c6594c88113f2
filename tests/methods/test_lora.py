from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from pydantic import ValidationError
from torch import Tensor, nn

from peftlab.anatomy import Anatomy, parameter_roles
from peftlab.errors import IncompatibleError
from peftlab.methods.lora import Lora, LoraConfig
from peftlab.models.quantized import settle_quantized

Build = Callable[..., nn.Module]
Batch = Callable[[str], dict[str, Tensor]]


def lora(**section: Any) -> Lora:
    return Lora(LoraConfig.model_validate(section))


def updated(model: nn.Module) -> set[str]:
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own call
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT corrects it itself
@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama", "llama-lm", "t5"])
def test_same_as_peft(name: str, build: Build, batch: Batch) -> None:
    """Equal logits and equally many parameters as PEFT's own defaults give."""
    anatomy = Anatomy.of(build(name))
    config = peft.LoraConfig(
        task_type=anatomy.task_type, r=4, lora_alpha=8, target_modules="all-linear",
        init_lora_weights=False,
    )  # fmt: skip
    base, other = build(name), build(name)
    torch.manual_seed(3)
    theirs = peft.get_peft_model(other, config)
    torch.manual_seed(3)
    ours = lora(r=4, lora_alpha=8, init_lora_weights=False, fused=False).attach(base)
    # Modules are visited in the order of a set: give both the same numbers.
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        expected = theirs.eval()(**batch(name)).logits
        assert torch.equal(ours.eval()(**batch(name)).logits, expected)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "section", "endings", "count"),
    [
        ("bert", {"target_modules": "attention-qv"}, {"query", "value"}, 6),
        ("distilbert", {"target_modules": "attention-qv"}, {"q_lin", "v_lin"}, 6),
        ("llama-lm", {"target_modules": "attention-qv"}, {"q_proj", "v_proj"}, 6),
        ("gpt2", {"target_modules": "attention-qv"}, {"c_attn"}, 3),
        ("t5", {"target_modules": "attention-qv"}, {"q", "v"}, 18),
        ("bert", {"target_modules": ["intermediate.dense"]}, {"dense"}, 3),
        ("bert", {"target_modules": r".*layer\.0\..*key"}, {"key"}, 1),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, -1]}, {"q_proj"}, 2),
        ("llama", {"layers_to_transform": [1]}, None, 7),
        ("llama", {}, None, 21),
        ("distilbert", {}, None, 18),
        ("gpt2-lm", {"target_modules": ["wte"]}, {"wte"}, 1),
    ],
)
def test_targets(
    name: str, section: dict[str, Any], endings: set[str] | None, count: int, build: Build
) -> None:
    method = lora(**section)
    expected = set(method._matched(Anatomy.of(build(name))))
    found = updated(method.attach(build(name)))
    assert found == expected
    assert len(found) == count
    assert endings is None or {n.rpartition(".")[2] for n in found} == endings
    assert len(method.notes) == 1  # how many are fused


@pytest.mark.parametrize(
    ("section", "where", "message"),
    [
        ({"target_modules": ["qery"]}, "target_modules", "'qery' matches no .*Nearest: .*query"),
        ({"target_modules": ["query", "valu"]}, "target_modules", "'valu' matches.*value"),
        ({"target_modules": r"bert\.encodr.*"}, "target_modules", "matches no .*encoder"),
        ({"target_modules": ["attention.self"]}, "target_modules", "matches no linear"),
        ({"target_modules": ["LayerNorm"]}, "target_modules", "matches no linear"),
        ({"r": 64}, "r", r"rank 64 is larger than .* \(.*×.*\).*at most 32"),
        ({"layers_to_transform": [3]}, "layers_to_transform", "no block 3.*0 to 2"),
        ({"modules_to_save": ["poolr"]}, "modules_to_save", "'poolr' is no module.*pooler"),
    ],
)
def test_refused(section: dict[str, Any], where: str, message: str, build: Build) -> None:
    model = build("bert")
    method = lora(**section)
    problems = method.check(Anatomy.of(model))
    assert [problem.where for problem in problems] == [f"method.{where}"]
    with pytest.raises(IncompatibleError, match=message):
        method.attach(model)
    assert not updated(model)


def test_tied_embedding_cannot_be_a_trained_copy(build: Build) -> None:
    (problem,) = lora(modules_to_save=["embed_tokens"]).check(Anatomy.of(build("llama-lm")))
    assert "tied" in problem.message


def test_all_problems_at_once(build: Build) -> None:
    method = lora(target_modules=["qery", "valu"], layers_to_transform=[7], modules_to_save=["x"])
    assert len(method.check(Anatomy.of(build("bert")))) == 4


def test_a_dead_alternative_is_reported(build: Build) -> None:
    method = lora(target_modules=r".*(query|valeu)")
    method.attach(build("bert"))
    assert method.notes[1:] == ["target_modules '.*(query|valeu)': 'valeu' matches nothing."]


def test_trained_copies_count_as_what_they_copy(build: Build) -> None:
    model = build("bert")
    anatomy, before = Anatomy.of(model), dict(model.named_parameters())
    attached = lora(modules_to_save=["pooler"]).attach(model)
    roles = parameter_roles(attached, before, anatomy)
    assert roles["head"] == 32 * 3 + 3
    assert roles["base_trainable"] == 32 * 32 + 32


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"r": 0}, "greater than or equal to 1"),
        ({"lora_dropout": 1.0}, "less than 1"),
        ({"target_modules": []}, "is empty"),
        ({"target_modules": "(query"}, "is not a regular expression"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "needs an even r"),
    ],
)
def test_section_is_checked(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LoraConfig.model_validate(section)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own call
def test_biases_of_the_targets(build: Build, batch: Batch, tmp_path: Path) -> None:
    model = build("bert")
    anatomy, before = Anatomy.of(model), dict(model.named_parameters())
    method = lora(target_modules="attention-qv", bias="lora_only", init_lora_weights=False)
    attached = method.attach(model)
    assert parameter_roles(attached, before, anatomy)["base_trainable"] == 3 * 2 * 32
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(0.1 if parameter.requires_grad else 0.0)
        expected = attached.eval()(**batch("bert")).logits
        method.save_adapter(attached, tmp_path)
        loaded = peft.PeftModel.from_pretrained(build("bert"), tmp_path).eval()
        assert torch.equal(loaded(**batch("bert")).logits, expected)
        merged = method.merge(attached).eval()
        torch.testing.assert_close(merged(**batch("bert")).logits, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.filterwarnings("ignore:inner dimension .* is not aligned:UserWarning")
@pytest.mark.parametrize("name", ["llama", "llama-lm"])
def test_quantised_base(name: str, build: Build, batch: Batch, tmp_path: Path) -> None:
    """nf4: learns, counts as PEFT does, and merges into the dequantised weights."""
    source: Any = build(name)
    source.save_pretrained(tmp_path)
    base = type(source).from_pretrained(
        tmp_path,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    )
    settle_quantized(base)
    anatomy, before = Anatomy.of(base), dict(base.named_parameters())
    inputs = {key: value.to(base.device) for key, value in batch(name).items()}
    method = lora(init_lora_weights=False)
    model: Any = method.attach(base)
    roles = parameter_roles(model, before, anatomy)
    assert (roles["trainable"], roles["total"]) == model.get_nb_trainable_parameters()
    model(**inputs).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        merged: Any = method.merge(model)
        logits = merged.eval()(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert not getattr(merged, "is_quantized", False)
    assert set(merged.state_dict()) == set(build(name).state_dict())
    merged.save_pretrained(tmp_path / "merged")
    reloaded = type(source).from_pretrained(tmp_path / "merged").eval().to(base.device)
    with torch.no_grad():
        assert torch.equal(reloaded(**inputs).logits, logits)
