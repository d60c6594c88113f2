"""What is emulated of CUDA, against torch's own header, dispatcher, autograd and GradScaler."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from peftlab.memory import autocast
from peftlab.memory.autocast import cuda_autocast
from peftlab.memory.cards import Chip
from peftlab.memory.emulate import ScaledOptimizer, cuda_kernels
from peftlab.memory.fake import fake_world
from peftlab.memory.timeline import Timeline

BF16 = torch.bfloat16
LISTS = {
    "AT_FORALL_LOWER_PRECISION_FP": autocast.LOWER_PRECISION,
    "AT_FORALL_FP32": autocast.FP32,
    "AT_FORALL_FP32_SET_OPT_DTYPE": autocast.FP32_OUTPUT,
    "AT_FORALL_PROMOTE": autocast.PROMOTE,
}


def allocated(timeline: Timeline) -> Counter[tuple[str, int]]:
    return Counter((storage.op, storage.size) for storage in timeline.trace().storages)


def of_macro(name: str) -> set[str]:
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    found = re.search(rf"#define {name}\(_\)((?:.*\\\n)*.*\n)", header.read_text())
    assert found is not None
    entries = re.findall(r"_\(([^)]*)\)", found[1])
    return {".".join(part.strip() for part in entry.split(",")) for entry in entries}


@pytest.mark.parametrize("macro", LISTS)
def test_lists_are_those_of_the_installed_torch(macro: str) -> None:
    assert of_macro(macro) == LISTS[macro]


def test_lists_are_complete() -> None:
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")
    # The first raises, the others are no operations of models.
    others = {"binary_cross_entropy", "cudnn_convolution", "cudnn_convolution_transpose"}
    others |= {"_cudnn_rnn"}  # where torch is built with cuDNN
    ours = frozenset().union(*LISTS.values(), autocast.FP32_NORM)
    assert {name.removeprefix("aten::") for name in registered} - others == ours


def cases() -> dict[str, tuple[Callable[[], Tensor], torch.dtype]]:
    half, wide = torch.ones(4, 4, dtype=BF16), torch.ones(4, 4)
    return {
        "softmax": (lambda: half.softmax(-1), torch.float32),
        "softmax of a chosen type": (lambda: half.softmax(-1, dtype=BF16), BF16),
        "log_softmax": (lambda: half.log_softmax(-1), torch.float32),
        "layer_norm": (lambda: functional.layer_norm(half, (4,)), torch.float32),
        "rms_norm": (lambda: functional.rms_norm(half, (4,)), torch.float32),
        "pow": (lambda: half.pow(2), torch.float32),
        "exp": (lambda: half.exp(), torch.float32),
        "sum": (lambda: half.sum(), torch.float32),
        "sum of rows": (lambda: half.sum(-1, keepdim=True), torch.float32),
        "norm": (lambda: torch.ops.aten.norm.Scalar(half), torch.float32),
        "norm of rows": (lambda: torch.ops.aten.norm.ScalarOpt_dim(half, 2, [0]), torch.float32),
        "sum of integers": (lambda: torch.ones(3, dtype=torch.int64).sum(), torch.int64),
        "linear": (lambda: functional.linear(wide, wide), BF16),
        "matmul": (lambda: wide @ wide, BF16),
        "einsum": (lambda: torch.einsum("ij,jk->ik", wide, wide), BF16),
        "double stays": (lambda: wide.double().exp(), torch.float64),
        "addcmul": (lambda: torch.addcmul(half, half, wide), torch.float32),
        "gelu": (lambda: functional.gelu(half), BF16),
        "mean": (lambda: half.mean(), BF16),
        "max_pool3d": (lambda: functional.max_pool3d(half.view(1, 1, 2, 2, 4), 2), BF16),
    }


@pytest.mark.parametrize("case", cases())
def test_types_are_those_of_cuda(case: str) -> None:
    run, dtype = cases()[case]
    with cuda_autocast(), torch.autocast("cpu", BF16):
        assert run().dtype is dtype
    with cuda_autocast():
        outside = run()
    assert torch.equal(outside, run())  # nothing is cast outside of autocast


def test_the_cpu_list_is_back_afterwards() -> None:
    with cuda_autocast():
        pass
    with torch.autocast("cpu", BF16):
        assert torch.ones(4, dtype=BF16).softmax(-1).dtype is BF16
        assert functional.max_pool3d(torch.ones(1, 1, 2, 2, 4, dtype=BF16), 2).dtype is not BF16


def test_gradients_pass_the_casts() -> None:
    tensor = torch.tensor([1.0, 2.0], requires_grad=True)
    with cuda_autocast(), torch.autocast("cpu", BF16):
        (tensor.to(BF16).exp().sum() + tensor.norm()).backward()
    expected = tensor.detach().exp() + tensor.detach() / tensor.detach().norm()
    assert tensor.grad is not None
    torch.testing.assert_close(tensor.grad, expected, rtol=1e-2, atol=1e-2)


def test_casts_of_trained_weights_are_cached_until_autocast_ends() -> None:
    with fake_world(), cuda_kernels(Chip()), Timeline() as timeline:
        trained = torch.empty(64, 64, requires_grad=True)
        frozen = torch.empty(32, 64)
        inputs = torch.empty(2, 64, dtype=BF16)
        timeline.begin()
        with timeline.phase("forward"), torch.no_grad():
            with torch.autocast("cpu", BF16):
                for weight in (trained, trained, frozen, frozen):
                    functional.linear(inputs, weight)
            after = timeline.trace().live_bytes()[-1]
    casts = allocated(timeline)
    assert casts["aten._to_copy.default", 64 * 64 * 2] == 1
    assert casts["aten._to_copy.default", 32 * 64 * 2] == 2
    assert after == trained.nbytes + frozen.nbytes + inputs.nbytes


def test_checkpointing_repeats_the_forward_in_the_same_types() -> None:
    norm = nn.LayerNorm(16)
    seen: list[torch.dtype] = []

    def block(hidden: Tensor) -> Tensor:
        made = norm(hidden)
        seen.append(made.dtype)
        return functional.linear(made, norm.weight.repeat(16, 1))

    with cuda_autocast(), torch.autocast("cpu", BF16):
        hidden = torch.ones(2, 16, dtype=BF16, requires_grad=True)
        loss = checkpoint(block, hidden, use_reentrant=False).sum()
    with cuda_autocast():
        loss.backward()
    assert seen == [torch.float32, torch.float32]


def test_dropout_keeps_one_byte_an_element() -> None:
    with fake_world(), cuda_kernels(Chip()), Timeline() as timeline:
        hidden = torch.empty(1000, requires_grad=True)
        timeline.begin()
        out = functional.dropout(hidden, 0.5)
        out.sum().backward()
        assert functional.dropout(hidden, 0.5, training=False) is hidden
    assert hidden.grad is not None
    made = allocated(timeline)
    assert made["aten.native_dropout.default", 4000] == 1
    assert made["aten.native_dropout.default", 1000] == 1
    assert not any("bernoulli" in op or "empty_like" in op for op, _ in made)


def test_attention_follows_autocast() -> None:
    with fake_world(), cuda_kernels(Chip()), torch.autocast("cpu", BF16):
        query = torch.empty(1, 2, 8, 16)
        out = functional.scaled_dot_product_attention(query, query, query)
    assert out.dtype is BF16


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaled_step_is_a_step(fused: bool) -> None:
    weights = []
    for scaled in (False, True):
        parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
        wrapped = ScaledOptimizer(optimizer) if scaled else None
        for _ in range(2):
            loss = parameter.square().sum()
            (wrapped.scale(loss) if wrapped else loss).backward()
            if wrapped:
                assert parameter.grad is not None
                assert parameter.grad.abs().max() > 1000
                wrapped.unscale()
            nn.utils.clip_grad_norm_([parameter], 1.0)
            (wrapped or optimizer).step()
            optimizer.zero_grad()
        weights.append(parameter.detach())
    torch.testing.assert_close(weights[0], weights[1])


def test_a_scaled_step_on_fake_tensors_updates() -> None:
    with fake_world():
        parameter = nn.Parameter(torch.empty(8))
        optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, foreach=False)
        scaled = ScaledOptimizer(optimizer)
        scaled.scale(parameter.sum()).backward()
        scaled.unscale()
        scaled.step()
    assert optimizer.state[parameter]["momentum_buffer"].shape == (8,)
