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
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftlab.compare.verb import CompareResult, compare
    from peftlab.errors import PeftlabError, RunError, UserError
    from peftlab.experiment.resolve import resolve
    from peftlab.export import ExportResult, export
    from peftlab.predict import LoadedRun, load_run, predict
    from peftlab.run import Request, Run, train

    __version__: str

_HOMES = {
    "CompareResult": "peftlab.compare.verb",
    "ExportResult": "peftlab.export",
    "LoadedRun": "peftlab.predict",
    "PeftlabError": "peftlab.errors",
    "Request": "peftlab.run",
    "Run": "peftlab.run",
    "RunError": "peftlab.errors",
    "UserError": "peftlab.errors",
    "compare": "peftlab.compare.verb",
    "export": "peftlab.export",
    "load_run": "peftlab.predict",
    "predict": "peftlab.predict",
    "resolve": "peftlab.experiment.resolve",
    "train": "peftlab.run",
}

__all__ = [
    "CompareResult",
    "ExportResult",
    "LoadedRun",
    "PeftlabError",
    "Request",
    "Run",
    "RunError",
    "UserError",
    "compare",
    "export",
    "load_run",
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


class _Package(ModuleType):
    """The package, whose verbs stay verbs.

    Importing ``peftlab.train.loop`` makes Python set ``peftlab.train`` to the subpackage, which
    would take the place of the function of that name, depending on what was imported before.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
