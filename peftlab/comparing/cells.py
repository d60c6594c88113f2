"""One cell, one process: comparable peaks, and a crash costs a cell only.

Where nothing but the head trains, a cell's process stays, with the base model, for the other seeds
and learning rates of the same experiment.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from peftlab.errors import PeftlabError, Problem, UserError
from peftlab.experiment.schema import Experiment
from peftlab.results.record import Record, Status
from peftlab.results.store import RECORD, read_record, run_dir, write_record
from peftlab.run import Request, Run, finished_run, run_experiment
from peftlab.tasks.base import Splits
from peftlab.tasks.metrics import METRICS

if TYPE_CHECKING:
    from peftlab.sharing import Shared

_HELD_SHARE = 0.05
"""The most of the free memory that a process which waits for its next cell may hold."""
_WARM = "peftlab.comparing.warm"
"""What a fork server imports once, so that a cell starts in a fraction of a second."""


class CellRunner:
    """Runs cells below ``root``, each in a process of its own or in one that stayed for it.

    Processes are forked from a server that has the libraries loaded but never computed anything;
    where the system has no fork server they are spawned. ``interrupted`` tells that the user
    pressed Ctrl-C while a cell ran. To be used in a ``with`` statement, which ends the processes
    that stayed.
    """

    def __init__(self, root: Path, *, force: bool, progress: bool, command: str) -> None:
        self._request = Request(
            root=root, resume=not force, force=force, progress=progress, command=command
        )
        self.interrupted = False
        self._splits: dict[str, Splits] = {}
        self._staying: dict[str, Worker] = {}
        self._alone: set[str] = set()
        self._plans: dict[str, dict[Hashable, Any]] = {}
        self._context: BaseContext = multiprocessing.get_context("spawn")
        if "forkserver" in multiprocessing.get_all_start_methods():
            server = multiprocessing.get_context("forkserver")
            server.set_forkserver_preload([_WARM])
            self._context = server

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._staying.values():
            worker.end()
        self._staying.clear()

    def check(self, experiments: Iterable[Experiment]) -> dict[str, int]:
        """Check every method against its model, before the first cell starts.

        Returns:
            by recipe, how many blocks' output a cell that is not finished may keep for others.

        Raises:
            UserError: with the problems of all experiments, data included.
        """
        problems: dict[Problem, None] = {}
        kept: dict[str, int] = {}
        waiting = []
        for experiment in experiments:
            try:
                self._read(experiment)
            except UserError as error:
                problems |= dict.fromkeys(error.problems)
                continue
            if self._finished(experiment) is None:
                waiting.append(experiment)
        if waiting and not problems:
            answers = self._ask(_check, [(each, self._read(each)) for each in waiting])
            for experiment, answer in zip(waiting, answers, strict=True):
                if isinstance(answer, int):
                    kept[experiment.recipe] = answer
                else:
                    problems |= dict.fromkeys(answer)
        if problems:
            raise UserError(problems)
        return kept

    def fit_batch_sizes(
        self, experiments: Sequence[Experiment], memory_bytes: int | None
    ) -> list[Experiment]:
        """Each with the largest micro-batch that fits for all seeds of its recipe.

        Raises:
            UserError: not even one example fits, or an experiment cannot be planned.
        """
        asked = [(each, self._read(each)) for each in experiments]
        answer = self._ask(_fit_batch_sizes, asked, memory_bytes)
        if problems := [each for each in answer if isinstance(each, Problem)]:
            raise UserError(dict.fromkeys(problems))
        fitted: list[Experiment] = answer
        return fitted

    def _ask(self, target: object, *arguments: object) -> list[Any]:
        """What a process of its own answers: this one never loads torch."""
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._start(target, *arguments, sender)
        sender.close()
        try:
            answer: list[Any] = receiver.recv()
        except EOFError:
            raise PeftlabError("the check before the first run crashed.") from None
        finally:
            process.join()
        return answer

    def run(self, experiment: Experiment, later: Iterable[Experiment] = ()) -> tuple[Record, Path]:
        """Run one cell, or take it as it is if it is finished; also a failed one has a record.

        Args:
            later: the cells that will be asked for after it; a process may stay for them.

        Raises:
            KeyboardInterrupt: the user stopped it before there was anything to record.
        """
        folder = self._folder(experiment)
        if (done := self._finished(experiment)) is not None:
            return done.record, folder
        # Else an early death would leave the record of an earlier run for this one's.
        (folder / RECORD).unlink(missing_ok=True)
        exitcode = self._execute(experiment, later)
        if (folder / RECORD).exists():
            return read_record(folder), folder
        if self.interrupted:
            raise KeyboardInterrupt
        record = self._lost(experiment, exitcode)
        folder.mkdir(parents=True, exist_ok=True)
        write_record(folder, record)
        return record, folder

    def _execute(self, experiment: Experiment, later: Iterable[Experiment]) -> int | None:
        """Run it in the process that stayed for it, else in one of its own: the exit code."""
        group = shared_by(experiment)
        wanted = group not in self._alone and any(
            shared_by(each) == group and self._finished(each) is None for each in later
        )
        worker = self._staying.pop(group, None)
        if worker is None or not worker.send(experiment):
            worker = self._new_worker(experiment, group, wanted)
        try:
            told = worker.wait()
        except KeyboardInterrupt:
            # The cell got the same signal and is writing its record.
            self.interrupted = True
            told = worker.wait()
        if told is not None:
            self._plans[group] = told.plans
        stays = told is not None and told.stays
        if stays and wanted:
            self._staying[group] = worker
            return None
        if stays:
            worker.end()
        elif wanted:
            # It may not share, or it failed: then the others shall not suffer from its state.
            self._alone.add(group)
        return worker.process.exitcode

    def _new_worker(self, experiment: Experiment, group: str, wanted: bool) -> Worker:
        ours, theirs = self._context.Pipe()
        known = self._plans.get(group, {})
        splits = self._read(experiment)
        process = self._start(_cell, experiment, self._request, splits, theirs, wanted, known)
        theirs.close()
        return Worker(process, ours)

    def _start(self, target: object, *arguments: object) -> BaseProcess:
        process = self._context.Process(target=target, args=arguments)  # type: ignore[attr-defined]
        process.start()
        started: BaseProcess = process
        return started

    def _read(self, experiment: Experiment) -> Splits:
        key = experiment.data.model_dump_json()
        if key not in self._splits:
            self._splits[key] = experiment.build_kind().read()
        return self._splits[key]

    def _identity(self, experiment: Experiment) -> str:
        return experiment.identity(self._read(experiment).fingerprint)

    def _folder(self, experiment: Experiment) -> Path:
        return run_dir(
            self._request.root,
            experiment.task,
            experiment.recipe,
            self._identity(experiment),
            experiment.seed,
        )

    def _finished(self, experiment: Experiment) -> Run | None:
        identity = self._identity(experiment)
        return finished_run(self._folder(experiment), experiment, identity, self._request)

    def _lost(self, experiment: Experiment, exitcode: int | None) -> Record:
        """The record of a cell whose process ended without writing one."""
        status: Status = "oom" if exitcode == -signal.SIGKILL else "failed"
        how = f"exit code {exitcode}"
        if exitcode is not None and exitcode < 0:
            how = f"signal {signal.Signals(-exitcode).name}"
        error = f"the process ended with {how}"
        if status == "oom":
            error += ", most likely sent by the system because memory ran out"
        return Record(
            identity=self._identity(experiment),
            task=experiment.task,
            recipe=experiment.recipe,
            model=experiment.model.model_name_or_path,
            seed=experiment.seed,
            status=status,
            error=error,
            command=self._request.command,
            metric=experiment.metric,
            metric_better=METRICS[experiment.metric].better,
        )


@dataclass(frozen=True)
class CellDone:
    """What a process says of itself when its cell is done.

    Args:
        stays: it waits for another cell.
        plans: of steps, for the cells after it that differ in seed and learning rate only.
    """

    stays: bool
    plans: dict[Hashable, Any]


@dataclass(frozen=True)
class Worker:
    """A cell's process, and the connection to it."""

    process: BaseProcess
    connection: Connection

    def send(self, experiment: Experiment) -> bool:
        """Let one that stayed run another cell; False if it is gone."""
        try:
            self.connection.send(experiment)
            self.connection.recv()
        except (OSError, EOFError):
            self.end()
            return False
        return True

    def wait(self) -> CellDone | None:
        """Wait until its cell is done; None if the process ended without a word."""
        try:
            told: CellDone | None = self.connection.recv()
        except (OSError, EOFError):
            told = None
        if told is None or not told.stays:
            self.process.join()
        return told

    def end(self) -> None:
        """Tell it that nothing comes any more."""
        self.connection.close()
        self.process.join()


