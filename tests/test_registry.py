"""Names to things: found by file name, imported late, suggested when mistyped."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from peftlab.errors import UnknownNameError
from peftlab.registry import Registry, did_you_mean, unknown


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[str]:
    package = tmp_path / "shelf_of_things"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "base.py").write_text("THING = 'no thing'")
    (package / "red_apple.py").write_text("THING = 'apple'")
    (package / "pear.py").write_text("THING = 'pear'")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.startswith("shelf_of_things")]:
        monkeypatch.delitem(sys.modules, name)
    return Registry("thing", "shelf_of_things", "THING", helpers={"base"})


def test_listing_imports_nothing(registry: Registry[str]) -> None:
    assert registry.names == ("pear", "red_apple")
    assert not any(name.startswith("shelf_of_things.") for name in sys.modules)


@pytest.mark.parametrize("name", ["red_apple", "red-apple"])
def test_dash_and_underscore_are_the_same(registry: Registry[str], name: str) -> None:
    assert name in registry
    assert registry.get(name) == "apple"


@pytest.mark.parametrize("name", ["base", "red apple", "PEAR", ""])
def test_what_is_no_thing(registry: Registry[str], name: str) -> None:
    assert name not in registry
    with pytest.raises(UnknownNameError):
        registry.get(name)


def test_an_unknown_name_says_where_and_what_is_near(registry: Registry[str]) -> None:
    with pytest.raises(UnknownNameError) as caught:
        registry.get("red-aple", "task.yaml:3")
    assert str(caught.value) == "task.yaml:3: no thing 'red-aple'. Did you mean 'red_apple'?"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("lore", "Did you mean 'lora'?"),
        ("LORA", "Did you mean 'lora'?"),
        ("ptuning_v2", "Did you mean 'ptuning-v2'?"),
        ("zzz", "Known: full, lora, ptuning-v2."),
    ],
)
def test_suggestions(name: str, sentence: str) -> None:
    assert did_you_mean(name, ["ptuning-v2", "lora", "full"]) == sentence


def test_there_may_be_nothing_to_suggest() -> None:
    assert did_you_mean("lora", []) == ""
    assert str(unknown("run", "lora", [])) == "no run 'lora'."
