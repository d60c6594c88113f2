"""CUDA's caching allocator replayed over a timeline: what it would reserve."""

from __future__ import annotations

import bisect
from collections import defaultdict
from dataclasses import dataclass

from peftlab.memory.trace import StepTrace, StorageInfo
from peftlab.units import KIB, MIB

# c10/cuda/CUDACachingAllocator.h, default settings: kMinBlockSize, kSmallSize, kSmallBuffer,
# kMinLargeAlloc, kLargeBuffer, kRoundLarge.
_GRANULARITY, _SMALL, _SMALL_SEGMENT = 512, MIB, 2 * MIB
_LARGE, _LARGE_SEGMENT, _LARGE_ROUNDING = 10 * MIB, 20 * MIB, 2 * MIB
_WORKSPACE, _LARGE_WORKSPACE = 2 * 4 * MIB + 8 * 16 * KIB, 32 * MIB


@dataclass
class _Block:
    pointer: int
    size: int
    small: bool
    free: bool = False
    previous: _Block | None = None
    next: _Block | None = None


class CachingAllocator:
    """One stream, default settings: best fit, blocks split and coalesced, segments kept.

    ``reserved_bytes`` is what it holds, ``peak_bytes`` the most it ever held.
    """

    def __init__(self) -> None:
        self.reserved_bytes = self.peak_bytes = 0
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

    def empty_cache(self) -> None:
        """Return the segments of which nothing is in use, as ``torch.cuda.empty_cache`` does."""
        for pool in self._free.values():
            whole = [entry for entry in pool if entry[2].previous is entry[2].next is None]
            self.reserved_bytes -= sum(size for size, *_ in whole)
            returned = {id(block) for *_, block in whole}
            pool[:] = [entry for entry in pool if id(entry[2]) not in returned]

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
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)
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


def cublas_workspaces(capability: tuple[int, int]) -> tuple[int, int]:
    """What cuBLAS keeps for the threads of forward and of backward, in bytes.

    ``parseChosenWorkspaceSize`` in aten/src/ATen/cuda/CublasHandlePool.cpp: ``:4096:2:16:8``, and
    32 MiB from Hopper on; ``CUBLAS_WORKSPACE_CONFIG`` changes it, and newer versions of torch keep
    none between operations. cuBLASLt shares them, or takes 1 MiB of its own.

    Args:
        capability: compute capability of the card.
    """
    size = _LARGE_WORKSPACE if capability[0] >= 9 else _WORKSPACE
    return size, size


@dataclass(frozen=True)
class AllocatorReplay:
    """A trace as the allocator lived it.

    Args:
        reserved_bytes: the most that it held.
        trace: the same with the sizes of blocks in place of tensors', and what is there throughout:
            what ``torch.cuda.memory_allocated`` counts.
    """

    reserved_bytes: int
    trace: StepTrace


def replay_allocator(
    trace: StepTrace, workspaces: tuple[int, ...], emptied_at: int | None = None
) -> AllocatorReplay:
    """Allocate and release block by block what a trace did.

    Args:
        workspaces: blocks that are there throughout.
        emptied_at: a loop empties the cache after so many events; the most from there on.
    """
    # Each stream has its own pools; what one gives back, no other takes.
    allocators: dict[int, CachingAllocator] = defaultdict(CachingAllocator)
    kept = [allocators[0].allocate(size) for size in workspaces]
    peak = allocators[0].peak_bytes
    count, known = len(kept), len(trace.storages)
    events = [(known + number, block.size) for number, block in enumerate(kept)]
    storages = [StorageInfo(block.size, "temporary", "cublas") for block in kept]
    blocks: dict[int, _Block] = {}
    sizes: dict[int, int] = {}
    for position, (index, change) in enumerate(trace.events):
        if position == emptied_at:
            for each in allocators.values():
                each.empty_cache()
            peak = sum(each.reserved_bytes for each in allocators.values())
        allocator = allocators[trace.storages[index].stream]
        before = after = 0
        if index in blocks:
            before = blocks[index].size
            allocator.release(blocks.pop(index))
        sizes[index] = sizes.get(index, 0) + change
        if sizes[index]:
            blocks[index] = allocator.allocate(sizes[index])
            after = blocks[index].size
            peak = max(peak, sum(each.reserved_bytes for each in allocators.values()))
        events.append((index, after - before))
    on_blocks = StepTrace(
        storages=(*trace.storages, *storages),
        events=tuple(events),
        start=trace.start + count,
        entered=tuple((phase, at + count) for phase, at in trace.entered),
        left=tuple((phase, at + count) for phase, at in trace.left),
    )
    return AllocatorReplay(peak, on_blocks)
