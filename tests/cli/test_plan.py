"""peftlab plan: a task or a shape, whether it fits, and that a run is what was planned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from peftlab.models.quiet import quiet_transformers
from peftlab.results.record import Record
from peftlab.results.store import read_record
from tests.cli.conftest import Call, Write

TINY = ("--set", "train.per_device_train_batch_size=4", "--set", "train.max_length=16")
SHAPE = ("--task-kind", "classification", "--batch-size", "4", "--seq-len", "12")


@pytest.fixture
def whole(bert_tiny: str, tmp_path: Path) -> str:
    """BERT-Tiny with a pooler, which its checkpoint lacks: a plan knows the architecture alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path / "whole"
    with quiet_transformers():
        AutoModelForSequenceClassification.from_pretrained(bert_tiny).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bert_tiny).save_pretrained(folder)
    return str(folder)


def planned_run(call: Call, recipe: str, model: str) -> Record:
    run = ("--model", model, "--run-dir", f"run-{recipe}", "--quiet")
    done = call("train", "films", "--recipe", recipe, *TINY, *run)
    assert done.code == 0, done.err
    return read_record(Path(f"run-{recipe}"))


@pytest.mark.parametrize("recipe", ["full", "lora", "freeze-top1", "ptuning-v2", "full-8bit"])
def test_a_run_is_what_was_planned(recipe: str, project: Write, call: Call, whole: str) -> None:
    """Every part and every mark, to the byte, from the data's own lengths."""
    plan = call("plan", "films", "--recipe", recipe, *TINY, "--model", whole, "--json").json
    record = planned_run(call, recipe, whole)
    assert record.memory is not None
    assert record.memory.marks is not None
    assert record.plan is not None
    assert record.plan["memory"] == plan["memory"]
    measured = record.memory.model_dump()
    assert {part: measured[part] for part in plan["memory"]} == plan["memory"]
    assert record.memory.marks.model_dump() == plan["marks"]
    assert list(record.memory.measured_batch or ()) == plan["batch_shape"]
    assert record.speed.flops_per_step == plan["flops_per_step"]
    assert json.loads(Path(f"run-{recipe}/plan.json").read_text())["memory"] == plan["memory"]


def test_what_does_not_fit_and_what_would(project: Write, call: Call) -> None:
    request = ("plan", "films", "--recipe", "full", *TINY, "--json")
    whole = call(*request).json
    assert whole["fits"] is None
    limit = str(whole["needed_bytes"] - 1)
    refused = call(*request, "--memory", limit)
    assert refused.code == 1
    assert refused.json["fits"] is False
    assert "does not fit into" in refused.err
    assert refused.json["suggestions"]
    for suggestion in refused.json["suggestions"]:
        settings = [
            part
            for key, value in suggestion["overrides"].items()
            for part in ("--set", f"{key}={str(value).lower()}")
        ]
        again = call(*request, *settings, "--memory", limit)
        assert (again.code, again.json["fits"]) == (0, True)


def test_a_config_alone_is_enough(bert_tiny: str, tmp_path: Path, write: Write, call: Call) -> None:
    shutil.copy(Path(bert_tiny) / "config.json", tmp_path / "config.json")
    by_file = call("plan", "-r", "lora", "--model", "config.json", *SHAPE, "--json")
    by_name = call("plan", "-r", "lora", "--model", "bert-tiny", *SHAPE, "--json")
    assert by_file.code == 0, by_file.err
    assert by_file.json == by_name.json
    assert by_file.json["batch_shape"] == [4, 12]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_several_recipes(project: Write, call: Call) -> None:
    told = call("plan", "films", "--recipe", "full,freeze-top1", *TINY, "--json")
    plans = told.json["plans"]
    assert list(plans) == ["full", "freeze-top1"]
    peaks = [plan["memory"]["peak_bytes"] for plan in plans.values()]
    assert peaks[1] < peaks[0]
    assert call("plan", "films", "--recipe", "full,freeze-top1", *TINY).out.startswith("recipe ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--recipe", "lora"), "--model, --task-kind, --batch-size, --seq-len must be given"),
        (("films", "--recipe", "lora", "--task-kind", "classification"), "without a TASK"),
        (("films", "--recipe", "lroa"), "Did you mean 'lora'"),
        (("films", "--recipe", "lora", "--memory", "rtx409"), "Did you mean 'rtx4090'"),
        (("-r", "lora", "-m", "bert-tiny", "--task-kind", "clasification", *SHAPE[2:]), "classif"),
        (("-r", "lora", "-m", "no.json", *SHAPE), "there is no file 'no.json'"),
    ],
)  # fmt: skip
def test_wrong_requests(
    arguments: tuple[str, ...], expected: str, project: Write, call: Call
) -> None:
    done = call("plan", *arguments)
    assert done.code == 2
    assert len(done.errors) == 1
    assert expected in done.errors[0]
    assert "Traceback" not in done.err
