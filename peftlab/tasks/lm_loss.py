"""Cross-entropy of a language model without its logits.

The output head runs on the positions that predict a target and on no others, some rows at a time,
and the logits of a chunk become its gradients before the next chunk is computed, as in Liger Kernel
(Hsu et al. 2024, https://arxiv.org/abs/2410.10989, section 3.2). Where something stands between the
head and the model's logits (an adapter, soft-capping, a scale), the logits are computed whole.

``torch.nn.functional.linear_cross_entropy`` is as fast with the same chunks, and much slower with
its own; it is one operation to whoever counts memory, planned or measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from peftlab.tasks.batches import eval_mode
from peftlab.tasks.prompts import IGNORE

CHUNK_ROWS = 256
"""Targets whose logits exist at a time; more make a step no faster on CPU."""
_HALF_SCALE = 64.0
"""Keeps the probabilities of a large vocabulary out of float16's subnormal range."""
_makes_the_logits: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

Inputs = Mapping[str, Tensor]


def loss_sum(model: nn.Module, inputs: Inputs, labels: Tensor) -> Tensor:
    """The sum of the losses of all targets, a scalar in fp32; backward may run once.

    Args:
        model: a transformers model, however wrapped.
        inputs: what it is called with, ``input_ids`` of shape (batch, seq) among them.
        labels: (batch, seq), -100 where nothing is to be learned. Each is predicted by the position
            before it, and the first of a row by none.
    """
    head = _replaceable_head(model, inputs["input_ids"])
    if head is None:
        return _losses_of_logits(model_logits(model, inputs), labels).sum()

    def loss(hidden: Tensor) -> Tensor:
        rows, targets = _targets(labels, hidden.shape[1])
        dtype = _product_dtype(hidden)
        total: Tensor = _LossSum.apply(  # type: ignore[no-untyped-call]
            hidden.flatten(0, 1), head.weight, head.bias, rows, targets, dtype
        )
        return total

    return _with_head(model, head, loss, inputs)


def losses_by_row(model: nn.Module, inputs: Inputs, labels: Tensor) -> Tensor:
    """(batch,) in fp32: the sum of each row's losses, without autograd; arguments as above."""
    head = _replaceable_head(model, inputs["input_ids"])
    if head is None:
        return _losses_of_logits(model_logits(model, inputs), labels).sum(1).detach()

    def loss(hidden: Tensor) -> Tensor:
        flat, width = hidden.flatten(0, 1), hidden.shape[1]
        losses = torch.zeros(len(flat), device=flat.device)
        for rows, targets in _chunks(*_targets(labels, width)):
            logits = functional.linear(flat[rows], head.weight, head.bias).float()
            losses[rows] = functional.cross_entropy(logits, targets, reduction="none")
        return losses.view(-1, width).sum(1)

    with torch.no_grad():
        return _with_head(model, head, loss, inputs)


def model_logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """(batch, seq, vocabulary) in fp32."""
    logits: Tensor = model(**inputs, use_cache=False).logits
    # Methods that put virtual tokens before the input return logits for those too.
    return logits[:, -inputs["input_ids"].shape[1] :].float()


