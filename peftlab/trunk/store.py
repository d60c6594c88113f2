"""Activations on disk: one folder a trunk, in it immutable segments. No torch here.

A segment is one safetensors file: ``digests`` (rows, 16) name the rows, ``lengths`` (rows,) count
their vectors, ``values`` (vectors, width) hold these one row after the other. It is written under
a temporary name, flushed and renamed, so that a name stands for a whole file; it is never changed
afterwards, so that any number of processes may read and add at the same time. Two that add the same
row waste space and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peftlab.assets import cache_dir
from peftlab.files import TEMPORARY_PREFIX, sync_file, sync_folder, write_json
from peftlab.registry import unknown
from peftlab.units import GIB, MIB, parse_bytes

CACHE_VARIABLE = "PEFTLAB_TRUNK_CACHE"
DESCRIPTION, SEGMENTS = "trunk.json", "*.safetensors"
DIGEST_BYTES = 16
FLUSH_BYTES = 64 * MIB
"""New rows are kept in memory up to here, so that segments are few."""
AUTO_BYTES, AUTO_DISK_SHARE = 10 * GIB, 5
_STALE_SECONDS = 24 * 3600
_DTYPES = {
    name: np.dtype(code)
    for name, code in {"U8": "u1", "I64": "<i8", "F32": "<f4", "F16": "<f2", "U16": "<u2"}.items()
}
"""As safetensors calls them."""

logger = logging.getLogger(__name__)
Array = npt.NDArray[Any]
Content = Mapping[str, Sequence[Array]]
"""A segment's tensors by name, each in parts, which follow each other in the file."""


class DamagedSegmentError(ValueError):
    """A segment is not what was written."""


@dataclass(frozen=True)
class Entry:
    """One trunk in the cache.

    Args:
        key: the folder's name.
        description: what the key was made of.
        rows: examples held, one that was added twice counted twice.
        stored_bytes: of all its files.
        used: when it was last read or added to, in seconds since 1970.
    """

    key: str
    description: Mapping[str, Any]
    rows: int
    stored_bytes: int
    used: float


