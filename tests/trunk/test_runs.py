"""Whole runs with and without the cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from peftlab.assemble import assemble
from peftlab.errors import ConfigError
from peftlab.experiment.resolve import resolve
from peftlab.planning.verb import plan
from peftlab.results.store import read_predictions, read_record, read_steps
from peftlab.run import Request, Run, train
from peftlab.run_trunk import RunTrunk
from peftlab.sharing import Shared
from peftlab.trunk.store import find
from tests.training.conftest import loop_of, no_dropout, sft_task, task_file  # noqa: F401

RECIPE = """
summary: LoRA in the topmost block
method: {kind: lora, r: 4, lora_dropout: 0.1, layers_to_transform: [-1]}
optim: {optim: sgd, learning_rate: 0.5}
"""
SGD = ("optim.optim=sgd", "optim.learning_rate=0.5")
"""Adam would make full steps of gradients that are rounding, like the first of a LoRA's A."""
SETTINGS = ("train.max_steps=6", "optim.warmup_steps=0")


def run(task: Path, recipe: str, name: str, *settings: str, **request: Any) -> Run:
    return train(
        str(task),
        recipe,
        overrides=(*SETTINGS, *settings),
        request=Request(folder=task.parent / name, progress=False, **request),
    )


def assert_same(one: Run, other: Run) -> None:
    """Losses, validation, predictions and what was trained."""
    for step, again in zip(read_steps(one.folder), read_steps(other.folder), strict=True):
        assert_close(again.get("loss"), step.get("loss"), rtol=1e-6, atol=1e-6)
    for left, right in zip(
        read_predictions(one.folder), read_predictions(other.folder), strict=True
    ):
        for key in ("logits", "nll"):
            if key in left:
                assert_close(left[key], right[key], rtol=1e-5, atol=1e-5)
        assert left["prediction"] == right["prediction"]
    left, right = (
        load_file(each.folder / "adapter" / "adapter_model.safetensors") for each in (one, other)
    )
    for name, tensor in left.items():
        # A row's activations depend in the last bit on what else is in its batch. The softmax
        # cancels key biases, so their gradients are nothing but rounding.
        if not name.endswith("key.bias"):
            assert (tensor - right[name]).norm() <= 1e-6 + 1e-6 * tensor.norm(), name