def _losses_of_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """(batch, seq): the loss of predicting each next token, 0 where nothing is to be learned."""
    # Labels move rather than logits: a slice of the logits would be copied.
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    losses = functional.cross_entropy(
        logits.flatten(0, 1), following.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return losses.view_as(following)


def _targets(labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows of the flattened hidden states (batch, width) that predict a target, and the targets.

    ``width`` may exceed the labels' by virtual tokens in front.
    """
    following = functional.pad(labels[:, 1:], (width - labels.shape[1], 1), value=IGNORE).flatten()
    rows = (following != IGNORE).nonzero().squeeze(1)
    return rows, following[rows]


def _chunks(rows: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(rows), CHUNK_ROWS):
        yield rows[start : start + CHUNK_ROWS], targets[start : start + CHUNK_ROWS]


class _LossSum(torch.autograd.Function):
    """Linear layer and summed cross-entropy, with the gradients made on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """Hidden states (positions, width), the head's parameters, the rows that predict."""
        to_hidden, to_weight, to_bias, *_ = ctx.needs_input_grad
        wide = _wide_dtype(weight.dtype)
        grad_weight = torch.zeros_like(weight, dtype=wide) if to_weight else None
        grad_bias = weight.new_zeros(len(weight), dtype=wide) if to_bias else None
        # From this storage on, memory is accounted for as logits and loss.
        total = hidden.new_zeros((), dtype=_wide_dtype(dtype))
        grad_hidden = torch.zeros_like(hidden) if to_hidden else None
        ctx.scale = _HALF_SCALE if dtype is torch.float16 else 1.0
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(dtype)
            offset = None if bias is None else bias.to(dtype)
            for part, target in _chunks(rows, targets):
                chosen = hidden[part].to(dtype)
                logits = _wide(functional.linear(chosen, matrix, offset))
                total += _differentiate(logits, target, ctx.scale).sum()
                gradients = logits.to(dtype)
                del logits
                if grad_hidden is not None:
                    grad_hidden[part] = (gradients @ matrix).to(hidden.dtype)
                if grad_weight is not None:
                    if grad_weight.dtype is dtype:
                        grad_weight.addmm_(gradients.mT, chosen)
                    else:
                        grad_weight += gradients.mT @ chosen
                if grad_bias is not None:
                    grad_bias += gradients.sum(0, dtype=grad_bias.dtype)
                # Else they would outlive the next chunk's logits being made.
                del gradients
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(weight.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scaled in place: a second backward through the same graph is refused by autograd."""
        factor = grad / ctx.scale
        scaled = [each if each is None else each.mul_(factor) for each in ctx.saved_tensors]
        return *scaled, None, None, None


def _differentiate(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Losses (rows,); ``scale`` times their gradients take the place of the logits."""
    index = targets[:, None]
    logits -= logits.amax(1, keepdim=True)
    chosen = logits.gather(1, index)
    sums = logits.exp_().sum(1, keepdim=True)
    logits *= scale / sums
    logits.scatter_add_(1, index, torch.full_like(chosen, -scale))
    return (sums.log() - chosen).squeeze(1)


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor.dtype))


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The precision that ``nn.Linear`` computes in here."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _with_head(
    model: nn.Module, head: nn.Linear, loss: Callable[[Tensor], Tensor], inputs: Inputs
) -> Tensor:
    """Call the model with a function of the hidden states in the place of its head.

    It runs inside the model's own call, so that wrappers like data parallelism see what they wait
    for.
    """
    made: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        made.append(loss(hidden))
        return made[-1]

    with _forward_of(head, forward):
        output: Any = model(**inputs, use_cache=False)
    intact = len(made) == 1 and output.logits is made[0]
    if not intact:
        raise RuntimeError(f"{type(model).__name__} changes what its output head returns")
    return made[0]


def _replaceable_head(model: nn.Module, ids: Tensor) -> nn.Linear | None:
    """The linear layer whose output is the model's logits, if there is such a one."""
    inner: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    find = getattr(inner, "get_output_embeddings", None)
    head = None if find is None else find()
    # A subclass may compute anything: adapters and quantized layers do.
    if type(head) is not nn.Linear or "forward" in vars(head):
        return None
    # In float16 the sum over all rows of a weight's gradient needs the scale that is not known yet.
    if head.weight.requires_grad and _product_dtype(head.weight) is torch.float16:
        return None
    if head not in _makes_the_logits:
        _makes_the_logits[head] = _is_last(inner, head, ids)
    return head if _makes_the_logits[head] else None


def _is_last(model: nn.Module, head: nn.Linear, ids: Tensor) -> bool:
    """Whether the transformers model around the head returns the head's output as it is.

    One token shows it: the logits must be the very tensor that the head returned, unwritten since.
    """
    owner = next(
        (
            module
            for module in model.modules()
            if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is head
        ),
        None,
    )
    if owner is None:
        return False
    made: list[tuple[Tensor, int]] = []

    def forward(hidden: Tensor) -> Tensor:
        logits = nn.Linear.forward(head, hidden)
        made.append((logits, logits._version))
        return logits

    with eval_mode(owner), _forward_of(head, forward):
        # Of the class: mixed precision wraps the instance's and converts what it returns.
        output: Any = type(owner).forward(owner, input_ids=ids[:1, :1], use_cache=False)
    # Else the graph-less copies of weights made here would be used by the forward that follows.
    torch.clear_autocast_cache()
    if len(made) != 1:
        return False
    logits, version = made[0]
    return output.logits is logits and logits._version == version


@contextmanager
def _forward_of(head: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    replaceable: Any = head
    replaceable.forward = forward
    try:
        yield
    finally:
        del replaceable.forward
