"""The verb validate: everything that is wrong with recipes and tasks, short of training. No torch.

What needs the model's architecture (module names, ranks, lengths) is checked when training starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftlab.config import display_path, load_yaml
from peftlab.errors import ConfigError, Problem, UnknownNameError, UserError
from peftlab.experiment.library import Entry, Shelf, find, names, shipped_folder
from peftlab.experiment.resolve import resolve
from peftlab.registry import did_you_mean

_ENDINGS = (".yaml", ".yml")
_STAND_IN = {"methods": "methods/full.yaml", "tasks": "tasks/movie-sentiment.yaml"}


@dataclass(frozen=True)
class Findings:
    """What is wrong, each problem once, and what was left unchecked."""

    problems: tuple[Problem, ...]
    left_out: tuple[str, ...]


def find_one(name: str) -> tuple[Shelf, Entry]:
    """The recipe or task that is called ``name`` or lies at that path, told by its keys.

    Raises:
        UnknownNameError: there is neither, or there are both.
        ConfigError: the file is neither.
    """
    if name.endswith(_ENDINGS):
        path = Path(name)
        if not path.is_file():
            return "tasks", find("tasks", name)
        keys = load_yaml(path).data
        if "method" in keys:
            return "methods", find("methods", name)
        if "kind" in keys or "data" in keys:
            return "tasks", find("tasks", name)
        message = "is no recipe, which has a method, and no task, which has a kind and data."
        raise ConfigError(Problem(display_path(path), message))
    known: dict[Shelf, dict[str, Path]] = {"methods": names("methods"), "tasks": names("tasks")}
    shelves = [shelf for shelf, entries in known.items() if name in entries]
    if len(shelves) == 1:
        return shelves[0], find(shelves[0], name)
    if shelves:
        message = f"{name!r} is a recipe and a task."
        raise UnknownNameError(Problem("", message, "Give the path of the file."))
    near = did_you_mean(name, [*known["methods"], *known["tasks"]])
    raise UnknownNameError(Problem("", f"no recipe or task {name!r}.", near))


def validate(given: Sequence[str], recipe: str | None = None, *, data: bool = True) -> Findings:
    """Check recipes and tasks, by name or path.

    Args:
        recipe: what tasks are checked with; without it each is checked by itself.
        data: read the rows of tasks too.
    """
    problems: list[Problem] = []
    left_out: list[str] = []
    for name in given:
        try:
            shelf, entry = find_one(name)
        except UserError as error:
            problems += error.problems
            continue
        if shelf == "methods":
            stand_in = str(shipped_folder() / _STAND_IN["tasks"])
            problems += _check(stand_in, name, data=False)
            left_out.append(f"{entry.name}: how it goes with your tasks (give one and --recipe).")
            continue
        if recipe is None:
            left_out.append(f"{entry.name}: how it goes with a recipe (give --recipe).")
        partner = recipe or str(shipped_folder() / _STAND_IN["methods"])
        problems += _check(name, partner, data)
        if not data:
            left_out.append(f"{entry.name}: its rows (--no-data).")
    left_out.append("what depends on the model: names of modules, ranks, lengths.")
    return Findings(tuple(dict.fromkeys(problems)), tuple(left_out))


def _check(task: str, recipe: str, data: bool) -> Iterable[Problem]:
    try:
        experiment = resolve(task, recipe).experiment
        if data:
            experiment.build_kind().read()
    except UserError as error:
        return error.problems
    return ()
