"""The measurement of a step against bytes counted by hand and against torch's own counter."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from operator import itemgetter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode

from peftlab.memory.flops import FlopsByLength, count_flops
from peftlab.memory.meter import (
    NullMeter,
    StepMeasurement,
    TimelineMeter,
    process_peak_bytes,
    state_tensors,
    step_meter,
)
from peftlab.memory.timeline import Timeline
from peftlab.models.quiet import quiet_transformers
from peftlab.models.tiny import tiny_config

WIDTH, BATCH, CLASSES = 32, 8, 5


def tiny_model(**overrides: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 900,
        "use_cache": False,
    }
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**(settings | overrides)))
    return model.train()


def tiny_batch() -> dict[str, Tensor]:
    ids = torch.arange(3 * 16).view(3, 16)
    return {"input_ids": ids, "labels": ids.clone()}


def train_step(
    meter: TimelineMeter | NullMeter,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[dict[str, Tensor]],
) -> None:
    with meter.step(model, optimizer, batches):
        optimizer.zero_grad()
        for batch in batches:
            with meter.phase("forward"):
                loss = model(**batch).loss
            with meter.phase("backward"):
                loss.backward()
            del loss
        with meter.phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


def measure(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[dict[str, Tensor]],
    steps: int = 2,
) -> tuple[StepMeasurement, TimelineMeter]:
    meter = TimelineMeter()
    for _ in range(steps):
        train_step(meter, model, optimizer, batches)
    return meter.result(), meter


def test_two_layers_by_hand() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    batch = torch.randn(BATCH, WIDTH)
    parameters = 4 * sum(p.numel() for p in model.parameters())
    meter = TimelineMeter()
    for _ in range(2):
        with meter.step(model, optimizer, batch):
            optimizer.zero_grad()
            with meter.phase("forward"):
                hidden = model[0](batch)
                hidden = model[1](hidden)
                out = model[2](hidden)
                loss = out.square().sum()
                del hidden, out
            with meter.phase("backward"):
                loss.backward()
            with meter.phase("optimizer"):
                optimizer.step()
            del loss
    marks, parts = meter.result().marks, meter.result().breakdown
    held = 4 * BATCH * (WIDTH + WIDTH + CLASSES)  # the batch, relu's output, the last output
    assert marks.start_bytes == 3 * parameters + 4 * BATCH * WIDTH
    assert marks.forward_end_bytes == 2 * parameters + held + 4
    assert marks.backward_end_bytes == 3 * parameters + 4 * BATCH * WIDTH + 4
    assert marks.optimizer_end_bytes == marks.backward_end_bytes
    assert parts.weights_bytes == parts.optimizer_bytes == parameters
    assert marks.forward_peak_bytes == marks.start_bytes  # before the old gradients are dropped


@pytest.mark.parametrize("checkpointing", [False, True])
def test_parts_are_disjoint_and_sum_to_the_peak(checkpointing: bool) -> None:
    model = tiny_model()
    if checkpointing:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    result, meter = measure(model, torch.optim.AdamW(model.parameters()), [tiny_batch()])
    parts = result.breakdown.model_dump()
    assert (
        sum(v for k, v in parts.items() if k not in ("peak_bytes", "peak_moment"))
        == (parts["peak_bytes"])
    )
    weights = 4 * sum(p.numel() for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    assert parts["weights_bytes"] == weights + buffers
    marks = result.marks
    steps = 4 * len(list(model.parameters()))  # Adam's counters
    gradients = weights
    batch = sum(t.nbytes for t in tiny_batch().values())
    assert marks.start_bytes == weights + buffers + 2 * weights + steps + gradients + batch
    assert parts["logits_bytes"] >= 3 * 4 * 3 * 16 * 900
    assert parts["peak_moment"] == "backward"
    assert parts["peak_bytes"] == max(meter.trace.live_bytes()[meter.trace.start :])


def test_checkpointing_trades_activations_for_arithmetic() -> None:
    plain, _ = measure(m := tiny_model(), torch.optim.AdamW(m.parameters()), [tiny_batch()])
    model = tiny_model()
    model.activation_checkpointing_enable()  # type: ignore[operator]
    saved, _ = measure(model, torch.optim.AdamW(model.parameters()), [tiny_batch()])
    assert 0 < saved.breakdown.activations_bytes < plain.breakdown.activations_bytes / 2
    assert saved.breakdown.logits_bytes == plain.breakdown.logits_bytes
    assert saved.flops > plain.flops


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_equal_those_of_torch(checkpointing: bool) -> None:
    # torch has no formula for the CPU's attention kernel, but it has for plain products.
    model = tiny_model(attn_implementation="eager")
    if checkpointing:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    result, _ = measure(model, torch.optim.SGD(model.parameters()), [tiny_batch()], steps=1)
    with FlopCounterMode(display=False) as torchs, count_flops() as ours:
        model(**tiny_batch()).loss.backward()
    assert result.flops == ours.flops == torchs.get_total_flops() > 0


def test_attention_kernel_counts_like_its_products() -> None:
    query = torch.randn(2, 4, 8, 16)
    with count_flops() as kernel:
        nn.functional.scaled_dot_product_attention(query, query, query)
    with count_flops() as products:
        (query @ query.mT) @ query
    assert kernel.flops == products.flops == 2 * (2 * 2 * 4 * 8 * 8 * 16)


@pytest.mark.parametrize("product", ["mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"])
def test_a_product_counts_wherever_its_result_goes(product: str) -> None:
    batch = (3,) if "b" in product else ()
    into, left, right = (torch.randn(*batch, *shape) for shape in ((4, 5), (4, 6), (6, 5)))
    with count_flops() as counted:
        getattr(into if "add" in product else left, product)(
            *(left, right) if "add" in product else (right,)
        )
    assert counted.flops == 2 * 4 * 5 * 6 * (3 if batch else 1)


@torch.no_grad()
def test_few_batches_tell_the_operations_of_all() -> None:
    model, few, expected = tiny_model(), FlopsByLength(), 0
    counted: list[int] = []

    def compute(inputs: Mapping[str, Tensor]) -> Tensor:
        counted.append(len(_get_current_dispatch_mode_stack()))  # type: ignore[no-untyped-call]
        logits: Tensor = model(**inputs).logits
        return logits

    assert few.flops == 0
    for rows, length in [(2, 40), (3, 38), (1, 31), (4, 30), (2, 23), (5, 22), (2, 20)]:
        inputs = {"input_ids": torch.zeros(rows, length, dtype=torch.long)}
        few.of(compute, inputs)
        with count_flops() as each:
            model(**inputs)
        expected += each.flops
        # Exact between lengths that were counted; the last row is shorter than any.
        if length == 22:
            assert few.flops == expected
    assert counted == [1, 0, 0, 1, 0, 1, 0]
    assert expected < few.flops < 1.001 * expected


def test_accumulation_holds_gradients_of_earlier_micro_batches() -> None:
    model = tiny_model()
    once, _ = measure(model, torch.optim.SGD(model.parameters()), [tiny_batch()])
    twice, _ = measure(model, torch.optim.SGD(model.parameters()), [tiny_batch()] * 2)
    gradients = 4 * sum(p.numel() for p in model.parameters())
    assert twice.marks.forward_end_bytes == once.marks.forward_end_bytes + gradients
    assert twice.flops == 2 * once.flops


def test_measuring_changes_no_number() -> None:
    weights = []
    for meter in (NullMeter(), TimelineMeter()):
        model = tiny_model()
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            train_step(meter, model, optimizer, [tiny_batch()])
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def peak_without_observer(step: Callable[[], None]) -> int:
    """The most bytes above those at the start, by the CPU allocator's own events."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(accumulate(change for _, change in sorted(changes, key=itemgetter(0))))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["bert", "llama", "qwen2"])