class Store:
    """The rows of one trunk.

    Args:
        folder: the trunk's own.
        description: JSON-ready, for people.

    Raises:
        OSError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any]) -> None:
        self.folder, self._description = folder, description
        self.notes: list[str] = []
        self.stored_bytes = 0
        self._rows: dict[bytes, Array] = {}
        self._segments: set[str] = set()
        self._pending: dict[bytes, Array] = {}
        self._pending_bytes = 0
        self._make_folder()
        _remove_stale(folder)
        self.refresh()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._rows

    def __getitem__(self, digest: bytes) -> Array:
        """The row's vectors, (vectors, width); not to be written to."""
        return self._rows[digest]

    @property
    def held_bytes(self) -> int:
        """On disk and waiting to be."""
        return self.stored_bytes + self._pending_bytes

    def refresh(self) -> None:
        """Take up what other processes have added; a damaged segment is removed, and noted."""
        for path in sorted(self.folder.glob(SEGMENTS)):
            if path.name in self._segments:
                continue
            try:
                rows = read_segment(path)
            except FileNotFoundError:
                continue  # Cleared meanwhile.
            except DamagedSegmentError as error:
                path.unlink(missing_ok=True)
                self._note(f"a damaged file of the trunk cache is computed again: {error}")
                continue
            self._segments.add(path.name)
            self.stored_bytes += path.stat().st_size
            self._rows |= rows

    def add(self, digest: bytes, values: Array) -> None:
        """Keep a row; it can be read at once and is on disk after ``flush``.

        Args:
            values: (vectors, width); the array is kept, so it must be a copy.

        Raises:
            OSError: as ``flush``.
        """
        self._rows[digest] = self._pending[digest] = values
        self._pending_bytes += values.nbytes
        if self._pending_bytes >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added.

        Raises:
            OSError: the disk is full or may not be written; what was not written is forgotten.
        """
        if not self._pending:
            return
        rows, self._pending, self._pending_bytes = self._pending, {}, 0
        try:
            self._make_folder()
            path = write_segment(self.folder, rows)
            held = read_segment(path)
        except (OSError, DamagedSegmentError) as error:
            for digest in rows:
                self._rows.pop(digest, None)
            raise error if isinstance(error, OSError) else OSError(str(error)) from error
        self._segments.add(path.name)
        self.stored_bytes += path.stat().st_size
        # From the file: the memory of what was computed is free again.
        self._rows |= held

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / DESCRIPTION
        if path.exists():
            os.utime(path)
        else:
            write_json(path, dict(self._description))

    def _note(self, text: str) -> None:
        self.notes.append(text)
        logger.warning("%s", text)


def write_segment(folder: Path, rows: Mapping[bytes, Array]) -> Path:
    """Write rows as a new segment.

    Raises:
        OSError: nothing is left behind.
    """
    content: Content = {
        "digests": [np.frombuffer(b"".join(rows), np.uint8).reshape(-1, DIGEST_BYTES)],
        "lengths": [np.array([len(values) for values in rows.values()], np.int64)],
        # One after the other: safetensors' own writer wants them in one array, which would be
        # memory for all of them once more, new to the process and so slower than the disk.
        "values": list(rows.values()),
    }
    name = secrets.token_hex(8)
    path = folder / f"{name}.safetensors"
    temporary = folder / f"{TEMPORARY_PREFIX}{socket.gethostname()}.{os.getpid()}.{name}"
    try:
        # Rows one by one would lie in the system's cache in pieces, which are mapped more slowly.
        with temporary.open("xb", buffering=MIB) as file:
            file.write(_header(content))
            for array in chain.from_iterable(content.values()):
                file.write(array.data)
        sync_file(temporary)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(folder)
    return path


def read_segment(path: Path) -> dict[bytes, Array]:
    """The rows of a segment, as views of its memory map.

    Raises:
        FileNotFoundError: it is gone.
        DamagedSegmentError: it is cut short, or its bytes are not those that were written.
    """
    try:
        # A plain array on it: views of numpy's own subclass cost Python calls in every batch.
        mapped = np.memmap(path, np.uint8, "r").view(np.ndarray)
        metadata, content = _parse(mapped)
        if metadata["checksum"] != _checksum({name: [each] for name, each in content.items()}):
            raise DamagedSegmentError(f"{path.name}: wrong checksum")
        digests, lengths, values = (content[name] for name in ("digests", "lengths", "values"))
        ends = np.cumsum(lengths).tolist()
        starts = [0, *ends[:-1]]
        return {
            digest.tobytes(): values[start:end]
            for digest, start, end in zip(digests, starts, ends, strict=True)
        }
    except FileNotFoundError:
        raise
    except (KeyError, IndexError, TypeError, OverflowError) as error:
        raise DamagedSegmentError(f"{path.name}: {error!r}") from error
    except DamagedSegmentError:
        raise
    except (ValueError, OSError) as error:
        # numpy cannot map an empty file, JSON may be cut, an array may lack bytes.
        raise DamagedSegmentError(f"{path.name}: {error}") from error


def _header(content: Content) -> bytes:
    """safetensors' format: 8 bytes for the header's length, the header in JSON, the tensors."""
    header: dict[str, Any] = {"__metadata__": {"checksum": _checksum(content)}}
    end = 0
    for name, arrays in content.items():
        start, end = end, end + sum(array.nbytes for array in arrays)
        dtype = next(each for each, own in _DTYPES.items() if own == arrays[0].dtype)
        header[name] = {"dtype": dtype, "shape": _shape(arrays), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parse(mapped: Array) -> tuple[dict[str, str], dict[str, Array]]:
    """The metadata and the tensors of such a file."""
    size = int.from_bytes(mapped[:8].tobytes(), "little")
    header = json.loads(mapped[8 : 8 + size].tobytes())
    metadata = header.pop("__metadata__")
    content: dict[str, Array] = {}
    for name, about in header.items():
        start, end = (8 + size + offset for offset in about["data_offsets"])
        content[name] = mapped[start:end].view(_DTYPES[about["dtype"]]).reshape(about["shape"])
    return metadata, content


def _checksum(content: Content) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    for name in ("digests", "lengths", "values"):
        arrays = content[name]
        digest.update(f"{name}{arrays[0].dtype.str}{_shape(arrays)}".encode())
        for array in arrays:
            digest.update(array.data)
    return digest.hexdigest()


def _shape(arrays: Sequence[Array]) -> tuple[int, ...]:
    """Of all together, one after the other."""
    return (sum(map(len, arrays)), *arrays[0].shape[1:])


def _remove_stale(folder: Path) -> None:
    """Remove what writers left that were killed: of this machine at once, of others after a day."""
    import psutil

    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        host, _, rest = path.name.removeprefix(TEMPORARY_PREFIX).rpartition(".")[0].rpartition(".")
        try:
            old = time.time() - path.stat().st_mtime > _STALE_SECONDS
        except FileNotFoundError:
            continue
        dead = host == socket.gethostname() and rest.isdigit() and not psutil.pid_exists(int(rest))
        if dead or old:
            # What cannot be removed is in nobody's way.
            with suppress(OSError):
                path.unlink()


def trunk_cache_dir() -> Path:
    """The folder of all trunks: ``PEFTLAB_TRUNK_CACHE``, else ``trunk`` in peftlab's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else cache_dir() / "trunk"


