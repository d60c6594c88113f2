"""Commands that run a verb: what they hand it, what they print, how they end."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from peftlab.errors import DivergedError, ExportMismatchError

Write = Callable[[str, str], Path]
Call = Callable[..., Any]
TRAIN = ("train", "films", "--recipe", "small-lora")


def _replace_run(monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], None]) -> None:
    """In place of training, ``act`` with the run's folder."""
    from peftlab.execute import Execution

    monkeypatch.setattr(Execution, "_execute", lambda self, *_: act(self.folder))


def test_from_training_to_a_prediction_and_an_export(project: Write, call: Call) -> None:
    trained = call(*TRAIN, "--seed", "1")
    assert trained.code == 0
    lines = [line for line in trained.out.splitlines() if not line.startswith("note: ")]
    assert lines[0].startswith("trainable params: ")
    assert lines[1].startswith("test accuracy: ")
    assert lines[1].endswith("(the same answer to every row: 0.5000)")
    folder = Path(next(line for line in lines if line.startswith("run: ")).split(": ")[1])
    assert folder.parent == Path("runs/films/small-lora")
    assert lines[-1] == f"next: peftlab export {folder} --to exports/films-small-lora"
    record = json.loads((folder / "record.json").read_text())
    assert record["command"] == "peftlab train films --recipe small-lora --seed 1"

    again = call(*TRAIN, "--seed", "1", "--json")
    assert again.json == {**record, "run_dir": str(folder)}
    assert "finished before" in again.err
    assert call(*TRAIN, "--seed", "1", "--quiet").out == ""

    told = call("predict", "films/small-lora", "--text", "fine", "--text", "dull", "--json").json
    assert [row["id"] for row in told["predictions"]] == ["0", "1"]
    piped = call("predict", "films/small-lora", stdin="fine\n\ndull\n").out.splitlines()
    assert piped == [row["prediction"] for row in told["predictions"]]
    assert set(piped) <= {"good", "bad"}
    filed = call("predict", str(folder), "--file", "recipes/tasks/test.csv").out.splitlines()
    assert len(filed) == 12
    assert call("predict", str(folder), stdin="\n").code == 2

    exported = call("export", "films/small-lora", "--to", "out", "--json")
    assert exported.code == 0
    assert exported.json["verdict"] == "same"
    assert Path(exported.json["export_dir"]) == Path("out").resolve()
    assert Path("out/model.safetensors").is_file()


