"""What the loop does besides steps: evaluate, stop, save, return to the best, tell, refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftlab.assemble import Assembly
from peftlab.errors import DivergedError
from peftlab.training.events import EvaluationEvent, Listener, StepEvent
from peftlab.training.loop import Loop
from tests.training.conftest import Losses

Assembled = Callable[..., Assembly]
Loops = Callable[..., tuple[Loop, Losses]]


class Diary(Listener):
    """Every event in its order, and the trained weights at each evaluation."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, int]] = []
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.best: list[bool] = []
        self.loop: Loop | None = None

    def on_begin(self, total_steps: int, first_step: int) -> None:
        self.entries.append(("begin", total_steps))

    def on_step(self, event: StepEvent) -> None:
        self.entries.append(("step", event.step))

    def on_evaluate(self, event: EvaluationEvent) -> None:
        self.entries.append(("evaluate", event.step))
        self.best.append(event.best)
        if self.loop is not None:
            self.weights[event.step] = self.loop.state.trained()

    def on_end(self) -> None:
        self.entries.append(("end", 0))

    def steps(self, kind: str) -> list[int]:
        return [step for name, step in self.entries if name == kind]


def script_scores(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, values: Sequence[float | None]
) -> None:
    """Let the evaluations find these metrics, one after the other."""
    remaining = iter(values)
    monkeypatch.setattr(loop.job.kind, "score", lambda *_: {loop.job.metric: next(remaining)})


