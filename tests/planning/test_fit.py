"""Fits or does not, and every suggestion holds when it is planned again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from peftlab.errors import ConfigError
from peftlab.memory.cards import CPU_PROCESS_BYTES, CUDA_CONTEXT_BYTES, memory_of
from peftlab.methods import METHODS
from peftlab.models.config import PrecisionConfig
from peftlab.models.tiny import tiny_config
from peftlab.optim.config import OptimConfig
from peftlab.planning.answer import answer
from peftlab.planning.fit import fit
from peftlab.planning.schema import Plan
from peftlab.planning.simulate import PlanRequest
from peftlab.tasks import TASK_KINDS
from peftlab.units import GIB


def request_of(method: dict[str, Any], **overrides: Any) -> PlanRequest:
    kind, method_class = TASK_KINDS.get("causal_lm"), METHODS.get(method["kind"])
    request = PlanRequest(
        config=tiny_config("llama"),
        kind=kind(kind.Config.model_construct()),
        method=method_class(method_class.Config(**method)),
        optim=OptimConfig(learning_rate=1e-3),
        precision=PrecisionConfig(),
        lengths=(16,) * 4,
    )
    return replace(request, **overrides)


FULL = {"kind": "full"}


def test_what_fits_needs_no_suggestion() -> None:
    plan = fit(request_of(FULL), GIB)
    assert (plan.fits, plan.suggestions, plan.memory_bytes) == (True, (), GIB)
    assert plan.needed_bytes == plan.memory.peak_bytes + CPU_PROCESS_BYTES


def test_every_suggestion_fits_when_followed() -> None:
    request = request_of(FULL)
    needed = answer(request).needed_bytes
    # What one example and checkpointing leave of the activations, and a little more.
    floor = answer(
        replace(request, lengths=(16,)).with_train(gradient_checkpointing=True)
    ).needed_bytes
    limit = floor + (needed - floor) // 4
    plan = fit(request, limit)
    assert plan.fits is False
    assert len(plan.suggestions) >= 2
    for suggestion in plan.suggestions:
        assert suggestion.needed_bytes <= limit
        followed = follow(request, suggestion.overrides)
        rows = len(followed.lengths) * followed.train.gradient_accumulation_steps
        assert rows == len(request.lengths)
        assert answer(followed).needed_bytes <= limit, suggestion.text


def follow(request: PlanRequest, overrides: dict[str, Any]) -> PlanRequest:
    changes: dict[str, Any] = {}
    train: dict[str, Any] = {}
    for key, value in overrides.items():
        if key == "train.per_device_train_batch_size":
            changes["lengths"] = request.lengths[:value]
        elif key == "optim.optim":
            changes["optim"] = request.optim.model_copy(update={"optim": value})
        else:
            train[key.removeprefix("train.")] = value
    return replace(request, **changes).with_train(**train)


def test_nothing_is_suggested_where_nothing_helps() -> None:
    plan = fit(request_of(FULL), 1024)
    assert (plan.fits, plan.suggestions) == (False, ())


def test_a_method_that_forbids_checkpointing_is_not_told_to_checkpoint() -> None:
    prefix = {"kind": "ptuning_v2", "num_virtual_tokens": 4}
    request = request_of(prefix)
    plan = fit(request, answer(request).needed_bytes - 1)
    assert plan.suggestions
    assert not any("checkpointing" in suggestion.text for suggestion in plan.suggestions)


def test_a_plan_survives_json() -> None:
    plan = answer(request_of({"kind": "lora", "r": 4}))
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    parts = plan.memory.model_dump()
    assert parts.pop("peak_bytes") == sum(parts.values())
    assert max(point.live_bytes for point in plan.timeline) == plan.memory.peak_bytes


def test_cuda_rounds_reserves_and_adds_its_context() -> None:
    request = request_of({"kind": "lora", "r": 4})
    cpu, cuda = answer(request), answer(replace(request, device="cuda"))
    assert cuda.memory.weights_bytes % 512 == 0
    assert cuda.memory.weights_bytes > cpu.memory.weights_bytes
    assert cuda.reserved_bytes > cuda.memory.peak_bytes
    assert cuda.needed_bytes == cuda.reserved_bytes + CUDA_CONTEXT_BYTES
    assert cuda.params == cpu.params


def test_a_base_in_nf4_is_the_last_resort() -> None:
    request = request_of({"kind": "lora", "r": 4})
    nf4 = replace(request, precision=PrecisionConfig(quantization="nf4"))
    assert answer(nf4).memory.weights_bytes < answer(request).memory.weights_bytes
    one = replace(request, lengths=(16,)).with_train(gradient_checkpointing=True)
    plan = fit(request, answer(one).needed_bytes - 2048)
    (suggestion,) = plan.suggestions
    assert suggestion.overrides["precision.quantization"] == "nf4"


def test_memory_is_a_size_or_a_card() -> None:
    assert memory_of("24GiB") == 24 * GIB > memory_of("RTX 4090")
    with pytest.raises(ConfigError, match="rtx4090"):
        memory_of("rtx4099")


def test_a_paged_optimizer_is_planned_unpaged_and_says_so() -> None:
    paged = OptimConfig(learning_rate=1e-3, optim="paged_adamw_8bit")
    request = request_of(FULL, optim=paged)
    (cpu,), (cuda,) = answer(request).notes, answer(replace(request, device="cuda")).notes
    assert "paging needs CUDA" in cpu
    assert "none of it paged out" in cuda
