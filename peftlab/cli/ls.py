"""peftlab ls: what there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from peftlab.cli.base import Verb
from peftlab.cli.options import json_option
from peftlab.cli.output import answer, say, table

Listing = list[dict[str, Any]]


def _recipes() -> Listing:
    from peftlab.experiment.library import find_all

    found = []
    for entry in find_all("methods"):
        method, summary = entry.layer.data.get("method"), entry.layer.data.get("summary")
        kind = method.get("kind") if isinstance(method, Mapping) else None
        found.append({"name": entry.name, "method": kind, "summary": summary})
    return found


def _tasks() -> Listing:
    from peftlab.experiment.library import find_all

    return [
        {
            "name": entry.name,
            "kind": entry.layer.data.get("kind"),
            "summary": entry.layer.data.get("summary"),
        }
        for entry in find_all("tasks")
    ]


def _models() -> Listing:
    from peftlab.models.embedded import embedded_models

    return [
        {"name": model.name, "source": model.source, "summary": model.summary}
        for model in embedded_models().values()
    ]


_LISTS: Mapping[str, tuple[Callable[[], Listing], tuple[str, ...]]] = {
    "recipes": (_recipes, ("name", "method", "summary")),
    "tasks": (_tasks, ("name", "kind", "summary")),
    "models": (_models, ("name", "source", "summary")),
}


@click.command(
    cls=Verb,
    examples=["peftlab ls", "peftlab ls recipes", "peftlab ls tasks --json"],
)
@click.argument("what", required=False, type=click.Choice(list(_LISTS)))
@json_option
def ls(what: str | None) -> None:
    """List recipes, tasks and embedded models.

    Recipes and tasks are those of ./recipes and those that come with peftlab. A model may also be a
    local folder or a hub id.
    """
    chosen = [what] if what else list(_LISTS)
    listings = {name: _LISTS[name][0]() for name in chosen}
    answer(listings)
    for name, rows in listings.items():
        columns = _LISTS[name][1]
        headings = [name, *columns[1:]]
        say(table(headings, [[str(row[key] or "–") for key in columns] for row in rows]) + "\n")


COMMAND = ls
