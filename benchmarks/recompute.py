"""Selective recomputation against keeping everything: bytes that backward waits for, and time.

    python benchmarks/recompute.py [--threads 2] [--rounds 20] [--dropout 0.1]
        [--architecture bert | llama] [--device cuda] [--methods "prefix;lora q,v"]

A classifier of MiniLM's width and depth with random weights, each method in one process, which
keeps what it frees, as a run of peftlab does. Bytes are those that a forward leaves alive, exact:
with transformers' own dropout and attention, with peftlab's, and with selective recomputation as
well. Steps of the last two alternate; the ratio is the median over rounds of a round's own.
``--cpu-time`` counts the process's own time, for a machine with other work. Gradients are compared
bit by bit; on CUDA an embedding's differ from step to step in any case. Exit code 1 if a method's
gradients differ, if it saves under 25% of the second bytes, or takes over 8% more time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from pages import some_of, wait
from torch import Tensor, nn

from peftlab.memory.host_allocator import keep_freed_memory, keep_large_blocks
from peftlab.memory.timeline import Timeline
from peftlab.methods import METHODS
from peftlab.models.attention import draw_attention_dropout_fast
from peftlab.models.dropout import draw_dropout_fast
from peftlab.models.quiet import quiet_transformers
from peftlab.training.recompute import enable_checkpointing

BYTES, TIME = 0.75, 1.08
METHOD_SECTIONS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "freeze, top 2": {"kind": "freeze", "top": 2},
    "lora": {"kind": "lora"},
    "lora q,v": {"kind": "lora", "target_modules": "attention-qv"},
    "bitfit": {"kind": "bitfit"},
    "prefix": {"kind": "ptuning_v2", "num_virtual_tokens": 20},
}
SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}


def build(
    architecture: str, section: dict[str, Any], dropout: float, selective: bool, own: bool = True
) -> nn.Module:
    """The model with its method attached, ready to train; ``own``: as peftlab draws dropout."""
    if architecture == "bert":
        config: Any = transformers.BertConfig(
            **SIZES,
            intermediate_size=1536,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    else:
        config = transformers.LlamaConfig(
            **SIZES,
            intermediate_size=1024,
            num_key_value_heads=4,
            vocab_size=30522,
            pad_token_id=0,
            attention_dropout=dropout,
            use_cache=False,
        )
    torch.manual_seed(0)
    with quiet_transformers():
        base = transformers.AutoModelForSequenceClassification.from_config(config)
    if selective:
        enable_checkpointing(base, "selective")
    method_class = METHODS.get(section["kind"])
    torch.manual_seed(1)
    model: nn.Module = method_class(method_class.Config(**section)).attach(base)
    if own:
        draw_dropout_fast(model)
        draw_attention_dropout_fast(model)
    return model.train()


def step(model: nn.Module, inputs: dict[str, Tensor], clock: Callable[[], float]) -> float:
    """Seconds of forward and backward."""
    for parameter in model.parameters():
        parameter.grad = None
    wait(inputs["input_ids"].device)
    begin = clock()
    model(**inputs).loss.backward()
    wait(inputs["input_ids"].device)
    return clock() - begin


def left_alive(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes that a forward allocates and leaves to backward."""
    with Timeline() as timeline:
        timeline.adopt(model.parameters(), "weights")
        timeline.begin()
        with timeline.phase("forward"):
            loss = model(**inputs).loss
        marks = timeline.trace().marks()
    del loss
    return marks.forward_end_bytes - marks.start_bytes


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(3)
    step(model, inputs, time.perf_counter)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def compare_gradients(
    once: list[Tensor], twice: list[Tensor], recomputed: list[Tensor]
) -> tuple[bool, str]:
    """Whether all gradients are equal that two plain steps agree in, and what to say of it."""
    stable = [torch.equal(one, other) for one, other in zip(once, twice, strict=True)]
    equal = [torch.equal(one, other) for one, other in zip(once, recomputed, strict=True)]
    good = all(same or not fixed for same, fixed in zip(equal, stable, strict=True))
    if good and not all(stable):
        return good, f"equal but {stable.count(False)} in which plain steps differ"
    return good, "equal" if good else "DIFFER"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--architecture", choices=("bert", "llama"), default="bert")
    methods = METHOD_SECTIONS
    parser.add_argument("--methods", type=some_of(methods), default=methods, metavar="A;B")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    keep_large_blocks()
    clock = time.process_time if options.cpu_time else time.perf_counter
    size = (options.batch, options.length)
    ids = torch.randint(1000, 30000, size, device=options.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    print(
        "| method | gradients | transformers, bytes | peftlab | selective | s | selective | ratio |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    met = True
    for name in options.methods:
        if (options.architecture, name) == ("llama", "bitfit"):
            continue  # Llama has no biases.
        section = METHOD_SECTIONS[name]
        theirs, plain, ours = (
            build(options.architecture, section, options.dropout, selective, own).to(options.device)
            for selective, own in ((False, False), (False, True), (True, True))
        )
        equal, said = compare_gradients(
            gradients(plain, inputs), gradients(plain, inputs), gradients(ours, inputs)
        )
        first, before, after = (left_alive(model, inputs) for model in (theirs, plain, ours))
        del theirs
        pairs = [
            (step(plain, inputs, clock), step(ours, inputs, clock)) for _ in range(options.rounds)
        ]
        before_s, after_s = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(after / before for before, after in pairs)
        print(
            f"| {name} | {said} | {first:,} | {before:,} "
            f"({before / first - 1:+.0%}) | {after:,} ({after / first - 1:+.0%}; "
            f"{after / before - 1:+.0%}) | {before_s:.3f} | {after_s:.3f} | {ratio:.3f} |",
            flush=True,
        )
        met &= equal and after <= BYTES * before and ratio <= TIME
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
