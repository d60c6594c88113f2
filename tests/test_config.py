"""YAML 1.2 with lines, layers, overrides, and errors that name the line to mend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, ValidationError

from peftlab.config import (
    Config,
    Layer,
    Origin,
    load_yaml,
    locate,
    merge,
    origin_of,
    parse_overrides,
    validate_section,
)
from peftlab.errors import ConfigError


class Inner(Config):
    rate: float = 1.0
    names: tuple[str, ...] = ()


class Outer(Config):
    steps: int
    on: bool = False
    inner: Inner = Inner()
    maybe: Inner | None = None
    share: float = Field(default=0.5, ge=0, le=1)


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def load(text: str) -> Layer:
        Path("file.yaml").write_text(text, encoding="utf-8")
        return load_yaml(Path("file.yaml"))

    return load


def _problems(data: Any, origins: Any = None) -> list[str]:
    return [str(problem) for problem in validate_section(Outer, data, ("train",), origins or {})[1]]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-3", 1e-3),
        ("off", "off"),
        ("no", "no"),
        ("yes", "yes"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("012", 12),
        ("0x1F", 31),
        ("1:30", "1:30"),
        ("'1'", "1"),
        ("[1, a]", [1, "a"]),
    ],
)
def test_values_are_those_of_yaml_1_2(load: Any, written: str, value: Any) -> None:
    read = load(f"key: {written}\n").data["key"]
    assert read == value
    # The parser's own number and text types would reach files and hashes.
    assert type(read) is type(value)


def test_every_key_has_its_line(load: Any) -> None:
    layer = load("# a comment\nsummary: x\nmethod:\n  kind: lora\n\n  r: 8\noptim: {lr: 1}\n")
    assert {path: str(origin) for path, origin in layer.origins.items()} == {
        ("summary",): "file.yaml:2",
        ("method",): "file.yaml:3",
        ("method", "kind"): "file.yaml:4",
        ("method", "r"): "file.yaml:6",
        ("optim",): "file.yaml:7",
        ("optim", "lr"): "file.yaml:7",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", 'file.yaml:3: is not valid YAML: found duplicate key "a"'),
        ("a: [1, 2\nb: 3\n", "file.yaml:2: is not valid YAML"),
        ("a: 'x\n", "file.yaml:2: is not valid YAML"),
        ("- a\n- b\n", "file.yaml: must hold keys and values"),
        ("", "file.yaml: must hold keys and values"),
        ("just words", "file.yaml: must hold keys and values"),
    ],
)
def test_what_is_no_configuration(load: Any, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert len(caught.value.problems) == 1
    assert message in str(caught.value)


def test_tags_make_no_objects(load: Any) -> None:
    data = load("key: !!python/object/apply:os.getcwd []\n").data
    assert data == {"key": []}


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"summary: caf\xe9\n")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_yaml(path)


def test_overrides_are_yaml_values_by_dotted_key() -> None:
    layer = parse_overrides(
        ["optim.learning_rate=1e-4", "method.target_modules=[q, v]", "train.eval_strategy=no"]
    )
    assert layer.data == {
        "optim": {"learning_rate": 1e-4},
        "method": {"target_modules": ["q", "v"]},
        "train": {"eval_strategy": "no"},
    }
    assert str(layer.origins["optim", "learning_rate"]) == "--set optim.learning_rate=1e-4"


def test_an_override_may_hold_an_equals_sign_or_nothing() -> None:
    layer = parse_overrides(["data.prompt='a = {b}'", "data.text_pair="])
    assert layer.data == {"data": {"prompt": "a = {b}", "text_pair": None}}


def test_the_last_of_equal_overrides_wins() -> None:
    assert parse_overrides(["a.b=1", "a.b=2"]).data == {"a": {"b": 2}}
    assert parse_overrides(["a=1", "a.b=2"]).data == {"a": {"b": 2}}


def test_every_wrong_override_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["learning_rate", "=1", "a..b=1", "a.b=[1", "a.c=1"])
    wrong = [problem.where for problem in caught.value.problems]
    assert wrong == ["--set learning_rate", "--set =1", "--set a..b=1", "--set a.b=[1"]


def test_layers_merge_key_by_key_and_replace_lists_whole() -> None:
    lower = Layer(
        {"a": {"x": 1, "y": [1, 2]}, "b": 1},
        {("a",): Origin("low", 1), ("a", "x"): Origin("low", 2), ("a", "y"): Origin("low", 3)},
    )
    upper = Layer({"a": {"y": [3], "z": 4}, "b": {"c": 5}}, {("a", "y"): Origin("high", 9)})
    merged = merge([lower, upper])
    assert merged.data == {"a": {"x": 1, "y": [3], "z": 4}, "b": {"c": 5}}
    assert locate(("a", "x"), merged.origins) == "low:2"
    assert locate(("a", "y"), merged.origins) == "high:9"
    assert lower.data["a"] == {"x": 1, "y": [1, 2]}


def test_a_value_without_a_line_is_named_by_its_key() -> None:
    origins = {("train",): Origin("task.yaml", 5)}
    assert origin_of(("train", "steps"), origins) == Origin("task.yaml", 5)
    assert origin_of(("optim", "lr"), origins) is None
    assert locate(("optim", "lr"), origins) == "optim.lr"


def test_a_section_is_read_strictly_and_frozen() -> None:
    section, problems = validate_section(
        Outer, {"steps": 3, "inner": {"rate": 2, "names": ["a"]}}, ("train",), {}
    )
    assert problems == []
    assert section == Outer(steps=3, inner=Inner(rate=2.0, names=("a",)))
    with pytest.raises(ValidationError, match="frozen"):
        section.steps = 4


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"steps": "3"}, "train.steps: must be a valid integer, got '3'."),
        ({"steps": 3.5}, "train.steps: must be a valid integer, got 3.5."),
        ({"steps": True}, "train.steps: must be a valid integer, got True."),
        ({"steps": 3, "on": 1}, "train.on: must be a valid boolean, got 1."),
        ({"steps": 3, "on": "off"}, "train.on: must be a valid boolean, got 'off'."),
        ({"steps": 3, "share": 2}, "train.share: must be less than or equal to 1, got 2."),
        ({}, "train.steps is missing."),
        ({"steps": 3, "step": 1}, "unknown key 'train.step'. Did you mean 'steps'?"),
        (
            {"steps": 3, "inner": {"raet": 1}},
            "unknown key 'train.inner.raet'. Did you mean 'rate'?",
        ),
        (
            {"steps": 3, "maybe": {"raet": 1}},
            "unknown key 'train.maybe.raet'. Did you mean 'rate'?",
        ),
        ({"steps": 3, "inner": {"names": ["a", 1]}}, "train.inner.names: must be a valid string"),
        ({"steps": 3, "inner": 4}, "train.inner: "),
    ],
)
def test_a_wrong_value_is_one_problem(data: dict[str, Any], problem: str) -> None:
    found = _problems(data)
    assert len(found) == 1
    assert problem in found[0]


def test_all_problems_come_at_once_with_their_lines() -> None:
    origins = {("train", "steps"): Origin("t.yaml", 2), ("train", "on"): Origin("t.yaml", 7)}
    found = _problems({"steps": "x", "on": 3}, origins)
    assert [line.split(": ")[0] for line in found] == ["t.yaml:2", "t.yaml:7"]


def test_a_section_that_is_no_mapping() -> None:
    assert len(_problems([1, 2])) == 1
    assert len(_problems("fast")) == 1
