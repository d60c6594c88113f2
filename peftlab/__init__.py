"""Which way of fine-tuning fits your model, your task and your hardware, measured.

The verbs of the command line as functions. Importing this loads no torch: a verb loads what it
needs when it is first asked for.

Example:
    >>> import peftlab
    >>> run = peftlab.train("movie-sentiment", "lora", overrides=["train.max_steps=20"])
    >>> run.record.metrics
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftlab.comparing.verb import CompareResult, compare
    from peftlab.errors import PeftlabError, RunError, UserError
    from peftlab.experiment.resolve import resolve
    from peftlab.exporting import ExportResult, export
    from peftlab.planning import Plan, plan, plan_shape
    from peftlab.predicting import LoadedRun, load_run, predict
    from peftlab.run import Request, Run, train

    __version__: str

# bitsandbytes reports at import that an optional kernel for 4-bit inference is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# The packages behind the verbs have other names than the verbs (training, comparing, …): importing
# a submodule sets an attribute of that name here, which would hide the function.
_HOMES = {
    "CompareResult": "peftlab.comparing.verb",
    "ExportResult": "peftlab.exporting",
    "LoadedRun": "peftlab.predicting",
    "PeftlabError": "peftlab.errors",
    "Plan": "peftlab.planning",
    "Request": "peftlab.run",
    "Run": "peftlab.run",
    "RunError": "peftlab.errors",
    "UserError": "peftlab.errors",
    "compare": "peftlab.comparing.verb",
    "export": "peftlab.exporting",
    "load_run": "peftlab.predicting",
    "plan": "peftlab.planning",
    "plan_shape": "peftlab.planning",
    "predict": "peftlab.predicting",
    "resolve": "peftlab.experiment.resolve",
    "train": "peftlab.run",
}

__all__ = [
    "CompareResult",
    "ExportResult",
    "LoadedRun",
    "PeftlabError",
    "Plan",
    "Request",
    "Run",
    "RunError",
    "UserError",
    "compare",
    "export",
    "load_run",
    "plan",
    "plan_shape",
    "predict",
    "resolve",
    "train",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("peftlab")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
