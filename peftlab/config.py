"""Strict frozen configuration, YAML 1.2 with line numbers, layers and ``--set`` overrides.

A configuration is a stack of layers (defaults, task, recipe, overrides). ``merge`` folds them and
keeps for every value the file and line it came from, so that an error names the line to mend.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from peftlab.errors import ConfigError, Problem
from peftlab.registry import did_you_mean

KeyPath = tuple[str, ...]
ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """Base of every configuration section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=()
    )


@dataclass(frozen=True)
class Origin:
    """Where a value was written. ``line`` counts from 1 and is None outside files."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Layer:
    """A nested mapping, and the origin of each of its keys."""

    data: Mapping[str, Any]
    origins: Mapping[KeyPath, Origin] = field(default_factory=dict)


def display_path(path: Path) -> str:
    """The path relative to the working directory where it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def load_yaml(path: Path) -> Layer:
    """Read a YAML 1.2 mapping with the line of each key.

    Raises:
        ConfigError: unreadable, not YAML, a key twice, or not a mapping.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    shown = display_path(path)
    try:
        document = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(Problem(shown, f"cannot be read: {error}.")) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = str(Origin(shown, mark.line + 1)) if mark else shown
        problem = (error.problem or "malformed").splitlines()[0]
        raise ConfigError(Problem(where, f"is not valid YAML: {problem}.")) from None
    except YAMLError as error:
        raise ConfigError(Problem(shown, f"is not valid YAML: {error}.")) from None
    if not isinstance(document, Mapping):
        raise ConfigError(Problem(shown, "must hold keys and values, like 'summary: ...'."))
    origins: dict[KeyPath, Origin] = {}
    data = _plain(document, (), shown, origins)
    return Layer(data, origins)


def _plain(node: Any, path: KeyPath, source: str, origins: dict[KeyPath, Origin]) -> Any:
    """The parser's annotated node as builtin types; collects the lines on the way."""
    if isinstance(node, Mapping):
        plain = {}
        for key, value in node.items():
            where = (*path, str(key))
            origins[where] = Origin(source, node.lc.key(key)[0] + 1)  # type: ignore[attr-defined]
            plain[str(key)] = _plain(value, where, source, origins)
        return plain
    if isinstance(node, list):
        return [_plain(value, path, source, origins) for value in node]
    for builtin in (bool, int, float):
        if isinstance(node, builtin):
            return builtin(node)
    return node if node is None else str(node)


def parse_overrides(overrides: Iterable[str]) -> Layer:
    """``["optim.learning_rate=1e-4"]`` as a layer; values are read as YAML 1.2.

    Raises:
        ConfigError: naming every override that is not ``section.key=value``.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    data: dict[str, Any] = {}
    origins: dict[KeyPath, Origin] = {}
    problems = []
    for override in overrides:
        dotted, separator, text = override.partition("=")
        path = tuple(part.strip() for part in dotted.split("."))
        where = f"--set {override}"
        if not separator or not all(path):
            message = "is not of the form key=value."
            problems.append(Problem(where, message, "For example: --set optim.learning_rate=1e-4"))
            continue
        try:
            value = YAML(typ="safe", pure=True).load(text)
        except YAMLError:
            problems.append(Problem(where, "the value is not valid YAML.", "Quote it."))
            continue
        target = data
        for key in path[:-1]:
            if not isinstance(target.setdefault(key, {}), dict):
                target[key] = {}
            target = target[key]
        target[path[-1]] = value
        origins[path] = Origin(where)
    if problems:
        raise ConfigError(problems)
    return Layer(data, origins)


def merge(layers: Iterable[Layer]) -> Layer:
    """Fold layers, the last one winning key by key; lists and scalars are replaced whole."""
    data: dict[str, Any] = {}
    origins: dict[KeyPath, Origin] = {}
    for layer in layers:
        data = _merged(data, layer.data)
        origins.update(layer.origins)
    return Layer(data, origins)


def _merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(lower)
    for key, value in upper.items():
        below = result.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        result[key] = _merged(below, value) if both else value  # type: ignore[arg-type]
    return result


def origin_of(path: KeyPath, origins: Mapping[KeyPath, Origin]) -> Origin | None:
    """The origin of the longest known prefix of ``path``."""
    for length in range(len(path), 0, -1):
        if (origin := origins.get(path[:length])) is not None:
            return origin
    return None


def locate(path: KeyPath, origins: Mapping[KeyPath, Origin]) -> str:
    """``recipes/methods/lora.yaml:4`` or, for a default, the dotted key."""
    origin = origin_of(path, origins)
    return str(origin) if origin else ".".join(path)


def validate_section(
    schema: type[ConfigT],
    data: Any,
    path: KeyPath,
    origins: Mapping[KeyPath, Origin],
) -> tuple[ConfigT | None, list[Problem]]:
    """Check one section strictly: text is no number, 1 is no boolean.

    Returns:
        the section, or None with everything that is wrong in it.
    """
    try:
        # JSON mode is strict about types yet takes a list for a tuple, as YAML writes them.
        return schema.model_validate_json(json.dumps(data), strict=True), []
    except ValidationError as error:
        details = error.errors(include_url=False)
        return None, [_problem(schema, detail, path, origins) for detail in details]


def _problem(
    schema: type[Config], detail: Any, path: KeyPath, origins: Mapping[KeyPath, Origin]
) -> Problem:
    # Union members and list positions in pydantic's location are no keys that a user wrote.
    inside, owner = _walk(schema, detail["loc"])
    key_path = (*path, *inside)
    where, dotted, key = locate(key_path, origins), ".".join(key_path), key_path[-1]
    if detail["type"] == "extra_forbidden":
        known = list(owner.model_fields) if owner else []
        return Problem(where, f"unknown key {dotted!r}.", did_you_mean(key, known))
    if detail["type"] == "missing":
        return Problem(where, f"{dotted} is missing.")
    got = detail.get("input")
    shown = "" if isinstance(got, (dict, list)) else f", got {got!r}"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return Problem(where, f"{dotted}: {message.rstrip('.')}{shown}.")


def _walk(
    schema: type[Config], location: tuple[Any, ...]
) -> tuple[KeyPath, type[BaseModel] | None]:
    """The keys of an error location, and the schema that owns the last of them."""
    keys: list[str] = []
    owner: type[BaseModel] | None = schema
    current: type[BaseModel] | None = schema
    for part in location:
        if not isinstance(part, str):
            continue
        if current is None and keys:
            break
        owner = current
        keys.append(part)
        field_info = current.model_fields.get(part) if current else None
        current = _model_in(field_info.annotation) if field_info else None
    return tuple(keys), owner


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            if (model := _model_in(argument)) is not None:
                return model
    return None
