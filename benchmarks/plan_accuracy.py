"""Plan against the same step run for real, over everything that a CPU runs in little time.

    python benchmarks/plan_accuracy.py [--write docs/plan-accuracy.md]

Method × architecture × task kind × checkpointing × precision, on tiny random shapes: parts, marks
and the whole list of allocations and frees, byte for byte. Exit code 1 if a cell differs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peftlab.errors import IncompatibleError
from peftlab.methods import METHODS
from peftlab.models.config import PrecisionConfig
from peftlab.models.tiny import TINY_ARCHITECTURES, tiny_config
from peftlab.optim.config import OptimConfig
from peftlab.planning.simulate import PlanRequest, Simulation, measure, simulate
from peftlab.tasks import TASK_KINDS
from peftlab.training.config import TrainConfig

METHOD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "full": ({"kind": "full"}, "adamw_torch"),
    "full, 8-bit AdamW": ({"kind": "full"}, "adamw_8bit"),
    "head only": ({"kind": "freeze", "top": 0}, "adamw_torch"),
    "top block": ({"kind": "freeze", "top": 1}, "adamw_torch"),
    "bottom block": ({"kind": "freeze", "bottom": 1}, "adamw_torch"),
    "embeddings frozen": ({"kind": "freeze", "freeze_embeddings": True}, "adamw_torch"),
    "bitfit": ({"kind": "bitfit"}, "adamw_torch"),
    "lora q,v": ({"kind": "lora", "r": 4, "target_modules": "attention-qv"}, "adamw_torch"),
    "lora all linears": ({"kind": "lora", "r": 4}, "adamw_torch"),
    "lora, dropout": ({"kind": "lora", "r": 4, "lora_dropout": 0.1}, "adamw_torch"),
    "prefix": ({"kind": "ptuning_v2", "num_virtual_tokens": 4}, "adamw_torch"),
    "prefix, projected": (
        {"kind": "ptuning_v2", "num_virtual_tokens": 4, "prefix_projection": True},
        "adamw_torch",
    ),
}
PRECISIONS = {
    "fp32": PrecisionConfig(),
    "bf16 autocast": PrecisionConfig(bf16=True),
    "bf16 weights": PrecisionConfig(dtype="bfloat16"),
}
KINDS = ("classification", "regression", "causal_lm")


def cells() -> Iterator[tuple[tuple[str, ...], PlanRequest]]:
    """Every cell of the matrix, with its labels."""
    matrix = itertools.product(
        TINY_ARCHITECTURES, KINDS, METHOD_SETTINGS, PRECISIONS, (False, True)
    )
    for architecture, kind_name, method, precision, checkpointing in matrix:
        settings, optim = METHOD_SETTINGS[method]
        kind, method_class = TASK_KINDS.get(kind_name), METHODS.get(settings["kind"])
        config = tiny_config(architecture)
        if kind_name == "regression":
            config.num_labels, config.problem_type = 1, "regression"
        labels = (architecture, kind_name, method, precision, "yes" if checkpointing else "no")
        yield (
            labels,
            PlanRequest(
                config=config,
                kind=kind(kind.Config.model_construct()),
                method=method_class(method_class.Config(**settings)),
                optim=OptimConfig(learning_rate=1e-3, optim=optim),
                precision=PRECISIONS[precision],
                lengths=(12, 12, 9, 7),
                train=TrainConfig(gradient_checkpointing=checkpointing),
            ),
        )


def difference(planned: Simulation, real: Simulation) -> int:
    """The largest difference in bytes of a mark or a part; 0 with another order of events is -1."""
    ours = asdict(planned.trace.marks()) | planned.trace.breakdown().model_dump()
    theirs = asdict(real.trace.marks()) | real.trace.breakdown().model_dump()
    ours.pop("peak_moment"), theirs.pop("peak_moment")
    worst = max(abs(ours[key] - theirs[key]) for key in ours)
    return worst or (0 if planned.trace.events == real.trace.events else -1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="write the table as Markdown")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows, refused, worst = [], 0, (0, "none")
    for labels, request in cells():
        cell = " · ".join(labels)
        if (
            request.train.gradient_checkpointing
            and not request.method.traits.works_with_checkpointing
        ):
            continue
        try:
            planned, real = simulate(request), measure(request)
        except IncompatibleError:
            # This method does not exist for this model: the run would say so too.
            refused += 1
            continue
        off, peak = difference(planned, real), real.trace.breakdown().peak_bytes
        worst = max(worst, (abs(off), cell))
        rows.append(f"| {' | '.join(labels)} | {peak:,} | {'equal' if off == 0 else off} |")
        print(f"{'equal' if off == 0 else off:>8}  {cell}", flush=True)
    differing = sum(not row.endswith("| equal |") for row in rows)
    summary = (
        f"{len(rows)} cells, {len(rows) - differing} equal in every event; worst: "
        f"{worst[1]} ({worst[0]} bytes). {refused} combinations do not exist."
    )
    print(summary)
    if arguments.write:
        head = "| architecture | task | method | precision | checkpointing | peak bytes | plan |"
        rule = "| --- | --- | --- | --- | --- | ---: | ---: |"
        text = "\n".join(["# Plan against measurement", "", summary, "", head, rule, *rows, ""])
        arguments.write.write_text(text, encoding="utf-8")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
