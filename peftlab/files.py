"""Files that are there whole or not at all.

Everything is written to a temporary name in the same folder, flushed to the disk and renamed, so
that a reader never sees half a file and a killed process leaves the old one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text in place of ``path``; makes the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp gives 0600; a result is as readable as any other file of the user.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON; a number that is not finite becomes null, as JSON has none."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of ``path`` when the block succeeds.

    A folder that is already there is moved aside first: a kill between the two renames leaves it
    beside ``path`` with the ending ``.old``, whole.

    Example:
        >>> with replace_folder(run / "adapter") as folder:
        ...     method.save_adapter(model, folder)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=path.parent))
    old = path.with_name(path.name + ".old")
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                # Some writers make files that only their owner may read.
                Path(folder, name).chmod(0o666 & ~_umask())
                sync_file(Path(folder, name))
            sync_folder(Path(folder))
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            if old.exists():
                shutil.rmtree(old)
            path.rename(old)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)
    if old.exists():
        shutil.rmtree(old)


def sync_file(path: Path) -> None:
    """Make what is in the file survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` survive a power cut; does nothing where the system cannot."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finite(value: Any) -> Any:
    """``value`` with every NaN and infinity in it replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