@pytest.mark.parametrize(
    ("task", "recipe"),
    [
        ("task_file", "head-only"),
        ("task_file", "freeze-top1"),
        ("task_file", "upper-lora"),
        ("sft_task", "freeze-top1"),
        ("sft_task", "upper-lora"),
    ],
)
def test_the_whole_trajectory(recipe: str, task: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(task)
    if recipe == "upper-lora":
        recipe = str(path.parent / "upper-lora.yaml")
        Path(recipe).write_text(RECIPE)
    own = SGD if recipe == "head-only" else ()
    plain = run(path, recipe, "plain", "train.trunk_cache=off", *own)
    cached = run(path, recipe, "cached", *own)
    assert_same(plain, cached)
    off, on = plain.record.trunk_cache, cached.record.trunk_cache
    assert off.note == "switched off"
    assert (off.replayed_rows, off.rows, off.boundary) == (0, 0, "")
    assert on.note == ""
    assert on.computed_rows == on.rows > 0
    assert on.replayed_rows > 0
    (entry,) = find()
    assert (on.key, on.boundary) == (entry.key, entry.description["boundary"])
    assert 0 < on.stored_bytes < entry.stored_bytes


def test_what_the_record_says_of_time_and_arithmetic(task_file: Path) -> None:  # noqa: F811
    plain = run(task_file, "freeze-top1", "plain", "train.trunk_cache=off").record
    cached = run(task_file, "freeze-top1", "cached").record
    assert plain.speed.flops_per_step is not None
    assert cached.speed.flops_per_step is not None
    assert cached.speed.flops_per_step < plain.speed.flops_per_step
    assert cached.plan is not None
    assert cached.plan["flops_per_step"] == cached.speed.flops_per_step
    assert cached.speed.train_flops is not None
    steps = read_steps(task_file.parent / "cached")
    scale = sum(step["padded_tokens"] for step in steps if "loss" in step)
    assert cached.memory is not None
    assert cached.memory.measured_step is not None
    measured = [step for step in steps if "loss" in step][cached.memory.measured_step - 1]
    replayed = cached.speed.flops_per_step * scale / measured["padded_tokens"]
    assert cached.speed.train_flops > replayed
    assert "the frozen trunk's once" in cached.speed.flops_source
    assert cached.speed.train_seconds is not None
    seconds = sum(step["seconds"] for step in steps if "loss" in step)
    assert cached.trunk_cache.fill_seconds > 0
    assert cached.speed.train_seconds == pytest.approx(
        seconds + cached.trunk_cache.fill_seconds, abs=1e-3
    )


def test_a_new_head_shares_the_trunk(task_file: Path) -> None:  # noqa: F811
    first, second = (
        train(
            str(task_file),
            "freeze-top1",
            seed=seed,
            overrides=(*SETTINGS, "train.max_steps=20", f"optim.learning_rate={rate}"),
            request=Request(root=task_file.parent / "runs", progress=False),
        ).record.trunk_cache
        for seed, rate in ((0, 1e-3), (1, 1e-4))
    )
    assert first.key == second.key
    assert first.computed_rows == first.rows == second.rows > second.computed_rows == 0
    assert second.replayed_rows == first.replayed_rows


def test_the_cache_is_no_part_of_what_an_experiment_is(task_file: Path) -> None:  # noqa: F811
    def identity(*settings: str) -> str:
        return resolve(str(task_file), "head-only", overrides=settings).experiment.identity("")

    assert identity() == identity("train.trunk_cache=off") == identity("train.trunk_cache=1GiB")
    # Rounding changes what is learned.
    assert identity() != identity("train.trunk_cache_dtype=float16")


def test_a_size_that_is_none(task_file: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=r"trunk_cache: must be auto, off or a size: 'lots'"):
        resolve(str(task_file), "head-only", overrides=("train.trunk_cache=lots",))


def test_resumed_from_a_checkpoint(task_file: Path) -> None:  # noqa: F811
    saves = ("train.save_strategy=steps", "train.save_steps=5", "train.save_total_limit=2")
    whole = run(task_file, "freeze-top1", "whole", *saves)
    copy = task_file.parent / "resumed"
    shutil.copytree(whole.folder, copy)
    last, _ = sorted((copy / "checkpoints").iterdir(), reverse=True)
    shutil.rmtree(last)
    (copy / "record.json").unlink()
    resumed = run(task_file, "freeze-top1", "resumed", *saves, resume=True)
    assert_same(whole, resumed)
    assert resumed.record.trunk_cache.computed_rows == 0


def test_two_processes_share_a_trunk(task_file: Path, no_dropout: Path) -> None:  # noqa: F811
    base = (f"model.model_name_or_path={no_dropout}", "train.eval_strategy=no")
    one = run(task_file, "freeze-top1", "one", *base, "train.trunk_cache=off")
    options = [*SETTINGS, *base, "train.per_device_train_batch_size=4"]
    words = ["train", str(task_file), "--recipe", "freeze-top1", "--quiet"]
    words += ["--run-dir", str(task_file.parent / "two")]
    words += [word for option in options for word in ("--set", option)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [sys.executable, *launch, "-m", "peftlab", *words],
        check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
    )
    losses = [
        torch.tensor([step["loss"] for step in read_steps(folder) if "loss" in step])
        for folder in (one.folder, task_file.parent / "two")
    ]
    assert_close(*losses, rtol=0, atol=1e-5)
    record = read_record(task_file.parent / "two")
    assert record.environment is not None
    assert record.environment.num_processes == 2
    # It filled its half of the training rows, and found the other's.
    assert 0 < record.trunk_cache.computed_rows < record.trunk_cache.rows


def test_a_plan_knows_whether_the_trunk_will_be_kept(task_file: Path) -> None:  # noqa: F811
    def flops(setting: str) -> int:
        return plan(
            str(task_file), "freeze-top1", overrides=(f"train.trunk_cache={setting}",)
        ).flops_per_step

    assert flops("auto") < flops("off") == flops("1KiB")


STAGES = ("method.top=1", "method.unfreeze_ratio=0.5")


def test_each_stage_replays_its_own_trunk(task_file: Path) -> None:  # noqa: F811
    # Two epochs in each stage, so that both take all rows.
    settings = (*STAGES, "train.max_steps=80", "train.eval_strategy=epoch")
    plain = run(task_file, "unfreeze-top4", "plain", *settings, "train.trunk_cache=off")
    cached = run(task_file, "unfreeze-top4", "cached", *settings)
    assert_same(plain, cached)
    off, on = plain.record.trunk_cache, cached.record.trunk_cache
    assert (off.note, off.stored_bytes) == ("switched off", 0)
    assert (on.note, on.filled_from) == ("", "")
    entries = {entry.description["boundary"]: entry for entry in find()}
    assert entries.keys() == {"block 1 of 2", "block 2 of 2"}
    assert (on.key, on.boundary) == (entries["block 1 of 2"].key, "block 1 of 2")
    # Training and validation rows in both stages, test rows in the last.
    assert on.computed_rows == 2 * (160 + 24) + 24
    assert on.rows == 160 + 24 + 24
    # And each again: 80 steps of 8 rows, four evaluations and the test.
    # A trunk is verified with two rows.
    assert on.replayed_rows == 80 * 8 + 4 * 24 + 24 + 2 * 2
    again = run(task_file, "unfreeze-top4", "again", *settings)
    assert_same(cached, again)
    found = again.record.trunk_cache
    assert (on.found_rows, found.found_rows, found.computed_rows) == (0, 2 * 160, 0)


def test_two_stages_with_one_trunk(sft_task: Path) -> None:  # noqa: F811
    """A language model's head does not train: the first stage trains what the second does."""
    settings = (*STAGES, "train.max_steps=8")
    plain = run(sft_task, "unfreeze-top4", "plain", *settings, "train.trunk_cache=off")
    cached = run(sft_task, "unfreeze-top4", "cached", *settings)
    assert_same(plain, cached)
    kept = cached.record.trunk_cache
    assert (kept.note, kept.found_rows) == ("", 0)
    assert kept.computed_rows == kept.rows > 0
    assert len(find()) == 1


def test_a_stage_starts_from_the_trunk_below(
    task_file: Path,  # noqa: F811
    loop_of: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    filled = {}
    for recipe, staged in (("freeze-top1", ()), ("unfreeze-top4", STAGES)):
        monkeypatch.setenv("PEFTLAB_TRUNK_CACHE", str(task_file.parent / recipe))
        overrides = (*SETTINGS, *staged, "train.max_steps=80")
        experiment = resolve(str(task_file), recipe, overrides=overrides).experiment
        kind = experiment.build_kind()
        assembly = assemble(experiment, kind, kind.read())
        loop, _ = loop_of(assembly)
        with RunTrunk(assembly, loop, Shared()) as trunk:
            trunk.fill()
            filled[recipe] = trunk.fill_flops
    # The last stage's, and of the first's the upper block alone, of which one token is read.
    assert filled["freeze-top1"] < filled["unfreeze-top4"] < 1.1 * filled["freeze-top1"]
