"""A comparison in real processes: each cell once, and no cell takes another down."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from peftlab.comparing import CompareResult, compare
from peftlab.comparing.cells import CellRunner
from peftlab.errors import UserError
from peftlab.experiment.resolve import resolve
from peftlab.experiment.store import write_experiment
from peftlab.results.comparison import read_comparison
from peftlab.results.record import Record
from peftlab.results.store import read_record, write_record
from tests.training.conftest import write_task

SETTINGS = ("train.max_steps=3", "train.eval_strategy=no", "optim.warmup_steps=0")
RECIPES = ("head-only", "lora")


def run(task: Path, root: Path, recipes: Any = RECIPES, **options: Any) -> CompareResult:
    overrides = (*SETTINGS, *options.pop("overrides", ()))
    options = {"seeds": 2, "progress": False, "command": "peftlab compare"} | options
    return compare(str(task), recipes, root=root, overrides=overrides, **options)


def contents(folder: Path, *patterns: str) -> dict[str, int]:
    """Every file below a folder with the time it was written."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for pattern in patterns or ("*",)
        for path in sorted(folder.rglob(pattern))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def compared(task: Path) -> CompareResult:
    return run(task, task.parent / "runs")


def test_every_recipe_with_every_seed(compared: CompareResult, task: Path) -> None:
    comparison = compared.comparison
    assert [(cell.recipe, cell.seed, cell.status) for cell in comparison.cells] == [
        ("head-only", 0, "ok"), ("head-only", 1, "ok"), ("lora", 0, "ok"), ("lora", 1, "ok"),
    ]  # fmt: skip
    assert not compared.interrupted
    assert comparison.command == "peftlab compare"
    assert compared.folder.parent == task.parent / "runs" / "toy" / "comparisons"
    assert read_comparison(compared.folder) == comparison
    assert "<html" in compared.report.read_text(encoding="utf-8")
    for cell in comparison.cells:
        assert cell.run_dir is not None
        assert cell.model_dump(exclude={"run_dir"}) == read_record(Path(cell.run_dir)).model_dump()


def test_who_continues_another_s_trunk_comes_after_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = write_task(tmp_path, seed=1)  # The trunk of other tests' rows may be kept already.
    recipes = ("head-only", "lora", "freeze-top1")

    def turns(name: str, *overrides: str) -> tuple[list[str], dict[str, Any]]:
        compared = run(task, tmp_path / name, recipes, seeds=1, progress=True, overrides=overrides)
        cells = compared.comparison.cells
        assert [cell.recipe for cell in cells] == list(recipes)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
        return [line.split()[1] for line in lines], {cell.recipe: cell for cell in cells}

    order, cells = turns("kept")
    assert order == ["freeze-top1", "lora", "head-only"]
    assert cells["head-only"].trunk_cache.filled_from == cells["freeze-top1"].trunk_cache.boundary
    assert cells["freeze-top1"].trunk_cache.filled_from == ""
    order, alone = turns("alone", "train.trunk_cache=off")
    assert order == list(recipes)
    for recipe in recipes:
        assert alone[recipe].metrics == pytest.approx(cells[recipe].metrics, abs=1e-5)


def test_the_same_again_runs_nothing(compared: CompareResult, task: Path) -> None:
    root = task.parent / "runs"
    before = contents(root, "record.json", "predictions.jsonl", "*.safetensors")
    assert len(before) == 12
    again = run(task, root)
    assert contents(root, "record.json", "predictions.jsonl", "*.safetensors") == before
    assert again.folder == compared.folder
    assert again.comparison.cells == compared.comparison.cells


def test_more_seeds_run_only_what_is_new(compared: CompareResult, task: Path) -> None:
    root = task.parent / "runs"
    before = contents(root, "record.json")
    more = run(task, root, ("head-only",), seeds=[0, 7])
    after = contents(root, "record.json")
    assert [cell.seed for cell in more.comparison.cells] == [0, 7]
    assert len(after.keys() - before.keys()) == 1
    assert {name: after[name] for name in before} == before
    assert more.folder != compared.folder


