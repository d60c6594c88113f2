"""The peak is a peak, measured once; utilisation is a share of it or unknown."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from peftlab.models.config import PrecisionConfig
from peftlab.training import utilisation
from peftlab.training.utilisation import matmul_flops_per_second, model_flops_utilisation

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilisation, "_best", {})
    monkeypatch.setitem(utilisation._SIZE, "cpu", 64)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        (PrecisionConfig(), torch.float32),
        (PrecisionConfig(bf16=True), torch.bfloat16),
        (PrecisionConfig(dtype="bfloat16"), torch.bfloat16),
        (PrecisionConfig(fp16=True), torch.float16),
    ],
)
def test_in_the_precision_of_the_run(
    precision: PrecisionConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()
    multiply = torch.mm

    def watched(a: Any, b: Any, out: Any) -> Any:
        seen.add(a.dtype)
        return multiply(a, b, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    assert matmul_flops_per_second(CPU, precision) > 0
    assert seen == {dtype}


def test_the_best_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two readings a product after one at the start, and one for the limit: 3 s, 2 s, 4 s, …
    readings = iter([0.0, *(t for s in (3, 2, 4, 4, 4, 4) for t in (0.0, float(s), 0.0))])
    monkeypatch.setattr(time, "perf_counter", lambda: next(readings))
    assert matmul_flops_per_second(CPU, PrecisionConfig()) == 2 * 64**3 / 2


def test_measured_again_the_better_reading_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([2.0, 3.0, 1.0])
    monkeypatch.setattr(utilisation, "_measure", lambda *_: next(readings))
    taken = [matmul_flops_per_second(CPU, PrecisionConfig(), again) for again in (False, True)]
    assert taken == [2.0, 3.0]
    assert matmul_flops_per_second(CPU, PrecisionConfig()) == 3.0
    assert matmul_flops_per_second(CPU, PrecisionConfig(), again=True) == 3.0


def test_once_a_process_without_touching_random_numbers() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = matmul_flops_per_second(CPU, PrecisionConfig())
    assert matmul_flops_per_second(CPU, PrecisionConfig()) == first
    assert torch.equal(torch.get_rng_state(), before)


def test_utilisation() -> None:
    assert model_flops_utilisation(50.0, 10.0, 10.0) == 0.5
    for unknown in ((None, 10.0, 10.0), (50.0, None, 10.0), (50.0, 0.0, 10.0), (50.0, 10.0, None)):
        assert model_flops_utilisation(*unknown) is None
