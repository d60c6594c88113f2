"""Segments on disk: whole or not there, checked, shared by processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from peftlab.errors import UnknownNameError
from peftlab.trunk import store as module
from peftlab.trunk.store import Store, budget_bytes, clear, find
from peftlab.units import GIB

ABOUT = {"model": "m", "boundary": "block 1 of 2"}
WRITER = """
import sys
import numpy as np
from pathlib import Path
from peftlab.trunk import store
from peftlab.trunk.store import Store

folder, first, last, dies = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if dies == "dies":
    # Killed with half of the file written.
    store.sync_file = lambda path: store.os._exit(9)
opened = Store(folder, {"model": "m", "boundary": "b"})
for number in range(first, last):
    opened.add(number.to_bytes(16, "little"), np.full((3, 4), number, np.float32))
    opened.flush()
"""


def digest(number: int) -> bytes:
    return number.to_bytes(16, "little")


def rows(numbers: range, dtype: Any = np.float32) -> dict[bytes, Any]:
    return {digest(n): np.full((n + 1, 4), n, dtype) for n in numbers}


def filled(folder: Path, numbers: range = range(5), dtype: Any = np.float32) -> Store:
    made = Store(folder, ABOUT)
    for key, values in rows(numbers, dtype).items():
        made.add(key, values)
    made.flush()
    return made


def write_in_a_process(folder: Path, *words: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), *map(str, words)])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_what_was_written_is_read(trunk_folder: Path, dtype: Any) -> None:
    filled(trunk_folder / "k", dtype=dtype)
    read = Store(trunk_folder / "k", ABOUT)
    assert len(read) == 5
    for key, values in rows(range(5), dtype).items():
        assert read[key].dtype == dtype
        assert np.array_equal(read[key], values)
    assert not read.notes
    assert read.stored_bytes == sum(p.stat().st_size for p in (trunk_folder / "k").glob("*.safe*"))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_a_segment_is_a_safetensors_file(trunk_folder: Path, dtype: Any) -> None:
    filled(trunk_folder / "k", dtype=dtype)
    (path,) = (trunk_folder / "k").glob("*.safetensors")
    read = load_file(path)
    values = rows(range(5), dtype)
    assert read["digests"].tobytes() == b"".join(values)
    assert read["lengths"].tolist() == [1, 2, 3, 4, 5]
    assert read["values"].dtype == dtype
    assert np.array_equal(read["values"], np.concatenate(list(values.values())))


def test_rows_can_be_read_before_they_are_written(trunk_folder: Path) -> None:
    opened = Store(trunk_folder / "k", ABOUT)
    opened.add(digest(1), np.ones((2, 4), np.float32))
    assert opened[digest(1)].sum() == 8
    assert not list((trunk_folder / "k").glob("*.safetensors"))


def test_many_rows_are_written_as_they_come(
    trunk_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_BYTES", 100)
    opened = Store(trunk_folder / "k", ABOUT)
    for key, values in rows(range(9)).items():
        opened.add(key, values)
    assert len(list((trunk_folder / "k").glob("*.safetensors"))) > 2


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def garble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[20:40] = b"x" * 20
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, empty, flip, garble])
def test_a_damaged_segment_is_removed(trunk_folder: Path, damage: Any) -> None:
    folder = trunk_folder / "k"
    filled(folder, range(3))
    (bad,) = folder.glob("*.safetensors")
    filled(folder, range(3, 5))
    damage(bad)
    read = Store(folder, ABOUT)
    assert {digest(n) in read for n in range(3)} == {False}
    assert {digest(n) in read for n in range(3, 5)} == {True}
    (note,) = read.notes
    assert bad.name in note
    assert not bad.exists()


def test_a_killed_writer_leaves_nothing(trunk_folder: Path) -> None:
    folder = trunk_folder / "k"
    filled(folder)
    assert write_in_a_process(folder, 10, 12, "dies").wait() == 9
    assert list(folder.glob(".tmp-*"))
    read = Store(folder, ABOUT)
    assert len(read) == 5
    assert not read.notes
    assert not list(folder.glob(".tmp-*"))


def test_who_still_writes_is_left_alone(trunk_folder: Path) -> None:
    folder = trunk_folder / "k"
    filled(folder)
    import socket

    mine = folder / f".tmp-{socket.gethostname()}.{os.getpid()}.abc"
    others = folder / ".tmp-elsewhere.1.abc"
    old = folder / ".tmp-elsewhere.2.abc"
    for path in (mine, others, old):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    strange = folder / ".tmp-elsewhere.3.abc"
    strange.mkdir()
    os.utime(strange, (0, 0))
    Store(folder, ABOUT)
    assert (mine.exists(), others.exists(), old.exists()) == (True, True, False)
    assert strange.exists()


def test_two_processes_add_at_once(trunk_folder: Path) -> None:
    folder = trunk_folder / "k"
    writers = [write_in_a_process(folder, *span, "lives") for span in ((0, 12), (6, 18))]
    assert [writer.wait() for writer in writers] == [0, 0]
    read = Store(folder, ABOUT)
    assert len(read) == 18
    assert not read.notes
    for number in range(18):
        assert (read[digest(number)] == number).all()


def test_what_others_added_is_taken_up(trunk_folder: Path) -> None:
    mine = filled(trunk_folder / "k", range(2))
    filled(trunk_folder / "k", range(2, 4))
    assert len(mine) == 2
    mine.refresh()
    assert len(mine) == 4


def test_cleared_while_it_is_open(trunk_folder: Path) -> None:
    opened = filled(trunk_folder / "k")
    assert [entry.key for entry in clear()] == ["k"]
    assert not (trunk_folder / "k").exists()
    for key, values in rows(range(5)).items():
        assert np.array_equal(opened[key], values)
    opened.add(digest(9), np.ones((1, 4), np.float32))
    opened.flush()
    assert len(Store(trunk_folder / "k", ABOUT)) == 1


def test_a_full_disk(trunk_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = filled(trunk_folder / "k")
    opened.add(digest(9), np.ones((1, 4), np.float32))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        opened.flush()
    assert digest(9) not in opened
    assert digest(1) in opened
    assert not list((trunk_folder / "k").glob(".tmp-*"))


def test_a_disk_that_is_full_while_rows_are_written(trunk_folder: Path) -> None:
    resource = pytest.importorskip("resource")
    opened = filled(trunk_folder / "k")
    opened.add(digest(9), np.ones((1000, 4), np.float32))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            opened.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert digest(9) not in opened
    assert len(Store(trunk_folder / "k", ABOUT)) == 5
    assert not list((trunk_folder / "k").glob(".tmp-*"))


def test_found_and_cleared_by_key(trunk_folder: Path) -> None:
    assert find() == []
    for key in ("abc", "abd", "b"):
        filled(trunk_folder / key, range(2))
    assert {entry.key for entry in find()} == {"abc", "abd", "b"}
    (entry,) = find(["abc"])
    assert (entry.rows, entry.description) == (2, ABOUT)
    size = sum(path.stat().st_size for path in (trunk_folder / "abc").iterdir())
    assert entry.stored_bytes == size
    with pytest.raises(UnknownNameError, match="no cached trunk 'x'"):
        clear(["ab", "x"])
    assert {entry.key for entry in clear(["ab"])} == {"abc", "abd"}
    assert [entry.key for entry in find()] == ["b"]


def test_the_one_used_last_comes_first(trunk_folder: Path) -> None:
    for key in ("old", "new"):
        filled(trunk_folder / key)
    os.utime(trunk_folder / "new" / "trunk.json", (1, 1))
    os.utime(trunk_folder / "old" / "trunk.json", (0, 0))
    assert [entry.key for entry in find()] == ["new", "old"]
    Store(trunk_folder / "old", ABOUT)
    assert [entry.key for entry in find()] == ["old", "new"]


def test_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    assert budget_bytes("2GiB") == 2 * GIB
    monkeypatch.setattr(module, "free_bytes", lambda: 10 * GIB)
    assert budget_bytes("auto") == 2 * GIB
    monkeypatch.setattr(module, "free_bytes", lambda: 1000 * GIB)
    assert budget_bytes("auto") == 10 * GIB
