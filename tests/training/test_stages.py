"""Training in stages: blocks that join later, by the loop and in a record."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peftlab.errors import IncompatibleError
from peftlab.methods.freeze import Freeze, FreezeConfig
from peftlab.results.store import read_steps
from peftlab.training.loop import Loop
from peftlab.training.schedule import Schedule
from peftlab.training.stages import Stage, stage_notes, stages_of, train_flops
from tests.training.test_loop import EVERY_STEP, Assembled, Diary, Loops, kept, same, script_scores
from tests.training.test_record import run

RECIPE = "unfreeze-top4"
STAGED = ("method.top=2", "method.unfreeze_ratio=0.5")
BLOCK = "bert.encoder.layer.{}."


def moved(weights: dict[int, dict[str, Tensor]], first: int, last: int, part: str) -> bool:
    names = [name for name in weights[first] if name.startswith(part)]
    assert names
    return any(not torch.equal(weights[first][name], weights[last][name]) for name in names)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_blocks_join_from_the_top(optim: str, assembled: Assembled, loop_of: Loops) -> None:
    settings = (*STAGED, *EVERY_STEP, "train.max_steps=8", f"optim.optim={optim}")
    loop, _ = loop_of(assembled(RECIPE, *settings), diary := Diary())
    diary.loop = loop
    assert loop.stages == [Stage(0, 0, 2), Stage(1, 2, 4), Stage(2, 4, 8)]
    diary.weights[0] = loop.state.trained()
    heard: list[int] = []
    loop.fit(on_stage=heard.append)
    assert heard == [0, 1, 2]
    for part, joins in ((BLOCK.format(1), 2), (BLOCK.format(0), 4), ("classifier.", 0)):
        assert not moved(diary.weights, 0, joins, part)
        assert moved(diary.weights, joins, joins + 1, part)
    # The state of what joined late is as young as that.
    ages = {
        name: float(loop.optimizer.state[parameter]["step"])
        for name, parameter in loop.model.named_parameters()
        if parameter.requires_grad
    }
    for name, age in ages.items():
        joins = 4 if name.startswith(BLOCK.format(0)) else 2 * name.startswith(BLOCK.format(1))
        assert age == 8 - joins, name


def test_what_waits_stays_in_eval_mode(
    assembled: Assembled, loop_of: Loops, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*STAGED, *EVERY_STEP, "train.max_steps=8")
    loop, _ = loop_of(assembled(RECIPE, *settings, dropout=True))
    modes: list[tuple[bool, ...]] = []
    true_loss = loop.job.kind.loss

    def loss(model: Any, batch: Any) -> Tensor:
        names = ("embeddings", "encoder.layer.0", "encoder.layer.1", "pooler")
        modes.append(tuple(model.get_submodule(f"bert.{name}").training for name in names))
        return true_loss(model, batch)

    monkeypatch.setattr(loop.job.kind, "loss", loss)
    loop.fit()
    assert modes == (
        [(False, False, False, True)] * 2
        + [(False, False, True, True)] * 2
        + [(False, True, True, True)] * 4
    )


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_resumed_in_any_stage(stop: int, assembled: Assembled, loop_of: Loops) -> None:
    settings = (*STAGED, "train.max_steps=8", "train.save_strategy=steps", "train.save_steps=1")
    settings += ("train.save_total_limit=9",)
    whole, heard = loop_of(assembled(RECIPE, *settings))
    whole.fit()
    weights = kept(whole)
    checkpoints = whole.job.checkpoints
    for folder in sorted(checkpoints.iterdir())[stop:]:
        folder.rename(checkpoints.parent / folder.name)
    resumed, rest = loop_of(assembled(RECIPE, *settings))
    resumed.fit(resume=True)
    assert rest.losses == heard.losses[stop:]
    assert same(kept(resumed), weights)


def test_only_the_last_stage_stops_early(
    assembled: Assembled, loop_of: Loops, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*STAGED, *EVERY_STEP, "train.max_steps=8", "train.early_stopping_patience=2")
    loop, _ = loop_of(assembled(RECIPE, *settings), diary := Diary())
    diary.loop = loop
    script_scores(loop, monkeypatch, [0.9, 0.1, 0.1, 0.1, 0.2, 0.3, 0.4, 0.5])
    result = loop.fit()
    # Four scores below the first do not end the stages, and do not count in the last.
    assert result.progress.step == 6
    assert result.progress.best_step == 1
    assert same(kept(loop), diary.weights[1])


def test_too_few_steps_for_every_stage(assembled: Assembled, loop_of: Loops) -> None:
    loop, _ = loop_of(assembled(RECIPE, *STAGED, *EVERY_STEP, "train.max_steps=2"))
    assert loop.stages == [Stage(1, 0, 1), Stage(2, 1, 2)]
    loop.fit()
    assert loop.progress.step == 2


def test_one_process_only() -> None:
    method = Freeze(FreezeConfig(top=2, unfreeze_ratio=0.5))
    assert len(stages_of(method, 100)) == 3
    with pytest.raises(IncompatibleError, match="trains in stages, which 2 processes cannot"):
        stages_of(method, 100, num_processes=2)
    assert stages_of(Freeze(FreezeConfig(top=2)), 100, num_processes=2) == [Stage(0, 0, 100)]


def test_measured_in_every_stage(assembled: Assembled, loop_of: Loops) -> None:
    settings = (*STAGED, "train.max_steps=20", "train.eval_strategy=no")
    loop, heard = loop_of(assembled(RECIPE, *settings))
    result = loop.fit()
    assert loop.stages == [Stage(0, 0, 5), Stage(1, 5, 10), Stage(2, 10, 20)]
    assert len(loop.measured) == 3
    assert result.measured == loop.measured[-1]
    padded = [event.padded_tokens for event in heard.events]
    total, peaks = 0.0, []
    for stage, measured in zip(loop.stages, loop.measured, strict=True):
        # The first step of a stage is not: what joined has no state yet.
        largest = max(padded[stage.start + 1 : stage.end])
        assert measured.padded_tokens == largest == padded[measured.step - 1]
        assert stage.start + 1 < measured.step <= stage.end
        flops = measured.measurement.flops
        total += flops / largest * sum(padded[stage.start : stage.end])
        peaks.append(measured.measurement.breakdown.optimizer_bytes)
    assert peaks[0] < peaks[1] < peaks[2]

    def flops_of(loop: Loop, steps: int) -> float | None:
        tokens = sum(padded[:steps])
        return train_flops(loop.measured, loop.stages, loop.schedule, steps, tokens)

    assert flops_of(loop, 20) == pytest.approx(total)
    first = loop.measured[0]
    assert flops_of(loop, 3) == pytest.approx(
        first.measurement.flops / first.padded_tokens * sum(padded[:3])
    )
    # A run that was resumed knows nothing of the stages before.
    loop.measured = loop.measured[1:]
    assert flops_of(loop, 20) is None


def test_the_rows_of_a_stage() -> None:
    from peftlab.training.config import TrainConfig

    config = TrainConfig(per_device_train_batch_size=4, num_train_epochs=3)
    schedule = Schedule([5] * 20, config, seed=0)
    assert sorted(schedule.trained_rows((0, 15))) == list(range(20))
    assert sorted(schedule.trained_rows((3, 15))) == list(range(20))
    rows = [row for step in (6, 7) for row in schedule.rows_of(step)]
    assert schedule.trained_rows((6, 8)) == rows
    # Across the end of an epoch a row may come twice.
    both = [row for step in range(3, 9) for row in schedule.rows_of(step)]
    assert sorted(schedule.trained_rows((3, 9))) == sorted(set(both))
    assert len(both) == 24


def test_notes() -> None:
    assert stage_notes([Stage(0, 0, 9)]) == ()
    (note,) = stage_notes([Stage(0, 0, 3), Stage(1, 3, 9)])
    assert note.startswith("trains in stages: more with steps 4;")


@pytest.fixture
def task(task_file: Path) -> Path:
    return task_file


def test_the_record(task: Path) -> None:
    settings = (*STAGED, "optim.warmup_steps=0", "train.max_steps=8")
    record = run(task, task.parent / "staged", RECIPE, *settings).record
    assert record.status == "ok"
    assert record.memory is not None
    assert record.plan is not None
    for part, value in record.plan["memory"].items():
        if part.endswith("_bytes"):
            assert getattr(record.memory, part) == value, part
    assert record.plan["flops_per_step"] == record.speed.flops_per_step
    (note,) = [note for note in record.notes if "stages" in note]
    assert "with steps 3, 5;" in note
    assert note in record.plan["notes"]
    assert record.speed.flops_source.startswith("counted in step 2 and 4 and ")
    assert record.memory.measured_step is not None
    assert record.memory.measured_step > 5
    steps = [step for step in read_steps(task.parent / "staged") if "loss" in step]
    upper = record.speed.flops_per_step or math.nan
    measured = steps[record.memory.measured_step - 1]["padded_tokens"]
    padded = sum(step["padded_tokens"] for step in steps)
    assert record.speed.train_flops is not None
    assert record.speed.train_flops < upper / measured * padded
    plain = run(task, task.parent / "plain", "freeze-top2", *settings[2:]).record
    assert (record.params, record.saved_bytes) == (plain.params, plain.saved_bytes)


def test_what_the_record_says_of_stages_without_a_trunk(task: Path) -> None:
    settings = (*STAGED, "optim.warmup_steps=0", "train.max_steps=8")
    cache = run(task, task.parent / "staged", RECIPE, *settings).record.trunk_cache
    # In the last stage all blocks train; the lowest that is kept is the stage's before.
    assert cache.note == "stage 3: no block is frozen below what trains"
    assert cache.boundary == "block 1 of 2"