def is_kept(key: str) -> bool:
    """Whether there is such a trunk."""
    return (trunk_cache_dir() / key / DESCRIPTION).exists()


def budget_bytes(setting: str) -> int:
    """How many bytes one trunk may take: a size, or "auto" by what the disk has free.

    Raises:
        ValueError: ``setting`` is neither.
        OSError: the disk cannot be asked.
    """
    if setting != "auto":
        return parse_bytes(setting)
    return min(AUTO_BYTES, free_bytes() // AUTO_DISK_SHARE)


def free_bytes() -> int:
    """What the cache's disk has free."""
    folder = trunk_cache_dir()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def find(keys: Sequence[str] = ()) -> list[Entry]:
    """The trunks whose keys start so, by default all; the one used last first.

    Raises:
        UnknownNameError: no trunk's key starts so.
        OSError: the cache cannot be read.
    """
    there = [_entry(path.parent) for path in trunk_cache_dir().glob(f"*/{DESCRIPTION}")]
    for key in keys:
        if not any(entry.key.startswith(key) for entry in there):
            raise unknown("cached trunk", key, [entry.key for entry in there])
    chosen = [e for e in there if not keys or any(e.key.startswith(key) for key in keys)]
    return sorted(chosen, key=lambda entry: -entry.used)


def clear(keys: Sequence[str] = ()) -> list[Entry]:
    """Remove trunks, chosen as in ``find``; what a process has open stays readable to it.

    Returns:
        what was removed.

    Raises:
        UnknownNameError: no trunk's key starts so.
        OSError: a folder cannot be removed.
    """
    chosen = find(keys)
    for entry in chosen:
        shutil.rmtree(trunk_cache_dir() / entry.key)
    return chosen


def _entry(folder: Path) -> Entry:
    rows = 0
    for path in folder.glob(SEGMENTS):
        try:
            rows += len(_parse(np.memmap(path, np.uint8, "r"))[1]["lengths"])
        except (ValueError, KeyError, OSError):
            continue  # Damaged: a run that meets it removes it.
    about = folder / DESCRIPTION
    return Entry(
        key=folder.name,
        description=json.loads(about.read_text(encoding="utf-8")),
        rows=rows,
        stored_bytes=sum(path.stat().st_size for path in folder.iterdir()),
        used=about.stat().st_mtime,
    )
