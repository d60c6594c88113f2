"""Two optimizer steps without storage: real model class, method, loss, optimizer and step."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from transformers import PretrainedConfig

from peftlab.assemble import Prepared, prepare
from peftlab.errors import IncompatibleError, Problem, UserError
from peftlab.memory.cards import Chip
from peftlab.memory.emulate import ScaledOptimizer, cuda_kernels
from peftlab.memory.fake import fake_world
from peftlab.memory.kernels import Kernels
from peftlab.memory.meter import CudaMeter, NullMeter, StepMeasurement, StepMeter, TimelineMeter
from peftlab.memory.timeline import CUDA_GRANULARITY, Timeline
from peftlab.memory.trace import StepTrace
from peftlab.methods.base import Method
from peftlab.models.bits import cuda_bits
from peftlab.models.checkpoint import lacking
from peftlab.models.config import PrecisionConfig
from peftlab.models.dropout import cuda_dropout
from peftlab.models.load import build_from_config
from peftlab.models.quantized import cuda_products, quantize_shell
from peftlab.optim.build import build_optimizer
from peftlab.optim.config import OptimConfig
from peftlab.optim.in_backward import update_in_backward
from peftlab.planning.parallel import gradient_buckets
from peftlab.planning.schema import Device, Sharding
from peftlab.planning.sharding import check_sharding, fake_group, shard, without_reduction
from peftlab.results.record import ParameterCounts
from peftlab.tasks.base import TaskKind
from peftlab.tasks.packing import pack
from peftlab.training.config import TrainConfig
from peftlab.training.modes import set_training_mode
from peftlab.training.step import MicroBatch, cuda_norm, optimizer_step
from peftlab.trunk.boundary import NoBoundary
from peftlab.trunk.cache import OFF, too_large
from peftlab.trunk.replay import Blank, NotReplayableError, Replay


@dataclass(frozen=True)
class PlanRequest:
    """What to plan; nothing in it holds weights or rows.

    Args:
        config: of the model, with the task's values set (``num_labels``, …).
        kind: the task kind, for its loss and model class; its data is not read.
        lengths: tokens of each example of a micro-batch, which is padded to the longest.
        train: for what changes a step: accumulation, checkpointing, the trunk's mode; the size of a
            micro-batch is that of ``lengths``.
        device: whose kernels and allocator to plan for.
        chip: of the card, on CUDA.
        checkpoint_keys: the tensors of the checkpoint, if there is one: what it lacks of a pooler
            trains with the head.
        num_processes: that train data-parallel; the plan is each one's.
        sharding: "fsdp" leaves each process its part of parameters, gradients and optimizer state.
        all_rows: tokens of all rows to train on, and how many others will be predicted: whether a
            frozen trunk's activations may be kept. Without rows they may.
    """

    config: PretrainedConfig
    kind: TaskKind[Any]
    method: Method[Any]
    optim: OptimConfig
    precision: PrecisionConfig
    lengths: tuple[int, ...]
    train: TrainConfig = field(default_factory=TrainConfig)
    device: Device = "cpu"
    chip: Chip = field(default_factory=Chip)
    attn_implementation: str = "sdpa"
    checkpoint_keys: frozenset[str] | None = None
    num_processes: int = 1
    sharding: Sharding = "none"
    all_rows: tuple[Sequence[int], int] = ((), 0)

    def with_train(self, **values: Any) -> PlanRequest:
        """The same with other values in its train section."""
        return replace(self, train=self.train.model_copy(update=values))


@dataclass(frozen=True)
class Simulation:
    """What the second of two steps did.

    Args:
        trace: the step; on CUDA its events before ``start`` are those of the first step.
        saved_bytes: the tensors of the adapter's file.
        measured: what the device's allocator counted of it; None for a plan.
    """

    trace: StepTrace
    params: ParameterCounts
    saved_bytes: int
    flops: int
    notes: tuple[str, ...]
    measured: StepMeasurement | None = None


def simulate(
    request: PlanRequest, batches: Sequence[Mapping[str, Tensor]] | None = None
) -> Simulation:
    """Build, attach and train two steps; report the second, which is the first with all its state.

    Args:
        batches: collated micro-batches of a step; by default made from ``request.lengths``.

    Raises:
        IncompatibleError: the method cannot be put on this model, or cannot be planned.
    """
    if request.train.torch_compile:
        message = "a compiled model cannot be planned: the compiler decides what it keeps."
        hint = "Plan without it: --set train.torch_compile=false."
        raise IncompatibleError(Problem("train.torch_compile", message, hint))
    batches = batches or synthetic_batches(request)
    try:
        with (
            _other_processes(request),
            fake_world(request.device) as world,
            ExitStack() as emulated,
        ):
            if request.device == "cuda":
                emulated.enter_context(cuda_kernels(request.chip))
                emulated.enter_context(cuda_products())
                emulated.enter_context(cuda_dropout())
                emulated.enter_context(cuda_bits())
                emulated.enter_context(cuda_norm())
                if request.method.traits.is_peft:
                    # Imports PEFT, which no other method needs.
                    from peftlab.methods.fused_lora import cuda_layers

                    emulated.enter_context(cuda_layers())
            simulation = _two_steps(
                request,
                [{k: world.fake(v) for k, v in batch.items()} for batch in batches],
                _num_items(request.kind, batches),
            )
            guesses = (f"guessed {guess}" for guess in sorted(world.guesses))
            return replace(simulation, notes=(*simulation.notes, *guesses))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        kind = request.method.config.kind
        message = f"{kind} cannot be planned: it computes from the weights' values ({error.func})."
        raise IncompatibleError(Problem("method", message)) from error
    except UserError:
        raise
    except Exception as error:
        # Whatever fails on tensors without storage may well work on real ones: a run goes on.
        message = f"cannot be planned: {type(error).__name__}: {error}"
        raise IncompatibleError(Problem("", message.splitlines()[0])) from error


def measure(
    request: PlanRequest, batches: Sequence[Mapping[str, Tensor]] | None = None
) -> Simulation:
    """The same for real, on the request's device with random weights: what a plan is checked with.

    Shards need as many processes, each of which measures its own.
    """
    batches = batches or synthetic_batches(request)
    items = _num_items(request.kind, batches)
    if request.device == "cpu":
        return _two_steps(request, batches, items)
    # Nothing of what ran before may count: cached blocks, workspaces of cuBLAS, a precision.
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=request.precision.mixed_precision)
    moved = [{k: v.to(accelerator.device) for k, v in batch.items()} for batch in batches]
    with accelerator.device:
        return _two_steps(request, moved, items, accelerator)


def _other_processes(request: PlanRequest) -> AbstractContextManager[None]:
    if request.sharding == "none":
        return nullcontext()
    check_sharding(request)
    return fake_group(request.num_processes)


def _two_steps(
    request: PlanRequest,
    batches: Sequence[Mapping[str, Tensor]],
    num_items: int,
    accelerator: Accelerator | None = None,
) -> Simulation:
    """``accelerator``: of a machine that has the request's device; else what stands for it."""
    base = build_from_config(
        request.config,
        request.kind.traits.auto_class,
        getattr(torch, request.precision.dtype),
        request.attn_implementation,
    )
    if request.checkpoint_keys is not None:
        base.newly_initialized = lacking(base, request.checkpoint_keys)
    noticed = []
    if request.precision.quantization is not None:
        bf16 = request.device == "cuda"
        noticed = quantize_shell(base, request.precision.quantization, bf16)
    prepared = prepare(base, request.method, request.kind.traits, request.train)
    model = prepared.model
    saved_bytes = sum(t.nbytes for t in request.method.adapter_state(model).values())
    if request.sharding == "fsdp":
        shard(model, request.precision.mixed_precision)
    optimizer, notes = build_optimizer(model, request.optim, prepared.anatomy, request.device)
    if request.optim.optimizer_in_backward:
        update_in_backward(optimizer)
    if accelerator is not None:
        # Weights come from the CPU in one go, and leave no holes where they were made.
        if request.precision.quantization is None:
            model.to("cpu")
        gc.collect()
        torch.cuda.empty_cache()
    trained = [p for p in model.parameters() if p.requires_grad]
    backend: Any = accelerator or _Backend(
        request.precision, request.device, request.sharding == "fsdp"
    )
    backend.prepare(model)
    updates = backend.prepare_optimizer(optimizer)
    inputs = [MicroBatch(batch) for batch in batches]
    with ExitStack() as stack:
        stack.enter_context(_replayed_trunk(prepared, request, backend, batches[0]))
        set_training_mode(model, prepared.trunk)
        first, second = stack.enter_context(_meters(request, trained, accelerator))
        for meter in (first, second):
            with meter.step(model, optimizer, batches):
                optimizer_step(
                    model,
                    inputs,
                    request.kind.loss,
                    updates,
                    num_items=num_items,
                    parameters=trained,
                    backend=backend,
                    max_grad_norm=request.optim.max_grad_norm,
                    meter=meter,
                )
            optimizer.zero_grad()
    said = (*noticed, *notes, *request.method.notes)
    measurement = second.result()
    measured = None if accelerator is None else measurement
    return Simulation(second.trace, prepared.params, saved_bytes, measurement.flops, said, measured)


