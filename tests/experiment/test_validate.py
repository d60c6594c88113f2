"""The verb validate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peftlab.experiment.library import names
from peftlab.experiment.validate import validate

Write = Callable[[str, str], Path]


@pytest.mark.parametrize("recipe", names("methods"))
def test_every_shipped_recipe_is_valid(recipe: str) -> None:
    findings = validate([recipe])
    assert findings.problems == ()
    assert any(recipe in what for what in findings.left_out)


def test_a_task_is_read_to_its_rows(mine: Write) -> None:
    assert validate(["ours"], "mine").problems == ()
    Path("recipes/tasks/rows.csv").write_text("txt,label\na,b\n")
    (problem,) = validate(["ours"], "mine").problems
    assert "has no column 'text'" in problem.message
    unread = validate(["ours"], "mine", data=False)
    assert unread.problems == ()
    assert any("rows" in what for what in unread.left_out)


def test_a_task_alone_is_checked_too(mine: Write) -> None:
    mine("recipes/tasks/ours.yaml", "kind: classification\nmodel: m\ndata: {trian: x}\nfoo: 1\n")
    findings = validate(["ours"])
    assert [problem.message for problem in findings.problems] == [
        "unknown key 'foo'.",
        "unknown key 'data.trian'.",
    ]
    assert any("--recipe" in what for what in findings.left_out)


def test_all_problems_of_all_names_come_once(mine: Write) -> None:
    mine("recipes/methods/mine.yaml", "method: {kind: lora, rank: 2}\noptim: {}\n")
    findings = validate(["ours", "movie-sentiment", "nope", "mine"], "mine", data=False)
    messages = [problem.message for problem in findings.problems]
    assert messages == [
        "unknown key 'method.rank'.",
        "optim.learning_rate is missing.",
        "no recipe or task 'nope'.",
    ]


def test_a_file_that_is_not_there(write: Write) -> None:
    (problem,) = validate(["nowhere/x.yaml"]).problems
    assert "nowhere/x.yaml" in problem.message
