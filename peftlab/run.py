"""The verb train: one experiment, one run folder, one record."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peftlab.config import display_path
from peftlab.errors import Problem, RunFolderError
from peftlab.experiment.resolve import resolve
from peftlab.experiment.schema import Experiment
from peftlab.experiment.store import read_experiment, write_experiment
from peftlab.results.record import Record
from peftlab.results.store import RECORD, read_record, run_dir
from peftlab.tasks.base import Splits

if TYPE_CHECKING:
    from peftlab.sharing import Shared


@dataclass(frozen=True)
class Run:
    """A run that is finished, well or not: its folder and its record."""

    folder: Path
    record: Record


@dataclass(frozen=True)
class Request:
    """How to run an experiment, apart from what it is.

    Args:
        root: folder of all runs; ``folder`` is the run's own, by default below the root by name,
            identity and seed.
        resume: go on from the newest checkpoint.
        force: run again what is finished.
        auto_batch_size: take the largest micro-batch that is planned to fit, into ``memory_bytes``
            if that is given, at an unchanged effective batch.
        progress: show a bar.
        command: what the user typed, for the record.
    """

    root: Path = Path("runs")
    folder: Path | None = None
    resume: bool = False
    force: bool = False
    auto_batch_size: bool = False
    memory_bytes: int | None = None
    progress: bool = True
    command: str = ""


def train(
    task: str,
    recipe: str,
    *,
    model: str | None = None,
    seed: int = 0,
    overrides: Iterable[str] = (),
    request: Request | None = None,
) -> Run:
    """Fine-tune, test and record one experiment; a finished one is returned as it is.

    Args:
        task: name or path of a task; ``recipe`` of a recipe.
        model: in place of the task's default: embedded name, local folder or hub id.
        overrides: ``section.key=value`` texts.

    Raises:
        UserError: the request was wrong; nothing was written.
        RunError: the run failed; its record says how.
    """
    resolved = resolve(task, recipe, model=model, seed=seed, overrides=overrides)
    return run_experiment(resolved.experiment, request or Request())


def run_experiment(
    experiment: Experiment,
    request: Request,
    checked: Splits | None = None,
    shared: Shared | None = None,
) -> Run:
    """As ``train``, for an experiment that is already resolved.

    Args:
        checked: its rows, where they are read and the method was checked against the model.
        shared: by all runs of this process, which differ in seed and learning rate only.
    """
    kind = experiment.build_kind()
    splits = checked or kind.read()
    if request.auto_batch_size:
        from peftlab.planning.batch_size import fit_batch_size

        experiment = fit_batch_size(experiment, kind, splits, request.memory_bytes)
    identity = experiment.identity(splits.fingerprint)
    folder = request.folder or run_dir(
        request.root, experiment.task, experiment.recipe, identity, experiment.seed
    )
    if (finished := finished_run(folder, experiment, identity, request)) is not None:
        return finished
    # Importing torch takes seconds: only after all that can be checked without it.
    from peftlab.assemble import check_model
    from peftlab.execute import Execution

    if checked is None:
        check_model(experiment, kind, splits)
    folder.mkdir(parents=True, exist_ok=True)
    write_experiment(folder, experiment, identity)
    execution = Execution(experiment, kind, splits, identity, folder, shared)
    record = execution.run(request.resume, request.progress, request.command)
    return Run(folder, record)


def finished_run(
    folder: Path, experiment: Experiment, identity: str, request: Request
) -> Run | None:
    """The finished run in ``folder``, if that is what it holds and it is not to be run again.

    Raises:
        RunFolderError: the folder holds something else.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return None
    there, its_identity = read_experiment(folder)
    if (its_identity, there.seed) != (identity, experiment.seed):
        raise RunFolderError(
            Problem(
                display_path(folder),
                f"holds another experiment ({there.task} × {there.recipe}, seed {there.seed}, "
                f"{its_identity[:12]}).",
                "Choose an empty folder, or leave --run-dir away.",
            )
        )
    if request.force or not (folder / RECORD).exists():
        return None
    record = read_record(folder)
    return Run(folder, record) if record.status == "ok" else None
