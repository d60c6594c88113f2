"""Freezing: part of the model trains, the rest stays as it was pretrained."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from peftlab.anatomy import Anatomy, dead_alternatives
from peftlab.errors import IncompatibleError, Problem
from peftlab.methods.base import Method, MethodConfig, Traits

if TYPE_CHECKING:
    from torch import Tensor, nn

_WAYS = ("top", "bottom", "blocks", "patterns", "freeze_embeddings")
_RANGE = re.compile(r"\s*(-?\d+)(?:\s*-\s*(-?\d+))?\s*")


class FreezeConfig(MethodConfig):
    """Exactly one of the first five keys says what trains.

    Args:
        top: the k blocks nearest the output train; 0 trains the head alone.
        bottom: the k blocks nearest the input train.
        blocks: blocks by index from the bottom, -1 the topmost: ``"0-2,5,-1"`` or a list.
        patterns: regular expressions over parameter names (``re.search``); what one matches trains.
        freeze_embeddings: everything but the embeddings trains.
        unfreeze_ratio: with ``top``: the head trains first and the k blocks join one by one from
            the topmost down, evenly spaced, the last after this share of all steps (gradual
            unfreezing: Howard & Ruder 2018, https://arxiv.org/abs/1801.06146, section 3.3).
        head: "auto" trains a task head and leaves a language model's head frozen.
        after_blocks: the final norm and the pooler; "auto" trains them when the topmost block does.
    """

    kind: Literal["freeze"] = "freeze"
    top: int | None = Field(default=None, ge=0)
    bottom: int | None = Field(default=None, ge=1)
    blocks: str | tuple[int, ...] | None = None
    patterns: tuple[str, ...] | None = Field(default=None, min_length=1)
    freeze_embeddings: bool = False
    unfreeze_ratio: float | None = Field(default=None, gt=0, lt=1)
    head: bool | Literal["auto"] = "auto"
    after_blocks: bool | Literal["auto"] = "auto"

    @field_validator("blocks")
    @classmethod
    def _readable(cls, blocks: str | tuple[int, ...] | None) -> str | tuple[int, ...] | None:
        if isinstance(blocks, str) and not all(map(_RANGE.fullmatch, blocks.split(","))):
            raise ValueError("is not a list of block numbers and ranges like '0-2,5,-1'")
        if isinstance(blocks, tuple) and not blocks:
            raise ValueError("is empty; 'top: 0' trains the head alone")
        return blocks

    @field_validator("patterns")
    @classmethod
    def _regular(cls, patterns: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for pattern in patterns or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return patterns

    @model_validator(mode="after")
    def _one_way(self) -> FreezeConfig:
        # Not by truth: top: 0 is a way.
        ways = {way: getattr(self, way) for way in _WAYS}
        given = [way for way, value in ways.items() if value is not None and value is not False]
        if len(given) != 1:
            found = f"found {' and '.join(given)}" if given else "found none"
            raise ValueError(f"give exactly one of {', '.join(_WAYS)}; {found}")
        if self.unfreeze_ratio is not None and not self.top:
            raise ValueError("unfreeze_ratio needs top: k, the blocks that join one by one")
        return self


class Freeze(Method[FreezeConfig]):
    """Trains chosen blocks or what patterns name, and the task head."""

    Config = FreezeConfig
    traits = Traits(
        summary="chosen blocks train, the rest is frozen",
        paper="https://arxiv.org/abs/1911.03090",
    )

    def check(self, anatomy: Anatomy) -> list[Problem]:
        problems = [*self._wrong_blocks(anatomy), *self._wrong_patterns(anatomy)]
        if self.config.head is True:
            if not anatomy.head:
                message = f"{anatomy.model_class} has no head to train."
                problems.append(Problem("method.head", message, "Leave out 'head'."))
            elif anatomy.head_is_tied:
                message = (
                    f"the output embedding {anatomy.head[0]!r} is the input embedding's tensor: "
                    "training the one trains the other."
                )
                hint = "Leave out 'head', or train the embeddings through 'patterns'."
                problems.append(Problem("method.head", message, hint))
        if not problems and not self._chosen(anatomy):
            message = f"nothing of {anatomy.model_class} would train."
            hint = "It has no task head: choose at least one block."
            problems.append(Problem("method", message, hint))
        return problems

    def attach(self, model: nn.Module) -> nn.Module:
        anatomy = Anatomy.of(model)
        if problems := self.check(anatomy):
            raise IncompatibleError(problems)
        self.notes = self._partial_patterns(anatomy)
        self._stages = self._chosen_by_stage(anatomy)
        self.enter_stage(model, -1)
        return model

    def stage_starts(self, total_steps: int) -> tuple[int, ...]:
        ratio, top = self.config.unfreeze_ratio, self.config.top
        if ratio is None or top is None:
            return (0,)
        return tuple(int(total_steps * ratio * trained / top) for trained in range(top + 1))

    def enter_stage(self, model: nn.Module, stage: int) -> None:
        chosen = self._stages[stage]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)

    def training_state(self, model: nn.Module) -> dict[str, Tensor]:
        # In an early stage not all of it requires a gradient.
        chosen = self._stages[-1]
        return {name: p.detach() for name, p in model.named_parameters() if name in chosen}

    def _chosen_by_stage(self, anatomy: Anatomy) -> list[set[str]]:
        """The names of the parameters that train, for each stage."""
        if self.config.unfreeze_ratio is None:
            return [self._chosen(anatomy)]
        stages = [
            Freeze(self.config.model_copy(update={"top": trained}))._chosen(anatomy)
            for trained in range((self.config.top or 0) + 1)
        ]
        # Without a head to train the topmost block trains from the start.
        return [stages[0] or stages[1], *stages[1:]]

    def _chosen(self, anatomy: Anatomy) -> set[str]:
        """The names of the parameters that train."""
        config = self.config
        everything = set(anatomy.parameters)
        top_trains = False
        if config.freeze_embeddings:
            chosen = everything - set(anatomy.parameters_of(anatomy.embeddings))
            top_trains = True
        elif config.patterns is not None:
            chosen = {n for n in everything if any(re.search(p, n) for p in config.patterns)}
        else:
            indices = self._indices(len(anatomy.blocks))
            top_trains = len(anatomy.blocks) - 1 in indices
            chosen = set(anatomy.parameters_of(anatomy.blocks[i] for i in indices))
        above = set(anatomy.parameters_of(anatomy.after_blocks))
        head = set(anatomy.parameters_of(anatomy.head))
        # Patterns and freeze_embeddings have said what happens there, unless asked otherwise.
        chosen = _with(chosen, above, config.after_blocks, top_trains)
        keep_head = anatomy.head_is_new or config.freeze_embeddings
        return _with(chosen, head, config.head, keep_head)

    def _indices(self, count: int) -> set[int]:
        """The chosen blocks, counted from the bottom; out of range ones as written."""
        config = self.config
        if config.top is not None:
            return set(range(count - config.top, count))
        if config.bottom is not None:
            return set(range(config.bottom))
        if isinstance(config.blocks, tuple):
            return {_from_bottom(index, count) for index in config.blocks}
        chosen: set[int] = set()
        for first, last in _RANGE.findall(config.blocks or ""):
            start = _from_bottom(int(first), count)
            stop = _from_bottom(int(last), count) if last else start
            chosen.update(range(min(start, stop), max(start, stop) + 1))
        return chosen

    def _wrong_blocks(self, anatomy: Anatomy) -> list[Problem]:
        count = len(anatomy.blocks)
        for key in ("top", "bottom"):
            number = getattr(self.config, key)
            if number is not None and number > count:
                message = f"{key}: {number}, but {anatomy.model_class} has {count} blocks."
                return [Problem(f"method.{key}", message, f"Choose 1 to {count}.")]
        outside = sorted(index for index in self._indices(count) if not 0 <= index < count)
        if not outside:
            return []
        far = outside[-1] if outside[-1] >= count else outside[0] - count
        message = (
            f"{self.config.blocks!r} reaches block {far}, "
            f"but {anatomy.model_class} has blocks 0 to {count - 1}."
        )
        return [Problem("method.blocks", message, "Negative numbers count from the top: -1.")]

    def _wrong_patterns(self, anatomy: Anatomy) -> list[Problem]:
        return [
            Problem(
                "method.patterns",
                f"{pattern!r} matches no parameter of {anatomy.model_class}.",
                anatomy.near(pattern, anatomy.parameters),
            )
            for pattern in self.config.patterns or ()
            if not any(re.search(pattern, name) for name in anatomy.parameters)
        ]

    def _partial_patterns(self, anatomy: Anatomy) -> list[str]:
        """What a pattern may have missed: a dead alternative, or blocks that it says nothing of."""
        notes = []
        for pattern in self.config.patterns or ():
            for branch in dead_alternatives(pattern, anatomy.parameters):
                near = anatomy.near(branch, anatomy.parameters)
                notes.append(f"pattern {pattern!r}: {branch!r} matches nothing. {near}".rstrip())
            matched = [name for name in anatomy.parameters if re.search(pattern, name)]
            blocks = {anatomy.block_of(name) for name in matched} - {None}
            if 0 < len(blocks) < len(anatomy.blocks) and not re.search(r"\d", pattern):
                notes.append(
                    f"pattern {pattern!r} matches in {len(blocks)} of {len(anatomy.blocks)} blocks."
                )
        return notes


def _from_bottom(index: int, count: int) -> int:
    return index + count if index < 0 else index


def _with(
    chosen: set[str], part: set[str], wanted: bool | Literal["auto"], automatic: bool
) -> set[str]:
    """``chosen`` with or without a part; "auto" adds it where ``automatic`` and never removes."""
    if wanted == "auto":
        return chosen | part if automatic else chosen
    return chosen | part if wanted else chosen - part


METHOD = Freeze
