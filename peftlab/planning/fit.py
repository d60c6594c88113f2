"""Does it fit, and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from peftlab.optim.table import OPTIMIZERS
from peftlab.planning.answer import answer
from peftlab.planning.schema import Plan, Suggestion
from peftlab.planning.simulate import PlanRequest

T = TypeVar("T")
_EIGHT_BIT = "adamw_8bit"


def fit(request: PlanRequest, memory_bytes: int, first: Plan | None = None) -> Plan:
    """Plan, compare with the memory there is, and look for changes under which it fits.

    Every suggestion was planned itself. The effective batch (micro-batch times accumulation) stays
    as it is. In order of least harm: smaller micro-batches cost nothing but speed, checkpointing
    costs about a third more arithmetic, an 8-bit optimizer and a base in nf4 change numbers.

    Args:
        first: the plan of the request itself, where it was planned on real batches.

    Raises:
        IncompatibleError: the method cannot be put on this model, or cannot be planned.
    """
    first = first or answer(request)
    fits = first.needed_bytes <= memory_bytes
    suggestions = () if fits else tuple(_suggestions(request, first, memory_bytes))
    return first.model_copy(
        update={"memory_bytes": memory_bytes, "fits": fits, "suggestions": suggestions}
    )


def _suggestions(request: PlanRequest, first: Plan, memory_bytes: int) -> Iterator[Suggestion]:
    for text, overrides, variant in _variants(request):
        known = first if variant == request else None
        found = largest_micro_batch(variant, memory_bytes, known)
        if found is None:
            continue
        smaller, plan = found
        batch = {}
        if len(smaller.lengths) != len(request.lengths):
            batch = {
                "train.per_device_train_batch_size": len(smaller.lengths),
                "train.gradient_accumulation_steps": smaller.train.gradient_accumulation_steps,
            }
            size = f"micro-batches of {len(smaller.lengths)}"
            text = f"{size} and {text}" if text else size
        yield Suggestion(
            text=text, overrides={**overrides, **batch}, needed_bytes=plan.needed_bytes
        )


def _variants(request: PlanRequest) -> Iterator[tuple[str, dict[str, Any], PlanRequest]]:
    """The request itself, then with more and more of what saves memory."""
    yield "", {}, request
    texts: list[str] = []
    overrides: dict[str, Any] = {}
    traits = request.method.traits
    if traits.works_with_checkpointing and request.train.gradient_checkpointing is not True:
        request = request.with_train(gradient_checkpointing=True)
        texts.append("gradient checkpointing")
        overrides["train.gradient_checkpointing"] = True
        yield " and ".join(texts), dict(overrides), request
    if request.sharding != "none":
        return  # Neither of the following shards.
    if OPTIMIZERS.get(request.optim.optim, OPTIMIZERS[_EIGHT_BIT]).state_bits > 8:
        request = replace(request, optim=request.optim.model_copy(update={"optim": _EIGHT_BIT}))
        texts.append("an 8-bit optimizer")
        overrides["optim.optim"] = _EIGHT_BIT
        yield " and ".join(texts), dict(overrides), request
    if traits.works_quantized and request.precision.quantization is None:
        nf4 = request.precision.model_copy(update={"quantization": "nf4"})
        texts.append("a base in nf4")
        overrides["precision.quantization"] = "nf4"
        yield " and ".join(texts), dict(overrides), replace(request, precision=nf4)


def largest_micro_batch(
    request: PlanRequest, memory_bytes: int, known: Plan | None = None
) -> tuple[PlanRequest, Plan] | None:
    """The largest micro-batch that fits, at an unchanged effective batch.

    Args:
        known: the plan of the request itself, if there is one.

    Returns:
        the request with that micro-batch and accumulation, and its plan; None if one example
        is too much already.
    """
    size = len(request.lengths)

    def planned(micro: int) -> tuple[PlanRequest, Plan]:
        if micro == size and known is not None:
            return request, known
        smaller = replace(
            request,
            # The longest examples decide the peak.
            lengths=tuple(sorted(request.lengths, reverse=True)[:micro]),
        ).with_train(
            gradient_accumulation_steps=request.train.gradient_accumulation_steps * size // micro
        )
        # A third micro-batch holds what the second held: plan no more than two of them.
        steps = min(2, smaller.train.gradient_accumulation_steps)
        return smaller, answer(smaller.with_train(gradient_accumulation_steps=steps))

    return last_that_fits(divisors(size), memory_bytes, planned)


def divisors(size: int) -> list[int]:
    """The micro-batches that a batch of ``size`` splits into evenly, smallest first."""
    return [divisor for divisor in range(1, size + 1) if size % divisor == 0]


def last_that_fits(
    sizes: list[int], memory_bytes: int, plan_of: Callable[[int], tuple[T, Plan]]
) -> tuple[T, Plan] | None:
    """The largest size that fits, with its plan.

    Among those that accumulate, more examples never need less, so bisection finds it. The largest
    size may not accumulate, and then needs no gradients during forward: it goes first.
    """
    *smaller, largest = sizes
    if (found := plan_of(largest))[1].needed_bytes <= memory_bytes:
        return found
    low, high, best = 0, len(smaller) - 1, None
    while low <= high:
        middle = (low + high + 1) // 2
        found = plan_of(smaller[middle])
        if found[1].needed_bytes <= memory_bytes:
            best, low = found, middle + 1
        else:
            high = middle - 1
    return best
