"""peftlab plan: what it will need, before a weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import click

from peftlab.cli.base import Verb
from peftlab.cli.options import json_option, model_option, set_option
from peftlab.cli.output import answer, say, table
from peftlab.errors import ConfigError, Problem
from peftlab.units import format_bytes, format_count

if TYPE_CHECKING:
    from peftlab.planning import Plan

_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "temporary", "peak")


@dataclass(frozen=True)
class Cell:
    """One plan of several, and what was asked for; a task's own sizes are None."""

    recipe: str
    batch_size: int | None
    seq_len: int | None
    plan: Plan


def _sizes(_: click.Context, __: click.Parameter, text: str | None) -> list[int]:
    try:
        numbers = [int(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise click.BadParameter("must be a number above 0, or several with commas.")
    return list(dict.fromkeys(numbers))


@click.command(
    cls=Verb,
    examples=[
        "peftlab plan movie-sentiment --recipe lora",
        "peftlab plan movie-sentiment --recipe full,lora,freeze-top2 --memory 1GiB",
        "peftlab plan movie-sentiment --recipe lora --batch-size 8,16,32 --seq-len 32,64",
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
@click.option(
    "--batch-size",
    "batch_sizes",
    callback=_sizes,
    metavar="N[,N...]",
    help="Examples of a micro-batch; several are planned one by one.",
)
@click.option(
    "--seq-len",
    "seq_lens",
    callback=_sizes,
    metavar="N[,N...]",
    help="Tokens of every example; several are planned one by one.",
)
@click.option(
    "--length-distribution",
    metavar="N:SHARE,...",
    help="Without a TASK, in place of --seq-len: tokens and share of the examples.",
)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="precision.dtype."
)
@click.option(
    "--device",
    metavar="cpu|cuda|CARD",
    help="By default the card of --memory, or what is here; a card like h100 decides the kernels.",
)
@click.option(
    "--num-processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="That train data-parallel; the plan is each one's.",
)
@click.option(
    "--sharding",
    type=click.Choice(["none", "fsdp"]),
    default="none",
    show_default=True,
    help="Of parameters, gradients and optimizer state over the processes (FSDP2).",
)
@click.option("--memory", help="Does it fit: a size like 24GiB, or a card like rtx4090.")
@json_option
def plan(
    task: str | None,
    recipes: str,
    model: str | None,
    overrides: tuple[str, ...],
    task_kind: str | None,
    num_labels: int,
    batch_sizes: list[int],
    seq_lens: list[int],
    length_distribution: str | None,
    dtype: str | None,
    device: str | None,
    num_processes: int,
    sharding: Literal["none", "fsdp"],
    memory: str | None,
) -> None:
    """Say what recipes need on TASK, or on a model's config alone.

    With TASK the longest texts of its data decide. Without, name --model, --task-kind, --batch-size
    and --seq-len; a model may then be the path of a config.json. Exit code 1 if it does not fit
    into --memory. --json prints the plan; of several recipes {"plans": {recipe: plan}}, of several
    sizes {"sweep": [plans with "recipe", "batch_size", "seq_len"]}.
    """
    _check_request(task, task_kind, model, batch_sizes, seq_lens, length_distribution)
    from peftlab.memory.cards import card_of, memory_of
    from peftlab.planning.average import parse_distribution
    from peftlab.planning.verb import plan as plan_task
    from peftlab.planning.verb import plan_shape

    if device is None and memory is not None and card_of(memory) is not None:
        device = memory
    asked: dict[str, Any] = {
        "device": device,
        "memory_bytes": None if memory is None else memory_of(memory),
        "num_processes": num_processes,
        "sharding": sharding,
    }
    lengths = parse_distribution(length_distribution) if length_distribution else None
    settings = [*overrides, *([f"precision.dtype={dtype}"] if dtype else [])]
    names = list(dict.fromkeys(name.strip() for name in recipes.split(",") if name.strip()))
    cells: list[Cell] = []
    micro: list[int | None] = [*batch_sizes] or [None]
    tokens: list[int | None] = [*seq_lens] or [None]
    for name, batch_size, seq_len in product(names, micro, tokens):
        if task is not None:
            size = f"train.per_device_train_batch_size={batch_size}"
            values = [*settings, size] if batch_size else settings
            planned = plan_task(task, name, model=model, overrides=values, seq_len=seq_len, **asked)
        elif model and task_kind and batch_size and (length := lengths or seq_len):
            planned = plan_shape(
                name,
                model,
                task_kind=task_kind,
                batch_size=batch_size,
                seq_len=length,
                num_labels=num_labels,
                overrides=settings,
                **asked,
            )
        cells.append(Cell(name, batch_size, seq_len, planned))
    answer(_as_json(cells, names))
    _show(cells)
    if any(cell.plan.fits is False for cell in cells):
        click.get_current_context().exit(1)


def _as_json(cells: list[Cell], names: list[str]) -> dict[str, Any]:
    dumped = [cell.plan.model_dump(mode="json") for cell in cells]
    if len(cells) == 1:
        return dumped[0]
    if len(cells) == len(names):
        return {"plans": dict(zip(names, dumped, strict=True))}
    return {
        "sweep": [
            {
                "recipe": cell.recipe,
                "batch_size": cell.batch_size,
                "seq_len": cell.seq_len,
                **planned,
            }
            for cell, planned in zip(cells, dumped, strict=True)
        ]
    }


def _check_request(
    task: str | None,
    task_kind: str | None,
    model: str | None,
    batch_sizes: list[int],
    seq_lens: list[int],
    length_distribution: str | None,
) -> None:
    if task is not None:
        problems = [
            Problem(option, "is for plans without a TASK.")
            for option, value in (
                ("--task-kind", task_kind),
                ("--length-distribution", length_distribution),
            )
            if value is not None
        ]
        if problems:
            raise ConfigError(problems)
        return
    if seq_lens and length_distribution:
        raise ConfigError(Problem("--length-distribution", "takes the place of --seq-len."))
    needed = {
        "--model": model,
        "--task-kind": task_kind,
        "--batch-size": batch_sizes,
        "--seq-len or --length-distribution": seq_lens or length_distribution,
    }
    if missing := [name for name, value in needed.items() if not value]:
        message = f"without a TASK, {', '.join(missing)} must be given."
        raise ConfigError(Problem("", message, "Or name a task: see 'peftlab ls tasks'."))


def _show(cells: list[Cell]) -> None:
    headings = ["recipe", "batch", *_PARTS, "at", "trainable", "saved"]
    rows = []
    for cell in cells:
        memory = cell.plan.memory.model_dump()
        parts = [format_bytes(memory[f"{part}_bytes"]) for part in _PARTS]
        batch = "×".join(map(str, cell.plan.batch_shape))
        trainable = format_count(cell.plan.params.trainable)
        saved = format_bytes(cell.plan.saved_bytes)
        rows.append([cell.recipe, batch, *parts, cell.plan.peak_moment, trainable, saved])
    say(table(headings, rows))
    for cell in cells:
        _show_one(cell.recipe, cell.plan)


def _show_one(name: str, planned: Plan) -> None:
    rows_tokens = " × ".join(map(str, planned.batch_shape))
    processes = f", each of {planned.num_processes} processes" * (planned.num_processes > 1)
    if planned.sharding != "none":
        processes += f" ({planned.sharding.upper()} shards)"
    say(
        f"{name}: micro-batch {rows_tokens} tokens on {planned.device}{processes}; live peak "
        f"{format_bytes(planned.memory.peak_bytes)}, "
        f"reserved {format_bytes(planned.reserved_bytes)}, "
        f"with the process {format_bytes(planned.needed_bytes)}"
    )
    if planned.gathered_bytes:
        gathered = format_bytes(planned.gathered_bytes)
        say(f"{name}: of temporary at the peak, {gathered} are parameters gathered from shards")
    if (average := planned.average) is not None:
        say(
            f"{name}: {average.steps_per_epoch} steps an epoch, on average "
            f"{average.padded_tokens:.0f} tokens ({average.padding_share:.0%} padding) and "
            f"{format_count(round(average.flops))} FLOPs"
        )
    for note in planned.notes:
        say(f"note: {note}")
    if planned.fits is not None:
        verdict = "fits into" if planned.fits else "does not fit into"
        say(f"{name} {verdict} {format_bytes(planned.memory_bytes)}")
    for suggestion in planned.suggestions:
        settings = " ".join(f"--set {key}={value}" for key, value in suggestion.settings())
        say(f"  would fit: {suggestion.text} ({format_bytes(suggestion.needed_bytes)})")
        say(f"    {settings}")
    if planned.fits is False and not planned.suggestions:
        say("  no change of batch, checkpointing, optimizer or precision makes it fit")


COMMAND = plan
