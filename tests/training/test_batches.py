"""Every example once an epoch, similar lengths together, the same steps for everyone."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from peftlab.training.batches import BUCKET_STEPS, BatchPlan, shapes, split_step

LENGTHS = tuple(random.Random(0).choices(range(3, 128), k=1003))


def padding_share(steps: Iterable[list[int]]) -> float:
    padded = sum(len(step) * max(LENGTHS[row] for row in step) for step in steps)
    return 1 - sum(LENGTHS) / padded


@pytest.mark.parametrize("group_by_length", [True, False])
@pytest.mark.parametrize("step_size", [1, 7, 32, 1003, 4000])
def test_every_example_once_an_epoch(step_size: int, group_by_length: bool) -> None:
    plan = BatchPlan(LENGTHS, step_size, 0, group_by_length)
    for epoch in range(2):
        steps = plan.epoch(epoch)
        assert sorted(row for step in steps for row in step) == list(range(len(LENGTHS)))
        assert len(steps) == plan.steps_per_epoch
        # One step alone may be smaller: the remainder.
        assert sorted(map(len, steps))[1:] == [step_size] * (len(steps) - 1)


@pytest.mark.parametrize("group_by_length", [True, False])
def test_order_depends_on_seed_and_epoch_alone(group_by_length: bool) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return BatchPlan(LENGTHS, 16, seed, group_by_length).epoch(epoch)

    assert order(0, 1) == order(0, 1)
    distinct = {str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(distinct) == 9


def test_similar_lengths_come_together() -> None:
    grouped = padding_share(BatchPlan(LENGTHS, 16, 0).epoch(0))
    shuffled = padding_share(BatchPlan(LENGTHS, 16, 0, group_by_length=False).epoch(0))
    assert grouped < 0.1 < 0.4 < shuffled


def test_grouping_still_mixes() -> None:
    # Steps must not go from short to long, and their company must change between epochs.
    plan = BatchPlan(LENGTHS, 16, 0)
    longest = [max(LENGTHS[row] for row in step) for step in plan.epoch(0)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))
    together = [{frozenset(step) for step in plan.epoch(epoch)} for epoch in range(2)]
    assert not together[0] & together[1]
    assert BUCKET_STEPS > 1


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 5, 8, 24, 25])
@pytest.mark.parametrize("group_by_length", [True, False])
def test_micro_batches_cover_the_step(
    size: int, rows: int, processes: int, group_by_length: bool
) -> None:
    plan = BatchPlan(LENGTHS, size, 0, group_by_length)
    step = plan.epoch(0)[0]
    micros = plan.micro_batches(step, rows, processes)
    parts = [part for micro in micros for part in micro]
    assert sorted(row for part in parts for row in part) == sorted(step)
    assert all(len(micro) == processes for micro in micros)
    assert max(map(len, parts)) <= rows
    for micro in micros:
        assert max(map(len, micro)) - min(map(len, micro)) <= 1
        assert any(micro)


def test_a_share_may_be_empty() -> None:
    plan = BatchPlan((5, 6), 2, 0)
    assert plan.micro_batches([0, 1], 4, 3) == [[[0], [1], []]]


def test_any_number_of_processes_sees_the_same_steps() -> None:
    plan = BatchPlan(LENGTHS, 24, 3)
    for step in plan.epoch(0):
        by_processes = [
            {
                row
                for micro in plan.micro_batches(step, 24 // n, n)
                for part in micro
                for row in part
            }
            for n in (1, 2, 3)
        ]
        assert by_processes == [set(step)] * 3


def test_micro_batches_are_split_by_length() -> None:
    plan = BatchPlan((9, 1, 8, 2), 4, 0)
    assert plan.micro_batches([0, 1, 2, 3], 2, 1) == [[[1, 3]], [[2, 0]]]
    ungrouped = BatchPlan((9, 1, 8, 2), 4, 0, group_by_length=False)
    assert ungrouped.micro_batches([0, 1, 2, 3], 2, 1) == [[[0, 1]], [[2, 3]]]


def test_shapes_are_those_of_shares_with_rows() -> None:
    assert shapes([[[0, 1], []], [[2], [3]]], (4, 7, 2, 5)) == [(2, 7), (1, 2), (1, 5)]


def test_split_is_nearly_equal() -> None:
    assert split_step(range(7), 3) == [[0, 1, 2], [3, 4], [5, 6]]
