"""GPU peaks that others measured and published, beside plans for CUDA made without a GPU.

    python benchmarks/published_peaks.py [--only TEXT] [--write docs/cuda-plans.md]

Each row is planned in a process of its own, from public numbers of the model: no weights, no data.
The plan follows the source's loop where that differs from peftlab's: its loss (the model's own,
with whole logits), what it keeps between steps, its optimizer's form, and PEFT's own layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from pages import write_section
from peak_sources import FITTED, GUIDE, METAMATH, METAMATH_LENGTH, PEAKS, Peak, Source
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from peftlab.memory.allocator import replay_allocator
from peftlab.memory.trace import StepTrace
from peftlab.methods import METHODS
from peftlab.optim.config import OptimConfig
from peftlab.optim.table import OPTIMIZERS, OptimizerInfo
from peftlab.planning.simulate import PlanRequest, simulate
from peftlab.tasks import TASK_KINDS
from peftlab.training.config import TrainConfig
from peftlab.units import GIB


class _KeepsInput(torch.autograd.Function):
    """Passes its input on and keeps it for backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        return gradients[0]


def _softmax_of_2022(tensor: Tensor, dim: int, **kwargs: Any) -> Tensor:
    """Of torch 1.10, whose backward asked for the input, on scores that a mask in fp32 promoted."""
    tensor = tensor.float()
    kept: Tensor = _KeepsInput.apply(tensor)
    return kept.softmax(dim, **kwargs)


class AdamWKeepingGradients(torch.optim.AdamW):
    """Zeroes gradients and keeps them, which was torch's default before 2.0."""

    def zero_grad(self, set_to_none: bool = False) -> None:
        super().zero_grad(set_to_none=False)


def _eight_bit() -> type[torch.optim.Optimizer]:
    from bitsandbytes.optim import AdamW8bit

    class AdamW8bitKeepingGradients(AdamW8bit):
        def zero_grad(self, set_to_none: bool = False) -> None:
            super().zero_grad(set_to_none=False)

    return AdamW8bitKeepingGradients


AdamW8bitKeepingGradients = _eight_bit()
_FORMS = {
    "adamw_foreach": OptimizerInfo("", "torch.optim:AdamW", extra={"foreach": True}),
    "adamw_loop": OptimizerInfo("", f"{__name__}:AdamWKeepingGradients", extra={"foreach": False}),
    "adamw_8bit_kept": OptimizerInfo("", f"{__name__}:AdamW8bitKeepingGradients"),
}


def _kind(source: Source) -> Any:
    """The task kind with the source's loss."""
    base: Any = TASK_KINDS.get(source.kind)

    class SourceKind(base):  # type: ignore[misc]
        def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            # The longest batch follows the shortest of its bucket, whose outputs are small.
            self.held = None
            extra = {"use_cache": True} if source.holds_outputs else {}
            outputs = model(**batch, **extra)
            self.held = outputs if source.holds_outputs else None
            loss: Tensor = outputs.loss
            return loss

    return SourceKind(base.Config.model_construct())


def request_of(peak: Peak) -> tuple[PlanRequest, list[dict[str, Tensor]]]:
    """What to plan, and the micro-batches of a step."""
    source = peak.source
    config: PretrainedConfig = AutoConfig.for_model(source.model_type, **source.shape)
    method: Any = METHODS.get(peak.method["kind"])
    lengths = [peak.length] * peak.batch
    ids = torch.full((peak.batch, peak.length), 100)
    if source.kind == "causal_lm":
        batch = {"input_ids": ids, "labels": ids.clone()}
    else:
        batch = {"input_ids": ids, "labels": torch.zeros(peak.batch, dtype=torch.long)}
    batch["attention_mask"] = torch.ones_like(ids)
    if source.padded:
        batch["attention_mask"][-1, -1] = 0
    request = PlanRequest(
        config=config,
        kind=_kind(source),
        method=method(method.Config(**peak.method)),
        optim=OptimConfig(learning_rate=1e-4, optim=peak.optim),
        precision=peak.precision,
        lengths=tuple(lengths),
        train=TrainConfig(gradient_checkpointing=peak.checkpointing),
        device="cuda",
        chip=source.chip,
        attn_implementation=source.attention,
    )
    return request, [batch] * peak.accumulation


