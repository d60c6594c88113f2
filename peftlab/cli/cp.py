"""peftlab cp: a recipe or task to change, the way to extend peftlab."""

from __future__ import annotations

from pathlib import Path

import click

from peftlab.cli.base import Verb
from peftlab.cli.output import say


@click.command(
    cls=Verb,
    examples=[
        "peftlab cp lora my-lora",
        "peftlab cp movie-sentiment my-task",
        "peftlab cp ptuning-v2 experiments/prefix.yaml",
    ],
)
@click.argument("name")
@click.argument("dest", required=False)
def cp(name: str, dest: str | None) -> None:
    """Copy a recipe or task, to change it.

    DEST is a name, which goes to ./recipes where peftlab finds it, or a path ending in .yaml. By
    default the copy keeps its name and hides the one that comes with peftlab.
    """
    from peftlab.config import display_path
    from peftlab.errors import ConfigError, Problem
    from peftlab.experiment.library import WORD
    from peftlab.experiment.validate import find_one
    from peftlab.files import write_text

    shelf, entry = find_one(name)
    if dest is not None and dest.endswith((".yaml", ".yml")):
        target = Path(dest)
    else:
        target = Path("recipes") / shelf / f"{dest or entry.name}.yaml"
    if target.exists():
        hint = f"Give the copy another name: peftlab cp {name} my-{target.stem}"
        raise ConfigError(Problem(display_path(target), "is there already.", hint))
    write_text(target, entry.path.read_text(encoding="utf-8"))
    say(f"copied the {WORD[shelf]} {entry.name} to {target}")
    in_library = target.parent == Path("recipes") / shelf
    new_name = target.stem if in_library else str(target)
    if shelf == "methods":
        say("edit: summary, method and optim (the learning rate most of all).")
        say(f"next: peftlab validate {new_name}")
    else:
        say("edit: summary, kind, data (files or a dataset, and its columns), metric and train.")
        say(f"next: peftlab validate {new_name} --recipe lora")


COMMAND = cp
