"""From an experiment to objects: model, method, tokenizer, as every verb needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate.utils import set_seed
from torch import nn

from peftlab.anatomy import Anatomy, parameter_roles
from peftlab.errors import IncompatibleError, Problem
from peftlab.experiment.schema import Experiment
from peftlab.methods.base import Method
from peftlab.models.attention import draw_attention_dropout_fast
from peftlab.models.dropout import draw_dropout_fast
from peftlab.models.load import build_from_config, load_config, load_model, load_tokenizer
from peftlab.models.pooled import skip_unread_positions
from peftlab.models.shared import SharedModel
from peftlab.results.record import ParameterCounts
from peftlab.tasks.base import Splits, TaskKind, TaskTraits
from peftlab.training.config import TrainConfig
from peftlab.training.modes import frozen_trunk, trunk_candidates
from peftlab.training.recompute import enable_checkpointing
from peftlab.trunk.boundary import Boundary, NoBoundary, find_boundary
from peftlab.trunk.cache import OFF

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Assembly:
    """An experiment's objects; ``model`` has its method attached.

    Args:
        prepared: the model, with what lies below the part of it that trains.
        notes: what the method noticed while attaching.
    """

    experiment: Experiment
    kind: TaskKind[Any]
    splits: Splits
    tokenizer: PreTrainedTokenizerBase
    method: Method[Any]
    prepared: Prepared
    notes: tuple[str, ...]

    @property
    def model(self) -> nn.Module:
        """With its method attached."""
        return self.prepared.model


def check_model(experiment: Experiment, kind: TaskKind[Any], splits: Splits) -> Anatomy:
    """Build the architecture without storage and check the method against it.

    Raises:
        IncompatibleError: with everything that is wrong; no weight is loaded.
        UserError: there is no such model.
    """
    skeleton = _skeleton(experiment, kind, splits)
    anatomy = Anatomy.of(skeleton)
    method = experiment.build_method()
    problems = [
        *kind.check(skeleton),
        *method.check(anatomy),
        *too_long(experiment.train.max_length, anatomy.max_positions, method),
    ]
    if problems:
        raise IncompatibleError(problems)
    return anatomy


def kept_blocks(experiment: Experiment, kind: TaskKind[Any], splits: Splits) -> int:
    """How many blocks' output a run may keep for others; found without loading a weight.

    0 also where that cannot be told, because the method starts from what the weights are.
    """
    if experiment.train.trunk_cache == OFF:
        return 0
    skeleton = _skeleton(experiment, kind, splits)
    try:
        prepared = prepare(skeleton, experiment.build_method(), kind.traits, experiment.train)
    except (NotImplementedError, RuntimeError):
        return 0
    return 0 if isinstance(prepared.boundary, NoBoundary) else prepared.boundary.depth


def _skeleton(experiment: Experiment, kind: TaskKind[Any], splits: Splits) -> PreTrainedModel:
    """The architecture without storage.

    Raises:
        UserError: there is no such model.
    """
    import torch

    config = load_config(experiment.model, **kind.model_kwargs(splits))
    with torch.device("meta"):
        return build_from_config(
            config, kind.traits.auto_class, torch.float32, experiment.model.attn_implementation
        )


def too_long(
    tokens: int,
    positions: int | None,
    method: Method[Any],
    where: str = "train.max_length",
    change: str = "--set train.max_length={}",
) -> list[Problem]:
    """What is wrong with texts of so many tokens on a model of so many positions.

    Args:
        positions: None where the model's configuration does not tell.
        where: what says how long they are; ``change`` makes it another number.
    """
    if positions is None:
        return []
    room, taken = positions - method.extra_positions, ""
    if tokens <= room or room <= 0:
        return []
    if method.extra_positions:
        taken = f", {method.extra_positions} of them taken by the method"
    message = f"{tokens} tokens, but the model has {positions} positions{taken}."
    return [Problem(where, message, f"Use {change.format(room)} or less.")]


def assemble(
    experiment: Experiment,
    kind: TaskKind[Any],
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase | None = None,
    shared: SharedModel | None = None,
) -> Assembly:
    """Load the model and attach the method; a new head is drawn from the experiment's seed.

    Args:
        tokenizer: the model's, where it is loaded already.
        shared: keeps the base model for later runs, if a trunk of it stays frozen.

    Raises:
        IncompatibleError: the task or the method does not work with this model.
        UserError: the model or tokenizer cannot be had.
    """
    tokenizer = tokenizer or load_tokenizer(experiment.model)
    set_seed(experiment.seed)

    def load() -> PreTrainedModel:
        return load_model(
            experiment.model,
            experiment.precision,
            kind.traits.auto_class,
            kind.model_kwargs(splits),
        )

    base = shared.get(load) if shared else load()
    if problems := kind.check(base):
        raise IncompatibleError(problems)
    method = experiment.build_method()
    prepared = prepare(base, method, kind.traits, experiment.train)
    if shared and isinstance(prepared.boundary, NoBoundary):
        shared.drop()
    elif shared:
        shared.copy_trained(prepared.model)
    return Assembly(
        experiment=experiment,
        kind=kind,
        splits=splits,
        tokenizer=tokenizer,
        method=method,
        prepared=prepared,
        notes=tuple(method.notes),
    )


@dataclass(frozen=True)
class Prepared:
    """A model with its method attached, as a real run and a planned one train it.

    Args:
        base: the transformers model, and ``anatomy`` what it was before.
        candidates: modules that stay in eval mode if nothing in them trains, bottom to top.
        above: those that lie above the blocks.
    """

    model: nn.Module
    base: PreTrainedModel
    anatomy: Anatomy
    params: ParameterCounts
    candidates: Sequence[nn.Module]
    above: Sequence[nn.Module]

    @property
    def trunk(self) -> list[nn.Module]:
        """The modules that stay in eval mode while that trains which now requires gradients."""
        return frozen_trunk(self.model, self.candidates, self.above)

    @property
    def boundary(self) -> Boundary | NoBoundary:
        """Up to where the model then computes the same in every epoch."""
        return find_boundary(self.base, self.anatomy, self.trunk)


def prepare(
    base: PreTrainedModel, method: Method[Any], kind: TaskTraits, train: TrainConfig
) -> Prepared:
    """Attach the method to a model that is built, with or without storage.

    Raises:
        IncompatibleError: the method cannot be put on this model.
    """
    anatomy = Anatomy.of(base)
    candidates = trunk_candidates(base, anatomy)
    above = [base.get_submodule(name) for name in (*anatomy.after_blocks, *anatomy.head)]
    base_parameters = dict(base.named_parameters())
    if not kind.generates:
        # A decoder's cache of keys and values helps generation only, and would be kept alive.
        base.config.use_cache = False
    if train.gradient_checkpointing:
        enable_checkpointing(base, train.gradient_checkpointing)
    model = method.attach(base)
    draw_dropout_fast(model)
    draw_attention_dropout_fast(model)
    if train.skip_unread_positions:
        skip_unread_positions(base, anatomy)
    return Prepared(
        model=model,
        base=base,
        anatomy=anatomy,
        params=ParameterCounts(**parameter_roles(model, base_parameters, anatomy)),
        candidates=[] if train.trunk_dropout else candidates,
        above=above,
    )
