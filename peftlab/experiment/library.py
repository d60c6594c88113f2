"""Recipes and tasks by name: a path, then ./recipes, then what peftlab ships. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peftlab.config import Layer, load_yaml
from peftlab.errors import ConfigError, PeftlabError, Problem
from peftlab.registry import unknown

Shelf = Literal["methods", "tasks"]
WORD: dict[Shelf, str] = {"methods": "recipe", "tasks": "task"}
_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class Entry:
    """A recipe or task: its name, its file and the file's content."""

    name: str
    path: Path
    layer: Layer


def shipped_folder() -> Path:
    """Where peftlab's own recipes lie: in the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def folders(shelf: Shelf) -> list[Path]:
    """Folders searched, the user's before the shipped one."""
    mine, shipped = Path("recipes") / shelf, shipped_folder() / shelf
    return [mine, shipped] if mine.resolve() != shipped.resolve() else [shipped]


def names(shelf: Shelf) -> dict[str, Path]:
    """Every name and its file; a user's file hides a shipped one of the same name."""
    found: dict[str, Path] = {}
    for folder in reversed(folders(shelf)):
        for path in sorted(folder.glob("*")):
            if path.suffix in _ENDINGS:
                found[path.stem] = path
    return dict(sorted(found.items()))


def find(shelf: Shelf, name: str) -> Entry:
    """The entry called ``name``, or the file of that path.

    Raises:
        UnknownNameError: with the nearest names.
        ConfigError: the file is not a YAML mapping.
    """
    if name.endswith(_ENDINGS):
        path = Path(name)
        if not path.is_file():
            near = [str(file) for file in path.parent.glob("*") if file.suffix in _ENDINGS]
            raise unknown(f"{WORD[shelf]} file", name, near or names(shelf))
        return Entry(path.stem, path, load_yaml(path))
    known = names(shelf)
    if name not in known:
        raise unknown(WORD[shelf], name, known)
    return Entry(name, known[name], load_yaml(known[name]))


def find_all(shelf: Shelf) -> list[Entry]:
    """Every entry, for lists.

    Raises:
        ConfigError: with the problems of all files that cannot be read.
    """
    entries: list[Entry] = []
    problems: list[Problem] = []
    for name in names(shelf):
        try:
            entries.append(find(shelf, name))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return entries


def find_both(task: str, recipe: str) -> tuple[Entry, Entry]:
    """The task and the recipe; an error names what is wrong with either.

    Raises:
        ConfigError: both are wrong.
        UserError: one is.
    """
    entries: list[Entry] = []
    errors: list[PeftlabError] = []
    problems: list[Problem] = []
    for shelf, name in (("tasks", task), ("methods", recipe)):
        try:
            entries.append(find(shelf, name))  # type: ignore[arg-type]
        except PeftlabError as error:
            errors.append(error)
            problems += getattr(error, "problems", ())
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigError(problems)
    return entries[0], entries[1]
