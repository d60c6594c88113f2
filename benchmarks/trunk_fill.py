"""What filling the trunk cache takes, part by part: the floor of a frozen trunk's training time.

    python benchmarks/trunk_fill.py [--threads 2] [--rounds 5] [--rows 2000]

MiniLM's blocks on movie-sentiment's training rows, in the batches in which a run fills its cache.
Each part is run alone, on the same shapes and in its own order, and the least of all rounds counts;
parts run alone find their operands in caches, so they sum to less than the whole. The last row is
what the products would take at the matrix-multiply peak measured on the machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftlab.assemble import assemble
from peftlab.experiment.resolve import resolve
from peftlab.memory.flops import FlopsByLength, count_flops
from peftlab.memory.host_allocator import keep_freed_memory, keep_large_blocks
from peftlab.models.config import PrecisionConfig
from peftlab.models.load import load_tokenizer
from peftlab.training.utilisation import matmul_flops_per_second
from peftlab.trunk.cache import fill_batches


def load(rows: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The backbone of head-only, in eval mode, and the batches of its fill, without labels."""
    overrides = [f"data.max_train_rows={rows}"]
    experiment = resolve("movie-sentiment", "head-only", overrides=overrides).experiment
    kind = experiment.build_kind()
    splits, tokenizer = kind.read(), load_tokenizer(experiment.model)
    model = assemble(experiment, kind, splits, tokenizer).model
    features = kind.encode(splits.train, tokenizer, experiment.train.max_length)
    lengths = {row: len(each["input_ids"]) for row, each in enumerate(features)}
    batches = [
        dict(kind.collate([features[row] for row in batch], tokenizer))
        for batch in fill_batches(lengths, "cpu")
    ]
    for batch in batches:
        del batch["labels"]
    backbone: nn.Module = model.eval().base_model
    return backbone, batches


def parts(
    model: nn.Module, batches: list[dict[str, Tensor]]
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and code of each part."""
    config = model.config
    width, depth, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    # The last block computes one token of each row, where a head reads no other.
    linears = [m for m in model.encoder.layer[:-1].modules() if isinstance(m, nn.Linear)]
    widths = {layer.in_features for layer in linears}
    tokens = [batch["input_ids"].numel() for batch in batches]
    inputs = {each: torch.randn(max(tokens), each) for each in widths}
    wide = [torch.randn(count, config.intermediate_size) for count in tokens]
    queries = [
        torch.randn(*batch["input_ids"].shape, heads, width // heads).transpose(1, 2)
        for batch in batches
    ]

    def forward() -> None:
        for batch in batches:
            model(**batch)

    def counted() -> None:
        few = FlopsByLength()
        for batch in batches:
            few.of(lambda inputs: model(**inputs).pooler_output, batch)

    def products() -> None:
        for count in tokens:
            for layer in linears:
                layer(inputs[layer.in_features][:count])

    def attention() -> None:
        for query in queries:
            for _ in range(depth - 1):
                functional.scaled_dot_product_attention(query, query, query)

    def activations() -> None:
        for hidden in wide:
            for _ in range(depth - 1):
                functional.gelu(hidden)

    def norms() -> None:
        for count in tokens:
            hidden = inputs[width][:count]
            for _ in range(2 * depth - 2):
                functional.layer_norm(hidden + hidden, (width,))

    yield "forward, operations counted as in a run", counted
    yield "forward", forward
    yield "linear layers alone", products
    yield "attention alone", attention
    yield "activations alone", activations
    yield "sums and norms alone", norms


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    keep_large_blocks()
    model, batches = load(options.rows)
    with count_flops() as whole:
        for batch in batches:
            model(**batch)
    table = list(parts(model, batches))
    seconds: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, run in table:
            began = time.perf_counter()
            run()
            seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - began)
    peak = matmul_flops_per_second(torch.device("cpu"), PrecisionConfig())
    seconds[f"all products at {peak / 1e9:.0f} GFLOP/s"] = whole.flops / peak
    padded = sum(batch["input_ids"].numel() for batch in batches)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    print(f"{len(batches)} batches, {real:,} tokens and {padded - real:,} of padding, "
          f"{whole.flops / 1e9:,.0f} GFLOP")  # fmt: skip
    print("| part | s | of the fill |\n| --- | ---: | ---: |")
    first = next(iter(seconds.values()))
    for name, each in seconds.items():
        print(f"| {name} | {each:.2f} | {each / first:.0%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
