"""The fused LoRA layer against PEFT's own: time of a training step, and bytes kept for backward.

    python benchmarks/fused_lora.py [--threads 2] [--rounds 30] [--batch 32] [--length 28]
        [--device cuda] [--settings "fp32;bf16 base, fp32 adapters"]

A BERT of MiniLM's shape with random weights, LoRA on all linear layers, both models in one process;
with dropout PEFT's side once as it comes and once with peftlab's faster random numbers.
Steps alternate, and which is first alternates too, so that both meet the same machine. Two ratios
of time: the median over rounds of a round's own, and that of the fastest step of each. A machine
that others use blurs the second more. The exit code is 1 if the median ratio of plain fp32 is above
0.9, or if more bytes are kept than 1 of PEFT's in plain fp32 and 0.75 of them elsewhere.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any, NamedTuple

import torch
import transformers
from pages import some_of, wait
from torch import Tensor, nn

from peftlab.methods.lora import Lora, LoraConfig
from peftlab.models.dropout import draw_dropout_fast
from peftlab.models.quiet import quiet_transformers

TIME_BAR = 0.9


class Setting(NamedTuple):
    """A row: the base's precision, the recipe's method section, and PEFT's bytes to stay below.

    ``draws_as_here``: PEFT's side drops out with peftlab's random numbers.
    """

    dtype: torch.dtype
    section: dict[str, Any]
    bytes_bar: float
    draws_as_here: bool = False


SETTINGS = {
    "fp32": Setting(torch.float32, {}, 1.0),
    "fp32, lora_dropout 0.1": Setting(torch.float32, {"lora_dropout": 0.1}, 0.75),
    "the same, drawn as here": Setting(torch.float32, {"lora_dropout": 0.1}, 0.75, True),
    "bf16 base, fp32 adapters": Setting(torch.bfloat16, {}, 0.75),
}


def build(
    fused: bool,
    section: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    fast_dropout: bool = True,
) -> nn.Module:
    """MiniLM-L6's shape with LoRA, ready to train; the trunk's own dropout is off."""
    config = transformers.BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    with quiet_transformers():
        model = transformers.BertForSequenceClassification(config).to(dtype)
    attached = Lora(LoraConfig(fused=fused, **section)).attach(model).train()
    if fast_dropout:
        draw_dropout_fast(attached)
    return attached


def saved_bytes(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes of the distinct storages that a forward keeps for backward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    size = sum(size for size, _ in kept.values())
    del loss
    return size


def step(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    """Seconds of forward and backward."""
    for parameter in model.parameters():
        parameter.grad = None
    wait(inputs["input_ids"].device)
    begin = time.perf_counter()
    model(**inputs).loss.backward()
    wait(inputs["input_ids"].device)
    return time.perf_counter() - begin


def rounds(
    models: list[nn.Module], inputs: dict[str, Tensor], number: int
) -> list[tuple[float, float]]:
    """Seconds of a step of each of the two models, of every round."""
    for model in models:
        step(model, inputs)
    seconds = []
    for index in range(number):
        order = (0, 1) if index % 2 else (1, 0)
        took = {which: step(models[which], inputs) for which in order}
        seconds.append((took[0], took[1]))
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=28)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--settings", type=some_of(SETTINGS), default=SETTINGS, metavar="A;B")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ids = torch.randint(1000, 30000, (options.batch, options.length), device=options.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    print("| setting | PEFT s | fused s | median | of fastest | PEFT bytes kept | fused | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    met = True
    for name in options.settings:
        dtype, section, bytes_bar, draws_as_here = SETTINGS[name]
        models = [
            build(fused, section, dtype, fused or draws_as_here).to(options.device)
            for fused in (False, True)
        ]
        seconds = rounds(models, inputs, options.rounds)
        ratio = statistics.median(ours / theirs for theirs, ours in seconds)
        before, after = (min(column) for column in zip(*seconds, strict=True))
        own = build(False, section, dtype, fast_dropout=False).to(options.device)
        kept, fused = saved_bytes(own, inputs), saved_bytes(models[1], inputs)
        print(
            f"| {name} | {before:.3f} | {after:.3f} | {ratio:.3f} | {after / before:.3f} "
            f"| {kept:,} | {fused:,} | {fused / kept:.3f} |"
        )
        met &= fused <= bytes_bar * kept and (name != "fp32" or ratio <= TIME_BAR)
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