def write_recipe(task: Path, name: str, text: str) -> str:
    path = task.parent / f"{name}.yaml"
    path.write_text(f"summary: {name}\n{text}")
    return str(path)


@pytest.fixture
def huge(task: Path) -> str:
    """A recipe whose method needs more memory than there is anywhere."""
    method = "{kind: ptuning_v2, prefix_projection: true, encoder_hidden_size: 1000000000000}"
    return write_recipe(task, "huge", f"method: {method}\noptim: {{learning_rate: 1e-3}}\n")


@pytest.fixture
def wild(task: Path) -> str:
    """A recipe that diverges."""
    return write_recipe(task, "wild", "method: {kind: full}\noptim: {learning_rate: 1e30}\n")


def kill_cell(runner_class: type[CellRunner], recipe: str, patch: pytest.MonkeyPatch) -> None:
    """Let the cells of a recipe end by SIGKILL, in their processes, as the system's killer does."""
    true_start = runner_class._start

    def start(self: CellRunner, target: Any, *arguments: Any) -> Any:
        if getattr(arguments[0], "recipe", None) == recipe:
            return true_start(self, signal.raise_signal, signal.SIGKILL)
        return true_start(self, target, *arguments)

    patch.setattr(runner_class, "_start", start)


def test_a_lost_cell_costs_one_cell(
    task: Path, huge: str, wild: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_cell(CellRunner, "lora", monkeypatch)
    result = run(task, tmp_path, (huge, wild, "lora", "head-only"), seeds=1)
    huge_cell, wild_cell, killed, last = result.comparison.cells
    assert huge_cell.status == "oom"
    assert "can't allocate memory" in (huge_cell.error or "")
    assert wild_cell.status == "diverged"
    assert "the loss is" in (wild_cell.error or "")
    assert killed.status == "oom"
    assert killed.error == (
        "the process ended with signal SIGKILL, most likely sent by the system because memory "
        "ran out"
    )
    assert last.status == "ok"
    for cell in result.comparison.cells:
        assert cell.run_dir is not None
        assert read_record(Path(cell.run_dir)).status == cell.status
    assert result.report.exists()
    assert not result.interrupted


@pytest.mark.parametrize(
    ("exitcode", "status", "error"),
    [
        (-signal.SIGKILL, "oom", "signal SIGKILL, most likely"),
        (-signal.SIGSEGV, "failed", "signal SIGSEGV"),
        (1, "failed", "exit code 1"),
        (None, "failed", "exit code None"),
    ],
)
def test_how_a_process_was_lost(
    exitcode: int | None, status: str, error: str, task: Path, tmp_path: Path
) -> None:
    runner = CellRunner(tmp_path, force=False, progress=False, command="peftlab compare")
    experiment = resolve(str(task), "lora", seed=3).experiment
    record = runner._lost(experiment, exitcode)
    assert (record.recipe, record.seed, record.status) == ("lora", 3, status)
    assert error in (record.error or "")
    assert record.command == "peftlab compare"


class Silent:
    """A process that wrote nothing; joining it may be interrupted."""

    exitcode = 1

    def __init__(self, interrupts: int, work: Any = None) -> None:
        self.interrupts, self.work = interrupts, work

    def join(self) -> None:
        if self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt
        if self.work is not None:
            self.work()


def test_the_record_of_an_earlier_run_is_not_taken_for_this_ones(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = CellRunner(tmp_path, force=True, progress=False, command="")
    experiment = resolve(str(task), "lora").experiment
    folder = runner._folder(experiment)
    write_record(
        folder, runner._lost(experiment, 1).model_copy(update={"status": "ok", "error": None})
    )
    write_experiment(folder, experiment, runner._identity(experiment))
    monkeypatch.setattr(runner, "_start", lambda *_: Silent(0))
    record, _ = runner.run(experiment)
    assert record.status == "failed"


def test_an_interruption_while_a_cell_starts_stops_everything(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = CellRunner(tmp_path, force=False, progress=False, command="")
    experiment = resolve(str(task), "lora").experiment
    monkeypatch.setattr(runner, "_start", lambda *_: Silent(1))
    with pytest.raises(KeyboardInterrupt):
        runner.run(experiment)
    assert list(tmp_path.rglob("record.json")) == []


def test_a_cell_that_ends_well_in_spite_of_an_interruption_is_kept_and_the_last(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: CellRunner, target: Any, *arguments: Any) -> Silent:
        def work() -> None:
            record: Record = self._lost(arguments[0], 1)
            ok = record.model_copy(update={"status": "ok", "error": None})
            write_record(self._folder(arguments[0]), ok)

        return Silent(1, work)

    monkeypatch.setattr(CellRunner, "_start", start)
    monkeypatch.setattr(CellRunner, "check", lambda *_: {})
    result = run(task, tmp_path)
    assert result.interrupted
    assert [(cell.recipe, cell.seed) for cell in result.comparison.cells] == [("head-only", 0)]


def test_all_mistakes_at_once_and_nothing_made(task: Path, tmp_path: Path) -> None:
    one = write_recipe(task, "one", "method: {kind: lora, rr: 4}\noptim: {learning_rate: 1}\n")
    two = write_recipe(task, "two", "method: {kind: lorra}\noptim: {learning_rate: 1}\n")
    with pytest.raises(UserError) as raised:
        run(task, tmp_path, (one, "head-only", two, "no-such-recipe"))
    text = str(raised.value)
    assert "unknown key 'method.rr'" in text
    assert "'lorra'" in text
    assert "'no-such-recipe'" in text
    # Once each, not once a seed.
    assert len(raised.value.problems) == 3
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_the_model_is_found_before_the_first_cell(
    task: Path, tmp_path: Path
) -> None:
    method = "{kind: freeze, top: 9}"
    one = write_recipe(task, "too-many", f"method: {method}\noptim: {{learning_rate: 1e-3}}\n")
    two = write_recipe(task, "no-match", "method: {kind: lora, target_modules: [nothing]}\n"
                       "optim: {learning_rate: 1e-3}\n")  # fmt: skip
    with pytest.raises(UserError) as raised:
        run(task, tmp_path, ("head-only", one, two))
    assert len(raised.value.problems) == 2
    assert list(tmp_path.iterdir()) == []


def test_requests_that_make_no_sense(task: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'lora' is there 2 times"):
        run(task, tmp_path, ("lora", "full", "lora"))
    with pytest.raises(UserError, match="no recipe is named"):
        run(task, tmp_path, ())
    for seeds in (0, [], [1, 1]):
        with pytest.raises(UserError, match="--seeds"):
            run(task, tmp_path, seeds=seeds)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="needs process groups"
)
def test_ctrl_c_keeps_what_is_finished(task: Path, working_directory: Path) -> None:
    def command(steps: int, seeds: int) -> list[str]:
        settings = [f"train.max_steps={steps}", *SETTINGS[1:]]
        options = [part for setting in settings for part in ("--set", setting)]
        arguments = ["compare", str(task), "-r", "head-only,lora", "--seeds", str(seeds), *options]
        return [sys.executable, "-m", "peftlab", *arguments]

    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    # So many steps that lora cannot be done before it is interrupted; head-only's process waits.
    process = subprocess.Popen(
        command(120, seeds=2),
        env=environment,
        start_new_session=True,
        # Whoever started these tests in the background may ignore SIGINT, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not list(working_directory.glob("runs/toy/lora/*/steps.jsonl")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "finished runs are kept, the same command goes on" in output
    assert "Traceback" not in output
    (kept,) = working_directory.glob("runs/toy/head-only/*/record.json")
    (interrupted,) = working_directory.glob("runs/toy/lora/*/record.json")
    assert read_record(kept.parent).status == "ok"
    assert read_record(interrupted.parent).status == "interrupted"
    written = contents(kept.parent)

    done = subprocess.run(
        command(120, seeds=1), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert contents(kept.parent) == written
    assert read_record(interrupted.parent).status == "ok"
    assert not (interrupted.parent / "error.txt").exists()
