"""Where recipes and tasks are looked up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from peftlab.errors import ConfigError, UnknownNameError
from peftlab.experiment.library import find, find_all, find_both, names, shipped_folder
from peftlab.experiment.validate import find_one

Write = Callable[[str, str], Path]


def test_what_is_shipped_is_found_anywhere(write: Write) -> None:
    for shelf in ("methods", "tasks"):
        files = {path.stem: path for path in (shipped_folder() / shelf).glob("*.yaml")}
        assert files
        assert names(shelf) == files


def test_a_users_file_hides_the_shipped_one(write: Write) -> None:
    path = write("recipes/methods/lora.yaml", "summary: my own\n")
    assert find("methods", "lora").path.resolve() == path
    assert names("methods")["full"].parent == shipped_folder() / "methods"
    assert next(e for e in find_all("methods") if e.name == "lora").layer.data == {
        "summary": "my own"
    }


def test_a_path_wins_over_names(write: Write) -> None:
    path = write("elsewhere/lora.yaml", "summary: there\n")
    entry = find("methods", "elsewhere/lora.yaml")
    assert (entry.name, entry.path.resolve()) == ("lora", path)


def test_yml_is_an_ending_too(write: Write) -> None:
    write("recipes/tasks/mine.yml", "summary: mine\n")
    assert find("tasks", "mine").layer.data == {"summary": "mine"}


def test_an_unknown_name_or_file_has_a_suggestion(write: Write) -> None:
    write("here/lora.yaml", "summary: there\n")
    with pytest.raises(UnknownNameError, match=r"^no recipe 'lroa'\. Did you mean 'lora'"):
        find("methods", "lroa")
    with pytest.raises(UnknownNameError, match=r"no recipe file 'here/lroa.yaml'.*'here/lora.yaml"):
        find("methods", "here/lroa.yaml")


def test_all_broken_files_are_named_together(write: Write) -> None:
    write("recipes/methods/a.yaml", "- x\n")
    write("recipes/methods/b.yaml", "x: [\n")
    with pytest.raises(ConfigError) as caught:
        find_all("methods")
    places = [problem.where for problem in caught.value.problems]
    assert len(places) == 2
    assert "a.yaml" in places[0]
    assert "b.yaml" in places[1]


def test_task_and_recipe_may_both_be_wrong(write: Write) -> None:
    with pytest.raises(ConfigError) as caught:
        find_both("movie-sentimnt", "lroa")
    assert [problem.message for problem in caught.value.problems] == [
        "no task 'movie-sentimnt'.",
        "no recipe 'lroa'.",
    ]
    with pytest.raises(UnknownNameError, match="no recipe 'lroa'"):
        find_both("movie-sentiment", "lroa")


def test_one_name_finds_a_recipe_or_a_task(mine: Write) -> None:
    assert find_one("mine")[0] == "methods"
    assert find_one("ours")[0] == "tasks"
    assert find_one("recipes/methods/mine.yaml")[0] == "methods"
    assert find_one("recipes/tasks/ours.yaml")[0] == "tasks"


def test_one_name_must_be_one_thing(mine: Write) -> None:
    mine("recipes/tasks/mine.yaml", "kind: classification\n")
    mine("notes.yaml", "summary: neither\n")
    with pytest.raises(UnknownNameError, match="'mine' is a recipe and a task"):
        find_one("mine")
    with pytest.raises(UnknownNameError, match=r"no recipe or task 'mien'\. Did you mean 'mine'"):
        find_one("mien")
    with pytest.raises(ConfigError, match=r"notes\.yaml: is no recipe.*and no task"):
        find_one("notes.yaml")
