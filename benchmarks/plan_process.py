"""Plans of the embedded models beside a measured step, and beside the process's high-water mark.

    python benchmarks/plan_process.py [--write docs/plan-accuracy.md]

Each case is a process of its own: imports, data, model, two steps, then a third without any
measurement of tensors, over the largest batch that training will see. A second process does the
same with every block of 64 KiB or more mapped apart, so that the C library's allocator keeps none
of them: the difference is what it held without use. Linux with glibc only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from pages import write_section

MIB = 2**20
CASES = (
    ("movie-sentiment", "full"),
    ("movie-sentiment", "lora"),
    ("movie-sentiment", "freeze-top2"),
    ("movie-sentiment-sft", "lora"),
    ("movie-sentiment-sft", "full"),
    ("movie-sentiment-sft", "freeze-top2"),
)
ROWS = 256
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "temporary", "peak")


def resident(key: str = "VmRSS") -> int:
    """What /proc says of this process, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.M)
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    """From here on ``VmHWM`` is the most since now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def unread_weights() -> int:
    """Bytes of mapped checkpoints of which no page was touched: weights that no memory holds."""
    text = Path("/proc/self/smaps").read_text(encoding="utf-8")
    maps = re.findall(r"\.safetensors\nSize:\s+(\d+) kB.*?\nRss:\s+(\d+) kB", text, re.S)
    return 1024 * sum(int(size) - int(held) for size, held in maps)


def child(task: str, recipe: str, plan_first: bool) -> dict[str, Any]:
    """Measure one case; every figure in bytes."""
    known: dict[str, Any] = {"interpreter": resident()}
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from peftlab.assemble import assemble
    from peftlab.experiment.resolve import resolve
    from peftlab.memory.meter import NullMeter, TimelineMeter
    from peftlab.models.load import load_tokenizer
    from peftlab.optim.build import build_optimizer
    from peftlab.training.modes import set_training_mode
    from peftlab.training.schedule import Schedule
    from peftlab.training.step import MicroBatch, optimizer_step

    known["libraries"] = resident() - known["interpreter"]
    if plan_first:
        known["planned"] = planned(task, recipe)
        known["planning"] = resident() - known["interpreter"] - known["libraries"]
        known["planning_peak"] = resident("VmHWM")
        return known
    settings = [f"data.max_train_rows={ROWS}", "train.trunk_cache=off"]
    experiment = resolve(task, recipe, overrides=settings).experiment
    kind = experiment.build_kind()
    splits = kind.read()
    tokenizer = load_tokenizer(experiment.model)
    features = kind.encode(splits.train, tokenizer, experiment.train.max_length)
    lengths = [len(each["input_ids"]) for each in features]
    schedule = Schedule(lengths, experiment.train, experiment.seed)
    micros = [
        micro[0]
        for micro in schedule.micro_batches(schedule.largest_step((0, schedule.total_steps)))
    ]
    batches = [
        MicroBatch(kind.collate([features[row] for row in micro], tokenizer)) for micro in micros
    ]
    known["data"] = resident() - known["interpreter"] - known["libraries"]
    forget_peak()
    assembly = assemble(experiment, kind, splits)
    gc.collect()
    known["loading_peak"] = resident("VmHWM")
    set_seed(experiment.seed)
    accelerator = Accelerator(mixed_precision=experiment.precision.mixed_precision)
    model = assembly.model
    optimizer, _ = build_optimizer(model, experiment.optim, assembly.prepared.anatomy)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    set_training_mode(model, assembly.prepared.trunk)
    trained = [p for p in model.parameters() if p.requires_grad]
    items = sum(kind.num_items(features[row]) for micro in micros for row in micro)
    timeline = TimelineMeter()
    for meter in (NullMeter(), timeline, NullMeter()):
        forget_peak()
        with meter.step(model, optimizer, [batch.inputs for batch in batches]):
            optimizer_step(
                prepared,
                batches,
                kind.loss,
                optimizer,
                num_items=items,
                parameters=trained,
                backend=accelerator,
                max_grad_norm=experiment.optim.max_grad_norm,
                meter=meter,
            )
        optimizer.zero_grad()
    result = timeline.result()
    known["step_peak"] = resident("VmHWM")
    known["unread"] = unread_weights()
    known["live"] = result.breakdown.model_dump()
    known["batch"] = list(batches[0].inputs["input_ids"].shape)
    return known


def planned(task: str, recipe: str) -> dict[str, Any]:
    """The same experiment's plan, by part."""
    from peftlab.experiment.resolve import resolve
    from peftlab.planning.experiment import plan_experiment

    settings = [f"data.max_train_rows={ROWS}", "train.trunk_cache=off"]
    experiment = resolve(task, recipe, overrides=settings).experiment
    kind = experiment.build_kind()
    return plan_experiment(experiment, kind, kind.read(), device="cpu").memory.model_dump()


