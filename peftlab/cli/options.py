"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from pathlib import Path

import click

from peftlab.cli.output import JSON_KEY
from peftlab.errors import ConfigError, Problem


def _keep_json(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    ctx.meta[JSON_KEY] = wanted


json_option = click.option(
    "--json",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_keep_json,
    help="Print one JSON object on stdout; text for people goes to stderr.",
)
model_option = click.option(
    "--model", "-m", help="In place of the task's model: embedded name, local folder or hub id."
)
seed_option = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the run."
)
set_option = click.option(
    "--set",
    "-s",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override a value of the recipe or task; again for more.",
)
root_option = click.option(
    "--output-dir",
    "root",
    type=click.Path(file_okay=False, path_type=Path),
    default="runs",
    show_default=True,
    help="Folder of all runs.",
)
force_option = click.option("--force", is_flag=True, help="Run again what is finished.")
auto_batch_size_option = click.option(
    "--auto-batch-size",
    is_flag=True,
    help="The largest micro-batch planned to fit, with accumulation to the same effective batch.",
)
memory_option = click.option(
    "--memory", help="For --auto-batch-size: a size or a card, in place of what is free here."
)


def memory_bytes(auto_batch_size: bool, memory: str | None) -> int | None:
    """What ``--memory`` says, for commands that take ``--auto-batch-size``.

    Raises:
        ConfigError: neither a size nor a card, or without ``--auto-batch-size``.
    """
    from peftlab.memory.cards import memory_of

    if memory is None:
        return None
    if not auto_batch_size:
        hint = "Add it, or ask 'peftlab plan --memory'."
        raise ConfigError(Problem("--memory", "is for --auto-batch-size.", hint))
    return memory_of(memory)
