"""What a step takes that replays its frozen trunk, part by part: what keeps the cache from more.

    python benchmarks/replayed_step.py [--recipes freeze-top2,freeze-top1,head-only] [--rows 2000]

One epoch of each recipe with the frozen trunk's cache, which another run has filled, and one
without; then one with the cache again under torch's profiler, whose own times of operations make
the parts. *Between* is what is left of the step that nothing watched: Python, autograd's engine,
batches. The last line puts the epochs together as a comparison of so many seeds and epochs does:
the ratio of training without the cache to training with it, fills included, once by these times
and once by floating-point operations, which is what it would be if nothing but products took time.
A recipe that freezes more comes later, since it continues the trunk of those before it.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from torch.profiler import ProfilerActivity, profile, record_function

from peftlab.experiment.resolve import resolve
from peftlab.results.record import Record
from peftlab.run import Request, run_experiment
from peftlab.training.loop import Loop
from peftlab.trunk.store import CACHE_VARIABLE

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::baddbmm_")
UPDATE = ("aten::_fused_adamw_", "aten::dot", "aten::_foreach_add_", "Optimizer.step#AdamW.step")
DRAWS = ("peftlab::draw_kept_",)
MARK = "a step that counts"
WARM_UP = 3
"""Steps that fault memory in, and make the optimizer's state."""


@dataclass(frozen=True)
class Epoch:
    """One run: seconds of a step, without the first and the measured ones, and its record."""

    seconds: float
    record: Record

    @property
    def flops(self) -> float:
        """Of all its steps, and of filling the cache."""
        flops = self.record.speed.train_flops
        assert flops is not None
        return flops

    @property
    def of_a_step(self) -> str:
        """In words."""
        flops = self.flops / self.record.steps_done
        return f"{self.seconds * 1e3:.1f} ms a step of {flops / 1e9:.2f} GFLOP"


def run(recipe: str, options: argparse.Namespace, *extra: str) -> Epoch:
    """Train it for an epoch in a folder that goes away."""
    overrides = [f"data.max_train_rows={options.rows}", "train.num_train_epochs=1", *extra]
    overrides += ["train.eval_strategy=no", "train.load_best_model_at_end=false"]
    overrides += ["train.logging_steps=1"]
    experiment = resolve(
        "movie-sentiment", recipe, model=options.model, overrides=overrides
    ).experiment
    with tempfile.TemporaryDirectory(prefix="peftlab-step-") as folder:
        done = run_experiment(experiment, Request(root=Path(folder), progress=False))
        lines = (done.folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    memory = done.record.memory
    assert memory is not None
    steps = [json.loads(line) for line in lines]
    seconds = [
        step["seconds"]
        for step in steps
        if step["step"] > WARM_UP and step["step"] != memory.measured_step
    ]
    return Epoch(statistics.fmean(seconds), done.record)


def operations(recipe: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step that are an operation's own, by its name; of the same steps."""
    found: dict[str, float] = defaultdict(float)
    fit, advance = Loop.fit, Loop._advance

    def marked(loop: Loop, measure: bool) -> None:
        counts = loop.progress.step >= WARM_UP and not measure
        with record_function(MARK) if counts else contextlib.nullcontext():
            advance(loop, measure)

    def watched(loop: Loop, *arguments: Any) -> object:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            result = fit(loop, *arguments)
        events = sorted(profiler.events(), key=lambda event: event.time_range.start)
        steps = [event.time_range for event in events if event.name == MARK]
        begins = [step.start for step in steps]
        for event in events:
            step = bisect.bisect(begins, event.time_range.start) - 1
            within = step >= 0 and event.time_range.end <= steps[step].end
            if within and event.name.startswith(("aten::", "peftlab::", "Optimizer.step")):
                found[event.name] += event.self_cpu_time_total / 1e6 / len(steps)
        return result

    with mock.patch.object(Loop, "fit", watched), mock.patch.object(Loop, "_advance", marked):
        run(recipe, options)
    return found


def show(recipe: str, options: argparse.Namespace) -> tuple[Epoch, Epoch, Epoch]:
    """Print a recipe's table; the runs that fill, that replay and that do without."""
    fill, replay = run(recipe, options), run(recipe, options)
    plain = run(recipe, options, "train.trunk_cache=off")
    own = operations(recipe, options)
    groups: dict[str, float] = {
        "matrix products": sum(own[name] for name in PRODUCTS),
        "norm of the gradients and update": sum(own[name] for name in UPDATE),
        "random numbers of dropout": sum(own[name] for name in DRAWS),
    }
    groups["all other operations"] = sum(own.values()) - sum(groups.values())
    groups["between"] = replay.seconds - sum(own.values())
    ratio = plain.seconds / replay.seconds
    print(f"\n**{recipe}**: {replay.of_a_step}; without the cache {plain.of_a_step}: "
          f"{ratio:.2f} times as long.")  # fmt: skip
    if (peak := replay.record.speed.matmul_flops_per_second) is not None:
        seconds = replay.flops / replay.record.steps_done / peak
        print(f"At the measured peak of {peak / 1e9:.0f} GFLOP/s, its arithmetic would take "
              f"{seconds * 1e3:.1f} ms.")  # fmt: skip
    print("\n| part | ms | of the step |\n| --- | ---: | ---: |")
    for name, seconds in groups.items():
        print(f"| {name} | {seconds * 1e3:.2f} | {seconds / replay.seconds:.0%} |")
    return fill, replay, plain


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", default="freeze-top2,freeze-top1,head-only")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    recipes = options.recipes.split(",")
    with (
        tempfile.TemporaryDirectory(prefix="peftlab-trunk-") as folder,
        mock.patch.dict(os.environ, {CACHE_VARIABLE: folder}),
    ):
        shown = [show(recipe, options) for recipe in recipes]
    epochs = options.seeds * options.epochs
    cached = plain = cached_flops = plain_flops = 0.0
    for filling, replaying, without in shown:
        steps = epochs * replaying.record.steps_done
        trunk = filling.record.trunk_cache
        cached += (trunk.fill_seconds if trunk else 0.0) + steps * replaying.seconds
        plain += steps * without.seconds
        cached_flops += filling.flops - replaying.flops + epochs * replaying.flops
        plain_flops += epochs * without.flops
    print(f"\n{', '.join(recipes)} × {options.seeds} seeds × {options.epochs} epochs: training "
          f"{cached:.1f} s with the cache, {plain:.1f} s without, {plain / cached:.2f} times; "
          f"operations {plain_flops / cached_flops:.2f} times.")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