@contextmanager
def _meters(
    request: PlanRequest, trained: Sequence[Tensor], accelerator: Accelerator | None
) -> Iterator[tuple[StepMeter, TimelineMeter]]:
    """For the first step and for the second, which is the one that is reported."""
    if accelerator is not None:
        yield NullMeter(), CudaMeter(accelerator.device)
        return
    ddp = request.num_processes > 1 and request.sharding == "none"
    buckets = gradient_buckets(trained) if ddp else []
    if request.device == "cpu":
        # There the first step only brings state into being.
        yield NullMeter(), TimelineMeter(buckets=buckets)
        return
    # CUDA's allocator remembers it.
    with Timeline(CUDA_GRANULARITY, Kernels(request.chip)) as timeline:
        meters = [TimelineMeter(timeline=timeline, buckets=buckets) for _ in range(2)]
        yield meters[0], meters[1]


@contextmanager
def _replayed_trunk(
    prepared: Prepared, request: PlanRequest, backend: Any, batch: Mapping[str, Tensor]
) -> Iterator[None]:
    """In here a frozen trunk is replayed, as in a run that keeps its activations."""
    boundary = prepared.boundary
    if request.train.trunk_cache == OFF or isinstance(boundary, NoBoundary):
        yield
        return

    def loss() -> Tensor:
        with backend.autocast():
            return request.kind.loss(prepared.model, batch)

    replay = Replay(boundary, Blank())
    with replay.attached():
        prepared.model.eval()
        # Else a run computes the trunk as well, and says why.
        with suppress(NotReplayableError):
            form, train = replay.learn(loss), request.train
            half = train.trunk_cache_dtype == "float16"
            if too_large(form, train.trunk_cache, half, *request.all_rows):
                replay.form = None
        yield


