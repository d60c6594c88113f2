"""What no single section can know: rules between sections. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from peftlab.config import KeyPath, Origin, locate
from peftlab.errors import Problem, UnknownNameError
from peftlab.methods.base import Traits
from peftlab.optim.table import optimizer_info
from peftlab.registry import did_you_mean
from peftlab.tasks.base import TaskTraits

if TYPE_CHECKING:
    from peftlab.experiment.schema import Experiment

TRACKERS = (
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
)  # fmt: skip
"""The trackers of Accelerate."""


def check(
    experiment: Experiment,
    task: TaskTraits,
    method: Traits,
    origins: Mapping[KeyPath, Origin],
) -> list[Problem]:
    """Every violated rule of an experiment whose sections are valid by themselves."""

    def at(*path: str) -> str:
        return locate(path, origins)

    problems: list[Problem] = []
    kind, train, precision = experiment.method.kind, experiment.train, experiment.precision
    try:
        optimizer_info(experiment.optim.optim, at("optim", "optim"))
    except UnknownNameError as error:
        problems += error.problems
    if experiment.metric not in task.metrics:
        problems.append(
            Problem(
                at("metric"),
                f"{experiment.kind} has no metric {experiment.metric!r}.",
                did_you_mean(experiment.metric, task.metrics),
            )
        )
    if not isinstance(experiment.seed, int) or experiment.seed < 0:
        problems.append(Problem(at("seed"), f"seed must be 0 or more, got {experiment.seed!r}."))
    if train.gradient_checkpointing is True and not method.works_with_checkpointing:
        problems.append(
            Problem(
                at("train", "gradient_checkpointing"),
                f"{kind} does not work with gradient checkpointing.",
                "Use 'selective', or a smaller batch with gradient_accumulation_steps.",
            )
        )
    if precision.quantization and not method.works_quantized:
        problems.append(
            Problem(
                at("precision", "quantization"),
                f"{kind} trains base weights, which {precision.quantization} cannot hold.",
                "Use a method that leaves the base frozen, like lora.",
            )
        )
    if getattr(experiment.data, "packing", False) and experiment.build_method().extra_positions:
        problems.append(
            Problem(
                at("data", "packing"),
                f"{kind} puts virtual tokens before a text, which packed texts would share.",
                "Leave it off, or use a method without them, like lora.",
            )
        )
    if precision.dtype == "float16" and not precision.fp16 and not method.is_peft:
        problems.append(
            Problem(
                at("precision", "dtype"),
                "training float16 weights underflows.",
                "Use bfloat16, or float32 with fp16: true.",
            )
        )
    if train.torch_compile and train.gradient_checkpointing == "selective":
        problems.append(
            Problem(
                at("train", "gradient_checkpointing"),
                "'selective' reads single operations, which a compiled block does not show.",
                "Use false or true, or leave torch_compile off.",
            )
        )
    if train.torch_compile and len(experiment.build_method().stage_starts(1)) > 1:
        problems.append(
            Problem(
                at("train", "torch_compile"),
                f"this {kind} trains in stages, and a block is compiled for one of them.",
                "Leave it off, or train without stages.",
            )
        )
    if experiment.optim.optimizer_in_backward:
        obstacles = (
            (train.gradient_accumulation_steps > 1, ("train", "gradient_accumulation_steps"), "1"),
            (experiment.optim.max_grad_norm is not None, ("optim", "max_grad_norm"), "null"),
            (precision.fp16, ("precision", "fp16"), "false"),
        )
        problems += [
            Problem(
                at(*path),
                "optim.optimizer_in_backward updates before all gradients are there.",
                f"Use {'.'.join(path)}={needed}, or leave optimizer_in_backward off.",
            )
            for there, path, needed in obstacles
            if there
        ]
    problems += [
        Problem(
            at("train", "report_to"), f"no tracker {tracker!r}.", did_you_mean(tracker, TRACKERS)
        )
        for tracker in train.report_to
        if tracker not in TRACKERS
    ]
    return problems
