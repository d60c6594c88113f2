"""peftlab against transformers.Trainer + PEFT: time, memory and quality of the same training.

    python benchmarks/speed.py --seeds 5 --write docs/benchmarks.md
    python benchmarks/speed.py --growth --write docs/benchmarks.md
    python benchmarks/speed.py --max-steps 30 --results runs/quick.json   # a quick look

Every run is a fresh process. The sides of a pair follow each other, those of ``--growth`` cell by
cell, and who begins changes from pair to pair. Results are added to a file pair by pair: the same
command goes on where it was stopped, and what is in the file is not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from speed_page import page
from speed_sides import OURS, PEERS, TASK, Result, Setting, run_side
from turns import Turns, alternate

from peftlab.files import write_json, write_text

SCHEMA_VERSION = 1
METHODS = ("full", "lora", "ptuning-v2", "freeze-top2", "head-only")
GROWTH_RECIPES = ("head-only", "freeze-top1", "freeze-top2")


class Results:
    """The results file; every addition is written at once, in one rename."""

    def __init__(self, path: Path, environment: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "environment": environment,
            "pairs": [],
            "growth": [],
        }
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
        for key, value in (("schema_version", SCHEMA_VERSION), ("environment", environment)):
            if (there := self.content[key]) != value:
                raise SystemExit(
                    f"{path} is of another machine or other versions ({there!r} is not {value!r}): "
                    "give another --results file"
                )

    def find(self, part: str, key: dict[str, Any]) -> dict[str, Any] | None:
        """The entry of a part with all values of ``key``."""
        for entry in self.content[part]:
            if all(entry[name] == value for name, value in key.items()):
                found: dict[str, Any] = entry
                return found
        return None

    def add(self, part: str, key: dict[str, Any], values: dict[str, Any]) -> None:
        """Put an entry into a part, in place of one with the same key."""
        there = self.find(part, key)
        entry = {**key, **values, "commit": _commit()}
        self.content[part] = [e for e in self.content[part] if e is not there] + [entry]
        write_json(self.path, self.content)


def main() -> None:
    arguments = _arguments()
    results = Results(arguments.results, _environment())
    try:
        if arguments.growth:
            run_growth(results, arguments)
        else:
            run_pairs(results, arguments)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; finished pairs are kept, the same command goes on") from None
    finally:
        if arguments.write:
            write_text(arguments.write, page(results.content, arguments.results))


def run_pairs(results: Results, arguments: argparse.Namespace) -> None:
    """Every method × seed with all sides, seed by seed, so that a part of it is a fair sample."""
    setting = Setting(
        arguments.model,
        arguments.rows,
        arguments.epochs,
        arguments.batch_size,
        arguments.max_steps,
    )
    sides = [OURS, *arguments.peers]
    cells = [
        (repeat, seed, method)
        for repeat in range(arguments.pairs)
        for seed in arguments.seeds
        for method in arguments.methods
    ]
    for position, (repeat, seed, method) in enumerate(cells, start=1):
        key = {"setting": asdict(setting), "method": method, "seed": seed, "repeat": repeat}
        there = results.find("pairs", key)
        if there is not None and there["sides"].keys() >= set(sides):
            continue
        begin = (seed + repeat) % len(sides)
        found = {
            side: in_fresh_process(side, setting, method, seed)
            for side in [*sides[begin:], *sides[:begin]]
        }
        threads = {result["num_threads"] for result in found.values()}
        if len(threads) > 1:
            raise SystemExit(f"the sides used different numbers of threads: {sorted(threads)}")
        results.add("pairs", key, {"sides": {side: found[side] for side in sides}})
        ours = found[OURS]["train_seconds"]
        ratios = [f"{peer} {found[peer]['train_seconds'] / ours:.2f}×" for peer in sides[1:]]
        _say(f"[{position}/{len(cells)}] {method} seed {seed}: {ours:.1f} s, {', '.join(ratios)}")


def in_fresh_process(side: str, setting: Setting, method: str, seed: int) -> Result:
    """Train one side in a process that has the libraries loaded and never computed anything."""
    import torch

    context: Any = multiprocessing.get_context("spawn")
    # Trainer's module asks for CUDA when it is imported, which a forked process cannot repeat.
    if "forkserver" in multiprocessing.get_all_start_methods() and not torch.cuda.device_count():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["peftlab.comparing.warm", "transformers.trainer"])
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="peftlab-speed-") as folder:
        process = context.Process(
            target=run_side, args=(side, setting, method, seed, Path(folder), sender)
        )
        process.start()
        sender.close()
        try:
            result: Result = receiver.recv()
        except EOFError:
            raise SystemExit(f"{side} failed on {method}, seed {seed}: see above") from None
        except KeyboardInterrupt:
            process.terminate()
            raise
        finally:
            process.join()
    return result


def run_growth(results: Results, arguments: argparse.Namespace) -> None:
    """A comparison with the frozen trunk's cache, empty at its start, and one without, in turns."""
    setting = {
        "model": arguments.model,
        "rows": arguments.rows,
        "recipes": list(arguments.growth_recipes),
        "seeds": arguments.growth_seeds,
        "epochs": arguments.growth_epochs,
    }
    for repeat in range(arguments.pairs):
        key = {"setting": setting, "repeat": repeat}
        if results.find("growth", key) is not None:
            continue
        found = _comparisons(setting, (True, False) if repeat % 2 == 0 else (False, True))
        results.add("growth", key, {"cached": found[True], "uncached": found[False]})
        wall = found[False]["wall_seconds"] / found[True]["wall_seconds"]
        _say(f"{found[True]['wall_seconds']:.1f} s with the cache, {wall:.2f}× without")


