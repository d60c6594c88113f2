"""One run from loading to its record."""

from __future__ import annotations

import logging
import os
import shutil
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed

from peftlab.assemble import Assembly, assemble
from peftlab.errors import DivergedError, IncompatibleError, RunError
from peftlab.experiment.schema import Experiment
from peftlab.files import replace_folder, write_json, write_text
from peftlab.memory.host_allocator import keep_freed_memory, keep_large_blocks, return_freed_memory
from peftlab.memory.meter import available_bytes, process_peak_bytes
from peftlab.planning.experiment import plan_experiment
from peftlab.results.record import CurvePoint, Memory, PhaseMarks, Record, Speed, Status
from peftlab.results.record import TrunkCache as TrunkCacheRecord
from peftlab.results.store import RECORD, write_predictions, write_record
from peftlab.run_trunk import RunTrunk
from peftlab.sharing import Shared
from peftlab.tasks.base import Features, Splits, TaskKind
from peftlab.tasks.metrics import METRICS
from peftlab.training.compilation import compile_seconds
from peftlab.training.environment import describe_environment
from peftlab.training.evaluate import predict_rows
from peftlab.training.events import Listener, ProgressBar, StepFile, Tracking
from peftlab.training.job import Job
from peftlab.training.launch import refuse_early_updates, refuse_sharding
from peftlab.training.loop import Loop
from peftlab.training.stages import stage_notes, train_flops
from peftlab.training.utilisation import matmul_flops_per_second, model_flops_utilisation
from peftlab.units import format_bytes

ADAPTER, CHECKPOINTS, ERROR, PLAN = "adapter", "checkpoints", "error.txt", "plan.json"
logger = logging.getLogger(__name__)


