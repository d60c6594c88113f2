"""From an experiment and its rows to what the planner needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from peftlab.errors import ConfigError, Problem
from peftlab.experiment.schema import Experiment
from peftlab.memory.cards import Chip, card_named
from peftlab.memory.meter import chip_here
from peftlab.models.checkpoint import checkpoint_keys
from peftlab.models.load import load_config
from peftlab.planning.answer import answer
from peftlab.planning.average import average_step
from peftlab.planning.fit import fit
from peftlab.planning.schema import Device, Plan, Sharding
from peftlab.planning.simulate import PlanRequest
from peftlab.sharing import Shared
from peftlab.tasks.base import Splits, TaskKind
from peftlab.training.schedule import Schedule
from peftlab.training.stages import Stage, stage_notes, stages_of


def plan_experiment(
    experiment: Experiment,
    kind: TaskKind[Any],
    splits: Splits,
    seq_len: int | None = None,
    device: str | None = None,
    memory_bytes: int | None = None,
    num_processes: int = 1,
    sharding: Sharding = "none",
    shared: Shared | None = None,
) -> Plan:
    """As ``plan``, for an experiment and rows that are already there."""
    size = experiment.train.per_device_train_batch_size
    if seq_len is not None:
        rows = (seq_len,) * size
        request = request_of(experiment, kind, splits, rows, device, num_processes, sharding)
        return plan_request(request, memory_bytes)
    shared = shared or Shared()
    tokenizer, features = shared.encoded(experiment, kind, splits)
    lengths = [len(each["input_ids"]) for each in features]
    schedule = Schedule(lengths, experiment.train, experiment.seed, num_processes, kind.batch_shape)
    stages = stages_of(experiment.build_method(), schedule.total_steps, num_processes)
    shares = _largest_share(schedule, stages[-1], kind)
    batches = [kind.collate([features[row] for row in share], tokenizer) for share in shares]
    request = _of_shares(experiment, kind, splits, schedule, stages[-1], shares, device, sharding)
    tokens = sum(_tokens(kind, share, lengths) for share in shares)
    key = _what_decides(request, batches)
    if key not in shared.plans:
        shared.plans[key] = answer(request, batches)
    planned: Plan = shared.plans[key]
    if memory_bytes is not None:
        planned = fit(request, memory_bytes, planned)
    return _of_run(planned, schedule, stages, tokens)


def _what_decides(request: PlanRequest, batches: Sequence[Mapping[str, Tensor]]) -> str:
    """What tells apart the plans of runs that differ in seed and learning rate.

    Shapes, and of the values those that a step on tensors without storage may read: whether
    anything is padded, and how many targets a language model has.
    """
    counted = ("labels",) if request.kind.traits.unit == "tokens" else ()
    told = [
        (name, tuple(tensor.shape), bool(tensor.all()), name in counted and tensor.tolist())
        for batch in batches
        for name, tensor in batch.items()
    ]
    return f"{request.train.model_dump_json()} {told}"


def plan_lengths(
    experiment: Experiment,
    kind: TaskKind[Any],
    splits: Splits,
    lengths: Sequence[int],
    device: str | None = None,
    memory_bytes: int | None = None,
    num_processes: int = 1,
    sharding: Sharding = "none",
) -> Plan:
    """As ``plan_experiment``, where only the lengths of the examples are known, not the texts."""
    schedule = Schedule(lengths, experiment.train, experiment.seed, num_processes, kind.batch_shape)
    stages = stages_of(experiment.build_method(), schedule.total_steps, num_processes)
    shares = _largest_share(schedule, stages[-1], kind)
    request = _of_shares(experiment, kind, splits, schedule, stages[-1], shares, device, sharding)
    # Without texts, every micro-batch of the step is planned like the largest.
    tokens = math.prod(kind.batch_shape(request.lengths)) * len(shares)
    return _of_run(plan_request(request, memory_bytes), schedule, stages, tokens)


def _largest_share(schedule: Schedule, stage: Stage, kind: TaskKind[Any]) -> list[list[int]]:
    """The micro-batches of a stage's step with the largest, as the process sees them that has it.

    In the last stage everything trains.
    """
    micros = schedule.micro_batches(schedule.largest_step(stage.steps))
    lengths = schedule.plan.lengths

    def largest(process: int) -> int:
        shares = [micro[process] for micro in micros if micro[process]]
        return max(_tokens(kind, share, lengths) for share in shares) if shares else 0

    process = max(range(schedule.num_processes), key=largest)
    # A process without an example of its own computes one, to stay in step.
    return [micro[process] or [0] for micro in micros]


def _tokens(kind: TaskKind[Any], rows: Sequence[int], lengths: Sequence[int]) -> int:
    return math.prod(kind.batch_shape([lengths[row] for row in rows]))


def _of_shares(
    experiment: Experiment,
    kind: TaskKind[Any],
    splits: Splits,
    schedule: Schedule,
    stage: Stage,
    shares: Sequence[Sequence[int]],
    device: str | None,
    sharding: Sharding,
) -> PlanRequest:
    lengths = schedule.plan.lengths
    largest = max(shares, key=lambda share: _tokens(kind, share, lengths))
    chosen = [lengths[row] for row in largest]
    request = request_of(experiment, kind, splits, chosen, device, schedule.num_processes, sharding)
    trained = [lengths[row] for row in schedule.trained_rows(stage.steps)]
    return replace(request, all_rows=(trained, len(splits.validation) + len(splits.test)))


def _of_run(planned: Plan, schedule: Schedule, stages: Sequence[Stage], tokens: int) -> Plan:
    """With what a whole run is beside its largest step, which has so many tokens."""
    average = average_step(schedule, planned.flops_per_step, tokens)
    notes = (*planned.notes, *stage_notes(stages))
    return planned.model_copy(update={"average": average, "notes": notes})


def request_of(
    experiment: Experiment,
    kind: TaskKind[Any],
    splits: Splits,
    lengths: Iterable[int],
    device: str | None = None,
    num_processes: int = 1,
    sharding: Sharding = "none",
) -> PlanRequest:
    """What the planner needs to know of an experiment."""
    kernels, chip = _device(device)
    return PlanRequest(
        config=_config(experiment, kind.model_kwargs(splits)),
        kind=kind,
        method=experiment.build_method(),
        optim=experiment.optim,
        precision=experiment.precision,
        lengths=tuple(lengths),
        train=experiment.train,
        device=kernels,
        chip=chip,
        attn_implementation=experiment.model.attn_implementation,
        checkpoint_keys=checkpoint_keys(experiment.model.model_name_or_path),
        num_processes=num_processes,
        sharding=sharding,
    )


def _device(name: str | None) -> tuple[Device, Chip]:
    """Whose kernels to plan for; without a name, those of this machine.

    Raises:
        ConfigError: no such card.
    """
    if name in (None, "cuda") and torch.cuda.is_available():
        return "cuda", chip_here()
    if name in (None, "cpu"):
        return "cpu", Chip()
    if name == "cuda":
        return "cuda", Chip()
    return "cuda", card_named(name, "--device").chip


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
