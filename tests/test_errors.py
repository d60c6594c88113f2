"""Errors: every one has an exit code, a place in the docstring's tree, and crosses processes."""

from __future__ import annotations

import pickle
import re

import pytest

from peftlab import errors
from peftlab.errors import ConfigError, PeftlabError, Problem, RunError, UserError


def _all(base: type[PeftlabError]) -> list[type[PeftlabError]]:
    found = [base]
    for child in base.__subclasses__():
        found += _all(child)
    return found


@pytest.mark.parametrize(
    ("problem", "shown"),
    [
        (Problem("a.yaml:3", "is wrong."), "a.yaml:3: is wrong."),
        (Problem("", "is wrong."), "is wrong."),
        (Problem("a.yaml:3", "is wrong.", "Mend it."), "a.yaml:3: is wrong. Mend it."),
    ],
)
def test_a_problem_reads_as_one_line(problem: Problem, shown: str) -> None:
    assert str(problem) == shown


def test_an_error_carries_every_problem() -> None:
    error = ConfigError([Problem("a", "one."), Problem("b", "two.")])
    assert [problem.where for problem in error.problems] == ["a", "b"]
    assert str(error) == "a: one.\nb: two."


@pytest.mark.parametrize("given", ["wrong.", Problem("", "wrong.")])
def test_one_problem_needs_no_list(given: str | Problem) -> None:
    assert UserError(given).problems == (Problem("", "wrong."),)


@pytest.mark.parametrize("kind", _all(PeftlabError))
def test_exit_codes(kind: type[PeftlabError]) -> None:
    assert kind.exit_code == (2 if issubclass(kind, UserError) else 1)


@pytest.mark.parametrize("kind", _all(UserError))
def test_problems_survive_a_process_boundary(kind: type[UserError]) -> None:
    error = kind([Problem("a", "one.", "Mend it."), Problem("", "two.")])
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes, as multiprocessing does
    assert type(copy) is kind
    assert copy.problems == error.problems
    assert str(copy) == str(error)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = re.findall(r"\w*Error\b", errors.__doc__ or "")
    assert sorted(drawn) == sorted(kind.__name__ for kind in _all(PeftlabError))
    assert issubclass(RunError, PeftlabError)
