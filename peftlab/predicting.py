"""The verb predict: a finished run, loaded again, without its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftlab.config import display_path
from peftlab.errors import DataError, Problem, RunFolderError
from peftlab.experiment.schema import Experiment
from peftlab.experiment.store import read_experiment
from peftlab.results.record import Record
from peftlab.results.store import read_record, resolve_run
from peftlab.tasks.base import Prediction, Row, Splits, TaskKind

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from peftlab.anatomy import Anatomy
    from peftlab.methods.base import Method

ADAPTER, ADAPTER_STATE = "adapter", "adapter_model.safetensors"


@dataclass(frozen=True)
class LoadedRun:
    """A finished run as objects; ``model`` has its adapter and is in eval mode.

    Args:
        labels: names in index order for classification, empty otherwise.
        anatomy: of the base model.
    """

    folder: Path
    experiment: Experiment
    record: Record
    kind: TaskKind[Any]
    labels: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    method: Method[Any]
    model: nn.Module


def read_finished(run: str | Path, root: Path) -> tuple[Path, Experiment, Record]:
    """The folder, experiment and record of a run that ended well. Loads no torch.

    Raises:
        RunFolderError: the run did not end well, or lacks its adapter.
        UnknownNameError: there is no such run.
    """
    folder = resolve_run(str(run), root)
    record = read_record(folder)
    experiment, _ = read_experiment(folder)
    where = display_path(folder)
    if record.status != "ok":
        error = f": {record.error}" if record.error else ""
        message = f"the run did not end well ({record.status}{error})."
        raise RunFolderError(Problem(where, message, "Train it again."))
    if not (folder / ADAPTER / ADAPTER_STATE).is_file():
        message = f"has no {ADAPTER}/{ADAPTER_STATE}."
        raise RunFolderError(Problem(where, message, "Train it again with --force."))
    return folder, experiment, record


def load_run(run: str | Path, *, root: Path = Path("runs")) -> LoadedRun:
    """Load a finished run's model, on the accelerator if there is one. Its data may be gone.

    Args:
        run: a path, ``task/recipe`` or the start of a hash.
        root: the folder of all runs.

    Raises:
        RunFolderError: the run did not end well, or its adapter is missing, damaged or of another
            model.
        UserError: there is no such run, or its base model cannot be had.
    """
    folder, experiment, record = read_finished(run, root)
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from peftlab.assemble import assemble

    kind = experiment.build_kind()
    assembly = assemble(experiment, kind, Splits((), (), (), labels=record.labels))
    path = folder / ADAPTER / ADAPTER_STATE
    try:
        state = load_file(path)
    except SafetensorError as error:
        message = f"is damaged: {error}."
        raise RunFolderError(Problem(display_path(path), message, "Train it again.")) from None
    model = assembly.model
    with torch.no_grad():
        assembly.method.load_adapter_state(model, state)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    # A quantised model was loaded where it can be computed, and cannot be moved.
    if accelerator is not None and experiment.precision.quantization is None:
        model = model.to(accelerator)
    return LoadedRun(
        folder=folder,
        experiment=experiment,
        record=record,
        kind=kind,
        labels=record.labels,
        tokenizer=assembly.tokenizer,
        anatomy=assembly.prepared.anatomy,
        method=assembly.method,
        model=model.eval(),
    )


def predict(
    run: str | Path | LoadedRun, rows: Sequence[Row] | str | Path, *, root: Path = Path("runs")
) -> list[Prediction]:
    """What a finished run says of new rows, in their order.

    Args:
        run: as ``load_run`` takes it, or what it returned.
        rows: a file with the task's columns, or rows with the task kind's own keys (``text``,
            ``prompt``); ``id`` and what is to be predicted may be absent.
        root: the folder of all runs.

    Raises:
        DataError: no rows, or a row lacks what the task reads.
        UserError: as ``load_run``.
    """
    # A mistake in the rows shows before the model is loaded.
    kind = run.kind if isinstance(run, LoadedRun) else read_finished(run, root)[1].build_kind()
    chosen: Sequence[Row]
    if isinstance(rows, (str, Path)):
        chosen = kind.read_rows(str(rows))
    else:
        chosen = [{"id": str(number), **row} for number, row in enumerate(rows)]
    if not chosen:
        raise DataError(Problem("rows", "there is nothing to predict."))
    return _predict(run if isinstance(run, LoadedRun) else load_run(run, root=root), chosen)


def _predict(loaded: LoadedRun, rows: Sequence[Row]) -> list[Prediction]:
    import torch

    train, mixed = loaded.experiment.train, loaded.experiment.precision.mixed_precision
    device = next(loaded.model.parameters()).device.type
    dtypes: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
    # As the run's own test was computed.
    autocast = torch.autocast(device, dtypes[mixed]) if mixed in dtypes else nullcontext()
    try:
        with autocast:
            return loaded.kind.predict(
                loaded.model,
                rows,
                loaded.tokenizer,
                train.max_length,
                train.per_device_eval_batch_size,
                loaded.labels,
            )
    except KeyError as error:
        key = error.args[0]
        lacking = [row["id"] for row in rows if key not in row]
        if not lacking:
            raise
        raise DataError(Problem(f"row {lacking[0]}", f"has no {key!r}.")) from None
