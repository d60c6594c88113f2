"""What kernels allocate inside, against what an H100's allocator counted with torch 2.13."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from peftlab.memory.cards import CARDS, Chip
from peftlab.memory.emulate import cuda_kernels
from peftlab.memory.fake import fake_world
from peftlab.memory.kernels import Kernels
from peftlab.memory.timeline import CUDA_GRANULARITY, Timeline

H100, A100 = CARDS["h100"].chip, CARDS["a100-40gb"].chip
HALF = torch.bfloat16


def inside(call: Callable[[], Any], chip: Chip = H100) -> list[int]:
    """The blocks that came and went within operations, in 512 bytes, largest first."""
    with fake_world(), Timeline(CUDA_GRANULARITY, Kernels(chip)) as timeline:
        timeline.begin()
        with timeline.phase("optimizer"):
            kept = call()
        trace = timeline.trace()
    del kept
    return sorted((s.size for s in trace.storages if s.role == "kernel"), reverse=True)


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((2048, 384), torch.float32, [6_291_456, 512]),
        ((2048, 1536), HALF, [25_165_824, 512]),
        ((4096, 1024), torch.float32, [33_554_432, 512]),
        ((4096, 4096), HALF, [134_217_728, 512]),
        ((1000, 384), torch.float32, []),  # few rows: each block sums its columns whole
        ((64, 4, 384), torch.float32, []),
    ],
)
def test_partial_sums_of_a_bias_gradient(
    shape: tuple[int, ...], dtype: torch.dtype, expected: list[int]
) -> None:
    dims = list(range(len(shape) - 1))
    assert inside(lambda: torch.empty(shape, dtype=dtype).sum(dims)) == expected


def test_norms_of_many_tensors() -> None:
    """MiniLM's and BERT-large's gradients, of which the largest is that of the vocabulary."""
    for count, largest, expected in ((105, 30_522 * 384, 75_264), (393, 30_522 * 1024, 750_080)):
        with fake_world(), Timeline(CUDA_GRANULARITY, Kernels(H100)) as timeline:
            tensors = [torch.empty(largest), *(torch.empty(1) for _ in range(count - 1))]
            timeline.adopt(tensors, "gradients")
            timeline.begin()
            with timeline.phase("optimizer"):
                norms = torch._foreach_norm(tensors)
            sizes = [s.size for s in timeline.trace().storages if s.role != "gradients"]
        assert len(norms) == count
        assert max(sizes) == expected


def test_embeddings_sort_many_tokens_and_add_few() -> None:
    for tokens, width, expected in (
        (4096, 1024, 18_452_480),
        (4096, 576, 10_379_776),
        (3072, 64, 0),
    ):
        with fake_world(), Timeline(CUDA_GRANULARITY, Kernels(H100)) as timeline:
            timeline.begin()
            with timeline.phase("optimizer"):
                gradient, rows = torch.empty(tokens, width), torch.zeros(tokens, dtype=torch.long)
                torch.ops.aten.embedding_dense_backward(gradient, rows, 30_522, -1, False)
            names = [s for s in timeline.trace().storages if "embedding" in s.op]
        blocks = sorted(s.size for s in names)[:-1]  # the last is the gradient itself
        assert max(blocks, default=0) == expected


def attention(
    chip: Chip, dtype: torch.dtype, mask: str, dropout: float, heads: int
) -> tuple[str, list[tuple[str, int]]]:
    """The kernel that ran, and what its backward allocated beside its results."""
    with (
        fake_world(),
        cuda_kernels(chip),
        Timeline(CUDA_GRANULARITY, Kernels(chip)) as timeline,
    ):
        query = torch.empty(4, 704, 24, 128, dtype=dtype, requires_grad=True).transpose(1, 2)
        key = torch.empty(4, 704, heads, 128, dtype=dtype, requires_grad=True).transpose(1, 2)
        seen = torch.ones(4, 1, 704, 704, dtype=torch.bool) if mask == "bool" else None
        timeline.begin()
        with timeline.phase("forward"):
            out = functional.scaled_dot_product_attention(
                query, key, key, seen, dropout, mask == "causal", enable_gqa=heads != 24
            )
        with timeline.phase("backward"):
            out.backward(torch.empty_like(out))
        made = timeline.trace().storages
    name = next((s.op for s in made if "_attention" in s.op and s.phase == "forward"), "math")
    kernel = name.removeprefix("aten._scaled_dot_product_").removesuffix("_attention.default")
    results = -(-query.nbytes // 512) * 512, -(-key.nbytes // 512) * 512
    backward = [(s.op, s.size) for s in made if s.phase == "backward" and "attention" in s.op]
    return kernel, [(op, size) for op, size in backward if size not in results]


CHOICES = [
    # chip, dtype, mask, dropout, heads of the keys, kernel as _fused_sdp_choice says on an H100
    (H100, HALF, "none", 0.0, 24, "cudnn"),
    (H100, HALF, "causal", 0.0, 8, "cudnn"),
    (H100, HALF, "bool", 0.0, 8, "cudnn"),
    (H100, HALF, "none", 0.1, 24, "flash"),
    (H100, HALF, "causal", 0.1, 8, "flash"),
    (H100, HALF, "bool", 0.1, 24, "efficient"),
    (H100, HALF, "bool", 0.1, 8, "math"),
    (H100, torch.float32, "causal", 0.0, 24, "efficient"),
    (H100, torch.float32, "none", 0.0, 8, "math"),
    (A100, HALF, "causal", 0.0, 24, "flash"),
    (A100, HALF, "bool", 0.0, 24, "efficient"),
    (CARDS["t4"].chip, torch.float16, "causal", 0.0, 24, "efficient"),
]


@pytest.mark.parametrize(("chip", "dtype", "mask", "dropout", "heads", "kernel"), CHOICES)
def test_attention_takes_the_kernel_of_the_card(
    chip: Chip, dtype: torch.dtype, mask: str, dropout: float, heads: int, kernel: str
) -> None:
    assert attention(chip, dtype, mask, dropout, heads)[0] == kernel


@pytest.mark.parametrize(
    ("dtype", "mask", "dropout", "heads", "expected"),
    [
        (HALF, "bool", 0.0, 24, [34_873_856]),
        (HALF, "bool", 0.0, 8, [34_873_856 + 34_603_008]),
        (HALF, "causal", 0.1, 24, [37_748_736, 294_912]),
        (torch.float32, "causal", 0.0, 24, [34_636_800, 270_336]),
    ],
)
def test_workspaces_of_attentions_backward(
    dtype: torch.dtype, mask: str, dropout: float, heads: int, expected: list[int]
) -> None:
    _, made = attention(H100, dtype, mask, dropout, heads)
    sizes = sorted((size for _, size in made), reverse=True)
    assert sizes == expected


def test_a_trace_of_tensors_leaves_out_what_kernels_held() -> None:
    with fake_world(), Timeline(CUDA_GRANULARITY, Kernels(H100)) as timeline:
        timeline.begin()
        with timeline.phase("optimizer"):
            gradient = torch.empty(2048, 384)
            total = gradient.sum([0])
        whole = timeline.trace()
        with timeline.phase("optimizer"):
            del gradient, total
    shown, held = whole.of_tensors(), 6_291_456 + 512
    assert whole.breakdown().peak_bytes == shown.breakdown().peak_bytes + held
    assert [shown.storages[index].role for index, _ in shown.events] == ["temporary"] * 2
    assert shown.marks().optimizer_end_bytes == whole.marks().optimizer_end_bytes


def test_the_random_state_of_memory_efficient_attention_is_on_the_host() -> None:
    with fake_world(), cuda_kernels(H100), Timeline(512, Kernels(H100)) as timeline:
        query = torch.empty(2, 4, 64, 32, requires_grad=True)
        timeline.begin()
        out = functional.scaled_dot_product_attention(query, query, query)
        sizes = sorted(s.size for s in timeline.trace().storages if "attention" in s.op)
    assert sizes == [2 * 4 * 64 * 4, out.nbytes]
