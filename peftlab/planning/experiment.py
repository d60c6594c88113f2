"""From an experiment and its rows to what the planner needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from peftlab.errors import ConfigError, Problem
from peftlab.experiment.schema import Experiment
from peftlab.models.load import load_config, load_tokenizer
from peftlab.planning.answer import answer
from peftlab.planning.fit import fit
from peftlab.planning.schema import Device, Plan
from peftlab.planning.simulate import PlanRequest
from peftlab.tasks.base import Splits, TaskKind
from peftlab.training.schedule import Schedule


def plan_experiment(
    experiment: Experiment,
    kind: TaskKind[Any],
    splits: Splits,
    seq_len: int | None = None,
    device: Device | None = None,
    memory_bytes: int | None = None,
) -> Plan:
    """As ``plan``, for an experiment and rows that are already there."""
    size = experiment.train.per_device_train_batch_size
    if seq_len is not None:
        request = request_of(experiment, kind, splits, (seq_len,) * size, device)
        return plan_request(request, memory_bytes)
    tokenizer = load_tokenizer(experiment.model)
    features = kind.encode(splits.train, tokenizer, experiment.train.max_length)
    lengths = [len(each["input_ids"]) for each in features]
    schedule = Schedule(lengths, experiment.train, experiment.seed, shape=kind.batch_shape)
    micros = [micro[0] for micro in schedule.micro_batches(schedule.largest_step())]
    batches = [kind.collate([features[row] for row in micro], tokenizer) for micro in micros]
    by_micro = [[lengths[row] for row in micro] for micro in micros]
    largest = max(by_micro, key=lambda lengths: math.prod(kind.batch_shape(lengths)))
    request = request_of(experiment, kind, splits, largest, device)
    return plan_request(request, memory_bytes, batches)


def request_of(
    experiment: Experiment,
    kind: TaskKind[Any],
    splits: Splits,
    lengths: Iterable[int],
    device: Device | None = None,
) -> PlanRequest:
    """What the planner needs to know of an experiment."""
    here: Device = "cuda" if torch.cuda.is_available() else "cpu"
    return PlanRequest(
        config=_config(experiment, kind.model_kwargs(splits)),
        kind=kind,
        method=experiment.build_method(),
        optim=experiment.optim,
        precision=experiment.precision,
        lengths=tuple(lengths),
        train=experiment.train,
        device=device or here,
        attn_implementation=experiment.model.attn_implementation,
    )


def plan_request(
    request: PlanRequest,
    memory_bytes: int | None = None,
    batches: Sequence[Mapping[str, Tensor]] | None = None,
) -> Plan:
    """Plan it, and answer whether it fits into the memory there is, if that is given."""
    planned = answer(request, batches)
    if memory_bytes is None:
        return planned
    return fit(request, memory_bytes, planned)


def _config(experiment: Experiment, values: dict[str, Any]) -> PretrainedConfig:
    """The model's config with the task's values; a path may name the file itself."""
    path = Path(experiment.model.model_name_or_path)
    if path.suffix != ".json":
        config = load_config(experiment.model, **values)
    elif path.is_file():
        try:
            config = AutoConfig.from_pretrained(str(path), **values)
        except (OSError, ValueError, KeyError) as error:
            message = f"holds no model config: {error}"
            raise ConfigError(Problem(str(path), message.splitlines()[0])) from None
    else:
        raise ConfigError(Problem("--model", f"there is no file {str(path)!r}."))
    text = config.get_text_config()
    if text.pad_token_id is None:
        # Which token pads changes no byte, but classifiers of decoders need one.
        text.pad_token_id = 0
    return config