def shared_by(experiment: Experiment) -> str:
    """The same text for the cells that differ in seed and learning rate only."""
    content = experiment.model_dump(mode="json", exclude={"recipe", "seed"})
    content["optim"].pop("learning_rate")
    return json.dumps(content, sort_keys=True)


def _cell(
    experiment: Experiment,
    request: Request,
    splits: Splits,
    connection: Connection,
    wanted: bool,
    plans: dict[Hashable, Any],
) -> None:
    """What a cell's process does; errors are in its record.

    Args:
        wanted: for later cells, if it can share its model with them.
        plans: those of earlier cells.
    """
    from peftlab.models.shared import SharedModel
    from peftlab.sharing import Shared

    shared = Shared(model=SharedModel() if wanted else None, plans=plans)
    try:
        following: Experiment | None = experiment
        while following is not None:
            run_experiment(following, request, splits, shared)
            following = _following(connection, shared)
    except KeyboardInterrupt:
        sys.exit(130)
    except PeftlabError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _following(connection: Connection, shared: Shared) -> Experiment | None:
    """The next cell for this process, None if there is none."""
    told = CellDone(_may_stay(shared), shared.plans)
    try:
        connection.send(told)
        if not told.stays:
            return None
        experiment: Experiment = connection.recv()
        connection.send("started")
    except (OSError, EOFError):
        return None
    return experiment


