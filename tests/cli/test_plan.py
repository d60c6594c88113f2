"""peftlab plan: a task or a shape, whether it fits, and that a run is what was planned."""

from __future__ import annotations

import json
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


def test_a_config_alone_is_enough(whole: str, tmp_path: Path, write: Write, call: Call) -> None:
    write("config.json", (Path(whole) / "config.json").read_text())
    before = sorted(path.name for path in tmp_path.iterdir())
    by_file = call("plan", "-r", "lora", "--model", "config.json", *SHAPE, "--json")
    by_folder = call("plan", "-r", "lora", "--model", whole, *SHAPE, "--json")
    assert by_file.code == 0, by_file.err
    assert by_file.json == by_folder.json
    assert by_file.json["batch_shape"] == [4, 12]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_a_checkpoint_lacks_is_planned_as_it_trains(project: Write, call: Call) -> None:
    """BERT-Tiny's checkpoint has no pooler: it is drawn, and trains with the head."""
    record = planned_run(call, "lora", "bert-tiny")
    assert record.memory is not None
    assert record.plan is not None
    measured = record.memory.model_dump()
    planned = record.plan["memory"]
    assert {part: measured[part] for part in planned} == planned


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
        (("--recipe", "lora"), "--batch-size, --seq-len or --length-distribution must"),
        (("films", "--recipe", "lora", "--task-kind", "classification"), "without a TASK"),
        (("films", "--recipe", "lroa"), "Did you mean 'lora'"),
        (("films", "--recipe", "lora", "--memory", "rtx409"), "Did you mean 'rtx4090'"),
        (("-r", "lora", "-m", "bert-tiny", "--task-kind", "clasification", *SHAPE[2:]), "classif"),
        (("-r", "lora", "-m", "no.json", *SHAPE), "there is no file 'no.json'"),
        (
            ("films", "--recipe", "ptuning-v2", "--set", "train.max_length=512"),
            "512 positions, 20 of them taken by the method. Use --set train.max_length=492",
        ),
        (
            ("-r", "full", "-m", "bert-tiny", *SHAPE[:-1], "600"),
            "--seq-len: 600 tokens, but the model has 512 positions. Use --seq-len 512 or less.",
        ),
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


def test_several_sizes_are_planned_one_by_one(call: Call, write: Write) -> None:
    shape = ("plan", "-r", "full", "--model", "bert-tiny", "--task-kind", "classification")
    sweep = call(*shape, "--batch-size", "2,4", "--seq-len", "8,16", "--json")
    assert sweep.code == 0, sweep.err
    cells = sweep.json["sweep"]
    sizes = [(cell["batch_size"], cell["seq_len"]) for cell in cells]
    assert sizes == [(2, 8), (2, 16), (4, 8), (4, 16)]
    one = call(*shape, "--batch-size", "4", "--seq-len", "8", "--json").json
    assert cells[2]["memory"] == one["memory"]
    wrong = call(*shape, "--batch-size", "2,x", "--seq-len", "8")
    assert wrong.code == 2
    assert "--batch-size" in wrong.err


def test_a_distribution_has_a_longest_batch_and_an_average(call: Call, write: Write) -> None:
    shape = ("plan", "-r", "full", "--model", "bert-tiny", "--task-kind", "classification")
    lengths = ("--length-distribution", "8:0.75,16:0.25")
    drawn = call(*shape, "--batch-size", "4", *lengths, "--json").json
    longest = call(*shape, "--batch-size", "4", "--seq-len", "16", "--json").json
    assert drawn["memory"] == longest["memory"]
    assert (drawn["batch_shape"], longest["average"]) == ([4, 16], None)
    average = drawn["average"]
    assert average["steps_per_epoch"] == 500
    # 1,500 texts of 8 tokens and 500 of 16: 40 tokens a step; sorted, nearly none is padding.
    assert average["padded_tokens"] * (1 - average["padding_share"]) == pytest.approx(40)
    assert 40 <= average["padded_tokens"] < 41
    share = average["padded_tokens"] / 64
    assert average["flops"] == pytest.approx(longest["flops_per_step"] * share)
    for wrong in ("8", "8:x", "8:0.5", "0:1"):
        refused = call(*shape, "--batch-size", "4", "--length-distribution", wrong)
        assert refused.code == 2, wrong
        assert "--length-distribution" in refused.err


def test_gradients_exist_twice_in_data_parallel_training(project: Write, call: Call) -> None:
    request = ("plan", "films", "--recipe", "full", "--model", "bert-tiny", "--json")
    request += ("--device", "cpu")
    alone = call(*request, "--seq-len", "12").json
    shared = call(*request, "--seq-len", "12", "--num-processes", "2").json
    buckets = 4 * alone["params"]["trainable"]
    assert shared["num_processes"] == 2
    assert shared["marks"]["start_bytes"] == alone["marks"]["start_bytes"] + buckets
    assert shared["memory"]["peak_bytes"] == alone["memory"]["peak_bytes"] + buckets
    # Twice the rows make a step, in half as many steps.
    steps = [
        call(*request, "--num-processes", count).json["average"]["steps_per_epoch"]
        for count in ("1", "2")
    ]
    assert steps == [4, 2]


def test_shards_of_each_process(call: Call) -> None:
    shape = ("--task-kind", "classification", "--batch-size", "4", "--seq-len", "12")
    request = ("plan", "--recipe", "full", "--model", "bert-tiny", *shape, "--num-processes", "4")
    whole = call(*request, "--json").json
    shards = call(*request, "--sharding", "fsdp", "--json").json
    assert (whole["sharding"], whole["gathered_bytes"]) == ("none", 0)
    assert shards["sharding"] == "fsdp"
    assert shards["memory"]["optimizer_bytes"] < whole["memory"]["optimizer_bytes"] / 3
    said = call(*request, "--sharding", "fsdp")
    assert "each of 4 processes (FSDP shards)" in said.out + said.err
    refused = call(*request[:-1], "1", "--sharding", "fsdp")
    assert refused.code == 2
    assert "--num-processes" in refused.err
