"""Rows by split, from local files, an embedded set or any ``datasets`` id. No torch here.

Whatever a set calls its columns, a task's rows carry the task's own keys (``text``, ``label``).
Holding out and thinning out follow a fixed hash of what a row says, never its position, so that
the same rows give the same splits on every machine.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peftlab.errors import DataError, Problem
from peftlab.registry import did_you_mean
from peftlab.tasks.base import DataConfig, Row, Split, Splits
from peftlab.tasks.files import Table, few, find_file, read_table

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
HELD_OUT_SHARE = 0.1
_HIDDEN_LABEL = -1


@dataclass(frozen=True)
class Field:
    """One key of a task's rows and how it is made.

    Args:
        key: its name in the row, and the option under ``data`` that says where it comes from.
        columns: the columns of the source that it is made of.
        make: from the columns' values to the row's value; a ValueError tells what is wrong.
        target: it is what the model learns to say, so rows to predict may lack it.
    """

    key: str
    columns: tuple[str, ...]
    make: Callable[..., Any]
    target: bool = False


def as_text(value: Any) -> str:
    """Text as it stands; numbers as they are written.

    Raises:
        ValueError: the value is neither.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise ValueError(f"must be text, got {type(value).__name__}")


def read_splits(
    data: DataConfig, folder: str, fields: Sequence[Field], stratify: str | None = None
) -> Splits:
    """Read, check, hold out and thin out the rows of a task.

    Without a validation or test split, 10% of the training rows are held out for each, equal
    inputs together. ``max_train_rows`` and ``max_eval_rows`` keep a deterministic subset; a smaller
    subset is part of every larger one.

    Args:
        folder: where relative paths start, before the working directory.
        stratify: key of the row whose shares are kept when holding out and thinning out.

    Returns:
        Splits without ``labels``; the fingerprint covers every row that is used.

    Raises:
        DataError: every missing file and column, empty value and empty split at once.
    """
    tables, notes, problems = _tables(data, folder, fields)
    rows: dict[Split, list[Row]] = {}
    for split, table in tables.items():
        rows[split], wrong = _rows(table, fields, split)
        problems += wrong or _empty(rows[split], table.name)
    if problems:
        raise DataError(problems)
    inputs = [field.key for field in fields if not field.target] or [field.key for field in fields]
    if missing := [split for split in SPLITS if split not in rows]:
        rows |= _hold_out(rows["train"], missing, inputs, stratify)
        notes += [
            f"{split}: 10% of the training rows, held out by a fixed hash (none was given)."
            for split in missing
        ]
        if empty := [split for split in SPLITS if not rows[split]]:
            message = f"too few different training inputs to hold out {' and '.join(missing)} rows."
            raise DataError(Problem(tables["train"].name, message, f"Empty: {', '.join(empty)}."))
    for split in SPLITS:
        limit = data.max_train_rows if split == "train" else data.max_eval_rows
        if limit is not None and limit < len(rows[split]):
            kept = sorted(_order(rows[split], inputs, stratify)[:limit])
            rows[split] = [rows[split][index] for index in kept]
    seen = {_digest(row, inputs) for row in rows["train"]}
    if both := sum(_digest(row, inputs) in seen for row in rows["test"]):
        notes.append(f"{both} of {len(rows['test'])} test inputs also occur in training.")
    used = hashlib.sha256(_canonical([rows[split] for split in SPLITS]))
    return Splits(
        train=rows["train"],
        validation=rows["validation"],
        test=rows["test"],
        fingerprint=used.hexdigest(),
        notes=tuple(notes),
    )


def read_rows(path: str | Path, fields: Sequence[Field]) -> list[Row]:
    """Rows to predict from a file; targets are read where the file has them.

    Raises:
        DataError: as ``read_splits``.
    """
    table = read_table(find_file(str(path), ".", ""))
    present = [
        field for field in fields if not field.target or set(field.columns) <= set(table.columns)
    ]
    rows, problems = _rows(table, present, "row")
    if problems := problems or _empty(rows, table.name):
        raise DataError(problems)
    return rows