class Execution:
    """Runs one experiment in a folder that is its own. ``known`` becomes the record."""

    def __init__(
        self,
        experiment: Experiment,
        kind: TaskKind[Any],
        splits: Splits,
        identity: str,
        folder: Path,
        shared: Shared | None = None,
    ) -> None:
        self.experiment, self.kind, self.splits = experiment, kind, splits
        self.shared = shared or Shared()
        self.identity, self.folder = identity, folder
        self.known: dict[str, Any] = {"notes": splits.notes}
        self.speed: dict[str, Any] = {}

    def run(self, resume: bool, progress: bool, command: str) -> Record:
        """Train, test and save; the record is written whatever happens.

        Raises:
            RunError: it diverged, ran out of memory or broke the guard.
            KeyboardInterrupt: the user interrupted it.
        """
        precision, train = self.experiment.precision, self.experiment.train
        accelerator = Accelerator(
            # Without this, processes on a machine without accelerator would not find each other.
            cpu=int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available(),
            mixed_precision=precision.mixed_precision,
            log_with=list(train.report_to) or None,
            project_dir=str(self.folder),
        )
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        refuse_sharding(accelerator)
        refuse_early_updates(accelerator, self.experiment.optim)
        if accelerator.is_main_process:
            (self.folder / RECORD).unlink(missing_ok=True)
            if not resume:
                shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
        accelerator.wait_for_everyone()
        self.known["command"] = command
        self.known["environment"] = describe_environment(
            accelerator.device, accelerator.num_processes
        )
        try:
            self._execute(accelerator, resume, progress)
        except BaseException as error:
            status = _status_of(error)
            if accelerator.is_main_process:
                write_text(self.folder / ERROR, traceback.format_exc())
                self._write(status, f"{type(error).__name__}: {error}".rstrip(": "))
            if status == "oom":
                raise RunError(f"out of memory: {error}") from error
            raise
        finally:
            # The state is one for the process; the next run may want another precision.
            accelerator.free_memory()
            AcceleratorState._reset_state()
            GradientState._reset_state()
            return_freed_memory()
        record = self._record("ok", None)
        if accelerator.is_main_process:
            (self.folder / ERROR).unlink(missing_ok=True)
            write_record(self.folder, record)
        self.shared.runs += 1
        return record

    def _execute(self, accelerator: Accelerator, resume: bool, progress: bool) -> None:
        started, shared = time.perf_counter(), self.shared
        tokenizer, features = shared.encoded(self.experiment, self.kind, self.splits)
        encode_seconds = time.perf_counter() - started
        self._plan(accelerator)
        peak = matmul_flops_per_second(accelerator.device, self.experiment.precision)
        self.speed["matmul_flops_per_second"] = peak
        started, compiles = time.perf_counter(), self.experiment.train.torch_compile
        compiled = compile_seconds() if compiles else 0.0
        assembly = assemble(self.experiment, self.kind, self.splits, tokenizer, shared.model)
        self.known["params"] = assembly.prepared.params
        self.known["notes"] += assembly.notes
        job = job_of(assembly, self.folder / CHECKPOINTS, features)
        # The method has drawn its own numbers: dropout shall be the same for all of them.
        set_seed(self.experiment.seed + accelerator.process_index)
        loop = Loop(job, accelerator, self._listeners(accelerator, progress))
        self.known["notes"] += stage_notes(loop.stages)
        self.speed["load_seconds"] = encode_seconds + time.perf_counter() - started
        trunk = RunTrunk(assembly, loop, shared)
        try:
            with trunk:
                trunk.fill()
                try:
                    fitted = loop.fit(resume, trunk.enter)
                finally:
                    self._learn(loop, trunk)
                self.known["notes"] += fitted.notes
                self._test(assembly, accelerator)
        finally:
            self.known["trunk_cache"] = TrunkCacheRecord(**trunk.usage())
        if compiles:
            self.speed["compile_seconds"] = compile_seconds() - compiled
        if accelerator.is_main_process:
            with replace_folder(self.folder / ADAPTER) as folder:
                assembly.method.save_adapter(assembly.model, folder)
                self.known["saved_bytes"] = sum(path.stat().st_size for path in folder.iterdir())
        accelerator.wait_for_everyone()

    def _plan(self, accelerator: Accelerator) -> None:
        """Foresee the memory, so that the record holds it beside what will be measured."""
        if accelerator.num_processes > 1:
            self.known["notes"] += ("not planned: a plan is for one process",)
            return
        available = available_bytes(accelerator.device)
        try:
            planned = plan_experiment(
                self.experiment,
                self.kind,
                self.splits,
                memory_bytes=available,
                shared=self.shared,
            )
        except IncompatibleError as error:
            self.known["notes"] += (f"not planned: {error}",)
            return
        write_json(self.folder / PLAN, planned.model_dump(mode="json"))
        self.known["plan"] = planned.model_dump(mode="json", exclude={"params"})
        if not planned.fits:
            warning = (
                f"planned to need {format_bytes(planned.needed_bytes)}, but only "
                f"{format_bytes(available)} are free: it may run out of memory"
            )
            if planned.suggestions:
                first = planned.suggestions[0]
                settings = " ".join(f"--set {key}={value}" for key, value in first.settings())
                warning += (
                    f"; {first.text} would need {format_bytes(first.needed_bytes)}: {settings}"
                )
            self.known["notes"] += (warning,)
            logger.warning("%s: %s", self.experiment.recipe, warning)
        elif accelerator.device.type == "cpu" and 2 * planned.needed_bytes <= available:
            # That leaves room for holes as large together as all tensors.
            keep_large_blocks()

    def _listeners(self, accelerator: Accelerator, progress: bool) -> list[Listener]:
        experiment = self.experiment
        if not accelerator.is_main_process:
            return []
        listeners: list[Listener] = [StepFile(self.folder)]
        if experiment.train.report_to:
            listeners.append(Tracking(accelerator, {"identity": self.identity}))
        if progress:
            label = f"{experiment.recipe} seed {experiment.seed}"
            listeners.append(ProgressBar(label, experiment.metric))
        return listeners

    def _test(self, assembly: Assembly, accelerator: Accelerator) -> None:
        started = time.perf_counter()
        predictions = predict_rows(
            accelerator,
            self.kind,
            assembly.model,
            self.splits.test,
            assembly.tokenizer,
            max_length=self.experiment.train.max_length,
            batch_size=self.experiment.train.per_device_eval_batch_size,
            labels=self.splits.labels,
        )
        self.known["metrics"] = self.kind.score(self.splits.test, predictions)
        self.speed["eval_seconds"] += time.perf_counter() - started
        if accelerator.is_main_process:
            write_predictions(self.folder, predictions)

    def _learn(self, loop: Loop, trunk: RunTrunk) -> None:
        """What the loop knows, also when it did not come to its end."""
        progress = loop.state.progress
        self.known |= {
            "steps_done": progress.step,
            "final_train_loss": progress.last_loss,
            "validation_metrics": progress.kept_metrics,
            "curve": tuple(CurvePoint(**point) for point in progress.curve),
        }
        if progress.timed_seconds:
            self.speed["tokens_per_second"] = progress.timed_tokens / progress.timed_seconds
        if progress.padded_tokens:
            self.speed["padding_share"] = 1 - progress.tokens / progress.padded_tokens
        self.speed["train_seconds"] = progress.train_seconds + trunk.fill_seconds
        self.speed["eval_seconds"] = progress.eval_seconds
        self.known["memory"] = Memory(
            source="process high-water mark", process_peak_bytes=self._process_peak_bytes()
        )
        if not loop.measured:
            return
        measured = loop.measured[-1]
        measurement = measured.measurement
        self.known["memory"] = Memory(
            source=measurement.source,
            **measurement.breakdown.model_dump(),
            marks=PhaseMarks(**asdict(measurement.marks)),
            reserved_bytes=measurement.reserved_bytes,
            process_peak_bytes=self._process_peak_bytes(),
            measured_step=measured.step,
            measured_batch=measured.batch,
        )
        self.speed["flops_per_step"] = measurement.flops
        device = loop.accelerator.device
        if self.shared.runs == 0 and device.type == "cpu":
            # Beside a model that fills a GPU there may be no room for it.
            peak = matmul_flops_per_second(device, self.experiment.precision, again=True)
            self.speed["matmul_flops_per_second"] = peak
        flops = train_flops(
            loop.measured, loop.stages, loop.schedule, progress.step, progress.padded_tokens
        )
        if flops is None:
            # The stages before a run was resumed were another process's.
            return
        self.speed["train_flops"] = flops + trunk.fill_flops
        steps = " and ".join(str(each.step) for each in loop.measured)
        self.speed["flops_source"] = (
            f"counted in step {steps}, scaled to the run by padded tokens"
            + ", and the frozen trunk's once" * bool(trunk.fill_flops)
        )
        self.speed["model_flops_utilisation"] = model_flops_utilisation(
            self.speed["train_flops"],
            self.speed["train_seconds"],
            self.speed["matmul_flops_per_second"],
        )

    def _process_peak_bytes(self) -> int | None:
        """None where it may be the peak of an earlier run in this process."""
        return process_peak_bytes() if self.shared.runs == 0 else None

    def _record(self, status: Status, error: str | None) -> Record:
        experiment = self.experiment
        return Record(
            identity=self.identity,
            task=experiment.task,
            recipe=experiment.recipe,
            model=experiment.model.model_name_or_path,
            seed=experiment.seed,
            status=status,
            error=error,
            metric=experiment.metric,
            metric_better=METRICS[experiment.metric].better,
            majority_baseline=self.kind.baseline(self.splits, experiment.metric),
            labels=self.splits.labels,
            train_rows=len(self.splits.train),
            test_rows=len(self.splits.test),
            speed=Speed(**self.speed),
            **self.known,
        )

    def _write(self, status: Status, error: str) -> None:
        write_record(self.folder, self._record(status, error))


def job_of(
    assembly: Assembly, checkpoints: Path, features: Sequence[Features] | None = None
) -> Job:
    """What the loop needs to train an assembly; ``features`` where they are encoded already."""
    experiment, splits = assembly.experiment, assembly.splits
    return Job(
        model=assembly.model,
        method=assembly.method,
        kind=assembly.kind,
        tokenizer=assembly.tokenizer,
        anatomy=assembly.prepared.anatomy,
        trunk=lambda: assembly.prepared.trunk,
        features=features
        if features is not None
        else assembly.kind.encode(splits.train, assembly.tokenizer, experiment.train.max_length),
        validation=splits.validation,
        labels=splits.labels,
        metric=experiment.metric,
        metric_better=METRICS[experiment.metric].better,
        optim=experiment.optim,
        train=experiment.train,
        seed=experiment.seed,
        checkpoints=checkpoints,
    )


def _status_of(error: BaseException) -> Status:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, DivergedError):
        return "diverged"
    # The CPU allocator raises a plain RuntimeError, in other words on Windows.
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError)
        and ("can't allocate memory" in str(error) or "not enough memory" in str(error))
    )
    return "oom" if out_of_memory else "failed"
