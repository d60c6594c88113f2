"""Run folders: where a run is, and what it wrote there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from peftlab.config import Config, display_path
from peftlab.errors import Problem, RunFolderError
from peftlab.files import finite, write_json, write_text
from peftlab.registry import unknown
from peftlab.results.record import SCHEMA_VERSION, Record

RECORD, STEPS, PREDICTIONS = "record.json", "steps.jsonl", "predictions.jsonl"
_HASH_LENGTH = 12
SchemaT = TypeVar("SchemaT", bound=Config)
_RUN_FOLDER = re.compile(r"(?P<hash>.+)-s(?P<seed>\d+)")


def run_dir(root: Path, task: str, recipe: str, identity: str, seed: int) -> Path:
    """``root/<task>/<recipe>/<hash>-s<seed>``, with names made safe for every file system."""
    return root / _safe(task) / _safe(recipe) / f"{identity[:_HASH_LENGTH]}-s{seed}"


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip(".-") or "unnamed"


def write_record(folder: Path, record: Record) -> None:
    """Write ``record.json``, atomically."""
    write_json(folder / RECORD, record.model_dump(mode="json"))


def read_record(folder: Path) -> Record:
    """Read ``record.json``.

    Raises:
        RunFolderError: missing, damaged, or written by another version of the schema.
    """
    hint = "The run did not finish, or this is no run folder."
    return read_json(folder / RECORD, Record, SCHEMA_VERSION, hint)


def read_json(path: Path, schema: type[SchemaT], version: int, hint: str) -> SchemaT:
    """Read a JSON file that states its ``schema_version``.

    Args:
        hint: what to do where the file is missing.

    Raises:
        RunFolderError: missing, damaged, or written by another version of the schema.
    """
    where = display_path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(Problem(where, "is missing.", hint)) from None
    except OSError as error:
        raise RunFolderError(Problem(where, f"cannot be read: {error.strerror}.")) from None
    except ValueError as error:
        message = f"is damaged: {error}."
        raise RunFolderError(Problem(where, message, "Run it again.")) from None
    found = data.get("schema_version") if isinstance(data, dict) else None
    if found != version:
        message = f"has schema version {found!r}, this peftlab reads {version}."
        raise RunFolderError(Problem(where, message, "Run it again, or use the peftlab it is of."))
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        problems = [
            Problem(where, f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}.")
            for detail in error.errors(include_url=False)
        ]
        raise RunFolderError(problems) from None


def find_runs(root: Path, task: str | None = None, recipe: str | None = None) -> list[Path]:
    """Folders below ``root`` that hold a record, in the order of their names."""
    pattern = "/".join((_safe(task) if task else "*", _safe(recipe) if recipe else "*", "*-s*"))
    return sorted(path.parent for path in root.glob(f"{pattern}/{RECORD}"))


def resolve_run(text: str, root: Path) -> Path:
    """The run folder that a user means by ``text``.

    Args:
        text: a path, ``task/recipe`` (its latest finished run), or the start of a hash, with the
            seed where several seeds share it (``3f2a91-s1``).
        root: the folder of all runs.

    Raises:
        RunFolderError: a folder without a record, no run finished, or several runs fit.
        UnknownNameError: nothing fits; with the nearest names.
    """
    given = Path(text)
    for path in (given, root / text):
        if path.name == RECORD and path.is_file():
            return path.parent
        if (path / RECORD).is_file():
            return path
        if path.is_dir() and _RUN_FOLDER.fullmatch(path.name):
            hint = "The run did not finish; train it again to resume."
            raise RunFolderError(Problem(display_path(path), f"holds no {RECORD}.", hint))
    runs = find_runs(root)
    names = {path: f"{path.parent.parent.name}/{path.parent.name}" for path in runs}
    if of_recipe := [path for path in runs if names[path] == text.strip("/")]:
        return _latest_finished(text, of_recipe)
    if matching := [path for path in runs if _starts(path, text)]:
        if len(matching) == 1:
            return matching[0]
        several = ", ".join(f"{names[path]}/{path.name}" for path in matching[:6])
        hint = "Write more of the hash, or the seed too (…-s1)."
        raise RunFolderError(Problem("", f"{text!r} fits several runs: {several}.", hint))
    raise unknown("run", text, {*names.values(), *(path.name for path in runs)}, str(root))


def _starts(path: Path, text: str) -> bool:
    prefix, found = _RUN_FOLDER.fullmatch(text), _RUN_FOLDER.fullmatch(path.name)
    if not text or found is None:
        return False
    if prefix is None:
        return found["hash"].startswith(text)
    return found["hash"].startswith(prefix["hash"]) and found["seed"] == prefix["seed"]


def _latest_finished(text: str, runs: Iterable[Path]) -> Path:
    statuses = {path: read_record(path).status for path in runs}
    finished = [path for path, status in statuses.items() if status == "ok"]
    if not finished:
        listed = ", ".join(f"{path.name}: {status}" for path, status in statuses.items())
        raise RunFolderError(Problem(text, f"no run of it finished ({listed})."))
    return max(finished, key=lambda path: (path / RECORD).stat().st_mtime_ns)


class StepLog:
    """Appends one JSON line an optimizer step to ``steps.jsonl``, flushed line by line.

    Args:
        folder: the run folder.
        resume_step: the step of the checkpoint that training goes on from; later lines, which that
            training will write again, are dropped. 0 starts anew.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        path = folder / STEPS
        kept = [row for row in read_steps(folder) if row["step"] <= resume_step]
        write_text(path, "".join(map(_line, kept)))
        self._file: TextIOWrapper = path.open("a", encoding="utf-8", newline="\n")

    def append(self, step: int, **values: Any) -> None:
        """Write ``values`` of optimizer step ``step``; a loss that is not finite becomes null."""
        self._file.write(_line({"step": step, **values}))
        self._file.flush()

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``steps.jsonl``, without a last one that a kill tore; empty if there is none.

    Raises:
        RunFolderError: a line before the last is damaged.
    """
    return _read_lines(folder / STEPS, needed=("step",), torn_end=True)


def write_predictions(folder: Path, predictions: Iterable[Mapping[str, Any]]) -> None:
    """Write ``predictions.jsonl``, atomically.

    Each line has ``id`` and ``prediction``, and where known ``label`` and ``score`` (what the row
    adds to the metric's mean) or ``correct`` (true or false).
    """
    write_text(folder / PREDICTIONS, "".join(map(_line, predictions)))


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``predictions.jsonl``; empty if there is none.

    Raises:
        RunFolderError: a line is damaged.
    """
    return _read_lines(folder / PREDICTIONS, needed=("id", "prediction"), torn_end=False)


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(finite(value), ensure_ascii=False) + "\n"


def _read_lines(path: Path, needed: tuple[str, ...], torn_end: bool) -> list[dict[str, Any]]:
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    # Not splitlines(): JSON leaves U+2028 and its like inside texts.
    *lines, end = text.split("\n")
    if end and not torn_end:
        lines.append(end)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or any(key not in row for key in needed):
            where = f"{display_path(path)}:{number}"
            raise RunFolderError(Problem(where, "is damaged.", "Run it again."))
        rows.append(row)
    return rows
