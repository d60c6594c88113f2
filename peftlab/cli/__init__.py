"""The command line: one file a command, found by its name and imported when it is asked for.

A command turns options into one call of a verb and its answer into text or JSON. Nothing here
imports torch before a command needs it.
"""

from __future__ import annotations

import logging
import shlex
from typing import Any

import click

from peftlab.cli.output import COMMAND_KEY, say
from peftlab.registry import Registry, did_you_mean

COMMANDS: Registry[click.Command] = Registry(
    "command", __name__, "COMMAND", helpers={"base", "nextstep", "options", "output"}
)


class Commands(click.Group):
    """The commands by the names of their files."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS.names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return COMMANDS.get(cmd_name) if cmd_name in COMMANDS.names else None

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        typed = shlex.join(["peftlab", *args])
        ctx = super().make_context(info_name, args, parent, **extra)
        ctx.meta[COMMAND_KEY] = typed
        return ctx

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if (name := args[0]) not in COMMANDS.names and not name.startswith("-"):
            ctx.fail(f"no command {name!r}. {did_you_mean(name, COMMANDS.names)}")
        return super().resolve_command(ctx, args)


class _Messages(logging.Handler):
    """Shows what the library logs, like a download that is going on."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record), err=True)


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        import peftlab

        click.echo(f"peftlab {peftlab.__version__}")
        ctx.exit()


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 the answer is no or the run failed, 2 the request was wrong.",
)
@click.option(
    "-V",
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_version,
    help="Show the version.",
)
def main() -> None:
    """Which way of fine-tuning fits your model, your task and your hardware, measured."""
    logger = logging.getLogger("peftlab")
    if not any(isinstance(handler, _Messages) for handler in logger.handlers):
        logger.addHandler(_Messages())
        logger.setLevel(logging.INFO)
