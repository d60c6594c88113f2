"""What benchmarks share: sections of a page between comments that name them, names, a wait."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable, Collection
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


def some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """An argument's type: names with ; between, as some of them have a comma."""

    def names(text: str) -> list[str]:
        chosen = text.split(";")
        if unknown := [name for name in chosen if name not in known]:
            raise ArgumentTypeError(f"no {', '.join(unknown)}; there are: {'; '.join(known)}")
        return chosen

    return names


def wait(device: torch.device) -> None:
    """Until what was asked of the device is done."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
