"""How long a plan of a large model takes, and how much memory: the command itself, in a process.

    python benchmarks/plan_scale.py [--repeat 3] [--write docs/planning.md]

LoRA on all linears, batch 4 × 2048, bf16 weights, for CUDA, from a config.json alone. Seconds are
those of the whole command, interpreter and imports included; of several repeats the least.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from pages import write_section

from peftlab.units import GIB

SHAPES = {
    "3B": {"layers": 28, "hidden": 3072, "intermediate": 8192, "heads": 24, "tied": True},
    "8B": {"layers": 32, "hidden": 4096, "intermediate": 14336, "heads": 32, "tied": False},
    "70B": {"layers": 80, "hidden": 8192, "intermediate": 28672, "heads": 64, "tied": False},
}
LIMIT_SECONDS = {"8B": 15.0, "70B": 45.0}
LIMIT_BYTES = 1 * GIB
ROWS, TOKENS = 4, 2048
ARGUMENTS = (
    f"plan --recipe lora --task-kind causal-lm --batch-size {ROWS} --seq-len {TOKENS} "
    "--dtype bfloat16 --device cuda --json"
)


@dataclass(frozen=True)
class Cost:
    """Of one command: seconds on the clock, of a processor, and the most memory resident."""

    wall_seconds: float
    process_seconds: float
    resident_bytes: int
    planned_bytes: int


def config_of(name: str) -> dict[str, object]:
    """A Llama's config.json."""
    shape = SHAPES[name]
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": shape["layers"],
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["intermediate"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": shape["tied"],
    }


def cost_of(name: str, folder: Path) -> Cost:
    """Run the command and ask the system what it took."""
    config = folder / f"{name}.json"
    config.write_text(json.dumps(config_of(name)), encoding="utf-8")
    started = time.perf_counter()
    command = [sys.executable, "-m", "peftlab", *ARGUMENTS.split(), "--model", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        # wait4 tells of this one process what getrusage tells of all that ever ran.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(
        wall,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * unit,
        json.loads(text)["memory"]["peak_bytes"],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--write", type=Path, help="write the section into this page")
    arguments = parser.parse_args()
    lines = [
        "| Llama shape | seconds | processor seconds | resident at most | planned live peak |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    within = True
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.shapes.split(","):
            costs = [cost_of(name, Path(folder)) for _ in range(arguments.repeat)]
            wall = min(cost.wall_seconds for cost in costs)
            process = min(cost.process_seconds for cost in costs)
            resident = max(cost.resident_bytes for cost in costs)
            lines.append(
                f"| {name} | {wall:.1f} | {process:.1f} | {resident / GIB:.2f} GiB "
                f"| {costs[0].planned_bytes / GIB:.1f} GiB |"
            )
            print(lines[-1], flush=True)
            within &= wall <= LIMIT_SECONDS.get(name, wall) and resident <= LIMIT_BYTES
    command = f"peftlab {ARGUMENTS.removesuffix(' --json')} --model CONFIG.json"
    note = (
        f"`{command}`, the whole command with its imports; `python benchmarks/plan_scale.py "
        f"--repeat {arguments.repeat} --write docs/planning.md`:"
    )
    text = "\n".join([note, "", *lines])
    print(text)
    if arguments.write:
        write_section(arguments.write, "scale", text)
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
