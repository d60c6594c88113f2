"""Whole runs: what their records say, when they run again, and how they fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftlab import execute
from peftlab.assemble import Assembly
from peftlab.errors import RunError
from peftlab.predicting import predict
from peftlab.results.record import Record
from peftlab.results.store import read_predictions, read_record, read_steps
from peftlab.run import Request, Run, train
from peftlab.tasks.classification import Classification
from peftlab.training import loop, utilisation
from tests.training.conftest import write_task

on_the_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="of the CPU's allocator, which rounds no size"
)

SETTINGS = ("train.max_steps=6", "optim.warmup_steps=0")
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "temporary")


def run(task: Path, folder: Path, recipe: str, *settings: str, **request: Any) -> Run:
    return train(
        str(task),
        recipe,
        overrides=(*SETTINGS, *settings),
        request=Request(folder=folder, progress=False, **request),
    )


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, bert_tiny: str) -> Path:
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def lora(task: Path) -> Run:
    """One finished run."""
    return run(task, task.parent / "lora", "lora", command="peftlab train toy")


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def unknown_fields(value: Any, prefix: str = "") -> set[str]:
    """The dotted names of everything that is None."""
    if isinstance(value, dict):
        inner = (unknown_fields(item, f"{prefix}.{key}") for key, item in value.items())
        return set().union(*inner)
    return {prefix.lstrip(".")} if value is None else set()


def test_the_record_says_all_that_can_be_known(lora: Run) -> None:
    record = lora.record
    # Not of this run: it did not fail; a CPU reserves nothing; nothing was compiled.
    allowed = {"error", "memory.reserved_bytes", "speed.compile_seconds"}
    allowed |= {"environment.git_commit", "environment.git_dirty"}
    assert unknown_fields(record.model_dump()) <= allowed
    assert record.status == "ok"
    assert record.command == "peftlab train toy"
    assert (record.steps_done, record.train_rows, record.test_rows) == (6, 160, 24)
    assert record.labels == ("no", "yes")
    assert record.majority_baseline is not None
    assert 0 < record.majority_baseline < 1
    assert record.metrics.keys() == record.validation_metrics.keys()
    assert record.metric in record.metrics
    (point,) = (point for point in record.curve if point.metric is not None)
    losses = [point.train_loss for point in record.curve if point.metric is None]
    assert losses == [step["loss"] for step in read_steps(lora.folder) if "loss" in step]
    assert (point.step, point.metric) == (6, record.validation_metrics[record.metric])
    assert record.final_train_loss == read_steps(lora.folder)[5]["loss"]
    assert read_record(lora.folder) == record


def test_speed(lora: Run) -> None:
    speed = lora.record.speed
    for value in (speed.train_seconds, speed.eval_seconds, speed.load_seconds):
        assert value is not None
        assert value > 0
    assert speed.tokens_per_second is not None
    assert speed.tokens_per_second > 0
    steps = [step for step in read_steps(lora.folder) if "loss" in step]
    seconds = sum(step["seconds"] for step in steps[1:])
    tokens = sum(step["tokens"] for step in steps[1:])
    assert speed.tokens_per_second == pytest.approx(tokens / seconds)
    padded = sum(step["padded_tokens"] for step in steps)
    assert speed.padding_share == pytest.approx(1 - sum(s["tokens"] for s in steps) / padded)
    memory = lora.record.memory
    assert memory is not None
    assert memory.measured_step is not None
    measured = steps[memory.measured_step - 1]["padded_tokens"]
    assert speed.flops_per_step is not None
    assert speed.train_flops == pytest.approx(speed.flops_per_step * padded / measured)


@on_the_cpu
def test_the_peak_is_the_better_of_before_and_after(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = iter([1e9, 3e9])
    monkeypatch.setattr(utilisation, "_best", {})
    monkeypatch.setattr(utilisation, "_measure", lambda *_: next(readings))
    speed = run(task, tmp_path / "run", "head-only").record.speed
    assert speed.matmul_flops_per_second == 3e9
    assert speed.train_flops is not None
    assert speed.train_seconds is not None
    share = speed.train_flops / (speed.train_seconds * 3e9)
    assert speed.model_flops_utilisation == pytest.approx(share)


def test_memory_parts_sum_to_the_peak(lora: Run) -> None:
    memory = lora.record.memory
    assert memory is not None
    assert sum(getattr(memory, f"{part}_bytes") for part in PARTS) == memory.peak_bytes
    marks = memory.marks
    assert marks is not None
    assert memory.peak_bytes == max(
        marks.forward_peak_bytes, marks.backward_peak_bytes, marks.optimizer_peak_bytes
    )
    assert memory.process_peak_bytes is not None
    assert memory.peak_bytes is not None
    assert memory.process_peak_bytes > memory.peak_bytes


def test_parameters_as_peft_prints_them(
    lora: Run,
    assembled: Callable[..., Assembly],
    task: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model: Any = assembled("lora", task=task).model
    model.print_trainable_parameters()
    params = lora.record.params
    assert params is not None
    assert capsys.readouterr().out == params.peft_line + "\n"
    assert params.trainable == params.adapter + params.head + params.base_trainable
    assert min(params.adapter, params.head) > params.base_trainable == 0


def test_saved_bytes_are_the_folders(lora: Run) -> None:
    files = list((lora.folder / "adapter").iterdir())
    assert {file.name for file in files} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert lora.record.saved_bytes == sum(file.stat().st_size for file in files)


@on_the_cpu
@pytest.mark.parametrize("plentiful", [True, False])
def test_the_allocator_keeps_what_a_run_frees(
    plentiful: bool, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        true_function = getattr(execute, name)

        def call(*args: Any) -> Any:
            calls.append(name)
            return true_function(*args)

        return call

    for name in ("keep_freed_memory", "keep_large_blocks", "assemble", "return_freed_memory"):
        monkeypatch.setattr(execute, name, noted(name))
    if not plentiful:
        done = run(task, tmp_path / "before", "head-only")
        assert done.record.plan is not None
        needed = done.record.plan["needed_bytes"]
        monkeypatch.setattr(execute, "available_bytes", lambda device: 2 * needed - 1)
        calls.clear()
    assert run(task, tmp_path / "run", "head-only").record.status == "ok"
    large = ["keep_large_blocks"] if plentiful else []
    assert calls == ["keep_freed_memory", *large, "assemble", "return_freed_memory"]


def test_the_same_again_is_not_trained_again(lora: Run, task: Path) -> None:
    before = contents(lora.folder)
    again = run(task, lora.folder, "lora")
    assert again == lora
    assert contents(lora.folder) == before


def test_force_trains_again_to_the_same_bits(task: Path, tmp_path: Path) -> None:
    # With dropout: its random numbers must come out alike, too.
    folder = tmp_path / "run"
    run(task, folder, "lora", "method.lora_dropout=0.1")
    before = contents(folder)
    run(task, folder, "lora", "method.lora_dropout=0.1", force=True)
    after = contents(folder)
    assert before.keys() == after.keys()
    for name in ("predictions.jsonl", "adapter/adapter_model.safetensors"):
        assert after[name][0] > before[name][0], name
        assert after[name][1] == before[name][1], name
    losses = [
        [json.loads(line).get("loss") for line in files["steps.jsonl"][1].splitlines()]
        for files in (before, after)
    ]
    assert losses[0] == losses[1]


def test_the_test_predictions_are_those_of_the_best_weights(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_score = Classification.score
    calls = []

    def score(self: Any, rows: Any, predictions: Any) -> dict[str, float | None]:
        metrics = true_score(self, rows, predictions)
        calls.append(metrics)
        # Of three evaluations the first is best; the fourth call is the test.
        return metrics | {"accuracy": {1: 0.9, 2: 0.1, 3: 0.1}.get(len(calls), -1.0)}

    monkeypatch.setattr(Classification, "score", score)
    done = run(
        task, tmp_path / "run", "lora", "optim.learning_rate=0.02",
        "train.eval_strategy=steps", "train.eval_steps=2",
        "train.save_strategy=steps", "train.save_steps=2", "train.save_total_limit=3",
    )  # fmt: skip
    assert done.record.validation_metrics["accuracy"] == 0.9
    assert done.record.metrics["accuracy"] == -1.0
    adapter = load_file(done.folder / "adapter" / "adapter_model.safetensors")
    steps = [
        load_file(done.folder / "checkpoints" / f"step-{step:08d}" / "trainable.safetensors")
        for step in (2, 6)
    ]
    name = next(name for name in adapter if "layer.1.attention.self.query.lora_B" in name)
    best, last = (
        next(tensor for key, tensor in state.items() if key.replace(".default", "") == name)
        for state in steps
    )
    assert torch.equal(adapter[name], best)
    assert not torch.equal(adapter[name], last)
    rows = [json.loads(line) for line in (task.parent / "test.jsonl").read_text().splitlines()]
    again = predict(str(done.folder), [{"text": row["text"]} for row in rows])
    recorded = read_predictions(done.folder)
    assert [row["prediction"] for row in again] == [row["prediction"] for row in recorded]


def test_a_failed_run_leaves_a_record_and_the_next_one_works(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:

        def broken(*_: Any) -> None:
            raise ValueError("broken on purpose")

        patch.setattr(Classification, "loss", broken)
        with pytest.raises(ValueError, match="broken on purpose"):
            run(task, folder, "lora", "precision.bf16=true")
    record = read_record(folder)
    assert (record.status, record.error) == ("failed", "ValueError: broken on purpose")
    assert record.params is not None
    assert record.metrics == {}
    assert "in broken" in (folder / "error.txt").read_text()

    # Another precision in the same process, in another folder; then the failed one again.
    assert run(task, tmp_path / "other", "lora", "train.max_steps=2").record.status == "ok"
    done = run(task, folder, "lora", "precision.bf16=true")
    assert done.record.status == "ok"
    assert done.record.error is None
    assert not (folder / "error.txt").exists()


@pytest.mark.parametrize(
    ("error", "status", "raised"),
    [
        (MemoryError("no more"), "oom", RunError),
        (torch.OutOfMemoryError("CUDA out of memory."), "oom", RunError),
        (None, "oom", RunError),
        (RuntimeError("something else"), "failed", RuntimeError),
        (KeyboardInterrupt(), "interrupted", KeyboardInterrupt),
    ],
    ids=["python", "cuda", "cpu", "other", "interrupt"],
)
def test_how_a_run_ended(
    error: BaseException | None,
    status: str,
    raised: type[BaseException],
    task: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def step(*_: Any, **__: Any) -> None:
        if error is None:
            torch.empty(2**55)  # what torch's own allocator says when there is nothing left
        else:
            raise error

    monkeypatch.setattr(loop, "optimizer_step", step)
    with pytest.raises(raised):
        run(task, tmp_path / "run", "lora")
    record = read_record(tmp_path / "run")
    assert record.status == status
    assert record.error
    assert (tmp_path / "run" / "error.txt").exists()
    assert not (tmp_path / "run" / "adapter").exists()
    assert record.memory is not None
    assert record.memory.process_peak_bytes
    assert record.memory.peak_bytes is None


def test_a_run_that_diverges(task: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the loss is (nan|inf) at step \d"):
        run(task, tmp_path / "run", "full", "optim.learning_rate=1e30")
    record = read_record(tmp_path / "run")
    assert record.status == "diverged"
    assert record.error is not None
    assert "optim.learning_rate" in record.error


def test_tensorboard(task: Path, tmp_path: Path) -> None:
    done = run(task, tmp_path / "run", "lora", "train.report_to=[tensorboard]")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    seen: dict[str, list[int]] = {}
    # The run's settings are in a file of their own.
    for path in done.folder.rglob("events.out.tfevents.*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                seen.setdefault(value.tag, []).append(event.step)
    assert seen["train/loss"] == [1, 2, 3, 4, 5, 6]
    assert seen["validation/accuracy"] == [6]


def optimizer_bytes(record: Record) -> int:
    assert record.memory is not None
    assert record.memory.optimizer_bytes is not None
    return record.memory.optimizer_bytes


def expected_bytes(sizes: list[int]) -> int:
    """bitsandbytes: two states; 1 byte and a 4-byte scale a block of 256, or 4 bytes if small.

    Two tables of 256 numbers belong to all of them together.
    """
    quantized = [size for size in sizes if size >= 4096]
    small = [size for size in sizes if size < 4096]
    tables = 2 * 1024 if quantized else 0
    return sum(2 * (size + -(-size // 256) * 4) for size in quantized) + 8 * sum(small) + tables


@on_the_cpu
def test_full_8bit_holds_a_quarter(
    assembled: Callable[..., Assembly], task: Path, tmp_path: Path
) -> None:
    plain, quantized = (
        optimizer_bytes(run(task, tmp_path / recipe, recipe, "train.max_steps=2").record)
        for recipe in ("full", "full-8bit")
    )
    sizes = [p.numel() for p in assembled("full", task=task).model.parameters()]
    # fp32: two states of 4 bytes, and a 4-byte step counter a tensor.
    assert plain == 8 * sum(sizes) + 4 * len(sizes)
    assert quantized == expected_bytes(sizes)
    assert 0.25 < quantized / plain < 0.26


@on_the_cpu
def test_lora_with_8bit_saves_next_to_nothing(sft_task: Path, tmp_path: Path) -> None:
    done = [
        run(sft_task, tmp_path / name, "lora", "train.max_steps=2", f"optim.optim={name}").record
        for name in ("adamw_torch", "adamw_8bit")
    ]
    plain, quantized = map(optimizer_bytes, done)
    params = done[0].params
    assert params is not None
    # Every tensor of the adapter is below 4,096 elements: both states stay in fp32.
    assert quantized == 8 * params.trainable == 8 * params.adapter
    assert 0.97 < quantized / plain < 1.0
