"""Plan against the same step run for real, over everything that a CPU runs in little time.

    python benchmarks/plan_accuracy.py [--results FILE] [--seconds N] [--write PAGE]

Method × architecture × task kind × precision × checkpointing, on tiny random shapes: parts, marks
and the whole list of allocations and frees, byte for byte. Every cell is a line of the results file
as soon as it is done, and is not run again while it stands there, so the work can be cut in pieces.
Exit code 1 if a cell differs or is still missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pages import write_section

from peftlab.errors import IncompatibleError
from peftlab.methods import METHODS
from peftlab.models.config import PrecisionConfig
from peftlab.models.tiny import TINY_ARCHITECTURES, tiny_config
from peftlab.optim.config import OptimConfig
from peftlab.planning.simulate import PlanRequest, Simulation, measure, simulate
from peftlab.tasks import TASK_KINDS
from peftlab.training.config import TrainConfig

METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "full, 8-bit AdamW": {"kind": "full"},
    "head only": {"kind": "freeze", "top": 0},
    "top block": {"kind": "freeze", "top": 1},
    "bottom block": {"kind": "freeze", "bottom": 1},
    "embeddings frozen": {"kind": "freeze", "freeze_embeddings": True},
    "norms": {"kind": "freeze", "patterns": ("(?i)norm|ln_",)},
    "bitfit": {"kind": "bitfit"},
    "lora q,v": {"kind": "lora", "r": 4, "target_modules": "attention-qv"},
    "lora all linears": {"kind": "lora", "r": 4},
    "lora all linears, PEFT's layer": {"kind": "lora", "r": 4, "fused": False},
    "lora all linears, dropout": {"kind": "lora", "r": 4, "lora_dropout": 0.1},
    "prefix": {"kind": "ptuning_v2", "num_virtual_tokens": 4},
    "prefix, projected": {"kind": "ptuning_v2", "num_virtual_tokens": 4, "prefix_projection": True},
}
KINDS = ("classification", "causal_lm")
PRECISIONS = {
    "fp32": PrecisionConfig(),
    "bf16 autocast": PrecisionConfig(bf16=True),
    "bf16 weights": PrecisionConfig(dtype="bfloat16"),
}
# Precision, checkpointing, dropout.
SETTINGS: tuple[tuple[str, Any, bool], ...] = (
    *(
        (precision, checkpointing, False)
        for precision in PRECISIONS
        for checkpointing in (False, True)
    ),
    ("fp32", "selective", False),
    *(("fp32", checkpointing, True) for checkpointing in (False, True)),
)
DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")
DROPOUT += ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout_rate")
COMMAND = "OMP_NUM_THREADS=1 python benchmarks/plan_accuracy.py"


def cells() -> Iterator[dict[str, Any]]:
    """Every cell of the matrix."""
    models = itertools.product(TINY_ARCHITECTURES, KINDS, METHOD_SETTINGS)
    for (architecture, kind, method), (precision, checkpointing, dropout) in itertools.product(
        models, SETTINGS
    ):
        yield {
            "architecture": architecture,
            "kind": kind,
            "method": method,
            "precision": precision,
            "checkpointing": checkpointing,
            "dropout": dropout,
        }


def request_of(cell: Mapping[str, Any]) -> PlanRequest:
    """What the cell asks to be planned."""
    settings = METHOD_SETTINGS[cell["method"]]
    kind, method = TASK_KINDS.get(cell["kind"]), METHODS.get(settings["kind"])
    config = tiny_config(cell["architecture"])
    if cell["dropout"]:
        for key in DROPOUT:
            if hasattr(config, key):
                setattr(config, key, 0.1)
    return PlanRequest(
        config=config,
        kind=kind(kind.Config.model_construct()),
        method=method(method.Config(**settings)),
        optim=OptimConfig(
            learning_rate=1e-3,
            optim="adamw_8bit" if "8-bit" in cell["method"] else "adamw_torch",
        ),
        precision=PRECISIONS[cell["precision"]],
        lengths=(12, 12, 9, 7),
        train=TrainConfig(gradient_checkpointing=cell["checkpointing"]),
    )


def cannot_checkpoint(request: PlanRequest) -> str:
    """Why the request does not exist, if its method does not work with what it asks for."""
    if request.train.gradient_checkpointing and not request.method.traits.works_with_checkpointing:
        return f"{request.method.config.kind} with gradient checkpointing"
    return ""


def compare(request: PlanRequest) -> dict[str, Any]:
    """Peak bytes measured, and the largest difference of a mark or a part; or why it is refused."""
    if refused := cannot_checkpoint(request):
        return {"refused": refused}
    try:
        planned = simulate(request)
    except IncompatibleError as error:
        refused = str(error)
        try:
            measure(request)
        except IncompatibleError:
            # The method does not exist for this model, and a run says so too.
            return {"refused": refused}
        return {"refused": f"NOT PLANNED, but runs: {refused}"}
    real = measure(request)
    ours, theirs = _figures(planned), _figures(real)
    return {
        "peak_bytes": real.trace.breakdown().peak_bytes,
        "off_bytes": max(abs(ours[key] - theirs[key]) for key in ours),
        "same_events": planned.trace.events == real.trace.events,
        "events": len(real.trace.events),
    }


def _figures(simulation: Simulation) -> dict[str, int]:
    figures = asdict(simulation.trace.marks()) | simulation.trace.breakdown().model_dump()
    del figures["peak_moment"]
    counts = simulation.params.model_dump()
    return figures | counts | {"saved": simulation.saved_bytes, "flops": simulation.flops}


def name_of(cell: Mapping[str, Any]) -> str:
    """The cell in words."""
    checkpointing = {False: "", True: "checkpointing", "selective": "selective checkpointing"}
    words = [cell[key] for key in ("architecture", "kind", "method", "precision")]
    words += [checkpointing[cell["checkpointing"]], "dropout" * cell["dropout"]]
    return " · ".join(word for word in words if word)


def is_equal(result: Mapping[str, Any]) -> bool:
    """Whether plan and measurement agree in every figure and every event."""
    return result["off_bytes"] == 0 and bool(result["same_events"])


def page(results: Sequence[dict[str, Any]]) -> str:
    """The section of the page, as Markdown."""
    ran = [result for result in results if "refused" not in result]
    equal = [result for result in ran if is_equal(result)]
    worst = max(ran, key=lambda result: (result["off_bytes"], not result["same_events"]))
    largest = max(result["events"] for result in ran)
    what = (
        f"`{COMMAND} --results FILE --write docs/plan-accuracy.md`: the second of two optimizer "
        "steps, planned and run for real with random weights, on tiny shapes of each architecture. "
        "Compared are the parts at the peak (weights, gradients, optimizer state, activations, "
        "logits, temporaries), live bytes at the start, end and peak of forward, backward and "
        f"optimizer, parameter counts, FLOPs, and every allocation and release (up to {largest:,} "
        "a step) in its order. A cell is a task kind (classification, causal language model) × "
        "precision (fp32, bf16 autocast, bf16 weights) × with and without checkpointing; and in "
        "fp32 selective checkpointing, and dropout with and without checkpointing."
    )
    verdict = (
        f"**{len(equal):,} of {len(ran):,} cells are equal byte for byte and event for event.** "
        f"{_worst(worst)}"
    )
    lines = [
        what,
        "",
        verdict,
        "",
        "Equal cells of those that exist:",
        "",
        f"| method | {' | '.join(TINY_ARCHITECTURES)} |",
        f"| --- |{' ---: |' * len(TINY_ARCHITECTURES)}",
    ]
    for method in METHOD_SETTINGS:
        row = []
        for architecture in TINY_ARCHITECTURES:
            here = [r for r in ran if (r["architecture"], r["method"]) == (architecture, method)]
            row.append(f"{sum(map(is_equal, here))} of {len(here)}" if here else "–")
        lines.append(f"| {method} | {' | '.join(row)} |")
    if differing := [result for result in ran if not is_equal(result)]:
        lines += ["", "Cells that differ:", "", "| cell | bytes |", "| --- | ---: |"]
        lines += [f"| {name_of(each)} | {each['off_bytes'] or 'order'} |" for each in differing]
    refused = Counter(
        result["refused"].splitlines()[0] for result in results if "refused" in result
    )
    lines += ["", f"{refused.total():,} combinations do not exist, and say so before they run:", ""]
    lines += ["| cells | why |", "| ---: | --- |"]
    lines += [f"| {count} | {reason} |" for reason, count in refused.most_common()]
    return "\n".join(lines)


def _worst(result: Mapping[str, Any]) -> str:
    if is_equal(result):
        return "No cell differs, so there is no worst one."
    return f"Worst: {name_of(result)} ({result['off_bytes']} bytes)."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("plan-accuracy.jsonl"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after that long")
    parser.add_argument("--write", type=Path, help="write the section into this page")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results: dict[str, dict[str, Any]] = {}
    if arguments.results.exists():
        lines = arguments.results.read_text(encoding="utf-8").splitlines()
        results = {name_of(result): result for result in map(json.loads, lines)}
    missing = [cell for cell in cells() if name_of(cell) not in results]
    started = time.monotonic()
    for at, cell in enumerate(missing):
        if time.monotonic() - started > arguments.seconds:
            print(f"{len(missing) - at} cells are missing: run it again")
            return 1
        result = cell | compare(request_of(cell))
        results[name_of(cell)] = result
        with arguments.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        if "refused" not in result and not is_equal(result):
            print(f"{result['off_bytes']:>8}  {name_of(cell)}", flush=True)
    done = [results[name_of(cell)] for cell in cells()]
    text = page(done)
    print(text)
    if arguments.write:
        write_section(arguments.write, "matrix", text)
    return 0 if all("refused" in result or is_equal(result) for result in done) else 1


if __name__ == "__main__":
    sys.exit(main())
