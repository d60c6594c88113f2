"""The loop against ``transformers.Trainer`` on the same batches from the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

from peftlab.assemble import Assembly
from tests.training.conftest import Losses

STEPS = 20
RECIPES = ("full", "freeze-top1", "lora", "ptuning-v2")
UNFREEZE = "unfreeze-top4"
PLAIN = "train.skip_unread_positions=false"
SETTINGS = (
    f"train.max_steps={STEPS}",
    "train.eval_strategy=no",
    "optim.learning_rate=1e-3",
    "optim.weight_decay=0.1",
    "optim.warmup_steps=5",
    "optim.max_grad_norm=0.5",
)


class Oracle(transformers.Trainer):
    """A Trainer fed with given micro-batches, which remembers the loss of every optimizer step."""

    def __init__(self, batches: list[list[dict[str, Tensor]]], **arguments: Any) -> None:
        self.batches = batches
        self.losses: list[float] = []
        super().__init__(train_dataset=[0] * len(batches), **arguments)

    def get_train_dataloader(self) -> DataLoader[Any]:
        flat = [batch for step in self.batches for batch in step]

        class Stream(torch.utils.data.IterableDataset[Any]):
            def __iter__(self) -> Iterator[dict[str, Tensor]]:
                return iter(flat)

            def __len__(self) -> int:
                return len(flat)

        return DataLoader(Stream(), batch_size=None)

    def training_step(self, *arguments: Any, **keywords: Any) -> Tensor:
        loss = super().training_step(*arguments, **keywords)
        self.losses.append(float(loss))
        return loss


def mean_over_the_step(outputs: Any, labels: Tensor, num_items_in_batch: int) -> Tensor:
    """Cross-entropy over all examples of an optimizer step.

    Without it, transformers 5.23 adds up the micro-batches' mean losses for a classifier: its
    forward takes keyword arguments, so Trainer believes that the model divided by the number of
    items, which the model did not.
    """
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


class UnfreezeLater(transformers.TrainerCallback):
    """Block 1 trains from the second half on; the pooler, which is new, with the head."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        for name, parameter in known["model"].named_parameters():
            if "encoder.layer.1." in name:
                parameter.requires_grad_(state.global_step >= STEPS // 2)


def oracle_losses(
    assembly: Assembly, loop: Any, folder: Path, *callbacks: transformers.TrainerCallback
) -> tuple[list[float], nn.Module]:
    """Train the assembly's model with Trainer on the batches that ``loop`` plans."""
    experiment = assembly.experiment
    optim, train = experiment.optim, experiment.train
    kind, tokenizer = assembly.kind, assembly.tokenizer
    features = loop.job.features
    rows = [loop.schedule.rows_of(step) for step in range(STEPS)]
    size = train.per_device_train_batch_size
    batches = [
        [
            kind.collate([features[row] for row in micro[0]], tokenizer)
            for micro in loop.schedule.plan.micro_batches(step, size, 1)
        ]
        for step in rows
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        learning_rate=optim.learning_rate,
        weight_decay=optim.weight_decay,
        warmup_steps=optim.warmup_steps,
        max_grad_norm=optim.max_grad_norm,
        lr_scheduler_type=optim.lr_scheduler_type,
        optim="adamw_torch_fused",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=experiment.seed,
    )
    trainer = Oracle(
        batches,
        model=assembly.model,
        args=arguments,
        compute_loss_func=mean_over_the_step,
        callbacks=list(callbacks),
    )
    trainer.train()
    parts = train.gradient_accumulation_steps
    sums = [sum(trainer.losses[at : at + parts]) for at in range(0, len(trainer.losses), parts)]
    return sums, assembly.model


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("recipe", [*RECIPES, UNFREEZE])
def test_losses_equal_trainers(
    recipe: str,
    accumulation: int,
    assembled: Callable[..., Assembly],
    loop_of: Callable[..., tuple[Any, Losses]],
    tmp_path: Path,
) -> None:
    settings = (
        *SETTINGS,
        f"train.per_device_train_batch_size={8 // accumulation}",
        f"train.gradient_accumulation_steps={accumulation}",
    )
    callbacks: tuple[transformers.TrainerCallback, ...] = ()
    if recipe == UNFREEZE:
        # A block that joins without a warm-up makes whole steps of Adam also where its gradient is
        # rounding error: both sides must round alike.
        settings += ("method.top=1", "method.unfreeze_ratio=0.5", PLAIN)
        callbacks = (UnfreezeLater(),)
    loop, heard = loop_of(assembled(recipe, *settings))
    loop.fit()
    plain = assembled(recipe, *settings, PLAIN)
    expected, oracle = oracle_losses(plain, loop, tmp_path, *callbacks)
    assert len(heard.losses) == len(expected) == STEPS
    torch.testing.assert_close(heard.losses, expected, rtol=0, atol=1e-5)
    assert heard.losses[-1] < heard.losses[0]
    method = loop.job.method
    ours, theirs = method.training_state(loop.model), method.training_state(oracle)
    for name, tensor in ours.items():
        # Attention does not change with the keys' bias: its gradient is rounding error alone, of
        # which Adam makes whole steps.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_accumulation_changes_nothing(
    recipe: str,
    assembled: Callable[..., Assembly],
    loop_of: Callable[..., tuple[Any, Losses]],
) -> None:
    losses = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        settings = (
            *SETTINGS,
            f"train.per_device_train_batch_size={size}",
            f"train.gradient_accumulation_steps={accumulation}",
        )
        loop, heard = loop_of(assembled(recipe, *settings))
        loop.fit()
        losses.append(heard.losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(losses[0], losses[2], rtol=0, atol=1e-5)
