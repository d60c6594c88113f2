"""What every method must do on every model, whichever method it is."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from peftlab.anatomy import Anatomy, parameter_roles
from peftlab.config import validate_section
from peftlab.errors import IncompatibleError, NotMergeableError, RunFolderError
from peftlab.methods import METHODS
from peftlab.methods.base import Method

Build = Callable[..., nn.Module]
Batch = Callable[[str], dict[str, Tensor]]

MODELS = (
    "bert", "roberta", "distilbert", "gpt2", "llama", "gpt2-lm", "llama-lm",
    "llama-lm-untied", "t5",
)  # fmt: skip
SECTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "freeze": (
        {"top": 2},
        {"top": 2, "unfreeze_ratio": 0.5},
        {"patterns": [r"norm|LayerNorm|ln_"]},
        {"freeze_embeddings": True},
    ),
    "lora": ({}, {"target_modules": "attention-qv", "use_rslora": True, "use_dora": True}),
    "ptuning_v2": (
        {"num_virtual_tokens": 4},
        {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 8},
    ),
}
# What these cannot be put on; each must say so.
REFUSED = {("ptuning_v2", "distilbert")} | {
    ("bitfit", name) for name in ("llama", "llama-lm", "llama-lm-untied", "t5")
}
CASES = [
    pytest.param(kind, section, model, id=f"{kind}-{index}-{model}")
    for kind in METHODS.names
    for index, section in enumerate(SECTIONS.get(kind, ({},)))
    for model in MODELS
    if (kind, model) not in REFUSED
]
every_case = pytest.mark.parametrize(("kind", "section", "name"), CASES)


def new_method(kind: str, section: dict[str, Any]) -> Method[Any]:
    method_class = METHODS.get(kind)
    return method_class(method_class.Config.model_validate({"kind": kind, **section}))


def attached(kind: str, section: dict[str, Any], model: nn.Module) -> tuple[Method[Any], nn.Module]:
    method = new_method(kind, section)
    return method, method.attach(model)


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(**inputs).logits
    return out


def train(model: nn.Module, inputs: dict[str, Tensor], steps: int = 2) -> set[str]:
    """Train a little; the names of the parameters that had a non-zero gradient at some step."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.05)
    moved = set()
    model.train()
    for _ in range(steps):
        out = model(**inputs).logits.float()
        (out - torch.linspace(-1, 1, out.numel()).view_as(out)).pow(2).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and parameter.grad.abs().sum() > 0:
                moved.add(name)
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return moved


@pytest.fixture
def case(kind: str, section: dict[str, Any], name: str, build: Build, batch: Batch) -> Any:
    base = build(name)
    before = dict(base.named_parameters())
    anatomy = Anatomy.of(base)
    method, model = attached(kind, section, base)
    return method, model, batch(name), before, anatomy


@pytest.mark.parametrize(("kind", "name"), sorted(REFUSED))
def test_refused(kind: str, name: str, build: Build) -> None:
    model = build(name)
    method = new_method(kind, {})
    problems = method.check(Anatomy.of(model))
    assert len(problems) == 1
    assert problems[0].hint
    with pytest.raises(IncompatibleError, match=type(model).__name__):
        method.attach(model)


