"""What runs of one process share that differ in nothing but seed and learning rate."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peftlab.experiment.schema import Experiment
from peftlab.models.load import load_tokenizer
from peftlab.models.shared import SharedModel
from peftlab.tasks.base import Features, Splits, TaskKind
from peftlab.trunk.cache import OpenTrunk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Shared:
    """Filled by the first run, read by the later ones; a single run has its own.

    Args:
        runs: that have ended well.
        model: the base model; None where no run will come after the first.
        plans: of a step, by what decides them.
        trunks: the frozen trunk's activations in each stage; ``filled`` are the training rows
            that they hold.
    """

    runs: int = 0
    model: SharedModel | None = None
    plans: dict[Hashable, Any] = field(default_factory=dict)
    trunks: dict[int, OpenTrunk | None] = field(default_factory=dict)
    filled: dict[int, set[int]] = field(default_factory=dict)
    _encoded: tuple[PreTrainedTokenizerBase, Sequence[Features]] | None = None

    def encoded(
        self, experiment: Experiment, kind: TaskKind[Any], splits: Splits
    ) -> tuple[PreTrainedTokenizerBase, Sequence[Features]]:
        """The tokenizer and the training rows in its tokens.

        Raises:
            UserError: the tokenizer cannot be had, or cannot pad.
        """
        if self._encoded is None:
            tokenizer = load_tokenizer(experiment.model)
            max_length = experiment.train.max_length
            self._encoded = tokenizer, kind.encode(splits.train, tokenizer, max_length)
        return self._encoded
