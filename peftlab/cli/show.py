"""peftlab show: a recipe or a task, or what both become together."""

from __future__ import annotations

import click

from peftlab.cli.base import Verb
from peftlab.cli.options import json_option, model_option, seed_option, set_option
from peftlab.cli.output import answer, say


@click.command(
    cls=Verb,
    examples=[
        "peftlab show lora",
        "peftlab show movie-sentiment --recipe lora",
        "peftlab show movie-sentiment --recipe lora --set method.r=16 --json",
    ],
)
@click.argument("name")
@click.option("--recipe", "-r", help="Resolve the task with this recipe.")
@model_option
@seed_option
@set_option
@json_option
def show(
    name: str, recipe: str | None, model: str | None, seed: int, overrides: tuple[str, ...]
) -> None:
    """Show a recipe, a task, or both resolved.

    Without --recipe it prints the file of NAME, with it the resolved experiment. The resolved
    experiment is YAML, each value with the file and line, or the option, that it came from.
    """
    if recipe is None:
        if model is not None or seed or overrides:
            raise click.UsageError("--model, --seed and --set need --recipe.")
        _show_file(name)
    else:
        _show_resolved(name, recipe, model, seed, overrides)


def _show_file(name: str) -> None:
    from peftlab.config import display_path
    from peftlab.experiment.library import WORD
    from peftlab.experiment.validate import find_one

    shelf, entry = find_one(name)
    path = display_path(entry.path)
    answer({"name": entry.name, "what": WORD[shelf], "path": path, "content": entry.layer.data})
    say(f"# {WORD[shelf]}: {path}\n{entry.path.read_text(encoding='utf-8').rstrip()}")


def _show_resolved(
    task: str, recipe: str, model: str | None, seed: int, overrides: tuple[str, ...]
) -> None:
    from peftlab.experiment.explain import annotated_yaml, value_origins
    from peftlab.experiment.resolve import resolve

    resolved = resolve(task, recipe, model=model, seed=seed, overrides=overrides)
    origins = value_origins(resolved)
    answer(
        {
            "experiment": resolved.experiment.model_dump(mode="json"),
            "origins": {".".join(path): origin for path, origin in origins.items()},
        }
    )
    say(annotated_yaml(resolved.experiment, origins).rstrip())


COMMAND = show
