"""A model whose frozen trunk is replayed; the rest of the model does not notice.

The backbone's ``forward`` is replaced on the instance. Where it is given token ids, padded on the
right, and nothing else, and a source knows the boundary's values for them, the blocks below the
boundary hand their input through and the topmost of them returns the values. Where nothing in the
backbone trains it is not run at all. In every other case, like generation with a cache of keys and
values, the model computes as ever.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftlab.trunk.boundary import Boundary

READ = ("input_ids", "attention_mask", "token_type_ids")
"""What decides the trunk's output; anything else that is given must say nothing."""
BLOCK = "block"
Inputs = Mapping[str, Tensor]
"""Those of ``READ`` that are given, each (batch, seq)."""
Compute = Callable[[Inputs], Tensor]


class NotReplayableError(RuntimeError):
    """The trunk of this model cannot be replayed; the message says why."""


@dataclass(frozen=True)
class Form:
    """What is kept of a forward.

    Args:
        place: "block" for the output of the topmost block below the boundary, else the one output
            of the backbone that is read.
        per_token: one vector is kept for each token, not one for each row.
        rank: dimensions of the values: (batch, seq or 1, width) or (batch, width).
        autocast: the dtype of autocast around the backbone, None without.
    """

    place: str
    per_token: bool
    rank: int
    width: int
    dtype: torch.dtype
    autocast: torch.dtype | None

    def shape(self, rows: int, tokens: int) -> tuple[int, ...]:
        """Of the values of a padded batch."""
        middle = (tokens if self.per_token else 1,) if self.rank == 3 else ()
        return (rows, *middle, self.width)


class Source(Protocol):
    """Where the boundary's values come from."""

    def values(self, inputs: Inputs, form: Form, compute: Compute) -> Tensor | None:
        """The values of a batch, in ``form.shape``, zero where it is padded; None if not known.

        Args:
            compute: gets such values from the model, without autograd.
        """
        ...


class Start(Protocol):
    """Knows outputs of lower blocks, from which the boundary's values can be computed."""

    def values(self, inputs: Inputs) -> tuple[int, Tensor] | None:
        """How many blocks need not run, and what the topmost of them returns; None if not known.

        The tensor has the shape (batch, seq, width).
        """
        ...


class Blank:
    """Knows that everything is zero: to plan with, where the allocation alone matters."""

    def values(self, inputs: Inputs, form: Form, compute: Compute) -> Tensor:
        ids = inputs["input_ids"]
        shape = form.shape(ids.shape[0], ids.shape[1])
        return torch.zeros(shape, dtype=form.dtype, device=ids.device)


