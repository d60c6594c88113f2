"""From names and overrides to an experiment, with the origin of every value. No torch here.

Overrides win over the recipe, the recipe over the task, the task over defaults.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.config import (
    Config,
    KeyPath,
    Layer,
    Origin,
    display_path,
    locate,
    merge,
    parse_overrides,
    validate_section,
)
from peftlab.errors import ConfigError, Problem, UnknownNameError
from peftlab.experiment.checks import check
from peftlab.experiment.library import Entry, find, find_both
from peftlab.experiment.schema import Experiment
from peftlab.methods import METHODS
from peftlab.models.config import ModelConfig, PrecisionConfig
from peftlab.optim.config import OptimConfig
from peftlab.registry import Registry, did_you_mean
from peftlab.tasks import TASK_KINDS
from peftlab.tasks.base import DataConfig
from peftlab.training.config import TrainConfig

RECIPE_KEYS = ("summary", "method", "optim", "precision", "train")
TASK_KEYS = ("summary", "kind", "model", "data", "metric", "train")
_SECTIONS = ("model", "data", "method", "optim", "precision", "train")
_SETTABLE = (*_SECTIONS, "kind", "metric", "seed")


@dataclass(frozen=True)
class Resolved:
    """An experiment and where each of its values came from."""

    experiment: Experiment
    origins: Mapping[KeyPath, Origin]
    task_entry: Entry
    recipe_entry: Entry


def resolve(
    task: str,
    recipe: str,
    *,
    model: str | None = None,
    seed: int = 0,
    overrides: Iterable[str] = (),
) -> Resolved:
    """Find, merge and check.

    Args:
        task: name or path of a task.
        recipe: name or path of a recipe.
        model: in place of the task's default model.
        overrides: ``section.key=value`` texts.

    Raises:
        UserError: with every problem found.
    """
    return _resolve(*find_both(task, recipe), model, seed, overrides)


def resolve_shape(kind: str, model: str, recipe: str, overrides: Iterable[str] = ()) -> Resolved:
    """As ``resolve``, for a task kind without a task: the experiment has no data to read.

    Raises:
        UserError: with every problem found.
    """
    task = Entry(kind, Path(kind), Layer({"kind": kind}, {("kind",): Origin("--task-kind")}))
    data = TASK_KINDS.get(kind, "--task-kind").Config.model_construct()
    return _resolve(task, find("methods", recipe), model, 0, overrides, data)


def _resolve(
    task_entry: Entry,
    recipe_entry: Entry,
    model: str | None,
    seed: int,
    overrides: Iterable[str],
    data: DataConfig | None = None,
) -> Resolved:
    flags: dict[str, Any] = {"seed": seed}
    flag_origins: dict[KeyPath, Origin] = {}
    if model is not None:
        flags["model"] = {"model_name_or_path": model}
        flag_origins["model", "model_name_or_path"] = Origin("--model")
    overridden = _normalised(parse_overrides(overrides))
    layers = [
        _normalised(task_entry.layer),
        _normalised(recipe_entry.layer),
        Layer(flags, flag_origins),
        overridden,
    ]
    problems = [
        *_unknown_keys(task_entry, TASK_KEYS),
        *_unknown_keys(recipe_entry, RECIPE_KEYS),
        *_unsettable(overridden),
    ]
    merged = merge(layers)
    experiment, found = _build(merged, task_entry, recipe_entry, data)
    problems += found
    if problems:
        raise ConfigError(problems)
    assert experiment is not None
    return Resolved(experiment, merged.origins, task_entry, recipe_entry)


def _normalised(layer: Layer) -> Layer:
    """``model: minilm`` as the mapping it stands for."""
    if not isinstance(model := layer.data.get("model"), str):
        return layer
    origins = dict(layer.origins)
    if ("model",) in origins:
        origins["model", "model_name_or_path"] = origins["model",]
    return Layer({**layer.data, "model": {"model_name_or_path": model}}, origins)


def _unknown_keys(entry: Entry, known: tuple[str, ...]) -> list[Problem]:
    return [
        Problem(
            locate((key,), entry.layer.origins), f"unknown key {key!r}.", did_you_mean(key, known)
        )
        for key in entry.layer.data
        if key not in known
    ]


def _unsettable(layer: Layer) -> list[Problem]:
    return [
        Problem(
            next(str(origin) for path, origin in layer.origins.items() if path[0] == key),
            f"unknown section {key!r}.",
            did_you_mean(key, _SETTABLE),
        )
        for key in layer.data
        if key not in _SETTABLE
    ]


def _build(
    merged: Layer, task: Entry, recipe: Entry, rows: DataConfig | None
) -> tuple[Experiment | None, list[Problem]]:
    """The experiment, or all that is wrong; ``rows`` stands in for the data section."""
    data, origins = merged.data, merged.origins
    problems: list[Problem] = []
    for key, entry in (("kind", task), ("model", task), ("data", task), ("method", recipe)):
        if data.get(key) is None and not (key == "data" and rows is not None):
            where = locate((key,), origins) if key in data else display_path(entry.path)
            problems.append(Problem(where, f"{key} is missing."))
    kind = _registered(TASK_KINDS, data.get("kind"), ("kind",), origins, problems)
    method_data = data.get("method")
    method_kind = method_data.get("kind") if isinstance(method_data, Mapping) else None
    if method_data is not None and method_kind is None:
        hint = did_you_mean("", METHODS.names)
        problems.append(Problem(locate(("method",), origins), "method has no kind.", hint))
    method = _registered(METHODS, method_kind, ("method", "kind"), origins, problems)
    schemas: dict[str, type[Config] | None] = {
        "model": ModelConfig,
        "data": kind.Config if kind and rows is None else None,
        "method": method.Config if method else None,
        "optim": OptimConfig,
        "precision": PrecisionConfig,
        "train": TrainConfig,
    }
    sections: dict[str, Any] = {} if rows is None else {"data": rows}
    for name, schema in schemas.items():
        if schema is None or (name in ("model", "data") and data.get(name) is None):
            continue
        section, found = validate_section(schema, data.get(name, {}), (name,), origins)
        problems += found
        sections[name] = section
    metric = data.get("metric", kind.traits.metrics[0] if kind else "")
    if not isinstance(metric, str):
        problems.append(Problem(locate(("metric",), origins), f"{metric!r} is no metric's name."))
    if problems or kind is None or method is None:
        return None, problems
    experiment = Experiment.model_construct(
        task=task.name,
        recipe=recipe.name,
        kind=str(data["kind"]),
        folder=str(task.path.resolve().parent),
        metric=metric,
        seed=data["seed"],
        **sections,
    )
    return experiment, check(experiment, kind.traits, method.traits, origins)


def _registered(
    registry: Registry[Any],
    name: Any,
    path: KeyPath,
    origins: Mapping[KeyPath, Origin],
    problems: list[Problem],
) -> Any:
    if name is None:
        return None
    try:
        return registry.get(str(name), locate(path, origins))
    except UnknownNameError as error:
        problems += error.problems
        return None
