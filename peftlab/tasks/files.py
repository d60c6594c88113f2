"""Local files of rows: CSV, TSV, JSON, JSON lines and Parquet, each row with its place."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.config import display_path
from peftlab.errors import DataError, Problem
from peftlab.registry import did_you_mean

_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Table:
    """The raw rows of one file or of one split of a data set.

    Args:
        name: what messages call it.
        columns: all column names; a row may lack some.
        rows: column name to value.
        places: of each row, for messages: ``reviews.csv:12``.
    """

    name: str
    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    places: list[str]


def few(problems: list[Problem], name: str) -> list[Problem]:
    """The first problems with the rows of ``name``, and the number of the others."""
    rest = len(problems) - _SHOWN_PROBLEMS
    if rest <= 0:
        return problems
    return [*problems[:_SHOWN_PROBLEMS], Problem(name, f"and {rest} more rows like these.")]


def find_file(name: str, folder: str, where: str) -> Path:
    """``name`` beside the task's file, or in the working directory.

    Raises:
        DataError: there is no such file, with the nearest one beside where it should be.
    """
    beside = Path(folder) / name
    for path in (beside, Path(name)):
        if path.is_file():
            return path
    message = f"there is no file {display_path(beside)}."
    if not beside.parent.is_dir():
        hint = f"The folder {display_path(beside.parent)} does not exist."
        raise DataError(Problem(where, message, hint))
    neighbours = [path.name for path in beside.parent.iterdir() if path.suffix in READERS]
    raise DataError(Problem(where, message, did_you_mean(beside.name, neighbours)))


def read_table(path: Path) -> Table:
    """All rows of a file, its kind told by its ending.

    Raises:
        DataError: every malformed row, with file and line where the format has lines.
    """
    shown = display_path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        hint = f"Known: {', '.join(READERS)}."
        raise DataError(Problem(shown, f"files ending in {path.suffix!r} cannot be read.", hint))
    try:
        return reader(path, shown)
    except UnicodeDecodeError as error:
        raise DataError(Problem(shown, f"is not UTF-8 text: {error}.")) from None
    except OSError as error:
        raise DataError(Problem(shown, f"cannot be read: {error.strerror}.")) from None


def _read_csv(path: Path, shown: str, delimiter: str = ",") -> Table:
    rows, places, problems = [], [], []
    with path.open(encoding="utf-8-sig", newline="") as file:
        records = _numbered_records(csv.reader(file, delimiter=delimiter, strict=True), shown)
        header = next(records, (0, []))[1]
        if len(set(header)) < len(header):
            twice = sorted({name for name in header if header.count(name) > 1})
            raise DataError(Problem(f"{shown}:1", f"columns named twice: {', '.join(twice)}."))
        for line, record in records:
            place = f"{shown}:{line}"
            if len(record) != len(header):
                message = f"has {len(record)} fields where the header has {len(header)}."
                problems.append(Problem(place, message, "Quote fields that hold the delimiter."))
            rows.append(dict(zip(header, record, strict=False)))
            places.append(place)
    if problems:
        raise DataError(few(problems, shown))
    return Table(shown, tuple(header), rows, places)


def _numbered_records(reader: Any, shown: str) -> Iterator[tuple[int, list[str]]]:
    """Records that are not blank, with the line each begins on."""
    line = 1
    while True:
        try:
            record = next(reader, None)
        except csv.Error as error:
            hint = 'A quote inside a quoted field is written "".'
            raise DataError(Problem(f"{shown}:{line}", f"malformed row: {error}.", hint)) from None
        if record is None:
            return
        if record:
            yield line, record
        line = reader.line_num + 1


def _read_tsv(path: Path, shown: str) -> Table:
    return _read_csv(path, shown, delimiter="\t")


def _read_json(path: Path, shown: str) -> Table:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(Problem(f"{shown}:{error.lineno}", f"bad JSON: {error.msg}.")) from None
    if not isinstance(rows, list):
        hint = "One object a line belongs into a .jsonl file."
        raise DataError(Problem(shown, "must hold a list of objects.", hint))
    return _objects(shown, rows, [f"{shown}, row {index}" for index in range(1, len(rows) + 1)])


def _read_jsonl(path: Path, shown: str) -> Table:
    rows, places, problems = [], [], []
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            place = f"{shown}:{line}"
            try:
                rows.append(json.loads(text))
            except json.JSONDecodeError as error:
                problems.append(Problem(place, f"bad JSON: {error.msg}."))
            else:
                places.append(place)
    if problems:
        raise DataError(few(problems, shown))
    return _objects(shown, rows, places)


def _objects(shown: str, rows: list[Any], places: list[str]) -> Table:
    problems = [
        Problem(place, f"must be an object with named values, got {type(row).__name__}.")
        for row, place in zip(rows, places, strict=True)
        if not isinstance(row, dict)
    ]
    if problems:
        raise DataError(few(problems, shown))
    columns = dict.fromkeys(name for row in rows for name in row)
    return Table(shown, tuple(columns), rows, places)


def _read_parquet(path: Path, shown: str) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(Problem(shown, f"is not a Parquet file: {reason}.")) from None
    rows = table.to_pylist()
    places = [f"{shown}, row {index}" for index in range(1, len(rows) + 1)]
    return Table(shown, tuple(table.column_names), rows, places)


READERS: dict[str, Callable[[Path, str], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