class Replay:
    """Replays the trunk of one model while ``attached``, once ``learn`` has been called.

    ``start`` saves blocks where values are computed; ``learned`` is the batch learned from.
    """

    def __init__(self, boundary: Boundary, source: Source) -> None:
        self.boundary, self.source = boundary, source
        self.start: Start | None = None
        self.form: Form | None = None
        self._real: Callable[..., Any] = boundary.backbone.forward
        self._names = tuple(inspect.signature(self._real).parameters)
        self._answer: Callable[..., Any] = self._serve
        self._whole = range(len(boundary.blocks))
        self._run, self._captures = self._whole, False
        self._value: Tensor | None = None
        self.learned: Inputs = {}
        modules = [module for _, module in boundary.below]
        self._embeddings = [*takewhile(lambda module: module is not boundary.blocks[0], modules)]
        self._embedded: dict[int, tuple[torch.Size, torch.dtype]] = {}
        self._leaves: dict[int, Tensor] | None = None
        self._idle: frozenset[int] = frozenset()
        self._tuple_length = 0
        self._output: Any = None
        self._parameters = [parameter for each in modules for parameter in each.parameters()]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """In here the model replays what it can."""
        boundary = self.boundary
        replaced: list[tuple[nn.Module, Any]] = [(boundary.backbone, self._forward)]
        for index, block in enumerate(boundary.blocks):
            replaced.append((block, self._block(index, block.forward)))
        for index, module in enumerate(self._embeddings):
            replaced.append((module, self._embedding(index, module.forward)))
        before = [module.__dict__.get("forward") for module, _ in replaced]
        for module, forward in replaced:
            module.forward = forward
        try:
            yield
        finally:
            for (module, _), previous in zip(replaced, before, strict=True):
                if previous is None:
                    del module.forward
                else:
                    module.forward = previous

    def learn(self, loss: Callable[[], Tensor]) -> Form:
        """Find out what to keep. The model must be attached, and in eval mode.

        Args:
            loss: a training batch's, through the model.

        Raises:
            NotReplayableError: what trains feeds the trunk after all, or the batch says more than
                which tokens there are.
        """
        calls: list[tuple[Inputs, Any]] = []  # The last is the loss's own.

        def watch(*args: Any, **kwargs: Any) -> Any:
            inputs = self._plain(args, kwargs)
            if inputs is None:
                raise NotReplayableError("the model is given more than token ids and their mask")
            calls[:] = [(inputs, self._real(*args, **kwargs))]
            return calls[0][1]

        with torch.enable_grad():
            self._called(watch, loss)
            inputs, output = calls.pop()
            self.learned = inputs
            self.form = self._output_read(inputs, output, loss) if self.boundary.whole else None
            if self.form is None:
                value = self._block_value(self.boundary.depth)
                self.form = _form(BLOCK, value, inputs)
                self._idle = self._unread_embeddings(loss, value)
        return self.form

    def verify(self, loss: Callable[[], Tensor]) -> None:
        """Compare a batch's loss with its trunk computed and replayed, in eval mode.

        Raises:
            NotReplayableError: they differ by more than rounding.
        """
        assert self.form is not None
        with torch.no_grad():
            computed, replayed = self._called(self._real, loss), loss()
        exact = self.form.dtype is torch.float32 and self.form.autocast is None
        if not torch.allclose(computed, replayed, rtol=1e-3 if exact else 5e-2):
            raise NotReplayableError(
                f"replaying it changes a loss from {float(computed):.6g} to {float(replayed):.6g}"
            )

    def _called(self, answer: Callable[..., Any], loss: Callable[[], Tensor]) -> Tensor:
        """The loss with another answer of the backbone."""
        self._answer = answer
        try:
            return loss()
        finally:
            self._answer = self._serve

    def _output_read(self, inputs: Inputs, output: Any, loss: Callable[[], Tensor]) -> Form | None:
        """The one tensor of the backbone's output that the loss depends on."""
        leaves = {
            name: value.detach().requires_grad_()
            for name, value in output.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        total = self._called(lambda *_, **__: type(output)(**leaves), loss)
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        read = [name for name, g in zip(leaves, gradients, strict=True) if g is not None]
        if len(read) != 1:
            return None
        self._output = type(output)
        return _form(read[0], leaves[read[0]], inputs)

    def block_form(self, depth: int) -> Form:
        """The form of what the topmost of so many blocks returns, of the batch that was learned.

        Raises:
            NotReplayableError: it is nothing to keep, or depends on what trains.
        """
        return _form(BLOCK, self._block_value(depth), self.learned)

    def _block_value(self, depth: int) -> Tensor:
        value = self._capture(self.learned, range(depth))
        if value.requires_grad:
            raise NotReplayableError("what trains feeds the frozen blocks")
        return value

    def _unread_embeddings(self, loss: Callable[[], Tensor], value: Tensor) -> frozenset[int]:
        """The embeddings that need not run where the blocks behind them do not.

        Those that return something of the values' form, on which the loss then does not depend:
        blocks above the boundary may read them too.
        """
        like = value.shape, value.dtype
        self._idle = frozenset(i for i, output in self._embedded.items() if output == like)
        leaves: dict[int, Tensor] = {}
        self._leaves, shape = leaves, self.learned["input_ids"].shape

        def answer(*args: Any, **kwargs: Any) -> Any:
            inputs = self._plain(args, kwargs)
            if inputs is None or inputs["input_ids"].shape != shape:
                return self._real(*args, **kwargs)
            self._value = value
            return self._above(*args, **kwargs)

        try:
            total = self._called(answer, loss)
        finally:
            self._leaves = None
        if not (leaves and total.requires_grad):
            return self._idle
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return frozenset(i for i, g in zip(leaves, gradients, strict=True) if g is None)

    def _capture(self, inputs: Inputs, blocks: range) -> Tensor:
        """What the topmost of these blocks returns; those above hand their input through."""
        self._captures = True
        try:
            self._running(blocks, inputs)
            value, self._value = self._value, None
        finally:
            self._captures = False
        if value is None:
            raise NotReplayableError("its topmost frozen block does not run")
        return value

    def _running(self, blocks: range, inputs: Inputs) -> Any:
        """The backbone's output where these blocks alone are run."""
        self._run = blocks
        try:
            return self._real(**inputs)
        finally:
            self._run = self._whole

    def compute(self, inputs: Inputs) -> Tensor:
        """The boundary's values by the model itself, without autograd."""
        assert self.form is not None
        first = 0
        if self.start is not None:
            first, self._value = self.start.values(inputs) or (0, None)
        with torch.no_grad():
            if self.form.place == BLOCK:
                return self._capture(inputs, range(first, self.boundary.depth))
            blocks = range(first, len(self.boundary.blocks))
            value: Tensor = self._running(blocks, inputs)[self.form.place]
            return value

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(*args, **kwargs)

    def _serve(self, *args: Any, **kwargs: Any) -> Any:
        inputs, form = self._plain(args, kwargs), self.form
        if inputs is None or form is None or not self._constant(inputs["input_ids"]):
            return self._real(*args, **kwargs)
        # Kept in one place, which the boundary's block empties: the tensor can die early.
        self._value = self.source.values(inputs, form, self.compute)
        if self._value is None:
            return self._real(*args, **kwargs)
        if form.place != BLOCK:
            return self._outputs(inputs["input_ids"].shape[1])
        return self._above(*args, **kwargs)

    def _above(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's output where the boundary's value is known."""
        self._run = self._whole[self.boundary.depth :]
        try:
            output = self._real(*args, **kwargs)
        finally:
            self._run = self._whole
        if self._value is not None:
            raise RuntimeError("the block at the boundary did not run")
        return output

    def _outputs(self, tokens: int) -> Any:
        assert self.form is not None
        value, self._value = self._value, None
        assert value is not None
        values = {self.form.place: value}
        if self.form.rank == 2:
            # Nothing reads it, but it is the first of the outputs.
            values = {"last_hidden_state": value[:, None].expand(-1, tokens, -1), **values}
        return self._output(**values)

    def _plain(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs | None:
        """The inputs, if token ids with their mask and types are all there is."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        for name, value in given.items():
            if name in READ or name == "return_dict" or value is None or value is False:
                continue
            return None
        inputs = {name: given[name] for name in READ if given.get(name) is not None}
        ids = inputs.get("input_ids")
        if ids is None or ids.dim() != 2 or any(t.shape != ids.shape for t in inputs.values()):
            return None
        return inputs

    def _constant(self, ids: Tensor) -> bool:
        """Whether the trunk computes what it computed when it was learned."""
        assert self.form is not None
        return (
            _autocast(ids.device.type) == self.form.autocast
            and not any(module.training for module in self.boundary.trunk)
            and not any(parameter.requires_grad for parameter in self._parameters)
        )

    def _embedding(self, index: int, real: Callable[..., Any]) -> Callable[..., Any]:
        """Where no block reads what it returns, anything of the same shape will do."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._run.start > 0 and self._value is not None and index in self._idle:
                other = self._value.detach()
                if self._leaves is not None:
                    self._leaves[index] = other.requires_grad_()
                return other
            output = real(*args, **kwargs)
            if self._captures and isinstance(output, Tensor):
                self._embedded[index] = output.shape, output.dtype
            return output

        return forward

    def _block(self, index: int, real: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if index < self._run.start:
                last = index == self._run.start - 1
                value, self._value = (self._value, None) if last else (None, self._value)
                return self._returned(args[0] if value is None else value)
            if index >= self._run.stop:
                return self._returned(args[0])
            output = real(*args, **kwargs)
            if self._captures and index == self._run.stop - 1:
                self._tuple_length = len(output) if isinstance(output, tuple) else 0
                self._value = output[0] if self._tuple_length else output
            return output

        return forward

    def _returned(self, hidden: Tensor) -> Any:
        """As the blocks return it."""
        return (hidden, *[None] * (self._tuple_length - 1)) if self._tuple_length else hidden


def _form(place: str, value: Tensor, inputs: Inputs) -> Form:
    """The form of values that were computed of such inputs.

    Raises:
        NotReplayableError: they are no vectors of rows or of tokens.
    """
    rows, tokens = inputs["input_ids"].shape
    per_token = value.shape[:-1] == (rows, tokens)
    form = Form(
        place, per_token, value.dim(), value.shape[-1], value.dtype, _autocast(value.device.type)
    )
    if value.shape != form.shape(rows, tokens):
        raise NotReplayableError(f"{place} returns neither a vector for each token nor one a row")
    return form


def _autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