def _may_stay(shared: Shared) -> bool:
    """Whether what it keeps is worth keeping, and little: others need the memory meanwhile."""
    import psutil

    held = shared.model.nbytes if shared.model else 0
    return 0 < held <= psutil.virtual_memory().available * _HELD_SHARE


def _check(experiments: list[tuple[Experiment, Splits]], sender: object) -> None:
    """Send each experiment's problems, or how many blocks' output it may keep for others."""
    from peftlab.assemble import check_model, kept_blocks

    answers: list[int | Sequence[Problem]] = []
    for experiment, splits in experiments:
        kind = experiment.build_kind()
        try:
            check_model(experiment, kind, splits)
            answers.append(kept_blocks(experiment, kind, splits))
        except UserError as error:
            answers.append(error.problems)
        except KeyboardInterrupt:
            sys.exit(130)
    sender.send(answers)  # type: ignore[attr-defined]


def _fit_batch_sizes(
    experiments: list[tuple[Experiment, Splits]], memory_bytes: int | None, sender: object
) -> None:
    """Send the experiments with micro-batches that fit, or else the problems."""
    from peftlab.planning.batch_size import fit_batch_size, with_micro_batch

    problems: list[Problem] = []
    smallest: dict[str, int] = {}
    try:
        for experiment, splits in experiments:
            try:
                fitted = fit_batch_size(experiment, experiment.build_kind(), splits, memory_bytes)
            except UserError as error:
                problems += error.problems
                continue
            size = fitted.train.per_device_train_batch_size
            # Seeds draw other batches; all runs of a recipe shall have the same micro-batch.
            smallest[experiment.recipe] = min(size, smallest.get(experiment.recipe, size))
    except KeyboardInterrupt:
        sys.exit(130)
    answer: list[Any] = problems or [
        with_micro_batch(each, smallest[each.recipe]) for each, _ in experiments
    ]
    sender.send(answer)  # type: ignore[attr-defined]
