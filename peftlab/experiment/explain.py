"""The resolved experiment for people: every value with where it came from. No torch here."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from peftlab.config import Config, KeyPath, display_path, origin_of
from peftlab.experiment.resolve import Resolved
from peftlab.experiment.schema import Experiment

DEFAULT = "default"
_WIDE = 4096
_COMMENT_COLUMN = 44


def value_origins(resolved: Resolved) -> dict[KeyPath, str]:
    """The key path of every value and its origin: a file and line, an option or "default"."""
    experiment = resolved.experiment
    task_path = display_path(resolved.task_entry.path)
    known: dict[KeyPath, str] = {
        ("task",): task_path,
        ("recipe",): display_path(resolved.recipe_entry.path),
        ("folder",): task_path,
    }
    if experiment.seed and ("seed",) not in resolved.origins:
        known["seed",] = "--seed"
    return {
        path: known.get(path) or _origin(path, value, resolved)
        for path, value in _leaves(_content(experiment))
    }


def annotated_yaml(experiment: Experiment, origins: Mapping[KeyPath, str]) -> str:
    """Block-style YAML 1.2 whose comments are the origins."""
    return "\n".join(_lines(_content(experiment), (), origins)) + "\n"


def _content(experiment: Experiment) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(experiment.model_dump_json())
    return content


def _leaves(data: Mapping[str, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _origin(path: KeyPath, value: Any, resolved: Resolved) -> str:
    if (exact := resolved.origins.get(path)) is not None:
        return str(exact)
    section = getattr(resolved.experiment, path[0])
    if isinstance(section, Config) and len(path) == 2:
        default = type(section).model_fields[path[1]].get_default(call_default_factory=True)
        as_json = list(default) if isinstance(default, tuple) else default
        # A value that is not the default was written under another name of its key.
        if as_json != value and (origin := origin_of(path, resolved.origins)) is not None:
            return str(origin)
    return DEFAULT


def _lines(data: Mapping[str, Any], path: KeyPath, origins: Mapping[KeyPath, str]) -> Iterator[str]:
    indent = "  " * len(path)
    for key, value in data.items():
        at = (*path, key)
        if isinstance(value, Mapping) and value:
            yield f"{indent}{_inline(key)}:"
            yield from _lines(value, at, origins)
        else:
            line = f"{indent}{_inline(key)}: {_inline(value)}"
            yield f"{line:<{_COMMENT_COLUMN}}  # {origins[at]}"


def _inline(value: Any) -> str:
    """A value on one line, quoted where YAML 1.2 would read it otherwise."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = True
    yaml.width = _WIDE
    stream = io.StringIO()
    # Inside a list every value is written as it must be inside flow style.
    yaml.dump([value], stream)
    return stream.getvalue().strip().removeprefix("[").removesuffix("]")
