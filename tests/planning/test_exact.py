"""A plan equals the same step run for real, byte for byte, and the step of a real loop."""

from __future__ import annotations

import importlib
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from peftlab.errors import IncompatibleError
from peftlab.memory.meter import chip_here
from peftlab.methods import METHODS
from peftlab.models.config import PrecisionConfig
from peftlab.models.tiny import tiny_config
from peftlab.optim.config import OptimConfig
from peftlab.planning.answer import answer
from peftlab.planning.simulate import PlanRequest, measure, simulate, synthetic_batches
from peftlab.tasks import TASK_KINDS
from peftlab.training.config import TrainConfig

simulation = importlib.import_module("peftlab.planning.simulate")

FULL = {"kind": "full"}
TOP = {"kind": "freeze", "top": 1}
LORA = {"kind": "lora", "r": 4}
LORA_QV = {"kind": "lora", "r": 4, "target_modules": "attention-qv"}
PREFIX = {"kind": "ptuning_v2", "num_virtual_tokens": 4}
PROJECTED = {**PREFIX, "prefix_projection": True}
BITFIT = {"kind": "bitfit"}
SELECTIVE = TrainConfig(gradient_checkpointing="selective")


def request_of(
    architecture: str, kind: str, method: dict[str, Any], **overrides: Any
) -> PlanRequest:
    task_kind, method_class = TASK_KINDS.get(kind), METHODS.get(method["kind"])
    config = tiny_config(architecture)
    if kind == "regression":
        config.num_labels, config.problem_type = 1, "regression"
    return replace(
        PlanRequest(
            config=config,
            kind=task_kind(task_kind.Config.model_construct()),
            method=method_class(method_class.Config(**method)),
            optim=OptimConfig(learning_rate=1e-3),
            precision=PrecisionConfig(),
            lengths=(12, 12, 9, 7),
        ),
        **overrides,
    )


CASES = [
    ("bert", "classification", FULL, {}),
    ("bert", "classification", FULL, {"train": TrainConfig(gradient_checkpointing=True)}),
    ("bert", "classification", FULL, {"train": TrainConfig(skip_unread_positions=False)}),
    ("bert", "classification", TOP, {}),
    ("bert", "classification", LORA, {}),
    ("bert", "classification", PREFIX, {}),
    ("bert", "classification", BITFIT, {}),
    ("bert", "regression", LORA_QV, {"train": TrainConfig(gradient_accumulation_steps=2)}),
    ("roberta", "classification", PROJECTED, {}),
    ("distilbert", "classification", LORA, {"train": TrainConfig(gradient_checkpointing=True)}),
    ("gpt2", "classification", LORA, {}),
    ("gpt2", "causal_lm", FULL, {}),
    ("gpt2", "causal_lm", PREFIX, {}),
    ("llama", "causal_lm", FULL, {"train": TrainConfig(gradient_checkpointing=True)}),
    ("llama", "causal_lm", LORA, {"train": TrainConfig(gradient_accumulation_steps=2)}),
    ("llama", "causal_lm", TOP, {"lengths": (12, 12)}),
    ("qwen2", "causal_lm", FULL, {"optim": OptimConfig(learning_rate=1e-3, optim="adamw_8bit")}),
    ("qwen2", "causal_lm", LORA, {"precision": PrecisionConfig(dtype="bfloat16")}),
    ("llama", "causal_lm", LORA, {"precision": PrecisionConfig(bf16=True)}),
    ("t5", "classification", LORA, {}),
    ("bert", "classification", FULL, {"train": SELECTIVE}),
    ("bert", "classification", PREFIX, {"train": SELECTIVE}),
    ("gpt2", "causal_lm", {**LORA, "lora_dropout": 0.1}, {"train": SELECTIVE}),
    ("llama", "causal_lm", LORA, {"train": SELECTIVE, "precision": PrecisionConfig(bf16=True)}),
    ("t5", "classification", TOP, {"train": SELECTIVE}),
    ("llama", "causal_lm", LORA, {"precision": PrecisionConfig(quantization="nf4")}),
    ("gpt2", "causal_lm", PREFIX, {"precision": PrecisionConfig(quantization="nf4")}),
    ("bert", "classification", LORA, {"precision": PrecisionConfig(quantization="int8")}),
]


