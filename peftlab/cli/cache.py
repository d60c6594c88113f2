"""peftlab cache: the kept activations of frozen trunks."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from peftlab.cli.base import Verb
from peftlab.cli.options import json_option
from peftlab.cli.output import answer, say, table
from peftlab.errors import AssetError, Problem
from peftlab.units import format_bytes


@click.command(
    cls=Verb,
    examples=["peftlab cache ls", "peftlab cache ls --json", "peftlab cache clear"],
)
@click.argument("action", type=click.Choice(["ls", "clear"]))
@click.argument("keys", nargs=-1)
@json_option
def cache(action: str, keys: tuple[str, ...]) -> None:
    """List or clear the activations that runs kept of frozen blocks.

    KEYS are starts of keys as ls shows them; without any, all are meant. A run computes again what
    it does not find, and one that is going on keeps what it has open. The folder is
    PEFTLAB_TRUNK_CACHE, or 'trunk' in PEFTLAB_CACHE or the user's cache folder.
    """
    from peftlab.trunk.store import clear, find, trunk_cache_dir

    folder = str(trunk_cache_dir())
    try:
        chosen = find(keys) if action == "ls" else clear(keys)
    except OSError as error:
        problem = Problem(folder, f"cannot be read or cleared: {error.strerror or error}.")
        raise AssetError(problem) from error
    listed: list[dict[str, Any]] = [
        {
            "key": entry.key,
            "model": entry.description["model"],
            "boundary": entry.description["boundary"],
            "rows": entry.rows,
            "stored_bytes": entry.stored_bytes,
            "used": datetime.fromtimestamp(entry.used, UTC).isoformat(timespec="seconds"),
        }
        for entry in chosen
    ]
    word = "trunks" if action == "ls" else "cleared"
    answer({"folder": folder, word: listed})
    rows = [
        [row["key"][:12], row["model"], row["boundary"], str(row["rows"])]
        + [format_bytes(row["stored_bytes"]), row["used"]]
        for row in listed
    ]
    if rows:
        say(table(["key", "model", "boundary", "rows", "size", "last used"], rows) + "\n")
    total = format_bytes(sum(entry.stored_bytes for entry in chosen))
    trunks = f"{len(chosen)} {'trunk' if len(chosen) == 1 else 'trunks'}"
    say(f"{'' if action == 'ls' else 'cleared '}{trunks}, {total}, in {folder}")


COMMAND = cache
