"""glibc's malloc is told to keep memory, where it is glibc's and nobody else has chosen."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from typing import Any

import pytest

from peftlab.memory.host_allocator import keep_freed_memory, keep_large_blocks, return_freed_memory
from peftlab.units import MIB

CHOSEN = [
    {"MALLOC_TRIM_THRESHOLD_": "0"},
    {"MALLOC_MMAP_THRESHOLD_": "65536"},
    {"MALLOC_MMAP_MAX_": "0"},
    {"MALLOC_TOP_PAD_": "0"},
    {"GLIBC_TUNABLES": "glibc.pthread.rseq=0:glibc.malloc.trim_threshold=0"},
]
ON_GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
FAULTS = """
import resource, sys
from peftlab.memory.host_allocator import keep_freed_memory, keep_large_blocks
mode, blocks, mebibytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
taken = mode != "leave" and keep_freed_memory() and (mode == "keep" or keep_large_blocks())
print(int(taken))
def step():
    kept = [bytearray(mebibytes * 2**20) for _ in range(blocks)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


class Libc:
    """glibc, as far as it is asked; ``refuses`` the parameters that it does not take."""

    def __init__(self, refuses: tuple[int, ...] = ()) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._refuses = refuses

    def gnu_get_libc_version(self) -> bytes:
        return b"2.36"

    def mallopt(self, parameter: int, value: int) -> int:
        self.calls.append(("mallopt", parameter, value))
        return int(parameter not in self._refuses)

    def malloc_trim(self, pad: int) -> int:
        self.calls.append(("malloc_trim", pad))
        return 1


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for variables in CHOSEN:
        for name in variables:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")


def use(libc: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)


def test_both_limits_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = Libc()
    use(libc, monkeypatch)
    assert keep_freed_memory()
    assert libc.calls == [("mallopt", -3, 32 * MIB), ("mallopt", -1, 2**31 - 1)]
    libc.calls.clear()
    assert keep_large_blocks()
    assert libc.calls == [("mallopt", -4, 0)]
    libc.calls.clear()
    return_freed_memory()
    assert libc.calls == [("mallopt", -4, 65536), ("malloc_trim", 0)]


def test_a_limit_that_is_refused_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = Libc(refuses=(-3, -4))
    use(libc, monkeypatch)
    assert not keep_freed_memory()
    assert libc.calls == [("mallopt", -3, 32 * MIB)]
    assert not keep_large_blocks()


@pytest.mark.parametrize("variables", CHOSEN, ids=lambda variables: next(iter(variables)))
def test_what_the_user_chose_stays(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = Libc()
    use(libc, monkeypatch)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert not keep_freed_memory()
    assert not keep_large_blocks()
    return_freed_memory()
    assert libc.calls == [("malloc_trim", 0)]


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_another_c_library_is_left_alone(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # musl has neither; elsewhere not even the library may be asked for.
    use(object(), monkeypatch)
    if platform != "linux":
        monkeypatch.delattr(ctypes, "CDLL")
    monkeypatch.setattr(sys, "platform", platform)
    assert not keep_freed_memory()
    assert not keep_large_blocks()
    return_freed_memory()


@pytest.mark.skipif(not ON_GLIBC, reason="another C library")
@pytest.mark.parametrize(("mode", "blocks", "mebibytes"), [("keep", 64, 1), ("keep all", 2, 40)])
def test_pages_are_not_faulted_in_again(mode: str, blocks: int, mebibytes: int) -> None:
    taken, kept = _faults(mode, blocks, mebibytes)
    assert taken
    _, default = _faults("leave", blocks, mebibytes)
    assert kept < default / 10, (kept, default)


def _faults(mode: str, blocks: int, mebibytes: int) -> tuple[int, int]:
    """Whether glibc took it, and the page faults of ten steps that allocate and free."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, mode, str(blocks), str(mebibytes)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    taken, faults = done.stdout.split()
    return int(taken), int(faults)