@pytest.mark.parametrize(("architecture", "kind", "method", "overrides"), CASES)
def test_every_event_as_in_a_real_step(
    architecture: str, kind: str, method: dict[str, Any], overrides: dict[str, Any]
) -> None:
    request = request_of(architecture, kind, method, **overrides)
    planned, real = simulate(request), measure(request)
    assert asdict(planned.trace.marks()) == asdict(real.trace.marks())
    assert planned.trace.breakdown() == real.trace.breakdown()
    assert planned.trace.events == real.trace.events
    assert (planned.params, planned.saved_bytes) == (real.params, real.saved_bytes)
    assert planned.flops == real.flops > 0
    assert planned.notes == real.notes


# bitsandbytes, of single tokens through matrices as narrow as these.
@pytest.mark.filterwarnings("ignore:inner dimension .* is not aligned:UserWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("architecture", "kind", "method", "overrides"), CASES)
def test_every_mark_as_the_allocator_of_cuda_counts(
    architecture: str, kind: str, method: dict[str, Any], overrides: dict[str, Any]
) -> None:
    """Live bytes at the ends and peaks of the phases, and what is reserved, to the byte."""
    request = request_of(architecture, kind, method, **overrides)
    request = replace(request, device="cuda", chip=chip_here())
    planned, real = answer(request), measure(request)
    assert real.measured is not None
    assert planned.marks.model_dump() == asdict(real.measured.marks)
    assert planned.memory.peak_bytes == real.measured.breakdown.peak_bytes
    assert planned.memory.weights_bytes == real.measured.breakdown.weights_bytes
    assert planned.reserved_bytes == real.measured.reserved_bytes
    assert (planned.params, planned.saved_bytes) == (real.params, real.saved_bytes)
    assert planned.flops_per_step == real.flops


@pytest.mark.parametrize("train", [TrainConfig(), SELECTIVE], ids=["keep", "selective"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_with_dropout(architecture: str, train: TrainConfig) -> None:
    method = {**LORA, "lora_dropout": 0.1}
    request = request_of(architecture, "classification", method, train=train)
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "attn_pdrop")
    request.config.update({rate: 0.1 for rate in rates if hasattr(request.config, rate)})
    assert simulate(request).trace.events == measure(request).trace.events


EARLY = {"optimizer_in_backward": True, "max_grad_norm": None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_updates_in_backward(checkpointing: bool) -> None:
    train = TrainConfig(gradient_checkpointing=checkpointing)
    late = request_of("llama", "causal_lm", FULL, train=train, lengths=(4,))
    early = replace(late, optim=OptimConfig(learning_rate=1e-3, **EARLY))
    planned, real = simulate(early), measure(early)
    assert planned.trace.events == real.trace.events
    parts, usual = planned.trace.breakdown(), simulate(late).trace.breakdown()
    assert parts.gradients_bytes < usual.gradients_bytes / 4
    assert parts.peak_bytes < usual.peak_bytes - usual.gradients_bytes / 2


def test_a_compiled_model_is_not_planned() -> None:
    request = request_of("bert", "classification", FULL).with_train(torch_compile=True)
    with pytest.raises(IncompatibleError, match=r"torch_compile.*cannot be planned"):
        simulate(request)


def test_every_micro_batch_holds_its_own_inputs() -> None:
    request = request_of("bert", "classification", FULL)
    one, three = (
        simulate(request.with_train(gradient_accumulation_steps=steps)).trace.marks().start_bytes
        for steps in (1, 3)
    )
    assert three - one == 2 * sum(t.nbytes for t in synthetic_batches(request)[0].values())


def test_unread_positions_cost_nothing() -> None:
    request = request_of("bert", "classification", FULL)
    skipped, plain = simulate(request), simulate(request.with_train(skip_unread_positions=False))
    assert skipped.flops < plain.flops
    assert skipped.trace.breakdown().peak_bytes < plain.trace.breakdown().peak_bytes


@pytest.mark.parametrize("precision", [PrecisionConfig(), PrecisionConfig(bf16=True)])
def test_the_step_is_that_of_accelerate(
    precision: PrecisionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of("bert", "classification", LORA, precision=precision)
    planned = simulate(request)

    def accelerated(precision: PrecisionConfig, device: str, sharded: bool) -> Accelerator:
        accelerator = Accelerator(cpu=True, mixed_precision=precision.mixed_precision)
        monkeypatch.setattr(accelerator, "prepare", accelerator.prepare_model)
        return accelerator

    monkeypatch.setattr(simulation, "_Backend", accelerated)
    # Of whichever device the process has used before and will use after.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        real = measure(request)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert planned.trace.events == real.trace.events
