"""The verb export: write, reload in a fresh process, compare, and only then keep."""

from __future__ import annotations

import gc
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peftlab.config import display_path
from peftlab.errors import (
    ExportMismatchError,
    Problem,
    RunFolderError,
    UserError,
)
from peftlab.experiment.schema import Experiment
from peftlab.exporting.card import base_name, write_card
from peftlab.exporting.report import (
    REPORT,
    REPORT_VERSION,
    ExportReport,
    Format,
    file_hash,
    folder_hashes,
)
from peftlab.files import TEMPORARY_PREFIX, replace_folder, write_json
from peftlab.predicting import ADAPTER, ADAPTER_STATE, load_run, read_finished
from peftlab.results.record import Record
from peftlab.results.store import read_json
from peftlab.tasks.base import Splits

if TYPE_CHECKING:
    from peftlab.exporting.proof import Proof, Tolerance
    from peftlab.predicting import LoadedRun

ADAPTER_CONFIG = "adapter_config.json"
_QUANTIZATION_KEYS = {
    "int8": ("load_in_8bit", "llm_int8_skip_modules"),
    "nf4": (
        "load_in_4bit",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "bnb_4bit_compute_dtype",
        "llm_int8_skip_modules",
    ),
}
"""What of bitsandbytes' configuration is not its default."""


@dataclass(frozen=True)
class ExportResult:
    """The folder and its report.

    ``already_there``: the folder held this very export, so nothing was written.
    """

    folder: Path
    report: ExportReport
    already_there: bool = False


def export(
    run: str | Path,
    to: str | Path,
    *,
    format: Format = "merged",
    root: Path = Path("runs"),
) -> ExportResult:
    """Write a finished run's model into a folder that needs nothing of peftlab, and prove it.

    The folder is written beside its place, loaded in a fresh process by plain transformers (or by
    PEFT for an adapter), compared with the trained model on validation rows, and only then takes
    its place.

    Args:
        run: a path, ``task/recipe`` or the start of a hash.
        to: a folder that is not there, empty, or an earlier export of the same run.
        format: "merged" for a whole transformers model, "adapter" for PEFT's files.
        root: the folder of all runs.

    Raises:
        ExportMismatchError: what was written predicts something else; nothing is left behind.
        NotMergeableError: the method changes no weights.
        UserError: no such run, its data or base model is gone, the method has no PEFT adapter, or
            ``to`` holds something else.
    """
    folder, experiment, record = read_finished(run, root)
    target = Path(to).expanduser().absolute()
    adapter = folder / ADAPTER / ADAPTER_STATE
    digest = file_hash(adapter)
    if (there := _already_there(target, record, format, digest)) is not None:
        return ExportResult(target, there, already_there=True)
    _check_format(experiment, format)
    rows = experiment.build_kind().read().validation
    from peftlab.exporting.proof import prove, take_reference, tolerance_for

    loaded = load_run(folder, root=root)
    base_kwargs = _base_kwargs(loaded) if format == "adapter" else {}
    reference = take_reference(loaded, rows)
    magnitude = max(float(logits.abs().max()) for logits in reference.logits)
    tolerance = tolerance_for(loaded, magnitude, quantised=format == "adapter")
    device = str(next(loaded.model.parameters()).device)
    with _nothing_left(target), replace_folder(target) as new, _scratch(target) as work:
        started = time.perf_counter()
        if format == "merged":
            _write_merged(loaded, new)
        else:
            _write_adapter(loaded, new)
        loaded.tokenizer.save_pretrained(new)
        save_seconds = time.perf_counter() - started
        kind = loaded.kind
        # The fresh process needs the room that the trained model takes.
        del loaded
        gc.collect()
        request = _request(experiment, new, device, base_kwargs, format)
        proof = prove(request, kind, reference, work)
        report = ExportReport(
            identity=record.identity,
            seed=record.seed,
            task=record.task,
            recipe=record.recipe,
            model=record.model,
            format=format,
            adapter_sha256=digest,
            verdict=_verdict(proof, tolerance, experiment),
            dtype=experiment.precision.dtype,
            device=device,
            rows=proof.rows,
            logits=proof.logits,
            largest_logit_difference=_finite(proof.largest_logit_difference),
            rms_logit_difference=_finite(proof.rms_logit_difference),
            largest_logit=_finite(proof.largest_logit),
            relative_difference=_relative(proof),
            tolerance=tolerance.largest,
            rms_tolerance=tolerance.rms,
            tolerance_reason=tolerance.reason,
            agreement_of_predictions=proof.agreement_of_predictions,
            generated_rows=proof.generated_rows,
            generated_equal=proof.generated_equal,
            save_seconds=save_seconds,
            reload_seconds=proof.seconds,
            versions={name: version(name) for name in ("peft", "torch", "transformers")},
        )
        if report.verdict == "differs":
            raise ExportMismatchError(_mismatch(report))
        write_card(new, experiment, record, report, base_kwargs)
        report = report.model_copy(update={"files": folder_hashes(new)})
        write_json(new / REPORT, report.model_dump(mode="json"))
    return ExportResult(target, report)


