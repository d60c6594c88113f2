"""Checkpoints come back exactly, and a damaged one is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftlab.assemble import Assembly
from peftlab.errors import RunFolderError
from peftlab.optim.table import OPTIMIZERS
from peftlab.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer_state,
    optimizer_state,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from tests.optim.conftest import make_optimizer
from tests.training.conftest import Losses


def large_model() -> nn.Linear:
    """One tensor above the 4,096 elements from which bitsandbytes quantises, one below."""
    torch.manual_seed(0)
    return nn.Linear(64, 128)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 64)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def saved(folder: Path, number: int = 1, keep: int = 1, **changed: Any) -> Path:
    values: dict[str, Any] = {
        "trainable": {"w": torch.ones(2)},
        "optimizer_tensors": {},
        "optimizer_scalars": {},
        "best": {},
        "cursor": {"step": number},
        "rng": (rng_state(),),
    }
    save_checkpoint(folder, number, Checkpoint(**(values | changed)), keep)
    return folder / f"step-{number:08d}"


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_optimizer_goes_on_as_if_never_saved(name: str, tmp_path: Path) -> None:
    model = large_model()
    optimizer = make_optimizer(name, model)
    for _ in range(3):
        step(model, optimizer)
    tensors, scalars = optimizer_state(model, optimizer)
    path = saved(tmp_path, optimizer_tensors=tensors, optimizer_scalars=scalars)

    copy = large_model()
    copy.load_state_dict(model.state_dict())
    restored = make_optimizer(name, copy)
    there = load_checkpoint(path)
    load_optimizer_state(copy, restored, there.optimizer_tensors, there.optimizer_scalars)
    for parameter, its_copy in zip(model.parameters(), copy.parameters(), strict=True):
        state, its_state = optimizer.state[parameter], restored.state[its_copy]
        assert state.keys() == its_state.keys()
        for key, value in state.items():
            assert type(value) is type(its_state[key])
            if isinstance(value, torch.Tensor):
                assert (value.dtype, value.shape) == (its_state[key].dtype, its_state[key].shape)
    for _ in range(3):
        step(model, optimizer)
        step(copy, restored)
    for parameter, its_copy in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(parameter, its_copy)


def test_eight_bit_state_stays_eight_bit(tmp_path: Path) -> None:
    model = large_model()
    optimizer = make_optimizer("adamw_8bit", model)
    step(model, optimizer)
    tensors, scalars = optimizer_state(model, optimizer)
    there = load_checkpoint(saved(tmp_path, optimizer_tensors=tensors, optimizer_scalars=scalars))
    assert there.optimizer_tensors["weight::state1"].dtype is torch.uint8
    assert there.optimizer_tensors["bias::state1"].dtype is torch.float32
    assert there.optimizer_scalars == {"weight::step": 1, "bias::step": 1}


def test_everything_else_comes_back(tmp_path: Path) -> None:
    best = {"w": torch.tensor([1.0, math.nan])}
    cursor = {"best_metric": -math.inf, "curve": [{"step": 1, "metric": None}]}
    there = load_checkpoint(saved(tmp_path, best=best, cursor=cursor))
    assert torch.equal(there.trainable["w"], torch.ones(2))
    assert torch.equal(there.best["w"], best["w"]) or torch.isnan(there.best["w"][1])
    assert there.cursor == cursor
    assert load_checkpoint(saved(tmp_path, 2)).best == {}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    for number in (1, 2, 3, 10):
        path = saved(tmp_path, number, keep=2)
        assert latest_checkpoint(tmp_path) == path
    assert [each.name for each in sorted(tmp_path.iterdir())] == ["step-00000003", "step-00000010"]


@pytest.mark.parametrize(
    "name", ["trainable.safetensors", "optimizer.safetensors", "best.safetensors", "state.json"]
)
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, best={"w": torch.ones(2)})
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(RunFolderError, match=f"is damaged: {name} differs") as raised:
        load_checkpoint(path)
    assert str(path) in str(raised.value)
    assert "Remove it" in str(raised.value)


@pytest.mark.parametrize("name", ["trainable.safetensors", "checksums.json"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / name).unlink()
    with pytest.raises(RunFolderError, match=f"cannot be read.*{name}"):
        load_checkpoint(path)


def test_rng_round_trip() -> None:
    state = rng_state()
    drawn = torch.rand(5)
    torch.rand(7)
    set_rng_state(state)
    assert torch.equal(torch.rand(5), drawn)


SAVING = ("train.max_steps=8", "train.save_strategy=steps", "train.save_steps=3")
Loops = Callable[..., tuple[Any, Losses]]


def test_resuming_goes_on_from_the_newest(
    assembled: Callable[..., Assembly], loop_of: Loops, tmp_path: Path
) -> None:
    settings = (*SAVING, "train.save_total_limit=5", "optim.optim=adamw_8bit")
    whole, heard = loop_of(assembled("full", *settings))
    whole.fit()
    names = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["step-00000003", "step-00000006", "step-00000008"]
    expected = whole.job.method.training_state(whole.model)
    (tmp_path / "checkpoints" / "step-00000008").rename(tmp_path / "last")

    resumed, heard_later = loop_of(assembled("full", *settings))
    resumed.fit(resume=True)
    assert [event.step for event in heard_later.events] == [7, 8]
    assert heard_later.losses == heard.losses[6:]
    for name, tensor in resumed.job.method.training_state(resumed.model).items():
        assert torch.equal(tensor, expected[name]), name
    assert resumed.progress.curve == whole.progress.curve


def test_without_resume_it_starts_anew(assembled: Callable[..., Assembly], loop_of: Loops) -> None:
    loop_of(assembled("lora", *SAVING))[0].fit()
    again, heard = loop_of(assembled("lora", *SAVING))
    again.fit()
    assert [event.step for event in heard.events] == list(range(1, 9))


def test_another_number_of_processes_is_refused(
    assembled: Callable[..., Assembly], loop_of: Loops
) -> None:
    loop, _ = loop_of(assembled("lora", *SAVING))
    captured = loop.state.capture([rng_state(), rng_state()])
    with pytest.raises(RunFolderError, match="saved by 2 processes, this is a run of 1"):
        loop.state.restore(captured, 0, 1)
