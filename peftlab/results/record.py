"""What a run left behind: ``record.json``. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from peftlab.config import Config

SCHEMA_VERSION = 1
Status = Literal["ok", "oom", "diverged", "interrupted", "failed"]


class ParameterCounts(Config):
    """Tensor elements by role; ``trainable = adapter + head + base_trainable``.

    ``total`` counts what PEFT's ``print_trainable_parameters`` counts: every parameter of the model
    that trains, the frozen original of a trained copy included.
    """

    total: int
    trainable: int
    adapter: int
    head: int
    base_trainable: int

    @property
    def peft_line(self) -> str:
        """Exactly as PEFT prints it."""
        share = 100 * self.trainable / self.total
        return (
            f"trainable params: {self.trainable:,d} || all params: {self.total:,d} "
            f"|| trainable%: {share:.4f}"
        )


class PhaseMarks(Config):
    """Live bytes at the marks of the measured step."""

    start_bytes: int
    forward_end_bytes: int
    forward_peak_bytes: int
    backward_end_bytes: int
    backward_peak_bytes: int
    optimizer_end_bytes: int
    optimizer_peak_bytes: int


class Memory(Config):
    """Memory of a run by part, each figure with its source (``docs/measuring.md``)."""

    source: str
    weights_bytes: int | None = None
    gradients_bytes: int | None = None
    optimizer_bytes: int | None = None
    activations_bytes: int | None = None
    logits_bytes: int | None = None
    temporary_bytes: int | None = None
    peak_bytes: int | None = None
    peak_moment: str | None = None
    marks: PhaseMarks | None = None
    reserved_bytes: int | None = None
    process_peak_bytes: int | None = None
    measured_step: int | None = None
    measured_batch: tuple[int, int] | None = None


class Speed(Config):
    """Time and arithmetic. ``tokens_per_second`` counts real tokens, the first step excluded.

    ``model_flops_utilisation`` is ``train_flops`` over what ``matmul_flops_per_second``, measured
    beside the run, would have done in ``train_seconds``. ``compile_seconds`` are in these too.
    """

    train_seconds: float | None = None
    eval_seconds: float | None = None
    load_seconds: float | None = None
    tokens_per_second: float | None = None
    padding_share: float | None = None
    flops_per_step: int | None = None
    train_flops: float | None = None
    flops_source: str = ""
    matmul_flops_per_second: float | None = None
    model_flops_utilisation: float | None = None
    compile_seconds: float | None = None


class TrunkCache(Config):
    """What became of the frozen trunk's activations.

    Of a training in stages, ``key`` to ``rows`` are those of the lowest trunk that was kept, and
    bytes, seconds and other rows the sums over the stages.

    Args:
        key: the trunk's name in the cache; empty if nothing was kept.
        boundary: up to where they were kept.
        filled_from: the lower boundaries, kept by other runs, above which they were computed.
        rows: in the cache at the end, those of other runs included.
        stored_bytes: of these.
        fill_seconds: spent on computing training rows before the first step; in ``train_seconds``.
        replayed_rows: rows that the model did not compute; ``computed_rows`` are those it did.
        found_rows: training rows that were there before, computed by an earlier run.
        note: why the cache was not used, or what happened to it.
    """

    key: str = ""
    boundary: str = ""
    filled_from: str = ""
    rows: int = 0
    stored_bytes: int = 0
    fill_seconds: float = 0.0
    replayed_rows: int = 0
    computed_rows: int = 0
    found_rows: int = 0
    note: str = ""


class Environment(Config):
    """Where it ran."""

    device: str
    num_processes: int
    num_threads: int
    python: str
    platform: str
    versions: dict[str, str]
    git_commit: str | None = None
    git_dirty: bool | None = None


class CurvePoint(Config):
    """One evaluation during training."""

    step: int
    epoch: float
    train_loss: float | None
    metric: float | None


class Record(Config):
    """One run. A value that is not there is None, never invented.

    ``labels`` are a classifier's in index order: a run is loaded again without its data.
    """

    schema_version: int = SCHEMA_VERSION
    identity: str
    task: str
    recipe: str
    model: str
    seed: int
    status: Status
    error: str | None = None
    command: str = ""
    metric: str = ""
    metric_better: Literal["max", "min"] = "max"
    metrics: dict[str, float | None] = Field(default_factory=dict)
    validation_metrics: dict[str, float | None] = Field(default_factory=dict)
    majority_baseline: float | None = None
    labels: tuple[str, ...] = ()
    train_rows: int | None = None
    test_rows: int | None = None
    params: ParameterCounts | None = None
    saved_bytes: int | None = None
    memory: Memory | None = None
    plan: dict[str, Any] | None = None
    speed: Speed = Field(default_factory=Speed)
    trunk_cache: TrunkCache = Field(default_factory=TrunkCache)
    curve: tuple[CurvePoint, ...] = ()
    steps_done: int = 0
    final_train_loss: float | None = None
    notes: tuple[str, ...] = ()
    environment: Environment | None = None