def _comparisons(setting: dict[str, Any], order: Sequence[bool]) -> dict[bool, dict[str, Any]]:
    """``peftlab compare`` with the cache and without, in turns, and what each cell took."""
    from peftlab.trunk.store import CACHE_VARIABLE

    found = {}
    with tempfile.TemporaryDirectory(prefix="peftlab-speed-") as name:
        turns = {}
        for cached in order:
            folder = Path(name, f"cached-{cached}")
            folder.mkdir()
            words = [*growth_command(setting, cached), "--json", "--output-dir", f"{folder}/runs"]
            env = {**os.environ, CACHE_VARIABLE: f"{folder}/trunk"}
            turns[cached] = Turns(words, env, folder / "comparison.json")
        alternate(list(turns.values()))
        for cached, side in turns.items():
            comparison = json.loads(side.output.read_text(encoding="utf-8"))
            cells = [_times(cell) for cell in comparison["cells"]]
            found[cached] = {"wall_seconds": side.seconds, "cells": cells}
    return found


def _times(cell: dict[str, Any]) -> dict[str, Any]:
    """What a comparison's cell took, and how well it did."""
    speed = ("train_seconds", "eval_seconds", "load_seconds", "train_flops")
    return {
        "recipe": cell["recipe"],
        "seed": cell["seed"],
        **{name: cell["speed"][name] for name in speed},
        "metric": cell["metrics"][cell["metric"]],
    }


def growth_command(setting: dict[str, Any], cached: bool) -> list[str]:
    """The words after ``peftlab`` of the comparison that a growth setting stands for."""
    words = ["compare", TASK, "--recipes", ",".join(setting["recipes"])]
    words += ["--seeds", str(setting["seeds"]), "--model", setting["model"]]
    words += ["--set", f"data.max_train_rows={setting['rows']}"]
    words += ["--set", f"train.num_train_epochs={setting['epochs']}"]
    return words if cached else [*words, "--set", "train.trunk_cache=off"]


def _environment() -> dict[str, Any]:
    """What times depend on; what is not the same is not put into one table."""
    import torch

    from peftlab.training.environment import describe_device, package_versions

    # A fork server is started with this process's settings, so all sides have these threads.
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return {
        "device": _processor() if device.type == "cpu" else describe_device(device),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": package_versions(),
    }


def _processor() -> str:
    """The processor's name, where the system tells it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The source's commit, with ``+`` where it was changed since; None outside a repository."""
    import torch

    from peftlab.training.environment import describe_environment

    environment = describe_environment(torch.device("cpu"), 1)
    if environment.git_commit is None:
        return None
    return environment.git_commit[:12] + "+" * bool(environment.git_dirty)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _peers(text: str) -> list[str]:
    if unknown := set(_names(text)) - PEERS.keys():
        raise argparse.ArgumentTypeError(f"no such peer: {', '.join(unknown)}")
    return _names(text)


def _seeds(text: str) -> list[int]:
    return (
        [int(part) for part in text.split(",") if part] if "," in text else list(range(int(text)))
    )


def _arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--methods", type=_names, default=list(METHODS), metavar="A,B,...", help="recipes")
    add("--peers", type=_peers, default=list(PEERS), metavar="A,B", help=", ".join(PEERS))
    add("--seeds", type=_seeds, default=[0], metavar="N", help="how many, or which: 0,1,7")
    add("--pairs", type=int, default=1, help="pairs a seed; 0 runs nothing (default: 1)")
    add("--model", default=Setting.model)
    add("--rows", type=int, default=Setting.rows, help="training rows")
    add("--epochs", type=int, default=Setting.epochs)
    add("--batch-size", type=int, default=Setting.batch_size)
    add("--max-steps", type=int, help="cut training short")
    add("--growth", action="store_true", help="the second part, instead of the pairs")
    add("--growth-recipes", type=_names, default=list(GROWTH_RECIPES), metavar="A,B,...")
    add("--growth-seeds", type=int, default=5, metavar="N")
    add("--growth-epochs", type=int, default=5, metavar="N")
    add("--results", type=Path, default=Path("runs/speed.json"), help="default: %(default)s")
    add("--write", type=Path, metavar="PAGE", help="write the page from the results file")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
