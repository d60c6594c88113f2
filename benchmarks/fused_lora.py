"""The fused LoRA layer against PEFT's own: time of a training step, and bytes kept for backward.

    python benchmarks/fused_lora.py [--threads 2] [--rounds 30] [--batch 32] [--length 32]

A BERT of MiniLM's shape with random weights, LoRA on all linear layers, both models in one process.
Steps alternate, so that both meet the same machine; the ratios are of the fastest step of each.
Exit code 1 if the fused step takes more than 0.9 of PEFT's.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from peftlab.methods.lora import Lora, LoraConfig
from peftlab.models.dropout import draw_dropout_fast
from peftlab.models.quiet import quiet_transformers

BAR = 0.9
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, lora_dropout 0.1": {"lora_dropout": 0.1},
}


def build(fused: bool, section: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
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
    # As in a run, for both: how masks are drawn is not what is compared.
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
    begin = time.perf_counter()
    model(**inputs).loss.backward()
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ids = torch.randint(1000, 30000, (options.batch, options.length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    print("| setting | PEFT s | fused s | ratio | PEFT bytes kept | fused | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    worst = 0.0
    for name, section in SETTINGS.items():
        theirs, ours = build(False, section), build(True, section)
        times = [(step(theirs, inputs), step(ours, inputs)) for _ in range(options.rounds)]
        before, after = (min(column) for column in zip(*times, strict=True))
        kept, fused = saved_bytes(theirs, inputs), saved_bytes(ours, inputs)
        print(
            f"| {name} | {before:.3f} | {after:.3f} | {after / before:.3f} "
            f"| {kept:,} | {fused:,} | {fused / kept:.3f} |"
        )
        worst = max(worst, after / before)
    return int(worst > BAR)


if __name__ == "__main__":
    sys.exit(main())
