"""A plan of FSDP equals what a process of several measures that train shards for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from peftlab.errors import IncompatibleError
from peftlab.models.config import PrecisionConfig
from peftlab.optim.config import OptimConfig
from peftlab.planning.answer import answer
from peftlab.planning.simulate import PlanRequest, simulate
from peftlab.training.config import TrainConfig
from tests.planning import two_processes
from tests.planning.two_processes import CASES, PROCESSES, case_of, told, without_copies


@pytest.mark.slow
def test_every_event_as_in_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, two_processes.__file__, str(tmp_path)]
    # Warnings are torch's own, of gloo.
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, str(rank), *CASES], env=environment, stderr=subprocess.PIPE)
        for rank in range(PROCESSES)
    ]
    errors = [process.communicate()[1].decode() for process in running]
    assert [process.returncode for process in running] == [0] * PROCESSES, errors[0]
    measured = json.loads((tmp_path / "measured.json").read_text(encoding="utf-8"))
    for name in CASES:
        planned = simulate(case_of(name))
        assert without_copies(planned.trace) == planned.trace
        assert told(planned) in measured[name], name


def test_each_process_keeps_its_share() -> None:
    sharded = case_of("llama-full", 8)
    parts = simulate(sharded).trace.breakdown()
    whole = simulate(replace(sharded, sharding="none", num_processes=1)).trace.breakdown()
    # Rows are padded to a multiple of 8; buffers and counters of steps are whole everywhere.
    assert whole.weights_bytes / 8 <= parts.weights_bytes < whole.weights_bytes / 7
    assert whole.optimizer_bytes / 8 <= parts.optimizer_bytes < whole.optimizer_bytes / 7
    planned = answer(sharded)
    assert 0 < planned.gathered_bytes <= planned.memory.temporary_bytes
    assert not dist.is_initialized()


def test_cuda_first_step_makes_nothing_whole_but_gathered_blocks() -> None:
    trace = simulate(replace(case_of("llama-full", 8), device="cuda")).trace
    whole = simulate(replace(case_of("llama-full", 8), sharding="none", num_processes=1))
    largest = max(s.size for s in whole.trace.storages if s.role == "weights")
    update = [s.size for s in trace.storages if s.phase == "optimizer"]
    assert update
    assert max(update) < largest
    assert {s.stream for s in trace.storages} >= {0, 1, 2}


def _with(**values: Any) -> PlanRequest:
    return replace(case_of("llama-full", 2), **values)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (_with(num_processes=1), "--num-processes"),
        (_with(optim=OptimConfig(learning_rate=1e-3, optim="adamw_8bit")), "adamw_torch"),
        (_with(optim=OptimConfig(learning_rate=1e-3, optim="sgd")), "adamw_torch"),
        (_with(precision=PrecisionConfig(quantization="nf4")), "precision.dtype=bfloat16"),
        (_with(train=TrainConfig(gradient_checkpointing="selective")), "true or false"),
    ],
)
def test_what_does_not_shard(request_: PlanRequest, message: str) -> None:
    with pytest.raises(IncompatibleError, match=message):
        simulate(request_)
    assert not dist.is_initialized()


def test_all_reasons_at_once() -> None:
    request = _with(num_processes=1, precision=PrecisionConfig(quantization="nf4"))
    with pytest.raises(IncompatibleError) as refused:
        simulate(request)
    assert len(refused.value.problems) == 2