def test_a_step_allocates_the_same_when_nobody_looks(architecture: str, tied: bool) -> None:
    """A dispatch mode could change what autograd does in place; it does not."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(architecture)
    config.tie_word_embeddings, config.is_decoder = tied, True
    torch.manual_seed(0)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    meter = TimelineMeter()

    def step(meter: TimelineMeter | NullMeter) -> None:
        train_step(meter, model, optimizer, [tiny_batch()])

    for each in (NullMeter(), meter):
        step(each)
        # The allocator's events do not tell how large a block was that is older than they are.
        optimizer.zero_grad()
    result = meter.result()
    above = result.breakdown.peak_bytes - result.marks.start_bytes
    inputs = 2 * 3 * 16 * 8
    assert peak_without_observer(partial(step, NullMeter())) == above + inputs


def test_eight_bit_state_is_optimizer_memory() -> None:
    import bitsandbytes

    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, CLASSES, bias=False))
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())
    meter = TimelineMeter()
    for _ in range(2):
        with meter.step(model, optimizer):
            with meter.phase("forward"):
                loss = model(torch.ones(2, 100)).sum()
            with meter.phase("backward"):
                loss.backward()
            with meter.phase("optimizer"):
                optimizer.step()
            del loss
    # 10,000 elements in 8 bits with a constant per 256, 500 in 32 bits, two tables of 256 floats.
    expected = 2 * (10_000 + 4 * 40) + 2 * 4 * 500 + 2 * 4 * 256
    assert meter.result().breakdown.optimizer_bytes == expected
    assert sum(t.nbytes for t in state_tensors(optimizer)) == expected


def test_state_is_found_inside_objects() -> None:
    class Projection:
        def __init__(self) -> None:
            self.basis = torch.zeros(3)

    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter] = {"projection": Projection(), "step": 1, "list": [torch.ones(1)]}
    assert [t.shape[0] for t in state_tensors(optimizer)] == [3, 1]


def test_freed_in_order_and_nothing_kept_alive() -> None:
    with Timeline() as timeline:
        timeline.begin()
        with timeline.phase("forward"):
            first = torch.ones(100)
            gone = weakref.ref(first)
            del first
            assert gone() is None
            second = torch.ones(50)
            third = second.view(5, 10)
            del second
            fourth = torch.ones(25)
            del third, fourth
    trace = timeline.trace()
    assert [change for _, change in trace.events] == [400, -400, 200, 100, -200, -100]
    assert trace.marks().forward_peak_bytes == 400
    assert {s.role for s in trace.storages} == {"temporary"}


def test_a_step_costs_the_same_however_much_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = Timeline._bury

    def bury(timeline: Timeline) -> None:
        seen.append(len(timeline._dead))
        original(timeline)

    monkeypatch.setattr(Timeline, "_bury", bury)
    with Timeline() as timeline:
        timeline.begin()
        with timeline.phase("forward"):
            held = [torch.ones(5) for _ in range(200)]
            seen.clear()
            for _ in range(10):
                torch.ones(7)
        del held
    assert seen[:10] == [0] + [1] * 9
    events = timeline.trace().events
    assert events[200:220] == tuple((200 + i // 2, 28 if i % 2 == 0 else -28) for i in range(20))


def test_an_address_used_again_is_another_storage() -> None:
    with Timeline() as timeline:
        timeline.begin()
        with timeline.phase("forward"):
            for _ in range(50):
                # The allocator hands the same address out again and again.
                torch.ones(64).view(8, 8).add_(1)
    changes = [change for _, change in timeline.trace().events]
    assert changes == [256, -256] * 50
    assert {storage.role for storage in timeline.trace().storages} == {"temporary"}


def test_storages_saved_by_autograd_die_when_it_lets_go() -> None:
    weight = torch.ones(10, requires_grad=True)
    with Timeline() as timeline:
        timeline.adopt([weight], "weights")
        timeline.begin()
        with timeline.phase("forward"):
            loss = (weight * 2).sin().sum()
        with timeline.phase("backward"):
            loss.backward()
        del loss
    live = timeline.trace().live_bytes()
    marks = timeline.trace().marks()
    assert marks.forward_end_bytes == 40 + 40 + 4  # the weight, sin's input, the loss
    assert live[-1] == 2 * 40  # the weight and its gradient


def test_one_timeline_at_a_time() -> None:
    with Timeline(), pytest.raises(RuntimeError, match="one timeline"), Timeline():
        pass
    with Timeline() as timeline:
        timeline.begin()


def test_resizing_is_seen() -> None:
    with Timeline() as timeline:
        timeline.begin()
        with timeline.phase("forward"):
            grown = torch.ones(10)
            grown.resize_(30)
    assert [change for _, change in timeline.trace().events][:2] == [40, 80]


def test_views_of_outside_tensors_are_no_allocation_of_the_step() -> None:
    outside = torch.ones(10)
    with Timeline() as timeline:
        timeline.begin()
        with timeline.phase("forward"):
            outside.add_(1)
            held = outside.view(2, 5)
        del held
    assert [s.role for s in timeline.trace().storages] == ["inputs"]


def test_granularity_rounds_every_storage_up() -> None:
    with Timeline(512) as timeline:
        timeline.begin()
        with timeline.phase("forward"):
            held = torch.ones(1), torch.ones(129)
        del held
    assert [change for _, change in timeline.trace().events][:2] == [512, 1024]


def test_fake_and_real_agree_event_by_event() -> None:
    def events() -> list[tuple[int, int]]:
        layers = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        optimizer = torch.optim.AdamW(layers.parameters(), fused=True)
        meter = TimelineMeter()
        for _ in range(2):
            with meter.step(layers, optimizer):
                with meter.phase("forward"):
                    loss = layers(torch.randn(2, 8, 32)).sum()
                with meter.phase("backward"):
                    loss.backward()
                with meter.phase("optimizer"):
                    optimizer.step()
                del loss
        return list(meter.trace.events)

    real = events()
    with FakeTensorMode():
        fake = events()
    assert len(real) > 100
    assert fake == real


def test_phases_do_not_nest_and_need_a_step() -> None:
    meter = TimelineMeter()
    with pytest.raises(RuntimeError, match="outside of a step"), meter.phase("forward"):
        pass
    with pytest.raises(RuntimeError, match="no step"):
        meter.result()
    with Timeline() as timeline:
        timeline.begin()
        with (
            pytest.raises(RuntimeError, match="another phase"),
            timeline.phase("forward"),
            timeline.phase("backward"),
        ):
            pass


def test_a_failed_step_leaves_no_hooks_and_no_result() -> None:
    model = tiny_model()
    meter = TimelineMeter()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match="boom"), meter.step(model, optimizer):
        raise ValueError("boom")
    assert not model._forward_hooks
    with pytest.raises(RuntimeError):
        meter.result()


def test_meter_for_a_device() -> None:
    assert isinstance(step_meter("cpu"), TimelineMeter)
    assert NullMeter().result() is None


def test_process_peak_covers_what_was_touched() -> None:
    before = process_peak_bytes()
    touched = torch.ones(64 * 2**20 // 4)
    assert process_peak_bytes() >= max(before, touched.nbytes)
