"""The verb plan: from an experiment, or from a model's config alone, to a ``Plan``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peftlab.experiment.resolve import resolve, resolve_shape
from peftlab.planning.schema import Plan, Sharding
from peftlab.tasks.base import Splits


def plan(
    task: str,
    recipe: str,
    *,
    model: str | None = None,
    overrides: Iterable[str] = (),
    seq_len: int | None = None,
    device: str | None = None,
    memory_bytes: int | None = None,
    num_processes: int = 1,
    sharding: Sharding = "none",
) -> Plan:
    """Say what an experiment will need, before a weight is loaded.

    The micro-batch is the largest that training will see, from the lengths of the task's own texts
    and the real order of batches; with ``seq_len`` all texts are taken to be that long.

    Args:
        model: in place of the task's default.
        overrides: ``section.key=value`` texts; the batch size is
            ``train.per_device_train_batch_size``.
        seq_len: tokens of every example, ``train.max_length`` or less.
        device: whose kernels and allocator to plan for: "cpu", "cuda" or a card like "h100"; by
            default what this machine has.
        memory_bytes: answer whether it fits into this, and what would make it fit.
        num_processes: that train data-parallel; the plan is each one's.
        sharding: "fsdp" plans FSDP2 as Accelerate sets it up, of the first process, whose shards
            are the largest. Runs do not train sharded.

    Raises:
        UserError: the request is wrong, or the method cannot be planned.
    """
    experiment = resolve(task, recipe, model=model, overrides=overrides).experiment
    kind = experiment.build_kind()
    splits = kind.read()
    # Importing torch takes seconds: only after all that can be checked without it.
    from peftlab.assemble import check_model
    from peftlab.planning.experiment import plan_experiment

    # What a run would refuse.
    check_model(experiment, kind, splits)
    return plan_experiment(
        experiment, kind, splits, seq_len, device, memory_bytes, num_processes, sharding
    )


def plan_shape(
    recipe: str,
    model: str,
    *,
    task_kind: str,
    batch_size: int,
    seq_len: int | Mapping[int, float],
    num_labels: int = 2,
    overrides: Iterable[str] = (),
    device: str | None = None,
    memory_bytes: int | None = None,
    num_processes: int = 1,
    sharding: Sharding = "none",
) -> Plan:
    """As ``plan``, without a task: from a model's config, a batch size and a length.

    Args:
        model: embedded name, hub id, folder, or the path of a ``config.json``; neither weights nor
            tokenizer need to be there.
        seq_len: tokens of every example, or a distribution, length to share of the examples: then
            the longest batch is planned, and the average step told.
        num_labels: of a classifier.

    Raises:
        UserError: the request is wrong, or the method cannot be planned.
    """
    micro = f"train.per_device_train_batch_size={batch_size}"
    experiment = resolve_shape(task_kind, model, recipe, [*overrides, micro]).experiment
    labels = tuple(str(label) for label in range(num_labels))
    splits = Splits(train=(), validation=(), test=(), labels=labels)
    kind = experiment.build_kind()
    # Late for the same reason as in plan.
    from peftlab.planning.average import lengths_of
    from peftlab.planning.experiment import plan_lengths, plan_request, request_of

    if isinstance(seq_len, Mapping):
        lengths = lengths_of(seq_len)
        return plan_lengths(
            experiment, kind, splits, lengths, device, memory_bytes, num_processes, sharding
        )
    rows = (seq_len,) * batch_size
    request = request_of(experiment, kind, splits, rows, device, num_processes, sharding)
    return plan_request(request, memory_bytes)
