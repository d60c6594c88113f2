"""peftlab train: one experiment."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from peftlab.cli.base import Verb
from peftlab.cli.nextstep import export_command
from peftlab.cli.options import (
    auto_batch_size_option,
    force_option,
    json_option,
    memory_bytes,
    memory_option,
    model_option,
    root_option,
    seed_option,
    set_option,
)
from peftlab.cli.output import INTERRUPTED, answer, is_main_process, say, typed_command
from peftlab.errors import RunError
from peftlab.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from peftlab.run import Run


@click.command(
    cls=Verb,
    examples=[
        "peftlab train movie-sentiment --recipe lora",
        "peftlab train movie-sentiment --recipe full --model bert-tiny --set train.max_steps=20",
        "peftlab train movie-sentiment --recipe lora --set train.save_strategy=epoch --resume",
        "accelerate launch -m peftlab train movie-sentiment --recipe lora",
    ],
)
@click.argument("task")
@click.option("--recipe", "-r", required=True, help="How to fine-tune: a name or a path.")
@model_option
@seed_option
@set_option
@root_option
@click.option(
    "--run-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of this run, in place of one below --output-dir.",
)
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint.")
@force_option
@auto_batch_size_option
@memory_option
@click.option("--quiet", "-q", is_flag=True, help="No progress bar and no summary.")
@json_option
def train(
    task: str,
    recipe: str,
    model: str | None,
    seed: int,
    overrides: tuple[str, ...],
    root: Path,
    run_dir: Path | None,
    resume: bool,
    force: bool,
    auto_batch_size: bool,
    memory: str | None,
    quiet: bool,
) -> None:
    """Fine-tune on TASK with a recipe.

    Trains, tests and records the run. A run that is finished is not run again. --json prints its
    record and "run_dir".
    """
    from peftlab.run import Request
    from peftlab.run import train as run_training

    request = Request(
        root=root,
        folder=run_dir,
        resume=resume,
        force=force,
        auto_batch_size=auto_batch_size,
        memory_bytes=memory_bytes(auto_batch_size, memory),
        progress=not quiet,
        command=typed_command(),
    )
    started = time.time()
    try:
        run = run_training(
            task, recipe, model=model, seed=seed, overrides=overrides, request=request
        )
    except KeyboardInterrupt:
        say(_interrupted(_written_since(started, root, run_dir, seed)), err=True)
        click.get_current_context().exit(INTERRUPTED)
    except RunError:
        if (folder := _written_since(started, root, run_dir, seed)) is not None:
            say(f"the record of the failed run: {folder}", err=True)
        raise
    answer({**run.record.model_dump(mode="json"), "run_dir": str(run.folder)})
    if not quiet and is_main_process():
        _summarise(run, started)


def _summarise(run: Run, started: float) -> None:
    from peftlab.results.store import RECORD

    record, speed = run.record, run.record.speed
    if (run.folder / RECORD).stat().st_mtime < started:
        say("this run was finished before; --force runs it again")
    for note in record.notes:
        say(f"note: {note}")
    if record.params is not None:
        say(record.params.peft_line)
    value, baseline = record.metrics.get(record.metric), record.majority_baseline
    shown = "–" if value is None else f"{value:.4f}"
    constant = "" if baseline is None else f" (the same answer to every row: {baseline:.4f})"
    say(f"test {record.metric}: {shown}{constant}")
    evaluation = format_seconds(speed.eval_seconds)
    say(f"time: {format_seconds(speed.train_seconds)} training, {evaluation} evaluation")
    if speed.model_flops_utilisation is not None:
        say(f"model FLOPs utilisation: {speed.model_flops_utilisation:.0%} of the measured peak")
    if record.memory is not None:
        peak = format_bytes(record.memory.peak_bytes)
        say(f"peak memory: {peak} ({record.memory.source})")
    say(f"run: {run.folder}")
    say(f"next: {export_command(run.folder)}")


def _written_since(started: float, root: Path, run_dir: Path | None, seed: int) -> Path | None:
    """The folder of the run that was stopped; None if it had not begun."""
    from peftlab.results.store import RECORD, find_runs

    folders = find_runs(root) if run_dir is None else [run_dir]
    written = {
        folder: (folder / RECORD).stat().st_mtime
        for folder in folders
        if folder.name.endswith(f"-s{seed}") or folder == run_dir
        if (folder / RECORD).is_file()
    }
    newest = max(written, key=lambda folder: written[folder], default=None)
    return newest if newest is not None and written[newest] >= started else None


def _interrupted(folder: Path | None) -> str:
    if folder is None:
        return "interrupted before training began; nothing was kept."
    from peftlab.execute import CHECKPOINTS
    from peftlab.experiment.store import read_experiment

    if any((folder / CHECKPOINTS).glob("step-*")):
        return f"interrupted; the checkpoint in {folder} is kept. Add --resume to go on from it."
    experiment, _ = read_experiment(folder)
    never = experiment.train.save_strategy == "no"
    hint = " (--set train.save_strategy=epoch writes them)" if never else ""
    return (
        f"interrupted; {folder} keeps the record, but there is no checkpoint to go on from{hint}."
    )


COMMAND = train
