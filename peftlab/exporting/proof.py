"""The proof: the trained model's calls, repeated in a fresh process on what was written."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftlab.errors import DataError, ExportMismatchError, Problem
from peftlab.exporting import reload
from peftlab.predicting import LoadedRun
from peftlab.tasks.base import Features, Row, TaskKind

MAX_ROWS, GENERATED_ROWS, BATCH_SIZE = 64, 4, 4
MAX_LOGITS = 2**26
"""Numbers that pass through a file: 256 MB in fp32. A vocabulary reaches it after few rows."""

# Roundings of an activation on its way through a block: projections, attention, MLP, norms, sums.
_ROUNDINGS_A_BLOCK = 12
# A normally distributed error exceeds six deviations twice in a billion.
_DEVIATIONS = 6
_UNIT_ROUNDOFF = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8, "int8": 1 / 254}


@dataclass(frozen=True)
class Call:
    """One call of a model's method by keyword, and the tensor it returned, if it was one."""

    name: str
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    result: Tensor | None


@dataclass(frozen=True)
class Reference:
    """What the trained model said, with the calls that made it say so.

    Args:
        batches: collated rows; ``forwards`` and ``logits`` of the same length belong to them.
        generations: calls of ``generate``.
    """

    rows: int
    batches: Sequence[Mapping[str, Tensor]]
    forwards: Sequence[Call]
    logits: Sequence[Tensor]
    generations: Sequence[Call]


@dataclass(frozen=True)
class Tolerance:
    """The largest and the root-mean-square difference that rounding explains, and why that much."""

    largest: float
    rms: float
    reason: str


def take_reference(loaded: LoadedRun, rows: Sequence[Row]) -> Reference:
    """Run the trained model on up to 64 validation rows, as many as ``MAX_LOGITS`` allows.

    Raises:
        DataError: no row fits into the run's ``max_length``.
    """
    kind, model, tokenizer = loaded.kind, loaded.model, loaded.tokenizer
    max_length = loaded.experiment.train.max_length
    device = next(model.parameters()).device
    usable = _encoded(kind, rows, tokenizer, max_length)
    batches, logits, count = [], [], 0
    with torch.no_grad(), _recorded(model, "forward") as forwards:
        for start in range(0, len(usable), BATCH_SIZE):
            if count >= MAX_LOGITS:
                break
            features = usable[start : start + BATCH_SIZE]
            batch = {k: v.to(device) for k, v in kind.collate(features, tokenizer).items()}
            logits.append(kind.logits(model, batch).cpu())
            batches.append({key: value.cpu() for key, value in batch.items()})
            count += logits[-1].numel()
    generations: list[Call] = []
    if kind.traits.generates:
        few = rows[:GENERATED_ROWS]
        with _recorded(model, "generate") as generations:
            kind.predict(model, few, tokenizer, max_length, BATCH_SIZE, loaded.labels)
    compared = min(len(usable), len(batches) * BATCH_SIZE)
    return Reference(compared, batches, forwards, logits, generations)


def _encoded(
    kind: TaskKind[Any], rows: Sequence[Row], tokenizer: Any, max_length: int
) -> list[Features]:
    usable: list[Features] = []
    for row in rows:
        try:
            usable += kind.encode([row], tokenizer, max_length)
        except DataError:
            continue  # As in the run's own evaluation: too long to be scored.
        if len(usable) == MAX_ROWS:
            break
    if not usable:
        message = "no validation row fits, so an export could not be proved."
        raise DataError(Problem("train.max_length", message))
    return usable


@contextmanager
def _recorded(model: nn.Module, name: str) -> Iterator[list[Call]]:
    """Every call of a method of ``model`` while the block runs."""
    original = getattr(model, name)
    before = vars(model).get(name)
    calls: list[Call] = []

    def call(**arguments: Any) -> Any:
        result = original(**arguments)
        tensors = {k: v.cpu() for k, v in arguments.items() if isinstance(v, Tensor)}
        values = {key: value for key, value in arguments.items() if key not in tensors}
        returned = result.cpu() if isinstance(result, Tensor) else None
        calls.append(Call(name, tensors, values, returned))
        return result

    setattr(model, name, call)
    try:
        yield calls
    finally:
        delattr(model, name)
        if before is not None:
            setattr(model, name, before)