def _empty(rows: Sequence[Row], name: str) -> list[Problem]:
    return [] if rows else [Problem(name, "holds no rows.")]


def _tables(
    data: DataConfig, folder: str, fields: Sequence[Field]
) -> tuple[dict[Split, Table], list[str], list[Problem]]:
    if data.dataset is not None:
        tables, notes = _dataset_tables(data, fields)
        return tables, notes, []
    tables = {}
    problems = [
        Problem(f"data.{option}", "is only for a dataset, not for files.")
        for option in ("dataset_config", "revision")
        if getattr(data, option) is not None
    ]
    for split in SPLITS:
        if (name := getattr(data, split)) is None:
            continue
        try:
            tables[split] = read_table(find_file(name, folder, f"data.{split}"))
        except DataError as error:
            problems += error.problems
    return tables, [], problems


def _dataset_tables(
    data: DataConfig, fields: Sequence[Field]
) -> tuple[dict[Split, Table], list[str]]:
    """The splits of a named data set; ``data.train`` and the like name other splits of it."""
    from peftlab.tasks.embedded import EMBEDDED_DATASETS

    name = cast(str, data.dataset)
    embedded = name in EMBEDDED_DATASETS
    if embedded and (data.dataset_config is not None or data.revision is not None):
        message = f"{name} is embedded: it has neither dataset_config nor revision."
        raise DataError(Problem("data.dataset", message))
    found = _embedded(name) if embedded else _load_dataset(data)
    chosen = {split: getattr(data, split) or split for split in SPLITS}
    problems = [
        Problem(f"data.{split}", f"{name} has no split {source!r}.", did_you_mean(source, found))
        for split, source in chosen.items()
        if source not in found and (getattr(data, split) is not None or split == "train")
    ]
    if problems:
        raise DataError(problems)
    targets = [column for field in fields if field.target for column in field.columns]
    tables: dict[Split, Table] = {}
    notes = []
    for split, source in chosen.items():
        if source not in found:
            continue
        title = f"{name}[{source}]"
        table = (
            _embedded_table(title, found[source]) if embedded else _hub_table(title, found[source])
        )
        if getattr(data, split) is None and _labels_hidden(table, targets):
            notes.append(f"{title} is not used: its labels are hidden.")
        else:
            tables[split] = table
    return tables, notes


def _embedded(name: str) -> Mapping[str, Any]:
    from peftlab.tasks.embedded import read_embedded

    return {str(split): rows for split, rows in read_embedded(name).items()}


def _load_dataset(data: DataConfig) -> Mapping[str, Any]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        found: Mapping[str, Any] = datasets.load_dataset(
            data.dataset, name=data.dataset_config, revision=data.revision
        )
    except (DatasetsError, OSError, ValueError) as error:
        from peftlab.tasks.embedded import EMBEDDED_DATASETS

        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        message = f"the data set {data.dataset!r} cannot be loaded: {reason}."
        hint = f"Embedded sets need no network: {', '.join(sorted(EMBEDDED_DATASETS))}."
        raise DataError(Problem("data.dataset", message, hint)) from None
    return found


def _embedded_table(title: str, rows: list[dict[str, Any]]) -> Table:
    places = [f"{title}, row {index}" for index in range(1, len(rows) + 1)]
    return Table(title, tuple(dict.fromkeys(key for row in rows for key in row)), rows, places)


def _hub_table(title: str, rows: Any) -> Table:
    """A split as a table, class indices by name; -1 stays, as sets write a hidden label."""
    names = {
        column: feature.names
        for column, feature in rows.features.items()
        if type(feature).__name__ == "ClassLabel"
    }
    plain = [
        row
        | {
            column: classes[row[column]]
            for column, classes in names.items()
            if row[column] is not None and row[column] != _HIDDEN_LABEL
        }
        for row in rows.to_list()
    ]
    places = [f"{title}, row {index}" for index in range(1, len(plain) + 1)]
    return Table(title, tuple(rows.column_names), plain, places)


