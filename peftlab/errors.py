"""Every error that peftlab raises on purpose.

PeftlabError
├── UserError                 the request was wrong: exit code 2, no traceback
│   ├── ConfigError           a recipe, task or override does not fit the schema
│   ├── UnknownNameError      a name that no registry, file or table holds
│   ├── DataError             rows, columns or labels are not what the task needs
│   ├── AssetError            a model or data set cannot be had
│   ├── IncompatibleError     this method, task or precision does not fit this model
│   ├── NotMergeableError     this method's change cannot be folded into the weights
│   └── RunFolderError        a run folder is missing, damaged or somebody else's
└── RunError                  the request was right but the run failed: exit code 1
    ├── DivergedError         the loss is no longer a finite number
    ├── GuardError            what had to learn did not, or what was frozen moved
    └── ExportMismatchError   the exported model does not predict the same
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        where: file and line, option or dotted key; empty if there is no such place.
        message: what is wrong.
        hint: what to do about it, with the nearest valid name where there is one.
    """

    where: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        hint = f" {self.hint}" if self.hint else ""
        return f"{place}{self.message}{hint}"


class PeftlabError(Exception):
    """Base of all errors raised on purpose. ``exit_code`` is what the command line returns."""

    exit_code = 1


class UserError(PeftlabError):
    """The request was wrong. Carries every problem found, so that one round trip mends all."""

    exit_code = 2

    def __init__(self, problems: str | Problem | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            problems = Problem("", problems)
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[UserError], tuple[tuple[Problem, ...]]]:
        # Errors cross process boundaries; the default would pass the joined text as one problem.
        return type(self), (self.problems,)


class ConfigError(UserError):
    """A recipe, task or override does not fit the schema."""


class UnknownNameError(UserError):
    """A name that no registry, file or table holds."""


class DataError(UserError):
    """Rows, columns or labels are not what the task needs."""


class AssetError(UserError):
    """A model or data set cannot be had."""


class IncompatibleError(UserError):
    """This method, task or precision does not fit this model."""


class NotMergeableError(UserError):
    """This method's change cannot be folded into the base weights."""


class RunFolderError(UserError):
    """A run folder is missing, damaged or belongs to another experiment."""


class RunError(PeftlabError):
    """The request was right but the run failed."""


class DivergedError(RunError):
    """The loss is no longer a finite number."""


class GuardError(RunError):
    """What had to learn did not, or what was frozen moved."""


class ExportMismatchError(RunError):
    """The exported model does not predict what the trained one does."""
