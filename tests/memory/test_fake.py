"""Operations on tensors without storage: shapes remembered, results as real kernels leave them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from peftlab.memory.fake import fake_world
from peftlab.memory.recall import Recall
from peftlab.memory.timeline import Timeline


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered from other tests."""
    monkeypatch.setattr(Recall, "_recipes", {})


def described(out: Any) -> Any:
    if isinstance(out, Tensor):
        storage = out.untyped_storage()
        return out.shape, out.stride(), out.storage_offset(), out.dtype, storage.nbytes()
    return [described(each) for each in out]


OPERATIONS = [
    lambda x: x + 1,
    lambda x: x.to(torch.bfloat16) * 2.0,
    lambda x: x.t()[1:],
    lambda x: x.split(2, dim=1),
    lambda x: x.mul_(3),
    lambda x: torch.native_layer_norm(x, (6,), None, None, 1e-5),
    lambda x: x.max(dim=1),
    lambda x: (x @ x.t()).unsqueeze(0).expand(3, 4, 4),
    lambda x: functional.mse_loss(x, torch.zeros_like(x)),
    lambda x: torch._foreach_mul([x, x], 2.0),
    lambda x: x.view(torch.int32),
]


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_remembered_result_is_that_of_the_first_time_and_of_a_real_tensor(operation: Any) -> None:
    real = described(operation(torch.ones(4, 6)))
    with fake_world() as world:
        unknown = world.mode.from_tensor(torch.ones(4, 6))
        first = described(operation(unknown.clone()))
        again = operation(unknown.clone())
    assert first == described(again) == real
    assert all(isinstance(t, FakeTensor) for t in ([again] if isinstance(again, Tensor) else again))


@pytest.mark.usefixtures("forgetful")
def test_views_share_the_storage_of_their_own_input() -> None:
    with fake_world() as world:
        first, second = (world.mode.from_tensor(torch.ones(4, 6)) for _ in range(2))
        views = [tensor.t() for tensor in (first, second)]
        written = second.mul_(2)
    storages = [t.untyped_storage()._cdata for t in (first, second, *views)]
    assert storages[:2] == storages[2:]
    assert storages[0] != storages[1]
    assert written is second


@pytest.mark.usefixtures("forgetful")
def test_numbers_of_another_type_are_another_key() -> None:
    with fake_world() as world:
        whole = world.mode.from_tensor(torch.ones(4, dtype=torch.long))
        dtypes = [(whole * 2).dtype, (whole * 2.0).dtype, (whole * True).dtype, (whole * 2).dtype]
    assert dtypes == [torch.long, torch.float32, torch.long, torch.long]


@pytest.mark.usefixtures("forgetful")
def test_what_carries_values_is_computed_each_time() -> None:
    rows = torch.tensor([[True, True], [True, False]])
    real = list(rows)
    with fake_world() as world:
        masks = [world.fake(mask) for mask in real]
        answers = [bool(mask.all()) for mask in masks]
        lengths = [len(torch.zeros(2)[mask]) for mask in masks]
    assert (answers, lengths) == ([True, False], [2, 1])


@pytest.mark.usefixtures("forgetful")
def test_a_block_seen_before_asks_torch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    learned = []
    original = Recall.learn

    def learn(recall: Recall, key: Any, inputs: Any, out: Any) -> None:
        learned.append(key[0])
        original(recall, key, inputs, out)

    monkeypatch.setattr(Recall, "learn", learn)
    events = []
    for _ in range(2):
        with fake_world(), Timeline() as timeline:
            timeline.begin()
            layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
            with timeline.phase("forward"):
                loss = layer(torch.randn(2, 8, 32)).sum()
            with timeline.phase("backward"):
                loss.backward()
            del loss
        events.append(timeline.trace().events)
        learned.append("end of plan")
    assert learned.index("end of plan") > 20
    assert learned[learned.index("end of plan") :] == ["end of plan"] * 2
    assert events[0] == events[1]


@pytest.mark.parametrize(
    ("weights", "device", "statistics"),
    [
        (torch.float32, "cpu", torch.float32),
        (torch.bfloat16, "cpu", torch.bfloat16),
        (torch.bfloat16, "cuda", torch.float32),
    ],
)
def test_layer_norm_keeps_its_statistics_in_the_kernels_type(
    weights: torch.dtype, device: str, statistics: torch.dtype
) -> None:
    def kept() -> torch.dtype:
        half, weight = torch.empty(2, 8, dtype=torch.bfloat16), torch.ones(8, dtype=weights)
        with torch.no_grad():
            return torch.native_layer_norm(half, (8,), weight, weight, 1e-5)[1].dtype

    with fake_world(device):
        assert kept() is statistics
    if device == "cpu":
        assert kept() is statistics