def synthetic_batches(request: PlanRequest) -> list[dict[str, Tensor]]:
    """Micro-batches of the asked lengths: token ids, attention mask, labels.

    Every token is a target of a language model, which costs no more memory than fewer would.
    """
    longest = max(request.lengths)
    mask = torch.zeros(len(request.lengths), longest, dtype=torch.long)
    for row, length in enumerate(request.lengths):
        mask[row, :length] = 1
    text = request.config.get_text_config()
    pad, eos = getattr(text, "pad_token_id", None) or 0, getattr(text, "eos_token_id", None)
    eos = eos[0] if isinstance(eos, list) else eos
    plain = next(token for token in range(4) if token not in (pad, eos))
    ids = torch.where(mask.bool(), plain, pad)
    if eos is not None:
        # Some classifiers read the state of the one token that ends a text.
        ids[torch.arange(len(request.lengths)), torch.tensor(request.lengths) - 1] = eos
    batch = {"input_ids": ids, "attention_mask": mask}
    if request.kind.traits.unit == "examples" and getattr(text, "type_vocab_size", 0) > 1:
        batch["token_type_ids"] = torch.zeros_like(ids)
    if request.kind.traits.unit == "tokens":
        if request.kind.packs:
            texts = [row[real].tolist() for row, real in zip(ids, mask.bool(), strict=True)]
            batch = pack([{"input_ids": text, "labels": text} for text in texts])
        else:
            batch["labels"] = torch.where(mask.bool(), ids, -100)
    elif request.config.problem_type == "regression":
        batch["labels"] = torch.zeros(len(request.lengths))
    else:
        batch["labels"] = torch.zeros(len(request.lengths), dtype=torch.long)
    # Each micro-batch is collated for itself, so none shares another's memory.
    return [copy.deepcopy(batch) for _ in range(request.train.gradient_accumulation_steps)]


def _num_items(kind: TaskKind[Any], batches: Sequence[Mapping[str, Tensor]]) -> int:
    if kind.traits.unit == "tokens":
        return max(1, sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches))
    return sum(len(batch["labels"]) for batch in batches)


class _Backend:
    """What Accelerate does in a step of one process, operation by operation, on any machine.

    ``Accelerator`` itself is one for the process and would be bound to the device that is there.
    """

    num_processes = 1

    def __init__(self, precision: PrecisionConfig, device: Device, sharded: bool) -> None:
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        self._dtype = dtypes.get(precision.mixed_precision)
        self._scales = precision.mixed_precision == "fp16" and device == "cuda"
        self._scaled: ScaledOptimizer | None = None
        self._sharded = sharded

    def prepare(self, model: nn.Module) -> None:
        """As ``Accelerator.prepare_model``: forward in autocast, outputs in fp32."""
        # FSDP casts parameters and inputs itself.
        if self._dtype is not None and not self._sharded:
            bound: Any = model.forward
            forward = bound.__func__
            within = torch.autocast("cpu", self._dtype)(forward)
            model.forward = MethodType(
                convert_outputs_to_fp32(MethodType(within, model).__func__), model
            )

    def prepare_optimizer(self, optimizer: Any) -> Any:
        """As ``Accelerator.prepare_optimizer``: in fp16, losses are scaled and gradients not."""
        if self._scales:
            self._scaled = ScaledOptimizer(optimizer)
        return self._scaled or optimizer

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        return without_reduction(model) if self._sharded else nullcontext()

    @contextmanager
    def autocast(self) -> Iterator[None]:
        with torch.autocast("cpu", self._dtype) if self._dtype else nullcontext():
            yield

    def backward(self, loss: Tensor) -> None:
        # Accelerate divides by its own accumulation steps, of which the loop asks for one.
        loss = loss / 1
        loss = self._scaled.scale(loss) if self._scaled else loss
        loss.backward()  # type: ignore[no-untyped-call]

    def clip_grad_norm_(self, parameters: Sequence[Tensor], max_norm: float) -> Tensor:
        if self._scaled:
            self._scaled.unscale()
        return torch.nn.utils.clip_grad_norm_(list(parameters), max_norm)
