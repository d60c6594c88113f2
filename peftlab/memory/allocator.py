"""CUDA's caching allocator replayed over a timeline: what it would reserve."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from peftlab.memory.trace import StepTrace
from peftlab.units import MIB

# c10/cuda/CUDACachingAllocator.h, default settings: kMinBlockSize, kSmallSize, kSmallBuffer,
# kMinLargeAlloc, kLargeBuffer, kRoundLarge.
_GRANULARITY, _SMALL, _SMALL_SEGMENT = 512, MIB, 2 * MIB
_LARGE, _LARGE_SEGMENT, _LARGE_ROUNDING = 10 * MIB, 20 * MIB, 2 * MIB
CUBLAS_WORKSPACES = (8_519_680, 8_519_680)
"""cuBLAS keeps one each for the threads of forward and backward: 4096 KiB x 2 + 16 KiB x 8
by default (aten/src/ATen/cuda/CublasHandlePool.cpp); on Hopper 32 MiB each."""


@dataclass
class _Block:
    pointer: int
    size: int
    small: bool
    free: bool = False
    previous: _Block | None = None
    next: _Block | None = None


class CachingAllocator:
    """One stream, default settings: best fit, blocks split and coalesced, no segment returned."""

    def __init__(self) -> None:
        self.reserved_bytes = 0
        self._next_pointer = 0
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}

    def allocate(self, size: int) -> _Block:
        """A block of at least ``size`` bytes."""
        size = -(-size // _GRANULARITY) * _GRANULARITY
        small = size <= _SMALL
        pool = self._free[small]
        at = bisect.bisect_left(pool, size, key=lambda entry: entry[0])
        block = pool.pop(at)[2] if at < len(pool) else self._segment(size, small)
        rest = block.size - size
        if rest >= _GRANULARITY if small else rest > _SMALL:
            self._split(block, size)
        block.free = False
        return block

    def release(self, block: _Block) -> None:
        """Give a block back; it joins its free neighbours."""
        before, after = block.previous, block.next
        if after is not None and after.free:
            self._take(after)
            block.size += after.size
            block.next = after.next
            if after.next is not None:
                after.next.previous = block
        if before is not None and before.free:
            self._take(before)
            before.size += block.size
            before.next = block.next
            if block.next is not None:
                block.next.previous = before
            block = before
        self._give(block)

    def _segment(self, size: int, small: bool) -> _Block:
        if small:
            segment = _SMALL_SEGMENT
        elif size < _LARGE:
            segment = _LARGE_SEGMENT
        else:
            segment = -(-size // _LARGE_ROUNDING) * _LARGE_ROUNDING
        block = _Block(self._next_pointer, segment, small)
        self._next_pointer += segment
        self.reserved_bytes += segment
        return block

    def _split(self, block: _Block, size: int) -> None:
        rest = _Block(block.pointer + size, block.size - size, block.small)
        rest.previous, rest.next = block, block.next
        if block.next is not None:
            block.next.previous = rest
        block.next, block.size = rest, size
        self._give(rest)

    def _give(self, block: _Block) -> None:
        block.free = True
        bisect.insort(
            self._free[block.small],
            (block.size, block.pointer, block),
            key=lambda entry: entry[:2],
        )

    def _take(self, block: _Block) -> None:
        pool = self._free[block.small]
        at = bisect.bisect_left(pool, (block.size, block.pointer), key=lambda entry: entry[:2])
        del pool[at]


def reserved_bytes(trace: StepTrace, workspaces: tuple[int, ...] = CUBLAS_WORKSPACES) -> int:
    """What the allocator holds at the end of a trace; segments are never given back before."""
    allocator = CachingAllocator()
    for size in workspaces:
        allocator.allocate(size)
    blocks: dict[int, _Block] = {}
    sizes: dict[int, int] = {}
    for index, change in trace.events:
        if index in blocks:
            allocator.release(blocks.pop(index))
        sizes[index] = sizes.get(index, 0) + change
        if sizes[index]:
            blocks[index] = allocator.allocate(sizes[index])
    return allocator.reserved_bytes