def in_a_process(task: str, recipe: str, *flags: str, **environment: str) -> dict[str, Any]:
    """What ``child`` finds."""
    command = [sys.executable, __file__, "--child", task, recipe, *flags]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )
    known: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return known


def mib(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / MIB:,.1f}"


def page(cases: list[tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]]) -> str:
    """The section of the page, as Markdown; all figures in MiB."""
    what = (
        "The embedded models with their real weights on their tasks, the largest batch of "
        f"{ROWS} training rows, fp32; MiB. `python benchmarks/plan_process.py --write "
        "docs/plan-accuracy.md`. The peak by part, planned / measured:"
    )
    lines = [
        what,
        "",
        f"| task, recipe | batch | {' | '.join(PARTS)} |",
        f"| --- | ---: |{' ---: |' * len(PARTS)}",
    ]
    for task, recipe, plan, known, _ in cases:
        pairs = [
            (plan["planned"][f"{part}_bytes"], known["live"][f"{part}_bytes"]) for part in PARTS
        ]
        row = [mib(ours) if ours == real else f"{mib(ours)} / {mib(real)}" for ours, real in pairs]
        batch = " × ".join(map(str, known["batch"]))
        lines.append(f"| {task}, {recipe} | {batch} | {' | '.join(row)} |")
    off = max(
        abs(plan["planned"][f"{part}_bytes"] - known["live"][f"{part}_bytes"])
        for _, _, plan, known, _ in cases
        for part in PARTS
    )
    same = (
        "Every part is equal to the byte." if not off else f"The largest difference: {off} bytes."
    )
    more = (
        f"{same} The process holds more than its tensors. What it held at most during a third "
        "step, with no measurement of tensors in it, is the sum of the columns before:"
    )
    columns = ("interpreter", "libraries", "data, tokenizer", "tensors (planned)")
    columns += ("weights never read", "allocator", "rest", "high-water mark", "while loading")
    heading = f"| task, recipe | {' | '.join(columns)} |"
    lines += ["", more, "", heading, "| --- |" + " ---: |" * len(columns)]
    for task, recipe, plan, known, apart in cases:
        tensors = plan["planned"]["peak_bytes"]
        allocator = known["step_peak"] - apart["step_peak"]
        parts = [known["interpreter"], known["libraries"], known["data"], tensors]
        parts += [-known["unread"], allocator]
        rest = known["step_peak"] - sum(parts)
        row = [mib(size) for size in (*parts, rest, known["step_peak"], known["loading_peak"])]
        lines.append(f"| {task}, {recipe} | {' | '.join(row)} |")
    first = {task: plan for task, _, plan, _, _ in reversed(cases)}
    planning = ", ".join(f"{mib(plan['planning'])} on {task}" for task, plan in first.items())
    lines.append(f"""
- *weights never read*: the checkpoint is mapped, not copied, so loading holds it once, and rows of
  an embedding that no text of the batch uses are in no memory.
- *allocator*: what glibc's malloc kept of freed tensors and could not use again: the same step with
  `MALLOC_MMAP_THRESHOLD_=65536`, where every larger block is mapped and given back on its own,
  needs that much less. A plan for CUDA replays its allocator; one for CPU counts tensors alone.
  These processes have glibc's own limits; a run's are [higher](decisions/host-allocator.md).
- *rest*: code of kernels that ran for the first time, their packing buffers (oneDNN, MKL), threads,
  Python objects of the graph, and the noise between the two processes.
- A run plans first, in the same process, and that stays resident: {planning} (reading and encoding
  the rows included).""")
    return "\n".join(lines)


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        task, recipe, *flags = sys.argv[2:]
        print(json.dumps(child(task, recipe, plan_first="--plan" in flags)))
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="write the section into this page")
    arguments = parser.parse_args()
    cases = []
    for task, recipe in CASES:
        print(task, recipe, flush=True)
        cases.append((
            task,
            recipe,
            in_a_process(task, recipe, "--plan"),
            in_a_process(task, recipe),
            in_a_process(task, recipe, MALLOC_MMAP_THRESHOLD_="65536"),
        ))  # fmt: skip
        # After each case: an interrupted call leaves what it finished.
        if arguments.write:
            write_section(arguments.write, "process", page(cases))
    print(page(cases))
    return 0


if __name__ == "__main__":
    sys.exit(main())
