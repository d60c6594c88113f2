"""The base of all commands: expected errors become messages and exit codes, help has examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from peftlab.cli.output import INTERRUPTED, say, show_error
from peftlab.errors import PeftlabError


class Verb(click.Command):
    """A command. What it raises on purpose ends it with a message, anything else is a bug.

    Args:
        examples: command lines that work, shown at the end of ``--help``.
    """

    def __init__(self, *args: Any, examples: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PeftlabError as error:
            show_error(error)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            say("interrupted.", err=True)
            ctx.exit(INTERRUPTED)
