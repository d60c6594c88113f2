"""peftlab doctor: what this machine can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from peftlab.cli.base import Verb
from peftlab.cli.options import json_option
from peftlab.cli.output import answer, problems_json, say, table
from peftlab.units import format_bytes

if TYPE_CHECKING:
    from peftlab.doctor import Diagnosis


@click.command(cls=Verb, examples=["peftlab doctor", "peftlab doctor --json"])
@json_option
def doctor() -> None:
    """Say what this machine can do.

    Also what is missing, and what to do about it. Exit code 1 if something is missing. Downloads
    nothing.
    """
    from peftlab.doctor import diagnose

    found = diagnose()
    answer({**found.as_dict(), "problems": problems_json(found.problems)})
    say(table(("what", "found"), _facts(found)))
    for problem in found.problems:
        say(f"error: {problem}", err=True)
    click.get_current_context().exit(1 if found.problems else 0)


def _facts(found: Diagnosis) -> list[tuple[str, str]]:
    yes = {True: "yes", False: "no"}
    devices = [
        (
            "processor" if number == 0 else f"cuda:{number - 1}",
            f"{device.name}, {format_bytes(device.memory_bytes)}, bf16: {yes[device.bf16]}",
        )
        for number, device in enumerate(found.devices)
    ]
    here = [name for name, cached in found.cached.items() if cached]
    not_here = [name for name, cached in found.cached.items() if not cached]
    return [
        ("python", f"{found.python} on {found.platform}"),
        *devices,
        ("cores", f"{found.cores}, torch uses {found.threads} threads"),
        ("memory available", format_bytes(found.memory_available_bytes)),
        ("cuda", found.cuda or "no"),
        ("8-bit optimizers", yes[found.eight_bit]),
        ("cache", f"{found.cache_dir}, {format_bytes(found.disk_free_bytes)} free"),
        ("cached", ", ".join(here) or "–"),
        ("downloaded when used", ", ".join(not_here) or "–"),
        *((package, version or "missing") for package, version in found.versions.items()),
    ]


COMMAND = doctor