def _labels_hidden(table: Table, targets: Sequence[str]) -> bool:
    hidden = {_HIDDEN_LABEL}
    return any({row.get(column) for row in table.rows} == hidden for column in targets)


def _rows(table: Table, fields: Sequence[Field], split: str) -> tuple[list[Row], list[Problem]]:
    """The task's rows of a table, or all that is wrong with them."""
    problems = []
    for field in fields if table.rows else ():
        for column in field.columns:
            if column not in table.columns:
                near = did_you_mean(column, table.columns)
                hint = f"{near} Columns: {', '.join(table.columns)}."
                if near.startswith("Known"):
                    hint = f"Columns: {', '.join(table.columns)}."
                message = f"has no column {column!r} (data.{field.key})."
                problems.append(Problem(table.name, message, hint))
    if problems:
        return [], problems
    ids = _ids(table, split)
    rows: list[Row] = []
    for row, place, row_id in zip(table.rows, table.places, ids, strict=True):
        made: dict[str, Any] = {"id": row_id}
        for field in fields:
            values = [row.get(column) for column in field.columns]
            empty = [c for c, value in zip(field.columns, values, strict=True) if _missing(value)]
            problems += [Problem(place, f"column {column!r} is empty.") for column in empty]
            if empty:
                continue
            try:
                made[field.key] = field.make(*values)
            except ValueError as error:
                shown = ", ".join(repr(column) for column in field.columns)
                problems.append(Problem(place, f"column {shown} {error}."))
        rows.append(made)
    return rows, few(problems, table.name)


def _missing(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value)) or value == []


def _ids(table: Table, split: str) -> list[str]:
    own = [row.get("id") for row in table.rows]
    ids = [str(value) for value in own]
    if all(not _missing(value) for value in own) and len(set(ids)) == len(ids):
        return ids
    return [f"{split}-{index}" for index in range(len(ids))]


def _canonical(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def _digest(row: Row, keys: Sequence[str]) -> str:
    return hashlib.sha256(_canonical([row.get(key) for key in keys])).hexdigest()


def _order(rows: Sequence[Row], inputs: Sequence[str], stratify: str | None) -> list[int]:
    """All row numbers in an order whose every beginning has about the shares of the whole."""
    strata: dict[Any, list[tuple[str, int]]] = defaultdict(list)
    for index, row in enumerate(rows):
        strata[row[stratify] if stratify else None].append((_digest(row, inputs), index))
    placed = [
        ((rank + 0.5) / len(stratum), digest, index)
        for stratum in strata.values()
        for rank, (digest, index) in enumerate(sorted(stratum))
    ]
    return [index for _, _, index in sorted(placed)]


def _hold_out(
    rows: Sequence[Row], names: Sequence[Split], inputs: Sequence[str], stratify: str | None
) -> dict[Split, list[Row]]:
    """10% of the distinct inputs for each name, the rest for training; equal inputs together."""
    digests = [_digest(row, inputs) for row in rows]
    first: dict[str, int] = {}
    for index, digest in enumerate(digests):
        first.setdefault(digest, index)
    distinct = list(first.values())
    order = _order([rows[index] for index in distinct], inputs, stratify)
    share = max(1, round(HELD_OUT_SHARE * len(distinct)))
    owner: dict[str, Split] = {}
    for number, name in enumerate(names):
        for position in order[number * share : (number + 1) * share]:
            owner[digests[distinct[position]]] = name
    result: dict[Split, list[Row]] = {split: [] for split in ("train", *names)}
    for row, digest in zip(rows, digests, strict=True):
        result[owner.get(digest, "train")].append(row)
    return result
