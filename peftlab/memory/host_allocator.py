"""glibc's malloc: what one step frees stays mapped for the next. No torch here.

By default glibc gives free memory at the heap's top back to the system, and maps blocks that are
large for it one by one; the next step faults every page in again. Its limits rise with what a
process has freed so far, so how often that happens is chance.
"""

from __future__ import annotations

import ctypes
import os
import sys

from peftlab.units import MIB

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
"""malloc.h"""
_LARGEST_MMAP_THRESHOLD = 32 * MIB
"""glibc refuses more; larger blocks are mapped one by one, so they leave no holes."""
_DEFAULT_MMAP_MAX = 65536
_NEVER = 2**31 - 1
_USERS_OWN = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TOP_PAD_",
)


def keep_freed_memory() -> bool:
    """From here on this process keeps freed blocks of up to 32 MiB for itself.

    Where the environment sets malloc's limits, it is left to them. An allocator that was preloaded
    in malloc's place (jemalloc, tcmalloc) does not notice.

    Returns:
        Whether glibc took it.
    """
    libc = _glibc()
    if libc is None or _is_tuned():
        return False
    # This first: either call ends the growth of both limits, and only this one can be refused.
    taken = libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    return bool(taken and libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))


def keep_large_blocks() -> bool:
    """From here on freed blocks above 32 MiB are kept as well: where memory is plentiful.

    A step of full fine-tuning otherwise faults in the gradient of every large matrix anew. A hole
    that such a block leaves in the heap is as large as the block.

    Returns:
        Whether glibc took it.
    """
    libc = _glibc()
    return libc is not None and not _is_tuned() and bool(libc.mallopt(_M_MMAP_MAX, 0))


def return_freed_memory() -> None:
    """Give the system what is free now, and large blocks when they are freed."""
    libc = _glibc()
    if libc is not None:
        if not _is_tuned():
            libc.mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def _is_tuned() -> bool:
    """Whether the user chose malloc's limits."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "glibc.malloc." in tunables or any(name in os.environ for name in _USERS_OWN)
