"""peftlab plan: what it will need, before a weight is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from peftlab.cli.base import Verb
from peftlab.cli.options import json_option, model_option, set_option
from peftlab.cli.output import answer, say, table
from peftlab.errors import ConfigError, Problem
from peftlab.units import format_bytes, format_count

if TYPE_CHECKING:
    from peftlab.planning import Plan

_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "temporary", "peak")


@click.command(
    cls=Verb,
    examples=[
        "peftlab plan movie-sentiment --recipe lora",
        "peftlab plan movie-sentiment --recipe full,lora,freeze-top2 --memory 1GiB",
        "peftlab plan -r lora -m minilm --task-kind classification --batch-size 8 --seq-len 64",
    ],
)
@click.argument("task", required=False)
@click.option(
    "--recipe", "--recipes", "-r", "recipes", required=True, metavar="A,B,...", help="Which."
)
@model_option
@set_option
@click.option("--task-kind", help="In place of a task: plan for a kind of task, without data.")
@click.option("--num-labels", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), help="Examples of a micro-batch.")
@click.option("--seq-len", type=click.IntRange(min=1), help="Tokens of every example.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="precision.dtype."
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="By default what is here.")
@click.option("--memory", help="Does it fit: a size like 24GiB, or a card like rtx4090.")
@json_option
def plan(
    task: str | None,
    recipes: str,
    model: str | None,
    overrides: tuple[str, ...],
    task_kind: str | None,
    num_labels: int,
    batch_size: int | None,
    seq_len: int | None,
    dtype: str | None,
    device: Literal["cpu", "cuda"] | None,
    memory: str | None,
) -> None:
    """Say what recipes need on TASK, or on a model's config alone.

    With TASK the longest texts of its data decide. Without, name --model, --task-kind, --batch-size
    and --seq-len; a model may then be the path of a config.json. Exit code 1 if it does not fit
    into --memory. --json prints the plan; of several recipes {"plans": {recipe: plan}}.
    """
    _check_request(task, task_kind, model, batch_size, seq_len)
    from peftlab.memory.cards import memory_of
    from peftlab.planning.verb import plan as plan_task
    from peftlab.planning.verb import plan_shape

    memory_bytes = None if memory is None else memory_of(memory)
    settings = [*overrides, *([f"precision.dtype={dtype}"] if dtype else [])]
    names = list(dict.fromkeys(name.strip() for name in recipes.split(",") if name.strip()))
    plans: dict[str, Plan] = {}
    for name in names:
        if task is not None:
            if batch_size is not None:
                settings.append(f"train.per_device_train_batch_size={batch_size}")
            plans[name] = plan_task(
                task,
                name,
                model=model,
                overrides=settings,
                seq_len=seq_len,
                device=device,
                memory_bytes=memory_bytes,
            )
        elif model and task_kind and batch_size and seq_len:
            plans[name] = plan_shape(
                name,
                model,
                task_kind=task_kind,
                batch_size=batch_size,
                seq_len=seq_len,
                num_labels=num_labels,
                overrides=settings,
                device=device,
                memory_bytes=memory_bytes,
            )
    dumped = {name: each.model_dump(mode="json") for name, each in plans.items()}
    answer(dumped[names[0]] if len(names) == 1 else {"plans": dumped})
    _show(plans)
    if any(each.fits is False for each in plans.values()):
        click.get_current_context().exit(1)


def _check_request(
    task: str | None,
    task_kind: str | None,
    model: str | None,
    batch_size: int | None,
    seq_len: int | None,
) -> None:
    if task is not None:
        if task_kind is not None:
            raise ConfigError(Problem("--task-kind", "is for plans without a TASK."))
        return
    needed = {
        "--model": model,
        "--task-kind": task_kind,
        "--batch-size": batch_size,
        "--seq-len": seq_len,
    }
    if missing := [name for name, value in needed.items() if value is None]:
        message = f"without a TASK, {', '.join(missing)} must be given."
        raise ConfigError(Problem("", message, "Or name a task: see 'peftlab ls tasks'."))


def _show(plans: dict[str, Plan]) -> None:
    headings = ["recipe", *_PARTS, "at", "trainable", "saved"]
    rows = []
    for name, each in plans.items():
        memory = each.memory.model_dump()
        parts = [format_bytes(memory[f"{part}_bytes"]) for part in _PARTS]
        trainable = format_count(each.params.trainable)
        rows.append([name, *parts, each.peak_moment, trainable, format_bytes(each.saved_bytes)])
    say(table(headings, rows))
    for name, each in plans.items():
        rows_tokens = " × ".join(map(str, each.batch_shape))
        say(
            f"{name}: micro-batch {rows_tokens} tokens on {each.device}; live peak "
            f"{format_bytes(each.memory.peak_bytes)}, "
            f"reserved {format_bytes(each.reserved_bytes)}, "
            f"with the process {format_bytes(each.needed_bytes)}"
        )
        for note in each.notes:
            say(f"note: {note}")
        if each.fits is not None:
            verdict = "fits into" if each.fits else "does not fit into"
            say(f"{name} {verdict} {format_bytes(each.memory_bytes)}")
        for suggestion in each.suggestions:
            settings = " ".join(f"--set {key}={value}" for key, value in suggestion.settings())
            say(f"  would fit: {suggestion.text} ({format_bytes(suggestion.needed_bytes)})")
            say(f"    {settings}")
        if each.fits is False and not each.suggestions:
            say("  no change of batch, checkpointing or optimizer makes it fit")


COMMAND = plan