def test_an_interrupted_run_says_what_was_kept(
    project: Write, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    _replace_run(monkeypatch, interrupt)
    done = call(*TRAIN)
    assert done.code == 130
    assert "no checkpoint to go on from (--set train.save_strategy=epoch" in done.err
    (record,) = Path("runs").rglob("record.json")
    assert json.loads(record.read_text())["status"] == "interrupted"

    def interrupt_later(folder: Path) -> None:
        (folder / "checkpoints" / "step-00000002").mkdir(parents=True)
        raise KeyboardInterrupt

    _replace_run(monkeypatch, interrupt_later)
    done = call(*TRAIN, "--run-dir", "mine")
    assert done.code == 130
    assert "the checkpoint in mine is kept. Add --resume" in done.err


def test_an_interruption_before_training(
    project: Write, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("peftlab.run"), "run_experiment", interrupt)
    done = call(*TRAIN)
    assert (done.code, done.out) == (130, "")
    assert done.err == "interrupted before training began; nothing was kept.\n"


def test_a_failed_run_exits_1_with_its_record(
    project: Write, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(folder: Path) -> None:
        raise DivergedError("the loss is nan in step 1.")

    _replace_run(monkeypatch, diverge)
    done = call(*TRAIN, "--json")
    assert done.code == 1
    assert done.errors == ["error: the loss is nan in step 1."]
    assert done.json["error"]["problems"] == [
        {"where": "", "message": "the loss is nan in step 1."}
    ]
    (record,) = Path("runs").rglob("record.json")
    assert f"the record of the failed run: {record.parent}" in done.err


@pytest.fixture
def compared(
    comparison_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """Answers for the verb compare; returns the list of what it was called with."""
    from peftlab.comparing import verb
    from peftlab.comparing.verb import CompareResult
    from peftlab.results.comparison import read_comparison

    def install(status: str = "ok", *, interrupted: bool = False) -> list[dict[str, Any]]:
        comparison = read_comparison(comparison_folder)
        first = comparison.cells[0].model_copy(update={"status": status})
        comparison = comparison.model_copy(update={"cells": (first, *comparison.cells[1:])})
        calls: list[dict[str, Any]] = []

        def compare(task: str, recipes: list[str], **options: Any) -> CompareResult:
            calls.append({"task": task, "recipes": recipes, **options})
            report = comparison_folder / "report.html"
            return CompareResult(comparison, comparison_folder, report, interrupted)

        monkeypatch.setattr(verb, "compare", compare)
        return calls

    return install


COMPARE = ("compare", "films", "--recipes", "full, ptuning-v2", "--seeds", "2")


def test_compare_ends_with_table_report_and_next_command(
    compared: Callable[..., Any], call: Call
) -> None:
    calls = compared()
    done = call(*COMPARE, "--set", "train.max_steps=2", "--model", "m")
    assert done.code == 0
    (given,) = calls
    assert (given["task"], given["recipes"], given["seeds"]) == ("films", ["full", "ptuning-v2"], 2)
    assert (given["model"], given["overrides"]) == ("m", ("train.max_steps=2",))
    assert given["root"] == Path("runs")
    assert given["command"].startswith("peftlab compare films --recipes 'full, ptuning-v2'")
    *table, report, next_line = done.out.splitlines()
    assert sum(line.startswith("ptuning-v2 ") for line in table) == 1
    assert report == "report: runs/films/comparisons/abc/report.html"
    # The recipe with the best test mean, and of its runs the best on validation: seed 1.
    assert next_line == (
        "next: peftlab export runs/films/ptuning-v2/ptuning-v2-i-s1 "
        "--to exports/movie-sentiment-ptuning-v2 --format adapter"
    )


def test_compare_as_json(compared: Callable[..., Any], call: Call) -> None:
    compared()
    done = call(*COMPARE, "--json")
    assert [cell["seed"] for cell in done.json["cells"]] == [0, 0, 1]
    assert done.json["report"] == "runs/films/comparisons/abc/report.html"
    assert "next: peftlab export" in done.err


@pytest.mark.parametrize("status", ["oom", "failed", "diverged"])
def test_a_failed_cell_is_exit_code_1(
    status: str, compared: Callable[..., Any], call: Call
) -> None:
    compared(status)
    assert call(*COMPARE).code == 1


def test_an_interrupted_comparison_shows_what_there_is(
    compared: Callable[..., Any], call: Call
) -> None:
    compared("interrupted", interrupted=True)
    done = call(*COMPARE)
    assert done.code == 130
    assert "ptuning-v2 " in done.out
    assert "finished runs are kept" in done.err


@pytest.mark.parametrize(("text", "seeds"), [("3", 3), ("0,7", [0, 7]), ("5,", [5])])
def test_seeds_are_a_number_or_a_list(
    text: str, seeds: Any, compared: Callable[..., Any], call: Call
) -> None:
    calls = compared()
    call("compare", "films", "-r", "full", "--seeds", text)
    assert calls[0]["seeds"] == seeds


def test_an_export_that_differs_is_exit_code_1(
    write: Write, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(run: str, to: Path, **options: Any) -> None:
        assert (run, to, options) == ("x", Path("out"), {"format": "adapter", "root": Path("mine")})
        raise ExportMismatchError("the export predicts something else.")

    monkeypatch.setattr(import_module("peftlab.exporting"), "export", export)
    done = call("export", "x", "--to", "out", "--format", "adapter", "--output-dir", "mine")
    assert done.code == 1
    assert done.errors == ["error: the export predicts something else."]


def test_a_completion_is_predicted_from_its_prompt(
    write: Write, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftlab.experiment.resolve import resolve
    from peftlab.experiment.store import write_experiment
    from peftlab.results.record import Record
    from peftlab.results.store import write_record

    folder = Path("runs/sft/lora/0123456789ab-s0")
    record = Record(
        identity="i", task="sft", recipe="lora", model="m", seed=0, status="ok", metric="x"
    )
    write_record(folder, record)
    write_experiment(folder, resolve("movie-sentiment-sft", "lora").experiment, "i")
    seen = []

    def predict(run: str, rows: list[dict[str, str]], *, root: Path) -> list[dict[str, str]]:
        seen.extend(rows)
        return [{"id": "0", "prediction": "fine"}]

    monkeypatch.setattr(import_module("peftlab.predicting"), "predict", predict)
    assert call("predict", "sft/lora", "--text", "hello").out == "fine\n"
    assert seen == [{"prompt": "hello"}]


def test_doctor(write: Write, call: Call) -> None:
    done = call("doctor", "--json")
    found = done.json
    assert done.code == (1 if found["problems"] else 0)
    assert found["devices"][0]["memory_bytes"] > 0
    assert found["versions"]["torch"]
    assert found["cached"]["bert-tiny"] in (True, False)
    assert "8-bit optimizers" in done.err


def test_doctor_says_what_is_missing(
    write: Write, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.metadata

    import bitsandbytes.optim

    real = importlib.metadata.version

    def version(package: str) -> str:
        if package == "gguf":
            raise importlib.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(import_module("peftlab.doctor"), "version", version)
    monkeypatch.delattr(bitsandbytes.optim, "AdamW8bit")
    monkeypatch.setenv("PEFTLAB_CACHE", "empty")
    done = call("doctor", "--json")
    assert done.code == 1
    assert {problem["where"] for problem in done.json["problems"]} >= {"gguf", "bitsandbytes"}
    assert done.json["eight_bit"] is False
    assert not any(done.json["cached"].values())
    assert "error: gguf: is not installed. pip install gguf" in done.errors
