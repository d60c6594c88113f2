"""The command to type next, as commands print it at their end."""

from __future__ import annotations

import shlex
from pathlib import Path


def export_command(folder: Path) -> str:
    """The line that exports a finished run, merged where its method can be."""
    from peftlab.experiment.store import read_experiment
    from peftlab.methods import METHODS

    experiment, _ = read_experiment(folder)
    mergeable = METHODS.get(experiment.method.kind).traits.mergeable
    target = Path("exports") / f"{experiment.task}-{experiment.recipe}"
    words = ["peftlab", "export", str(folder), "--to", str(target)]
    return shlex.join(words if mergeable else [*words, "--format", "adapter"])
