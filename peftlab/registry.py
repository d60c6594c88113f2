"""Names to things, found without importing them, with a suggestion for a mistyped name."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from functools import cached_property
from typing import Generic, TypeVar

from peftlab.errors import Problem, UnknownNameError

T = TypeVar("T")


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """The nearest candidates as a sentence, or all of them where none is near."""
    known = sorted(candidates)
    folded = {candidate.lower().replace("_", "-"): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower().replace("_", "-"), folded, n=3, cutoff=0.5)
    if near:
        return "Did you mean " + " or ".join(repr(folded[match]) for match in near) + "?"
    return f"Known: {', '.join(known)}." if known else ""


def unknown(what: str, name: str, candidates: Iterable[str], where: str = "") -> UnknownNameError:
    """The error for a ``name`` that is no known ``what``."""
    return UnknownNameError(Problem(where, f"no {what} {name!r}.", did_you_mean(name, candidates)))


class Registry(Generic[T]):
    """The modules of a package, each holding one thing under the same attribute.

    A module's file name is the thing's name (``-`` and ``_`` are the same), so that adding a file
    registers it and listing the names imports nothing.

    Args:
        what: the word for one thing, used in messages ("method").
        package: dotted name of the package.
        attribute: the module attribute that holds the thing.
        helpers: modules of the package that are not things.
    """

    def __init__(self, what: str, package: str, attribute: str, helpers: Iterable[str]) -> None:
        self.what = what
        self._package = package
        self._attribute = attribute
        self._helpers = frozenset(helpers)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All names, sorted, in their file spelling."""
        path = importlib.import_module(self._package).__path__
        found = (module.name for module in pkgutil.iter_modules(path))
        return tuple(sorted(name for name in found if name not in self._helpers))

    def __contains__(self, name: str) -> bool:
        return name.replace("-", "_") in self.names

    def get(self, name: str, where: str = "") -> T:
        """The thing called ``name``.

        Raises:
            UnknownNameError: with the nearest names.
        """
        module_name = name.replace("-", "_")
        if module_name not in self.names:
            raise unknown(self.what, name, self.names, where)
        module = importlib.import_module(f"{self._package}.{module_name}")
        thing: T = getattr(module, self._attribute)
        return thing
