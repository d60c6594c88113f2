"""What commands print: the answer on stdout, errors on stderr, from the main process only."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import IO, Any

import click

from peftlab.errors import PeftlabError, Problem, UserError
from peftlab.files import finite

JSON_KEY, COMMAND_KEY = "peftlab.json", "peftlab.command"
INTERRUPTED = 130
"""The exit code of a process that was interrupted: 128 + SIGINT."""


def is_main_process() -> bool:
    """Whether this is the one process, of those that a launcher started, that prints."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK"))


def json_wanted() -> bool:
    """Whether the command was given --json."""
    ctx = click.get_current_context(silent=True)
    return bool(ctx and ctx.meta.get(JSON_KEY))


def typed_command() -> str:
    """What the user typed, for records."""
    return str(click.get_current_context().meta[COMMAND_KEY])


def say(text: str = "", *, err: bool = False) -> None:
    """Print for people: on stdout, or on stderr where stdout is for JSON."""
    if is_main_process():
        click.echo(text, err=err or json_wanted())


def people_stream() -> IO[str]:
    """Where ``say`` prints, for writers that want a stream."""
    return sys.stderr if json_wanted() else sys.stdout


def answer(value: Any) -> None:
    """Print the command's answer as one JSON object if that is asked for."""
    if json_wanted() and is_main_process():
        click.echo(json.dumps(finite(value), indent=2))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Left-aligned columns, the last as wide as it likes; nothing is cut, so it can be piped."""
    lines = [tuple(headings), *map(tuple, rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def problems_json(problems: Iterable[Problem]) -> list[dict[str, str]]:
    """Problems as scripts read them; the hint is part of the message."""
    return [
        {"where": problem.where, "message": f"{problem.message} {problem.hint}".strip()}
        for problem in problems
    ]


def show_error(error: PeftlabError) -> None:
    """One line a problem on stderr; as JSON too if that is asked for."""
    wrong = isinstance(error, UserError)
    problems = error.problems if isinstance(error, UserError) else (Problem("", str(error)),)
    # A wrong request is wrong in every process, but a run may fail in any one of them.
    if is_main_process() or not wrong:
        for problem in problems:
            click.echo(f"error: {problem}", err=True)
    answer({"error": {"problems": problems_json(problems)}})
