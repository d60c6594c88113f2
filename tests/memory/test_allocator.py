"""The replayed allocator against blocks counted by hand."""

from __future__ import annotations

import pytest
import torch

from peftlab.memory.allocator import CachingAllocator, cublas_workspaces, replay_allocator
from peftlab.memory.timeline import Timeline
from peftlab.memory.trace import StepTrace, StorageInfo
from peftlab.units import MIB


def trace_of(*sizes: int) -> Timeline:
    with Timeline() as timeline:
        timeline.begin()
        for size in sizes:
            torch.empty(size, dtype=torch.uint8)
    return timeline


def test_small_blocks_share_a_segment_of_two_mebibytes() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(1) for _ in range(4096)]
    assert allocator.reserved_bytes == 2 * MIB
    allocator.allocate(1)
    assert allocator.reserved_bytes == 4 * MIB
    for block in blocks:
        allocator.release(block)
    allocator.allocate(MIB)
    allocator.allocate(MIB)
    assert allocator.reserved_bytes == 4 * MIB  # the freed neighbours have joined


@pytest.mark.parametrize(
    ("size", "segment"), [(MIB + 1, 20 * MIB), (10 * MIB, 10 * MIB), (11 * MIB, 12 * MIB)]
)
def test_segments_of_large_blocks(size: int, segment: int) -> None:
    allocator = CachingAllocator()
    allocator.allocate(size)
    assert allocator.reserved_bytes == segment


def test_a_freed_block_is_used_again_and_a_larger_one_is_not_found() -> None:
    allocator = CachingAllocator()
    allocator.release(allocator.allocate(30 * MIB))
    allocator.allocate(30 * MIB)
    assert allocator.reserved_bytes == 30 * MIB
    allocator.allocate(32 * MIB)
    assert allocator.reserved_bytes == 62 * MIB


def test_emptying_returns_whole_segments_only() -> None:
    allocator = CachingAllocator()
    whole, split = allocator.allocate(30 * MIB), allocator.allocate(12 * MIB)
    rest = [allocator.allocate(2 * MIB) for _ in range(2)]  # of a segment of 20
    allocator.release(whole)
    allocator.release(rest[0])
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.peak_bytes) == (32 * MIB, 62 * MIB)
    allocator.release(split)
    allocator.release(rest[1])
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.peak_bytes) == (0, 62 * MIB)


def test_replay_with_a_cache_emptied_before_the_step() -> None:
    with Timeline() as timeline:
        gradient = torch.empty(30 * MIB, dtype=torch.uint8)
        torch.empty(50 * MIB, dtype=torch.uint8)
        emptied_at = len(timeline.trace().events)
        del gradient
        timeline.begin()
        torch.empty(40 * MIB, dtype=torch.uint8)
    trace = timeline.trace()
    assert replay_allocator(trace, ()).reserved_bytes == 80 * MIB  # 40 fit into the block of 50
    assert replay_allocator(trace, (), emptied_at=trace.start).reserved_bytes == 40 * MIB
    assert (
        replay_allocator(trace, (), emptied_at).reserved_bytes == 70 * MIB
    )  # the gradient's block stays


def test_workspaces_by_architecture() -> None:
    assert cublas_workspaces((7, 0)) == cublas_workspaces((8, 9)) == (8_519_680, 8_519_680)
    assert cublas_workspaces((9, 0)) == cublas_workspaces((10, 0)) == (32 * MIB, 32 * MIB)
    trace = trace_of(30 * MIB).trace()
    assert replay_allocator(trace, (32 * MIB, 32 * MIB)).reserved_bytes == 94 * MIB
    assert (
        replay_allocator(trace, cublas_workspaces((8, 0))).reserved_bytes == 50 * MIB
    )  # both in one of 20 MiB


def test_replay_of_a_trace() -> None:
    trace = trace_of(30 * MIB, 20 * MIB, 40 * MIB).trace()
    assert replay_allocator(trace, ()).reserved_bytes == 70 * MIB


def test_streams_share_nothing() -> None:
    # The second storage takes the place of the first, unless that is another stream's.
    for stream, reserved in ((0, 20 * MIB), (1, 40 * MIB)):
        storages = (
            StorageInfo(8 * MIB, "temporary"),
            StorageInfo(8 * MIB, "temporary", stream=stream),
        )
        events = ((0, 8 * MIB), (0, -8 * MIB), (1, 8 * MIB))
        trace = StepTrace(storages, events, 0, (("forward", 0),), (("forward", 3),))
        assert replay_allocator(trace, ()).reserved_bytes == reserved
