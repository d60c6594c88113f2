"""Examples of a language model in one row, end to end, without seeing each other.

Positions begin anew with each example. From that, and from the absence of an attention mask,
transformers knows where examples begin and keeps attention inside them
(``masking_utils.find_packed_sequence_indices``).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peftlab.tasks.base import Features
from peftlab.tasks.batches import eval_mode
from peftlab.tasks.prompts import IGNORE

if TYPE_CHECKING:
    from torch import Tensor, nn

LEAK = 0.05
"""Share of one text's influence on the next that rounding may leave between packed ones."""


def pack(examples: Sequence[Features]) -> dict[str, Tensor]:
    """Token ids, positions and labels of shape (1, all tokens); first tokens are not learned.

    Args:
        examples: with ``input_ids`` and ``labels``.
    """
    import torch

    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for example in examples:
        ids += example["input_ids"]
        positions += range(len(example["input_ids"]))
        # What comes before it belongs to another example.
        labels += [IGNORE, *example["labels"][1:]]
    row = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {key: torch.tensor([values]) for key, values in row.items()}


def why_not_packed(model: nn.Module) -> str | None:
    """Why packed examples would not be kept apart by this transformers model; None if they are.

    On ``meta`` only the signature and the kind of model are looked at; with weights it is tried.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "it takes no positions"
    if getattr(model, "_is_stateful", False):
        return "its recurrent state runs on from one text into the next"
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    apart, together = (_influence(model, packed) for packed in (True, False))
    return None if apart <= LEAK * together else "attention reaches from one text into the next"


def _influence(model: Any, packed: bool) -> float:
    """How far another first text moves the logits of the second, packed or as one text."""
    import torch

    second = [9, 10, 11, 12]
    firsts = [3, 4, 5], [6, 7, 8]
    found = []
    with eval_mode(model) as device:
        for first in firsts:
            ids = torch.tensor([first + second], device=device)
            texts = (first, second) if packed else (first + second,)
            positions = [place for text in texts for place in range(len(text))]
            output = model(
                input_ids=ids,
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
            )
            found.append(output.logits[0, len(first) :].float())
    return float((found[0] - found[1]).abs().max())