def kept(loop: Loop) -> dict[str, Tensor]:
    return {name: t.cpu() for name, t in loop.job.method.training_state(loop.model).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


EVERY_STEP = ("train.eval_strategy=steps", "train.eval_steps=1", "optim.warmup_steps=0")


@pytest.mark.parametrize("better", ["max", "min"])
def test_early_stopping_stops_and_keeps_the_best(
    better: str, assembled: Assembled, loop_of: Loops, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("train.early_stopping_patience=2", "train.max_steps=9")
    loop, _ = loop_of(assembled("lora", *EVERY_STEP, *settings), diary := Diary())
    loop.job = dataclasses.replace(loop.job, metric_better=better)
    diary.loop = loop
    sign = 1 if better == "max" else -1
    script_scores(loop, monkeypatch, [sign * value for value in (0.5, 0.4, 0.7, 0.7, 0.6, 0.9)])
    result = loop.fit()
    # The third is best; an equal one is no improvement; two without one end it.
    assert diary.best == [True, False, True, False, False]
    assert diary.steps("step") == [1, 2, 3, 4, 5]
    assert (result.progress.step, result.progress.best_step) == (5, 3)
    assert result.progress.best_metric == sign * 0.7
    assert result.progress.kept_metrics == {loop.job.metric: sign * 0.7}
    scores = [point["metric"] for point in result.progress.curve if point["metric"] is not None]
    assert scores[:3] == [sign * value for value in (0.5, 0.4, 0.7)]
    assert same(kept(loop), diary.weights[3])
    assert not same(kept(loop), diary.weights[5])


def test_the_last_weights_stay_without_load_best(
    assembled: Assembled, loop_of: Loops, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("train.load_best_model_at_end=false", "train.max_steps=4")
    loop, _ = loop_of(assembled("lora", *EVERY_STEP, *settings), diary := Diary())
    diary.loop = loop
    script_scores(loop, monkeypatch, [0.9, 0.1, 0.2, 0.3])
    result = loop.fit()
    assert same(kept(loop), diary.weights[4])
    assert result.progress.kept_metrics == {loop.job.metric: 0.3}
    assert result.progress.best_step == 1


def test_an_undefined_metric_is_never_the_best(
    assembled: Assembled, loop_of: Loops, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, _ = loop_of(assembled("lora", *EVERY_STEP, "train.max_steps=4"), diary := Diary())
    script_scores(loop, monkeypatch, [None, 0.0, None, 0.1])
    loop.fit()
    assert diary.best == [False, True, False, True]


def test_the_best_may_be_a_step_in_which_nothing_had_moved_yet(
    assembled: Assembled, loop_of: Loops, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Warm-up starts at rate 0, and LoRA's A moves only after B did: that is no broken run.
    settings = ("train.eval_strategy=steps", "train.eval_steps=1", "train.max_steps=6")
    loop, _ = loop_of(assembled("lora", *settings, "optim.warmup_steps=2"))
    start = loop.state.trained()
    script_scores(loop, monkeypatch, [0.9, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert loop.fit().progress.best_step == 1
    assert same(kept(loop), start)


def test_cadence_by_steps(assembled: Assembled, loop_of: Loops, tmp_path: Path) -> None:
    settings = (
        "train.max_steps=8",
        "train.logging_steps=3",
        "train.eval_strategy=steps",
        "train.eval_steps=3",
        "train.save_strategy=steps",
        "train.save_steps=5",
        "train.save_total_limit=9",
    )
    loop, heard = loop_of(assembled("lora", *settings), diary := Diary())
    loop.fit()
    # The last step is logged, evaluated and saved in any case.
    assert diary.entries == [
        ("begin", 8), ("step", 3), ("evaluate", 3), ("step", 6), ("evaluate", 6),
        ("step", 8), ("evaluate", 8), ("end", 0),
    ]  # fmt: skip
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["step-00000005", "step-00000008"]
    assert [event.epoch for event in heard.events] == [3 / 20, 6 / 20, 8 / 20]


def test_cadence_by_epochs(assembled: Assembled, loop_of: Loops) -> None:
    settings = ("train.per_device_train_batch_size=64", "train.num_train_epochs=2.5")
    loop, _ = loop_of(assembled("lora", *settings), diary := Diary())
    loop.fit()
    assert diary.steps("step") == list(range(1, 9))
    assert diary.steps("evaluate") == [3, 6, 8]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (("train.num_train_epochs=0.25",), 5),
        (("train.num_train_epochs=1.01",), 21),
        (("train.num_train_epochs=2", "train.gradient_accumulation_steps=3"), 14),
        (("train.num_train_epochs=7", "train.max_steps=3"), 3),
        (("train.num_train_epochs=1", "train.max_steps=30"), 30),
    ],
)
def test_total_steps(
    settings: Sequence[str], steps: int, assembled: Assembled, loop_of: Loops
) -> None:
    loop, _ = loop_of(assembled("head-only", *settings))
    assert loop.total_steps == steps


def test_every_example_is_seen_in_an_epoch(assembled: Assembled, loop_of: Loops) -> None:
    loop, heard = loop_of(assembled("head-only", "train.eval_strategy=no"))
    result = loop.fit()
    assert sum(event.tokens for event in heard.events) == sum(loop.lengths)
    assert result.progress.tokens == sum(loop.lengths)
    assert sum(event.padded_tokens for event in heard.events) == result.progress.padded_tokens
    assert all(event.padded_tokens >= event.tokens for event in heard.events)


def test_a_loss_that_is_not_finite_ends_the_run(
    assembled: Assembled, loop_of: Loops, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, _ = loop_of(assembled("lora", *EVERY_STEP, "train.max_steps=9"), diary := Diary())
    true_loss = loop.job.kind.loss

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return true_loss(model, batch) * (float("nan") if loop.progress.step == 2 else 1.0)

    monkeypatch.setattr(loop.job.kind, "loss", loss)
    with pytest.raises(DivergedError) as raised:
        loop.fit()
    assert str(raised.value).startswith("the loss is nan at step 3.")
    assert "optim.learning_rate" in str(raised.value)
    assert diary.entries == [
        ("begin", 9), ("step", 1), ("evaluate", 1), ("step", 2), ("evaluate", 2), ("end", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 4])
def test_tokens_weigh_the_same_however_they_are_batched(
    accumulation: int, assembled: Assembled, loop_of: Loops, sft_task: Path
) -> None:
    # At 0.5 some weights grow a hundredfold in 4 steps, and their rounding with them.
    settings = (
        f"train.per_device_train_batch_size={16 // accumulation}",
        f"train.gradient_accumulation_steps={accumulation}",
        "train.max_steps=4",
        "optim.optim=sgd",
        "optim.learning_rate=0.1",
        "optim.lr_scheduler_type=constant",
        "optim.warmup_steps=0",
        "optim.max_grad_norm=null",
        "optim.weight_decay=0",
    )
    loop, heard = loop_of(assembled("full", *settings, task=sft_task))
    reference = assembled("full", *settings, task=sft_task).model
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    kind, job = loop.job.kind, loop.job
    expected = []
    for number in range(4):
        rows = [job.features[row] for row in loop.schedule.rows_of(number)]
        assert len({kind.num_items(row) for row in rows}) > 1
        # transformers' own mean over the target tokens of one big batch.
        loss = reference(**kind.collate(rows, job.tokenizer)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    loop.fit()
    torch.testing.assert_close(heard.losses, expected, rtol=0, atol=1e-5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(
            loop.model.get_parameter(name).cpu(), parameter, rtol=0, atol=1e-5, msg=name
        )
    assert heard.losses[-1] < heard.losses[0]


def test_bf16_autocast(assembled: Assembled, loop_of: Loops) -> None:
    settings = ("train.max_steps=5", "train.eval_strategy=no")
    exact, heard = loop_of(assembled("lora", *settings))
    exact.fit()
    mixed, heard_mixed = loop_of(assembled("lora", *settings, "precision.bf16=true"))
    dtypes = set()
    linear = next(each for each in mixed.model.modules() if isinstance(each, nn.Linear))
    linear.register_forward_hook(lambda _, __, output: dtypes.add(output.dtype))
    mixed.fit()
    assert dtypes == {torch.bfloat16}
    assert heard_mixed.losses != heard.losses
    torch.testing.assert_close(heard_mixed.losses, heard.losses, rtol=0, atol=2e-2)
    assert {p.dtype for p in mixed.model.parameters()} == {torch.float32}


def modes_while_training(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[bool]]:
    """Whether each module was in training mode, over all steps of a fit."""
    modes: dict[str, set[bool]] = {}
    true_loss = loop.job.kind.loss

    def loss(model: nn.Module, batch: Any) -> Tensor:
        for name, module in loop.model.named_modules():
            modes.setdefault(name, set()).add(module.training)
        return true_loss(model, batch)

    monkeypatch.setattr(loop.job.kind, "loss", loss)
    loop.fit()
    return modes


@pytest.mark.parametrize("trunk_dropout", [False, True])
def test_the_trunk_stays_in_eval_mode(
    trunk_dropout: bool, assembled: Assembled, loop_of: Loops, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An evaluation after each step must not leave its mode behind.
    settings = (
        *EVERY_STEP,
        "train.max_steps=4",
        f"train.trunk_dropout={str(trunk_dropout).lower()}",
    )
    loop, _ = loop_of(assembled("freeze-top1", *settings, dropout=True))
    modes = modes_while_training(loop, monkeypatch)
    trunk = ("bert.embeddings", "bert.encoder.layer.0")
    for name, seen in modes.items():
        in_trunk = any(name == part or name.startswith(f"{part}.") for part in trunk)
        assert seen == {not in_trunk or trunk_dropout}, name
    assert modes["bert.encoder.layer.1"] == {True}


def test_without_a_trunk_everything_trains(
    assembled: Assembled, loop_of: Loops, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, _ = loop_of(assembled("full", "train.max_steps=4", "train.eval_strategy=no"))
    assert set().union(*modes_while_training(loop, monkeypatch).values()) == {True}


@pytest.mark.parametrize("recipe", ["full", "lora"])
def test_gradient_checkpointing_changes_nothing(
    recipe: str, assembled: Assembled, loop_of: Loops
) -> None:
    losses, flops = [], []
    for setting in ("false", "true"):
        loop, heard = loop_of(
            assembled(
                recipe,
                "train.max_steps=5",
                "train.eval_strategy=no",
                f"train.gradient_checkpointing={setting}",
            )
        )
        measured = loop.fit().measured
        assert measured is not None
        losses.append(heard.losses)
        flops.append(measured.measurement.flops)
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-6)
    # What was dropped is computed again.
    assert flops[1] > 1.1 * flops[0]


def test_the_measured_step_is_not_the_first(assembled: Assembled, loop_of: Loops) -> None:
    loop, heard = loop_of(assembled("lora", "train.eval_strategy=no"))
    measured = loop.fit().measured
    assert measured is not None
    assert measured.step > 1
    padded = {event.step: event.padded_tokens for event in heard.events}
    assert measured.padded_tokens == padded[measured.step]
    assert padded[measured.step] == max(padded[step] for step in range(2, 21))
    rows, tokens = measured.batch
    assert rows * tokens == measured.padded_tokens
