"""A killed run goes on to the identical result; several processes train like one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from peftlab.results.store import read_record, read_steps

SETTINGS = (
    "train.max_steps=24",
    "train.save_strategy=steps",
    "train.save_steps=5",
    "train.eval_strategy=steps",
    "train.eval_steps=6",
)
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def command(
    task: Path, folder: Path, *more: str, settings: tuple[str, ...] = SETTINGS
) -> list[str]:
    options = [part for setting in settings for part in ("--set", setting)]
    run = ["train", str(task), "--recipe", "lora", "--run-dir", str(folder), "--quiet"]
    return ["-m", "peftlab", *run, *options, *more]


def run(arguments: list[str]) -> None:
    subprocess.run([sys.executable, *arguments], check=True, env=ENVIRONMENT, capture_output=True)


def test_killed_and_resumed_run_is_bitwise_the_same(task_file: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(command(task_file, whole))
    process = subprocess.Popen(
        [sys.executable, *command(task_file, killed)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not list(killed.glob("checkpoints/step-00000010")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "record.json").exists()
    run(command(task_file, killed, "--resume"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (killed / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()
    assert (killed / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    losses = [[step.get("loss") for step in read_steps(folder)] for folder in (whole, killed)]
    assert losses[0] == losses[1]
    assert read_record(killed).metrics == read_record(whole).metrics


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_like_one(
    task_file: Path, no_dropout: Path, tmp_path: Path, accumulation: int
) -> None:
    base = (
        f"model.model_name_or_path={no_dropout}",
        "train.max_steps=20",
        "train.eval_strategy=no",
    )
    one, two = tmp_path / "one", tmp_path / "two"
    size = 8 // accumulation
    micro = f"train.gradient_accumulation_steps={accumulation}"
    single = (*base, micro, f"train.per_device_train_batch_size={size}")
    run(command(task_file, one, settings=single))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    # A tracker lives in one process alone, and its end must not be the end of the others.
    tracked = "train.report_to=[tensorboard]"
    shared = (*base, micro, tracked, f"train.per_device_train_batch_size={size // 2}")
    run([*launch, *command(task_file, two, settings=shared)])
    losses = [torch.tensor([step["loss"] for step in read_steps(folder)]) for folder in (one, two)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)
    assert len(losses[0]) == 20
    assert read_record(two).environment.num_processes == 2  # type: ignore[union-attr]
    predictions = [(folder / "predictions.jsonl").read_text().count("\n") for folder in (one, two)]
    assert predictions == [24, 24]
