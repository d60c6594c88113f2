"""What each method keeps for backward, planned and measured.

    python benchmarks/plan_activations.py [--write docs/plan-accuracy.md]

The shape of MiniLM (a post-LN encoder, 6 blocks of width 384), 32 × 64 tokens, random weights.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from pages import write_section
from transformers import BertConfig

from peftlab.memory.trace import StepTrace
from peftlab.methods import METHODS
from peftlab.models.config import PrecisionConfig
from peftlab.optim.config import OptimConfig
from peftlab.planning.simulate import PlanRequest, measure, simulate
from peftlab.tasks import TASK_KINDS
from peftlab.training.config import TrainConfig
from peftlab.units import MIB

ROWS, TOKENS, WIDTH, BLOCKS = 32, 64, 384, 6
UNIT = ROWS * TOKENS * WIDTH * 4
METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora, all linears, PEFT's layer": {"kind": "lora", "fused": False},
    "lora, all linears, fused layer": {"kind": "lora"},
    "lora, q and v, PEFT's layer": {
        "kind": "lora",
        "target_modules": "attention-qv",
        "fused": False,
    },
    "lora, q and v, fused layer": {"kind": "lora", "target_modules": "attention-qv"},
    "freeze, top 2 blocks train": {"kind": "freeze", "top": 2},
    "head only": {"kind": "freeze", "top": 0},
}


def request_of(settings: dict[str, Any], dropout: float, blocks: int) -> PlanRequest:
    """A classifier of MiniLM's shape with this method."""
    kind, method = TASK_KINDS.get("classification"), METHODS.get(settings["kind"])
    return PlanRequest(
        config=BertConfig(
            hidden_size=WIDTH,
            num_hidden_layers=blocks,
            num_attention_heads=12,
            intermediate_size=4 * WIDTH,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        ),
        kind=kind(kind.Config.model_construct()),
        method=method(method.Config(**settings)),
        optim=OptimConfig(learning_rate=1e-3),
        precision=PrecisionConfig(),
        lengths=(TOKENS,) * ROWS,
        # Every block whole: the last one, of which a classifier reads one position, is no typical
        # block.
        train=TrainConfig(skip_unread_positions=False),
    )


def kept_bytes(trace: StepTrace) -> int:
    """Activations alive when forward ends: what backward needs."""
    end = next(at for phase, at in reversed(trace.left) if phase == "forward")
    return sum(
        size for index, size in trace.alive(end).items()
        if trace.storages[index].role == "activations"
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="write the section into this page")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    what = (
        f"A post-LN encoder of MiniLM's shape ({BLOCKS} blocks of width {WIDTH}), "
        f"{ROWS} × {TOKENS} tokens, fp32, random weights: activations alive at the end "
        "of forward. u = batch × tokens "
        f"× width × 4 bytes = {UNIT / MIB:g} MiB; the last column is what one block more adds. "
        "`python benchmarks/plan_activations.py --write docs/plan-accuracy.md`:"
    )
    lines = [
        what,
        "",
        "| method | dropout | planned | measured | in u | of full | u a block more |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    differs = False
    for dropout in (0.0, 0.1):
        full = 0
        for name, settings in METHOD_SETTINGS.items():
            request = request_of(settings, dropout, BLOCKS)
            planned, real = kept_bytes(simulate(request).trace), kept_bytes(measure(request).trace)
            taller = kept_bytes(simulate(request_of(settings, dropout, BLOCKS + 1)).trace)
            full = full or real
            differs |= planned != real
            lines.append(
                f"| {name} | {dropout:g} | {planned / MIB:.2f} MiB | {real / MIB:.2f} MiB "
                f"| {real / UNIT:.1f} | {100 * real / full:.0f}% "
                f"| {(taller - planned) / UNIT:.1f} |"
            )
            print(lines[-1], flush=True)
    if arguments.write:
        write_section(arguments.write, "activations", "\n".join(lines))
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())