@every_case
def test_learns_what_it_says_and_nothing_else(case: Any) -> None:
    _, model, inputs, _, _ = case
    trainable = trained_names(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert trainable
    moved = train(model, inputs)
    assert moved - trainable == set()
    still = trainable - moved
    # Softmax ignores what is added to all keys, so a key's bias gets rounding noise or nothing.
    assert {n for n in still if "key.bias" not in n and "k_lin.bias" not in n} == set()
    for name, value in frozen.items():
        assert torch.equal(value, model.get_parameter(name)), name


@every_case
def test_every_stage_trains_more_than_the_one_before(case: Any) -> None:
    method, model, inputs, _, _ = case
    everything = trained_names(model)
    state = method.training_state(model)
    starts = method.stage_starts(1000)
    assert starts[0] == 0
    assert all(one < other for one, other in pairwise((*starts, 1000)))
    before: set[str] = set()
    for stage in range(len(starts)):
        method.enter_stage(model, stage)
        trains = trained_names(model)
        assert before <= trains
        assert trains
        # What is held back is kept in checkpoints and adapters all the same.
        assert method.training_state(model).keys() == state.keys()
        assert train(model, inputs) <= trains
        before = trains
    assert trains == everything


@every_case
def test_task_head_trains(case: Any) -> None:
    _, model, _, before, anatomy = case
    roles = parameter_roles(model, before, anatomy)
    expected = sum(before[n].numel() for n in anatomy.parameters_of(anatomy.head))
    assert roles["head"] == (expected if anatomy.head_is_new else 0)


@every_case
def test_roles_add_up(case: Any) -> None:
    method, model, _, before, anatomy = case
    roles = parameter_roles(model, before, anatomy)
    assert roles["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert roles["trainable"] == roles["adapter"] + roles["head"] + roles["base_trainable"]
    if method.traits.is_peft:
        trainable, total = model.get_nb_trainable_parameters()
        assert (roles["trainable"], roles["total"]) == (trainable, total)
        assert roles["adapter"] > 0
        assert roles["base_trainable"] == 0
    else:
        assert roles["total"] == sum(p.numel() for p in before.values())
        assert roles["adapter"] == 0


@every_case
def test_adapter_state_restores_the_predictions(
    case: Any, kind: str, section: dict[str, Any], name: str, build: Build
) -> None:
    method, model, inputs, _, _ = case
    train(model, inputs)
    expected = logits(model, inputs)
    other, fresh = attached(kind, section, build(name))
    assert not torch.equal(logits(fresh, inputs), expected)
    other.load_adapter_state(fresh, method.adapter_state(model))
    assert torch.equal(logits(fresh, inputs), expected)


@every_case
def test_training_state_resumes_exactly(
    case: Any, kind: str, section: dict[str, Any], name: str, build: Build
) -> None:
    method, model, inputs, _, _ = case
    train(model, inputs)
    state = {key: tensor.clone() for key, tensor in method.training_state(model).items()}
    train(model, inputs)
    other, fresh = attached(kind, section, build(name))
    other.load_training_state(fresh, state)
    train(fresh, inputs)
    assert torch.equal(logits(fresh, inputs), logits(model, inputs))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own call
@every_case
def test_saved_adapter_loads_with_peft(case: Any, name: str, build: Build, tmp_path: Path) -> None:
    method, model, inputs, _, _ = case
    train(model, inputs)
    method.save_adapter(model, tmp_path)
    state = method.adapter_state(model)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: tuple(v.shape) for k, v in saved.items()} == {
        k: tuple(v.shape) for k, v in state.items()
    }
    if method.traits.is_peft:
        base = build(name)
        loaded = PeftModel.from_pretrained(base, tmp_path)
        torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=0, atol=1e-6)
    else:
        assert not (tmp_path / "adapter_config.json").exists()


@every_case
def test_merge_predicts_the_same_as_a_plain_model(
    case: Any, kind: str, name: str, build: Build, tmp_path: Path
) -> None:
    method, model, inputs, _, _ = case
    train(model, inputs)
    expected = logits(model, inputs)
    if not method.traits.mergeable:
        with pytest.raises(NotMergeableError, match="--format adapter"):
            method.merge(model)
        return
    plain: Any = method.merge(model)
    assert type(plain) is type(build(name))
    assert set(plain.state_dict()) == set(build(name).state_dict())
    assert not hasattr(plain, "peft_config")
    assert not [m for m in plain.modules() if type(m).__module__.startswith("peft.")]
    torch.testing.assert_close(logits(plain, inputs), expected, rtol=1e-5, atol=2e-6)
    plain.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    reloaded = type(plain).from_pretrained(tmp_path)
    assert torch.equal(logits(reloaded, inputs), logits(plain, inputs))


@every_case
def test_foreign_state_is_refused(case: Any) -> None:
    method, model, _, _, _ = case
    state = method.adapter_state(model)
    first = next(iter(state))
    with pytest.raises(RunFolderError, match="no_such_tensor"):
        method.load_adapter_state(model, {**state, "no_such_tensor": torch.zeros(1)})
    with pytest.raises(RunFolderError, match="shape"):
        method.load_adapter_state(model, {**state, first: torch.zeros(7, 7, 7)})


@pytest.mark.parametrize("kind", METHODS.names)
def test_section_round_trips(kind: str) -> None:
    config_class = METHODS.get(kind).Config
    for section in SECTIONS.get(kind, ({},)):
        config, problems = validate_section(config_class, {"kind": kind, **section}, (), {})
        assert problems == []
        assert config is not None
        assert config_class.model_validate_json(config.model_dump_json(), strict=True) == config
