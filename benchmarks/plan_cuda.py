"""Plans for CUDA beside the same step run for real on a card.

    python benchmarks/plan_cuda.py [--tiny] [--every N] [--workers N] [--results FILE]
        [--write docs/cuda-plans.md]

Two optimizer steps with random weights, through Accelerate, as training runs them. Compared are the
bytes that torch's allocator counts at the start, end and peak of forward, backward and optimizer,
and what it reserves. ``--tiny`` takes the matrix of plan_accuracy.py in place of the models below.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import plan_accuracy
import torch
from pages import write_section
from peak_sources import BERT_LARGE, LLAMA_3B
from transformers import AutoConfig

from peftlab.errors import IncompatibleError
from peftlab.memory.meter import chip_here
from peftlab.methods import METHODS
from peftlab.models.config import PrecisionConfig
from peftlab.optim.config import OptimConfig
from peftlab.planning.answer import answer
from peftlab.planning.simulate import PlanRequest, measure
from peftlab.tasks import TASK_KINDS
from peftlab.training.config import TrainConfig
from peftlab.units import MIB

_MINILM = {
    "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 1536, "num_labels": 2,
}  # fmt: skip
_SMOLLM = {
    "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "tie_word_embeddings": True,
}  # fmt: skip
_LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "MiniLM": ("bert", "classification", _MINILM),
    "BERT-large": ("bert", "classification", BERT_LARGE),
    "SmolLM2-135M": ("llama", "causal_lm", _SMOLLM),
    "Llama-3.2-3B": ("llama", "causal_lm", LLAMA_3B),
    "Llama-3.1-8B": ("llama", "causal_lm", _LLAMA_8B),
}
FULL = {"kind": "full"}
LORA = {"kind": "lora"}
TOP2 = {"kind": "freeze", "top": 2}
PREFIX = {"kind": "ptuning_v2", "num_virtual_tokens": 20}
BF16, FP16 = PrecisionConfig(bf16=True), PrecisionConfig(fp16=True)
HALF = PrecisionConfig(dtype="bfloat16")
NF4 = PrecisionConfig(dtype="bfloat16", quantization="nf4")
INT8 = PrecisionConfig(dtype="bfloat16", quantization="int8")
CHECKPOINT = {"gradient_checkpointing": True}
SELECTIVE = {"gradient_checkpointing": "selective"}
# Model, method, precision, train section, rows × tokens, optimizer.
CASES: tuple[tuple[str, dict[str, Any], PrecisionConfig, dict[str, Any], Any, str], ...] = (
    *(
        ("MiniLM", method, precision, {}, (32, 64), "adamw_torch")
        for method in (FULL, LORA, TOP2, PREFIX)
        for precision in (PrecisionConfig(), BF16, FP16)
    ),
    ("MiniLM", FULL, PrecisionConfig(), {}, (32, 64), "adamw_8bit"),
    ("BERT-large", FULL, PrecisionConfig(), {}, (8, 512), "adamw_torch"),
    ("BERT-large", FULL, BF16, CHECKPOINT, (8, 512), "adamw_torch"),
    ("BERT-large", FULL, BF16, SELECTIVE, (8, 512), "adamw_8bit"),
    ("BERT-large", LORA, BF16, {}, (8, 512), "adamw_torch"),
    ("BERT-large", PREFIX, FP16, {}, (8, 448), "adamw_torch"),
    ("SmolLM2-135M", FULL, PrecisionConfig(), {}, (8, 512), "adamw_torch"),
    ("SmolLM2-135M", FULL, BF16, {}, (8, 512), "adamw_torch"),
    ("SmolLM2-135M", LORA, BF16, SELECTIVE, (8, 512), "adamw_torch"),
    ("SmolLM2-135M", TOP2, HALF, {}, (8, 512), "adamw_torch"),
    ("Llama-3.2-3B", LORA, HALF, {}, (4, 704), "adamw_torch"),
    ("Llama-3.2-3B", LORA, HALF, CHECKPOINT, (4, 704), "adamw_torch"),
    ("Llama-3.2-3B", LORA, HALF, SELECTIVE, (4, 704), "adamw_torch"),
    ("Llama-3.2-3B", FULL, HALF, CHECKPOINT, (4, 704), "adamw_torch"),
    ("Llama-3.2-3B", FULL, HALF, {}, (4, 704), "adamw_8bit"),
    ("Llama-3.2-3B", LORA, NF4, CHECKPOINT, (4, 704), "adamw_torch"),
    ("Llama-3.1-8B", LORA, HALF, CHECKPOINT, (4, 1024), "adamw_torch"),
    ("Llama-3.1-8B", TOP2, HALF, {}, (4, 1024), "adamw_torch"),
    ("Llama-3.1-8B", PREFIX, HALF, {}, (2, 1024), "adamw_torch"),
    ("Llama-3.1-8B", LORA, NF4, CHECKPOINT, (4, 1024), "paged_adamw_8bit"),
    ("Llama-3.1-8B", LORA, NF4, {}, (2, 512), "adamw_8bit"),
    ("Llama-3.1-8B", LORA, INT8, CHECKPOINT, (4, 1024), "adamw_torch"),
)


def cells(tiny: bool) -> Iterator[dict[str, Any]]:
    """What to compare, by what is needed to build it in another process."""
    if tiny:
        yield from plan_accuracy.cells()
    else:
        yield from ({"case": number} for number in range(len(CASES)))


def name_of(cell: Mapping[str, Any]) -> str:
    """The cell in words."""
    if "case" not in cell:
        return plan_accuracy.name_of(cell)
    model, method, precision, train, (rows, length), optim = CASES[cell["case"]]
    words = [model, " ".join(map(str, method.values())), precision.dtype]
    words += [precision.mixed_precision, precision.quantization or ""]
    words += [str(train.get("gradient_checkpointing", "")), f"{rows} × {length}", optim]
    return " · ".join(word for word in words if word)


def request_of(cell: Mapping[str, Any]) -> PlanRequest:
    """What the cell asks to be planned."""
    if "case" not in cell:
        request = plan_accuracy.request_of(cell)
    else:
        model, method, precision, train, (rows, length), optim = CASES[cell["case"]]
        model_type, kind_name, shape = MODELS[model]
        kind, method_class = TASK_KINDS.get(kind_name), METHODS.get(method["kind"])
        request = PlanRequest(
            config=AutoConfig.for_model(model_type, **shape),
            kind=kind(kind.Config.model_construct()),
            method=method_class(method_class.Config(**method)),
            optim=OptimConfig(learning_rate=1e-4, optim=optim),
            precision=precision,
            lengths=(length, *[max(1, length * 3 // 4)] * (rows - 1)),
            train=TrainConfig(**train),
        )
    return replace(request, device="cuda", chip=chip_here())


def compare(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Plan and run: both sides' figures, or why there are none."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    request, found = request_of(cell), {"name": name_of(cell)}
    if refused := plan_accuracy.cannot_checkpoint(request):
        return found | {"refused": refused}
    try:
        planned = answer(request)
    except IncompatibleError as error:
        return found | {"refused": str(error).splitlines()[0]}
    try:
        measured = measure(request).measured
    except RuntimeError as error:
        return found | {"refused": f"the step itself: {str(error).splitlines()[0]}"}
    assert measured is not None
    return found | {
        "planned": planned.marks.model_dump() | {"reserved_bytes": planned.reserved_bytes},
        "real": asdict(measured.marks) | {"reserved_bytes": measured.reserved_bytes},
        "planned_peak_bytes": planned.memory.peak_bytes,
        "real_peak_bytes": measured.breakdown.peak_bytes,
    }


def off_bytes(result: Mapping[str, Any]) -> int:
    """The largest difference of live bytes at any mark."""
    marks = [key for key in result["real"] if key != "reserved_bytes"]
    return max(abs(int(result["real"][key]) - result["planned"][key]) for key in marks)


def off_reserved(result: Mapping[str, Any]) -> float:
    """How far the plan of reserved memory is off, relative to what was reserved."""
    planned, real = (result[side]["reserved_bytes"] for side in ("planned", "real"))
    return float(planned / real - 1)


def line_of(result: Mapping[str, Any]) -> str:
    """One cell, to look at while it runs."""
    if "refused" in result:
        return f"refused  {result['name']}: {result['refused']}"
    off, reserved = off_bytes(result), off_reserved(result)
    return f"{off:>12,} bytes, reserved {reserved:+.2%}  {result['name']}"


def summary(results: Sequence[Mapping[str, Any]]) -> str:
    """What all cells say together."""
    ran = [result for result in results if "refused" not in result]
    equal = sum(off_bytes(result) == 0 for result in ran)
    same = sum(off_reserved(result) == 0 for result in ran)
    peaks = [result["planned_peak_bytes"] / result["real_peak_bytes"] - 1 for result in ran]
    return (
        f"{len(ran):,} cells on {torch.cuda.get_device_name()}: {equal:,} equal to the byte at all "
        f"seven marks, {same:,} in what is reserved; worst peak {max(peaks, key=abs):+.2%}, worst "
        f"reserved {max(map(off_reserved, ran), key=abs):+.1%}."
    )


def table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The models' rows as Markdown."""
    lines = ["| model, method, precision, checkpointing, batch, optimizer | peak, MiB | plan |"]
    lines[0] += " reserved, MiB | plan |"
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for result in results:
        peak, planned = result["real_peak_bytes"], result["planned_peak_bytes"]
        reserved = result["real"]["reserved_bytes"]
        exact = "equal" if planned == peak else f"{planned / peak - 1:+.2%}"
        held = "equal" if off_reserved(result) == 0 else f"{off_reserved(result):+.2%}"
        lines.append(
            f"| {result['name']} | {peak / MIB:,.1f} | {exact} | {reserved / MIB:,.0f} | {held} |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--every", type=int, default=1, help="one cell of so many")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--results", type=Path, help="write each cell's figures to this file")
    parser.add_argument("--write", type=Path, help="page whose section to write")
    arguments = parser.parse_args()
    chosen, results = list(cells(arguments.tiny))[:: arguments.every], []
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        for result in pool.map(compare, chosen):
            results.append(result)
            print(line_of(result), flush=True)
            if arguments.results:
                with arguments.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
    text = [summary(results)] + ([] if arguments.tiny else ["", *table(results)])
    print("\n".join(text))
    if arguments.write:
        name = "tiny-on-cuda" if arguments.tiny else "models-on-cuda"
        write_section(arguments.write, name, "\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