class _Replay(nn.Module):
    """Says again what another model said, call by call."""

    def __init__(self, outputs: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.outputs = iter(outputs)

    def forward(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(**next(self.outputs))


def tolerance_for(loaded: LoadedRun, largest_logit: float, quantised: bool) -> Tolerance:
    """How far rounding alone can move a logit.

    Merging adds the same numbers in another order. Roundings are independent, so that the error
    grows with the root of their number: 12 in each block, and in fp32, where a matrix product also
    sums with the precision it is stored in, for each of the ``hidden_size`` terms (Higham & Mary
    2019, A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput. 41(5)).

    Args:
        largest_logit: what the error is relative to; less than 1 counts as 1, since what the head
            sums is normalised to about 1 however small the sum is.
        quantised: the exported model is loaded on a quantised base too.
    """
    anatomy, name = loaded.anatomy, _coarsest(loaded, quantised)
    unit, scale = _UNIT_ROUNDOFF[name], max(1.0, largest_logit)
    summed = anatomy.hidden_size if name == "float32" else 1
    factor = math.sqrt(_ROUNDINGS_A_BLOCK * len(anatomy.blocks) * summed)
    terms = f"{_ROUNDINGS_A_BLOCK}·{len(anatomy.blocks)} blocks"
    terms += f"·{summed} terms" if name == "float32" else ""
    reason = (
        f"{name} rounds by {unit:.2g}; random rounding errors add up to that times √({terms}) "
        f"= {factor:.3g}, relative to logits of up to {scale:.3g}: that much in the root mean "
        f"square, {_DEVIATIONS} times that in the largest"
    )
    deviation = unit * factor * scale
    return Tolerance(_DEVIATIONS * deviation, deviation, reason)


def _coarsest(loaded: LoadedRun, quantised: bool) -> str:
    """The numbers with the fewest digits that either model computes in."""
    precision = loaded.experiment.precision
    if precision.quantization == "int8":
        return "int8"  # Activations are quantised as well.
    numbers: list[str] = [precision.dtype]
    if precision.quantization == "nf4":
        config: Any = loaded.model.config
        computed = config.quantization_config.bnb_4bit_compute_dtype
        numbers.append(str(computed).removeprefix("torch."))
        if quantised and next(loaded.model.parameters()).device.type == "cpu":
            # bitsandbytes evaluates in bf16 on CPUs that have it.
            numbers.append("bfloat16")
    return max(numbers, key=_UNIT_ROUNDOFF.__getitem__)


@dataclass(frozen=True)
class Proof:
    """The two models compared; the fields are those of ``ExportReport``."""

    rows: int
    logits: int
    largest_logit_difference: float
    rms_logit_difference: float
    largest_logit: float
    agreement_of_predictions: float | None
    generated_rows: int | None
    generated_equal: int | None
    seconds: float


def prove(
    loaded_with: Mapping[str, Any], kind: TaskKind[Any], reference: Reference, work: Path
) -> Proof:
    """Repeat the reference's calls in a fresh process and compare.

    Args:
        loaded_with: the part of the request that says what to load, as ``reload`` documents it.
        work: an empty folder for what passes between the processes.

    Raises:
        ExportMismatchError: what was written cannot be loaded.
    """
    started = time.perf_counter()
    if torch.accelerator.is_available():
        # What this process keeps for later, the other one lacks now.
        torch.accelerator.empty_cache()
    calls = [*reference.forwards, *reference.generations]
    request = {
        **loaded_with,
        "inputs": str(work / "inputs.safetensors"),
        "outputs": str(work / "outputs.safetensors"),
        "calls": [{"name": call.name, "values": dict(call.values)} for call in calls],
    }
    inputs = {
        f"{number}.{name}": tensor.clone(memory_format=torch.contiguous_format)
        for number, call in enumerate(calls)
        for name, tensor in call.tensors.items()
    }
    save_file(inputs, request["inputs"])
    (work / "request.json").write_text(json.dumps(request), encoding="utf-8")
    run_reload([work / "request.json"])
    said = load_file(request["outputs"])
    seconds = time.perf_counter() - started
    return compare(kind, reference, said, seconds)


def run_reload(requests: Sequence[Path]) -> None:
    """Answer requests in a fresh process.

    Raises:
        ExportMismatchError: it failed; with the last line of what it said.
    """
    # -P: neither the working directory nor this package's folder is where it imports from.
    command = [sys.executable, "-P", str(Path(reload.__file__)), *map(str, requests)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ExportMismatchError(f"the exported folder does not load: {lines[-1]}")


def compare(
    kind: TaskKind[Any], reference: Reference, said: Mapping[str, Tensor], seconds: float
) -> Proof:
    """The reference and the reloaded model's outputs, batch by batch.

    Args:
        said: the outputs of the calls as ``<number>.<key>``, forwards first.
    """
    forwards = len(reference.forwards)
    outputs: list[dict[str, Tensor]] = [{} for _ in range(forwards + len(reference.generations))]
    for name, tensor in said.items():
        number, _, key = name.partition(".")
        outputs[int(number)][key] = tensor
    replay = _Replay(outputs[:forwards])
    difference = largest = squares = 0.0
    count = predictions = agreeing = 0
    for batch, expected in zip(reference.batches, reference.logits, strict=True):
        found = kind.logits(replay, batch)
        off = (found - expected).double().abs()
        difference, squares = (
            _worse(difference, off.max().item()),
            squares + off.square().sum().item(),
        )
        largest = _worse(largest, expected.abs().max().item())
        count += expected.numel()
        if expected.shape[-1] > 1:
            same = found.argmax(dim=-1) == expected.argmax(dim=-1)
            agreeing, predictions = agreeing + int(same.sum()), predictions + same.numel()
    generated = equal = None
    if reference.generations:
        generated = equal = 0
        for call, output in zip(reference.generations, outputs[forwards:], strict=True):
            assert call.result is not None
            found, expected = output["sequences"], call.result
            generated += len(expected)
            if found.shape == expected.shape:
                equal += int((found == expected).all(dim=-1).sum())
    return Proof(
        rows=reference.rows,
        logits=count,
        largest_logit_difference=difference,
        rms_logit_difference=math.sqrt(squares / count),
        largest_logit=largest,
        agreement_of_predictions=agreeing / predictions if predictions else None,
        generated_rows=generated,
        generated_equal=equal,
        seconds=seconds,
    )


def _worse(one: float, other: float) -> float:
    """The larger; not a number if either is not, which ``max`` would lose."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)
