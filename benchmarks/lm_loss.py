"""The loss of a language model without its logits, against the plain way: memory, time, result.

    python benchmarks/lm_loss.py [--threads 2] [--rounds 15] [--device cuda] [--bf16] [--chunk N]

Embedding, norm and output head of SmolLM2-135M's shape (width 576, vocabulary 49,152) with random
weights, batch 4 x 512, forward and backward. Both ways alternate in one process; times are the
fastest of each. Memory is the most that logits, their copies and gradients and the loss hold at a
time, counted storage by storage; a trained head's own gradient is not among them. Exit code 1 if it
is not 10 times smaller, if losses differ by more than 1e-6, or if it is slower.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from pages import wait
from torch import Tensor, nn
from torch.nn import functional

from peftlab.memory.meter import TimelineMeter
from peftlab.models.quiet import quiet_transformers
from peftlab.tasks import lm_loss
from peftlab.tasks.lm_loss import loss_sum

MEMORY_BAR, LOSS_BAR = 10, 1e-6
Loss = Callable[[nn.Module, dict[str, Tensor], Tensor], Tensor]


def build(frozen_head: bool) -> nn.Module:
    """Input and output of SmolLM2-135M, tied, without the blocks between them."""
    config = transformers.LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        num_hidden_layers=0,
        num_attention_heads=9,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with quiet_transformers():
        model = transformers.LlamaForCausalLM(config).train()
    model.lm_head.requires_grad_(not frozen_head)
    return model


def plain(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """As transformers' models do: all logits in fp32, labels moved by one."""
    logits = model(**inputs, use_cache=False).logits.float()
    following = functional.pad(labels, (0, 1), value=-100)[:, 1:]
    return functional.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum")


def logits_bytes(loss_function: Loss, *arguments: Any) -> int:
    """The most that logits and loss hold at a time, forward or backward."""
    model, meter = arguments[0], TimelineMeter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with meter.step(model, optimizer, arguments[1:]):
        with meter.phase("forward"):
            loss = loss_function(*arguments)
        with meter.phase("backward"):
            loss.backward()
        with meter.phase("optimizer"):
            optimizer.step()
        del loss
    optimizer.zero_grad()
    phases = (meter.trace.breakdown(phase) for phase in ("forward", "backward"))
    return max(parts.logits_bytes for parts in phases)


def step(loss_function: Loss, *arguments: Any) -> tuple[float, float, Tensor]:
    """Seconds of forward and backward, the loss, and the gradient of the norm."""
    model = arguments[0]
    model.zero_grad()
    wait(arguments[2].device)
    begin = time.perf_counter()
    loss = loss_function(*arguments)
    loss.backward()
    wait(arguments[2].device)
    return time.perf_counter() - begin, loss.item(), model.model.norm.weight.grad.clone()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chunk", type=int, default=lm_loss.CHUNK_ROWS)
    parser.add_argument("--bf16", action="store_true", help="within autocast")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lm_loss.CHUNK_ROWS = options.chunk
    device = torch.device(options.device)
    ids = torch.randint(49_152, (4, 512), generator=torch.Generator().manual_seed(0)).to(device)
    third = torch.where(torch.arange(512, device=device) < 512 * 2 // 3, -100, ids)
    within = torch.autocast(device.type, torch.bfloat16, enabled=options.bf16)
    print("| head | targets | MiB, plain | ours | plain ÷ ours | ms, plain | ours | plain ÷ ours |"
          " loss, relative difference | gradient |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    good = True
    for frozen in (True, False):
        for share, labels in (("all", ids), ("a third", third)):
            arguments = (build(frozen).to(device), {"input_ids": ids}, labels)
            with within, torch.autograd.set_multithreading_enabled(False):
                sizes = [logits_bytes(way, *arguments) for way in (plain, loss_sum)]
                steps = [
                    (step(plain, *arguments), step(loss_sum, *arguments))
                    for _ in range(options.rounds)
                ]
            seconds = [min(pair[way][0] for pair in steps) for way in (0, 1)]
            (_, loss, gradient), (_, other, its) = steps[-1]
            off = abs(other - loss) / loss
            worst = float((its - gradient).norm() / gradient.norm())
            memory, speed = sizes[0] / sizes[1], seconds[0] / seconds[1]
            good &= memory >= MEMORY_BAR and off <= LOSS_BAR and speed >= 1
            print(
                f"| {'frozen' if frozen else 'trains'} | {share} | {sizes[0] / 2**20:.0f} | "
                f"{sizes[1] / 2**20:.0f} | {memory:.1f} | {seconds[0] * 1e3:.3g} | "
                f"{seconds[1] * 1e3:.3g} | {speed:.2f} | {off:.1e} | {worst:.1e} |",
                flush=True,
            )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
