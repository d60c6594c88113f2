"""One of two processes that train shards for real; the first tells what it measured.

A program of its own: python two_processes.py FOLDER RANK CASE...
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from peftlab.memory.timeline import is_wrapper
from peftlab.memory.trace import StepTrace
from peftlab.planning.simulate import PlanRequest, Simulation, measure
from peftlab.training.config import TrainConfig
from tests.planning.test_exact import FULL, LORA, request_of

PROCESSES = 2
MEASUREMENTS = 4
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "bert-full": ("bert", "classification", FULL, {}),
    "bert-lora": ("bert", "classification", LORA, {}),
    "llama-full": ("llama", "causal_lm", FULL, {}),
    "llama-lora": ("llama", "causal_lm", LORA, {}),
    "llama-accumulated": (
        "llama",
        "causal_lm",
        LORA,
        {"train": TrainConfig(gradient_accumulation_steps=2)},
    ),
}


def case_of(name: str, num_processes: int = PROCESSES) -> PlanRequest:
    architecture, kind, method, values = CASES[name]
    request = request_of(
        architecture, kind, method, num_processes=num_processes, sharding="fsdp", **values
    )
    # Rows of embedding and head that do not split evenly.
    request.config.vocab_size |= 1
    request.config.num_labels = 3
    return request


class Settled(TorchDispatchMode):
    """gloo's thread drops its tensors some time after a collective ended: wait until it has.

    It works off one task after the other, so it has when the next is done.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_wrapper(types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            dist.barrier()
        return out


def without_copies(trace: StepTrace) -> StepTrace:
    """Without the copies that gloo sums gradients in: no operation made them, and NCCL has none."""
    return trace.where(lambda each: bool(each.op) or each.phase not in ("backward", "optimizer"))


def told(simulation: Simulation) -> dict[str, Any]:
    """Everything that a plan must say as well."""
    trace = without_copies(simulation.trace)
    return {
        "marks": asdict(trace.marks()),
        "breakdown": trace.breakdown().model_dump(),
        "events": [[*astuple(trace.storages[index]), change] for index, change in trace.events],
        "flops": simulation.flops,
    }


def _one_thread(store: Any, rank: int, size: int, timeout: Any) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_default_device()]
    options._threads = 1
    return dist.ProcessGroupGloo(store, rank, size, options)


def main(folder: Path, rank: int, names: list[str]) -> None:
    dist.Backend.register_backend("gloo_one_thread", _one_thread, devices=["cpu"])
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo_one_thread", init_method=store, rank=rank, world_size=PROCESSES)
    with Settled():
        # Under load gloo's thread may still let go late: that is not of the step.
        measured = {
            name: [told(measure(case_of(name))) for _ in range(MEASUREMENTS)] for name in names
        }
    if rank == 0:
        text = json.dumps(measured)
        (folder / "measured.json").write_text(text, encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
