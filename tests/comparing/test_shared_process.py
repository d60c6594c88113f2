"""Cells with a frozen trunk share a process, and nobody can tell by their results."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from peftlab.comparing import CompareResult, compare
from peftlab.comparing.cells import CellRunner, Worker, shared_by
from peftlab.experiment.resolve import resolve
from peftlab.results.comparison import Cell
from peftlab.run import Request, train
from tests.comparing.test_compare import SETTINGS, write_recipe

EQUAL = ("predictions.jsonl", "adapter/*")
TIMES = {"speed", "curve", "trunk_cache", "command", "environment"}


def run(task: Path, root: Path, *recipes: str, seeds: int) -> CompareResult:
    return compare(str(task), recipes, seeds=seeds, root=root, overrides=SETTINGS, progress=False)


def shared(cells: tuple[Cell, ...]) -> list[tuple[str, int]]:
    """Those that were not the first in their process."""
    assert all(cell.status == "ok" and cell.memory is not None for cell in cells)
    return [(c.recipe, c.seed) for c in cells if c.memory and c.memory.process_peak_bytes is None]


def without_times(cell: dict[str, Any]) -> dict[str, Any]:
    content = {key: value for key, value in cell.items() if key not in {*TIMES, "run_dir"}}
    content["memory"].pop("process_peak_bytes")
    content["plan"].pop("memory_bytes")
    return content


def test_a_shared_process_gives_what_solo_runs_give(task: Path, tmp_path: Path) -> None:
    fast = write_recipe(
        task,
        "fast",
        "method: {kind: freeze, top: 0}\noptim: {learning_rate: 2e-2, weight_decay: 0.01}\n",
    )
    staged = write_recipe(
        task,
        "staged",
        "method: {kind: freeze, top: 1, unfreeze_ratio: 0.5}\noptim: {learning_rate: 1e-3}\n",
    )
    recipes = ("head-only", fast, "freeze-top1", staged, "lora")
    comparison = run(task, tmp_path / "shared", *recipes, seeds=2).comparison
    paths = {Path(path).stem: path for path in (fast, staged)}
    name, later = paths
    cells = comparison.cells
    assert shared(cells) == [
        ("head-only", 1), (name, 0), (name, 1), ("freeze-top1", 1), (later, 1)
    ]  # fmt: skip
    for cell in cells:
        recipe = paths.get(cell.recipe, cell.recipe)
        request = Request(root=tmp_path / "solo", progress=False)
        solo = train(str(task), recipe, seed=cell.seed, overrides=SETTINGS, request=request)
        assert cell.run_dir is not None
        files = [path for pattern in EQUAL for path in sorted(Path(cell.run_dir).glob(pattern))]
        assert len(files) >= 2
        for path in files:
            twin = solo.folder / path.relative_to(cell.run_dir)
            assert path.read_bytes() == twin.read_bytes(), path
        assert without_times(cell.model_dump()) == without_times(solo.record.model_dump())
        ours, theirs = (
            json.loads((Path(folder) / "plan.json").read_text()) | {"memory_bytes": None}
            for folder in (cell.run_dir, solo.folder)
        )
        assert ours == theirs


def test_a_process_that_is_killed_costs_the_cell_it_was_in(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Worker.send

    def send_and_kill(worker: Worker, experiment: Any) -> bool:
        sent = send(worker, experiment)
        assert worker.process.pid is not None
        os.kill(worker.process.pid, signal.SIGKILL)
        return sent

    monkeypatch.setattr(Worker, "send", send_and_kill)
    first, lost, third, fourth = run(task, tmp_path, "head-only", seeds=4).comparison.cells
    assert lost.status == "oom"
    assert "SIGKILL" in (lost.error or "")
    # Nothing shares a process any more.
    assert shared((first, third, fourth)) == []


def test_a_process_that_dies_while_it_waits_costs_nothing(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, killed = Worker.send, []

    def kill_once_and_send(worker: Worker, experiment: Any) -> bool:
        assert worker.process.pid is not None
        if not killed:
            killed.append(worker.process.pid)
            os.kill(worker.process.pid, signal.SIGKILL)
            worker.process.join()
        return send(worker, experiment)

    monkeypatch.setattr(Worker, "send", kill_once_and_send)
    cells = run(task, tmp_path, "head-only", seeds=3).comparison.cells
    assert killed
    assert shared(cells) == [("head-only", 2)]


def test_only_seed_and_learning_rate_may_differ(task: Path) -> None:
    def of(recipe: str = "head-only", *overrides: str, seed: int = 0) -> str:
        return shared_by(resolve(str(task), recipe, seed=seed, overrides=overrides).experiment)

    assert of() == of(seed=3) == of("head-only", "optim.learning_rate=0.5")
    for override in ("train.max_length=8", "optim.weight_decay=0.5", "precision.dtype=bfloat16"):
        assert of() != of("head-only", override)
    assert of() != of("lora")


def test_the_plan_of_one_seed_serves_the_others(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, planned = CellRunner._start, 12_345

    def with_marked_plans(self: CellRunner, target: Any, *arguments: Any) -> Any:
        *others, plans = arguments
        if isinstance(plans, dict):
            mark = {"flops_per_step": planned}
            plans = {key: plan.model_copy(update=mark) for key, plan in plans.items()}
        return start(self, target, *others, plans)

    monkeypatch.setattr(CellRunner, "_start", with_marked_plans)
    # All rows are cut to one length: the largest batch has one shape, whatever the seed.
    overrides = (*SETTINGS, "train.max_length=4")
    compared = compare(
        str(task), ["lora"], seeds=2, root=tmp_path, overrides=overrides, progress=False
    )
    first, second = compared.comparison.cells
    assert first.plan is not None
    assert second.plan is not None
    assert second.plan["flops_per_step"] == planned != first.plan["flops_per_step"]
    assert second.plan["memory"] == first.plan["memory"]