def _already_there(
    target: Path, record: Record, format: Format, digest: str
) -> ExportReport | None:
    """The report of ``target`` if it holds this very export; None if it may be written.

    Raises:
        UserError: it holds something that an export must not replace.
    """
    where = display_path(target)
    if target.exists() and not target.is_dir():
        raise UserError(Problem(where, "is a file.", "Choose a folder."))
    if not target.exists() or not any(target.iterdir()):
        return None
    foreign = "Choose an empty folder."
    if not (target / REPORT).is_file():
        raise UserError(Problem(where, "is not empty and no export of peftlab.", foreign))
    try:
        there = read_json(target / REPORT, ExportReport, REPORT_VERSION, "")
    except RunFolderError as error:
        raise UserError([*error.problems, Problem(where, "is not empty.", foreign)]) from None
    if (there.identity, there.seed) != (record.identity, record.seed):
        which = f"{there.task} × {there.recipe}, seed {there.seed}, {there.identity[:12]}"
        raise UserError(Problem(where, f"holds the export of another run ({which}).", foreign))
    files = folder_hashes(target)
    if added := sorted(set(files) - set(there.files)):
        message = f"holds files that the earlier export did not write: {', '.join(added[:5])}."
        raise UserError(Problem(where, message, foreign))
    same = (there.format, there.adapter_sha256, there.files) == (format, digest, files)
    return there if same else None


def _check_format(experiment: Experiment, format: Format) -> None:
    """Refuse what the method cannot give, before anything is loaded.

    Raises:
        NotMergeableError: merged, of a method that changes no weights.
        UserError: adapter, of a method that has none.
    """
    method = experiment.build_method()
    if format == "merged" and not method.traits.mergeable:
        from torch import nn

        method.merge(nn.Module())  # It knows why not, and says so.
    if format == "adapter" and not method.traits.is_peft:
        message = (
            f"{experiment.method.kind} has no PEFT adapter: it trains the model's own weights."
        )
        raise UserError(Problem("--format adapter", message, "Use --format merged."))


def _write_merged(loaded: LoadedRun, folder: Path) -> None:
    import torch

    from peftlab.models.quiet import quiet_transformers

    with quiet_transformers():
        merged: Any = loaded.method.merge(loaded.model)
        # Adapters and heads may have been trained in fp32 on a half-precision base.
        merged = merged.to(getattr(torch, loaded.experiment.precision.dtype))
        merged.save_pretrained(folder)


def _write_adapter(loaded: LoadedRun, folder: Path) -> None:
    source = loaded.folder / ADAPTER
    for name in (ADAPTER_STATE, ADAPTER_CONFIG):
        shutil.copyfile(source / name, folder / name)
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name(loaded.experiment)
    config["revision"] = loaded.experiment.model.revision
    write_json(path, config)


def _base_kwargs(loaded: LoadedRun) -> dict[str, Any]:
    """What ``from_pretrained`` must be told to build this adapter's base, as plain data."""
    model, precision = loaded.experiment.model, loaded.experiment.precision
    config: Any = loaded.model.config
    kwargs = loaded.kind.model_kwargs(Splits((), (), (), labels=loaded.labels))
    kwargs["dtype"] = precision.dtype
    if (pad := config.get_text_config().pad_token_id) is not None:
        kwargs["pad_token_id"] = pad
    if model.revision is not None:
        kwargs["revision"] = model.revision
    if precision.quantization is not None:
        quantization = config.quantization_config.to_dict()
        kwargs["quantization_config"] = {
            key: quantization[key] for key in _QUANTIZATION_KEYS[precision.quantization]
        }
    return kwargs


def _request(
    experiment: Experiment,
    folder: Path,
    device: str,
    base_kwargs: Mapping[str, Any],
    format: Format,
) -> dict[str, Any]:
    from peftlab.models.load import resolve_path

    path = resolve_path(experiment.model.model_name_or_path)
    return {
        "folder": str(folder.resolve()),
        "auto_class": experiment.build_kind().traits.auto_class,
        "device": device,
        "trust_remote_code": experiment.model.trust_remote_code,
        "base": {"path": path, "kwargs": dict(base_kwargs)} if format == "adapter" else None,
    }


def _verdict(
    proof: Proof, tolerance: Tolerance, experiment: Experiment
) -> Literal["same", "differs"]:
    # Not "greater than", which is false for what is not a number.
    if not (
        proof.largest_logit_difference <= tolerance.largest
        and proof.rms_logit_difference <= tolerance.rms
    ):
        return "differs"
    # In half precision the next token may rightly change where two are as good.
    exact = experiment.precision.dtype == "float32" and experiment.precision.quantization is None
    return "differs" if exact and proof.generated_equal != proof.generated_rows else "same"


def _mismatch(report: ExportReport) -> str:
    said = (
        f"the reloaded model differs from the trained one: largest logit difference "
        f"{_shown(report.largest_logit_difference)} (tolerance {report.tolerance:.3g}), root mean "
        f"square {_shown(report.rms_logit_difference)} ({report.rms_tolerance:.3g}), over "
        f"{report.rows} validation rows"
    )
    if report.agreement_of_predictions is not None:
        said += f", agreement of predictions {report.agreement_of_predictions:.4g}"
    if report.generated_rows is not None:
        said += f", {report.generated_equal} of {report.generated_rows} completions equal"
    return f"{said}. Nothing was written."


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _relative(proof: Proof) -> float | None:
    return (
        _finite(proof.largest_logit_difference / proof.largest_logit)
        if proof.largest_logit
        else None
    )


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A folder on the target's disk for what passes between the processes."""
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=target.parent) as name:
        yield Path(name).resolve()


@contextmanager
def _nothing_left(target: Path) -> Iterator[None]:
    """Remove the folders above ``target`` that were made for it, if the block fails."""
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        yield
    except BaseException:
        for folder in made:
            if folder.exists():
                folder.rmdir()
        raise
