"""``merge_report.json``: the proof that goes with an export. No torch here."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field

from peftlab.config import Config

REPORT, REPORT_VERSION = "merge_report.json", 1
Format = Literal["merged", "adapter"]


class ExportReport(Config):
    """What was exported and how it compares with the trained model. All logits in fp32.

    Args:
        identity: of the run, with its seed.
        adapter_sha256: of the run's adapter that was exported.
        dtype: of the exported weights.
        verdict: "same" if no logit differs by more than ``tolerance``, nor all of them by more than
            ``rms_tolerance`` in the root mean square, and in fp32 no generated token differs; only
            such exports are kept.
        rows: validation rows compared; ``logits`` how many numbers that was.
        largest_logit: magnitude of the largest logit of the trained model.
        relative_difference: ``largest_logit_difference`` in units of ``largest_logit``.
        agreement_of_predictions: share of predictions that are the same; None for numbers.
        generated_rows: prompts completed by both; None where the task generates nothing.
        files: the SHA-256 of each other file in the folder.
    """

    schema_version: int = REPORT_VERSION
    identity: str
    seed: int
    task: str
    recipe: str
    model: str
    format: Format
    adapter_sha256: str
    verdict: Literal["same", "differs"]
    dtype: str
    device: str
    rows: int
    logits: int
    largest_logit_difference: float | None
    rms_logit_difference: float | None
    largest_logit: float | None
    relative_difference: float | None
    tolerance: float
    rms_tolerance: float
    tolerance_reason: str
    agreement_of_predictions: float | None
    generated_rows: int | None
    generated_equal: int | None
    save_seconds: float
    reload_seconds: float
    versions: dict[str, str]
    files: dict[str, str] = Field(default_factory=dict)


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file below ``folder`` but the report."""
    return {
        path.relative_to(folder).as_posix(): file_hash(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / REPORT
    }
