"""LoRA: low-rank updates beside frozen matrices."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from peftlab.anatomy import Anatomy, Shape, dead_alternatives, inside
from peftlab.errors import Problem
from peftlab.methods.base import MethodConfig, Traits
from peftlab.methods.peft_backed import PeftMethod

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn


class LoraConfig(MethodConfig):
    """The keys of PEFT's ``LoraConfig``, with its meaning.

    Args:
        r: rank of the update.
        lora_alpha: the update is scaled by ``lora_alpha / r``, with rslora by its root.
        target_modules: "all-linear", "attention-qv" (query and value projections), a list of module
            names or their endings, or one regular expression over whole module names.
        layers_to_transform: only in these blocks, counted from the bottom.
        modules_to_save: modules that train whole beside the task head, which always does.
        bias: "lora_only" trains the biases of the targeted layers as well.
        fused: run the layers as one autograd function that keeps its input once: less memory, less
            time, the same results up to rounding and the same files. False runs PEFT's own layer.
    """

    kind: Literal["lora"] = "lora"
    r: int = Field(default=8, ge=1)
    lora_alpha: float = Field(default=16, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"
    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    bias: Literal["none", "lora_only"] = "none"
    fused: bool = True

    @field_validator("target_modules")
    @classmethod
    def _readable(cls, target: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not target:
            raise ValueError("is empty; 'all-linear' is the usual choice")
        if isinstance(target, str):
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"{target!r} is not a regular expression: {error}") from None
        return target

    @model_validator(mode="after")
    def _even(self) -> LoraConfig:
        if self.init_lora_weights == "orthogonal" and self.r % 2:
            raise ValueError(f"init_lora_weights: orthogonal needs an even r, got {self.r}")
        return self


class Lora(PeftMethod[LoraConfig]):
    """W x becomes W x + (alpha/r) B A x; A and B train (Hu et al. 2021, §4.1)."""

    Config = LoraConfig
    traits = Traits(
        summary="low-rank updates beside linear layers",
        paper="https://arxiv.org/abs/2106.09685",
        works_quantized=True,
        is_peft=True,
    )

    def check(self, anatomy: Anatomy) -> list[Problem]:
        problems = [
            *self._wrong_targets(anatomy),
            *self._wrong_layers(anatomy),
            *self._wrong_modules_to_save(anatomy),
        ]
        matched = self._matched(anatomy)
        if not problems and not matched:
            message = f"{self.config.target_modules!r} matches nothing in the chosen blocks."
            problems.append(Problem("method.target_modules", message))
        small = {name: min(shape) for name, shape in matched.items() if min(shape) < self.config.r}
        if small:
            name = min(small, key=lambda n: small[n])
            message = (
                f"rank {self.config.r} is larger than {name} "
                f"({matched[name][0]}×{matched[name][1]})"
                f"{f' and {len(small) - 1} more' if len(small) > 1 else ''}."
            )
            problems.append(Problem("method.r", message, f"Use r of at most {small[name]}."))
        return problems

    def attach(self, model: nn.Module) -> nn.Module:
        target = self.config.target_modules
        attached = super().attach(model)
        self.notes = [self._fused(attached)]
        if isinstance(target, str) and target not in ("all-linear", "attention-qv"):
            names = [name for name, _ in attached.named_modules()]
            dead = dead_alternatives(target, names)
            self.notes += [f"target_modules {target!r}: {b!r} matches nothing." for b in dead]
        return attached

    def _fused(self, model: nn.Module) -> str:
        from peftlab.methods.fused_lora import fuse_lora_layers, lora_layers

        total = len(lora_layers(model))
        fused = fuse_lora_layers(model) if self.config.fused else 0
        others = " The others run PEFT's own forward." if fused < total else ""
        return f"{fused} of {total} LoRA layers are fused.{others}"

    def peft_config(self, anatomy: Anatomy) -> PeftConfig:
        import peft

        config = self.config
        target: str | list[str]
        if config.layers_to_transform is not None or config.target_modules == "all-linear":
            # PEFT's own "all-linear" would put an update into a new pooler that trains whole.
            target = list(self._matched(anatomy))
        elif config.target_modules == "attention-qv":
            target = list(anatomy.query_value)
        elif isinstance(config.target_modules, str):
            target = config.target_modules
        else:
            target = list(config.target_modules)
        head = anatomy.head if anatomy.head_is_new else ()
        return peft.LoraConfig(
            task_type=anatomy.task_type,
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=target,
            modules_to_save=[*head, *config.modules_to_save] or None,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            init_lora_weights=config.init_lora_weights,
            bias=config.bias,
        )

    def _matched(self, anatomy: Anatomy) -> dict[str, Shape]:
        """The matrices that get an update, name to (in, out)."""
        target = self.config.target_modules
        saved = [*anatomy.head, *self.config.modules_to_save]
        if target == "all-linear":
            matched = {n: s for n, s in anatomy.linears.items() if not inside(n, saved)}
        elif target == "attention-qv":
            matched = {n: s for n, s in anatomy.linears.items() if _ends(n, anatomy.query_value)}
        else:
            matrices = {**anatomy.linears, **anatomy.embedding_tables}
            matched = {name: shape for name, shape in matrices.items() if _matches(target, name)}
        layers = self.config.layers_to_transform
        if layers is None:
            return matched
        count = len(anatomy.blocks)
        chosen = {layer + count if layer < 0 else layer for layer in layers}
        return {n: s for n, s in matched.items() if anatomy.block_of(n) in chosen}

    def _wrong_targets(self, anatomy: Anatomy) -> Iterator[Problem]:
        target, where = self.config.target_modules, "method.target_modules"
        if target == "all-linear":
            return
        if target == "attention-qv":
            if not anatomy.query_value:
                message = f"the query and value projections of {anatomy.model_class} are not known."
                hint = anatomy.near("query value", anatomy.linears)
                yield Problem(where, message, f"Name them in a list. {hint}".rstrip())
            return
        matrices = [*anatomy.linears, *anatomy.embedding_tables]
        for one in (target,) if isinstance(target, str) else target:
            matching: str | tuple[str, ...] = one if isinstance(target, str) else (one,)
            if not any(_matches(matching, name) for name in matrices):
                message = f"{one!r} matches no linear or embedding of {anatomy.model_class}."
                blocks = (n for n in anatomy.linears if anatomy.block_of(n) is not None)
                here = ", ".join(sorted({name.rpartition(".")[2] for name in blocks}))
                hint = f"{anatomy.near(one, matrices)} Its blocks have {here}."
                yield Problem(where, message, hint)

    def _wrong_layers(self, anatomy: Anatomy) -> Iterator[Problem]:
        count = len(anatomy.blocks)
        wrong = [i for i in self.config.layers_to_transform or () if not -count <= i < count]
        if wrong:
            message = f"{anatomy.model_class} has no block {', '.join(map(str, wrong))}."
            yield Problem("method.layers_to_transform", message, f"It has 0 to {count - 1}.")

    def _wrong_modules_to_save(self, anatomy: Anatomy) -> Iterator[Problem]:
        modules = {
            name.rsplit(".", depth)[0]
            for name in anatomy.parameters
            for depth in range(1, name.count(".") + 1)
        }
        for one in self.config.modules_to_save:
            if not _ends_any(modules, one):
                message = f"{one!r} is no module of {anatomy.model_class}."
                hint = anatomy.near(one, sorted(modules))
                yield Problem("method.modules_to_save", message, hint)
            elif anatomy.head_is_tied and any(_ends(e, (one,)) for e in anatomy.embedding_tables):
                message = f"{one!r} is tied to the output embedding, which a copy would part."
                hint = "Train it with method freeze and 'patterns' instead."
                yield Problem("method.modules_to_save", message, hint)


def _matches(target: str | Iterable[str], name: str) -> bool:
    """As PEFT decides: one string is a regular expression, a list holds names or their endings."""
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    return _ends(name, target)


def _ends(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _ends_any(names: Iterable[str], ending: str) -> bool:
    return any(_ends(name, (ending,)) for name in names)


METHOD = Lora
