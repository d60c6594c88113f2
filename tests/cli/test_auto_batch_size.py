"""--auto-batch-size: the micro-batch that fits, at an unchanged effective batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftlab.results.store import read_record
from tests.cli.conftest import Call, Write

MODEL = ("--model", "bert-tiny")


@pytest.fixture
def limits(project: Write, call: Call) -> tuple[int, int]:
    """What the whole micro-batch needs, and what one example needs."""
    request = ("plan", "films", "--recipe", "small-lora", *MODEL, "--json")
    whole = call(*request).json["needed_bytes"]
    one = ("--set", "train.per_device_train_batch_size=1")
    accumulated = ("--set", "train.gradient_accumulation_steps=8")
    return whole, call(*request, *one, *accumulated).json["needed_bytes"]


def test_a_run_fits_and_learns_the_same(
    limits: tuple[int, int], project: Write, call: Call
) -> None:
    whole, one = limits
    if whole == one:
        pytest.skip("CUDA reserves the same for one tiny example and for eight")
    records = []
    for name, memory in (("whole", whole), ("less", whole - 1)):
        settings = ("--auto-batch-size", "--memory", str(memory), "--run-dir", name, "--quiet")
        done = call("train", "films", "--recipe", "small-lora", *MODEL, *settings)
        assert done.code == 0, done.err
        records.append(read_record(Path(name)))
    assert records[0].steps_done == records[1].steps_done
    assert records[1].final_train_loss == pytest.approx(records[0].final_train_loss, rel=0.2)
    sizes = [json.loads(Path(name, "plan.json").read_text()) for name in ("whole", "less")]
    assert sizes[0]["gradient_accumulation_steps"] == 1
    assert sizes[1]["gradient_accumulation_steps"] > 1
    assert one <= sizes[1]["needed_bytes"] < whole


def test_nothing_fits(limits: tuple[int, int], project: Write, call: Call) -> None:
    memory = ("--auto-batch-size", "--memory", str(limits[1] - 1))
    for verb in (("train", "--recipe"), ("compare", "--recipes")):
        refused = call(verb[0], "films", verb[1], "small-lora", *MODEL, *memory)
        assert refused.code == 2
        assert "not even one example fits" in refused.err
    assert not Path("runs").exists()


def test_memory_alone_is_refused(project: Write, call: Call) -> None:
    refused = call("train", "films", "--recipe", "small-lora", *MODEL, "--memory", "1GiB")
    assert refused.code == 2
    assert "--auto-batch-size" in refused.err
