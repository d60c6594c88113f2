"""What a launcher may not ask for is refused with its name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType

from peftlab.errors import IncompatibleError
from peftlab.experiment.resolve import resolve
from peftlab.training.launch import refuse_early_updates, refuse_sharding
from tests.training.test_speedups import EARLY


def test_sharded_parameters_are_refused() -> None:
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(IncompatibleError, match="FSDP shards parameters"):
        refuse_sharding(accelerator)  # type: ignore[arg-type]
    whole = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)
    refuse_sharding(whole)  # type: ignore[arg-type]


def test_updates_in_backward_are_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    overrides = [*EARLY]
    experiment = resolve("movie-sentiment", "full", overrides=overrides).experiment
    with pytest.raises(IncompatibleError, match="2 processes"):
        refuse_early_updates(accelerator, experiment.optim)
    refuse_early_updates(accelerator, resolve("movie-sentiment", "full").experiment.optim)
    AcceleratorState._reset_state()
    GradientState._reset_state()