@dataclass(frozen=True)
class Planned:
    """What a row is planned to need."""

    live_bytes: int
    reserved_bytes: int
    moment: str


def planned(peak: Peak) -> Planned:
    """Plan one row; the source's own count of parameters must be met."""
    warnings.simplefilter("ignore")
    source = peak.source
    request, batches = request_of(peak)
    with mock.patch.dict(OPTIMIZERS, _FORMS), ExitStack() as stack:
        if source.keeps_softmax_input:
            stack.enter_context(mock.patch.object(nn.functional, "softmax", _softmax_of_2022))
        simulation = simulate(request, batches)
    base = simulation.params.total - simulation.params.adapter
    if base != source.base_params:
        raise ValueError(f"{peak.name}: a base of {base:,} parameters is not the source's")
    breakdown = simulation.trace.breakdown()
    emptied_at = _last_release(simulation.trace) if source.empties_cache else None
    reserved = replay_allocator(simulation.trace, source.workspaces, emptied_at).reserved_bytes
    return Planned(breakdown.peak_bytes, reserved, breakdown.peak_moment)


def _last_release(trace: StepTrace) -> int:
    """How many events come before the first step's gradients are let go of."""
    last = max(index for index in range(trace.start) if trace.events[index][1] > 0)
    return next(
        index
        for index in range(last + 1, trace.start + 1)
        if index == trace.start or trace.storages[trace.events[index][0]].role == "gradients"
    )


def planned_apart(number: int, length: int | None) -> Planned:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--row", str(number)]
    command += [] if length is None else ["--length", str(length)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Planned(**json.loads(done.stdout.splitlines()[-1]))


def error(peak: Peak, plan: Planned) -> float:
    """Of what the allocator holds, relative to what was reported."""
    return plan.reserved_bytes / peak.reserved_bytes - 1


def table(source: Source, rows: Sequence[tuple[Peak, Planned]]) -> list[str]:
    """One source's rows as Markdown."""
    lines = [f"**{source.title}.** Measured: {source.measured}.", ""]
    lines += ["| run | in the source | reported | plan: live | plan: reserved | error | why |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | --- |"]
    for peak, plan in rows:
        numbers = (peak.reserved_bytes, plan.live_bytes, plan.reserved_bytes)
        reported, live, reserved = (f"{number / GIB:.2f}" for number in numbers)
        off = f"{error(peak, plan):+.1%}" + (" (fitted)" if peak.name == FITTED else "")
        lines.append(
            f"| {peak.name} | {peak.reference} | {reported} | {live} | {reserved} | {off} "
            f"| {peak.why} |"
        )
    return [*lines, ""]


def page(rows: Sequence[tuple[Peak, Planned]]) -> str:
    """The section of the page."""
    judged = [(peak, plan) for peak, plan in rows if peak.name != FITTED]
    errors = sorted(abs(error(peak, plan)) for peak, plan in judged)
    worst = max(judged, key=lambda row: abs(error(*row)))
    summary = (
        f"{len(judged)} runs without the fitted one: median error of reserved memory "
        f"{statistics.median(errors):.1%}, worst {error(*worst):+.1%} ({worst[0].name})."
    )
    tables = []
    for source in (METAMATH, GUIDE):
        tables += table(source, [row for row in rows if row[0].source is source])
    return "\n".join([summary, "", *tables])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--length", type=int, help=f"in place of {METAMATH_LENGTH} tokens")
    parser.add_argument("--write", type=Path, help="page whose section of peaks to write")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write and (arguments.only or arguments.length):
        parser.error("--write needs all rows at the length that is fitted")
    if arguments.row is not None:
        peak = PEAKS[arguments.row]
        if arguments.length is not None and peak.source is METAMATH:
            peak = replace(peak, length=arguments.length)
        print(json.dumps(asdict(planned(peak))))
        return 0
    rows = []
    chosen = [number for number, peak in enumerate(PEAKS) if arguments.only in peak.name]
    with ThreadPoolExecutor(2) as pool:
        plans = pool.map(planned_apart, chosen, [arguments.length] * len(chosen))
        for number, plan in zip(chosen, plans, strict=True):
            rows.append((PEAKS[number], plan))
            print(f"{error(*rows[-1]):+7.1%}  {PEAKS[number].name}  {plan}", flush=True)
    if arguments.write:
        write_section(arguments.write, "peaks", page(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
