"""The training loop, over Accelerate. One for every method.

on_begin
each stage of the method, for most there is one:           (stages.py)
    enter_stage; modes
    each optimizer step:
        micro-batches → forward, backward → clip, update   (step.py)
        the guard sees the gradients; the method's on_step_end
        on_step; evaluate → on_evaluate, keep the best; save   (as configured)
the guard judges; the best weights come back
on_end
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor

from peftlab.memory.meter import NullMeter, StepMeter, step_meter
from peftlab.methods.base import Progress
from peftlab.optim.build import build_optimizer, build_scheduler
from peftlab.optim.in_backward import update_in_backward
from peftlab.training import checkpoint as ckpt
from peftlab.training.compilation import compile_blocks
from peftlab.training.evaluate import predict_rows
from peftlab.training.events import EvaluationEvent, Listener, StepEvent
from peftlab.training.guard import LearningGuard
from peftlab.training.job import FitResult, Job, MeasuredStep, Progression
from peftlab.training.modes import set_training_mode
from peftlab.training.schedule import Schedule
from peftlab.training.stages import Stage, stages_of
from peftlab.training.state import TrainingState
from peftlab.training.step import MicroBatch, finite, optimizer_step

OnStage = Callable[[int], None]


class Loop:
    """Trains one job to its end."""

    def __init__(self, job: Job, accelerator: Accelerator, listeners: Sequence[Listener]) -> None:
        self.job, self.accelerator, self.listeners = job, accelerator, listeners
        self.model = job.model
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._trunk = job.trunk()
        if job.train.torch_compile:
            compile_blocks(self.model, job.anatomy, self._trunk, accelerator.device)
        optimizer, self.notes = build_optimizer(self.model, job.optim, job.anatomy)
        self.prepared, self.optimizer = accelerator.prepare(self.model, optimizer)
        self.lengths = [len(features["input_ids"]) for features in job.features]
        processes, shape = accelerator.num_processes, job.kind.batch_shape
        self.schedule = Schedule(self.lengths, job.train, job.seed, processes, shape)
        self.total_steps = self.schedule.total_steps
        self.stages = stages_of(job.method, self.total_steps, processes)
        self.scheduler = build_scheduler(optimizer, job.optim, self.total_steps)
        self.guard = LearningGuard(self.model)
        if job.optim.optimizer_in_backward:
            names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
            update_in_backward(optimizer, lambda p: self.guard.observe_parameter(names[p], p))
        self.state = TrainingState(
            job.method, job.model, self.optimizer, self.scheduler, accelerator.scaler, self.guard
        )
        self.measured: list[MeasuredStep] = []

    def fit(self, resume: bool = False, on_stage: OnStage = lambda _: None) -> FitResult:
        """Train; with ``resume`` go on from the newest checkpoint where there is one.

        Args:
            on_stage: called with the number of each stage that is entered.

        Raises:
            DivergedError: the loss is not finite.
            GuardError: what had to learn did not, or what was frozen moved.
            RunFolderError: the checkpoint is damaged.
        """
        if resume:
            self._restore()
        try:
            for listener in self.listeners:
                listener.on_begin(self.total_steps, self.progress.step)
            for stage in self.stages:
                # The last is entered in any case: its model is the one that is tested.
                if self.progress.step < stage.end or stage is self.stages[-1]:
                    self._train_stage(stage, on_stage)
        finally:
            for listener in self.listeners:
                listener.on_end()
        # Judged before: the best weights may be those of a step in which the rate was still 0.
        self.guard.verify(self.model, self.progress.step)
        self.state.return_to_best()
        return FitResult(self.progress, next(reversed(self.measured), None), tuple(self.notes))

    def _train_stage(self, stage: Stage, on_stage: OnStage) -> None:
        progress, job = self.progress, self.job
        job.method.enter_stage(self.model, stage.number)
        on_stage(stage.number)
        self._trunk = job.trunk()
        set_training_mode(self.model, self._trunk)
        # The operations of compiled blocks cannot be watched.
        to_measure = None
        if not job.train.torch_compile:
            to_measure = self.schedule.largest_step(stage.steps, progress.step)
        if progress.step == stage.start:
            progress.evaluations_since_best = 0
        while progress.step < stage.end and not self._stopped_early(stage):
            self._advance(measure=progress.step == to_measure)

    def _advance(self, measure: bool) -> None:
        """One optimizer step and what follows it."""
        progress, config, started = self.progress, self.job.train, time.perf_counter()
        tokens = sum(self.lengths[row] for row in self.schedule.rows_of(progress.step))
        rate = float(self.scheduler.get_last_lr()[0])
        loss, grad_norm, padded_tokens = self._train(measure)
        progress.step += 1
        self.job.method.on_step_end(self.model, Progress(progress.step, self.total_steps))
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        event = None
        if progress.step % config.logging_steps == 0 or progress.step == self.total_steps:
            # Reading the loss waits for the device, so it belongs to the step's time.
            progress.last_loss = finite(loss, progress.step)
            event = (progress.last_loss, None if grad_norm is None else float(grad_norm))
        seconds = time.perf_counter() - started
        progress.tokens += tokens
        progress.padded_tokens += padded_tokens
        progress.train_seconds += seconds
        if progress.step > 1:
            progress.timed_seconds += seconds
            progress.timed_tokens += tokens
        if event is not None:
            self._tell_step(StepEvent(
                progress.step, self._epoch, event[0], rate, event[1], seconds, tokens, padded_tokens
            ))  # fmt: skip
        if self._due(config.eval_strategy, config.eval_steps):
            self._evaluate()
        if self._due(config.save_strategy, config.save_steps):
            self._save()

    def _train(self, measure: bool) -> tuple[Tensor, Tensor | None, int]:
        """The optimizer step itself: mean loss, gradient norm, padded tokens of all processes."""
        job = self.job
        micros = self.schedule.micro_batches(self.progress.step)
        rows = self.schedule.rows_of(self.progress.step)
        batches = [self._collate(micro[self.accelerator.process_index]) for micro in micros]
        meter: StepMeter = step_meter(self.accelerator.device) if measure else NullMeter()
        with meter.step(self.model, self.optimizer, [batch.inputs for batch in batches]):
            result = optimizer_step(
                self.prepared,
                batches,
                job.kind.loss,
                self.optimizer,
                num_items=sum(job.kind.num_items(job.features[row]) for row in rows),
                parameters=self.parameters,
                backend=self.accelerator,
                max_grad_norm=job.optim.max_grad_norm,
                meter=meter,
            )
        self.guard.observe(self.model)
        # Accelerate's optimizer would look for a package on the disk, the model for every module.
        for parameter in self.parameters:
            parameter.grad = None
        padded = self.schedule.shapes_of(self.progress.step)
        padded_tokens = sum(map(math.prod, padded))
        if (measurement := meter.result()) is not None:
            largest = max(padded, key=math.prod)
            self.measured.append(
                MeasuredStep(self.progress.step + 1, largest, padded_tokens, measurement)
            )
        return self.accelerator.reduce(result.loss, "sum"), result.grad_norm, padded_tokens

    def _collate(self, part: Sequence[int]) -> MicroBatch:
        # A process without an example of its own computes one with weight 0, to stay in step.
        features = [self.job.features[row] for row in part or [0]]
        inputs = self.job.kind.collate(features, self.job.tokenizer)
        return MicroBatch(
            send_to_device(inputs, self.accelerator.device), weight=1.0 if part else 0.0
        )

    def _tell_step(self, event: StepEvent) -> None:
        self.state.note_loss(event, self.total_steps)
        for listener in self.listeners:
            listener.on_step(event)

    def _evaluate(self) -> None:
        """Score the validation split; keep the weights if they are the best so far."""
        job, progress, started = self.job, self.progress, time.perf_counter()
        predictions = predict_rows(
            self.accelerator,
            job.kind,
            self.model,
            job.validation,
            job.tokenizer,
            max_length=job.train.max_length,
            batch_size=job.train.per_device_eval_batch_size,
            labels=job.labels,
        )
        set_training_mode(self.model, self._trunk)
        metrics = job.kind.score(job.validation, predictions)
        progress.eval_seconds += time.perf_counter() - started
        best = self.state.judge(
            metrics, job.metric, job.metric_better, job.train.load_best_model_at_end
        )
        progress.curve.append({
            "step": progress.step, "epoch": self._epoch,
            "train_loss": progress.last_loss, "metric": metrics[job.metric],
        })  # fmt: skip
        for listener in self.listeners:
            listener.on_evaluate(EvaluationEvent(progress.step, self._epoch, metrics, best))

    def _due(self, strategy: str, every: int | None) -> bool:
        """Whether what is configured as no, epoch or steps is due after this step."""
        if strategy == "no":
            return False
        interval = every if strategy == "steps" and every else self.schedule.steps_per_epoch
        return self.progress.step % interval == 0 or self.progress.step == self.total_steps

    def _stopped_early(self, stage: Stage) -> bool:
        patience = self.job.train.early_stopping_patience
        # Before the last stage, some of what is to train has not begun to.
        waited = patience is not None and self.progress.evaluations_since_best >= patience
        return waited and stage is self.stages[-1]

    def _save(self) -> None:
        rng = gather_object([ckpt.rng_state()])
        if self.accelerator.is_main_process:
            keep = self.job.train.save_total_limit
            step = self.progress.step
            ckpt.save_checkpoint(self.job.checkpoints, step, self.state.capture(rng), keep)

    def _restore(self) -> None:
        path = ckpt.latest_checkpoint(self.job.checkpoints)
        if path is not None:
            saved = ckpt.load_checkpoint(path)
            self.state.restore(
                saved, self.accelerator.process_index, self.accelerator.num_processes
            )

    @property
    def progress(self) -> Progression:
        return self.state.progress

    @property
    def _epoch(self) -> float:
        return self.progress.step / self.schedule.steps_per_epoch
