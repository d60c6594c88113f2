"""What benchmarks share: sections of a page between comments that name them, and a clock's wait."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from peftlab.files import write_text

if TYPE_CHECKING:
    import torch


def write_section(page: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->``.

    Raises:
        SystemExit: the page does not have the two comments.
    """
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, opened, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise SystemExit(f"{page} has no section {begin.strip()} … {end}")
    write_text(page, f"{before}{begin}{text.strip()}\n{end}{after}")


def wait(device: torch.device) -> None:
    """Until what was asked of the device is done."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
